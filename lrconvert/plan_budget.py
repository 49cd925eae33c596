"""A plan that meets a budget: the ranks of all layers are chosen together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrconvert.allocation import DENSE, Allocation, FloatArray, Options, allocate, least_cost, turns_by_worth
from lrconvert.budget import ALLOCATORS, KINDS, Budget
from lrconvert.cost import Trace
from lrconvert.errors import TargetError, UsageError
from lrconvert.layers import Layer
from lrconvert.plan import (
    ALL_ZERO,
    GIVEN,
    LayerPlan,
    Order,
    Plan,
    PlanOptions,
    Target,
    allowed_ranks,
    given_rank,
    lowest_rank,
    reasons_to_stay_dense,
    would_not_shrink,
)
from lrconvert.ranks import Evidence

# How the reason begins of a layer that the budget's unit gives no reason to factorize.
WOULD_NOT_SAVE = "would not save"

# How far below a ratio a plan may end, relative to the ratio.
TOLERANCE = 0.01
# What a ratio may be off by because it was computed in binary.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Prices:
    """What a network and its layers cost, in one unit.

    Attributes:
        whole: the dense network, with all that no layer here accounts for.
        dense: each layer, dense.
        low_rank: each layer at every rank (full_rank + 1,), from 0 up.
        spend_by: prices in another unit: a budget in this one then goes first where most error is saved for those.
    """

    whole: float
    dense: Mapping[str, float]
    low_rank: Mapping[str, FloatArray]
    spend_by: "Prices | None" = None


def param_prices(layers: Sequence[Layer], num_params: int) -> Prices:
    """Parameters of `layers`, in a network that has `num_params`."""
    return Prices(
        num_params,
        {layer.name: layer.num_params for layer in layers},
        {layer.name: layer.num_low_rank_params(np.arange(layer.full_rank + 1.0)) for layer in layers},
    )


def mac_prices(layers: Sequence[Layer], trace: Trace) -> Prices:
    """MACs of `layers`, in the network that `trace` is of."""
    dense, low_rank = {}, {}
    for layer in layers:
        positions = trace.positions.get(layer.owner, 0)
        dense[layer.name] = float(layer.macs(positions))
        ranks = np.arange(layer.full_rank + 1.0)
        macs = layer.low_rank_macs(positions, ranks, trace.halfway.get(layer.owner))
        # What cannot be counted cannot be saved.
        low_rank[layer.name] = np.full(len(ranks), np.inf) if macs is None else macs
    return Prices(trace.macs, dense, low_rank)


def plan_within(
    budget: Budget,
    layers: Sequence[Layer],
    evidence: Mapping[str, Evidence],
    prices: Prices,
    options: PlanOptions,
    order: Order = "file",
    curves: Mapping[str, FloatArray] | None = None,
) -> Plan:
    """The plan that meets `budget` at the least error, or the one within a largest error at the least cost.

    Args:
        budget: what to meet.
        layers: every weight of the network, in `order`.
        evidence: by layer name; needed for every layer that `reasons_to_stay_dense` does not name, as are `prices`.
        prices: in the unit of the budget; parameters for a largest error.
        options: what the user asked for.
        order: what the sequence of `layers` is.
        curves: squared error of layers at every rank (full_rank + 1,), from 0 up, in place of the allocator's own;
            those without one stay dense.

    Raises:
        PatternError: a pattern matches no layer.
        TargetError: no choice of ranks comes within 1 % of a ratio, or below a largest error.
    """
    allocator = ALLOCATORS[budget.allocator]
    reasons = reasons_to_stay_dense(layers, options)
    candidates = [layer for layer in layers if layer.name not in reasons]
    errors = _errors(budget, candidates, evidence, curves)
    reasons |= {layer.name: "calibration says nothing of it" for layer in candidates if layer.name not in errors}
    candidates = [layer for layer in candidates if layer.name in errors]
    free: list[Layer] = []
    choices: list[Options] = []
    for layer in candidates:
        choice = _options_or_reason(evidence[layer.name], errors[layer.name], budget, prices, options)
        if isinstance(choice, str):
            reasons[layer.name] = choice
        else:
            free.append(layer)
            choices.append(choice)
    turns = None
    if allocator.share is not None:
        pairs = zip(free, choices, strict=True)
        turns = [_turns(evidence[layer.name], choice, allocator.share) for layer, choice in pairs]
    elif prices.spend_by is not None:
        turns = [_turns_by(prices.spend_by, layer, choice) for layer, choice in zip(free, choices, strict=True)]
    if budget.kind == "max_error":
        norm = sum(float(errors[layer.name][0]) for layer in candidates)
        allocation, reached = _within_error(budget, choices, turns, norm)
    else:
        fixed = prices.whole - sum(prices.dense[layer.name] for layer in free)
        allocation, reached = _within_cost(budget, choices, turns, fixed, prices.whole)
    for layer, rank in zip(free, allocation.ranks, strict=True):
        given = given_rank(layer, options) is not None
        reasons[layer.name] = GIVEN if given else budget.words if rank else f"dense at {budget.words}"
    ranks = {layer.name: rank for layer, rank in zip(free, allocation.ranks, strict=True)}
    decisions = []
    for layer in layers:
        rank = ranks.get(layer.name)
        error = None if rank is None else evidence[layer.name].spectrum.error(rank)
        decisions.append(LayerPlan.of(layer, rank, reasons[layer.name], error))
    target = Target(kind=budget.kind, asked=budget.target, reached=reached)
    return Plan(order=order, rule=str(budget), target=target, layers=tuple(decisions))


def _errors(
    budget: Budget, layers: Sequence[Layer], evidence: Mapping[str, Evidence], curves: Mapping[str, FloatArray] | None
) -> Mapping[str, FloatArray]:
    """Squared error of each layer at every rank, as the allocator of `budget` sees it."""
    curve = ALLOCATORS[budget.allocator].curve
    if curves is not None:
        return curves
    if curve is None:
        raise UsageError(f"--allocator {budget.allocator} needs examples: --calibrate DATA")
    return {layer.name: curve(evidence[layer.name]) for layer in layers}


def _options_or_reason(
    evidence: Evidence, curve: FloatArray, budget: Budget, prices: Prices, options: PlanOptions
) -> Options | str:
    """What a candidate may become: its ranks that are cheaper than dense, and dense; or why it stays dense anyway."""
    layer = evidence.layer
    if evidence.spectrum.is_zero:
        return ALL_ZERO
    ranks = np.array(allowed_ranks(layer, options), dtype=np.int64)
    if not len(ranks):
        return would_not_shrink(layer, lowest_rank(layer, options))
    costs, dense = prices.low_rank[layer.name], prices.dense[layer.name]
    if given_rank(layer, options) is not None:
        return Options(ranks, costs[ranks], curve[ranks])
    ranks = ranks[costs[ranks] < dense]
    if not len(ranks):
        return f"{WOULD_NOT_SAVE} {KINDS[budget.kind].unit}"
    return Options(np.append(ranks, DENSE), np.append(costs[ranks], dense), np.append(curve[ranks], 0.0))


def _turns(evidence: Evidence, choice: Options, share: Callable[[Evidence], float]) -> FloatArray:
    """The common factor at which `share` of it comes to the rank of each option; dense follows the break-even rank."""
    ranks = np.where(choice.ranks == DENSE, evidence.layer.break_even_rank + 1, choice.ranks)
    turns: FloatArray = ranks / share(evidence)
    return turns


def _turns_by(prices: Prices, layer: Layer, choice: Options) -> FloatArray:
    """When the turn of each option comes, where what counts is the error saved for these prices."""
    low_rank, dense = prices.low_rank[layer.name][choice.ranks], prices.dense[layer.name]
    return turns_by_worth(np.where(choice.ranks == DENSE, dense, low_rank), choice.errors)


def _within_error(
    budget: Budget, choices: Sequence[Options], turns: Sequence[FloatArray] | None, norm: float
) -> tuple[Allocation, float]:
    """(allocation, error reached) for a budget of errors, of layers whose squared norms add up to `norm`."""
    try:
        allocation = least_cost(choices, budget.target**2 * norm, turns)
    except TargetError as error:
        closest = (error.closest / norm) ** 0.5
        raise TargetError(
            f"{budget.option} {budget.target:g}", closest, "ask for that, or for higher ranks in --layer-rank"
        ) from None
    return allocation, (allocation.error / norm) ** 0.5 if norm else 0.0


def _within_cost(
    budget: Budget, choices: Sequence[Options], turns: Sequence[FloatArray] | None, fixed: float, whole: float
) -> tuple[Allocation, float]:
    """(allocation, ratio reached) for a budget of costs, of which `fixed` is beyond choice."""
    limit = budget.target * whole * (1 + _ROUNDING) - fixed
    try:
        allocation = allocate(choices, limit, turns, at_least=(1 - TOLERANCE) * budget.target * whole - fixed)
    except TargetError as error:
        if sum(float(choice.costs.min()) for choice in choices) > limit:
            fix = "allow more: --keep-first 0, --factorize-last, --include-embeddings, a lower --rank-floor"
        else:
            fix = "for finer steps of ranks (--rank-multiple 1)"
        closest = (fixed + error.closest) / whole
        fix = f"ask for that, or {fix}" if choices else fix
        raise TargetError(f"{budget.option} {budget.target:g}", closest, fix) from None
    return allocation, (fixed + allocation.cost) / whole
