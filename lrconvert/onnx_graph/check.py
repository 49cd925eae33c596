"""Running a factorized graph beside the graph with merged weights, on random inputs.

What a graph takes as input is known in part only: sizes may be symbols, and a number may choose between branches.
So likely inputs are tried until the reference runs; where none is found, that is said, and nothing is claimed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, ValueInfoProto

from lrconvert.errors import VerificationError
from lrconvert.onnx_graph.graph import Graph
from lrconvert.tensors import relative_difference

TOLERANCE = 1e-4
# Sizes to try for dimensions that the graph leaves open; 288 and 576 are what silero-vad takes.
_SIZES = (32, 64, 48, 16, 128, 224, 256, 288, 320, 512, 576, 8, 4, 2, 1)
_BATCHES = (2, 1)
_MOST_TRIES = 120
_COMPARING = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Where"}
Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What running both graphs showed.

    Attributes:
        runner: "onnxruntime 1.23".
        inputs: shapes of the inputs it was run on, one text for each run.
        difference: largest ‖got − want‖ / ‖want‖ over outputs and runs; None where nothing could be compared.
        note: for people.
    """

    runner: str
    inputs: tuple[str, ...]
    difference: float | None
    note: str


def compare_runs(
    reference: Path,
    small: Path,
    graph: Graph,
    input_shape: tuple[int, ...] | None,
    tolerance: float,
    where: str,
) -> Outcome:
    """Run both graphs on the same random inputs.

    Args:
        reference: the graph with merged weights.
        small: the graph with factors.
        graph: either of them, parsed: what inputs it takes.
        input_shape: of the first input of real numbers, without the batch, where it is known.
        tolerance: largest relative difference allowed; more where the outputs are of half precision.
        where: the output, for messages.

    Raises:
        VerificationError: the reference runs, and the other one does not or computes something else.
    """
    runner = f"onnxruntime {onnxruntime.__version__}"
    try:
        session = _session(reference)
    except Exception as error:
        return Outcome(runner, (), None, f"not checked: onnxruntime cannot load this graph ({_line(error)})")
    found, reason = _runs_of(session, graph, input_shape)
    del session
    if not found:
        hint = "" if input_shape else "; --input-shape may help"
        note = f"not checked: no random input was found that the graph runs on ({reason}{hint})"
        return Outcome(runner, (), None, note)
    try:
        session = _session(small)
        got = [session.run(None, feed) for feed, _ in found]
    except Exception as error:
        raise VerificationError(f"{where}: onnxruntime cannot run the factorized graph ({_line(error)})") from error
    worst = 0.0
    for outputs, (_, wanted) in zip(got, found, strict=True):
        for mine, theirs in zip(outputs, wanted, strict=True):
            if not _is_real(theirs):
                continue
            if mine.shape != theirs.shape or not bool(np.isfinite(mine).all()):
                raise VerificationError(
                    f"{where}: outputs are {mine.shape}, finite or not, and should be {theirs.shape}"
                )
            limit = max(tolerance, 8 * float(np.finfo(np.float16).eps)) if theirs.dtype == np.float16 else tolerance
            difference = relative_difference(torch.from_numpy(mine), torch.from_numpy(theirs))
            if difference > limit:
                raise VerificationError(
                    f"{where}: outputs differ from those with merged weights by {difference:.1e}, more than {limit:.0e}"
                )
            worst = max(worst, difference)
    texts = tuple(", ".join(f"{name} {tuple(array.shape)}" for name, array in feed.items()) for feed, _ in found)
    return Outcome(
        runner, texts, worst, f"checked with {runner} on {'; '.join(texts)}: at most {worst:.1e} from merged weights"
    )


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions, and are expected here
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _runs_of(
    session: onnxruntime.InferenceSession, graph: Graph, input_shape: tuple[int, ...] | None
) -> tuple[list[tuple[Feed, list[np.ndarray]]], str]:
    """(inputs, outputs) of runs that ended well and are the same each time, one for every choice of branch."""
    found, reason = [], "it takes no inputs of a known kind"
    for numbers in _choices(graph):
        for sizes in itertools.islice(itertools.product(_BATCHES, _SIZES), _MOST_TRIES):
            try:
                feed = _feed(graph, input_shape, *sizes, numbers)
                outputs = session.run(None, feed)
                again = session.run(None, feed)
            except Exception as error:
                reason = _line(error)
                continue
            real = [output for output in outputs if _is_real(output)]
            if not real or not all(np.isfinite(output).all() for output in real):
                reason = "its outputs are not finite"
            elif not all(np.array_equal(a, b) for a, b in zip(outputs, again, strict=True) if _is_real(a)):
                reason = "it computes something else each time"
            else:
                found.append((feed, outputs))
                break
    return found, reason


