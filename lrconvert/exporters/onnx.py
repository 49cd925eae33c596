"""ONNX, with a dynamic batch and open lengths, checked by onnx and run by onnxruntime before it is kept."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lrconvert.checkpoints import KEY, Header
from lrconvert.errors import ModelError
from lrconvert.exporters.check import BATCH_SIZES, Checked, check_against, lengths_checked, reason_of
from lrconvert.inputs import Inputs, examples, lengths_of, open_dimensions
from lrconvert.onnx_graph.graph import LENGTHS_KEY
from lrconvert.outputs import named_tensors_in

# A protobuf message cannot be larger; weights beyond it go into a file beside the graph.
_PROTOBUF_LIMIT = 2_000_000_000


def write_onnx(model: nn.Module, inputs: Inputs, path: Path, header: Header, tolerance: float) -> Checked:
    """Export `model` with a dynamic batch and the lengths that `inputs` leave open to `path`.

    Args:
        model: in eval mode, on the CPU.
        inputs: what it is called with.
        path: of a new file. Weights of 2 GB and more go to `path` + ".data".
        header: stored in the metadata under "lrconvert"; the lengths of the examples are stored beside it.
        tolerance: largest relative difference allowed.

    Raises:
        ModelError: torch cannot export the model.
        VerificationError: onnxruntime computes something else than the model.
    """
    dtype = next(model.parameters()).dtype
    arguments, named = examples(inputs, 2, dtype)
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                arguments,
                kwargs=named,
                dynamo=True,
                dynamic_shapes=open_dimensions(inputs, torch.export.Dim),
                input_names=[each.name or f"input{number or ''}" for number, each in enumerate(inputs)],
                verbose=False,
            )
    except Exception as error:
        raise ModelError(f"torch cannot export this model to ONNX: {reason_of(error)}") from error
    assert program is not None
    with torch.no_grad():
        returned = model(*arguments, **named)
    _name_outputs(program.model.graph, [name for name, _ in named_tensors_in(returned)])
    program.model.metadata_props[KEY] = header.model_dump_json(exclude_defaults=True)
    if lengths := lengths_of(inputs):
        program.model.metadata_props[LENGTHS_KEY] = json.dumps(lengths)
    program.save(str(path), external_data=nbytes >= _PROTOBUF_LIMIT)
    # By path: a graph with its weights in another file cannot be checked in memory.
    onnx.checker.check_model(str(path))
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(
            f"onnxruntime cannot run this graph on the CPU in {str(dtype).removeprefix('torch.')}; --dtype float32 or "
            f"float16 converts it ({reason_of(error)})"
        ) from error
    names = [each.name for each in session.get_inputs()]

    def run(arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> list[Tensor]:
        given = named or dict(zip(names, arguments, strict=True))
        # An input that the graph does not use is not among its inputs.
        feeds = {name: tensor.numpy() for name, tensor in given.items() if name in names}
        return [torch.from_numpy(output) for output in session.run(None, feeds)]

    difference = check_against(model, run, inputs, tolerance, path)
    opset = next(
        entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import if not entry.domain
    )
    return Checked(f"onnxruntime {onnxruntime.__version__}", BATCH_SIZES, lengths_checked(inputs), difference, opset)


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Call the outputs of an exported graph what the model calls them, where no value is called so yet."""
    taken = {value.name for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None}
    taken.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
    outputs = set(map(id, graph.outputs))
    once = len(outputs) == len(graph.outputs) == len(names) == len(set(names))
    if once and not taken.intersection(names) and not outputs.intersection(map(id, graph.inputs)):
        for value, name in zip(graph.outputs, names, strict=True):
            value.name = name


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
