"""Weights laid out for oneDNN once, before they multiply many times, as torch's own compiler does with frozen weights.

For a few rows of inputs a product is as fast as its weight can be read, which depends on the layout.
benchmarks/recurrent.py measures the layers that use this.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Elements of a weight from which that pays, even where it is laid out for one sequence (benchmarks/recurrent.py).
WIDE = 1 << 18


def worth_packing(weights: Tensor) -> bool:
    """Whether these weights (groups, out, in) are wide, and oneDNN is here and has a layout of its own for them."""
    return (
        weights[0].numel() >= WIDE
        and weights.is_cpu
        and weights.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed_products(weights: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The function from x (groups, rows, in) to x·weightsᵀ (groups, rows, out), for weights (groups, out, in).

    It keeps a copy of the weights, and has no gradient. It takes any number of rows; the layout is the best for `rows`.
    """
    laid_out = [torch.ops.mkldnn._reorder_linear_weight(each.detach().contiguous(), rows) for each in weights]

    def product(x: Tensor) -> Tensor:
        pairs = zip(x, laid_out, strict=True)
        out = [torch.ops.mkldnn._linear_pointwise(each, weight, None, "none", [], "") for each, weight in pairs]
        return torch.stack(out) if len(out) > 1 else out[0].unsqueeze(0)

    return product
