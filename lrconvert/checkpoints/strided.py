"""Tensors that lie in a file as the bytes of their storage: read as far as they span, and no more."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrconvert.errors import CheckpointError


def span_of(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a strided tensor; 0 for an empty one."""
    if not torch.Size(shape).numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def strided_reader(
    path: Path, first: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A function that reads one tensor from its first byte on, contiguous."""
    span = span_of(shape, stride)

    def read() -> Tensor:
        if not span:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(span * dtype.itemsize)
        with path.open("rb") as file:
            file.seek(first)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{path}: ends before its tensors do; copy it again")
        return torch.frombuffer(data, dtype=dtype).as_strided(shape, stride).contiguous()

    return read
