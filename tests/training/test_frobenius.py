"""Frobenius decay against autograd of ½λ‖V·U‖², the product formed by the function that merges factors."""

import pytest
import torch
from helpers import assert_close
from torch import nn

from lrconvert.errors import UsageError
from lrconvert.factorization import merge_weight
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import factorize_module, plan_of
from lrconvert.training.frobenius import FrobeniusDecay, factor_parameters

MODULES = {
    "linear": lambda: nn.Linear(12, 9),
    "grouped convolution": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "transposed convolution": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
    "3d convolution": lambda: nn.Conv3d(4, 6, 2),
    "embedding": lambda: nn.Embedding(20, 8),
    "lstm": lambda: nn.LSTM(6, 8, num_layers=2, proj_size=3),
    "attention": lambda: nn.MultiheadAttention(12, 3),
    "attention of other widths": lambda: nn.MultiheadAttention(12, 3, kdim=7, vdim=5),
}


def factorized(module, rank=2):
    """`module`, factorized as `it`, in float64, every parameter with a random gradient."""
    model = nn.ModuleDict({"it": module}).double()
    layers = [layer for layer in layers_of_module(model) if layer.guess or not layer.dense_reason]
    plan = Plan(layers=tuple(LayerPlan.of(layer, rank) for layer in layers))
    factorize_module(model, plan)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def by_autograd(model, coefficient):
    """Name to gradient of ½λ Σ‖V·U‖² over every factorized weight."""
    parameters = dict(model.named_parameters())
    loss = 0.0
    for layer in plan_of(model).layers:
        product = merge_weight(parameters[layer.key("u")], parameters[layer.key("v")], layer)
        loss = loss + coefficient / 2 * product.square().sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: each for name, each in zip(parameters, gradients, strict=True) if each is not None}


@pytest.mark.parametrize("kind", MODULES)
def test_gradient_is_that_of_the_product_and_is_added(kind):
    model = factorized(MODULES[kind]())
    want = by_autograd(model, 0.3)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    FrobeniusDecay(model, 0.3).add_gradients()
    assert want
    for name, parameter in model.named_parameters():
        if name in want:
            assert_close(parameter.grad - before[name], want[name])
        else:
            assert torch.equal(parameter.grad, before[name])
    named = dict(model.named_parameters())
    assert factor_parameters(model) == {named[name] for name in want}


def test_channels_last_weights_have_the_same_gradient():
    model = factorized(nn.Conv2d(8, 12, 3)).to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert not model["it"].u.weight.is_contiguous()
    want = by_autograd(model, 0.1)
    FrobeniusDecay(model, 0.1).add_gradients()
    for factor in ("u", "v"):
        assert_close(model["it"].get_submodule(factor).weight.grad, want[f"it.{factor}.weight"])


def test_factors_that_do_not_learn_are_skipped():
    model = factorized(nn.Linear(12, 9))
    it = model["it"]
    it.u.weight.requires_grad_(False)
    frozen = it.u.weight.grad.clone()
    before = it.v.weight.grad.clone()
    FrobeniusDecay(model, 0.1).add_gradients()
    assert torch.equal(it.u.weight.grad, frozen)
    assert not torch.equal(it.v.weight.grad, before)
    it.v.weight.grad = None
    FrobeniusDecay(model, 0.1).add_gradients()
    assert it.v.weight.grad is None


def test_the_product_decays_as_one_weight_would():
    # A balanced pair (VᵀV = UUᵀ) of a gradient-free loss shrinks: one small step of gradient descent takes
    # 2·step·λ·W·(WᵀW)^½ off the product, W = V·U: its singular values σ become σ − 2·step·λ·σ².
    model = factorized(nn.Linear(9, 9), rank=9)
    u, v = model["it"].u.weight, model["it"].v.weight
    before = torch.linalg.svdvals(v @ u).detach()
    u.grad, v.grad = torch.zeros_like(u), torch.zeros_like(v)
    FrobeniusDecay(model, 0.5).add_gradients()
    step = 1e-6
    with torch.no_grad():
        u -= step * u.grad
        v -= step * v.grad
    after = torch.linalg.svdvals(v @ u).detach()
    assert_close((before - after) / step, before.square(), 1e-4)


def test_a_batch_norm_between_the_factors_is_refused():
    layer = LayerPlan(name="", weight="weight", kind="linear", shape=(9, 12), rank=2, norm=True)
    model = factorize_module(nn.Linear(12, 9), Plan(layers=(layer,)))
    assert factor_parameters(model) == {model.u.weight, model.v.weight}
    with pytest.raises(UsageError, match="exclude each other"):
        FrobeniusDecay(model, 0.1)


def test_a_dense_model_has_no_factors_and_a_negative_coefficient_is_refused():
    assert factor_parameters(nn.Linear(3, 3)) == set()
    with pytest.raises(UsageError, match=r"must be 0 or more, not -0\.1"):
        FrobeniusDecay(nn.Linear(3, 3), -0.1)
    with pytest.raises(UsageError, match="not nan"):
        FrobeniusDecay(nn.Linear(3, 3), float("nan"))
