"""Augmentation settings, and the transforms they mean for one image at a time."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lrconvert.errors import UsageError

Transform = Callable[[Any], Any]

# timm writes magnitudes from 0 to 10; torchvision's RandAugment has 31 steps, from 0 to 30.
STEPS = 31
STEPS_PER_UNIT = 3

# Side of the image before its centre is cut out, relative to the cut, as ImageNet is evaluated.
RESIZE_OVER_CROP = 256 / 224


@dataclass(frozen=True)
class Augment:
    """How training images are changed at random; everything is off by default.

    Attributes:
        crop_padding: cut the image at a random place out of itself with this many black pixels around it.
        hflip: probability of a horizontal flip.
        scale: range of the share of the image's area that RandomResizedCrop cuts out; (0.08, 1) on ImageNet.
        ratio: range of that cut's width / height.
        aa: "rand" for RandAugment as torchvision sets it (2 operations, magnitude 9 of 30), "trivial" for
            TrivialAugmentWide, or timm's notation "rand-m9-mstd0.5-inc1" (magnitude 9 of 10 with Gaussian noise of
            0.5; also n2 operations, each with probability p0.5). The operations are torchvision's, all of which
            grow with the magnitude (timm's inc1), in steps of a third.
        reprob: probability that a random rectangle is replaced by noise.

    Raises:
        UsageError: a value is out of range, or `aa` is of no known form.
    """

    crop_padding: int = 0
    hflip: float = 0.0
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    aa: str | None = None
    reprob: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding must not be negative, not {self.crop_padding}")
        for name, value in (("hflip", self.hflip), ("reprob", self.reprob)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is a probability, not {value:g}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(
                f"scale is a range of areas above 0 and at most 1, not {self.scale[0]:g} to {self.scale[1]:g}"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(f"ratio is a range above 0, not {self.ratio[0]:g} to {self.ratio[1]:g}")
        if self.aa is not None:
            automatic(self.aa)

    @property
    def in_batches(self) -> bool:
        """Whether whole batches can be augmented at once: only cropping and flipping is wanted."""
        return self.scale is None and self.aa is None and not self.reprob


@dataclass(frozen=True)
class Framing:
    """How an image gets the size that the network takes.

    Attributes:
        size: height and width; None leaves images as they are.
        crop: resize the shorter side to 256/224 of `size` and cut out the centre, as for photographs; otherwise
            resize both sides.

    Raises:
        UsageError: the size is not positive.
    """

    size: int | None = None
    crop: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UsageError(f"img_size must be positive, not {self.size}")

    def transforms(self) -> list[Transform]:
        """For one image, or a batch of one size."""
        if self.size is None:
            return []
        if not self.crop:
            return [v2.Resize((self.size, self.size))]
        return [v2.Resize(round(self.size * RESIZE_OVER_CROP)), v2.CenterCrop(self.size)]


@dataclass(frozen=True)
class Normalization:
    """(x − mean) / std, where x is from 0 to 1.

    Attributes:
        mean, std: one value a channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """a and b, each (C, 1, 1), for which a · byte + b is the normalized value."""
        mean, std = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1) for each in (self.mean, self.std))
        return (1 / (255 * std)).float(), (-mean / std).float()


def image_transform(
    augment: Augment | None, framing: Framing, normalization: Normalization, size: tuple[int, int]
) -> Transform:
    """From a PIL image or tensor (C, H, W) to a normalized float32 tensor.

    Args:
        augment: for training; None for evaluation.
        framing: for evaluation, and for training without `augment.scale`.
        normalization: of the result.
        size: height and width of the result.
    """
    frame = framing.transforms()
    paint: list[Transform] = []
    erase: list[Transform] = []
    if augment is not None:
        if augment.scale is not None:
            frame = [v2.RandomResizedCrop(size, scale=augment.scale, ratio=augment.ratio)]
        if augment.crop_padding:
            frame.append(v2.RandomCrop(size, padding=augment.crop_padding))
        if augment.hflip:
            paint.append(v2.RandomHorizontalFlip(augment.hflip))
        if augment.aa is not None:
            paint.append(automatic(augment.aa))
        if augment.reprob:
            erase.append(v2.RandomErasing(augment.reprob, value="random"))
    # PILToTensor passes tensors on, and ToDtype scales bytes but leaves floats.
    to_floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*frame, *paint, *to_floats, v2.Normalize(normalization.mean, normalization.std), *erase])


def automatic(text: str) -> Transform:
    """The transform that `Augment.aa` names."""
    if text == "rand":
        return v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    if text == "trivial":
        return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    kind, *parts = text.split("-")
    numbers = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 1.0}
    for part in parts:
        found = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if kind != "rand" or not found or found[1] not in numbers:
            break
        numbers[found[1]] = float(found[2])
    else:
        if kind == "rand" and numbers["m"] <= 10 and numbers["p"] <= 1 and numbers["inc"] == 1:
            return _NoisyRandAugment(numbers["m"], numbers["mstd"], int(numbers["n"]), numbers["p"])
    raise UsageError(
        f"aa '{text}': write 'rand', 'trivial', or timm's notation with m up to 10, n, p up to 1, mstd and inc1, "
        "such as 'rand-m9-mstd0.5-inc1'"
    )


class _NoisyRandAugment:
    """RandAugment as timm defines it: each operation has its own noisy magnitude, and is left out at random.

    Args:
        magnitude: from 0 to 10.
        noise: standard deviation of the magnitude.
        operations: number of operations an image.
        probability: that an operation is carried out.
    """

    def __init__(self, magnitude: float, noise: float, operations: int, probability: float) -> None:
        self.magnitude, self.noise, self.operations, self.probability = magnitude, noise, operations, probability
        bilinear = InterpolationMode.BILINEAR
        self.by_step = [v2.RandAugment(1, step, STEPS, interpolation=bilinear) for step in range(STEPS)]

    def __call__(self, image: Any) -> Any:
        for _ in range(self.operations):
            if torch.rand(()) < self.probability:
                step = round(STEPS_PER_UNIT * (self.magnitude + self.noise * float(torch.randn(()))))
                image = self.by_step[min(max(step, 0), STEPS - 1)](image)
        return image
