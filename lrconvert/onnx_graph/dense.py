"""The way back: a graph with factors becomes one with the dense weights again, node by node."""

from onnx import NodeProto

from lrconvert.errors import PlanError
from lrconvert.onnx_graph.edit import Edit
from lrconvert.onnx_graph.factors import FactorNames
from lrconvert.onnx_graph.scopes import Value
from lrconvert.onnx_graph.tensors import DTYPES, announce
from lrconvert.onnx_graph.weights import RECURRENT, Path, attribute, paths_of, produced_by
from lrconvert.plan import LayerPlan


def put_dense(edit: Edit, layer: LayerPlan, names: FactorNames) -> tuple[str, tuple[int, ...]]:
    """Replace the factors of `layer` by one weight, and each pair of operators by one.

    Returns:
        Name and stored shape of the weight, which is announced without its data.

    Raises:
        PlanError: the graph does not hold the factors as lrconvert wrote them.
    """
    known = {value.name: value for value in edit.scopes.values if value.tensor is not None}
    left, right = known.get(names.left), known.get(names.right)
    if left is None or right is None or left.tensor is None or right.tensor is None:
        raise PlanError(f"{layer.name}: the graph has no '{names.left if left is None else names.right}'")
    if layer.kind in RECURRENT.values():
        name, shape = _constant_again(edit, layer, left, known)
    else:
        name = edit.unique(layer.weight)
        a, b = tuple(left.tensor.dims), tuple(right.tensor.dims)
        shape = layer.shape if layer.kind.startswith("conv") else (a[0], *b[1:])
        _one_operator(edit, layer, name, left, right)
    edit.add(left.graph, announce(name, shape, DTYPES[left.tensor.data_type]))
    for value in (left, right):
        edit.drop(value)
    return name, shape


def _constant_again(edit: Edit, layer: LayerPlan, left: Value, known: dict[str, Value]) -> tuple[str, tuple[int, ...]]:
    """Undo the product that computes a recurrent layer's weight; returns its name and shape."""
    product = left.uses[0].node if left.uses else None
    reshape = next((use.node for value in edit.scopes.values if value.node is product for use in value.uses), None)
    shape = known.get(reshape.input[1]) if reshape is not None and reshape.op_type == "Reshape" else None
    if product is None or reshape is None or shape is None or shape.tensor is None:
        raise PlanError(f"{layer.name}: its factors are not multiplied as lrconvert writes it")
    name = reshape.output[0]
    edit.replace(product)
    edit.replace(reshape)
    edit.drop(shape)
    if sum(value.name == name for value in edit.scopes.values) > 1:
        # Another body has a value of this name: data is found by name, so this one needs a name of its own.
        name = edit.unique(layer.weight)
        edit.replace(reshape, NodeProto(op_type="Identity", input=[name], output=reshape.output))
    return name, tuple(memoryview(shape.tensor.raw_data).cast("q"))


def _one_operator(edit: Edit, layer: LayerPlan, name: str, left: Value, right: Value) -> None:
    produced = produced_by(edit.scopes)
    steps = {
        id(path.use.node): (factor, path)
        for factor in (left, right)
        for path in paths_of(factor, produced)
        if path.use.node is not None
    }
    computed = {value.name: value.node for value in edit.scopes.values if value.node is not None}
    pairs = 0
    for factor, path in steps.values():
        second = path.use.node
        assert second is not None
        before = computed.get(second.input[_data_slot(path)])
        other, step = steps.get(id(before), (factor, path))
        if before is None or other is factor:
            continue
        pairs += 1
        seen = [NodeProto.FromString(node.SerializeToString()) for node in path.through]
        if seen:
            seen[0].input[0] = name
        weight = seen[-1].output[0] if seen else name
        for node in step.through:
            edit.replace(node)
        for index, node in enumerate(path.through):
            edit.replace(node, seen[index])
        edit.replace(before)
        edit.replace(second, _merged(before, second, step, path, weight))
    if 2 * pairs != len(steps):
        raise PlanError(f"{layer.name}: its factors are not used in pairs as lrconvert writes it")


def _data_slot(path: Path) -> int:
    """The input of an operator that is not its weight."""
    return 1 - path.use.slot if path.use.op == "MatMul" else 0


def _merged(first: NodeProto, second: NodeProto, step: Path, path: Path, weight: str) -> NodeProto:
    """The operator that two replaced."""
    dense = NodeProto(op_type=second.op_type, name=second.name, output=second.output, doc_string=second.doc_string)
    dense.metadata_props.extend(second.metadata_props)
    inputs = list(second.input)
    inputs[_data_slot(path)] = first.input[_data_slot(step)]
    inputs[path.use.slot] = weight
    dense.input.extend(inputs)
    if path.use.op == "Conv":
        dense.attribute.extend(first.attribute)
    else:
        dense.attribute.extend(second.attribute)
        if path.use.op == "Gemm":
            for each in first.attribute:
                if each.name == "transA" and attribute(first, "transA", 0):
                    dense.attribute.append(each)
    return dense
