"""Comparing an exported graph with the model it came from, before the file is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrconvert.errors import VerificationError
from lrconvert.inputs import Inputs, examples
from lrconvert.outputs import tensors_in
from lrconvert.tensors import relative_difference

BATCH_SIZES = (1, 3)


@dataclass(frozen=True)
class Checked:
    """What was compared.

    Attributes:
        runner: what ran the exported graph ("onnxruntime 1.23").
        batch_sizes: batch sizes it was run with.
        difference: the largest ‖got − want‖ / ‖want‖ over outputs and batches.
        opset: of an ONNX graph.
    """

    runner: str
    batch_sizes: tuple[int, ...]
    difference: float
    opset: int | None = None


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

    Args:
        model: in eval mode.
        run: the exported graph; takes positional and named arguments, returns its outputs.
        inputs: what the model is called with.
        tolerance: largest difference allowed.
        path: of the export, for messages.

    Raises:
        VerificationError: the outputs differ by more than `tolerance`, or are not finite.
    """
    parameter = next(model.parameters())
    if parameter.dtype in (torch.float16, torch.bfloat16):
        # A few units in the last place of its own type.
        tolerance = max(tolerance, 8 * torch.finfo(parameter.dtype).eps)
    worst = 0.0
    for batch in BATCH_SIZES:
        arguments, named = examples(inputs, batch, parameter.dtype)
        with torch.no_grad():
            want = tensors_in(model(*arguments, **named))
        got = run(arguments, named)
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
