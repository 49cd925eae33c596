"""A batch a few samples at a time, where a factorized convolution would move much memory at once.

oneDNN brings images that are not channels_last into a layout of its own and back, for both factors, in buffers as large
as what goes in and comes out. glibc's malloc gives a block of more than 32 MiB back to the system as soon as it is
free, and the system clears every page of the next one. A few samples need less, and find it in the cache.
`benchmarks/parts.py` measures it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrconvert.layers.eager import runs_eagerly

# Bytes: from which a block is given back, and that are aimed at.
_GIVEN_BACK = 32 << 20
_AT_HAND = 8 << 20


def run_in_parts(function: Callable[[Tensor], Tensor], x: Tensor, most: Callable[[torch.Size], int]) -> Tensor:
    """`function(x)`, for a function that keeps samples apart: some at a time, where that is faster.

    All of them at once with gradients, on a GPU, where somebody follows what is done, and in channels_last. Hooks
    inside are called for every part.

    Args:
        function: from (batch, channels, *size) to the same.
        x: its input.
        most: about how many numbers the largest tensor inside it has, by the shape of a sample.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or not x.is_cpu or not runs_eagerly(x):
        return function(x)
    size = most(x.shape[1:]) * x.element_size()
    if not x.is_contiguous() or size > _GIVEN_BACK or size * len(x) <= _GIVEN_BACK:
        return function(x)
    samples = max(1, _AT_HAND // size)
    out: Tensor | None = None
    for start in range(0, len(x), samples):
        part = function(x[start : start + samples])
        if out is None:  # in the layout of a part
            shape, strides = (len(x), *part.shape[1:]), (part[0].numel(), *part.stride()[1:])
            out = torch.empty_strided(shape, strides, dtype=part.dtype)
        out[start : start + samples] = part
    assert out is not None
    return out
