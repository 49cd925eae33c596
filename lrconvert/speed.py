"""Plans that make a model faster, by measured time: layers that get slower stay dense, and the whole has to gain."""

import math
from collections.abc import Mapping
from typing import Literal

from lrconvert.errors import NothingToCompressError
from lrconvert.latency import LatencyTable, LayerLatency, Timing
from lrconvert.plan import GIVEN, LayerPlan, Plan, PlanLatency

Goal = Literal["size", "speed", "both"]

# What a layer has to gain, as a share of its dense time. Medians of layers that are equally fast differ by some
# percent from run to run: without a margin, noise would factorize layers that lose accuracy and gain nothing.
LEAST_GAIN: Mapping[Goal, float] = {"speed": 0.05, "both": 0.0}


def slowest_allowed(layer: LayerLatency, goal: Goal) -> float:
    """Milliseconds that `layer` may take when it is low rank."""
    return math.inf if goal == "size" else (1 - LEAST_GAIN[goal]) * layer.dense_ms


def reason_too_slow(table: LatencyTable, name: str, rank: int, goal: Goal) -> str:
    """Why the layer `name` is not to have `rank`, by its measured time; empty when it may, and for size always."""
    if goal == "size":
        return ""
    layer = table.layers.get(name)
    if layer is None:
        return "not timed: never called in a forward pass"
    if layer.at(rank) <= slowest_allowed(layer, goal):
        return ""
    word = "slower" if layer.at(rank) > layer.dense_ms else "hardly faster"
    return f"{word}: {layer.dense_ms:.3g} ms dense, {layer.at(rank):.3g} ms at rank {rank}"


def without_slower(plan: Plan, table: LatencyTable, goal: Goal) -> Plan:
    """`plan`, with the layers dense that `reason_too_slow` names, but for ranks that were given by name."""

    def decided(layer: LayerPlan) -> LayerPlan:
        if layer.rank is None or layer.reason == GIVEN:
            return layer
        reason = reason_too_slow(table, layer.name, layer.rank, goal)
        return LayerPlan.of(layer.layer, None, reason) if reason else layer

    return plan.model_copy(update={"layers": tuple(decided(layer) for layer in plan.layers)})


def timed(plan: Plan, timing: Timing, table: LatencyTable) -> Plan:
    """`plan` with its latency: predicted, and measured with the network as it is and factorized, in turns.

    Args:
        plan: that factorizes some layer.
        timing: of the dense network.
        table: its times.
    """
    dense_ms, low_rank_ms = timing.in_turns(plan)
    latency = PlanLatency(
        dense_ms=dense_ms,
        predicted_ms=table.predicted_ms(plan) * dense_ms / table.model_ms,
        measured_ms=low_rank_ms,
        measured_on=str(timing),
    )
    return plan.model_copy(update={"latency": latency})


def surely_faster(plan: Plan, timing: Timing, table: LatencyTable) -> Plan:
    """The plan with its latency, less the layers that gain least, as many as it takes for the model to get faster.

    Layers whose ranks were given by name stay as they are.

    Args:
        plan, timing, table: as for `timed`.

    Raises:
        NothingToCompressError: no part of the plan makes the model faster; the message holds the measured times.
    """
    tried = []
    while plan.low_rank:
        plan = timed(plan, timing, table)
        assert plan.latency is not None
        if plan.latency.ratio < 1:
            return plan
        tried.append(f"{plan.latency.measured_ms:.4g} ms with {len(plan.low_rank)} layers low rank")
        if all(layer.reason == GIVEN for layer in plan.low_rank):
            break
        plan = _without_least_gains(plan, table)
    measured = "; ".join(tried) or "every layer is slower at its rank, or as slow"
    raise NothingToCompressError(
        f"factorizing makes this model no faster on {timing}: {table.model_ms:.4g} ms dense, {measured}; "
        "ask for --for size to have it smaller all the same, or for lower ranks"
    )


def _without_least_gains(plan: Plan, table: LatencyTable) -> Plan:
    """`plan` with the half of its layers dense that is predicted to gain least."""

    def gain(layer: LayerPlan) -> float:
        return table.layer_ms(layer.name, None) - table.layer_ms(layer.name, layer.rank)

    layers = [layer for layer in plan.low_rank if layer.reason != GIVEN]
    least = sorted(layers, key=gain)[: (len(layers) + 1) // 2]
    dropped = {
        layer.name: LayerPlan.of(layer.layer, None, f"gains too little: {gain(layer):.3g} ms") for layer in least
    }
    return plan.model_copy(
        update={"layers": tuple(dropped.get(layer.name, layer) for layer in plan.layers), "latency": None}
    )
