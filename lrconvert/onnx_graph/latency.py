"""How long inference of a graph takes in onnxruntime, measured: as a whole, and each of its products alone.

A product alone is a graph of its node, with inputs of the sizes that it meets in the whole one, dense and at several
ranks. Weights are random: values do not matter for time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lrconvert.bench import FEWEST_TURNS, MOST_TURNS
from lrconvert.errors import UsageError
from lrconvert.latency import LatencyTable, LayerLatency, affordable_ranks, non_decreasing, share_of
from lrconvert.layers import Layer
from lrconvert.onnx_graph.check import first_line, open_session, session_of
from lrconvert.onnx_graph.cost import Shape, executions
from lrconvert.onnx_graph.edit import Edit, constants_of
from lrconvert.onnx_graph.factors import factor_names, put_factors
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.inputs import Feed, fixed_batch, one_example
from lrconvert.onnx_graph.scopes import scopes_of
from lrconvert.onnx_graph.weights import RECURRENT, Path, Weight, weights_of
from lrconvert.plan import Plan
from lrconvert.timer import times_in_turns

# Random numbers that all weights are filled with, over and over.
_BLOCK = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32) / 8


class GraphTiming:
    """Times a graph on this machine's CPU.

    Args:
        graph: dense.
        batch_size: examples in a run.
        input_shape: of its first input that is open, without the batch; None where it says so itself.

    Raises:
        UsageError: the graph takes another number of examples, or cannot be run.
    """

    def __init__(self, graph: Graph, batch_size: int, input_shape: tuple[int, ...] | None) -> None:
        fixed = fixed_batch(graph)
        if fixed is not None and batch_size not in (1, fixed):
            raise UsageError(f"{graph.path} takes {fixed} examples at once, not {batch_size}: leave --batch-size out")
        self.graph, self.batch_size = graph, fixed or batch_size
        with self._said():
            self.session = session_of(graph)
            self.feed = self._feed(input_shape)

    def __str__(self) -> str:
        return f"CPU, onnxruntime {onnxruntime.__version__}, batch {self.batch_size}"

    def table(self, layers: Sequence[Layer], seconds: float = 30.0) -> LatencyTable:
        """Times of the graph, and of each of `layers` dense and at ranks up to break-even; see `LatencyTable`.

        Weights of recurrent operators cost nothing at any rank: they are multiplied out when the graph is loaded.
        """
        (model_ms,) = self._in_turns([self.session])
        weights = {weight.layer.name: weight for weight in self.graph.weights}
        calls = executions(self.graph, self.feed)
        found: dict[str, LayerLatency] = {}
        stacks: dict[_Stack, list[str]] = {}
        for layer in layers:
            if layer.kind in RECURRENT.values():
                found[layer.name] = LayerLatency(0.0, (1,), (0.0,))
            elif products := _products(weights[layer.name], calls):
                stacks.setdefault(_Stack(layer.break_even_rank, tuple(products.items())), []).append(layer.name)
        share = share_of(seconds, len(stacks))
        for stack, names in stacks.items():
            with self._said():
                found |= dict.fromkeys(names, stack.measured(self.graph.model, next(share)))
        return LatencyTable.of(found, model_ms, str(self))

    def in_turns(self, plan: Plan) -> tuple[float, float]:
        """Milliseconds of one run: (dense, factorized by `plan`)."""
        small = Graph(self.graph.path)
        weights = small.check(plan)
        ranks = [(weights[layer.name], layer.rank) for layer in plan.low_rank if layer.rank is not None]
        with self._said():
            _factorize(small.model, Edit(small.model, small.scopes), ranks)
            dense, low_rank = self._in_turns([self.session, open_session(small.model, self.graph.path.parent)])
        return dense, low_rank

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Whatever onnxruntime finds wrong, said in one line."""
        try:
            yield
        except Exception as error:
            reason = first_line(error)
            raise UsageError(f"{self.graph.path} cannot be timed, --for size does without: {reason}") from error

    def _feed(self, input_shape: tuple[int, ...] | None) -> Feed:
        """Inputs that the graph runs on."""
        reason: Exception | None = None
        for feed in one_example(self.graph, input_shape, self.batch_size):
            try:
                self.session.run(None, feed)
            except Exception as error:  # the next choice may do
                reason = error
            else:
                return feed
        raise reason or ValueError("it takes no inputs of a known kind")

    def _in_turns(self, sessions: Sequence[onnxruntime.InferenceSession]) -> list[float]:
        runs = [lambda session=session: session.run(None, self.feed) for session in sessions]
        return [min(taken) for taken in times_in_turns(runs, MOST_TURNS, seconds=10.0, least=FEWEST_TURNS)]


