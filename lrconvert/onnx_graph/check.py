"""Running a factorized graph beside the graph with merged weights, on random inputs.

Besides the outputs, what every operator with a weight computes is compared, as far as both graphs have it: outputs
alone may be saturated. Where a tiny change of the inputs changes a value as much as the tolerance, it says nothing and
is left out. Where nothing can be compared, that is said, and nothing is claimed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper

from lrconvert.errors import VerificationError
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.inputs import Feed, choices_of, make_up, sizes_to_try
from lrconvert.onnx_graph.tensors import DTYPES
from lrconvert.tensors import relative_difference
from lrconvert.timer import Latency, latencies

TOLERANCE = 1e-4
_PROBED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"}
_SCALES = (1.0, 0.1, 10.0)
# What numbers of half precision may differ by, in units of their last place: values that are computed in it, and those
# that are computed with weights that were rounded to it once.
_UNITS_OF_VALUES, _UNITS_OF_WEIGHTS = 16, 4
_HALF = torch.finfo(torch.float16).eps
# Inputs are changed by this much, relatively, to see what rounding does to each value.
_NUDGE = 1e-6
# How many successful runs are looked at, in search of one whose outputs are not saturated.
_MOST_RUNS = 9


@dataclass(frozen=True)
class Outcome:
    """What running both graphs showed.

    Attributes:
        runner: "onnxruntime 1.23".
        difference: largest ‖got − want‖ / ‖want‖ over values and runs; None where nothing could be compared.
        note: for people.
    """

    runner: str
    difference: float | None
    note: str


@dataclass
class _Run:
    """One run of the reference: inputs, values by name, and the names of those that rounding does not dominate."""

    feed: Feed
    values: dict[str, np.ndarray]
    steady: list[str] = field(default_factory=list)


def compare_runs(
    reference: Graph, small: Graph, input_shape: tuple[int, ...] | None, tolerance: float, where: str
) -> Outcome:
    """Run both graphs on the same random inputs.

    Args:
        reference: the graph with merged weights.
        small: the graph with factors.
        input_shape: of the first input of real numbers, without the batch, where it is known.
        tolerance: largest relative difference allowed; more for values or factors of half precision.
        where: the output, for messages.

    Raises:
        VerificationError: the reference runs, and the other one does not or computes something else.
    """
    runner = f"onnxruntime {onnxruntime.__version__}"
    tolerance = max(tolerance, _rounding_of_merged(small))
    outputs = [output.name for output in reference.model.graph.output]
    common = _probes(small)
    probes = [name for name in _probes(reference) if name in common and name not in outputs]
    try:
        session = session_of(reference, probes)
    except Exception as error:
        return Outcome(runner, None, f"not checked: onnxruntime cannot load this graph ({first_line(error)})")
    runs, reason = _runs_of(session, reference, outputs, input_shape, tolerance)
    del session
    if not any(run.steady for run in runs):
        hint = "" if input_shape else "; --input-shape may help"
        return Outcome(runner, None, f"not checked: no random input shows what the graph computes ({reason}{hint})")
    try:
        session = session_of(small, probes)
        got = [dict(zip([*outputs, *probes], session.run(None, run.feed), strict=True)) for run in runs]
    except Exception as error:
        raise VerificationError(
            f"{where}: onnxruntime cannot run the factorized graph ({first_line(error)})"
        ) from error
    worst = max(_worst(run, values, tolerance, where) for run, values in zip(runs, got, strict=True))
    return Outcome(runner, worst, _note(runner, runs, outputs, worst))


@dataclass(frozen=True)
class SideBySide:
    """Two graphs run in turn on the same random inputs.

    Attributes:
        difference: ‖b − a‖ / ‖a‖ of all outputs together; None where their shapes differ.
        latencies: of the first and of the second.
        note: on what they were measured.
    """

    difference: float | None
    latencies: tuple[Latency, Latency]
    note: str


def side_by_side(first: Graph, second: Graph, input_shape: tuple[int, ...] | None) -> SideBySide | None:
    """Run two graphs, one perhaps factorized from the other; None where no input was found that both run on."""
    outputs = [output.name for output in first.model.graph.output]
    try:
        sessions = [session_of(graph, []) for graph in (first, second)]
        runs, _ = _runs_of(sessions[0], first, outputs, input_shape, TOLERANCE)
        feed = max(runs, key=lambda run: _rank(run, outputs)).feed
        a, b = ([value for value in session.run(None, feed) if _is_real(value)] for session in sessions)
    except Exception:
        return None  # any graph may fail to run, and all that is lost is the measurement
    difference = None
    if [value.shape for value in a] == [value.shape for value in b]:
        flat = [torch.cat([torch.from_numpy(value).double().flatten() for value in values]) for values in (a, b)]
        difference = relative_difference(flat[1], flat[0])
    mine, theirs = latencies([lambda session=session: session.run(None, feed) for session in sessions])  # type: ignore[misc]
    inputs = ", ".join(f"{name} {array.shape}" for name, array in feed.items())
    note = f"CPU, onnxruntime {onnxruntime.__version__}, {inputs}, median of {mine.n}, in turn"
    return SideBySide(difference, (mine, theirs), note)


def _worst(run: _Run, got: dict[str, np.ndarray], tolerance: float, where: str) -> float:
    """The largest relative difference in one run."""
    worst = 0.0
    for name in run.steady:
        mine, theirs = got[name], run.values[name]
        if mine.shape != theirs.shape or not bool(np.isfinite(mine).all()):
            raise VerificationError(f"{where}: '{name}' is {mine.shape}, finite or not, and should be {theirs.shape}")
        difference = relative_difference(torch.from_numpy(mine), torch.from_numpy(theirs))
        if difference > _limit(theirs, tolerance):
            raise VerificationError(
                f"{where}: '{name}' differs from what merged weights compute by {difference:.1e}, more than "
                f"{_limit(theirs, tolerance):.0e}; nothing was kept"
            )
        worst = max(worst, difference)
    return worst


def _limit(value: np.ndarray, tolerance: float) -> float:
    """The tolerance, or a few units in the last place of half precision."""
    return max(tolerance, _UNITS_OF_VALUES * _HALF) if value.dtype == np.float16 else tolerance


def _rounding_of_merged(small: Graph) -> float:
    """What merged weights may differ from the product of their factors, as they are rounded to the dtype of those."""
    dtypes = {value.name: DTYPES[value.tensor.data_type] for value in small.scopes.values if value.tensor is not None}
    found = [torch.finfo(dtypes[names.left]).eps for names in small.factor_names().values() if names.left in dtypes]
    return _UNITS_OF_WEIGHTS * max((eps for eps in found if eps >= _HALF), default=0.0)


def _note(runner: str, runs: list[_Run], outputs: list[str], worst: float) -> str:
    inputs = "; ".join(", ".join(f"{name} {array.shape}" for name, array in run.feed.items()) for run in runs)
    number = max(len(run.steady) for run in runs)
    real = [name for name in outputs if any(name in run.values for run in runs)]
    vague = [name for name in real if not any(name in run.steady for run in runs)]
    note = f"checked with {runner}: {number} values differ by at most {worst:.1e} from merged weights, on {inputs}"
    return note + (f"; left out, as rounding dominates them: {', '.join(vague)}" if vague else "")


def _probes(graph: Graph) -> list[str]:
    """What the operators with weights compute, outside of bodies."""
    nodes = (node for node in graph.model.graph.node if node.op_type in _PROBED)
    return [name for node in nodes for name in node.output if name]


def session_of(
    graph: Graph, probes: Sequence[str] = (), given: Mapping[str, TensorProto] | None = None
) -> onnxruntime.InferenceSession:
    """A session whose outputs are those of `graph`, then `probes`; its constants `given`, by name, are inputs."""
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in probes)
    if given:
        kept = [tensor for tensor in model.graph.initializer if tensor.name not in given]
        nodes = [node for node in model.graph.node if node.op_type != "Constant" or node.output[0] not in given]
        inputs = [each for each in model.graph.input if each.name not in given]
        for held, rest in ((model.graph.initializer, kept), (model.graph.node, nodes), (model.graph.input, inputs)):
            del held[:]
            held.extend(rest)
        model.graph.input.extend(
            helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in given.items()
        )
    return open_session(model, graph.path.parent)


def open_session(model: ModelProto, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """A session that runs `model` on the CPU; its external data, if it has any, is in `folder`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions, and are expected here
    if folder is not None:
        where = str(folder.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", where)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _runs_of(
    session: onnxruntime.InferenceSession,
    graph: Graph,
    outputs: list[str],
    input_shape: tuple[int, ...] | None,
    tolerance: float,
) -> tuple[list[_Run], str]:
    """The most telling run for every choice of branch, and why there is none if there is none."""
    found, reason = [], "it takes no inputs of a known kind"
    names = [output.name for output in session.get_outputs()]
    for numbers in choices_of(graph):
        best, number = None, 0
        for sizes in sizes_to_try(graph):
            for scale in _SCALES:
                try:
                    run = _run(session, names, make_up(graph, sizes, numbers, scale, input_shape), tolerance)
                except Exception as error:
                    reason = first_line(error)
                    break
                number += 1
                if best is None or _rank(run, outputs) > _rank(best, outputs):
                    best = run
            if best is not None and (
                number >= _MOST_RUNS or all(name in best.steady for name in outputs if name in best.values)
            ):
                break
        if best is not None:
            found.append(best)
            if not best.steady:
                reason = "its values are not finite, all zero, or nothing but rounding"
    return found, reason


def _rank(run: _Run, outputs: list[str]) -> tuple[int, int]:
    """How telling a run is: its steady outputs, then all its steady values."""
    return sum(name in run.steady for name in outputs), len(run.steady)


def _run(session: onnxruntime.InferenceSession, names: list[str], feed: Feed, tolerance: float) -> _Run:
    """Run twice, the second time with inputs that are a little different, and note which values stay about the same."""
    generator = np.random.default_rng(1)
    nudged = {name: _nudge(array, generator) for name, array in feed.items()}
    first, second = (dict(zip(names, session.run(None, each), strict=True)) for each in (feed, nudged))
    run = _Run(feed, {name: value for name, value in first.items() if _is_real(value)})
    for name, value in run.values.items():
        if value.any() and np.isfinite(value).all() and value.shape == second[name].shape:
            noise = relative_difference(torch.from_numpy(second[name]), torch.from_numpy(value))
            if noise <= _limit(value, tolerance) / 10:
                run.steady.append(name)
    return run


def _nudge(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    if array.dtype.kind != "f":
        return array
    return np.asarray(array * (1 + _NUDGE * generator.standard_normal(array.shape))).astype(array.dtype)


def _is_real(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def first_line(error: BaseException) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
