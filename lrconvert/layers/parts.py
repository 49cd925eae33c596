"""A batch a few samples at a time, where a factorized convolution would move much memory at once.

oneDNN brings images that are not channels_last into a layout of its own and back, for both factors, in buffers as large
as what goes in and comes out. glibc's malloc gives a block of more than 32 MiB back to the system as soon as it is
free, and the system clears every page of the next one. A few samples need less, and find it in the cache. Where the
environment makes malloc keep its memory, parts would only cost time. `benchmarks/parts.py` measures it.
"""

import os
import platform
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lrconvert.layers.eager import runs_eagerly

# Bytes: from which a block is given back, and that are aimed at.
_GIVEN_BACK = 32 << 20
_AT_HAND = 8 << 20


def run_in_parts(function: Callable[[Tensor], Tensor], x: Tensor, most: Callable[[torch.Size], int]) -> Tensor:
    """`function(x)`, for a function that keeps samples apart: some at a time, where that is faster.

    All of them at once with gradients, on a GPU, where somebody follows what is done, and for images that are
    channels_last, or not contiguous otherwise.

    Args:
        function: from (batch, channels, *size) to the same.
        x: its input.
        most: about how many numbers the largest tensor inside it has, by the shape of a sample.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or not x.is_cpu or not runs_eagerly(x):
        return function(x)
    if x.layout != torch.strided or not x.is_floating_point() or not x.is_contiguous():
        return function(x)
    size = most(x.shape[1:]) * x.element_size()
    if size > _GIVEN_BACK or size * len(x) <= _GIVEN_BACK or not _gives_back():
        return function(x)
    samples = max(1, _AT_HAND // size)
    out: Tensor | None = None
    for start in range(0, len(x), samples):
        part = function(x[start : start + samples])
        if out is None:  # in the layout of a part
            out = part.new_empty_strided((len(x), *part.shape[1:]), (part[0].numel(), *part.stride()[1:]))
        out[start : start + samples] = part
    assert out is not None
    return out


@cache
def _gives_back() -> bool:
    """Whether malloc gives large blocks back: glibc's does, unless the process was started with other settings."""
    if platform.libc_ver()[0] != "glibc":
        return False
    named = [each for each in os.environ if each.startswith("MALLOC_MMAP_")]
    tuned = "malloc.mmap" in os.environ.get("GLIBC_TUNABLES", "")
    replaced = "malloc" in os.environ.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
    return not (named or tuned or replaced)
