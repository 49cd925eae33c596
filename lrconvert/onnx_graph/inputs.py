"""Making up inputs for a graph: what it takes is known in part only.

Sizes may be symbols, and an integer may choose between branches. So likely sizes and values are listed here, and
whoever runs the graph tries them until it runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, TensorShapeProto, ValueInfoProto, helper
from torch import Tensor

from lrconvert.errors import ModelError, UsageError
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.scopes import Value
from lrconvert.onnx_graph.tensors import DTYPES
from lrconvert.onnx_graph.weights import produced_by

Feed = dict[str, np.ndarray]

# Sizes to try for dimensions that the graph leaves open; 288 and 576 are what silero-vad takes.
_SIZES = (32, 64, 48, 16, 128, 224, 256, 288, 320, 512, 576, 8, 4, 2, 1)
_BATCHES = (2, 1)
_RESHAPING = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Gather", "Slice"}
_COMPARING = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}
_INTEGERS: dict[int, Any] = {TensorProto.INT32: np.int32, TensorProto.INT64: np.int64}
# What examples may be given as: every type that torch and numpy share.
_NUMBERS = {kind for kind, dtype in DTYPES.items() if dtype != torch.bfloat16}
_FLOATS: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT16: np.float16,
}


@dataclass(frozen=True)
class Sizes:
    """A guess at the open dimensions.

    Attributes:
        batch: an open first dimension, or one that is called so.
        other: any other open one.
        second_is_batch: whether open second dimensions are the batch from the second input on, as states have it.
    """

    batch: int
    other: int
    second_is_batch: bool


def sizes_to_try(graph: Graph) -> Iterator[Sizes]:
    """Guesses at the open dimensions, the likeliest first."""
    several = len(graph.model.graph.input) > 1
    for batch in _BATCHES:
        for other in _SIZES:
            yield Sizes(batch, other, False)
            if several:
                yield Sizes(batch, other, True)


def choices_of(graph: Graph) -> Iterator[dict[str, int]]:
    """Values for integer inputs that are compared with constants: one choice for each constant, and one for none."""
    constants = _constants(graph)
    choices: dict[str, list[int]] = {}
    for name, node, _ in _readers_of_inputs(graph):
        for tensor in (constants.get(each) for each in node.input if node.op_type in _COMPARING):
            if tensor is not None and tensor.data_type in _INTEGERS and sum(tensor.dims) <= 1:
                raw = np.frombuffer(tensor.raw_data, _INTEGERS[tensor.data_type])
                numbers = [*raw, *tensor.int64_data, *tensor.int32_data]
                choices.setdefault(name, []).extend(int(number) for number in numbers)
    for index in range(max((len(each) for each in choices.values()), default=0)):
        yield {name: each[index % len(each)] for name, each in choices.items()}
    yield {}


def _vocabularies(graph: Graph) -> dict[str, int]:
    """Rows of the table that an input is looked up in, by the name of the input; of the smallest table of several."""
    constants = _constants(graph)
    found: dict[str, int] = {}
    for name, node, slot in _readers_of_inputs(graph):
        table = constants.get(node.input[0]) if node.op_type == "Gather" and slot == 1 else None
        if table is not None and table.dims:
            axis = next((int(each.i) for each in node.attribute if each.name == "axis"), 0)
            found[name] = min(int(table.dims[axis]), found.get(name, int(table.dims[axis])))
    return found


def _constants(graph: Graph) -> dict[str, TensorProto]:
    return {value.name: value.tensor for value in graph.scopes.values if value.tensor is not None}


def _readers_of_inputs(graph: Graph) -> Iterator[tuple[str, NodeProto, int]]:
    """The name of an input, a node that reads it, perhaps after it was given another shape or type, and where."""
    produced = produced_by(graph.scopes)
    for value in graph.scopes.values:
        if value.graph is graph.model.graph and value.node is None and value.tensor is None:
            for node, slot in _readers(value, produced):
                yield value.name, node, slot


def _readers(value: Value, produced: dict[int, list[Value]]) -> Iterator[tuple[NodeProto, int]]:
    for use in value.uses:
        if use.node is not None and use.op in _RESHAPING and use.slot == 0:
            for output in produced.get(id(use.node), []):
                yield from _readers(output, produced)
        elif use.node is not None:
            yield use.node, use.slot


def one_example(graph: Graph, input_shape: tuple[int, ...] | None, batch: int = 1) -> Iterator[Feed]:
    """Random inputs of one example; several choices of what the graph compares with constants, none of any size.

    Args:
        graph: whose inputs.
        input_shape: as for `make_up`.
        batch: of so many examples instead.

    Raises:
        ModelError: a size is not known, or an input is of a kind that cannot be made up.
    """
    for numbers in choices_of(graph):
        for second_is_batch in (False, True):
            try:
                feed = make_up(graph, Sizes(batch, 0, second_is_batch), numbers, 1.0, input_shape)
            except ValueError as error:
                raise ModelError(str(error)) from None
            open_ones = [name for name, array in feed.items() if not array.size]
            if not open_ones:
                yield feed
            elif second_is_batch or len(feed) == 1:
                given = next(each for each in graph.model.graph.input if each.name == open_ones[0])
                dims = ", ".join(dim.dim_param or str(dim.dim_value or "?") for dim in _dims(given))
                known = f"is ({dims})" if given.type.tensor_type.HasField("shape") else "may have any shape"
                fix = "only one input's shape can be given" if input_shape else "--input-shape says how large it is"
                raise ModelError(f"input '{given.name}' {known}: {fix}")


def make_up(
    graph: Graph, sizes: Sizes, numbers: dict[str, int], scale: float, input_shape: tuple[int, ...] | None
) -> Feed:
    """Random inputs.

    Args:
        graph: whose inputs.
        sizes: for the open dimensions that neither `input_shape` nor the file says.
        numbers: values of integer inputs; others are rows of the table that they are looked up in, or 0 and 1.
        scale: standard deviation of real numbers.
        input_shape: without the batch, of the first input of real numbers that is open and has as many dimensions, or
            else of the first one of whole numbers.

    Raises:
        ValueError: an input is of a kind that cannot be made up.
    """
    generator = np.random.default_rng(0)
    inputs = inputs_of(graph)
    rows, symbols = _vocabularies(graph), graph.lengths
    shaped = _shaped(inputs, input_shape) if input_shape else None
    if shaped is not None and input_shape:
        symbols |= {dim.dim_param: size for dim, size in zip(_dims(shaped)[1:], input_shape, strict=False)}
    feed: Feed = {}
    for given in inputs:
        kind = given.type.tensor_type.elem_type
        shape = _shape(given, sizes, symbols, is_first=not feed)
        if not given.type.tensor_type.HasField("shape"):
            shape = (sizes.batch, sizes.other)
        if given is shaped and input_shape:
            shape = (shape[0], *input_shape)
        if kind in _FLOATS:
            feed[given.name] = (scale * generator.standard_normal(shape)).astype(_FLOATS[kind])
        elif kind in _INTEGERS:
            low = 1 if "mask" in given.name.lower() else 0
            array = generator.integers(low, max(rows.get(given.name, 2), low + 1), shape).astype(_INTEGERS[kind])
            feed[given.name] = np.full_like(array, numbers[given.name]) if given.name in numbers else array
        elif kind == TensorProto.BOOL:
            feed[given.name] = np.ones(shape, bool)
        else:
            raise ValueError(f"input '{given.name}' is of a kind that cannot be made up")
    return feed


def inputs_of(graph: Graph) -> list[ValueInfoProto]:
    """What has to be given to run the graph, in its order."""
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    return [given for given in graph.model.graph.input if given.name not in constants]


def fixed_shape(graph: Graph) -> tuple[int, ...] | None:
    """The shape without the batch of its only input, of real numbers; None where it takes others, or leaves it open."""
    inputs = inputs_of(graph)
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type not in _FLOATS:
        return None
    shape = tuple(int(dim.dim_value) for dim in _dims(inputs[0])[1:])
    return shape if shape and all(size > 0 for size in shape) else None


def fixed_batch(graph: Graph) -> int | None:
    """How many examples the graph takes in a run, by its first input; None for any number."""
    dims = next((_dims(given) for given in inputs_of(graph)), [])
    return int(dims[0].dim_value) if dims and dims[0].dim_value > 0 else None


def fixed_length(graph: Graph) -> int | None:
    """How many tokens a text must have, by the first input of whole numbers; None for any number."""
    ids = next((each for each in inputs_of(graph) if each.type.tensor_type.elem_type in _INTEGERS), None)
    dims = _dims(ids) if ids is not None else []
    return int(dims[1].dim_value) if len(dims) == 2 and dims[1].dim_value > 0 else None


def array_of(given: ValueInfoProto, tensor: Tensor) -> np.ndarray:
    """`tensor` as the input `given` takes it.

    Raises:
        UsageError: the input has another shape, is of other numbers, or cannot hold these.
    """
    kind, dims = given.type.tensor_type.elem_type, _dims(given)
    fits = len(dims) == tensor.dim() or not given.type.tensor_type.HasField("shape")
    fits = fits and all(dim.dim_value in (0, -1, size) for dim, size in zip(dims, tensor.shape, strict=False))
    wanted = helper.tensor_dtype_to_np_dtype(kind) if kind in _NUMBERS else None
    if wanted is None or not fits or (tensor.is_floating_point() and wanted.kind != "f"):
        sizes = ", ".join(dim.dim_param or str(max(dim.dim_value, 0) or "?") for dim in dims)
        name = TensorProto.DataType.Name(kind).lower()
        raise UsageError(
            f"the graph's input '{given.name}' takes {name} ({sizes}), but the examples hold "
            f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        )
    if wanted.kind == "f" and tensor.dtype == torch.uint8:
        raise UsageError(
            f"the graph's input '{given.name}' takes floating-point numbers, but the examples hold uint8: scale and "
            "normalize them as it was trained on them"
        )
    asked = tensor.cpu().numpy()
    with np.errstate(over="ignore"):
        array: np.ndarray = asked.astype(wanted)
    if wanted.kind == "f" and (np.isfinite(array) != np.isfinite(asked)).any():
        raise UsageError(
            f"the graph's input '{given.name}' takes {wanted.name}, but the examples hold numbers that are too large "
            "for it: scale them as those that it was trained on"
        )
    return array


def _dims(given: ValueInfoProto) -> list[TensorShapeProto.Dimension]:
    return list(given.type.tensor_type.shape.dim)


def _shaped(inputs: Sequence[ValueInfoProto], input_shape: tuple[int, ...]) -> ValueInfoProto | None:
    """The input that `input_shape` is of."""
    for kinds in (_FLOATS, _INTEGERS):
        for given in inputs:
            dims = _dims(given)[1:]
            fits = len(dims) == len(input_shape) and any(dim.dim_value <= 0 for dim in dims)
            fits = fits or not given.type.tensor_type.HasField("shape")
            if fits and given.type.tensor_type.elem_type in kinds:
                return given
    return None


def _shape(given: ValueInfoProto, sizes: Sizes, symbols: dict[str, int], is_first: bool) -> tuple[int, ...]:
    shape = []
    for index, dim in enumerate(_dims(given)):
        if dim.dim_value > 0:
            shape.append(int(dim.dim_value))
            continue
        is_batch = index == 0 or "batch" in dim.dim_param.lower()
        is_batch = is_batch or (index == 1 and sizes.second_is_batch and not is_first)
        size = sizes.batch if is_batch else sizes.other
        # One symbol is one size; exporters write "?" for what they do not know.
        named = dim.dim_param not in ("", "?")
        shape.append(symbols.setdefault(dim.dim_param, size) if named else size)
    return tuple(shape)
