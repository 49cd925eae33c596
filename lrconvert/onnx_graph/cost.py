"""What a graph costs: multiply-accumulates of one run, read from the shapes that onnxruntime notes while it runs.

Running finds what no shape inference does: which branch is taken, how often a body runs, what a shape computed from
another one is. The values do not matter, so that large constants are zeros that are made while it runs: no weight is
read, and a graph of any size is light.
"""

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from lrconvert.cost import Trace
from lrconvert.errors import ModelError
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.inputs import Feed, one_example
from lrconvert.onnx_graph.scopes import STANDARD, bodies_of, constant_of
from lrconvert.onnx_graph.tensors import DTYPES, is_external
from lrconvert.onnx_graph.weights import produced_by

Shape = tuple[int, ...]

# What makes zeros, ConstantOfShape, came with it.
_OLDEST_OPSET = 9
# Constants of more elements are replaced by zeros: smaller ones may be sizes and scales, which operators look at.
_SMALL = 1024
# Inputs that multiply or convolve each other, of operators that do little else.
_WEIGHT_SLOT = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
_FACTOR_SLOT = {"MatMul": 0, "MatMulInteger": 0, "QLinearMatMul": 0, "Gemm": 0}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_PRODUCTS = re.compile("Attention|MatMul|Gemm|Conv|MoE|GRU|LSTM")
# What onnxruntime puts behind a node's name where it notes that the node ran.
_RAN = "_kernel_time"


def trace_graph(graph: Graph, input_shape: tuple[int, ...] | None) -> Trace:
    """What one run with one example shows, by layer name.

    Weights of recurrent operators have no positions: their factors are multiplied out when the graph is loaded, so that
    as many multiplications remain.

    Args:
        graph: with factors or without.
        input_shape: of the first input of real numbers, or else of whole ones, without the batch; where it is open.

    Raises:
        ModelError: the sizes of the inputs are not known, or onnxruntime cannot run the graph.
    """
    if graph.opset < _OLDEST_OPSET:
        raise ModelError(f"they are counted from opset {_OLDEST_OPSET} on, and this graph has {graph.opset}")
    hollow, nodes = _hollow(graph.model)
    reason = ""
    for feed in one_example(graph, input_shape):
        try:
            calls = _calls(hollow, graph.path.parent, feed)
        except Exception as error:  # whatever onnxruntime finds wrong, all that is lost are the MACs
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        else:
            return _trace(graph, nodes, calls)
    raise ModelError(f"onnxruntime cannot run the graph ({reason})")


def executions(graph: Graph, feed: Feed) -> dict[int, list[tuple[Shape, ...]]]:
    """Shapes of what every node read in a run on `feed`, each time that it ran, by the node's identity."""
    hollow, nodes = _hollow(graph.model)
    found: dict[int, list[tuple[Shape, ...]]] = {}
    for call in _calls(hollow, graph.path.parent, feed):
        if call.name in nodes:
            found.setdefault(id(nodes[call.name]), []).append(call.inputs)
    return found


def uncounted(graph: Graph) -> tuple[str, ...]:
    """Operators that multiply matrices in a way of their own, and are not counted."""
    nodes = [node for each in graph.scopes.graphs for node in each.node if node.domain not in STANDARD]
    return tuple(dict.fromkeys(f"{node.domain}.{node.op_type}" for node in nodes if _PRODUCTS.search(node.op_type)))


@dataclass(frozen=True)
class _Call:
    """One execution of a node: its name in the copy, its operator, and the shapes of what it read and made."""

    name: str
    op: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


def _trace(graph: Graph, nodes: dict[str, NodeProto], calls: Sequence[_Call]) -> Trace:
    """Multiply-accumulates of `calls`, but of what depends on constants alone and is folded when a graph is loaded."""
    used = {
        (id(path.use.node), path.use.slot): weight.layer
        for weight in graph.weights
        for path in weight.paths
        if path.use.op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    }
    alive = _alive(graph)
    positions: dict[str, int] = {}
    total = 0
    for call in calls:
        node = nodes.get(call.name)
        if node is not None and id(node) not in alive:
            continue
        macs = _macs(call, node)
        total += macs
        for slot in (0, 1):
            layer = used.get((id(node), slot))
            if layer is not None:
                positions[layer.name] = positions.get(layer.name, 0) + macs // layer.num_params
    order = [weight.layer.name for weight in graph.weights if weight.layer.name in positions]
    return Trace({name: positions[name] for name in order}, total, {})


def _macs(call: _Call, node: NodeProto | None) -> int:
    """Multiply-accumulates of one execution; 0 for operators that do none, or none that are counted."""
    if node is not None and node.domain not in STANDARD:
        return 0
    if call.op in _WEIGHT_SLOT:
        # Every output of a convolution, or every input of a transposed one, meets this many elements of the weight.
        each = call.inputs[0] if call.op == "ConvTranspose" else call.outputs[0]
        return math.prod(each) * math.prod(call.inputs[_WEIGHT_SLOT[call.op]][1:])
    if call.op == "Gemm":
        return math.prod(call.inputs[0]) * call.outputs[0][1]
    if call.op in _FACTOR_SLOT:
        return math.prod(call.outputs[0]) * call.inputs[0][-1]
    if call.op in _RECURRENT:
        steps, batch, _ = call.inputs[0]
        return steps * batch * (math.prod(call.inputs[1]) + math.prod(call.inputs[2]))
    if call.op == "Attention":
        # With a past, all keys together are the second output.
        has_past = node is not None and len(node.output) > 1 and bool(node.output[1])
        keys = (call.outputs if has_past else call.inputs)[1][-2]
        return keys * (math.prod(call.inputs[0]) + math.prod(call.outputs[0]))
    if call.op == "Einsum" and node is not None:
        return _einsum_macs(call, node)
    return 0


