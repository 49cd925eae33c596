"""Mixup and cutmix: images of a batch mixed with each other, and their labels with them."""

from typing import cast

from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from lrconvert.errors import UsageError


class Mixer:
    """From (images, labels) to (mixed images, soft targets); false if it mixes nothing.

    Each call draws one kind of mixing and one share from torch's global generator, and mixes every image with the one
    before it in the batch (Zhang et al. 2018, https://arxiv.org/abs/1710.09412; Yun et al. 2019,
    https://arxiv.org/abs/1905.04899).

    Args:
        num_classes: labels are 0 … num_classes − 1.
        mixup: α of the Beta(α, α) distribution of mixup's share; 0 for no mixup.
        cutmix: α of cutmix's; 0 for no cutmix.
        switch_prob: probability of cutmix where both are on.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float, switch_prob: float = 0.5) -> None:
        if mixup < 0 or cutmix < 0:
            raise UsageError(f"mixup and cutmix must not be negative, not {min(mixup, cutmix):g}")
        if not 0 <= switch_prob <= 1:
            raise UsageError(f"switch_prob must be from 0 to 1, not {switch_prob:g}")
        self.num_classes = num_classes
        choices = {"mixup": 1 - switch_prob if cutmix else 1.0, "cutmix": switch_prob if mixup else 1.0}
        kinds = [(v2.MixUp(alpha=mixup), choices["mixup"])] if mixup else []
        kinds += [(v2.CutMix(alpha=cutmix), choices["cutmix"])] if cutmix else []
        self._mix = v2.RandomChoice([kind for kind, _ in kinds], [weight for _, weight in kinds]) if kinds else None

    def __bool__(self) -> bool:
        return self._mix is not None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(b, C, H, W) and (b,) to (b, C, H, W) and (b, num_classes) float32."""
        targets = functional.one_hot(labels, self.num_classes).float()
        if self._mix is None:
            return images, targets
        return cast(tuple[Tensor, Tensor], self._mix(images, targets))
