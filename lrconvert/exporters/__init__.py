"""Writing a network in the form that something else runs: one file per target, and here the choice between them."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from lrconvert.checkpoints import Header
from lrconvert.errors import ModelError, VerificationError
from lrconvert.exporters import onnx, pt2
from lrconvert.exporters.check import Checked, reason_of
from lrconvert.inputs import Inputs, lengths_of, with_fixed_lengths

__all__ = ["GRAPHS", "Checked", "write_model"]

# Targets that hold the network's graph, and so need its model: (model in eval mode, what it is called with,
# path of a new file, header, tolerance) to what was checked.
GRAPHS: dict[str, Callable[[nn.Module, Inputs, Path, Header, float], Checked]] = {
    "onnx": onnx.write_onnx,
    "pt2": pt2.write_pt2,
}


def write_model(
    format: str, model: nn.Module, inputs: Inputs, path: Path, header: Header, tolerance: float
) -> tuple[Checked, str | None]:
    """Write the target `format` with the lengths that `inputs` leave open, or fixed ones where that fails.

    Returns:
        What was checked, and why lengths are fixed; None where none had to be.

    Raises:
        ModelError, VerificationError: it fails with fixed lengths too.
    """
    write = GRAPHS[format]
    try:
        return write(model, inputs, path, header, tolerance), None
    except (ModelError, VerificationError) as error:
        if not lengths_of(inputs):
            raise
        reason = reason_of(error)
    checked = write(model, with_fixed_lengths(inputs), path, header, tolerance)
    fixed = " and ".join(f"{length} {name.replace('_', ' ')}" for name, length in lengths_of(inputs).items())
    return checked, f"it takes {fixed}, no other number ({reason})"
