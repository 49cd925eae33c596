"""What a plan decided, as rows of a report."""

from lrconvert.cost import Trace
from lrconvert.plan import Plan
from lrconvert.report.record import LayerDecision


def macs_after(plan: Plan, trace: Trace | None) -> int | None:
    """MACs of the whole network factorized by `plan`, for one input; None where some cannot be counted."""
    if trace is None:
        return None
    rows = layer_decisions(plan, trace)
    if any(row.macs_before is not None and row.macs_after is None for row in rows):
        return None
    return trace.macs - sum((row.macs_before or 0) - (row.macs_after or 0) for row in rows)


def layer_decisions(plan: Plan, trace: Trace | None = None) -> tuple[LayerDecision, ...]:
    """One report row for every layer of `plan`, with MACs where `trace` is of the dense network."""
    rows = []
    for decision in plan.layers:
        layer = decision.layer
        before = after = None
        if trace is not None and (at := trace.positions.get(layer.owner)) is not None:
            before = after = layer.macs(at)
            if decision.rank is not None:
                after = layer.low_rank_macs(at, decision.rank, trace.halfway.get(layer.owner))
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
                macs_before=before,
                macs_after=after,
                norm=decision.norm,
                view=decision.view,
                pivoted=decision.pivoted,
                data_aware=decision.data_aware,
            )
        )
    return tuple(rows)
