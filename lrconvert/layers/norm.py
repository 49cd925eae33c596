"""The extra BatchNorm between two factors, for training on (Cuttlefish section 4.1): v(bn(u(x))).

It has one channel for each of the groups·rank outputs of `u`. A fresh one, whose running mean is 0 and variance 1,
leaves the network as it was in eval mode, but for its ε; in train mode it normalises by the batch at once.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.layers.lowrank import Factored

EPS = 1e-5  # torch's default
# By the dimensions of a kernel; a linear layer has none.
_BY_KERNEL: dict[int, type[nn.Module]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def norm_between(factored: Factored, place: dict[str, Any]) -> nn.Module | None:
    """The BatchNorm that `factored` wants between its factors, or None.

    Args:
        factored: of a linear layer or a convolution.
        place: its device and dtype.
    """
    if not factored.norm:
        return None
    return _BY_KERNEL[len(factored.shape) - 2](factored.groups * factored.rank, eps=EPS, **place)


def fresh_norm(width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state dict of a BatchNorm of `width` channels that has seen nothing: the same for any dimensions."""
    state = nn.BatchNorm1d(width, eps=EPS, dtype=dtype, device=device).state_dict()
    return {key: tensor.detach() for key, tensor in state.items()}
