"""Budgets: what a plan promises is counted in the factorized network, and what cannot be had is refused."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import num_params
from torch import nn

import lrconvert
from lrconvert.budget import ALLOCATORS, Budget, one_budget
from lrconvert.checkpoints.plan_file import load_plan
from lrconvert.cost import Trace, trace
from lrconvert.errors import NothingToCompressError, TargetError, UnknownNameError, UsageError
from lrconvert.inputs import one_input
from lrconvert.layers import Layer
from lrconvert.models.zoo.digits_cnn import DigitsCNN
from lrconvert.network import open_network
from lrconvert.plan import PlanOptions
from lrconvert.plan_budget import TOLERANCE, Prices, mac_prices, plan_within
from lrconvert.planning import candidates_of, plan_options
from lrconvert.ranks import Evidence, closed_form_xi
from lrconvert.spectrum import spectrum_of

SHAPE = (3, 12, 12)

# The others need a calibration; tests/api/test_calibrate.py has them.
FROM_WEIGHTS = [name for name, allocator in ALLOCATORS.items() if allocator.curve is not None]


class Mixed(nn.Module):
    """Every sort of weight in one network, with biases and norms."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(64, 48, batch_first=True)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.table = nn.Embedding(50, 48)
        self.wide = nn.Linear(48, 160)
        self.head = nn.Linear(160, 10)

    def forward(self, x):
        x = self.grouped(self.conv(self.norm(self.stem(x)).relu()).relu())
        x, _ = self.lstm(x.flatten(2).mT)
        x = x + self.attention(x, x, x)[0] + self.table.weight[0]
        return self.head(self.wide(x.mean(1)).relu())


@pytest.fixture
def model():
    """A `Mixed` with spectra that fall, each layer's at its own pace and scale."""
    model = Mixed()
    for i, parameter in enumerate(each for each in model.parameters() if each.dim() > 1):
        falling = torch.arange(1, parameter[0].numel() + 1) ** -(0.2 + i / 10)
        parameter.data *= (1 + i) * falling.view_as(parameter[0])
    return model


def shares(model, before):
    """(parameters, MACs) of a model, counted, as shares of those of the one `before`."""
    macs = [trace(each, one_input(SHAPE)).macs for each in (model, before)]
    return num_params(model) / num_params(before), macs[0] / macs[1]


def weight_errors(plan, before):
    """By name, ‖W − W_r‖² and ‖W‖² of the layers that are factorized or may be."""
    weights = before.state_dict()
    found = {}
    for decision in plan.layers:
        if decision.rank is None and not decision.reason.startswith("dense at"):
            continue
        matrices = decision.layer.layout.matrices(weights[decision.weight].double(), decision.groups)
        energies = torch.linalg.svdvals(matrices) ** 2
        left_out = energies[:, decision.rank :].sum() if decision.rank else 0.0
        found[decision.name] = (float(left_out), float(energies.sum()))
    return found


@pytest.mark.parametrize("allocator", [None, *FROM_WEIGHTS])
@pytest.mark.parametrize(("kind", "target"), [("param_ratio", 0.5), ("mac_ratio", 0.75)])
def test_what_is_counted_is_what_was_asked(model, kind, target, allocator):
    before = Mixed()
    plan = lrconvert.make_plan(model, input_shape=SHAPE, allocator=allocator, **{kind: target})
    small = lrconvert.factorize(model, plan)
    counted = shares(small, before)[kind == "mac_ratio"]
    assert counted == pytest.approx(plan.target.reached, rel=1e-9)
    assert (1 - TOLERANCE) * target <= counted <= target
    assert (plan.target.kind, plan.target.asked) == (kind, target)
    assert plan.rule == f"{kind}={target:g} by {allocator or 'relative_error'}"
    assert {layer.reason for layer in plan.low_rank} == {f"{kind.replace('_', ' ')} {target:g}"}
    for layer in plan.low_rank:
        assert layer.rank <= layer.layer.break_even_rank