def _einsum_macs(call: _Call, node: NodeProto) -> int:
    """What an equation multiplies, one operand after the other; indices that nothing needs any more are summed over."""
    equation = next(each.s.decode() for each in node.attribute if each.name == "equation").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.replace("...", ".").split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, call.inputs, strict=True):
        before, dots, after = term.partition(".")
        hidden = shape[len(before) : len(shape) - len(after)] if dots else ()
        sizes["."] = max(sizes.get(".", 1), math.prod(hidden))
        sizes |= zip(before, shape, strict=False)
        sizes |= zip(reversed(after), reversed(shape), strict=False)
    if "->" not in equation:  # what is named once is kept
        right = "".join(index for index in sizes if left.count(index) == 1 or index == ".")
    macs, have = 0, set(terms[0])
    for number, term in enumerate(terms[1:], 2):
        have |= set(term)
        macs += math.prod(sizes[index] for index in have)
        have &= set(right.replace("...", ".")).union(*terms[number:])
    return macs


def _alive(graph: Graph) -> set[int]:
    """Identities of the nodes that depend on an input of a graph or of a body, not on constants alone."""
    produced = produced_by(graph.scopes)
    found: set[int] = set()
    left = [value for value in graph.scopes.values if value.node is None and value.tensor is None]
    while left:
        for use in left.pop().uses:
            if use.node is not None and id(use.node) not in found:
                found.add(id(use.node))
                left.extend(produced.get(id(use.node), ()))
    return found


def _hollow(model: ModelProto) -> tuple[ModelProto, dict[str, NodeProto]]:
    """A copy of `model` without large constants, in which every node has a name of its own: and these, to the nodes."""
    nodes: dict[str, NodeProto] = {}
    copy = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    copy.graph.CopyFrom(_hollow_graph(model.graph, nodes))
    return copy, nodes


def _hollow_graph(graph: GraphProto, nodes: dict[str, NodeProto]) -> GraphProto:
    large = {tensor.name for tensor in graph.initializer if _is_large(tensor)}
    copy = GraphProto(
        name=graph.name,
        input=[given for given in graph.input if given.name not in large],
        output=graph.output,
        initializer=[tensor for tensor in graph.initializer if tensor.name not in large],
        sparse_initializer=graph.sparse_initializer,
    )
    for tensor in graph.initializer:
        if tensor.name in large:
            copy.node.extend(_zeros(tensor, tensor.name))
    for node in graph.node:
        tensor = constant_of(node)
        if tensor is not None and _is_large(tensor):
            copy.node.extend(_zeros(tensor, node.output[0]))
            continue
        name = f"{node.name or node.op_type}#{len(nodes)}"
        nodes[name] = node
        copy.node.append(_hollow_node(node, name, nodes))
    return copy


def _hollow_node(node: NodeProto, name: str, nodes: dict[str, NodeProto]) -> NodeProto:
    copy = NodeProto(input=node.input, output=node.output, name=name, op_type=node.op_type, domain=node.domain)
    copy.overload = node.overload
    if not any(True for _ in bodies_of(node)):
        copy.attribute.extend(node.attribute)
        return copy
    for given in node.attribute:
        attribute = copy.attribute.add()
        if given.type == AttributeProto.GRAPH:
            attribute.name, attribute.type = given.name, given.type
            attribute.g.CopyFrom(_hollow_graph(given.g, nodes))
        else:
            attribute.CopyFrom(given)
    return copy


def _is_large(tensor: TensorProto) -> bool:
    real = tensor.data_type in DTYPES and DTYPES[tensor.data_type].is_floating_point
    return real and (is_external(tensor) or math.prod(tensor.dims) > _SMALL)


def _zeros(tensor: TensorProto, name: str) -> tuple[NodeProto, NodeProto]:
    """Nodes that make zeros in the shape of `tensor`, called `name`, whenever they run."""
    shape = helper.make_tensor("", TensorProto.INT64, [len(tensor.dims)], tensor.dims)
    zero = helper.make_tensor("", tensor.data_type, [1], [0])
    return (
        helper.make_node("Constant", [], [f"{name}/shape"], value=shape),
        helper.make_node("ConstantOfShape", [f"{name}/shape"], [name], value=zero),
    )


def _calls(model: ModelProto, folder: Path, feed: Feed) -> list[_Call]:
    """What runs in `model`, whose external data is in `folder`, in the order of execution."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions, and are expected here
    # Nothing is changed of the graph, so that nodes keep their names.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A packed weight has no shape any more.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    with tempfile.TemporaryDirectory() as own:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(own) / "profile")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        try:
            session.run(None, feed)
        finally:
            profile = session.end_profiling()
        events = json.loads(Path(profile).read_text(encoding="utf-8"))
    return [_call(event) for event in events if event.get("cat") == "Node" and event["name"].endswith(_RAN)]


def _call(event: dict[str, Any]) -> _Call:
    noted = event["args"]
    inputs, outputs = (
        tuple(tuple(shape) for each in noted[key] for shape in each.values())
        for key in ("input_type_shape", "output_type_shape")
    )
    return _Call(event["name"].removesuffix(_RAN), noted["op_name"], inputs, outputs)
