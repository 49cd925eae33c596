"""Who defines and who uses every value of an ONNX model, through the bodies of If, Loop and Scan.

A body sees the values of the graphs around it, and two bodies may give different values the same name: values are
told apart by the graph that defines them (https://github.com/onnx/onnx/blob/main/docs/IR.md, "Names Within a Graph").
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

STANDARD = ("", "ai.onnx")


@dataclass(eq=False)
class Use:
    """One place that reads a value.

    Attributes:
        graph: the graph that the reader is in.
        node: the reader; None where the graph itself returns the value.
        slot: which of its inputs, or of the graph's outputs.
        turn: number of the reader in the order of execution, bodies where they are called.
    """

    graph: GraphProto
    node: NodeProto | None
    slot: int
    turn: int

    @property
    def op(self) -> str:
        """Operator of the reader, with its domain unless it is a standard one."""
        if self.node is None:
            return "graph output"
        return self.node.op_type if self.node.domain in STANDARD else f"{self.node.domain}.{self.node.op_type}"


@dataclass(eq=False)
class Value:
    """One value.

    Attributes:
        name: its name, unique in its graph.
        graph: the graph that defines it.
        node: what computes it; None for inputs and initializers.
        tensor: its data where it is constant: an initializer, or what a Constant node holds.
        uses: its readers, in the order of execution.
    """

    name: str
    graph: GraphProto
    node: NodeProto | None = None
    tensor: TensorProto | None = None
    uses: list[Use] = field(default_factory=list)


@dataclass
class Scopes:
    """All values of a model.

    Attributes:
        values: in the order in which they are defined; those of a body where the body is called.
        graphs: every graph, the main one first.
        names: every name of a value or node, in any graph.
    """

    values: list[Value]
    graphs: list[GraphProto]
    names: set[str]


def scopes_of(model: ModelProto) -> Scopes:
    """Walk `model` once, its bodies included; functions of the model's own are not entered."""
    found = Scopes([], [], set())
    _walk(model.graph, {}, found, [0])
    return found


def bodies_of(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds as attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def constant_of(node: NodeProto) -> TensorProto | None:
    """The tensor that a Constant node holds, if it is one and holds a dense one."""
    if node.op_type != "Constant" or node.domain not in STANDARD:
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)


def _walk(graph: GraphProto, outer: dict[str, Value], found: Scopes, clock: list[int]) -> None:
    visible = dict(outer)

    def define(value: Value) -> None:
        visible[value.name] = value
        found.values.append(value)
        found.names.add(value.name)

    found.graphs.append(graph)
    for given in graph.input:
        define(Value(given.name, graph))
    for tensor in graph.initializer:
        if tensor.name in visible and visible[tensor.name].graph is graph:
            visible[tensor.name].tensor = tensor  # an input with a default, as before IR version 4
        else:
            define(Value(tensor.name, graph, tensor=tensor))
    for node in graph.node:
        clock[0] += 1
        found.names.add(node.name)
        for slot, name in enumerate(node.input):
            if name in visible:
                visible[name].uses.append(Use(graph, node, slot, clock[0]))
        for body in bodies_of(node):
            _walk(body, visible, found, clock)
        for name in node.output:
            if name:
                define(Value(name, graph, node, constant_of(node)))
    for slot, output in enumerate(graph.output):
        if output.name in visible:
            visible[output.name].uses.append(Use(graph, None, slot, clock[0]))