@pytest.mark.parametrize("kind", ["param_ratio", "mac_ratio"])
@pytest.mark.parametrize(("allocator", "weighted"), [("absolute_error", False), ("relative_error", True)])
def test_the_errors_an_allocator_minimises_are_lower_than_with_one_ratio_for_all(model, kind, allocator, weighted):
    def total(name):
        plan = lrconvert.make_plan(model, input_shape=SHAPE, allocator=name, **{kind: 0.6})
        errors = weight_errors(plan, model)
        return sum(error / (norm if weighted else 1.0) for error, norm in errors.values())

    assert total(allocator) < 0.95 * total("uniform")


def test_uniform_gives_all_layers_one_rank_ratio(model):
    plan = lrconvert.make_plan(model, param_ratio=0.5, allocator="uniform")
    ratios = [layer.rank / layer.layer.full_rank for layer in plan.low_rank]
    steps = [1 / layer.layer.full_rank for layer in plan.low_rank]
    assert len(ratios) > 5
    assert max(ratios) - min(ratios) <= 2 * max(steps)


def test_stable_ranks_are_scaled_by_one_factor(model):
    plan = lrconvert.make_plan(model, param_ratio=0.5, allocator="stable_rank")
    weights = model.state_dict()
    bounds = []
    for layer in plan.low_rank:
        spectrum = spectrum_of(layer.layer.layout.matrices(weights[layer.weight], layer.groups), layer.name)
        scaled = closed_form_xi(layer.layer) * float(spectrum.stable_rank().max())
        # Rounded down, and at most one step ahead; never below 1.
        bounds.append((0 if layer.rank == 1 else (layer.rank - 1) / scaled, (layer.rank + 1) / scaled))
    assert len(bounds) > 5
    assert max(low for low, _ in bounds) <= min(high for _, high in bounds)
    uniform = lrconvert.make_plan(model, param_ratio=0.5, allocator="uniform")
    assert [layer.rank for layer in plan.layers] != [layer.rank for layer in uniform.layers]


def test_the_largest_error_is_kept_by_the_fewest_parameters(model):
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    plan = lrconvert.make_plan(model, max_error=0.3)
    errors = weight_errors(plan, model)
    norm = sum(norm for _, norm in errors.values())
    reached = sum(error for error, _ in errors.values())
    assert plan.target.reached == pytest.approx((reached / norm) ** 0.5, rel=1e-6)
    assert 0.29 < plan.target.reached <= 0.3
    assert plan.rule == "max_error=0.3 by absolute_error"
    # The multiplied factors are off by what was predicted.
    merged = lrconvert.merge(lrconvert.factorize(model, plan)).state_dict()
    keys = {layer.weight for layer in plan.low_rank}
    measured = sum(float((merged[key] - weights[key]).double().square().sum()) for key in keys)
    assert (measured / norm) ** 0.5 == pytest.approx(plan.target.reached, rel=1e-4)


def test_one_rank_less_anywhere_would_be_too_much_error(model):
    plan = lrconvert.make_plan(model, max_error=0.3)
    errors = weight_errors(plan, model)
    norm = sum(norm for _, norm in errors.values())
    total = sum(error for error, _ in errors.values())
    for layer in plan.low_rank:
        matrices = layer.layer.layout.matrices(model.state_dict()[layer.weight].double(), layer.groups)
        last = float((torch.linalg.svdvals(matrices)[:, layer.rank - 1] ** 2).sum())
        assert layer.rank == 1 or total + last > 0.3**2 * norm


@pytest.mark.parametrize("allocator", FROM_WEIGHTS)
def test_every_allocator_keeps_a_largest_error(model, allocator):
    loose, tight = (lrconvert.make_plan(model, max_error=error, allocator=allocator) for error in (0.5, 0.2))
    assert loose.target.reached <= 0.5
    assert tight.target.reached <= 0.2
    assert loose.saved_params > tight.saved_params > 0


