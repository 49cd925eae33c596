"""Plans by measured time, for `make_plan`: `--for speed`, `--for both` and `--latency-ratio`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from lrconvert.bench import Bench
from lrconvert.budget import Budget
from lrconvert.errors import NothingToCompressError, UsageError
from lrconvert.inputs import shape_of
from lrconvert.latency import LatencyTable, ModelTiming, Timing
from lrconvert.layers import Layer
from lrconvert.loading import model_of
from lrconvert.network import Network
from lrconvert.plan import LayerPlan, Plan, given_rank
from lrconvert.plan_budget import TOLERANCE, WOULD_NOT_SAVE, Prices
from lrconvert.planning import Candidates
from lrconvert.speed import Goal, reason_too_slow, slowest_allowed, surely_faster, timed, without_slower

# How often a plan for a latency is made anew from what the one before it took in truth.
CORRECTIONS = 2

# A plan from prices in milliseconds, or in the unit of the budget with some ranks out of reach, or, for None, as asked.
Decide = Callable[[Prices | None], Plan]


def timing_for(network: Network, batch_size: int, device: torch.device, channels_last: bool) -> Timing:
    """What `network` is timed with: a bench for models, onnxruntime on the CPU for graphs.

    Raises:
        UsageError: the network cannot be run, as nobody said what with.
    """
    graph = network.checkpoint.graph if network.checkpoint else None
    if graph is None:
        return ModelTiming(model_of(network), bench_for(network, batch_size, device, channels_last))
    _check_batch(batch_size)
    if channels_last:
        raise UsageError(f"{network.name} is a graph, whose layout is its own: leave --channels-last out")
    if network.trace is None:
        raise UsageError(f"{network.name} cannot be timed layer by layer, --for size does without: {network.notes[-1]}")
    from lrconvert.onnx_graph.latency import GraphTiming

    return GraphTiming(graph, batch_size, shape_of(network.inputs))


def _check_batch(batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"--batch-size must be 1 or more, not {batch_size}")


def bench_for(network: Network, batch_size: int, device: torch.device, channels_last: bool) -> Bench:
    """What the latency of `network` is measured on.

    Raises:
        UsageError: the network cannot be run, as nobody said what with.
    """
    if network.module is None or network.inputs is None:
        missing = "--model" if network.module is None else "--input-shape"
        raise UsageError(f"{network.name} has to be run to be timed: name its {missing}, or use --for size")
    if network.trace is None:
        raise UsageError(f"{network.name} cannot be timed layer by layer, --for size does without: {network.notes[-1]}")
    _check_batch(batch_size)
    return Bench(network.inputs, batch_size, device, channels_last)


def plan_by_time(candidates: Candidates, decide: Decide, goal: Goal, timing: Timing) -> Plan:
    """The plan of `decide` without layers that get slower, and with its latency.

    Args:
        candidates: what may be factorized, and by which rule or budget.
        decide: what makes a plan of them, by prices.
        goal: "speed" spends a budget by time, whatever its unit, and refuses a model that does not get faster; "both"
            and "size" report.
        timing: what to measure with.

    Raises:
        NothingToCompressError: for speed, no plan is faster; or a latency cannot be reached (TargetError).
    """
    table = timing.table(candidates.shrinkable)
    budget = candidates.options.rule
    if not isinstance(budget, Budget):
        plan = without_slower(decide(None), table, goal)
        if goal == "speed":
            return surely_faster(plan, timing, table)
        return timed(plan, timing, table) if plan.low_rank else plan
    if budget.kind == "latency_ratio":
        goal = "both" if goal == "size" else goal  # what is slower cannot be for size here
        plan = _within_latency(budget, candidates, decide, goal, timing, table)
    else:
        prices = candidates.prices(budget)
        if goal == "speed":
            times = latency_prices(candidates.layers, table)
            prices = times if budget.kind == "max_error" else replace(prices, spend_by=times)
        plan = decide(fast_prices(prices, candidates, table, goal))
        plan = timed(plan, timing, table) if plan.low_rank else plan
    if goal == "speed" and plan.latency is not None and plan.latency.ratio >= 1:
        raise NothingToCompressError(
            f"{budget.option} {budget.target:g} makes this model no faster on {timing}: {plan.latency.dense_ms:.4g} ms "
            f"dense, {plan.latency.measured_ms:.4g} ms low rank; ask for --for size to have it all the same"
        )
    return explained(plan, table, goal)


def _within_latency(
    budget: Budget,
    candidates: Candidates,
    decide: Decide,
    goal: Goal,
    timing: Timing,
    table: LatencyTable,
) -> Plan:
    """The plan whose measured latency is nearest to the budget's, of some that are each made from the one before."""
    tried: list[tuple[float, Plan]] = []
    for _ in range(CORRECTIONS + 1):
        plan = decide(fast_prices(latency_prices(candidates.layers, table), candidates, table, goal))
        if not plan.low_rank:
            return plan
        plan = timed(plan, timing, table)
        assert plan.latency is not None
        tried.append((abs(plan.latency.ratio / budget.target - 1), plan))
        if tried[-1][0] <= TOLERANCE:
            break
        table = table.corrected(plan, plan.latency.ratio)
    return min(tried, key=lambda each: each[0])[1]


def latency_prices(layers: Sequence[Layer], table: LatencyTable) -> Prices:
    """Milliseconds of `layers`, in the model that `table` is of; a layer that was not timed saves none at any rank."""
    dense = {layer.name: table.layer_ms(layer.name, None) for layer in layers}
    low_rank = {}
    for layer in layers:
        latency = table.layers.get(layer.name)
        alone = np.zeros(layer.full_rank + 1) if latency is None else latency.curve(layer.full_rank)
        low_rank[layer.name] = dense[layer.name] - table.scale * (dense[layer.name] - alone)
    return Prices(table.model_ms, dense, low_rank)


def fast_prices(prices: Prices, candidates: Candidates, table: LatencyTable, goal: Goal) -> Prices:
    """`prices`, with ranks out of reach at which a layer is too slow for `goal`, unless its rank is given by name."""
    if goal == "size":
        return prices
    low_rank = dict(prices.low_rank)
    for layer in candidates.layers:
        latency = table.layers.get(layer.name)
        if given_rank(layer, candidates.options) is None:
            fast = latency is not None and latency.curve(layer.full_rank) <= slowest_allowed(latency, goal)
            low_rank[layer.name] = np.where(fast, low_rank[layer.name], np.inf)
    return replace(prices, low_rank=low_rank)


def explained(plan: Plan, table: LatencyTable, goal: Goal) -> Plan:
    """`plan`, with the times of the layers that are too slow for `goal` at the lowest rank that was timed."""

    def decided(layer: LayerPlan) -> LayerPlan:
        latency = table.layers.get(layer.name)
        if layer.rank is not None or latency is None or not layer.reason.startswith(WOULD_NOT_SAVE):
            return layer
        slow = reason_too_slow(table, layer.name, latency.ranks[0], goal)
        return layer.model_copy(update={"reason": slow or layer.reason})

    return plan.model_copy(update={"layers": tuple(decided(layer) for layer in plan.layers)})
