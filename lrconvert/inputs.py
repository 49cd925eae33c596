"""What a model is called with: shapes and types of its inputs, from which examples of any batch are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Input:
    """One argument of a model's forward.

    Attributes:
        shape: its shape, without the batch.
        name: passed by this name; None for a positional argument. All inputs of a model are passed in one way.
        kind: "float", in the model's own dtype; "index", whole numbers below `high`; "mask", all ones.
        high: for an index, the first number that is not allowed.
        batch_dim: where the batch goes in the shape.
    """

    shape: tuple[int, ...]
    name: str | None = None
    kind: Literal["float", "index", "mask"] = "float"
    high: int = 2
    batch_dim: int = 0

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


def dynamic_shapes(inputs: Inputs, batch: Any) -> Any:
    """For torch.export: which dimension of each argument is the dimension `batch`."""
    dims = [{each.batch_dim: batch} for each in inputs]
    named = {each.name: dim for each, dim in zip(inputs, dims, strict=True) if each.name is not None}
    return named or tuple(dims)