def test_settings_hold_within_a_budget(model):
    plan = lrconvert.make_plan(
        model,
        param_ratio=0.7,
        rank_multiple=4,
        floor=0.2,
        layer_ranks={"wide": 7},
        exclude=["conv"],
        keep_first=1,
        keep_last=False,
    )
    ranks = {layer.name: layer.rank for layer in plan.layers}
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert ranks["stem"] is None
    assert reasons["stem"] == "first layer"
    assert ranks["conv"] is None
    assert reasons["conv"] == "excluded by 'conv'"
    assert (ranks["wide"], reasons["wide"]) == (7, "given")
    assert reasons["head"] in ("param ratio 0.7", "dense at param ratio 0.7")
    others = [layer for layer in plan.low_rank if layer.name != "wide"]
    assert len(others) > 3
    for layer in others:
        assert layer.rank % 4 == 0
        assert layer.rank >= round(0.2 * layer.layer.full_rank)
    assert 0.693 <= num_params(lrconvert.factorize(model, plan)) / num_params(Mixed()) <= 0.7


def test_a_norm_between_the_factors_is_paid_for():
    before = num_params(DigitsCNN(16))
    plan = lrconvert.make_plan(DigitsCNN(16), param_ratio=0.5, extra_norm=True)
    assert any(layer.norm for layer in plan.low_rank)
    assert num_params(lrconvert.factorize(DigitsCNN(16), plan)) / before == pytest.approx(plan.target.reached)


def test_the_spatial_view_has_its_own_macs():
    shape = (1, 8, 8)
    before = trace(DigitsCNN(16), one_input(shape)).macs
    plan = lrconvert.make_plan(DigitsCNN(16), mac_ratio=0.5, view="spatial", input_shape=shape)
    after = trace(lrconvert.factorize(DigitsCNN(16), plan), one_input(shape)).macs
    assert after / before == pytest.approx(plan.target.reached)
    assert 0.495 <= after / before <= 0.5


def test_a_zero_layer_and_one_that_cannot_shrink_stay_dense_with_the_reason():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 1), nn.Linear(1, 64))
    nn.init.zeros_(model[1].weight)
    reasons = {layer.name: layer.reason for layer in lrconvert.make_plan(model, param_ratio=0.7).layers}
    assert reasons["1"] == "all zero"
    assert reasons["4"] == "would not shrink: rank 1, break-even 0"


def test_what_would_not_save_macs_stays_dense():
    layers = [Layer("table", "table.weight", "embedding", (99, 64)), Layer("body", "body.weight", "linear", (64, 64))]
    spectra = {layer.name: spectrum_of(torch.randn(1, *layer.matrix_shape), layer.name) for layer in layers}
    evidence = {layer.name: Evidence(layer, spectra[layer.name], 1.0) for layer in layers}
    budget = Budget("mac_ratio", 0.5, "relative_error")
    prices = mac_prices(layers, Trace({"table": 7, "body": 7}, 7 * 64 * 64, {}))
    plan = plan_within(budget, layers, evidence, prices, PlanOptions(budget, keep_first=0, keep_last=False))
    assert [(layer.rank, layer.reason) for layer in plan.layers] == [
        (None, "would not save MACs"),
        (16, "mac ratio 0.5"),
    ]


def test_auto_leaves_the_choice_to_the_budget(model):
    assert lrconvert.make_plan(model, "auto", param_ratio=0.5) == lrconvert.make_plan(model, param_ratio=0.5)


