"""Where batches come from: `Source`, and one for images in memory that handles whole batches at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lrconvert.training.data.augment import Augment, Framing, Normalization
from lrconvert.training.data.draws import Draws
from lrconvert.training.data.images import TensorImages

# Images (b, C, H, W) float32, normalized, and their labels (b,) int64.
Batch = tuple[Tensor, Tensor]
# From the sample numbers of each batch, and the epoch's draws (None: do not augment), to the batches.
Reader = Callable[[Sequence[Tensor], Draws | None], Iterator[Batch]]


class Source(Protocol):
    """Numbered samples that are read in batches."""

    def __len__(self) -> int: ...

    def reader(self, workers: int, pin_memory: bool) -> Reader:
        """What reads batches, one pass after the other.

        Args:
            workers: processes that decode and augment; a source in memory needs none, and starts none.
            pin_memory: put batches into page-locked memory, for copies to a GPU beside its work.
        """


class MemorySource:
    """Images in memory, which are cut out, flipped and normalized a batch at a time.

    Args:
        images: of one size.
        augment: only with cropping and flipping.
        framing: how they get another size, before they are cropped.
        normalization: of the batches.
    """

    def __init__(self, images: TensorImages, augment: Augment, framing: Framing, normalization: Normalization) -> None:
        self.images = images
        self.augment = augment
        self.frame = framing.transforms()
        self.scale, self.shift = normalization.scale_and_shift()

    def __len__(self) -> int:
        return len(self.images)

    def reader(self, workers: int, pin_memory: bool) -> Reader:
        """Reads in this process."""

        def read(batches: Sequence[Tensor], draws: Draws | None) -> Iterator[Batch]:
            change = None if draws is None else _CropAndFlip(self.augment, len(self), draws)
            for chosen in batches:
                pixels = self.images.pixels[chosen]
                for transform in self.frame:
                    pixels = transform(pixels)
                if change is not None:
                    pixels = change(pixels, chosen)
                images, labels = pixels.float().mul_(self.scale).add_(self.shift), self.images.labels[chosen]
                yield (images.pin_memory(), labels.pin_memory()) if pin_memory else (images, labels)

        return read


class _CropAndFlip:
    """One epoch's crops and flips, drawn for all `n` samples at once and looked up by sample."""

    def __init__(self, augment: Augment, n: int, draws: Draws) -> None:
        self.padding = augment.crop_padding
        places = 2 * self.padding + 1
        self.top, self.left = torch.randint(places, (2, n), generator=draws.generator("crop"))
        self.flipped = torch.rand(n, generator=draws.generator("flip")) < augment.hflip

    def __call__(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        """The changed batch (b, C, H, W), whose samples have the numbers `chosen` (b,)."""
        if self.padding:
            height, width = pixels.shape[-2:]
            padded = functional.pad(pixels, (self.padding,) * 4)
            # A view (b, top, left, C, H, W) of every possible crop, of which one a sample is copied, row by row.
            crops = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
            pixels = crops[torch.arange(len(chosen)), self.top[chosen], self.left[chosen]]
        # A third less time than torch.where over the batch.
        flipped = self.flipped[chosen].nonzero().flatten()
        pixels[flipped] = pixels[flipped].flip(-1)
        return pixels
