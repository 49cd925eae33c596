"""Calls of a model with data that needs no labels: to calibrate on, to distil from, to compare outputs on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrconvert.errors import LrconvertError, ModelError, UnknownNameError
from lrconvert.inputs import Call
from lrconvert.network import Network, own_architecture
from lrconvert.samples.arrays import SUFFIXES, read_arrays
from lrconvert.samples.check import checked
from lrconvert.samples.factory import read_factory
from lrconvert.samples.images import ImageSettings, read_dataset, read_folder
from lrconvert.samples.texts import read_texts
from lrconvert.samples.wanted import Found, Wanted
from lrconvert.training.data import DATASETS

__all__ = ["Call", "Samples", "read_samples"]

# What there is besides the names of datasets.
_OTHERS = ("path/to/file.py:factory", "a folder of images", "a text file", *(f"a {each} file" for each in SUFFIXES))


@dataclass(frozen=True)
class Samples:
    """Examples that are in memory, as calls of a model.

    Attributes:
        calls: batches.
        notes: how many examples there are and where they come from, in words.
    """

    calls: tuple[Call, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Examples in all calls together."""
        return sum(call.size for call in self.calls)


def read_samples(
    data: str,
    network: Network,
    *,
    count: int = 256,
    batch_size: int = 32,
    skip: int = 0,
    seed: int = 0,
    data_dir: str | Path = "data",
    download: bool = True,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_tokens: int = 128,
) -> Samples:
    """Examples from `data` as `network` is called with them; labels, where there are any, are left out.

    `data` is one of these:

    - the name of a dataset, see `lrconvert.training.data`: images to train on, without those held out to validate on,
      not augmented;
    - "path/to/file.py:factory": see `lrconvert.samples.factory.read_factory`;
    - a folder of images, at any depth, with or without classes: prepared as those of the dataset "folder";
    - a .npz, .npy, .pt, .pth or .safetensors file of inputs: see `lrconvert.samples.arrays.read_arrays`;
    - any other file: UTF-8 text, one text a line, tokenized by the tokenizer in the network's own folder.

    Examples are chosen at random, except those of an iterable that a factory returns: they are taken as they come.
    Two choices with one seed are disjoint where one skips what the other takes.

    Args:
        data: where the examples come from.
        network: what is to be called with them.
        count: examples to take.
        batch_size: examples a call, at most.
        skip: examples to pass over first, in the same random order.
        seed: of that order.
        data_dir, download: of a dataset, see `lrconvert.training.data.open_dataset`.
        img_size, mean, std: of images, likewise; None for what the network's file says that it was trained on. Else
            ImageNet and folders get the size that the network is known to take.
        max_tokens: of a text, which is cut there or where the model's own limit is.

    Raises:
        UnknownNameError: there is no such data.
        UsageError: an argument is out of range, or the network cannot be called with this data.
        LrconvertError: the data cannot be read, or there is none.
    """
    wanted = Wanted(count, batch_size, skip, seed)
    usual = network.images
    images = ImageSettings(
        data_dir,
        download,
        usual.img_size if img_size is None else img_size,
        usual.mean if mean is None else mean,
        usual.std if std is None else std,
    )
    network = _with_own_model(network)
    found = _read(data, network, wanted, images, max_tokens)
    samples = Samples(checked(found.calls, network, data), (found.note,))
    if samples.size < count:
        rest = f" after the {skip:,} that were skipped" if skip else ""
        note = f"{count:,} examples were asked for, but {data} has {samples.size:,}{rest}"
        return Samples(samples.calls, (*samples.notes, note))
    return samples


def _with_own_model(network: Network) -> Network:
    """`network` with the model of its folder's config.json, where its layers had to be read from the file alone.

    transformers loads older keys than its models have: what `load` returns is that model all the same.
    """
    architecture = None if network.module or network.checkpoint is None else own_architecture(network.checkpoint)
    if architecture is None:
        return network
    try:
        return replace(network, architecture=architecture, module=architecture.build(), inputs=architecture.inputs)
    except ModelError:
        return network


def _read(data: str, network: Network, wanted: Wanted, images: ImageSettings, max_tokens: int) -> Found:
    file, colon, factory = data.rpartition(":")
    if colon and file.endswith(".py"):
        return read_factory(file, factory, network, wanted, images)
    if data in DATASETS:
        return read_dataset(data, network, wanted, images)
    path = Path(data)
    if path.is_dir():
        return read_folder(path, network, wanted, images)
    if path.suffix in SUFFIXES and path.is_file():
        return read_arrays(path, wanted)
    if path.is_file():
        return read_texts(path, network, wanted, max_tokens)
    if path.suffix or len(path.parts) > 1:
        raise LrconvertError(f"{data}: no such file or folder")
    raise UnknownNameError("data", data, [*DATASETS, *_OTHERS])
