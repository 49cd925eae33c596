"""Comparing an exported graph with the model it came from, before the file is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrconvert.errors import VerificationError
from lrconvert.inputs import Inputs, examples, lengths_of, with_lengths
from lrconvert.outputs import tensors_in
from lrconvert.tensors import relative_difference

BATCH_SIZES = (1, 3)


@dataclass(frozen=True)
class Checked:
    """What was compared.

    Attributes:
        runner: what ran the exported graph ("onnxruntime 1.23").
        batch_sizes: batch sizes it was run with.
        lengths: those that may be any, by name, and what it was run with.
        difference: the largest ‖got − want‖ / ‖want‖ over outputs and batches.
        opset: of an ONNX graph.
    """

    runner: str
    batch_sizes: tuple[int, ...]
    lengths: dict[str, tuple[int, ...]]
    difference: float
    opset: int | None = None


def lengths_checked(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """The lengths that `check_against` runs `inputs` with, by name."""
    shorter = _shorter(inputs)
    return {name: (length, shorter[name]) for name, length in lengths_of(inputs).items()}


def _shorter(inputs: Inputs) -> dict[str, int]:
    """Other lengths, different from each other where the first ones are not: no two may be taken for one."""
    return {
        name: max(length // 3 + place, 1) for place, (name, length) in enumerate(lengths_of(inputs).items(), start=1)
    }


def _hide_ends(mask: Tensor) -> None:
    """Hide more of each example of `mask` (batch, length) than of the one before, in place."""
    for place, row in enumerate(mask):
        row[len(row) - place * len(row) // (len(mask) + 1) :] = 0


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: exporters wrap it in banners of many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_against(
    model: nn.Module,
    run: Callable[[tuple[Tensor, ...], dict[str, Tensor]], list[Tensor]],
    inputs: Inputs,
    tolerance: float,
    path: Path,
) -> float:
    """Run both on random inputs, and return the largest relative difference.

    Once with one example of the usual lengths, and once with several shorter ones, the ends of which are hidden where
    there is a mask.

    Args:
        model: in eval mode.
        run: the exported graph; takes positional and named arguments, returns its outputs.
        inputs: what the model is called with.
        tolerance: largest difference allowed.
        path: of the export, for messages.

    Raises:
        VerificationError: one of them does not run, or the outputs differ by more than `tolerance` or are not finite.
    """
    parameter = next(model.parameters())
    if parameter.dtype in (torch.float16, torch.bfloat16):
        # A few units in the last place of its own type.
        tolerance = max(tolerance, 8 * torch.finfo(parameter.dtype).eps)
    worst = 0.0
    for batch, each in zip(BATCH_SIZES, (inputs, with_lengths(inputs, _shorter(inputs))), strict=True):
        arguments, named = examples(each, batch, parameter.dtype)
        for mask in (named[given.name] for given in each if given.kind == "mask" and given.name is not None):
            _hide_ends(mask)
        try:
            with torch.no_grad():
                want = tensors_in(model(*arguments, **named))
            got = run(arguments, named)
        except Exception as error:  # of the model's own code, or what the runner finds wrong
            sizes = ", ".join(str(tuple(tensor.shape)) for tensor in (*arguments, *named.values()))
            raise VerificationError(
                f"{path}: does not run on inputs {sizes} ({reason_of(error)}); nothing was kept"
            ) from error
        if len(got) != len(want):
            raise VerificationError(f"{path}: {len(got)} outputs, the model has {len(want)}; nothing was kept")
        for mine, theirs in zip(got, want, strict=True):
            if mine.shape != theirs.shape or not bool(torch.isfinite(mine).all()):
                raise VerificationError(
                    f"{path}: gives {tuple(mine.shape)}, finite or not, where the model gives {tuple(theirs.shape)}; "
                    "nothing was kept"
                )
            worst = max(worst, relative_difference(mine, theirs))
    if worst > tolerance:
        raise VerificationError(
            f"{path}: outputs differ from the model's by {worst:.1e}, more than {tolerance:.0e}; nothing was kept "
            "(--tolerance changes the limit)"
        )
    return worst
