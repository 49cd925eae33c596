"""Changing a graph: edits are noted first and applied all at once, so that what was found in it stays valid."""

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from lrconvert.onnx_graph.scopes import Scopes, Value, scopes_of


class Edit:
    """Changes to `model`, nothing of which happens before `apply`.

    Args:
        model: changed in place.
        scopes: its values, from `scopes_of`; useless once the edit is applied.
    """

    def __init__(self, model: ModelProto, scopes: Scopes) -> None:
        self.model, self.scopes = model, scopes
        self._instead: dict[int, list[NodeProto]] = {}
        self._first: dict[int, list[NodeProto]] = {}
        self._added: dict[int, list[TensorProto]] = {}
        self._dropped: dict[int, set[str]] = {}

    def unique(self, name: str) -> str:
        """`name`, with a number behind it where the model has it already; taken from now on."""
        number, wanted = 1, name
        while name in self.scopes.names:
            name, number = f"{wanted}_{number}", number + 1
        self.scopes.names.add(name)
        return name

    def replace(self, node: NodeProto, *others: NodeProto) -> None:
        """Put `others`, perhaps none, in the place of `node`."""
        self._instead[id(node)] = list(others)

    def add(self, graph: GraphProto, tensor: TensorProto) -> None:
        """Add an initializer."""
        self._added.setdefault(id(graph), []).append(tensor)

    def drop(self, value: Value) -> None:
        """Remove a constant: an initializer, an input with a default, or a Constant node."""
        if value.node is not None:
            self._instead.setdefault(id(value.node), [])
        else:
            self._dropped.setdefault(id(value.graph), set()).add(value.name)

    def compute(self, value: Value, *nodes: NodeProto) -> None:
        """Have `nodes`, the last of which must have its name as output, compute a value that was constant."""
        if value.node is not None:
            self.replace(value.node, *nodes)
        else:
            self._first.setdefault(id(value.graph), []).extend(nodes)
            self.drop(value)

    def apply(self) -> None:
        """Do it."""
        # Bodies first: rebuilding a list of nodes copies them, with their bodies.
        for graph in reversed(self.scopes.graphs):
            nodes = [each for node in graph.node for each in self._instead.get(id(node), (node,))]
            if id(graph) in self._first or any(id(node) in self._instead for node in graph.node):
                copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
                del graph.node[:]
                graph.node.extend([*self._first.get(id(graph), []), *copies])
            dropped = self._dropped.get(id(graph), set())
            for field in (graph.initializer, graph.input):
                for index in reversed(range(len(field))):
                    if field[index].name in dropped:
                        del field[index]
            graph.initializer.extend(self._added.get(id(graph), []))


def constants_of(model: ModelProto) -> dict[str, tuple[GraphProto, TensorProto]]:
    """Name to (graph, data) of every constant; where two bodies use one name, the last."""
    return {value.name: (value.graph, value.tensor) for value in scopes_of(model).values if value.tensor is not None}