def test_curves_and_prices_may_come_from_elsewhere(model):
    network = open_network(model)
    candidates = candidates_of(network, plan_options(budget=Budget("param_ratio", 0.5, "absolute_error")))
    spectra = {
        layer.name: spectrum_of(layer.layout.matrices(model.state_dict()[layer.weight], layer.groups), layer.name)
        for layer in candidates.layers
    }
    # One layer matters more than all others together, and one rank of it costs next to nothing.
    ones = {layer.name: np.linspace(1.0, 0.0, layer.full_rank + 1) for layer in candidates.layers}
    plan = candidates.plan(spectra, {}, curves=ones | {"wide": 1e9 * ones["wide"]})
    assert {layer.name: layer.rank for layer in plan.layers}["wide"] is None
    low_rank = {layer.name: 0.1 * np.arange(layer.full_rank + 1.0) for layer in candidates.layers}
    dense = {layer.name: 0.2 * layer.full_rank for layer in candidates.layers}
    prices = Prices(sum(dense.values()) + 1, dense, low_rank)
    plan = candidates.plan(spectra, {}, prices=prices)
    after = sum(
        dense[layer.name] if layer.rank is None else 0.1 * layer.rank for layer in plan.layers if layer.name in dense
    )
    assert (1 + after) / prices.whole == pytest.approx(plan.target.reached)
    assert 0.495 <= plan.target.reached <= 0.5


def test_the_least_that_can_be_had_is_named_and_can_be_had(model):
    with pytest.raises(TargetError, match=r"--param-ratio 0\.05 cannot be reached: the closest is 0\.\d+") as caught:
        lrconvert.make_plan(model, param_ratio=0.05)
    plan = lrconvert.make_plan(model, param_ratio=float(re.search(r"is (0\.\d+)", str(caught.value))[1]))
    assert plan.target.reached == pytest.approx(caught.value.closest, rel=TOLERANCE)
    assert all(layer.rank == 1 for layer in plan.low_rank if layer.name != "head")


def test_steps_too_coarse_for_the_budget_are_refused_with_the_closest_value():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5)))
    # Ranks 16 or dense in three layers, and two layers dense: 1/2 or 1 of each, so 0.7, 0.8, 0.9 and 1 in all.
    for asked, closest in ((0.76, 0.8), (0.74, 0.7), (0.87, 0.9)):
        with pytest.raises(TargetError, match="or for finer steps of ranks") as caught:
            lrconvert.make_plan(model, param_ratio=asked, rank_multiple=16)
        assert caught.value.closest == pytest.approx(closest)
    for asked in (0.7, 0.8, 0.905):
        plan = lrconvert.make_plan(model, param_ratio=asked, rank_multiple=16)
        assert plan.target.reached == pytest.approx(round(asked, 1))


def test_a_given_rank_may_make_a_largest_error_impossible(model):
    with pytest.raises(TargetError, match=r"--max-error 0\.001 cannot be reached") as caught:
        lrconvert.make_plan(model, max_error=0.001, layer_ranks={"conv": 2})
    plan = lrconvert.make_plan(model, max_error=caught.value.closest * 1.0001, layer_ranks={"conv": 2})
    assert {layer.name: layer.rank for layer in plan.low_rank} == {"conv": 2}


