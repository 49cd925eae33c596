"""Turning one state dict into another in small steps, so that only a few tensors are in memory at a time."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrconvert.errors import ModelError
from lrconvert.parallel import map_layers
from lrconvert.tensors import TensorRef, converted, converted_dtype

CPU = torch.device("cpu")
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Rewrite:
    """One step: the keys it makes, and how.

    Attributes:
        source: key of the tensor that it starts from.
        outputs: key to (shape, dtype) of every tensor it makes, in order.
        size: elements of the largest tensor it handles.
        make: reads, computes and returns the tensors.
        alias_of: the key of a tensor that the (only) output shares its memory with, if any.
    """

    source: str
    outputs: Layout
    size: int
    make: Callable[[], dict[str, Tensor]]
    alias_of: str | None = None


def moving(source: str, ref: TensorRef, key: str) -> Rewrite:
    """The step that writes a tensor as it is, perhaps under another key."""
    return Rewrite(source, {key: (ref.shape, ref.dtype)}, ref.numel, lambda: {key: ref.read()}, ref.alias_of)


def check_written(keys: Iterable[str], written: Container[str], source: object) -> None:
    """Raise ModelError unless all `keys`, of a model, are among those `written` for the checkpoint `source`."""
    lost = next((key for key in keys if key not in written), None)
    if lost is not None:
        raise ModelError(f"{source} has no tensor {lost}: its keys are not the model's; work on a live model")


def overruled(steps: Sequence[Rewrite], values: Mapping[str, Tensor]) -> list[Rewrite]:
    """`steps`, that write `values` by key, each in the dtype that was meant for it, in place of what they make.

    A step all of whose outputs are overruled is not run. See `check_written`.
    """

    def overruling(step: Rewrite) -> Rewrite:
        found = {key: values[key].detach().cpu().to(dtype) for key, (_, dtype) in step.outputs.items() if key in values}
        # What shares its memory with an overruled tensor keeps its own values.
        alias_of = None if found or step.alias_of in values else step.alias_of
        if not found:
            return replace(step, alias_of=alias_of)
        rest = step.outputs.keys() - found.keys()

        def make() -> dict[str, Tensor]:
            made = step.make() if rest else {}
            return {**made, **{key: tensor.contiguous() for key, tensor in found.items()}}

        return replace(step, make=make, alias_of=alias_of)

    return [overruling(step) for step in steps]


def converting(steps: Sequence[Rewrite], dtype: torch.dtype) -> list[Rewrite]:
    """`steps` whose floating-point tensors end in `dtype`, see `lrconvert.tensors.converted`."""

    def in_dtype(step: Rewrite) -> Rewrite:
        outputs = {key: (shape, converted_dtype(before, dtype)) for key, (shape, before) in step.outputs.items()}

        def make() -> dict[str, Tensor]:
            return {key: converted(tensor, dtype, key) for key, tensor in step.make().items()}

        return replace(step, outputs=outputs, make=make)

    return [in_dtype(step) for step in steps]


def layout_of(steps: Sequence[Rewrite]) -> Layout:
    """(shape, dtype) of everything that the steps make, by key, in order."""
    return {key: what for step in steps for key, what in step.outputs.items()}


def aliases_of(steps: Sequence[Rewrite]) -> dict[str, str]:
    """Key to the key of the tensor whose memory it shares, for outputs that need not be stored twice."""
    made = layout_of(steps)
    return {next(iter(step.outputs)): step.alias_of for step in steps if step.alias_of in made and step.alias_of}


def run(
    steps: Sequence[Rewrite], device: torch.device = CPU, progress: Callable[[], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Run the steps, small ones side by side; yields (key, tensor) in the order they finish.

    Args:
        steps: what to do.
        device: the device that the steps compute on.
        progress: called after each step.
    """
    for _, made in map_layers(lambda step: step.make(), steps, size=lambda step: step.size, device=device):
        yield from made.items()
        if progress:
            progress()
