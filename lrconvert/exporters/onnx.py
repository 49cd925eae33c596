"""ONNX, with a dynamic batch, checked by onnx and run by onnxruntime before it is kept."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lrconvert.checkpoints import KEY, Header
from lrconvert.errors import ModelError
from lrconvert.exporters.check import BATCH_SIZES, Checked, check_against, reason_of

# A protobuf message cannot be larger; weights beyond it go into a file beside the graph.
_PROTOBUF_LIMIT = 2_000_000_000


def write_onnx(model: nn.Module, input_shape: tuple[int, ...], path: Path, header: Header, tolerance: float) -> Checked:
    """Export `model` with a dynamic batch to `path`, the header among the graph's metadata.

    Args:
        model: in eval mode, on the CPU.
        input_shape: shape of one input, without the batch.
        path: does not exist yet. Weights of 2 GB and more go to `path` + ".data".
        header: stored in the metadata under "lrconvert".
        tolerance: largest relative difference allowed.

    Raises:
        ModelError: torch cannot export the model.
        VerificationError: onnxruntime computes something else than the model.
    """
    dtype = next(model.parameters()).dtype
    example = torch.randn(2, *input_shape, dtype=torch.float32).to(dtype)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                verbose=False,
            )
    except Exception as error:
        raise ModelError(f"torch cannot export this model to ONNX: {reason_of(error)}") from error
    assert program is not None
    program.model.metadata_props[KEY] = header.model_dump_json(exclude_defaults=True)
    program.save(str(path), external_data=nbytes >= _PROTOBUF_LIMIT)
    # By path: a graph with its weights in another file cannot be checked in memory.
    onnx.checker.check_model(str(path))
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(
            f"onnxruntime cannot run this graph on the CPU in {dtype}; convert the checkpoint to float32 first "
            f"({reason_of(error)})"
        ) from error
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: inputs.numpy()})]

    difference = check_against(model, run, input_shape, tolerance, path)
    opset = next(
        entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import if not entry.domain
    )
    return Checked(f"onnxruntime {onnxruntime.__version__}", BATCH_SIZES, difference, opset)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Keep the exporter's chatter, on three channels, away from the user: what matters comes as an exception."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
