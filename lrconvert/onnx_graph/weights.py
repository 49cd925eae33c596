"""Finding the weights of a graph: every constant matrix, the operators that use it, and what follows from them."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from onnx import NodeProto, TensorProto
from torch import Tensor

from lrconvert.layers import Layer
from lrconvert.onnx_graph.scopes import Scopes, Use, Value
from lrconvert.onnx_graph.tensors import DTYPES
from lrconvert.plan import LayerPlan

RECURRENT = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}

# What a weight may pass through on its way to the operator that multiplies by it.
_REARRANGING = {"Slice", "Concat", "Split", "Squeeze", "Unsqueeze"}
_PASSING = {"Identity", "Cast", "Transpose", "Reshape", *_REARRANGING}
_QUANTIZED = re.compile(r"[Qq]uantize|Integer$|^QLinear|NBits|^com.microsoft.Q")
# Names that an exporter made up.
_ANONYMOUS = re.compile(r"^(.*onnx::\w+|_?val?_\d+|_?v_\d+|\d+|.*Constant(_\d+)?(_output(_\d+)?)?)$")
_BIAS = re.compile(r"(.+?)[._]bias(?:_\w+)?$")


@dataclass(frozen=True)
class Path:
    """How a weight reaches an operator.

    Attributes:
        use: the operator and its input.
        through: nodes on the way, first to last.
    """

    use: Use
    through: tuple[NodeProto, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether the operator sees the transpose of the stored matrix, before any transposition of its own."""
        return sum(node.op_type == "Transpose" for node in self.through) % 2 == 1

    @property
    def wants_in_first(self) -> bool:
        """Whether the operator, a product of matrices, takes the stored one as (in, out)."""
        if self.use.slot == 0:
            return self.is_transposed
        return self.is_transposed == bool(attribute(self.use.node, "transB", 0))

    @property
    def casts(self) -> tuple[NodeProto, ...]:
        """The casts on the way."""
        return tuple(node for node in self.through if node.op_type == "Cast")


@dataclass(frozen=True)
class Weight:
    """A constant of two or more dimensions.

    Attributes:
        layer: what plans and reports say of it; its shape is out first.
        value: the constant in the graph, stored in whichever way the operators want it.
        paths: the operators that use it.
        in_first: whether a matrix is stored (in, out).
        bias: the constant that is added to what its only product computes, and used nowhere else; one number for each
            output. None where there is no such constant.
    """

    layer: Layer
    value: Value
    paths: tuple[Path, ...]
    in_first: bool
    bias: Value | None = None

    @property
    def is_transposed_conv(self) -> bool:
        """Whether it is the weight of a ConvTranspose, (in, out/groups, *kernel)."""
        return self.layer.kind.startswith("conv_transpose")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the graph."""
        return tuple(self.tensor.dims)

    @property
    def tensor(self) -> TensorProto:
        """The constant, as the graph holds it."""
        assert self.value.tensor is not None
        return self.value.tensor

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight in the layer's shape as the graph has it: the inverse of `out_first`."""
        return (weight.mT if self.in_first else weight.reshape(self.stored_shape)).contiguous()

    def out_first(self, stored: Tensor) -> Tensor:
        """The weight in the layer's shape, (out, in/groups, *kernel)."""
        return stored.mT.contiguous() if self.in_first else stored.reshape(self.layer.shape)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two stored factors, (left, right), whose product is the stored weight.

        A matrix is left·right. A convolution is v·u with v (out, rank, 1, …) and u (groups·rank, in/groups, *kernel), a
        transposed one uᵀ·v with u (groups·rank, in/groups, 1, …) and v (groups·rank, out/groups, *kernel). A recurrent
        layer is one product a gate, left (gates, hidden, rank) and right (gates, rank, in).
        """
        groups, (rows, columns) = self.layer.groups, self.layer.matrix_shape
        if self.layer.kind == "linear":
            return (self.stored_shape[0], rank), (rank, self.stored_shape[1])
        if self.layer.kind in RECURRENT.values():
            return (groups, rows, rank), (groups, rank, columns)
        kernel = self.layer.shape[2:]
        pointwise = (groups * rank, rows) if self.is_transposed_conv else (groups * rows, rank)
        return (*pointwise, *[1] * len(kernel)), (groups * rank, self.layer.shape[1], *kernel)

    def stored_factors(self, u: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(left, right) as they are stored, from u (groups, rank, columns) and v (groups, rows, rank)."""
        pair = (u.mT, v.mT) if self.in_first else (v.mT if self.is_transposed_conv else v, u)
        shapes = self.factor_shapes(rank)
        return pair[0].reshape(shapes[0]).contiguous(), pair[1].reshape(shapes[1]).contiguous()


