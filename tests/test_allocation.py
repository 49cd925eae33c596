"""Allocations against every combination of options, the dual of the linear program, and closed forms."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.allocation import DENSE, Options, allocate, least_cost, turns_by_worth
from lrconvert.errors import NothingToCompressError, TargetError


def options(*points):
    """Options at ranks 1, 2, … from (cost, error) pairs."""
    costs, errors = np.array(points, dtype=np.float64).T
    return Options(np.arange(1, len(points) + 1), costs, errors)


def points_of(layer):
    return list(zip(layer.costs.tolist(), layer.errors.tolist(), strict=True))


def every_choice(layers):
    """(cost, error) of every combination of options."""
    for choice in itertools.product(*(points_of(layer) for layer in layers)):
        yield sum(cost for cost, _ in choice), sum(error for _, error in choice)


def best(layers, budget):
    """Least error within `budget`, by looking at every combination."""
    return min(error for cost, error in every_choice(layers) if cost <= budget)


def prices(layer):
    """Every price of error, in cost, at which the best option of `layer` may change."""
    pairs = itertools.permutations(points_of(layer), 2)
    return {(e - f) / (d - c) for (c, e), (d, f) in pairs if d > c and f < e}


def bound(layers, budget):
    """Least error of the linear program: the Lagrangian dual at its best multiplier."""
    multipliers = {0.0}.union(*(prices(layer) for layer in layers))
    return max(
        sum(min(e + price * c for c, e in points_of(layer)) for layer in layers) - price * budget
        for price in multipliers
    )


def largest_edge(layers):
    """The most error that one edge of a layer's lower hull saves."""
    largest = 0.0
    for layer in layers:
        points = points_of(layer)
        for price in prices(layer):
            values = [e + price * c for c, e in points]
            least = min(values) + 1e-9
            touched = [e for (_, e), value in zip(points, values, strict=True) if value <= least]
            largest = max(largest, max(touched) - min(touched))
    return largest


LAYER = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), min_size=1, max_size=5).map(lambda it: options(*it))
LAYERS = st.lists(LAYER, min_size=1, max_size=4)
SHARE = st.floats(0, 1)


def between(share, layers, index):
    """A whole budget between the least and the most that `layers` can come to, in cost (0) or error (1)."""
    totals = {total[index] for total in every_choice(layers)}
    return min(totals) + math.floor(share * (max(totals) - min(totals)))


def curve(savings, cost=1):
    """Options of which every rank costs `cost` and saves less than the one before, as singular values do."""
    savings = sorted(savings, reverse=True)
    return options(*((cost * i, sum(savings[i:])) for i in range(len(savings) + 1)))


CURVES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None)
@given(LAYERS, SHARE)
def test_never_over_budget_and_within_one_edge_of_the_linear_program(layers, share):
    budget = between(share, layers, 0)
    found = allocate(layers, budget)
    assert found.cost <= budget
    assert (found.cost, found.error) in set(every_choice(layers))
    assert found.error >= best(layers, budget)
    assert found.error <= bound(layers, budget) + largest_edge(layers) + 1e-9


@settings(deadline=None)
@given(LAYERS, SHARE)
def test_least_cost_is_the_same_problem_mirrored(layers, share):
    limit = between(share, layers, 1)
    found = least_cost(layers, limit)
    mirrored = [Options(layer.ranks, layer.errors, layer.costs) for layer in layers]
    assert found.error <= limit
    assert (found.cost, found.error) in set(every_choice(layers))
    assert found.cost >= best(mirrored, limit)
    assert found.cost <= bound(mirrored, limit) + largest_edge(mirrored) + 1e-9


@settings(deadline=None)
@given(LAYERS, SHARE)
def test_ranks_are_those_of_the_options_counted(layers, share):
    found = allocate(layers, between(share, layers, 0))
    chosen = [points_of(layer)[rank - 1] for layer, rank in zip(layers, found.ranks, strict=True)]
    assert found.cost == sum(cost for cost, _ in chosen)
    assert found.error == sum(error for _, error in chosen)


@settings(deadline=None)
@given(LAYERS, SHARE)
def test_nothing_that_would_help_still_fits(layers, share):
    budget = between(share, layers, 0)
    found = allocate(layers, budget)
    for layer, rank in zip(layers, found.ranks, strict=True):
        cost, error = points_of(layer)[rank - 1]
        assert not any(c - cost <= budget - found.cost and e < error for c, e in points_of(layer))


