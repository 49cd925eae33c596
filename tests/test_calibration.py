"""What calibration collects, against brute force, and what the factors that follow do to outputs."""

import copy

import pytest
import torch
from drawn import experts_of_gpt_oss, experts_of_mixtral, modules, plans
from helpers import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lrconvert import calibration
from lrconvert.calibration import calibrate, can_respond
from lrconvert.errors import PlanError, UsageError
from lrconvert.inputs import Call
from lrconvert.layers import LAYOUTS
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.spectrum import factors_of
from lrconvert.surgery import factorize_module

# oneDNN says so where it has no kernel of its own.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = sorted(kind for kind in LAYOUTS if kind != "embedding" and not kind.startswith("conv_transpose"))
ONE_WEIGHT = ["conv1d", "conv2d", "conv3d", "linear"]


class Calls(nn.Module):
    """A module that is called in one way only."""

    def __init__(self, drawn):
        super().__init__()
        self.it, self.call = drawn.module, drawn.call

    def forward(self):
        return self.call(self.it)

    @torch.no_grad()
    def once(self):
        return self()


def aware(model, found, rank):
    """A plan that factorizes every layer with a response, at `rank` of its full rank."""
    layers = [layer for layer in layers_of_module(model) if layer.name in found.responses]
    decisions = [LayerPlan.of(layer, rank(layer)).model_copy(update={"data_aware": True}) for layer in layers]
    return Plan(layers=tuple(decisions))


def data_aware_copy(model, found, rank):
    plan = aware(model, found, rank)
    return factorize_module(copy.deepcopy(model), plan, responses=found.responses)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans())
def test_at_full_rank_every_module_computes_what_it_did(data, two_sided):
    drawn = data.draw(modules(KINDS))
    plan = data.draw(plans(drawn.module, full_rank=True))
    model = Calls(drawn).eval()
    want = model.once()
    found = calibrate(model, [decision.layer for decision in plan.low_rank], [Call((), {}, 1)], two_sided=two_sided)
    known = [layer.model_copy(update={"data_aware": True}) for layer in plan.low_rank if layer.name in found.responses]
    if drawn.kind in ONE_WEIGHT:
        assert known, "its only weight was not seen"
    small = factorize_module(copy.deepcopy(model), Plan(layers=tuple(known)), responses=found.responses)
    assert_close(small.once(), want, 1e-3 if drawn.dtype == torch.float32 else 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_predicted_error_is_that_of_the_outputs(data):
    drawn = data.draw(modules(ONE_WEIGHT))
    assume(drawn.dtype == torch.float64)  # that of its input
    drawn.module.bias = None
    model = Calls(drawn).double().eval()
    model.call = lambda module, call=drawn.call: call(module)
    (layer,) = layers_of_module(model)
    found = calibrate(model, [layer], [Call((), {}, 1)], two_sided=False)
    rank = data.draw(st.integers(1, layer.full_rank))
    small = data_aware_copy(model, found, lambda layer: rank)
    want = model.once()
    error = float(torch.linalg.vector_norm(small.once() - want) / torch.linalg.vector_norm(want))
    response = found.responses[layer.name]
    assert error == pytest.approx(
        response.spectrum.error(rank), rel=1e-4, abs=max(1e-5, clamped(model, layer, response))
    )


def clamped(model, layer, response):
    """What the clamp of a covariance without an inverse adds to a predicted error at most, as a share of the outputs.

    Directions that no input has are given 1e-5 of the mean variance, and all of them meet no more than ‖W‖².
    """
    if response.side == "rows":
        return 0.0
    weights = layer.layout.matrices(model.it.weight.detach(), layer.groups)
    outputs = (weights @ response.metric @ weights.mT).diagonal(dim1=1, dim2=2).sum()
    variances = response.metric.diagonal(dim1=1, dim2=2).mean(dim=1)
    return float((1e-5 * (variances * (weights**2).sum(dim=(1, 2))).sum() / outputs).sqrt())


def linear_response(weight, x, bias=None):
    """The response of a linear layer, computed the long way."""
    c = x.T @ x / len(x)
    return weight @ c @ weight.T, weight @ x.mean(0)


def test_packed_projections_are_seen_one_by_one():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True).double().eval()
    q, k, v = (torch.randn(4, length, 12).double() for length in (5, 7, 7))
    layers = layers_of_module(nn.ModuleDict({"it": attention}))
    model = Calls(type("Drawn", (), {"module": attention, "call": lambda module: module(q, k, v)[0]}))
    response = calibrate(model, layers, [Call((), {}, 1)], two_sided=False).responses["it.in_proj_weight"]
    for group, (weight, x) in enumerate(zip(attention.in_proj_weight.detach().chunk(3), (q, k, v), strict=True)):
        signal, mean = linear_response(weight, x.flatten(0, 1))
        assert_close(response.signal[group], signal, 1e-10)
        assert_close(response.mean[group], mean, 1e-10)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_meets_its_inputs_and_its_own_states(kind):
    torch.manual_seed(0)
    module = kind(6, 6, num_layers=2).double().eval()
    x = torch.randn(9, 4, 6).double()
    first = kind(6, 6).double()
    first.load_state_dict({key: value for key, value in module.state_dict().items() if "l0" in key})
    hidden = first(x)[0].detach()
    model = Calls(type("Drawn", (), {"module": module, "call": lambda module: module(x)[0]}))
    layers = layers_of_module(nn.ModuleDict({"it": module}))
    responses = calibrate(model, layers, [Call((), {}, 1)], two_sided=False).responses
    before = torch.cat([torch.zeros(1, 4, 6).double(), hidden[:-1]])
    met = {"ih_l0": x, "hh_l0": before, "ih_l1": hidden}
    for name, inputs in met.items():
        response = responses[f"it.weight_{name}"]
        weights = getattr(module, f"weight_{name}").detach().unflatten(0, (-1, 6))
        for group, weight in enumerate(weights):
            signal, mean = linear_response(weight, inputs.flatten(0, 1))
            assert_close(response.signal[group], signal, 1e-10)
            assert_close(response.mean[group], mean, 1e-10)


