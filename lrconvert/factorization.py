"""Factorizing and merging: functions from tensors and a plan to tensors. The only place that computes factors.

A layer "a" with `a.weight` and `a.bias` becomes `a.u.weight`, `a.v.weight` and `a.v.bias`: two layers, u applied
first. How their weights are stored is said in `lrconvert.layers.layout`. Of a module with several weights,
"a.weight_ih_l0" becomes `a.ih_l0.u.weight` and `a.ih_l0.v.weight`, and biases stay.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrconvert.errors import PlanError
from lrconvert.plan import LayerPlan, Plan, check_plan
from lrconvert.rewrite import CPU, Layout, Rewrite, moving
from lrconvert.spectrum import factors_of
from lrconvert.tensors import TensorRef, shapes_of


def factorize_weight(weight: Tensor, layer: LayerPlan) -> tuple[Tensor, Tensor]:
    """The factors (u, v) of one weight, shaped as the weights of the two layers that replace the dense one.

    Raises:
        WeightError: the weight is not finite, or the factors overflow its dtype.
    """
    assert layer.rank is not None
    layout = layer.layer.layout
    right, left = factors_of(layout.matrices(weight, layer.groups), layer.rank, layer.name, layer.error)
    u, v = layout.pair(left, right, layer.shape)
    return u.contiguous(), v.contiguous()


def merge_weight(u: Tensor, v: Tensor, layer: LayerPlan) -> Tensor:
    """The dense weight v·u of two factors, multiplied in float64, in the dtype of `u`."""
    layout = layer.layer.layout
    left, right = layout.factors(u.double(), v.double(), layer.groups)
    return layout.weight(left @ right, layer.shape).to(u.dtype).contiguous()


def factorizing(tensors: Mapping[str, TensorRef], plan: Plan, device: torch.device = CPU) -> list[Rewrite]:
    """The steps that factorize a state dict, one for each of its tensors, in its order.

    Raises:
        PlanError: the plan does not match the tensors.
    """
    check_plan(plan, shapes_of(tensors))
    weights = {layer.weight: layer for layer in plan.low_rank}
    biases = {layer.bias_key: layer for layer in plan.low_rank}
    steps = []
    for key, ref in tensors.items():
        if key in weights:
            steps.append(_factorizing(key, ref, weights[key], device))
        elif key in biases:
            steps.append(moving(key, ref, biases[key].key("v", "bias")))
        else:
            steps.append(moving(key, ref, key))
    return steps


def merging(tensors: Mapping[str, TensorRef], plan: Plan, device: torch.device = CPU) -> list[Rewrite]:
    """The steps that multiply the factors of a state dict out again, the inverse of `factorizing`.

    Raises:
        PlanError: a factor is missing or has another shape than the plan says.
    """
    first = {layer.key("u"): layer for layer in plan.low_rank}
    second = {layer.key("v") for layer in plan.low_rank}
    biases = {layer.key("v", "bias"): layer for layer in plan.low_rank}
    for layer in plan.low_rank:
        for key, shape in _factor_shapes(layer).items():
            if key not in tensors or tensors[key].shape != shape:
                found = tensors[key].shape if key in tensors else "nothing"
                raise PlanError(f"{key}: the plan expects shape {shape}, the checkpoint has {found}")
    steps = []
    for key, ref in tensors.items():
        if key in first:
            steps.append(_merging(key, ref, tensors[first[key].key("v")], first[key], device))
        elif key in biases:
            steps.append(moving(key, ref, biases[key].bias_key))
        elif key not in second:
            steps.append(moving(key, ref, key))
    return steps


def _factorizing(source: str, ref: TensorRef, layer: LayerPlan, device: torch.device) -> Rewrite:
    outputs: Layout = {key: (shape, ref.dtype) for key, shape in _factor_shapes(layer).items()}

    def make() -> dict[str, Tensor]:
        factors = factorize_weight(ref.read().to(device), layer)
        return {key: factor.cpu() for key, factor in zip(outputs, factors, strict=True)}

    return Rewrite(source, outputs, ref.numel, make)


def _factor_shapes(layer: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Key to shape of the two factors of a layer, u first."""
    assert layer.rank is not None
    u, v = layer.layer.layout.factor_shapes(layer.shape, layer.groups, layer.rank)
    return {layer.key("u"): u, layer.key("v"): v}


def _merging(source: str, u: TensorRef, v: TensorRef, layer: LayerPlan, device: torch.device) -> Rewrite:
    def make() -> dict[str, Tensor]:
        return {layer.weight: merge_weight(u.read().to(device), v.read().to(device), layer).cpu()}

    return Rewrite(source, {layer.weight: (layer.shape, u.dtype)}, layer.layer.num_params, make)
