"""Rewriting a graph by a plan: one multiplication becomes two, and a recurrent layer's weight is multiplied out.

    Conv                 Conv(u: kernel, strides, pads, dilations, group), then Conv(v: kernel 1, group, bias)
    ConvTranspose        Conv(u: kernel 1, group), then ConvTranspose(v: all the rest)
    Gemm, MatMul         two of the same; Gemm's alpha, beta and bias stay with the second
    LSTM, GRU, RNN       the node stays, and its weight is computed from the factors of its gates. onnxruntime does that
                         once, when it loads the graph: the file is smaller, the speed is the same

Every use of a weight is rewritten with the same two factors, so that what was shared stays shared.
"""

from dataclasses import dataclass

import torch
from onnx import NodeProto, TensorProto, helper

from lrconvert.onnx_graph.edit import Edit
from lrconvert.onnx_graph.tensors import DTYPES, announce
from lrconvert.onnx_graph.weights import RECURRENT, Path, Weight, attribute


@dataclass(frozen=True)
class FactorNames:
    """The initializers that hold a weight's factors.

    Attributes:
        left, right: the weight as it is stored is left·right, see `Weight.factor_shapes`.
        in_first: whether a matrix is stored (in, out).
    """

    left: str
    right: str
    in_first: bool = False


def factor_names(weight: Weight, edit: Edit) -> FactorNames:
    """Names that the graph does not have yet: "a.u.weight" for "a.weight", else "a.u"; u is applied first."""
    base = weight.value.name
    end = ".weight" if base.endswith(".weight") else ""
    u, v = (edit.unique(f"{base.removesuffix('.weight')}.{factor}{end}") for factor in ("u", "v"))
    return FactorNames(u, v, weight.in_first) if weight.in_first or weight.is_transposed_conv else FactorNames(v, u)


def put_factors(edit: Edit, weight: Weight, rank: int, names: FactorNames) -> None:
    """Replace `weight` and every operator that uses it; the factors are announced, their data is yet to come."""
    assert weight.value.tensor is not None
    dtype = DTYPES[weight.value.tensor.data_type]
    for name, shape in zip((names.left, names.right), weight.factor_shapes(rank), strict=True):
        edit.add(weight.value.graph, announce(name, shape, dtype))
    if weight.layer.kind in RECURRENT.values():
        _multiply_out(edit, weight, names)
        return
    edit.drop(weight.value)
    for path in weight.paths:
        assert path.use.node is not None
        for node in path.through:
            edit.replace(node)
        edit.replace(path.use.node, *_REWRITES[path.use.op](edit, path, names, weight))


def _multiply_out(edit: Edit, weight: Weight, names: FactorNames) -> None:
    value = weight.value
    shape, product = edit.unique(f"{value.name}.shape"), edit.unique(f"{value.name}.product")
    dims = torch.tensor(weight.stored_shape)
    edit.add(value.graph, helper.make_tensor(shape, TensorProto.INT64, [len(dims)], dims.numpy().tobytes(), raw=True))
    edit.compute(
        value,
        helper.make_node("MatMul", [names.left, names.right], [product], edit.unique(f"{value.name}.MatMul")),
        helper.make_node("Reshape", [product, shape], [value.name], edit.unique(f"{value.name}.Reshape")),
    )


def _two_convs(edit: Edit, path: Path, names: FactorNames, weight: Weight) -> list[NodeProto]:
    dense = path.use.node
    assert dense is not None
    nodes: list[NodeProto] = []
    # stored as v·u: the right factor is applied first
    u, v = (_as_seen(edit, name, path, False, nodes) for name in (names.right, names.left))
    first, second = _pair(edit, dense)
    first.input.extend([dense.input[0], u])
    # Some exporters leave the kernel's shape to the weight, and that changes.
    first.attribute.extend(each for each in dense.attribute if each.name != "kernel_shape")
    kernel = weight.layer.shape[2:]
    first.attribute.append(helper.make_attribute("kernel_shape", kernel))
    second.input.extend([first.output[0], v, *dense.input[2:]])
    second.attribute.append(helper.make_attribute("kernel_shape", [1] * len(kernel)))
    second.attribute.append(helper.make_attribute("group", weight.layer.groups))
    return [*nodes, first, second]