@dataclass(frozen=True)
class _Product:
    """A node that multiplies by a weight, as it meets it in a run.

    Attributes:
        node: its operator and attributes, as bytes; its inputs are "x" and "w".
        kind: of the numbers, a TensorProto.DataType.
        weight: shape of the weight, as the node sees it.
        data: shape of what it is multiplied with.
        slot: the input that is the weight.
    """

    node: bytes
    kind: int
    weight: Shape
    data: Shape
    slot: int

    def run(self, like: ModelProto, rank: int | None) -> Callable[[], object]:
        """What computes it once, dense or at `rank`, with the operators of `like`."""
        node = NodeProto.FromString(self.node)
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", self.kind, self.data)],
            [helper.make_empty_tensor_value_info("y")],
            [_filled(TensorProto(name="w", data_type=self.kind, dims=self.weight))],
        )
        model = ModelProto(ir_version=like.ir_version, opset_import=like.opset_import, graph=graph)
        if rank is not None:
            scopes = scopes_of(model)
            (weight,) = weights_of(scopes)
            _factorize(model, Edit(model, scopes), [(weight, rank)])
        session = open_session(model)
        feed = {"x": np.resize(_BLOCK, self.data).astype(helper.tensor_dtype_to_np_dtype(self.kind))}
        return lambda: session.run(None, feed)


@dataclass(frozen=True)
class _Stack:
    """All products with one weight in a run, of which other weights may have the same.

    Attributes:
        break_even_rank: of the weight.
        products: and how often each is computed.
    """

    break_even_rank: int
    products: tuple[tuple[_Product, int], ...]

    def measured(self, like: ModelProto, seconds: float) -> LayerLatency:
        """Their times, dense and at some ranks, with the operators of `like`; in about so many seconds."""
        dense = self._runs(like, None)
        (once,) = times_in_turns([lambda: [run() for run in dense]], 1, least=1)
        ranks = affordable_ranks(self.break_even_rank, min(once), seconds)
        runs = [dense, *(self._runs(like, rank) for rank in ranks)]
        flat = [run for each in runs for run in each]
        taken = iter(times_in_turns(flat, MOST_TURNS, None, seconds, FEWEST_TURNS))
        dense_ms, *low_rank_ms = (sum(count * min(next(taken)) for _, count in self.products) for _ in runs)
        return LayerLatency(dense_ms, ranks, tuple(non_decreasing(low_rank_ms)))

    def _runs(self, like: ModelProto, rank: int | None) -> list[Callable[[], object]]:
        return [product.run(like, rank) for product, _ in self.products]


def _products(weight: Weight, calls: Mapping[int, Sequence[tuple[Shape, ...]]]) -> Counter[_Product]:
    """How often which products with `weight` are in a run, of which `calls` are by the identity of the node."""
    found: Counter[_Product] = Counter()
    for path in weight.paths:
        assert path.use.node is not None
        for shapes in calls.get(id(path.use.node), ()):
            found[_product(weight, path, shapes)] += 1
    return found


def _product(weight: Weight, path: Path, shapes: tuple[Shape, ...]) -> _Product:
    node, slot = path.use.node, path.use.slot
    assert node is not None
    alone = NodeProto(op_type=node.op_type, output=["y"], input=["w", "x"] if slot == 0 else ["x", "w"])
    # Without a bias: both have it.
    alone.attribute.extend(sorted(node.attribute, key=lambda each: each.name))
    casts = [int(each.i) for cast in path.casts for each in cast.attribute if each.name == "to"]
    kind = (casts or [weight.tensor.data_type])[-1]
    return _Product(alone.SerializeToString(), kind, shapes[slot], shapes[1 - slot], slot)


def _factorize(model: ModelProto, edit: Edit, ranks: Sequence[tuple[Weight, int]]) -> None:
    """Put random factors at these ranks into `model`."""
    names = []
    for weight, rank in ranks:
        names.append(factor_names(weight, edit))
        put_factors(edit, weight, rank, names[-1])
    edit.apply()
    constants = constants_of(model)
    for each in names:
        for name in (each.left, each.right):
            _filled(constants[name][1])


def _filled(tensor: TensorProto) -> TensorProto:
    """`tensor` with random numbers of its shape and type."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.resize(_BLOCK, tuple(tensor.dims)).astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return tensor
