"""What several verbs share."""

from collections.abc import Mapping

import torch

from lrconvert import __version__
from lrconvert.checkpoints import Header
from lrconvert.errors import UsageError
from lrconvert.inputs import shape_of
from lrconvert.layers import View
from lrconvert.network import Network
from lrconvert.plan import Plan, PlanOptions
from lrconvert.ranks import parse_rule
from lrconvert.report.record import LayerDecision

WRITTEN_BY = f"lrconvert {__version__}"


def resolve_device(name: str) -> torch.device:
    """The device behind "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        UsageError: torch does not know it, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{name}': this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def plan_options(
    rule: str = "auto",
    *,
    keep_first: int | None = None,
    keep_last: bool = True,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    floor: float = 0.0,
    rank_multiple: int = 1,
    layer_ranks: Mapping[str, int] | None = None,
    splits: Mapping[str, int] | None = None,
    include_embeddings: bool = False,
    extra_norm: bool = False,
    view: View = "channel",
) -> PlanOptions:
    """Plan options from a rule's text ("energy=0.9") and the settings of `PlanOptions`."""
    return PlanOptions(
        parse_rule(rule),
        keep_first,
        keep_last,
        tuple(include),
        tuple(exclude),
        floor,
        rank_multiple,
        tuple((layer_ranks or {}).items()),
        tuple((splits or {}).items()),
        include_embeddings,
        extra_norm,
        view,
    )


def header_for(network: Network, plan: Plan | None) -> Header:
    """The header of a file made from `network`; what an earlier header knew of the dense network is kept."""
    before = network.checkpoint.header if network.checkpoint else None
    architecture = network.architecture
    return Header(
        written_by=WRITTEN_BY,
        model=architecture.name if architecture else before.model if before else None,
        model_args=dict(architecture.args) if architecture else before.model_args if before else {},
        input_shape=shape_of(network.inputs) or (before.input_shape if before else None),
        parameters=(before.parameters if before else None) or network.num_params,
        macs=(before.macs if before else None) or (network.trace.macs if network.trace else None),
        plan=plan,
    )


def layer_decisions(plan: Plan, network: Network | None = None) -> tuple[LayerDecision, ...]:
    """One report row for every layer of `plan`, with MACs where `network` was traced as a dense network."""
    trace = network.trace if network is not None else None
    rows = []
    for decision in plan.layers:
        layer = decision.layer
        at, halfway = (trace.positions.get(layer.owner), trace.halfway.get(layer.owner)) if trace else (None, None)
        rows.append(
            LayerDecision(
                name=decision.name,
                kind=decision.kind,
                shape=decision.shape,
                groups=decision.groups,
                full_rank=layer.full_rank,
                rank=decision.rank,
                reason=decision.reason,
                error=decision.error,
                num_params_before=layer.num_params,
                num_params_after=decision.num_params_after,
                macs_before=None if at is None else layer.macs(at),
                macs_after=None if at is None else layer.macs(at, decision.rank, halfway),
                norm=decision.norm,
                view=decision.view,
            )
        )
    return tuple(rows)
