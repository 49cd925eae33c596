"""Making up inputs for a graph: what it takes is known in part only.

Sizes may be symbols, and an integer may choose between branches. So likely sizes and values are listed here, and
whoever runs the graph tries them until it runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto

from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.scopes import Value
from lrconvert.onnx_graph.weights import produced_by

Feed = dict[str, np.ndarray]

# Sizes to try for dimensions that the graph leaves open; 288 and 576 are what silero-vad takes.
_SIZES = (32, 64, 48, 16, 128, 224, 256, 288, 320, 512, 576, 8, 4, 2, 1)
_BATCHES = (2, 1)
_RESHAPING = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Gather", "Slice"}
_COMPARING = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}
_INTEGERS: dict[int, Any] = {TensorProto.INT32: np.int32, TensorProto.INT64: np.int64}
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
    constants = {value.name: value.tensor for value in graph.scopes.values if value.tensor is not None}
    produced = produced_by(graph.scopes)
    choices: dict[str, list[int]] = {}
    for value in graph.scopes.values:
        if value.graph is not graph.model.graph or value.node is not None or value.tensor is not None:
            continue
        for node in _comparisons(value, produced):
            for tensor in (constants.get(name) for name in node.input):
                if tensor is not None and tensor.data_type in _INTEGERS and sum(tensor.dims) <= 1:
                    raw = np.frombuffer(tensor.raw_data, _INTEGERS[tensor.data_type])
                    numbers = [*raw, *tensor.int64_data, *tensor.int32_data]
                    choices.setdefault(value.name, []).extend(int(number) for number in numbers)
    for index in range(max((len(each) for each in choices.values()), default=0)):
        yield {name: each[index % len(each)] for name, each in choices.items()}
    yield {}


def _comparisons(value: Value, produced: dict[int, list[Value]]) -> Iterator[NodeProto]:
    """Nodes that compare `value`, perhaps after it was given another shape or type."""
    for use in value.uses:
        if use.node is not None and use.op in _COMPARING:
            yield use.node
        elif use.node is not None and use.op in _RESHAPING and use.slot == 0:
            for output in produced.get(id(use.node), []):
                yield from _comparisons(output, produced)


def make_up(
    graph: Graph, sizes: Sizes, numbers: dict[str, int], scale: float, input_shape: tuple[int, ...] | None
) -> Feed:
    """Random inputs.

    Args:
        graph: whose inputs.
        sizes: for the open dimensions.
        numbers: values of integer inputs; others are 0 or 1.
        scale: standard deviation of real numbers.
        input_shape: shape of the first input of real numbers without the batch, where it is known.

    Raises:
        ValueError: an input is of a kind that cannot be made up.
    """
    generator = np.random.default_rng(0)
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    symbols: dict[str, int] = {}
    feed: Feed = {}
    for given in graph.model.graph.input:
        if given.name in constants:
            continue
        kind, shape = given.type.tensor_type.elem_type, _shape(given, sizes, symbols, is_first=not feed)
        if kind in _FLOATS:
            if input_shape and len(shape) == len(input_shape) + 1:
                shape, input_shape = (shape[0], *input_shape), None
            feed[given.name] = (scale * generator.standard_normal(shape)).astype(_FLOATS[kind])
        elif kind in _INTEGERS:
            low = 1 if "mask" in given.name.lower() else 0
            array = generator.integers(low, 2, shape).astype(_INTEGERS[kind])
            feed[given.name] = np.full_like(array, numbers[given.name]) if given.name in numbers else array
        elif kind == TensorProto.BOOL:
            feed[given.name] = np.ones(shape, bool)
        else:
            raise ValueError(f"'{given.name}' is of a kind that cannot be made up")
    return feed


def _shape(given: ValueInfoProto, sizes: Sizes, symbols: dict[str, int], is_first: bool) -> tuple[int, ...]:
    shape = []
    for index, dim in enumerate(given.type.tensor_type.shape.dim):
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
