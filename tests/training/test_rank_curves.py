"""When rank curves settle: against arithmetic done by hand, which is written out."""

import json

import pytest

from lrconvert.errors import UsageError
from lrconvert.training.schedules.rank_curves import RankCurves, StabilityCriterion, smoothed

# A curve c + A·2⁻ᵗ, smoothed with N = 3 (α = 1/2), deviates from c by d₀ = A, d_t = ½·A·2⁻ᵗ + ½·d_{t−1}, which is
# d_t = A·2⁻ᵗ·(1 + t/2). For A = 16:
#     t    0   1   2   3   4   5     6   7       8       9
#     d   16  12   8   5   3   1.75  1   0.5625  0.3125  0.171875
# After epoch t, with M = 2: mean of the central slope at t−1, |d_t − d_{t−2}| / 2, and of the last, |d_t − d_{t−1}|:
#     t = 3  (3.5      + 3       ) / 2 = 3.25
#     t = 4  (2.5      + 2       ) / 2 = 2.25
#     t = 5  (1.625    + 1.25    ) / 2 = 1.4375
#     t = 6  (1        + 0.75    ) / 2 = 0.875
#     t = 7  (0.59375  + 0.4375  ) / 2 = 0.515625
#     t = 8  (0.34375  + 0.25    ) / 2 = 0.296875
#     t = 9  (0.195313 + 0.140625) / 2 = 0.167969
DEVIATION = [16, 12, 8, 5, 3, 1.75, 1, 0.5625, 0.3125, 0.171875]
SLOPES = {3: 3.25, 4: 2.25, 5: 1.4375, 6: 0.875, 7: 0.515625, 8: 0.296875}


def saturating(amplitude=16.0, epochs=12):
    return [40 + amplitude * 2.0**-epoch for epoch in range(epochs + 1)]


def settled(criterion, **curves):
    found = RankCurves(criterion)
    for measured in zip(*curves.values(), strict=True):
        found.add(dict(zip(curves, measured, strict=True)))
    return found.settled


def test_smoothing_and_slopes_of_a_saturating_curve():
    assert smoothed(saturating(), 3)[:10].tolist() == [40 + deviation for deviation in DEVIATION]
    criterion = StabilityCriterion(3, 2, 0.1)
    for epochs, slope in SLOPES.items():
        assert criterion.slope(saturating(epochs=epochs)) == slope


@pytest.mark.parametrize(("epsilon", "epoch"), [(5.0, 3), (2.25, 4), (0.9, 6), (0.515625, 7), (0.5, 8)])
def test_a_saturating_curve_settles_at_the_epoch_computed_by_hand(epsilon, epoch):
    assert settled(StabilityCriterion(3, 2, epsilon), layer=saturating()) == {"layer": epoch}


@pytest.mark.parametrize("window", [1, 5, 15])
def test_a_constant_curve_settles_at_epoch_n_and_not_before(window):
    assert settled(StabilityCriterion(window, 11, 0.0), layer=[7.0] * (window + 1)) == {"layer": window}
    assert settled(StabilityCriterion(window, 11, 0.0), layer=[7.0] * window) == {}


def test_a_ramp_never_settles():
    # One rank an epoch: smoothed with α = 1/2, s_t = t − 1 + 2⁻ᵗ, so the last slope is 1 − 2⁻ᵗ.
    ramp = [float(epoch) for epoch in range(300)]
    assert smoothed(ramp, 3)[:4].tolist() == [0, 0.5, 1.25, 2.125]
    assert StabilityCriterion(3, 1, 0.1).slope(ramp[:4]) == 1 - 2**-3
    assert settled(StabilityCriterion(3, 11, 0.5), layer=ramp) == {}
    assert settled(StabilityCriterion(3, 11, 0.5), falling=[300 - rank for rank in ramp]) == {}


def test_epsilon_is_relaxed_for_the_last_two_layers():
    curves = {"a": saturating(16), "b": saturating(32), "c": saturating(80)}  # slopes ×1, ×2, ×5 of the table
    # Without relaxation each needs a slope of 0.9: b has 1.03125 after 7 and 0.59375 after 8, c 1.484 after 8 and
    # 0.840 after 9.
    assert settled(StabilityCriterion(3, 2, 0.9), **curves) == {"a": 6, "b": 8, "c": 9}
    # With it, a settles after 6 as before. b's 1.75 is below 2.5 · 0.9 = 2.25 already then, but when epoch 6 began
    # three layers were left. After 7 two are: b has 1.03125, c 2.578. After 8 one is, with ε = 4.5: c has 1.484.
    assert settled(StabilityCriterion(3, 2, 0.9, ((1, 5.0), (2, 2.5))), **curves) == {"a": 6, "b": 7, "c": 8}


def test_a_layer_that_settled_stays_settled():
    curve = [5.0] * 4 + [50.0, 5.0, 50.0, 5.0]
    assert settled(StabilityCriterion(3, 2, 0.1), layer=curve) == {"layer": 3}


@pytest.mark.parametrize(
    ("criterion", "thresholds"),
    [
        (StabilityCriterion.cifar(), {1: 0.5, 2: 0.25, 3: 0.1, 16: 0.1}),
        (StabilityCriterion.imagenet_cnn(), {1: 1.65, 3: 1.65, 4: 0.825, 6: 0.825, 7: 0.33}),
        (StabilityCriterion.transformer(), {4: 2.055, 5: 1.0275, 9: 1.0275, 10: 0.411}),
    ],
)
def test_presets(criterion, thresholds):
    assert {left: criterion.threshold(left) for left in thresholds} == pytest.approx(thresholds)


def test_curves_come_through_json_and_go_on():
    whole, half = RankCurves(StabilityCriterion.cifar()), RankCurves(StabilityCriterion.cifar())
    points = [{"a": 40 + 30 * 0.8**epoch, "b": 60 + 90 * 0.9**epoch} for epoch in range(60)]
    for point in points[:20]:
        half.add(point)
    half = RankCurves.from_state(json.loads(json.dumps(half.state_dict())))
    for point in points[20:]:
        half.add(point)
    for point in points:
        whole.add(point)
    assert half == whole
    assert whole.epochs == 59
    assert whole.restless == []
    assert whole.settled["a"] < whole.settled["b"]


@pytest.mark.parametrize("numbers", [(0, 1, 0.1), (1, 0, 0.1), (1, 1, -0.1)])
def test_a_criterion_without_sense_is_refused(numbers):
    with pytest.raises(UsageError, match="stability criterion"):
        StabilityCriterion(*numbers)
