"""Factorizing and merging: functions from tensors and a plan to tensors. The only place that computes factors.

A layer "a" with `a.weight` and `a.bias` becomes `a.u.weight`, `a.v.weight` and `a.v.bias`: two layers, u applied
first. How their weights are stored is said in `lrconvert.layers.layout`. Of a module with several weights,
"a.weight_ih_l0" becomes `a.ih_l0.u.weight` and `a.ih_l0.v.weight`, and biases stay. Where the plan says so, a fresh
BatchNorm `a.bn` stands between u and v; merging folds its running statistics, v·(s·u(x) + t) = (v·s·u)(x) + v·t.
Or u is pivoted: `a.u.weight` lacks the columns that `a.u.order` names first, see `lrconvert.layers.pivots`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrconvert.errors import PlanError, VerificationError, WeightError
from lrconvert.layers.norm import EPS, fresh_norm
from lrconvert.layers.pivots import check_order, pivot, with_pivots
from lrconvert.plan import LayerPlan, Plan
from lrconvert.plan_check import check_plan, responses_of
from lrconvert.response import Response
from lrconvert.rewrite import CPU, Layout, Rewrite, moving
from lrconvert.spectrum import factors_of, finite_energy
from lrconvert.tensors import TensorRef, shapes_of

# Random inputs that products are compared on, and the roundings by which they may differ in any case.
_PROBES = 8
_ROUNDINGS = 8


def factorize_weight(weight: Tensor, layer: LayerPlan) -> dict[str, Tensor]:
    """State-dict key to the tensors that take the place of one weight, but for a norm, on its device.

    Raises:
        WeightError: the weight is not finite, or the factors overflow its dtype.
    """
    assert layer.rank is not None
    matrices = layer.layer.layout.matrices(weight, layer.groups).to(_precision(layer, weight.dtype))
    right, left = factors_of(matrices, layer.rank, layer.name, layer.error)
    return _stored(left, right, layer, weight.dtype)


def _precision(layer: LayerPlan, dtype: torch.dtype) -> torch.dtype:
    """What the factors of `layer` are computed in: 16 bits would round twice those that are pivoted afterwards."""
    return torch.float32 if layer.pivoted and dtype != torch.float64 else dtype


def _norm(layer: LayerPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """State-dict key to the tensors of a fresh norm between the factors, if the plan wants one."""
    if not layer.norm:
        return {}
    assert layer.rank is not None
    state = fresh_norm(layer.groups * layer.rank, dtype)
    return {layer.key("bn", name): tensor for name, tensor in state.items()}


def _stored(left: Tensor, right: Tensor, layer: LayerPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """State-dict key to what is stored of two factors (groups, rows, rank) and (groups, rank, columns) in `dtype`."""
    order = {}
    if layer.pivoted:
        left, right, columns = pivot(left, right)
        order = {layer.key("u", "order"): columns}
    u, v = (factor.to(dtype).contiguous() for factor in layer.layer.layout.pair(left, right, layer.shape))
    if not all(bool(torch.isfinite(factor).all()) for factor in (u, v)):
        raise WeightError(f"{layer.name}: the factors overflow {dtype}; convert the checkpoint to float32 first")
    return {layer.key("u"): u, **order, layer.key("v"): v}


def merge_weight(
    u: Tensor, v: Tensor, layer: LayerPlan, order: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The dense weight v·diag(scale)·u of two factors, multiplied in float64, in the dtype of `u`.

    Args:
        u, v: the factors as they are stored.
        layer: how.
        order: of the columns of a `u` that is pivoted.
        scale: (groups·rank,), of a norm between them; None for ones.
    """
    left, right = _whole(u, v, layer, order)
    if scale is not None:
        right = right * scale.reshape(layer.groups, -1, 1)
    return layer.layer.layout.weight(left @ right, layer.shape).to(u.dtype).contiguous()


