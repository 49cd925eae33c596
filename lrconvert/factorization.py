"""Factorizing and merging: functions from tensors and a plan to tensors. The only place that computes factors.

A layer "a" with `a.weight` and `a.bias` becomes `a.u.weight`, `a.v.weight` and `a.v.bias`. With rank r per group and
g groups, u is (g·r, in/g, *kernel) and v is (out, r, 1, …, 1): two layers of the same family, u applied first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrconvert.errors import PlanError
from lrconvert.plan import LayerPlan, Plan, check_plan
from lrconvert.rewrite import CPU, Rewrite, moving
from lrconvert.spectrum import factors_of
from lrconvert.tensors import TensorRef, shapes_of


def matrix_view(weight: Tensor, groups: int) -> Tensor:
    """(groups, out/groups, in/groups · kernel elements) view of a weight stored out first."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def factorize_weight(weight: Tensor, layer: LayerPlan) -> tuple[Tensor, Tensor]:
    """The factors (u, v) of one weight, shaped as the weights of the two layers that replace the dense one.

    Raises:
        WeightError: the weight is not finite, or the factors overflow its dtype.
    """
    assert layer.rank is not None
    u, v = factors_of(matrix_view(weight, layer.groups), layer.rank, layer.name, layer.error)
    ones = [1] * (weight.dim() - 2)
    return u.reshape(-1, *weight.shape[1:]), v.reshape(weight.shape[0], layer.rank, *ones)


def merge_weight(u: Tensor, v: Tensor, layer: LayerPlan) -> Tensor:
    """The dense weight v·u of two factors, multiplied in float64, in the dtype of `u`."""
    groups = layer.groups
    left = v.double().reshape(groups, v.shape[0] // groups, -1)
    right = u.double().reshape(groups, u.shape[0] // groups, -1)
    return (left @ right).reshape(layer.shape).to(u.dtype)


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
        assert layer.rank is not None
        ones = (1,) * (len(layer.shape) - 2)
        expected = {
            layer.key("u"): (layer.groups * layer.rank, *layer.shape[1:]),
            layer.key("v"): (layer.shape[0], layer.rank, *ones),
        }
        for key, shape in expected.items():
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
    assert layer.rank is not None
    keys = layer.key("u"), layer.key("v")
    ones = (1,) * (len(layer.shape) - 2)
    shapes = (layer.groups * layer.rank, *layer.shape[1:]), (layer.shape[0], layer.rank, *ones)

    def make() -> dict[str, Tensor]:
        factors = factorize_weight(ref.read().to(device), layer)
        return {key: factor.cpu() for key, factor in zip(keys, factors, strict=True)}

    outputs = {key: (shape, ref.dtype) for key, shape in zip(keys, shapes, strict=True)}
    return Rewrite(source, outputs, ref.numel, make)


def _merging(source: str, u: TensorRef, v: TensorRef, layer: LayerPlan, device: torch.device) -> Rewrite:
    def make() -> dict[str, Tensor]:
        return {layer.weight: merge_weight(u.read().to(device), v.read().to(device), layer).cpu()}

    return Rewrite(source, {layer.weight: (layer.shape, u.dtype)}, layer.layer.num_params, make)
