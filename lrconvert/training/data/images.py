"""Images before they become batches: in memory, in files, or in a dataset of the user's; and how they are split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torchvision.datasets.folder import pil_loader

from lrconvert.errors import LrconvertError, UsageError


class Images(Protocol):
    """Labelled images that are read by number."""

    @property
    def labels(self) -> Tensor | None:
        """(n,) int64, or None where only reading every image would tell."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(image, label); the image is a PIL image or a tensor (C, H, W)."""

    def part(self, chosen: Tensor) -> Self:
        """The images with these numbers, numbered anew."""


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images of one size in memory.

    Attributes:
        pixels: (n, C, H, W) uint8; 0 is black, 255 white.
        labels: (n,) int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])

    def part(self, chosen: Tensor) -> "TensorImages":
        """The images with these numbers, copied."""
        return TensorImages(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class FileImages:
    """One image a file, decoded each time it is asked for.

    Attributes:
        paths: of the files.
        labels: (n,) int64.
    """

    paths: Sequence[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(PIL image in RGB, label).

        Raises:
            LrconvertError: the file cannot be decoded.
        """
        path = self.paths[index]
        try:
            return pil_loader(path), int(self.labels[index])
        except Exception as error:  # PIL's plugins raise whatever their parsers do: OSError, SyntaxError, struct.error
            raise LrconvertError(f"{path}: cannot be read as an image: {type(error).__name__}: {error}") from error

    def part(self, chosen: Tensor) -> "FileImages":
        """The files with these numbers."""
        return FileImages([self.paths[index] for index in chosen.tolist()], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class UserImages:
    """Samples of a dataset that somebody else wrote.

    Attributes:
        dataset: of (image tensor, label).
        chosen: which of its samples.
    """

    dataset: Any
    chosen: Sequence[int]

    @property
    def labels(self) -> None:
        """Unknown: a dataset has no common way to tell them."""

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self.chosen[index]]
        return image, int(label)

    def part(self, chosen: Tensor) -> "UserImages":
        """The samples with these numbers."""
        return UserImages(self.dataset, [self.chosen[index] for index in chosen.tolist()])


@dataclass(frozen=True)
class Splits:
    """What a dataset brings along.

    Attributes:
        train: to train on, and to hold a validation split out of where there is none.
        validation: one that the dataset names itself.
        test: to report on at the end.
        num_classes: labels are 0 … num_classes − 1.
    """

    train: Images
    validation: Images | None
    test: Images | None
    num_classes: int


def hold_out(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """(rest, held out): a random share of the images, with labels in the proportions of the whole where they are known.

    Args:
        images: to be split.
        share: of the images to hold out, above 0 and below 1; at least one image is.
        seed: of the choice.

    Raises:
        UsageError: the share is out of range, or leaves nothing to train on.
    """
    n = len(images)
    if not 0 < share < 1:
        raise UsageError(
            f"validation is the share of the training images to hold out, above 0 and below 1, not {share:g}"
        )
    held = max(1, round(share * n))
    if held >= n:
        raise UsageError(f"validation {share:g} of {n} images leaves none to train on")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if images.labels is not None:
        # Evenly spaced places in an order sorted by label take the same share of every class.
        order = order[images.labels[order].argsort(stable=True)]
    places = torch.arange(held) * n // held
    kept = torch.ones(n, dtype=torch.bool)
    kept[order[places]] = False
    return images.part(kept.nonzero().flatten()), images.part((~kept).nonzero().flatten())
