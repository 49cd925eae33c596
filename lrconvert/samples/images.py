"""Calls with images: of a dataset that has a name, or in a folder without labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrconvert.inputs import Call, Input
from lrconvert.network import Network
from lrconvert.samples.wanted import Found, Wanted
from lrconvert.training.data import DATASETS, Source, open_dataset, open_images


@dataclass(frozen=True)
class ImageSettings:
    """How images are found and prepared; see `lrconvert.training.data.open_dataset`."""

    data_dir: str | Path
    download: bool
    img_size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


def read_dataset(name: str, network: Network, wanted: Wanted, settings: ImageSettings) -> Found:
    """Images that the dataset `name` trains on."""
    # Small images are taken as they are: a network for them was trained on them so.
    usual = _size_of(network) if DATASETS[name].size is not None else None
    dataset = open_dataset(
        name,
        data_dir=settings.data_dir,
        download=settings.download,
        img_size=settings.img_size if settings.img_size is not None else usual,
        mean=settings.mean,
        std=settings.std,
    )
    return image_calls(dataset.train, network, wanted, name)


def read_folder(folder: Path, network: Network, wanted: Wanted, settings: ImageSettings) -> Found:
    """Images in a folder, at any depth."""
    size = settings.img_size if settings.img_size is not None else _size_of(network)
    source = open_images(folder, img_size=size, mean=settings.mean, std=settings.std)
    return image_calls(source, network, wanted, str(folder))


def image_calls(source: Source, network: Network, wanted: Wanted, where: str) -> Found:
    """Images of `source`, passed by the name that the network knows images by."""
    taken = _input_of(network)
    name = taken.name if taken is not None else None
    chosen = wanted.choose(len(source), where)
    calls = [
        Call((images,), {}, len(images)) if name is None else Call((), {name: images}, len(images))
        for images, _ in source.reader(0, False)(chosen.split(wanted.batch_size), None)
    ]
    return Found(tuple(calls), f"{len(chosen):,} images of {where}, out of {len(source):,}")


def _input_of(network: Network) -> Input | None:
    """The input of the network that is an image, where its inputs are known."""
    return next((each for each in network.inputs or () if each.kind == "float" and len(each.shape) == 3), None)


def _size_of(network: Network) -> int | None:
    """Height and width of the images that the network is known to take; None where they differ or are not known."""
    taken = _input_of(network)
    return taken.shape[1] if taken is not None and taken.shape[1] == taken.shape[2] else None