@pytest.mark.parametrize("inner", [5, 8])  # fewer outputs than inputs, and more
@pytest.mark.parametrize("experts", [experts_of_mixtral, experts_of_gpt_oss])
def test_every_expert_meets_its_own_tokens(experts, inner):
    torch.manual_seed(0)
    module = experts(12, inner, 4).double().eval()
    tokens, shares = torch.randn(30, 12).double(), torch.rand(30, 2).double()
    chosen = torch.rand(30, 3).argsort(dim=1)[:, :2]  # nobody goes to the last expert
    model = Calls(type("Drawn", (), {"module": module, "call": lambda module: module(tokens, chosen, shares)}))
    layer = layers_of_module(model)[0]
    weights = layer.layout.matrices(module.gate_up_proj.detach(), 4)
    response = calibrate(model, [layer], [Call((), {}, 1)], two_sided=False).responses[layer.name]
    for expert in range(3):
        x = tokens[(chosen == expert).any(1)]
        found = response.signal if response.side == "rows" else response.metric
        signal, _ = linear_response(weights[expert], x)
        assert_close(found[expert], signal if response.side == "rows" else x.T @ x / len(x), 1e-10)
    # The one that was never seen gets the factors of its weight alone, and takes no part in the choice of ranks,
    # however large or small everything is.
    plain = factors_of(weights[3:], 4, layer.name)
    two_sided = calibrate(model, [layer], [Call((), {}, 1)]).responses[layer.name]
    tokens *= 1e-4
    small = [calibrate(model, [layer], [Call((), {}, 1)], two_sided=two).responses[layer.name] for two in (True, False)]
    for each in (response, two_sided, *small):
        u, v, _ = each.factors(weights, 4)
        assert_close((v @ u)[3], (plain[1] @ plain[0])[0], 1e-6)
        assert each.spectrum.values[3].max() < 1e-3 * each.spectrum.values[:3].max()


@pytest.mark.parametrize("projections", [1, 3])
def test_two_sided_errors_are_those_of_the_networks_output(projections):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 30), nn.Linear(30, 10)).double()
    x = torch.randn(6000, 20).double() @ torch.randn(20, 20).double() / 4
    calls = [Call((part,), {}, 1000) for part in x.split(1000)]
    found = calibrate(model, layers_of_module(model), calls, projections=projections)
    want = model(x).detach()
    assert found.output_energy == pytest.approx(float((want**2).sum(1).mean()), rel=1e-9)
    for name, response in found.responses.items():
        plan = aware(model, found, lambda layer: 6)
        one = Plan(layers=tuple(layer for layer in plan.layers if layer.name == name))
        small = factorize_module(copy.deepcopy(model), one, responses=found.responses)
        error = small(x).detach() - want
        lost = float(((error - error.mean(0)) ** 2).sum(1).mean())
        predicted = float((response.spectrum.values[0, 6:] ** 2).sum())
        assert lost == pytest.approx(predicted, rel=0.1), name