def product_of(left: Tensor, right: Tensor, layer: LayerPlan, shape: tuple[int, ...]) -> Tensor:
    """The weight of `layer` as it was stored, of `shape`, from its two stored factors; multiplied in float64."""
    assert layer.rank is not None
    turned = layer.kind.startswith("conv_transpose")
    rows = left.double().reshape(layer.groups, layer.rank, -1).mT if turned else left.double()
    product = rows.reshape(layer.groups, -1, layer.rank) @ right.double().reshape(layer.groups, layer.rank, -1)
    return product.reshape(shape).to(left.dtype)


def weights_of(scopes: Scopes) -> tuple[Weight, ...]:
    """Every weight of the graph, in the order in which it is used first; those that are not used come last."""
    operands = {
        (id(use.node), use.slot): value for value in scopes.values for use in value.uses if use.node is not None
    }
    produced = produced_by(scopes)
    names_of_values = Counter(value.name for value in scopes.values)
    found: list[Weight] = []
    names: dict[str, int] = {}
    keys: dict[str, int] = {}
    for value in scopes.values:
        if value.tensor is None or value.tensor.data_type not in DTYPES or len(value.tensor.dims) < 2:
            continue
        if not math.prod(value.tensor.dims):
            continue
        paths = tuple(paths_of(value, produced))
        roles = [_role(path, value, operands) for path in paths]
        kind, groups, in_first, reason = _together(roles, paths)
        if kind == "parameter" and not _is_matrix(value, paths):
            continue
        key = _unique(value.name, keys)
        name = _unique(_name_of(value, paths, produced), names)
        shape = tuple(value.tensor.dims)
        if in_first:
            shape = shape[::-1]
        elif kind in RECURRENT.values() and not reason:
            shape = (math.prod(shape[:-1]), shape[-1])
        bias = None if reason else _bias_of(paths, shape[0], operands, produced)
        bias = bias if bias is None or names_of_values[bias.name] == 1 else None
        found.append(Weight(Layer(name, key, kind, shape, groups, reason), value, paths, in_first, bias))
    return tuple(sorted(found, key=lambda weight: weight.paths[0].use.turn if weight.paths else math.inf))


def produced_by(scopes: Scopes) -> dict[int, list[Value]]:
    """What each node computes, by the node's identity."""
    produced: dict[int, list[Value]] = {}
    for value in scopes.values:
        if value.node is not None:
            produced.setdefault(id(value.node), []).append(value)
    return produced


def keyed(scopes: Scopes, weights: tuple[Weight, ...]) -> Iterator[tuple[str, Value]]:
    """Every constant under its key: for weights the one that their layer names, for others their name."""
    known = {id(weight.value): weight.layer.weight for weight in weights}
    taken = dict.fromkeys(known.values(), 1)
    for value in scopes.values:
        if value.tensor is not None and value.tensor.data_type in DTYPES:
            yield known.get(id(value)) or _unique(value.name, taken), value


def paths_of(value: Value, produced: dict[int, list[Value]], through: tuple[NodeProto, ...] = ()) -> Iterator[Path]:
    """The operators that use `value` as it is or rearranged, in the order of execution."""
    for use in value.uses:
        passes = use.op in _PASSING and (use.slot == 0 or use.op == "Concat")
        if use.node is None or not passes:
            yield Path(use, through)
        else:
            for output in produced.get(id(use.node), []):
                yield from paths_of(output, produced, (*through, use.node))


@dataclass(frozen=True)
class _Role:
    """What a weight is to one operator."""

    kind: str
    groups: int = 1
    in_first: bool = False
    reason: str = ""


def _role(path: Path, value: Value, operands: dict[tuple[int, int], Value]) -> _Role:
    assert value.tensor is not None
    node, op, slot = path.use.node, path.use.op, path.use.slot
    ops = {each.op_type for each in path.through}
    dims = len(value.tensor.dims)
    if _QUANTIZED.search(op):
        return _Role("quantized", reason=f"quantized: {op} reads it")
    if node is None:
        return _Role("parameter", reason="parameter: the graph returns it")
    if not DTYPES[value.tensor.data_type].is_floating_point:
        return _Role("parameter", reason="parameter: no real numbers")
    if op == "Gather" and slot == 0:
        return _Role("embedding", reason="embedding: rows are looked up, not multiplied")
    if op in ("Conv", "ConvTranspose") and slot == 1:
        return _conv(path, value, ops)
    if op in RECURRENT and slot in (1, 2):
        return _recurrent(path, value, ops)
    if (op == "Gemm" and slot == 1) or (op == "MatMul" and slot in (0, 1)):
        if ops - {"Identity", "Cast", "Transpose"} or dims != 2:
            what = "rearranged before it is used" if ops else "a stack of matrices"
            return _Role("linear", reason=f"{what}: not factorized in a graph")
        other = operands.get((id(node), 1 - slot))
        if other is not None and other.tensor is not None:
            return _Role("linear", reason="multiplied by another constant")
        return _Role("linear", in_first=path.wants_in_first)
    return _Role("parameter", reason=f"parameter: not a linear or convolution weight ({op} reads it)")


