"""One way to store each layer, chosen for all layers at once: least error within a cost, or least cost within an error.

One Lagrange multiplier over all layers, as in LC (Idelbayev & Carreira-Perpiñán, CVPR 2020): whatever an error is
worth in cost, the best option of a layer is a corner of the lower convex hull of its (cost, error) points. So all
layers start at their cheapest option, and the edges of all hulls are climbed in the order of error saved per cost.
Where that stops, at an edge that no longer fits, the error is above the linear program's by less than what this one
edge saves. What is left of the budget then goes to options off the hulls. Few layers with few options may still end
far below the budget: then all their combinations are looked through.

Plain numbers: costs are in any unit that adds over layers, and so are errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lrconvert.errors import TargetError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# The entry of `Options.ranks` that stands for a layer that is not factorized.
DENSE = 0

# Steps in which total costs are told apart where all combinations are looked through.
_CELLS = 1 << 14


@dataclass(frozen=True)
class Options:
    """The ways to store one layer, one or more, in any order.

    Attributes:
        ranks: rank of each (n,), or `DENSE`.
        costs: cost of each (n,).
        errors: squared error of each (n,).
    """

    ranks: IntArray
    costs: FloatArray
    errors: FloatArray


@dataclass(frozen=True)
class Allocation:
    """One option for each layer.

    Attributes:
        ranks: of each layer; None for dense.
        cost, error: of all layers together.
    """

    ranks: tuple[int | None, ...]
    cost: float
    error: float


def allocate(
    layers: Sequence[Options],
    budget: float,
    turns: Sequence[FloatArray] | None = None,
    at_least: float = -np.inf,
) -> Allocation:
    """The options of least total error whose total cost is at most `budget`.

    Args:
        layers: one entry a layer.
        budget: in the unit of the costs.
        turns: for each layer, when the turn of each of its options comes (n,), the lowest first. Options are then taken
            in that order as far as the budget goes, and errors only tell which options are worth having at all. None:
            in the order of error saved per cost.
        at_least: the total cost is not to end below; without turns, where that is the only way.

    Raises:
        TargetError: the cheapest options cost more than `budget`, or no combination costs from `at_least` to `budget`.
    """
    ladders = [_ladder(options, None if turns is None else turns[i]) for i, options in enumerate(layers)]
    at = np.zeros(len(ladders), dtype=np.int64)
    steps = _steps(ladders)
    spare = budget - _cost(ladders, at)
    if spare < 0:
        raise TargetError(f"a total of {budget:g}", budget - spare)
    taken = int(np.searchsorted(np.cumsum(steps.cost), spare, side="right"))
    np.maximum.at(at, steps.layer[:taken], steps.option[:taken])
    if turns is None:
        _fill(ladders, at, budget)
    else:
        _one_more_step(ladders, at, budget, steps.layer[taken:])
    if _cost(ladders, at) < at_least:
        at = _near(ladders, budget, at_least, _cost(ladders, at))
    return Allocation(
        tuple(int(ladder.ranks[i]) or None for ladder, i in zip(ladders, at, strict=True)),
        _cost(ladders, at),
        sum(float(ladder.errors[i]) for ladder, i in zip(ladders, at, strict=True)),
    )


def least_cost(layers: Sequence[Options], max_error: float, turns: Sequence[FloatArray] | None = None) -> Allocation:
    """The options of least total cost whose total error is at most `max_error`.

    Args:
        layers: one entry a layer.
        max_error: squared, in the unit of the errors.
        turns: see `allocate`; the options are then left again in the opposite order, from the most accurate ones down.

    Raises:
        TargetError: the most accurate options have more error than `max_error`.
    """
    # The same problem with the two quantities in each other's place.
    mirrored = [replace(options, costs=options.errors, errors=options.costs) for options in layers]
    found = allocate(mirrored, max_error, None if turns is None else [-turn for turn in turns])
    return Allocation(found.ranks, cost=found.error, error=found.cost)


def turns_by_worth(costs: FloatArray, errors: FloatArray) -> FloatArray:
    """`turns` of the options of one layer (n,), in the order of error saved per cost, for costs of another unit.

    The cheapest come first of all, and one off the hull together with the corner that the climb reaches next.
    """
    kept = _worth_having(costs, errors)
    corners = kept[_hull(costs[kept], errors[kept])]
    slopes = np.diff(errors[corners]) / np.diff(costs[corners])
    found: FloatArray = np.append(-np.inf, np.append(slopes, 0.0))[np.searchsorted(costs[corners], costs)]
    return found


@dataclass(frozen=True)
class _Ladder:
    """The options of one layer that are worth having: costs ascend, errors descend.

    Attributes:
        rungs: positions of the options that the climb goes over, from the first to the last.
        turns: when each rung but the first is climbed, ascending.
        ties: who goes first of those whose turn comes at once, ascending.
    """

    ranks: IntArray
    costs: FloatArray
    errors: FloatArray
    rungs: IntArray
    turns: FloatArray
    ties: FloatArray


@dataclass(frozen=True)
class _Steps:
    """The steps of all ladders, in the order they are climbed: which layer, to which option, at which extra cost."""

    layer: IntArray
    option: IntArray
    cost: FloatArray


def _ladder(options: Options, turns: FloatArray | None) -> _Ladder:
    kept = _worth_having(options.costs, options.errors)
    costs, errors = options.costs[kept], options.errors[kept]
    worth = turns_by_worth(costs, errors)
    rungs = _hull(costs, errors) if turns is None else np.arange(len(kept))
    when = worth[rungs] if turns is None else turns[kept]
    return _Ladder(options.ranks[kept], costs, errors, rungs, np.maximum.accumulate(when[1:]), worth[rungs][1:])


def _worth_having(costs: FloatArray, errors: FloatArray) -> IntArray:
    """Positions of the options that none beats in both, by ascending cost and so by descending error."""
    order = np.lexsort((errors, costs))
    descending = errors[order]
    better = np.concatenate(([True], descending[1:] < np.minimum.accumulate(descending)[:-1]))
    kept: IntArray = order[better]
    return kept


def _hull(costs: FloatArray, errors: FloatArray) -> IntArray:
    """Positions of the points on the lower convex hull, for ascending costs (Andrew's monotone chain)."""
    # Plain floats: a numpy scalar takes ten times as long.
    xs, ys = costs.tolist(), errors.tolist()
    hull: list[int] = []
    for i in range(len(xs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xs[i] - xs[a]) <= (ys[i] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, dtype=np.int64)


def _steps(ladders: Sequence[_Ladder]) -> _Steps:
    layer = [np.full(len(ladder.turns), i) for i, ladder in enumerate(ladders)]
    option = [ladder.rungs[1:] for ladder in ladders]
    cost = [np.diff(ladder.costs[ladder.rungs]) for ladder in ladders]
    # Stable, and both ascend within a ladder: no layer takes its second step before its first.
    ties, turns = (
        np.concatenate([[], *parts])
        for parts in ([ladder.ties for ladder in ladders], [ladder.turns for ladder in ladders])
    )
    order = np.lexsort((ties, turns))
    none = np.empty(0, dtype=np.int64)
    return _Steps(
        np.concatenate([none, *layer])[order],
        np.concatenate([none, *option])[order],
        np.concatenate([[], *cost])[order],
    )


def _cost(ladders: Sequence[_Ladder], at: IntArray) -> float:
    return sum(float(ladder.costs[i]) for ladder, i in zip(ladders, at, strict=True))


def _fill(ladders: Sequence[_Ladder], at: IntArray, budget: float) -> None:
    """Move layers up from the options `at`, each as far as what is left of `budget` lets it, most error saved first."""
    while (spare := budget - _cost(ladders, at)) > 0:
        reach = [
            int(np.searchsorted(ladder.costs, ladder.costs[i] + spare, side="right")) - 1
            for ladder, i in zip(ladders, at, strict=True)
        ]
        saved = [ladder.errors[i] - ladder.errors[j] for ladder, i, j in zip(ladders, at, reach, strict=True)]
        best = int(np.argmax([0.0, *saved])) - 1
        if best < 0:
            return
        at[best] = reach[best]


def _one_more_step(ladders: Sequence[_Ladder], at: IntArray, budget: float, layers: IntArray) -> None:
    """Move every layer up from its option `at` by one, where what is left of `budget` allows, in the order `layers`."""
    for layer in dict.fromkeys(layers.tolist()):
        step = float(np.diff(ladders[layer].costs)[at[layer]])
        if _cost(ladders, at) + step <= budget:
            at[layer] += 1


def _near(ladders: Sequence[_Ladder], budget: float, at_least: float, below: float) -> IntArray:
    """The options of least error whose cost is from `at_least` to `budget`, given that a cost `below` is possible.

    A knapsack on a grid of costs: of all ways to one cell of it only the best goes on.

    Raises:
        TargetError: there are none; with the cost that comes closest to `budget`.
    """
    # Anything above would be further from the budget than `below`. Rounding to cells may add up to one for two layers.
    unit = (2 * budget - below) / _CELLS
    cells = _CELLS + len(ladders)
    errors, costs = np.full(cells, np.inf), np.zeros(cells)
    errors[0] = 0.0
    chosen = np.zeros((len(ladders), cells), dtype=np.int64)
    for layer, ladder in enumerate(ladders):
        before, paid = errors, costs
        errors, costs = np.full(cells, np.inf), np.zeros(cells)
        for i, (cost, error) in enumerate(zip(ladder.costs.tolist(), ladder.errors.tolist(), strict=True)):
            shift = round(cost / unit)
            if shift >= cells:
                break
            total = before[: cells - shift] + error
            better = np.flatnonzero(total < errors[shift:])
            errors[better + shift] = total[better]
            costs[better + shift] = paid[better] + cost
            chosen[layer, better + shift] = i
    fits = np.isfinite(errors) & (costs >= at_least) & (costs <= budget)
    if not fits.any():
        possible = np.append(costs[np.isfinite(errors)], below)
        raise TargetError(f"a total of {budget:g}", float(possible[np.argmin(np.abs(possible - budget))]))
    cell = int(np.argmin(np.where(fits, errors, np.inf)))
    at = np.zeros(len(ladders), dtype=np.int64)
    for layer in reversed(range(len(ladders))):
        at[layer] = chosen[layer, cell]
        cell -= round(float(ladders[layer].costs[at[layer]]) / unit)
    return at
