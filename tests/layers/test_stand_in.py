"""Parents that multiply by a layer's weight without calling it: they get the factors, and the layer is seen."""

import copy

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn import functional

import lrconvert
from lrconvert.cost import trace
from lrconvert.inputs import Call, one_input
from lrconvert.layers import LowRank
from lrconvert.sequential import fit_in_turn

BIASES = {
    "its own": lambda layer: layer.bias,
    "a changed copy": lambda layer: 2 * layer.bias,
    "none": lambda layer: None,
}


class Reading(nn.Module):
    """Computes what its layer would, with a bias that may be another."""

    def __init__(self, bias="its own", by_name=False):
        super().__init__()
        self.before = nn.Linear(12, 12)
        self.layer = nn.Linear(12, 18)
        nn.init.normal_(self.layer.bias)
        self.bias, self.by_name = BIASES[bias], by_name

    def forward(self, x):
        x, bias = self.before(x), self.bias(self.layer)
        if self.by_name:
            return functional.linear(input=x, weight=self.layer.weight, bias=bias)
        return functional.linear(x, self.layer.weight, bias)


def factorized(model, **settings):
    """A factorized copy, and the dense model with the same products for weights."""
    small = lrconvert.factorize(copy.deepcopy(model), "rank=3", keep_first=0, keep_last=False, **settings)
    assert [name for name, module in small.named_modules() if isinstance(module, LowRank)] == [
        "before",
        "layer",
    ]
    return small, lrconvert.merge(copy.deepcopy(small))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("settings", [{}, {"splits": {"layer": 3}}, {"extra_norm": True}], ids=str)
def test_the_product_is_taken_with_the_factors(bias, by_name, settings):
    small, dense = factorized(Reading(bias, by_name).eval(), **settings)
    x = torch.randn(5, 12)
    expected = dense(x)
    assert_close(small(x), expected)
    gradient = torch.randn_like(expected)
    small(x).backward(gradient)
    expected.backward(gradient)
    assert_close(small.before.v.bias.grad, dense.before.bias.grad)
    if bias != "none" and "extra_norm" not in settings:
        assert_close(small.layer.v.bias.grad, dense.layer.bias.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("bias", BIASES)
def test_captured_graphs_multiply_by_the_factors(bias):
    small, dense = factorized(Reading(bias).eval())
    x = torch.randn(5, 12)
    captured = {
        "export": torch.export.export(small, (x,), strict=False).module(),
        "strict": torch.export.export(small, (x,), strict=True).module(),
        "trace": torch.jit.trace(small, x),
        "compile": torch.compile(small, backend="eager", fullgraph=True),
    }
    for graph in captured.values():
        assert_close(graph(x), dense(x))


@pytest.mark.parametrize("bias", BIASES)
def test_a_layer_that_is_read_counts_as_called(bias):
    model = Reading(bias)
    small, _ = factorized(model)
    inputs = one_input((7, 12))
    dense, low_rank = trace(model, inputs), trace(small, inputs)
    assert list(dense.positions.items()) == [("before", 7), ("layer", 7)]
    assert dense.macs == 7 * 12 * (12 + 18)
    assert low_rank.positions["layer"] == 7
    assert low_rank.macs == 7 * 3 * (12 + 12 + 12 + 18)


def test_a_layer_that_is_called_counts_once_and_so_does_a_shared_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x)) + functional.linear(x, self.first.weight)

    found = trace(Tied(), one_input((3, 8)))
    assert found.positions == {"first": 3, "second": 3}
    assert found.macs == 3 * 3 * 64


@pytest.mark.parametrize("bias", BIASES)
@torch.no_grad()
def test_a_layer_that_is_read_with_its_bias_is_fitted_in_turn(bias):
    model = Reading(bias).double()
    small, _ = factorized(model)
    before = copy.deepcopy(small)
    calls = [Call((torch.randn(40, 12, dtype=torch.float64) + 3,), {}, 40) for _ in range(4)]
    # What a parent does with the layer's bias is not known to the fit.
    assert set(fit_in_turn(small, model, calls)) == ({"before", "layer"} if bias == "its own" else {"before"})
    x = torch.cat([call.args[0] for call in calls])
    fitted, truncated = (torch.linalg.vector_norm(each(x) - model(x)) for each in (small, before))
    assert fitted < 0.99 * truncated


