"""Which examples are taken, and how they are cut into calls."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.inputs import Call


@dataclass(frozen=True)
class Wanted:
    """The examples that were asked for.

    Attributes:
        count: how many.
        batch_size: at most so many a call.
        skip: how many are passed over first.
        seed: of the order in which they are taken.

    Raises:
        UsageError: a number is out of range.
    """

    count: int
    batch_size: int
    skip: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("batch_size", 1), ("skip", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def choose(self, n: int, where: str) -> Tensor:
        """The numbers of the examples to take out of `n`, in the order to take them.

        Raises:
            LrconvertError: none is left.
        """
        if n <= self.skip:
            raise LrconvertError(f"{where}: has {n:,} examples" + (f", and {self.skip:,} are skipped" if n else ""))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        return order[self.skip : self.skip + self.count]


@dataclass(frozen=True)
class Found:
    """What a source gave.

    Attributes:
        calls: at least one.
        note: how many examples there are and where they come from, in words.
    """

    calls: tuple[Call, ...]
    note: str


def are_inputs(value: Any) -> TypeGuard[Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]]:
    """Whether `value` is what a model can be called with: a tensor, a tuple or a dict of tensors."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(key, str) for key in value) and _all_tensors(value.values())
    return isinstance(value, Tensor) or (isinstance(value, tuple) and bool(value) and _all_tensors(value))


def _all_tensors(values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def as_call(inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor], where: str) -> Call:
    """The call of a model with `inputs`: a tensor and a tuple are positional, a dict is named.

    Raises:
        LrconvertError: a tensor has no examples in its first dimension, or not as many as the others.
    """
    named = {key: value.detach().cpu() for key, value in inputs.items()} if isinstance(inputs, Mapping) else {}
    positional = (inputs,) if isinstance(inputs, Tensor) else inputs if isinstance(inputs, tuple) else ()
    call = Call(tuple(tensor.detach().cpu() for tensor in positional), named, 0)
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in call.tensors}
    if len(sizes) > 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call.tensors)
        raise LrconvertError(f"{where}: tensors have shapes {shapes}: the first dimension of each must be the examples")
    return Call(call.args, call.kwargs, sizes.pop())


def part(call: Call, chosen: Tensor | slice) -> Call:
    """The examples of `call` with the numbers `chosen`."""
    taken = call.changed(lambda tensor: tensor[chosen])
    return Call(taken.args, taken.kwargs, len(taken.tensors[0]))


def cut(call: Call, batch_size: int) -> Iterator[Call]:
    """`call` in pieces of at most `batch_size` examples."""
    for start in range(0, call.size, batch_size):
        yield part(call, slice(start, start + batch_size))