@settings(deadline=None)
@given(CURVES, SHARE)
def test_optimal_at_any_budget_where_all_ranks_cost_the_same(savings, share):
    layers = [curve(each) for each in savings]
    budget = between(share, layers, 0)
    assert allocate(layers, budget).error == best(layers, budget)


@settings(deadline=None)
@given(CURVES, st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_optimal_and_monotone_at_the_corners_of_the_hull(savings, costs):
    layers = [curve(each, cost) for each, cost in zip(savings, costs, strict=False)]
    steps = [(saved / cost, cost) for each, cost in zip(savings, costs, strict=False) for saved in each]
    slopes = sorted({slope for slope, _ in steps}, reverse=True)
    budgets = [sum(cost for slope, cost in steps if slope >= least) for least in (math.inf, *slopes)]
    found = [allocate(layers, budget) for budget in budgets]
    for allocation, budget in zip(found, budgets, strict=True):
        assert allocation.error == best(layers, budget)
    assert [each.error for each in found] == sorted((each.error for each in found), reverse=True)
    assert found[-1].error == 0


def test_the_closed_form_of_two_curves():
    # Savings of one rank: 9, 4, 1 and 8, 7, 2. The best four are 9, 8, 7, 4.
    found = allocate([curve([9, 4, 1]), curve([8, 7, 2])], 4)
    assert (found.ranks, found.cost, found.error) == ((3, 3), 4, 3)
    assert least_cost([curve([9, 4, 1]), curve([8, 7, 2])], 3) == found


def test_what_an_edge_leaves_goes_to_options_off_the_hull():
    # (5, 10) lies above the line from (0, 12) to (10, 0), and is all that fits.
    assert allocate([options((0, 12), (5, 10), (10, 0))], 7).ranks == (2,)


def test_dense_is_an_option_and_has_no_rank():
    layer = Options(np.array([4, 8, DENSE]), np.array([4.0, 8.0, 9.0]), np.array([5.0, 4.0, 0.0]))
    assert allocate([layer], 8.5).ranks == (8,)
    assert allocate([layer], 9).ranks == (None,)
    assert least_cost([layer], 4.5).ranks == (8,)
    assert least_cost([layer], 0).ranks == (None,)


def test_an_option_that_costs_more_for_nothing_is_not_taken():
    found = allocate([options((1, 5), (2, 7), (2, 5), (3, 1), (4, 1))], 100)
    assert (found.ranks, found.cost) == ((4,), 3)


def test_in_turns_ranks_keep_their_proportion():
    layers = [curve([1] * 12), curve([30] * 12)]
    # One layer grows three times as fast as the other, whatever its errors are.
    turns = [np.arange(13) / 3, np.arange(13) / 1]
    for budget, ranks in ((0, (0, 0)), (4, (3, 1)), (8, (6, 2)), (16, (12, 4)), (20, (12, 8))):
        assert tuple(rank - 1 for rank in allocate(layers, budget, turns).ranks) == ranks
    # Of (12, 4), 8 ranks of 30 are missing; of (6, 2) also 6 of 1.
    assert tuple(rank - 1 for rank in least_cost(layers, 8 * 30, turns).ranks) == (12, 4)
    assert tuple(rank - 1 for rank in least_cost(layers, 10 * 30 + 6, turns).ranks) == (6, 2)


def test_in_turns_a_step_that_does_not_fit_leaves_room_for_the_next():
    layers = [curve([1] * 4, cost=10), curve([1] * 4, cost=3)]
    turns = [np.arange(5), np.arange(5) + 0.5]
    # 10 + 3 + 10 do not fit in 17, but the second layer may be one step ahead, and no more.
    assert allocate(layers, 17, turns).ranks == (2, 3)
    assert allocate(layers, 22, turns).ranks == (2, 3)


FALLING = (
    st.integers(1, 4)
    .flatmap(
        lambda n: st.tuples(*(st.lists(st.integers(0, 40), min_size=n, max_size=n, unique=True) for _ in range(2)))
    )
    .map(lambda both: options(*zip(sorted(both[0]), sorted(both[1], reverse=True), strict=True)))
)


@settings(deadline=None)
@given(st.lists(FALLING, min_size=1, max_size=4), SHARE, st.booleans())
def test_a_cost_from_a_range_is_found_where_there_is_one(layers, share, in_turns):
    budget = between(share, layers, 0)
    at_least = 0.9 * budget
    turns = [np.arange(len(layer.ranks)) for layer in layers] if in_turns else None
    reachable = [(cost, error) for cost, error in every_choice(layers) if at_least <= cost <= budget]
    if reachable:
        found = allocate(layers, budget, turns, at_least)
        assert (found.cost, found.error) in reachable
        assert allocate(layers, found.cost, turns, 0.9 * found.cost).cost >= 0.9 * found.cost
    else:
        with pytest.raises(TargetError) as caught:
            allocate(layers, budget, turns, at_least)
        distances = {cost: abs(cost - budget) for cost, _ in every_choice(layers)}
        assert distances[caught.value.closest] == min(distances.values())


def test_what_lands_too_low_gives_way_to_the_best_that_does_not():
    # By error saved per cost the first layer goes first, to 9 of 20, and then the second no longer fits.
    layers = [options((0, 90), (9, 0)), options((0, 100), (18, 0)), options((0, 5), (2, 0))]
    assert allocate(layers, 20).cost == 11
    found = allocate(layers, 20, at_least=19)
    assert (found.ranks, found.cost, found.error) == ((1, 2, 2), 20, 90)


@settings(deadline=None)
@given(LAYERS)
def test_a_target_out_of_reach_names_the_closest(layers):
    cheapest, most_accurate = between(0, layers, 0), between(0, layers, 1)
    with pytest.raises(TargetError, match="cannot be reached: the closest is") as caught:
        allocate(layers, cheapest - 1)
    assert caught.value.closest == cheapest
    assert caught.value.exit_code == NothingToCompressError.exit_code == 3
    assert allocate(layers, caught.value.closest).cost == cheapest
    with pytest.raises(TargetError) as caught:
        least_cost(layers, most_accurate - 1)
    assert caught.value.closest == most_accurate


@pytest.mark.parametrize(("closest", "shown"), [(0.123401, "0.1235"), (0.5, "0.5"), (1 / 3, "0.3334"), (0.0, "0")])
def test_the_closest_is_shown_so_that_it_can_be_asked_for(closest, shown):
    assert f"the closest is {shown}; " in str(TargetError("--param-ratio 0.1", closest))


def test_no_layers_cost_nothing():
    assert allocate([], 1).ranks == ()


def test_a_turn_comes_by_the_error_saved_for_another_cost():
    #                          cheapest; slower, worse; 4 a unit; off the hull; 2.5 a unit; saves nothing
    times, errors = np.array([1.0, 1.0, 2.0, 3.0, 4.0, 5.0]), np.array([10.0, 11.0, 6.0, 5.0, 1.0, 1.0])
    np.testing.assert_array_equal(turns_by_worth(times, errors), [-np.inf, -np.inf, -4, -2.5, -2.5, 0])
    np.testing.assert_array_equal(turns_by_worth(times[::-1], errors[::-1]), [0, -2.5, -2.5, -4, -np.inf, -np.inf])
    np.testing.assert_array_equal(turns_by_worth(times[:1], errors[:1]), [-np.inf])


def test_a_budget_is_spent_where_it_saves_most_for_another_cost():
    quick, slow = options((1, 10), (2, 7), (3, 4)), options((1, 10), (2, 6), (3, 2))
    turns = [turns_by_worth(each * layer.costs, layer.errors) for each, layer in ((1, quick), (9, slow))]
    assert allocate([quick, slow], 4).ranks == (1, 3)
    assert allocate([quick, slow], 4, turns).ranks == (3, 1)


def test_layers_whose_turns_come_at_once_share_the_budget():
    layer = options(*((rank, 1 / rank) for rank in range(1, 65)))
    at_once = turns_by_worth(np.ones(64), layer.errors)
    assert set(at_once) == {-np.inf}
    assert allocate([layer] * 4, 150, [at_once] * 4).ranks == allocate([layer] * 4, 150).ranks
    assert max(allocate([layer] * 4, 150, [at_once] * 4).ranks) <= 38
