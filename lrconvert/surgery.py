"""Changing live modules to fit a plan. Structure only: every number comes from `factorization`.

To factorize a module is to reshape it and load what `factorization` made of its state dict.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from lrconvert import factorization, rewrite
from lrconvert.errors import PlanError
from lrconvert.layers import Factored, family_of, low_rank_modules
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.response import Response
from lrconvert.tensors import load_into, refs_of
from lrconvert.views import can_split


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError when a layer of the plan is missing in `model`, is another one, or must stay dense there."""
    known = {layer.name: layer for layer in layers_of_module(model)}
    for decision in plan.low_rank:
        layer = known.get(decision.name)
        if layer is None:
            raise PlanError(f"the plan factorizes {decision.name}, which the model does not have")
        if layer.dense_reason and not layer.guess:
            raise PlanError(
                f"{decision.name} cannot be low rank in this model ({layer.dense_reason}); "
                f"factorize again with --model, or with --exclude '{decision.name}'"
            )
        same_groups = layer.groups == decision.groups or can_split(layer, decision.groups)
        if (layer.kind, layer.shape) != (decision.kind, decision.shape) or not same_groups:
            raise PlanError(
                f"{decision.name}: the plan says {decision.kind} {decision.shape} in {decision.groups} group(s), "
                f"the model has {layer.kind} {layer.shape} in {layer.groups}; factorize again with --model"
            )


def reshape(model: nn.Module, plan: Plan) -> nn.Module:
    """Put uninitialised factors in the place of every layer that the plan factorizes.

    The layers are replaced inside `model`, which is returned; a model that is itself one layer cannot be changed
    from within, so its replacement is returned instead. Nothing is changed when an error is raised.

    Raises:
        PlanError: the plan does not fit the model.
    """
    check_fits(model, plan)
    wanted: dict[str, dict[str, Factored]] = {}
    for decision in plan.low_rank:
        assert decision.rank is not None
        factored = Factored(**{field.name: getattr(decision, field.name) for field in fields(Factored)})
        wanted.setdefault(decision.layer.owner, {})[decision.layer.parameter] = factored
    for owner, weights in wanted.items():
        dense = model.get_submodule(owner)
        family = family_of(dense)
        assert family is not None
        low_rank = family.low_rank(dense, weights)
        low_rank.train(dense.training)
        for order in (torch.channels_last, torch.channels_last_3d):
            if any(_is_laid_out(parameter, order) for parameter in dense.parameters()):
                low_rank.to(memory_format=order)
        for name, parameter in dense.named_parameters():
            for path in low_rank.counterparts(name):
                low_rank.get_parameter(path).requires_grad_(parameter.requires_grad)
        model = _replace(model, owner, low_rank)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(low_rank_modules(module)):
            # It would hand nested tensors to its layers, for the fused path that only dense layers have.
            module.use_nested_tensor = False
    return model


def _is_laid_out(tensor: Tensor, order: torch.memory_format) -> bool:
    """Whether `tensor` is in this order, and in no other at the same time, as the weight of a 1×1 kernel is."""
    dims = 4 if order == torch.channels_last else 5
    return tensor.dim() == dims and tensor.is_contiguous(memory_format=order) and not tensor.is_contiguous()


def factorize_module(
    model: nn.Module,
    plan: Plan,
    device: torch.device | None = None,
    progress: Callable[[], None] | None = None,
    responses: Mapping[str, Response] | None = None,
) -> nn.Module:
    """Factorize `model` in place and return it (see `reshape` for a model that is one layer).

    Args:
        model: the dense model.
        plan: what to do.
        device: where to compute; the CPU if None.
        progress: called after each step.
        responses: see `factorization.factorizing`.

    Raises:
        PlanError: the plan does not match the model.
        WeightError: a weight is not finite.
    """
    device = device or rewrite.CPU
    steps = factorization.factorizing(refs_of(model.state_dict()), plan, device, responses)
    tensors = dict(rewrite.run(steps, device, progress))
    model = reshape(model, plan)
    load_into(model, tensors)
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan that `model`'s `LowRank` modules follow, read back from the modules themselves."""
    layers = []
    for path, module in low_rank_modules(model):
        for parameter, factored in module.factored.items():
            weight = f"{path}.{parameter}" if path else parameter
            name = "" if weight == "weight" else weight.removesuffix(".weight")
            layers.append(LayerPlan(name=name, weight=weight, **asdict(factored)))
    return Plan(layers=tuple(layers))


def merge_module(model: nn.Module) -> nn.Module:
    """Replace every `LowRank` inside `model` by the dense layer it stands for, multiplied out; returns the model."""
    plan = plan_of(model)
    tensors = dict(rewrite.run(factorization.merging(refs_of(model.state_dict()), plan)))
    for path, low_rank in list(low_rank_modules(model)):
        dense = low_rank.dense()
        dense.train(low_rank.training)
        for name, parameter in dense.named_parameters():
            counterparts = [low_rank.get_parameter(path) for path in low_rank.counterparts(name)]
            parameter.requires_grad_(all(each.requires_grad for each in counterparts))
        model = _replace(model, path, dense)
    load_into(model, tensors)
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` at the path `name` in `model`; the empty path is the model itself."""
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
