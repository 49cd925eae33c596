"""torch.export archives (.pt2), with a dynamic batch and open lengths, loaded again and run before they are kept."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lrconvert.checkpoints import KEY, Header
from lrconvert.errors import ModelError
from lrconvert.exporters.check import BATCH_SIZES, Checked, check_against, lengths_checked, reason_of
from lrconvert.inputs import Inputs, examples, open_dimensions
from lrconvert.outputs import tensors_in


def write_pt2(model: nn.Module, inputs: Inputs, path: Path, header: Header, tolerance: float) -> Checked:
    """Export `model` with a dynamic batch and the lengths that `inputs` leave open to `path`.

    Args:
        model: in eval mode, on the CPU.
        inputs: what it is called with.
        path: of a new file.
        header: stored among the archive's extra files, as "lrconvert".
        tolerance: largest relative difference allowed.

    Raises:
        ModelError: torch cannot export the model.
        VerificationError: the archive computes something else than the model.
    """
    arguments, named = examples(inputs, 2, next(model.parameters()).dtype)
    # Torch finds the range of a length itself: a table of positions sets a limit.
    shapes = open_dimensions(inputs, lambda name: torch.export.Dim(name) if name == "batch" else torch.export.Dim.AUTO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, arguments, named, dynamic_shapes=shapes)
            torch.export.save(program, path, extra_files={KEY: header.model_dump_json(exclude_defaults=True)})
            loaded = torch.export.load(path).module()
    except Exception as error:
        raise ModelError(f"torch cannot export this model: {reason_of(error)}") from error

    def run(arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return tensors_in(loaded(*arguments, **named))

    difference = check_against(model, run, inputs, tolerance, path)
    return Checked(f"torch {torch.__version__}", BATCH_SIZES, lengths_checked(inputs), difference)