def _choices(graph: Graph) -> Iterator[dict[str, int]]:
    """Values for integer inputs that are compared with constants: one choice for each constant, and one for none."""
    constants = {value.name: value.tensor for value in graph.scopes.values if value.tensor is not None}
    choices: dict[str, list[int]] = {}
    for value in graph.scopes.values:
        if value.graph is graph.model.graph and value.node is None and value.tensor is None:
            for use in value.uses:
                others = use.node.input if use.node is not None and use.op in _COMPARING else ()
                for tensor in (constants.get(name) for name in others):
                    if tensor is not None and tensor.data_type in _INTEGERS and not tensor.dims:
                        raw = np.frombuffer(tensor.raw_data, _INTEGERS[tensor.data_type])
                        numbers = [*raw, *tensor.int64_data, *tensor.int32_data]
                        choices.setdefault(value.name, []).extend(int(number) for number in numbers)
    for index in range(max((len(each) for each in choices.values()), default=0)):
        yield {name: each[index % len(each)] for name, each in choices.items()}
    yield {}


_INTEGERS = {TensorProto.INT32: np.int32, TensorProto.INT64: np.int64}
_FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64, TensorProto.FLOAT16: np.float16}


def _feed(graph: Graph, input_shape: tuple[int, ...] | None, batch: int, size: int, numbers: dict[str, int]) -> Feed:
    """Random inputs: an open first dimension is `batch`, other open ones are `size`.

    Raises:
        ValueError: an input is of a kind that cannot be made up.
    """
    generator = np.random.default_rng(0)
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    symbols: dict[str, int] = {}
    feed = {}
    for given in graph.model.graph.input:
        if given.name in constants:
            continue
        kind, shape = given.type.tensor_type.elem_type, _shape(given, batch, size, symbols)
        if kind in _FLOATS:
            if input_shape and len(shape) == len(input_shape) + 1:
                shape, input_shape = (shape[0], *input_shape), None
            array = generator.standard_normal(shape).astype(_FLOATS[kind])
        elif kind in _INTEGERS:
            low = 1 if "mask" in given.name.lower() else 0
            array = generator.integers(low, 2, shape).astype(_INTEGERS[kind])
            array = np.full_like(array, numbers[given.name]) if given.name in numbers else array
        elif kind == TensorProto.BOOL:
            array = np.ones(shape, bool)
        else:
            raise ValueError(f"'{given.name}' is of a kind that cannot be made up")
        feed[given.name] = array
    return feed


def _shape(given: ValueInfoProto, batch: int, size: int, symbols: dict[str, int]) -> tuple[int, ...]:
    shape = []
    for index, dim in enumerate(given.type.tensor_type.shape.dim):
        if dim.dim_value > 0:
            shape.append(int(dim.dim_value))
        else:
            # Unnamed dimensions of one place are probably the same thing in every input.
            is_batch = index == 0 or "batch" in dim.dim_param.lower()
            name = dim.dim_param if dim.dim_param not in ("", "?") else ""
            shape.append(symbols.setdefault(name, batch if is_batch else size) if name else batch if is_batch else size)
    return tuple(shape)


def _is_real(output: object) -> bool:
    return isinstance(output, np.ndarray) and output.dtype.kind == "f"


def _line(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