def test_a_data_aware_weight_beats_the_truncated_svd_on_fresh_examples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()
    mixing = torch.randn(64, 64) * (1 / torch.arange(1, 65))
    fit, fresh = (torch.randn(512, 64) @ mixing.T for _ in range(2))
    found = calibrate(model, layers_of_module(model), [Call((fit,), {}, 512)])
    small = data_aware_copy(model, found, lambda layer: 5)
    plain = factorize_module(
        copy.deepcopy(model), Plan(layers=tuple(LayerPlan.of(layer, 5) for layer in layers_of_module(model)))
    )
    with torch.no_grad():
        errors = [float(torch.linalg.vector_norm(each(fresh) - model(fresh))) for each in (small, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_hidden_tokens_do_not_count():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            return self.fc(x)

    torch.manual_seed(0)
    model = Tokens().double()
    x, mask = torch.randn(3, 5, 8).double(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    junk = torch.where(mask[..., None].bool(), x, 1e3)
    padded = calibrate(
        model, layers_of_module(model), [Call((junk,), {"attention_mask": mask}, 3)], two_sided=False
    ).responses["fc"]
    alone = [row[keep.bool()][None] for row, keep in zip(x, mask, strict=True)]
    calls = [Call((row,), {"attention_mask": torch.ones(row.shape[:2])}, 1) for row in alone]
    plain = calibrate(model, layers_of_module(model), calls, two_sided=False).responses["fc"]
    assert_close(padded.signal, plain.signal, 1e-9)
    assert_close(padded.mean, plain.mean, 1e-9)
    watched = layers_of_module(model)
    two_sided = calibrate(model, watched, [Call((junk,), {"attention_mask": mask}, 3)]).responses["fc"]
    assert float(two_sided.signal.abs().max()) < 1e3, "what is hidden was counted"


def test_little_memory_means_more_passes_with_the_same_result():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    calls = [Call((torch.randn(4, 3, 9, 9),), {}, 4) for _ in range(2)]
    layers = layers_of_module(model)
    once = calibrate(model, layers, calls)
    seen = []
    often = calibrate(model, layers, calls, memory=1, progress=lambda: seen.append(1))
    assert len(seen) == len(calls) * len(layers)
    assert once.examples == often.examples == 8
    for name in once.responses:
        assert_close(often.responses[name].signal, once.responses[name].signal, 1e-6)


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Dropout()).train()
    model[0].linear1.weight.requires_grad_(False)
    before = {name: id(module) for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calibrate(model, layers_of_module(model), [Call((torch.randn(2, 5, 8),), {}, 2)])
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_examples_or_responses_nothing_is_made_up():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    with pytest.raises(UsageError, match="there are none"):
        calibrate(model, layers_of_module(model), [])
    layer = layers_of_module(model)[0]
    plan = Plan(layers=(LayerPlan.of(layer, 2).model_copy(update={"data_aware": True}),))
    with pytest.raises(PlanError, match="0 needs it again: give --calibrate"):
        factorize_module(model, plan)


def test_what_has_no_response():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "up": nn.ConvTranspose2d(4, 3, 2), "fc": nn.Linear(3, 3)})
    assert [layer.name for layer in layers_of_module(model) if can_respond(layer)] == ["fc"]


def test_only_what_varies_counts_where_a_bias_makes_up_for_the_mean():
    torch.manual_seed(0)
    x = torch.randn(500, 12).double() + 3
    weight = torch.randn(8, 12).double()
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(12, 8, bias=bias)).double()
        model[0].weight.data = weight
        response = calibrate(model, layers_of_module(model), [Call((x,), {}, 500)], two_sided=False).responses["0"]
        centred = x - x.mean(0) if bias else x
        assert_close(response.signal[0], weight @ (centred.T @ centred / 500) @ weight.T, 1e-9)


def test_a_product_with_a_transposed_view_is_that_of_a_linear_layer():
    class Written(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    plain = nn.Linear(6, 5)
    written = Written(6, 5)
    written.load_state_dict(plain.state_dict())
    calls = [Call((torch.randn(9, 6),), {}, 9)]
    (layer,) = layers_of_module(plain)
    one, two = (calibrate(model, [layer], calls, two_sided=False).responses[""] for model in (plain, written))
    # The bias that is added later is out of sight: what the other leaves to it, the mean, is the weight's here.
    # In float32, as the networks compute.
    assert_close(two.signal.float(), (one.signal + one.mean[:, :, None] * one.mean[:, None, :]).float())
    assert not two.mean.any()


def test_a_weight_that_is_also_used_transposed_has_no_response():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(self.encode(x), self.encode.weight.t())

    model = Tied()
    calls = [Call((torch.randn(9, 6),), {}, 9)]
    assert calibrate(model, layers_of_module(model), calls).responses == {}


def test_a_module_that_changes_what_its_class_computes_is_left_alone():
    class Loud(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0] * 100

    torch.manual_seed(0)
    model = nn.Sequential(Loud(5, 6), nn.Linear(6, 4)).double()
    x = torch.randn(7, 3, 5).double()
    found = calibrate(model, layers_of_module(model)[-1:], [Call((x,), {}, 3)], two_sided=False)
    seen = model[0](x).detach().flatten(0, 1)
    centred = seen - seen.mean(0)
    weight = model[1].weight.detach()
    assert_close(found.responses["1"].signal[0], weight @ (centred.T @ centred / len(seen)) @ weight.T, 1e-9)


@pytest.mark.parametrize("channels", [(4, 12), (12, 4)])
def test_some_of_many_positions_stand_for_all(channels, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, channels[0], 3), nn.ReLU(), nn.Conv2d(*channels, 1))
    calls = [Call((torch.randn(8, 2, 60, 60),), {}, 8)]
    some = calibrate(model, layers_of_module(model), calls).responses
    monkeypatch.setattr(calibration, "_POSITIONS", 10**9)
    everything = calibrate(model, layers_of_module(model), calls).responses
    for name, response in some.items():
        assert not torch.equal(response.signal, everything[name].signal), "all positions were looked at"
        energies = [float(each.spectrum.energy) for each in (response, everything[name])]
        assert energies[0] == pytest.approx(energies[1], rel=0.3)
