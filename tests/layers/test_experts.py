"""Mixtures of experts beyond the law: gradients, graphs, costs, and what cannot be done with them."""

import copy

import pytest
import torch
from drawn import experts_of_gpt_oss, experts_of_mixtral
from helpers import assert_close
from torch import nn

from lrconvert.cost import trace
from lrconvert.errors import UsageError
from lrconvert.inputs import one_input
from lrconvert.layers import experts, family_of
from lrconvert.layers.experts import pairs_routed, running
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import factorize_module
from lrconvert.views import split

HIDDEN, INNER, EXPERTS, CHOSEN = 6, 5, 4, 2
BOTH = [experts_of_mixtral, experts_of_gpt_oss]


def factorized(module, rank=3):
    model = nn.ModuleDict({"it": module})
    layers = layers_of_module(model)
    plan = Plan(layers=tuple(LayerPlan.of(layer, rank) for layer in layers if not layer.dense_reason))
    assert len(plan.layers) == 2
    return factorize_module(model, plan)["it"]


def call(tokens, dtype=torch.float64):
    """Arguments for the experts: hidden states, where they go, and the shares."""
    chosen = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :CHOSEN]
    return torch.randn(tokens, HIDDEN, dtype=dtype), chosen, torch.rand(tokens, CHOSEN, dtype=dtype)


@pytest.mark.parametrize("make", BOTH)
def test_gradients(make):
    torch.manual_seed(0)
    module = factorized(make(HIDDEN, INNER, EXPERTS).double())
    x, chosen, shares = call(5)
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in module.named_parameters()}

    def run(x, shares, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x, chosen, shares))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), shares.requires_grad_(), *parameters.values()))


def test_experts_that_no_token_goes_to_get_no_gradient():
    torch.manual_seed(0)
    module = factorized(experts_of_mixtral(HIDDEN, INNER, EXPERTS).double())
    x, _, shares = call(7)
    module(x, torch.tensor([[1, 3]] * 7), shares).sum().backward()
    gradient = module.gate_up_proj.v.weight.grad
    assert gradient[[1, 3]].flatten(1).norm(dim=1).min() > 0
    assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_graph_computes_the_same(make, rank, monkeypatch):
    torch.manual_seed(0)
    module = make(HIDDEN, INNER, EXPERTS)
    module = module if rank is None else factorized(module, rank)
    arguments = call(9, torch.float32)
    with torch.no_grad(), running(module, "batched_mm"):
        want = module(*arguments)
        graph = torch.export.export(module, arguments)
        assert_close(graph.module()(*arguments), want)
        other = call(9, torch.float32)  # goes elsewhere
        assert_close(graph.module()(*other), module(*other))
        monkeypatch.setattr(experts, "captured", lambda: True)
        assert_close(module(*arguments), want)


def test_compiled_experts_compute_the_same():
    torch.manual_seed(0)
    module = factorized(experts_of_mixtral(HIDDEN, INNER, EXPERTS))
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for tokens in (9, 4):
            arguments = call(tokens, torch.float32)
            assert_close(compiled(*arguments), module(*arguments))


def test_no_tokens_and_other_precisions():
    torch.manual_seed(0)
    module = factorized(experts_of_gpt_oss(HIDDEN, INNER, EXPERTS))
    nothing = module(*call(0, torch.float32))
    assert nothing.shape == (0, HIDDEN)
    nothing.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    x, chosen, shares = call(5, torch.float32)
    want = module(x, chosen, shares)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(module(x, chosen, shares), want, 0.03)
    half = module.bfloat16()
    out = half(x.bfloat16(), chosen, shares)  # shares stay wide, as routers compute them
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), want, 0.03)


class Routed(nn.Module):
    """Every token goes to the first experts."""

    def __init__(self):
        super().__init__()
        self.it = experts_of_mixtral(HIDDEN, INNER, EXPERTS)

    def forward(self, x):
        x = x.flatten(0, 1)
        chosen = torch.arange(CHOSEN, device=x.device).expand(len(x), CHOSEN)
        return self.it(x, chosen, x.new_ones(chosen.shape))


def test_multiply_accumulates_are_those_of_the_experts_chosen():
    model, tokens = Routed(), 7
    pairs = tokens * CHOSEN
    found = trace(model, one_input((tokens, HIDDEN)))
    assert found.positions == {"it": pairs}
    dense = pairs * (2 * INNER * HIDDEN + INNER * HIDDEN)
    layers = layers_of_module(model)
    assert found.macs == dense == sum(layer.macs(pairs) for layer in layers)
    small = factorize_module(model, Plan(layers=tuple(LayerPlan.of(layer, 3) for layer in layers)))
    found = trace(small, one_input((tokens, HIDDEN)))
    assert found.positions == {"it": pairs}
    low_rank = pairs * 3 * ((2 * INNER + HIDDEN) + (HIDDEN + INNER))
    assert found.macs == low_rank == sum(layer.low_rank_macs(pairs, 3) for layer in layers)


def test_implementations_come_back():
    module = experts_of_mixtral(HIDDEN, INNER, EXPERTS, implementation="eager")
    with running(module, "batched_mm"):
        assert module.config._experts_implementation == "batched_mm"
    assert module.config._experts_implementation == "eager"


def test_what_is_no_stack_of_experts():
    assert pairs_routed(nn.Linear(3, 3), (torch.zeros(2, 3),)) is None
    module = experts_of_mixtral(HIDDEN, INNER, EXPERTS)
    with pytest.raises(UsageError, match="cannot be split in 1"):
        split(layers_of_module(module), [("gate_up_proj", 1)])
    other = copy.deepcopy(module)
    other.scale = nn.Parameter(torch.ones(3))
    assert all("changes what" in layer.dense_reason for layer in layers_of_module(other))

    class Louder(type(module)):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    module.__class__ = Louder
    assert family_of(module) is None