def test_only_a_bias_of_the_layer_makes_up_for_the_mean():
    """Of what else a parent adds nobody knows what a correction would become."""
    calls = [Call((torch.randn(400, 12) + 3,), {}, 400)]
    corrected = {}
    for bias in BIASES:
        torch.manual_seed(0)
        model = Reading(bias).eval().requires_grad_(False)
        calibration = lrconvert.calibrate(model, calls)
        plan = lrconvert.make_plan(model, "rank=3", calibration=calibration, keep_first=0, keep_last=False)
        small = lrconvert.factorize(copy.deepcopy(model), plan, calibration=calibration)
        corrected[bias] = not torch.equal(small.layer.v.bias, model.layer.bias)
    assert corrected == {"its own": True, "a changed copy": False, "none": False}


def test_under_autocast_the_product_has_the_dtype_of_the_dense_one():
    for settings in ({}, {"splits": {"layer": 3}}):
        small, dense = factorized(Reading("a changed copy").eval(), **settings)
        with torch.autocast("cpu", torch.bfloat16):
            assert small(torch.randn(5, 12)).dtype == dense(torch.randn(5, 12)).dtype == torch.bfloat16


class Casting(Reading):
    """Casts the weight first, as some parents do for the sake of mixed precision."""

    def __init__(self, cast):
        super().__init__()
        self.cast = cast

    def forward(self, x):
        x = self.before(x)
        assert isinstance(self.layer.weight, torch.Tensor)
        return functional.linear(x, self.cast(self.layer.weight, x), self.layer.bias)


CASTS = {
    "to": lambda weight, x: weight.to(x.dtype),
    "to device": lambda weight, x: weight.to(x.device),
    "float": lambda weight, x: weight.float().contiguous(),
    "type_as": lambda weight, x: weight.type_as(x).detach(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("captured", ["eager", "trace", "export", "compile"])
def test_casts_of_the_weight(cast, captured):
    small, dense = factorized(Casting(CASTS[cast]).eval())
    x = torch.randn(5, 12)
    capture = {
        "eager": lambda: small,
        "trace": lambda: torch.jit.trace(small, x, check_trace=False),
        "export": lambda: torch.export.export(small, (x,), strict=False).module(),
        "compile": lambda: torch.compile(small, backend="eager"),
    }
    assert_close(capture[captured]()(x), dense(x))


REFUSED = {
    "other product": lambda weight, x: x @ weight.t(),
    "scaled": lambda weight, x: functional.linear(x, weight * 2),
    "scaled in place": lambda weight, x: functional.linear(x, weight.mul_(2)),
    "some rows": lambda weight, x: functional.linear(x, weight[:6]),
    "stacked": lambda weight, x: functional.linear(x, torch.cat([weight, weight])),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("captured", [False, True])
def test_what_is_made_of_a_weight_is_refused(change, captured):
    class Changing(Reading):
        def forward(self, x):
            return REFUSED[change](self.layer.weight, self.before(x))

    small, _ = factorized(Changing().eval())
    x = torch.randn(5, 12)
    with pytest.raises((lrconvert.LrconvertError, TypeError), match=r"no weight to multiply by|CapturedStandIn"):
        torch.jit.trace(small, x) if captured else small(x)


def test_code_that_asks_whether_a_weight_is_a_tensor_is_captured_as_it_runs():
    """As T5 does, whose last layers stay in float32 beside others in half precision."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 18)

        def forward(self, x):
            weight = self.layer.weight
            return self.layer(x.to(weight.dtype) if isinstance(weight, torch.Tensor) else x)

    small = lrconvert.factorize(Asking(), "rank=3", keep_first=0, keep_last=False)
    x = torch.randn(5, 12).bfloat16()
    for graph in (torch.compile(small, backend="eager"), torch.export.export(small, (x,), strict=False).module()):
        assert_close(graph(x), small(x))


def test_symbolic_traces_keep_the_factors_as_parameters():
    small, dense = factorized(Reading().eval())
    graph = torch.fx.symbolic_trace(small)
    x = torch.randn(5, 12)
    assert_close(graph(x), dense(x))
    assert dict(graph.named_parameters()).keys() == dict(small.named_parameters()).keys()


def test_copies_stand_for_their_own_factors():
    small, _ = factorized(Reading().eval())
    small.kept = small.layer.weight
    twin = copy.deepcopy(small)
    nn.init.zeros_(twin.layer.u.weight)
    x = torch.randn(5, 12)
    assert not functional.linear(x, twin.kept).any()
    assert functional.linear(x, small.kept).any()


def test_replicas_without_parameters_of_their_own():
    """What torch.nn.DataParallel runs: modules whose tensors are plain attributes."""
    small, dense = factorized(Reading().eval())
    for module in small.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            object.__setattr__(module, name, parameter if parameter is None else parameter.detach())
    assert not list(small.parameters())
    x = torch.randn(5, 12)
    assert_close(small(x), dense(x))