def _two_with_transposed(edit: Edit, path: Path, names: FactorNames, weight: Weight) -> list[NodeProto]:
    dense = path.use.node
    assert dense is not None
    nodes: list[NodeProto] = []
    u, v = (_as_seen(edit, name, path, False, nodes) for name in (names.left, names.right))
    first, second = _pair(edit, dense)
    first.op_type = "Conv"
    first.input.extend([dense.input[0], u])
    first.attribute.append(helper.make_attribute("kernel_shape", [1] * len(weight.layer.shape[2:])))
    first.attribute.append(helper.make_attribute("group", weight.layer.groups))
    second.input.extend([first.output[0], v, *dense.input[2:]])
    second.attribute.extend(dense.attribute)
    return [*nodes, first, second]


def _two_products(edit: Edit, path: Path, names: FactorNames, weight: Weight) -> list[NodeProto]:
    """x·C becomes x·left·right, x·Cᵀ becomes x·rightᵀ·leftᵀ, C·x becomes left·(right·x)."""
    dense = path.use.node
    assert dense is not None
    nodes: list[NodeProto] = []
    first, second = _pair(edit, dense)
    if path.use.op == "Gemm":
        transposed = path.is_transposed != bool(attribute(dense, "transB", 0))
        order = (names.right, names.left) if transposed else (names.left, names.right)
        factors = [_as_seen(edit, name, path, False, nodes) for name in order]
        first.input.extend([dense.input[0], factors[0]])
        second.input.extend([first.output[0], factors[1], *dense.input[2:]])
        first.attribute.extend(each for each in dense.attribute if each.name == "transA")
        second.attribute.extend(each for each in dense.attribute if each.name in ("alpha", "beta"))
        for node in (first, second):
            node.attribute.append(helper.make_attribute("transB", int(transposed)))
        return [*nodes, first, second]
    on_the_left = path.use.slot == 0
    order = (names.right, names.left) if on_the_left != path.is_transposed else (names.left, names.right)
    factors = [_as_seen(edit, name, path, path.is_transposed, nodes) for name in order]
    first.input.extend([factors[0], dense.input[1]] if on_the_left else [dense.input[0], factors[0]])
    second.input.extend([factors[1], first.output[0]] if on_the_left else [first.output[0], factors[1]])
    return [*nodes, first, second]


_REWRITES = {
    "Conv": _two_convs,
    "ConvTranspose": _two_with_transposed,
    "Gemm": _two_products,
    "MatMul": _two_products,
}


def _pair(edit: Edit, dense: NodeProto) -> tuple[NodeProto, NodeProto]:
    """Two nodes without inputs; the second has the name and the output of the dense one."""
    between = edit.unique(f"{dense.output[0]}.u")
    first = NodeProto(op_type=dense.op_type, output=[between], name=edit.unique(f"{dense.name or dense.output[0]}.u"))
    second = NodeProto(op_type=dense.op_type, output=dense.output, name=dense.name, doc_string=dense.doc_string)
    second.metadata_props.extend(dense.metadata_props)
    return first, second


def _as_seen(edit: Edit, name: str, path: Path, transpose: bool, nodes: list[NodeProto]) -> str:
    """The factor `name` transposed and cast as the weight was on its way; the nodes that do it go into `nodes`."""
    if transpose:
        nodes.append(helper.make_node("Transpose", [name], [edit.unique(f"{name}.T")], perm=[1, 0]))
        name = nodes[-1].output[0]
    for cast in path.casts:
        node = NodeProto(op_type="Cast", input=[name], output=[edit.unique(f"{name}.cast")], attribute=cast.attribute)
        nodes.append(node)
        name = node.output[0]
    return name
