"""A batch a few samples at a time, where what a factorized convolution needs at once would not stay in memory.

glibc's malloc gives a block of more than 32 MiB back to the system as soon as it is free, and the system clears every
page of the next one. That is paid for what stands between the factors and, as oneDNN brings images that are not
channels_last into a layout of its own and back, for copies of what goes in and comes out. A few samples need less, and
find it in the cache. `benchmarks/parts.py` measures it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lrconvert.layers.eager import runs_eagerly

# Bytes: from which a block is given back, and that are aimed at.
_GIVEN_BACK = 32 << 20
_AT_HAND = 8 << 20


class Numbers(NamedTuple):
    """How many a layer has of a sample, about: between its factors, and in its output."""

    between: int
    out: int


def run_in_parts(function: Callable[[Tensor], Tensor], x: Tensor, numbers: Callable[[torch.Size], Numbers]) -> Tensor:
    """`function(x)`, for a function that keeps samples apart: some at a time, where that is faster.

    All of them at once in training, on a GPU, and where somebody follows what is done.

    Args:
        function: from (batch, …) to (batch, …).
        x: its input.
        numbers: by the shape of a sample.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or not x.is_cpu or not runs_eagerly(x):
        return function(x)
    samples = _samples_at_a_time(x, numbers(x.shape[1:]))
    if samples >= len(x):
        return function(x)
    parts = x.split(samples)
    first = function(parts[0])
    sample = first[0]
    strides = (math.prod(sample.shape), *sample.stride())
    out = torch.empty_strided((len(x), *sample.shape), strides, dtype=first.dtype)
    out[:samples] = first
    for number, part in enumerate(parts[1:], start=1):
        out[number * samples : (number + 1) * samples] = function(part)
    return out


def _samples_at_a_time(x: Tensor, numbers: Numbers) -> int:
    if x.is_contiguous():
        most = max(*numbers, math.prod(x.shape[1:]))
    elif 2 * numbers.between >= numbers.out:
        most = numbers.between
    else:
        return len(x)  # to put the parts together costs more than they save
    size = most * x.element_size()
    at_once = size > _GIVEN_BACK or size * len(x) <= _GIVEN_BACK
    return len(x) if at_once else max(1, _AT_HAND // size)
