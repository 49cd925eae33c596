"""Datasets by name, opened: read, split, framed and normalized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.training.data import builtin, folders
from lrconvert.training.data.augment import Augment, Framing, Normalization, image_transform
from lrconvert.training.data.image_source import ImageSource
from lrconvert.training.data.images import Images, Splits, TensorImages, hold_out
from lrconvert.training.data.python_file import splits_of, user_data
from lrconvert.training.data.source import MemorySource, Source


@dataclass(frozen=True)
class Kind:
    """A dataset that has a name.

    Attributes:
        read: from a folder, and whether to download what is not there.
        mean, std: of each channel, for images from 0 to 1.
        size: height and width that images of many sizes get; None where all have one size.
        validation: share of the training images that is held out.
    """

    read: Callable[[Path, bool], Splits]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    validation: float = 0.1


# Cuttlefish normalizes CIFAR and SVHN by ImageNet's figures too.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_AS_GIVEN = ((0.0,), (1.0,))

DATASETS: dict[str, Kind] = {
    "cifar10": Kind(builtin.cifar10, *_IMAGENET),
    "cifar100": Kind(builtin.cifar100, *_IMAGENET),
    "svhn": Kind(builtin.svhn, *_IMAGENET),
    "mnist": Kind(builtin.mnist, (0.1307,), (0.3081,)),
    "fashion-mnist": Kind(builtin.fashion_mnist, (0.2860,), (0.3530,)),
    "digits": Kind(builtin.digits, *_AS_GIVEN),
    "imagenet": Kind(folders.imagenet, *_IMAGENET, size=224, validation=0.02),
    "folder": Kind(folders.class_folders, *_IMAGENET, size=224),
}


@dataclass(frozen=True)
class Dataset:
    """A dataset that is ready to be loaded.

    Attributes:
        name: as it was asked for.
        train: to train on.
        validation: held out of training, to choose on; the same images in every run.
        test: to report on once, at the end; None where there is none.
        num_classes: labels are 0 … num_classes − 1.
        input_shape: (C, H, W) of the images that loaders give.
        framing, normalization: how images got this size, and their values.
        notes: how many images there are, and where validation and test come from, in words.
    """

    name: str
    train: Source
    validation: Source
    test: Source | None
    num_classes: int
    input_shape: tuple[int, int, int]
    framing: Framing
    normalization: Normalization
    notes: tuple[str, ...]


def open_dataset(
    name: str,
    *,
    data_dir: str | Path = "data",
    download: bool = True,
    validation: float | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
    args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Dataset:
    """The dataset `name`: a key of `DATASETS`, or "path/to/file.py:factory" (see `python_file.user_data`).

    Small sets are read into memory. Of several processes let one open the dataset first: it may have to download.

    Args:
        name: of the dataset.
        data_dir: the folder that it lies in, or is downloaded to.
        download: whether to download what is not there; ImageNet, folders and digits never are.
        validation: share of the training images to hold out, where the dataset names no validation images itself;
            None for the usual: 0.1, of ImageNet 0.02.
        img_size: height and width of the images; None for their own, and 224 for ImageNet and folders.
        mean: of each channel, or one for all, for images from 0 to 1; None for the dataset's usual.
        std: likewise.
        augment: how training images are changed; None for not at all.
        args: keyword arguments of the factory.
        seed: of the choice of validation images. Not of training: runs that are compared hold out the same images.

    Raises:
        UnknownNameError: there is no such dataset.
        UsageError: an argument is out of range, or does not fit the images.
        LrconvertError: the files are not there; the message names them.
    """
    file, colon, factory = name.rpartition(":")
    from_file = bool(colon) and file.endswith(".py")
    if from_file:
        kind = Kind(lambda folder, download: user_data(file, factory, args or {}), *_AS_GIVEN)
    elif name not in DATASETS:
        raise UnknownNameError("dataset", name, [*DATASETS, "path/to/file.py:factory"])
    elif args:
        raise UsageError(f"dataset '{name}' takes no arguments; only path/to/file.py:factory does")
    else:
        kind = DATASETS[name]
    framing = Framing(kind.size if img_size is None else img_size, crop=from_file or kind.size is not None)
    splits = kind.read(Path(data_dir), download)
    share = kind.validation if validation is None else validation
    return _dataset(name, splits, kind, framing, share, mean, std, augment, seed)


def open_made(
    name: str,
    made: Any,
    *,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """The dataset of what the factory `name` made already, as `open_dataset` opens it: the same images are held out.

    Args:
        name: "path/to/file.py:factory".
        made: what it returned.
        img_size, mean, std: see `open_dataset`.

    Raises:
        UsageError: an argument is out of range, or does not fit the images.
        LrconvertError: it made something else.
    """
    splits = splits_of(name, made)
    kind = Kind(lambda folder, download: splits, *_AS_GIVEN)
    return _dataset(name, splits, kind, Framing(img_size, crop=True), kind.validation, mean, std, None, 0)


def open_images(
    folder: str | Path,
    *,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """The images in `folder`, at any depth and with no classes, framed and normalized as the dataset "folder" is.

    Args:
        folder: where they are.
        img_size, mean, std: see `open_dataset`.

    Raises:
        UsageError: an argument is out of range, or does not fit the images.
        LrconvertError: there are none.
    """
    kind = DATASETS["folder"]
    framing = Framing(kind.size if img_size is None else img_size, crop=True)
    images = folders.loose_images(Path(folder))
    source, _, _ = _preparation(images, kind, framing, mean, std)
    return source(images, Augment())


def _dataset(
    name: str,
    splits: Splits,
    kind: Kind,
    framing: Framing,
    share: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    augment: Augment | None,
    seed: int,
) -> Dataset:
    train, held_out, notes = _split(splits, share, seed)
    source, shape, normalization = _preparation(train, kind, framing, mean, std)
    return Dataset(
        name,
        source(train, augment or Augment()),
        source(held_out, Augment()),
        None if splits.test is None else source(splits.test, Augment()),
        splits.num_classes,
        shape,
        framing,
        normalization,
        notes,
    )


def _preparation(
    images: Images, kind: Kind, framing: Framing, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Callable[[Images, Augment], Source], tuple[int, int, int], Normalization]:
    """What makes a source of images like `images`, the (C, H, W) that it gives them, and how it normalizes them."""
    channels, height, width = _shape(images, framing)
    normalization = Normalization(
        _per_channel("mean", kind.mean if mean is None else mean, channels),
        _per_channel("std", kind.std if std is None else std, channels),
    )
    source = partial(_source, framing=framing, normalization=normalization, size=(height, width))
    return source, (channels, height, width), normalization


def _split(splits: Splits, share: float, seed: int) -> tuple[Images, Images, tuple[str, ...]]:
    """(images to train on, images to validate on, notes)."""
    if splits.validation is None:
        train, held_out = hold_out(splits.train, share, seed)
        origin = "held out of the training images"
    else:
        train, held_out, origin = splits.train, splits.validation, "that the dataset keeps for it"
    notes = (f"{len(train):,} images to train on", f"{len(held_out):,} to validate on, {origin}")
    return (
        train,
        held_out,
        (*notes, f"{len(splits.test):,} to test on" if splits.test is not None else "no test images"),
    )


def _shape(images: Images, framing: Framing) -> tuple[int, int, int]:
    """(C, H, W) of a framed image."""
    image, _ = images[0]
    # A file is decoded in RGB.
    channels, *size = image.shape if isinstance(image, Tensor) else (3, image.height, image.width)
    height, width = size if framing.size is None else (framing.size, framing.size)
    return channels, height, width


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UsageError(f"{name} has {len(values)} values, but the images have {channels} channels")
    if name == "std" and min(values) <= 0:
        raise UsageError(f"std must be positive, not {min(values):g}")
    return tuple(values) * (channels // len(values))


def _source(
    images: Images, augment: Augment, framing: Framing, normalization: Normalization, size: tuple[int, int]
) -> Source:
    if isinstance(images, TensorImages) and augment.in_batches:
        return MemorySource(images, augment, framing, normalization)
    return ImageSource(
        images,
        image_transform(augment, framing, normalization, size),
        image_transform(None, framing, normalization, size),
    )
