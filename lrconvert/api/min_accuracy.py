"""`--min-accuracy`: the fewest parameters at which a factorized network is still accurate enough, as measured."""

import math
from collections.abc import Callable
from dataclasses import replace

from lrconvert.budget import Budget
from lrconvert.errors import NothingToCompressError, TargetError
from lrconvert.plan import Plan, Target
from lrconvert.planning import Candidates

# Ratios of parameters are narrowed down to this, relative to the result, in at most so many evaluations.
_NEAR = 0.01
_MOST_EVALUATIONS = 9
# The mildest plan: the largest share of the parameters that is tried.
_MILDEST = 0.99
# Below what any network can reach: how far down it goes is then in the refusal.
_UNREACHABLE = 1e-9


def plan_by_accuracy(
    budget: Budget,
    candidates: Candidates,
    decide: Callable[[Candidates], Plan],
    accuracy: Callable[[Plan | None], float],
) -> Plan:
    """The plan with the fewest parameters whose measured accuracy is at least that of `budget`.

    Ratios of parameters are bisected, which takes accuracy to fall with them: between those that were tried it may not.

    Args:
        budget: a "min_accuracy".
        candidates: what may be factorized.
        decide: the plan of candidates whose options hold a budget of parameters.
        accuracy: measured, of the network factorized by a plan; of the dense one for None.

    Raises:
        TargetError: the dense network is less accurate, or any plan makes it so; the message says how accurate one is.
        NothingToCompressError: no layer may be factorized.
    """
    dense = accuracy(None)
    if dense < budget.target:
        raise _refusal(budget, dense, "that is the dense network")

    def at(ratio: float) -> Plan:
        within = replace(budget, kind="param_ratio", target=ratio)
        plan = decide(replace(candidates, options=replace(candidates.options, rule=within)))
        layers = (
            layer.model_copy(update={"reason": layer.reason.replace(within.words, budget.words)})
            for layer in plan.layers
        )
        return plan.model_copy(update={"rule": str(budget), "layers": tuple(layers)})

    low, high = _lowest(at), 1.0
    best: tuple[Plan, float] | None = None
    closest = 0.0
    for _ in range(_MOST_EVALUATIONS):
        if high <= low * (1 + _NEAR):
            break
        plan = _between(at, low, high)
        if plan is None:
            break
        found = accuracy(plan)
        ratio = _ratio(plan)
        closest = max(closest, found)
        if found >= budget.target:
            best, high = (plan, found), ratio
        else:
            low = ratio
    if best is None and (mildest := _between(at, low, 1.0, _MILDEST)) is not None:
        best = mildest, accuracy(mildest)
        closest = max(closest, best[1])
    if best is None or best[1] < budget.target:
        raise _refusal(budget, closest, "ask for that, or fine-tune what a budget gives (lrconvert finetune)")
    plan, reached = best
    return plan.model_copy(update={"target": Target(kind=budget.kind, asked=budget.target, reached=reached)})


def _lowest(at: Callable[[float], Plan]) -> float:
    """The smallest ratio that there is a plan for.

    Raises:
        NothingToCompressError: there is none but the dense network.
    """
    try:
        return _ratio(at(_UNREACHABLE))
    except TargetError as error:
        if error.closest >= 1:
            raise NothingToCompressError("no layer to factorize; allow more: --keep-first 0, --include LAYER") from None
        return error.closest


def _between(at: Callable[[float], Plan], low: float, high: float, wanted: float | None = None) -> Plan | None:
    """The plan at the ratio `wanted`, else at the geometric mean of two ratios; None where ranks leave none between."""
    try:
        plan = at(wanted or math.sqrt(low * high))
    except TargetError as error:
        # Few layers have few plans: the nearest will do.
        if not low < error.closest < high:
            return None
        plan = at(error.closest)
    return plan if low < _ratio(plan) < high else None


def _ratio(plan: Plan) -> float:
    """Parameters of the network factorized by `plan`, compressed / original."""
    assert plan.target is not None
    return plan.target.reached


def _refusal(budget: Budget, closest: float, fix: str) -> TargetError:
    return TargetError(f"{budget.option} {budget.target:g}", closest, fix, at_most=True)
