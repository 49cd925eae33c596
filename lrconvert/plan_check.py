"""Whether a plan, which may come from a file or from anybody, can be carried out on the tensors of a network."""

from collections import Counter
from collections.abc import Mapping

from lrconvert.errors import PlanError
from lrconvert.layers import LAYOUTS
from lrconvert.plan import Plan
from lrconvert.response import Response
from lrconvert.views import can_be_spatial, can_norm, can_pivot


def check_plan(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PlanError unless every layer to factorize is in `shapes` (state-dict key to shape) with its shape."""
    for what in ("name", "weight"):
        twice = [text for text, number in Counter(getattr(layer, what) for layer in plan.layers).items() if number > 1]
        if twice:
            raise PlanError(f"the plan has two entries with the {what} '{twice[0]}'")
    for layer in plan.low_rank:
        if layer.weight not in (layer.name, f"{layer.name}.weight" if layer.name else "weight"):
            raise PlanError(
                f"the plan's entry '{layer.name}' names the weight '{layer.weight}', which is another layer's"
            )
        found = shapes.get(layer.weight)
        if found is None:
            raise PlanError(f"the plan factorizes {layer.name}, but the checkpoint has no '{layer.weight}'")
        if tuple(found) != layer.shape:
            raise PlanError(f"{layer.weight}: the plan says {layer.shape}, the checkpoint {tuple(found)}")
        layout = LAYOUTS.get(layer.kind)
        if layer.view == "spatial" and not (len(layer.shape) == 4 and can_be_spatial(layer.layer)):
            raise PlanError(f"{layer.name}: the spatial view is one of a conv2d in one group, with a kernel above 1×1")
        if layout is None:
            raise PlanError(f"{layer.name}: kind '{layer.kind}' cannot be factorized; known: {', '.join(LAYOUTS)}")
        if len(layer.shape) != layout.dims or (layer.groups > 1 and not layout.grouped):
            raise PlanError(
                f"{layer.name}: a weight of shape {layer.shape} in {layer.groups} group(s) is no {layer.kind}"
            )
        if layer.norm and not can_norm(layer.layer):
            raise PlanError(f"{layer.name}: no BatchNorm fits between the factors of this {layer.kind}; drop its norm")
        if layer.pivoted and not can_pivot(layer.layer):
            raise PlanError(f"{layer.name}: the factors of this {layer.kind} cannot be pivoted; drop its pivoted")
        if layout.stacked(layer.shape) % layer.groups:
            raise PlanError(f"{layer.name}: {layer.shape} does not divide into {layer.groups} groups")
        if layer.rank is None or layer.rank > layer.layer.full_rank:
            raise PlanError(f"{layer.name}: rank {layer.rank} is not from 1 to full rank {layer.layer.full_rank}")


def responses_of(plan: Plan, responses: Mapping[str, Response] | None) -> dict[str, Response]:
    """By layer name, those of `responses` that the data-aware layers of `plan` are factorized with.

    Raises:
        PlanError: one is not there.
    """
    known = responses or {}
    aware = [layer.name for layer in plan.low_rank if layer.data_aware]
    unknown = next((name for name in aware if name not in known), None)
    if unknown is not None:
        raise PlanError(f"the plan was made with calibration data, and {unknown} needs it again: give --calibrate")
    return {name: known[name] for name in aware}