def test_where_nothing_can_be_factorized_nothing_is_reached():
    with pytest.raises(TargetError, match="the closest is 1; allow more: --keep-first 0"):
        lrconvert.make_plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), param_ratio=0.5, keep_first=9)
    with pytest.raises(NothingToCompressError, match="no layer to factorize"):
        lrconvert.factorize(Mixed(), param_ratio=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"param_ratio": 1.2}, "--param-ratio is compressed / original, .*: above 0, at most 1, not 1.2"),
        ({"mac_ratio": 0.0}, "--mac-ratio is .* not 0"),
        ({"max_error": float("nan")}, "--max-error is .* not nan"),
        ({"param_ratio": 0.5, "mac_ratio": 0.5}, "one budget at a time: param_ratio=0.5 and mac_ratio=0.5"),
        ({"param_ratio": 0.5, "rule": "energy=0.9"}, "energy=0.9 and --param-ratio both choose the ranks"),
        ({"allocator": "uniform"}, "--allocator uniform distributes a budget: give one of --param-ratio, --mac-ratio"),
        ({"mac_ratio": 0.5}, "--mac-ratio needs the MACs of Mixed: MACs and execution order need --input-shape"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(model, settings, message):
    with pytest.raises(UsageError, match=message):
        lrconvert.make_plan(model, **settings)


def test_an_unknown_allocator_lists_the_known_ones(model):
    with pytest.raises(UnknownNameError, match=r"did you mean 'uniform'.*absolute_error, output_error, relative_error"):
        lrconvert.make_plan(model, param_ratio=0.5, allocator="unifrom")
    assert one_budget(param_ratio=None) is None


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """A checkpoint that names its architecture, in the folder that the command line runs in."""
    monkeypatch.chdir(tmp_path)
    lrconvert.save(DigitsCNN(16), "dense.safetensors", architecture="zoo/digits_cnn", model_args={"width": 16})
    return "dense.safetensors"


def test_the_command_line_says_what_was_reached(cli, dense):
    before = DigitsCNN(16)
    done = cli("factorize", dense, "-o", "a.safetensors", "--param-ratio", "0.6", "--allocator", "uniform")
    assert done.code == 0, done.err
    assert "rule param_ratio=0.6 by uniform" in done.out
    reached = num_params(lrconvert.load("a.safetensors")) / num_params(before)
    assert f"parameters {reached:.3f} of dense, asked 0.6" in done.out
    assert 0.594 <= reached <= 0.6
    record = json.loads(cli("factorize", dense, "-o", "b.safetensors", "--mac-ratio", "0.5", "--auto", "--json").out)
    macs = trace(lrconvert.load("b.safetensors"), one_input((1, 8, 8))).macs
    assert record["macs_after"] == macs
    assert record["target"]["kind"] == "mac_ratio"
    assert record["target"]["reached"] == pytest.approx(macs / record["macs_before"])
    assert "error 0." in cli("factorize", dense, "--dry-run", "--max-error", "0.25").out


def test_a_saved_plan_promises_nothing_once_it_may_have_been_edited(cli, dense):
    assert cli("factorize", dense, "--dry-run", "--param-ratio", "0.6", "--save-plan", "plan.json").code == 0
    assert load_plan("plan.json").target is None
    done = cli("factorize", dense, "-o", "a.safetensors", "--plan", "plan.json")
    assert done.code == 0, done.err
    assert "rule param_ratio=0.6 by relative_error" in done.out
    assert "asked" not in done.out


def test_one_line_errors(cli, dense):
    run = ("factorize", dense, "-o", "small.pt")
    line = cli.fails(3, *run, "--param-ratio", "0.01")
    closest = re.search(r"the closest is (0\.\d+); ask for that", line)[1]
    assert cli(*run, "--param-ratio", closest).code == 0
    for arguments, message in [
        (("--param-ratio", "1.5"), "at most 1, not 1.5"),
        (("--param-ratio", "0.5", "--mac-ratio", "0.5"), "param_ratio=0.5 and mac_ratio=0.5 were given"),
        (("--param-ratio", "0.5", "--rank", "8"), "rank=8 and param_ratio=0.5 were given"),
        (("--param-ratio", "0.5", "--allocator", "best"), "unknown allocator 'best': known: absolute_error, "),
        (("--auto", "--allocator", "uniform"), "--allocator uniform distributes a budget"),
        (("--plan", "plan.json", "--max-error", "0.1"), "--plan and max_error both choose the ranks"),
    ]:
        assert message in cli.fails(2, *run, "--overwrite", *arguments), arguments
    torch.save(DigitsCNN(16).state_dict(), "bare.pt")
    line = cli.fails(2, "factorize", "bare.pt", "-o", "small.pt", "--overwrite", "--mac-ratio", "0.5")
    assert line.endswith("needs the MACs of bare.pt: name the architecture with --model")
