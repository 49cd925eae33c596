"""What a model is called with: shapes and types of its inputs, examples drawn from them, and calls with real data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Input:
    """One argument of a model's forward.

    Attributes:
        shape: its shape, without the batch.
        name: passed by this name; None for a positional argument. All inputs of a model are passed in one way.
        kind: "float", in the model's own dtype; "index", whole numbers below `high`; "mask", all ones.
        high: for an index, the first number that is not allowed.
        batch_dim: where the batch goes in the shape.
        length: a name for its first dimension where the model takes any size ("tokens"), the one in `shape` being an
            example. Inputs whose lengths have one name are of one length.
    """

    shape: tuple[int, ...]
    name: str | None = None
    kind: Literal["float", "index", "mask"] = "float"
    high: int = 2
    batch_dim: int = 0
    length: str | None = None

    def example(self, batch: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
        """A random tensor of `batch` examples."""
        shape = (*self.shape[: self.batch_dim], batch, *self.shape[self.batch_dim :])
        if device == "meta":
            return torch.empty(shape, dtype=dtype if self.kind == "float" else torch.int64, device="meta")
        if self.kind == "mask":
            return torch.ones(shape, dtype=torch.int64, device=device)
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "index":
            return torch.randint(self.high, shape, generator=generator).to(device)
        return torch.randn(shape, generator=generator).to(device, dtype)


Inputs = tuple[Input, ...]


@overload
def one_input(shape: Sequence[int]) -> Inputs: ...
@overload
def one_input(shape: None) -> None: ...
@overload
def one_input(shape: Sequence[int] | None) -> Inputs | None: ...
def one_input(shape: Sequence[int] | None) -> Inputs | None:
    """One floating-point input of `shape` without the batch; None for None."""
    return None if shape is None else (Input(tuple(shape)),)


def shape_of(inputs: Inputs | None) -> tuple[int, ...] | None:
    """The shape without the batch, of a model that takes one floating-point input; else None."""
    if inputs is None or len(inputs) != 1 or inputs[0] != Input(inputs[0].shape):
        return None
    return inputs[0].shape


def examples(
    inputs: Inputs, batch: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and named arguments for one call with `batch` examples."""
    drawn = [each.example(batch, dtype, device, seed + number) for number, each in enumerate(inputs)]
    named = {each.name: tensor for each, tensor in zip(inputs, drawn, strict=True) if each.name is not None}
    return ((), named) if named else (tuple(drawn), {})


def lengths_of(inputs: Inputs) -> dict[str, int]:
    """The lengths that may be any, by name, as they are in the examples."""
    return {each.length: each.shape[0] for each in inputs if each.length is not None}


def with_lengths(inputs: Inputs, lengths: Mapping[str, int]) -> Inputs:
    """`inputs` with other `lengths`, by name; those that it does not name stay as they are."""
    return tuple(
        replace(each, shape=(lengths.get(each.length or "", each.shape[0]), *each.shape[1:])) if each.length else each
        for each in inputs
    )


def with_fixed_lengths(inputs: Inputs) -> Inputs:
    """`inputs` that take no other lengths than those of the examples."""
    return tuple(replace(each, length=None) for each in inputs)


def open_dimensions(inputs: Inputs, dimension: Callable[[str], Any]) -> Any:
    """For torch.export: which dimensions of each argument are open, "batch" and lengths; `dimension` makes one."""
    made = {name: dimension(name) for name in ("batch", *lengths_of(inputs))}
    dims = []
    for each in inputs:
        dims.append({each.batch_dim: made["batch"]})
        if each.length is not None:
            dims[-1][1 if each.batch_dim == 0 else 0] = made[each.length]
    named = {each.name: dim for each, dim in zip(inputs, dims, strict=True) if each.name is not None}
    return named or tuple(dims)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of a model: a batch.

    Attributes:
        args: positional ones.
        kwargs: named ones.
        size: examples in it.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    size: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All arguments, positional ones first."""
        return (*self.args, *self.kwargs.values())

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """This call with every tensor put through `change`, which leaves the number of examples as it is."""
        kwargs = {name: change(tensor) for name, tensor in self.kwargs.items()}
        return Call(tuple(map(change, self.args)), kwargs, self.size)

    def run(self, model: nn.Module) -> Any:
        """What `model` returns. Tensors are brought to its device, floating-point ones to its dtype."""
        floats = (each for each in chain(model.parameters(), model.buffers()) if each.is_floating_point())
        like = next(floats, torch.empty(0))
        there = self.changed(lambda tensor: tensor.to(like if tensor.is_floating_point() else like.device))
        return model(*there.args, **there.kwargs)
