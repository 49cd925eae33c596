"""Sums of products over many positions, of which second moments and least-squares fits are made."""

import torch
from torch import Tensor


def wide(rows: Tensor) -> Tensor:
    """`rows` in float32, or float64 if they were: the square of a gradient may be beyond half precision."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def summed_products(first: Tensor, second: Tensor) -> Tensor:
    """Σ f sᵀ (groups, a, b) of (groups, n, a) and (groups, n, b), in float64 on the CPU.

    The products of one call are added in the precision of the tensors, and no less.
    """
    with torch.autocast(first.device.type, enabled=False):
        return (first.mT @ second).double().cpu()