def _whole(u: Tensor, v: Tensor, layer: LayerPlan, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors (groups, rows, rank) and (groups, rank, columns) that are stored as `u` and `v`, in float64."""
    left, right = layer.layer.layout.factors(u.double(), v.double(), layer.groups)
    return left, right if order is None else with_pivots(right, order)


def _read(
    tensors: Mapping[str, TensorRef], layer: LayerPlan, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`u`, `v`, and the order of the columns of a `u` that is pivoted, which is checked."""
    u, v = (tensors[layer.key(factor)].read().to(device) for factor in ("u", "v"))
    if not layer.pivoted:
        return u, v, None
    key = layer.key("u", "order")
    order = tensors[key].read().to(device)
    check_order(key, order)
    return u, v, order


def merged_weight(tensors: Mapping[str, TensorRef], layer: LayerPlan, device: torch.device = CPU) -> Tensor:
    """The dense weight that the factors of `layer`, and the norm between them, stand for in a state dict."""
    u, v, order = _read(tensors, layer, device)
    return merge_weight(u, v, layer, order, _scale_and_shift(tensors, layer, device)[0] if layer.norm else None)


def factorizing(
    tensors: Mapping[str, TensorRef],
    plan: Plan,
    device: torch.device = CPU,
    responses: Mapping[str, Response] | None = None,
) -> list[Rewrite]:
    """The steps that factorize a state dict, in its order.

    Args:
        tensors: the state dict.
        plan: what to do.
        device: where to compute.
        responses: by layer name, for the layers that the plan wants data-aware.

    Raises:
        PlanError: the plan does not match the tensors, or needs a response that is not there.
    """
    check_plan(plan, shapes_of(tensors))
    fitting = responses_of(plan, responses)
    weights = {layer.weight: layer for layer in plan.low_rank}
    biases = {layer.bias_key: layer for layer in plan.low_rank}
    steps = []
    for key, ref in tensors.items():
        if key in weights and weights[key].data_aware:
            steps.append(_fitting(key, tensors, weights[key], fitting[weights[key].name]))
        elif key in weights:
            steps.append(_factorizing(key, ref, weights[key], device))
        elif key in biases and biases[key].data_aware:
            continue  # corrected together with its weight
        elif key in biases:
            steps.append(moving(key, ref, biases[key].key("v", "bias")))
        else:
            steps.append(moving(key, ref, key))
    return steps


def merging(tensors: Mapping[str, TensorRef], plan: Plan, device: torch.device = CPU) -> list[Rewrite]:
    """The steps that multiply the factors of a state dict out again, the inverse of `factorizing`.

    Raises:
        PlanError: a factor is missing or has another shape than the plan says; or, when the steps are run, a norm
            between two factors adds what their dense layer cannot.
    """
    first = {layer.key("u"): layer for layer in plan.low_rank}
    others: set[str] = set()
    biases = {layer.key("v", "bias"): layer for layer in plan.low_rank}
    for layer in plan.low_rank:
        others |= _checked_keys(layer, tensors) - first.keys()
    steps = []
    for key, ref in tensors.items():
        if key in first:
            steps.append(_merging(key, tensors, first[key], device))
        elif key in biases and biases[key].norm:
            steps.append(_merging_bias(key, tensors, biases[key], device))
        elif key in biases:
            steps.append(moving(key, ref, biases[key].bias_key))
        elif key not in others:
            steps.append(moving(key, ref, key))
    return steps


def changing_form(
    tensors: Mapping[str, TensorRef],
    layers: Sequence[tuple[LayerPlan, LayerPlan]],
    tolerance: float,
    device: torch.device = CPU,
) -> list[Rewrite]:
    """The steps from plain factors to pivoted ones of the same product, or back; each checks its product.

    Args:
        tensors: a state dict with factors.
        layers: before and after, of every layer that changes.
        tolerance: largest relative difference of the outputs for random inputs, where rounding does not cause more.
        device: where to compute.

    Raises:
        PlanError: a factor is missing or has another shape than the plan says.
        VerificationError: when the steps are run, the product is another one.
    """
    first = {before.key("u"): (before, after) for before, after in layers}
    others = {key for before, _ in layers for key in _checked_keys(before, tensors)} - first.keys()
    return [
        _changing_form(key, tensors, *first[key], tolerance, device) if key in first else moving(key, ref, key)
        for key, ref in tensors.items()
        if key not in others
    ]


def _checked_keys(layer: LayerPlan, tensors: Mapping[str, TensorRef]) -> set[str]:
    """The keys of what took the place of the layer's weight; PlanError unless `tensors` have all, with their shapes."""
    expected = replacements(layer)
    for key, (shape, _) in expected.items():
        if key not in tensors or tensors[key].shape != shape:
            found = tensors[key].shape if key in tensors else "nothing"
            raise PlanError(f"{key}: the plan expects shape {shape}, the checkpoint has {found}")
    return set(expected)


def replacements(layer: LayerPlan, dtype: torch.dtype = torch.float32) -> Layout:
    """Key to (shape, dtype) of what takes the place of a weight of `dtype`: u, what goes with it, v.

    What goes with it are the order of its columns if it is pivoted, and the state of a norm.
    """
    assert layer.rank is not None
    order = (layer.groups, layer.layer.matrix_shape[1])
    u, v = layer.layer.layout.factor_shapes(layer.shape, layer.groups, layer.rank)
    norm = fresh_norm(layer.groups * layer.rank, dtype, "meta") if layer.norm else {}
    between: Layout = {layer.key("u", "order"): (order, torch.int32)} if layer.pivoted else {}
    between |= {layer.key("bn", name): (tuple(tensor.shape), tensor.dtype) for name, tensor in norm.items()}
    return {layer.key("u"): (u, dtype), **between, layer.key("v"): (v, dtype)}


def _factorizing(source: str, ref: TensorRef, layer: LayerPlan, device: torch.device) -> Rewrite:
    def make() -> dict[str, Tensor]:
        made = factorize_weight(ref.read().to(device), layer)
        return {key: tensor.cpu() for key, tensor in made.items()} | _norm(layer, ref.dtype)

    return Rewrite(source, replacements(layer, ref.dtype), ref.numel, make)


def _fitting(source: str, tensors: Mapping[str, TensorRef], layer: LayerPlan, response: Response) -> Rewrite:
    """The step that makes the factors of least output error, and a bias that keeps the mean output as it was."""
    ref, bias = tensors[source], tensors.get(layer.bias_key)
    outputs = replacements(layer, ref.dtype)
    if bias is not None:
        outputs |= {layer.key("v", "bias"): (bias.shape, bias.dtype)}

    def make() -> dict[str, Tensor]:
        assert layer.rank is not None
        matrices = layer.layer.layout.matrices(ref.read(), layer.groups)
        right, left, shift = response.factors(matrices.to(_precision(layer, ref.dtype)), layer.rank)
        made = _stored(left, right, layer, ref.dtype) | _norm(layer, ref.dtype)
        if bias is not None:
            made[layer.key("v", "bias")] = (bias.read().double() + shift.flatten()).to(bias.dtype)
        return made

    return Rewrite(source, outputs, ref.numel, make)


def _merging(source: str, tensors: Mapping[str, TensorRef], layer: LayerPlan, device: torch.device) -> Rewrite:
    def make() -> dict[str, Tensor]:
        if layer.norm:
            _added_to_bias(tensors, layer, device)  # raises where there is no place for it
        return {layer.weight: merged_weight(tensors, layer, device).cpu()}

    return Rewrite(source, {layer.weight: (layer.shape, tensors[source].dtype)}, layer.layer.num_params, make)


def _changing_form(
    source: str,
    tensors: Mapping[str, TensorRef],
    before: LayerPlan,
    after: LayerPlan,
    tolerance: float,
    device: torch.device,
) -> Rewrite:
    dtype = tensors[source].dtype

    def make() -> dict[str, Tensor]:
        u, v, order = _read(tensors, before, device)
        left, right = _whole(u, v, before, order)
        for factor in (left, right):
            finite_energy(factor, before.name)
        seeded = torch.Generator().manual_seed(0)
        inputs = torch.randn(right.shape[2], _PROBES, dtype=right.dtype, generator=seeded).to(device)
        wanted = left @ (right @ inputs)
        if before.pivoted:  # balanced, as training wants them
            right, left = factors_of(left @ right, right.shape[1], before.name)
        made = _stored(left, right, after, dtype)
        left, right = _whole(made[after.key("u")], made[after.key("v")], after, made.get(after.key("u", "order")))
        difference = float((left @ (right @ inputs) - wanted).norm() / wanted.norm().clamp(min=torch.finfo(dtype).tiny))
        if not difference <= max(tolerance, _ROUNDINGS * torch.finfo(dtype).eps):
            raise VerificationError(
                f"{after.name}: its factors in the other form have another product, {difference:.1e} away"
            )
        return {key: tensor.cpu() for key, tensor in made.items()}

    return Rewrite(source, replacements(after, dtype), after.layer.num_params, make)


def _merging_bias(source: str, tensors: Mapping[str, TensorRef], layer: LayerPlan, device: torch.device) -> Rewrite:
    bias = tensors[source]

    def make() -> dict[str, Tensor]:
        total = bias.read().to(device).double() + _added_to_bias(tensors, layer, device)
        return {layer.bias_key: total.to(bias.dtype).cpu()}

    return Rewrite(source, {layer.bias_key: (bias.shape, bias.dtype)}, layer.layer.num_params, make)


def _added_to_bias(tensors: Mapping[str, TensorRef], layer: LayerPlan, device: torch.device) -> Tensor:
    """What the shift of the norm adds to the outputs, (out,) or a single zero, float64.

    Raises:
        PlanError: it is not zero, and the dense layer cannot add it.
    """
    shift = _scale_and_shift(tensors, layer, device)[1]
    if not shift.any():
        return shift.new_zeros(1)
    even = layer.layer.layout.pointwise_last
    if not even or layer.key("v", "bias") not in tensors:
        why = "a dense layer without a bias cannot add" if even else "a bias, the same everywhere, cannot stand for"
        raise PlanError(f"{layer.name}: {why} what the BatchNorm between its factors adds; it has to stay factorized")
    v = tensors[layer.key("v")].read().to(device).double()
    return (v.reshape(layer.groups, -1, v.shape[1]) @ shift.reshape(layer.groups, -1, 1)).flatten()


def _scale_and_shift(tensors: Mapping[str, TensorRef], layer: LayerPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the norm of `layer` does in eval mode, s·x + t: two float64 tensors (groups·rank,)."""
    weight, bias, mean, variance = (
        tensors[layer.key("bn", name)].read().to(device).double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / torch.sqrt(variance + EPS)
    return scale, bias - mean * scale
