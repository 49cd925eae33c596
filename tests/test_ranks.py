"""Rank rules against closed forms, PyTorch's own initialisation, and brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.layers import Layer
from lrconvert.ranks import RULES, Evidence, closed_form_xi, measured_xi, parse_rule
from lrconvert.spectrum import Spectrum, spectrum_of


def layer_of(shape, kind="linear", groups=1):
    return Layer("layer", "layer.weight", kind, shape, groups)


def evidence_with(values, kind="linear", xi=1.0):
    values = torch.tensor([values], dtype=torch.float64)
    shape = (values.shape[1], 2 * values.shape[1])
    return Evidence(layer_of(shape, kind), Spectrum(values, (values**2).sum(1)), xi)


# Measured on PyTorch's default initialisation: shape, ξ.
@pytest.mark.parametrize(
    ("shape", "xi"), [((512, 512, 3, 3), 1.772), ((768, 768), 3.95), ((3072, 768), 2.23), ((64, 64, 3, 3), 1.69)]
)
def test_closed_form_xi_is_near_what_initial_weights_have(shape, xi):
    layer = layer_of(shape, "linear" if len(shape) == 2 else "conv2d")
    if len(shape) == 2:
        weight = torch.nn.Linear(shape[1], shape[0]).weight
    else:
        weight = torch.nn.Conv2d(shape[1], shape[0], shape[2]).weight
    spectrum = spectrum_of(weight.detach().flatten(1)[None], "layer")
    assert measured_xi(layer, spectrum) == pytest.approx(xi, rel=0.03)
    assert closed_form_xi(layer) == pytest.approx(measured_xi(layer, spectrum), rel=0.06)


def test_closed_form_xi_goes_from_1_to_4():
    assert closed_form_xi(layer_of((100, 100))) == 4.0
    assert closed_form_xi(layer_of((1, 10**8))) == pytest.approx(1.0, abs=1e-3)


def test_measured_xi_of_a_zero_weight_is_the_closed_form():
    layer = layer_of((8, 8))
    assert measured_xi(layer, spectrum_of(torch.zeros(1, 8, 8), "layer")) == closed_form_xi(layer)


def test_rules_on_a_known_spectrum():
    values = [4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    # Σσ² = 28, σ_max² = 16: stable rank 1.75. Σσ = 12; 0.8 of it is 9.6.
    expected = {
        "stable_rank": 2,
        "scaled_stable_rank": 4,  # ξ = 2: 3.5
        "accumulative=0.8": 5,
        "accumulative": 5,
        "energy=0.9": 5,  # 25.2 of 28
        "energy=1": 7,
        "rank_ratio=0.25": 2,
        "rank_ratio=0.01": 1,
        "rank=3": 3,
        "rank=99": 8,
        "auto": 5,
    }
    found = {name: parse_rule(name).rank(evidence_with(values, xi=2.0)) for name in expected}
    assert found == expected


def test_auto_uses_the_scaled_stable_rank_alone_for_convolutions():
    values = [4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert parse_rule("auto").rank(evidence_with(values, "conv2d", xi=2.0)) == 4
    for kind in ("linear", "transposed_linear", "attention", "embedding"):
        assert parse_rule("auto").rank(evidence_with(values, kind, xi=2.0)) == 5


def test_whole_ranks_are_not_rounded_up_by_noise():
    equal = evidence_with([0.1] * 7)
    assert parse_rule("stable_rank").rank(equal) == 7
    assert parse_rule("scaled_stable_rank").rank(Evidence(equal.layer, equal.spectrum, 3 / 7)) == 3


def test_rank_ratio_truncates_as_pufferfish_does():
    ranks = {ratio: parse_rule(f"rank_ratio={ratio}").rank(evidence_with([1.0] * 100)) for ratio in (0.29, 0.295, 0.57)}
    assert ranks == {0.29: 29, 0.295: 29, 0.57: 57}


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=20).filter(any),
    st.sampled_from(sorted(set(RULES) - {"rank"})),
    st.floats(1, 4),
)
def test_every_rule_gives_a_rank_from_1_to_full(values, name, xi):
    evidence = evidence_with(sorted(values, reverse=True), xi=xi)
    assert 1 <= parse_rule(name).rank(evidence) <= len(values)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.01, 10), min_size=2, max_size=20),
    st.sampled_from(["accumulative", "energy", "rank_ratio"]),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
)
def test_asking_for_more_never_gives_a_smaller_rank(values, name, one, other):
    evidence = evidence_with(sorted(values, reverse=True))
    low, high = sorted((one, other))
    assert parse_rule(f"{name}={low}").rank(evidence) <= parse_rule(f"{name}={high}").rank(evidence)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("energy=0", "needs a number above 0, at most 1"),
        ("energy=1.5", "at most 1 .*, not 1.5"),
        ("energy=nan", "not nan"),
        ("rank_ratio=-1", "not -1"),
        ("rank", "write rank=NUMBER"),
        ("rank=inf", "above 0 .*, not inf"),
        ("rank=2.5", "whole number"),
        ("energy=much", "'much' is not a number"),
        ("auto=3", "takes no number"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_rule(text)


def test_unknown_rule_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'stable_rank'"):
        parse_rule("stable_ranks")


def test_a_grouped_layer_gets_the_largest_rank_that_a_group_needs():
    values = torch.stack([torch.ones(6), torch.tensor([1.0, 0, 0, 0, 0, 0])]).double()
    evidence = Evidence(layer_of((12, 6, 1, 1), "conv2d", 2), Spectrum(values, (values**2).sum(1)), 1.0)
    assert parse_rule("stable_rank").rank(evidence) == 6
    assert parse_rule("energy=0.9").rank(evidence) == 6
    assert math.isclose(float(evidence.spectrum.stable_rank()[1]), 1.0)
