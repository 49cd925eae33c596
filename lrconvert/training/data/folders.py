"""Images in folders: one folder a class, or in any order without labels."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from lrconvert.errors import LrconvertError
from lrconvert.training.data.images import FileImages, Splits


def imagenet(folder: Path, download: bool) -> Splits:
    """ImageNet's layout: `train/CLASS/*.jpeg`, and `val/CLASS/*.jpeg`, which is the set to test on."""
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise LrconvertError(
                f"imagenet: {folder / part} is missing: ImageNet cannot be downloaded here; put its images into "
                f"{folder}/train/CLASS/*.JPEG and {folder}/val/CLASS/*.JPEG"
            )
    classes = _classes(folder / "train")
    return Splits(_images(folder / "train", classes), None, _images(folder / "val", classes, some=True), len(classes))


def class_folders(folder: Path, download: bool) -> Splits:
    """`train/CLASS/*` and, where they exist, `val/CLASS/*` for validation and `test/CLASS/*`; or only `CLASS/*`."""
    if not folder.is_dir():
        raise LrconvertError(
            f"folder: {folder} is missing: give a folder with train/CLASS/*.png and val/ or test/ beside train/, "
            "or with CLASS/*.png"
        )
    train = folder / "train" if (folder / "train").is_dir() else folder
    classes = _classes(train)
    rest = [
        _images(folder / part, classes, some=True) if train != folder and (folder / part).is_dir() else None
        for part in ("val", "test")
    ]
    return Splits(_images(train, classes), rest[0], rest[1], len(classes))


def loose_images(folder: Path) -> FileImages:
    """Every image in `folder`, at any depth, in alphabetical order; their label is −1.

    Raises:
        LrconvertError: there is none.
    """
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not paths:
        raise LrconvertError(f"{folder}: no images, here or in folders in it; {', '.join(IMG_EXTENSIONS)} are read")
    return FileImages(paths, torch.full((len(paths),), -1))


def _classes(folder: Path) -> Mapping[str, int]:
    """Name of each class to its number, in alphabetical order."""
    try:
        names, numbers = find_classes(folder)
    except FileNotFoundError:
        raise LrconvertError(f"{folder} has no folders: put the images of each class into one of its own") from None
    if len(names) < 2:
        raise LrconvertError(f"{folder} has one class only, '{names[0]}': put the images of each class into a folder")
    return dict(numbers)


def _images(folder: Path, classes: Mapping[str, int], some: bool = False) -> FileImages:
    """The images in `folder`, with the class numbers of the training folder; `some` of the classes may be enough.

    Numbered on its own, a folder that lacks a class would shift the numbers of all that follow.
    """
    try:
        unknown = sorted(set(find_classes(folder)[0]) - set(classes))
        if unknown:
            raise LrconvertError(f"{folder / unknown[0]}: there is no class of this name to train on")
        samples = make_dataset(folder, dict(classes), IMG_EXTENSIONS, allow_empty=some)
    except FileNotFoundError as error:
        raise LrconvertError(f"{folder}: {error}") from None
    if not samples:
        raise LrconvertError(f"{folder}: no images in the folders of the classes; {', '.join(IMG_EXTENSIONS)} are read")
    return FileImages([path for path, _ in samples], torch.tensor([label for _, label in samples]))