def _conv(path: Path, value: Value, ops: set[str]) -> _Role:
    assert value.tensor is not None
    shape = tuple(value.tensor.dims)
    is_transposed = path.use.op == "ConvTranspose"
    kind = f"conv{'_transpose' if is_transposed else ''}{len(shape) - 2}d"
    groups = int(attribute(path.use.node, "group", 1))
    if ops - {"Identity", "Cast"} or not 3 <= len(shape) <= 5:
        return _Role(kind, groups, reason="rearranged before it is used: not factorized in a graph")
    if shape[0] % groups:
        return _Role(kind, reason=f"{shape[0]} channels do not divide into {groups} groups")
    if groups > 1 and (shape[0] // groups if is_transposed else shape[1]) == 1:
        return _Role(kind, groups, reason="depthwise: one input channel a group, nothing to factorize")
    return _Role(kind, groups)


def _recurrent(path: Path, value: Value, ops: set[str]) -> _Role:
    assert value.tensor is not None
    kind = RECURRENT[path.use.op]
    hidden = int(attribute(path.use.node, "hidden_size", 0))
    rows = math.prod(value.tensor.dims[:-1])
    if ops - {"Identity", "Cast", *_REARRANGING} or not hidden or rows % hidden:
        return _Role(kind, reason="rearranged before it is used: not factorized in a graph")
    return _Role(kind, rows // hidden)


def _together(roles: list[_Role], paths: tuple[Path, ...]) -> tuple[str, int, bool, str]:
    """(kind, groups, in first, reason to stay dense) of a weight that has these roles, one for each use."""
    if not roles:
        return "parameter", 1, False, "parameter: no operator reads it"
    first = roles[0]
    # Two uses of a matrix may want it in either orientation: both are made from the same factors.
    if all(replace(role, in_first=first.in_first) == first for role in roles):
        return first.kind, first.groups, first.in_first and not first.reason, first.reason
    main = next((role for role in roles if not role.reason), first)
    others = sorted({path.use.op for path, role in zip(paths, roles, strict=True) if role != main})
    return main.kind, 1, False, f"shared with {' and '.join(others)}, which cannot use factors"


def _bias_of(
    paths: tuple[Path, ...],
    outputs: int,
    operands: dict[tuple[int, int], Value],
    produced: dict[int, list[Value]],
) -> Value | None:
    """See `Weight.bias`; for a weight that is used as `paths`, with so many outputs."""
    node = paths[0].use.node if len(paths) == 1 else None
    if node is None:
        return None
    found = operands.get((id(node), 2)) if node.op_type in ("Conv", "Gemm") else None
    if node.op_type == "Gemm" and any(each.name in ("alpha", "beta") and each.f != 1 for each in node.attribute):
        return None
    if node.op_type == "MatMul" and paths[0].use.slot == 1:
        uses = produced[id(node)][0].uses
        if len(uses) == 1 and uses[0].op == "Add":
            found = operands.get((id(uses[0].node), 1 - uses[0].slot))
    if found is None or found.tensor is None or len(found.uses) != 1 or found.graph is not paths[0].use.graph:
        return None
    dims, dtype = tuple(found.tensor.dims), DTYPES.get(found.tensor.data_type)
    if dtype is None or not dtype.is_floating_point or dims[-1:] != (outputs,) or math.prod(dims) != outputs:
        return None
    return found


def _is_matrix(value: Value, paths: tuple[Path, ...]) -> bool:
    """Whether a constant that nothing multiplies by is worth listing: not masks, offsets, states and biases."""
    assert value.tensor is not None
    if paths and all(path.use.op in RECURRENT for path in paths):
        return False
    floating = DTYPES[value.tensor.data_type].is_floating_point
    return floating and sum(size > 1 for size in value.tensor.dims) >= 2


def _name_of(value: Value, paths: tuple[Path, ...], produced: dict[int, list[Value]]) -> str:
    """The name that its author gave to a weight or to its bias, else the operator's, else whatever there is."""
    if not _ANONYMOUS.match(value.name):
        return value.name.removesuffix(".weight")
    node = paths[0].use.node if paths else None
    if node is None:
        return value.name
    part = {1: ".W", 2: ".R"}.get(paths[0].use.slot, "") if node.op_type in RECURRENT else ""
    added = [use.node for output in produced.get(id(node), []) for use in output.uses if use.op == "Add"]
    for bias in (*node.input[2:4], *(name for add in added if add is not None for name in add.input)):
        if (found := _BIAS.match(bias)) and not _ANONYMOUS.match(bias):
            return found[1] + part
    return (node.name or value.name) + part


def _unique(name: str, taken: dict[str, int]) -> str:
    """`name`, or with a number behind it where it was given before."""
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else _unique(f"{name}#{taken[name]}", taken)


def attribute(node: NodeProto | None, name: str, default: int) -> int:
    """An integer attribute of a node."""
    given = next((each for each in (node.attribute if node is not None else ()) if each.name == name), None)
    return default if given is None else int(given.i)


def matrices(weight: Tensor, groups: int) -> Tensor:
    """(groups, rows, columns) view of a weight in its layer's shape."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)
