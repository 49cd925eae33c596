"""Weights laid out for oneDNN once, before they multiply many times, as torch's own compiler does with frozen weights.

For a few rows of inputs a product is as fast as its weight can be read: in oneDNN's layout that takes half the time of
torch's default, which on processors not of Intel's make leaves AVX-512 unused (benchmarks/recurrent.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def can_be_packed(weight: Tensor) -> bool:
    """Whether oneDNN is here, and has a layout of its own for this weight."""
    return (
        weight.is_cpu
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed_linear(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The function from x (rows, in) to x·weightᵀ (rows, out), for a weight (out, in) that `can_be_packed`.

    It keeps a copy of the weight, has no gradient, and takes any number of rows, if not always at the same speed.
    """
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)

    def linear(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")
        return out

    return linear
