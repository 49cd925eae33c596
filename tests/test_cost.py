"""MACs against closed forms, written out; execution order; latency."""

import pytest
import torch
from torch import nn

from lrconvert.cost import trace
from lrconvert.inputs import one_input
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import factorize_module


def test_linear_and_convolution():
    assert trace(nn.Linear(30, 20), one_input((30,))).macs == 30 * 20
    assert trace(nn.Linear(30, 20), one_input((7, 30))).macs == 7 * 30 * 20
    conv = nn.Conv2d(8, 12, (3, 5), stride=2, padding=1, groups=4)
    # output 5 × 4 from 10 × 10
    assert trace(conv, one_input((8, 10, 10))).macs == 5 * 4 * 12 * (8 // 4) * 3 * 5


def test_factors_cost_what_the_formula_says():
    conv = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1))
    layer = LayerPlan(name="0", weight="0.weight", kind="conv2d", shape=(12, 8, 3, 3), rank=5)
    assert trace(conv, one_input((8, 10, 10))).macs == 25 * 12 * 72
    # the stride is on u: both factors run at the output's 5 × 5
    assert trace(factorize_module(conv, Plan(layers=(layer,))), one_input((8, 10, 10))).macs == 25 * 5 * (72 + 12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.it = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.it(x, x, x)[0]


def test_attention_is_counted_with_its_products():
    # q, k, v and output projections of 7 positions, then scores and values over 7 × 7 pairs
    assert trace(Attention(), one_input((7, 16))).macs == 4 * 7 * 16 * 16 + 2 * 7 * 7 * 16


def test_transformer_encoder_layer_is_counted():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert trace(layer, one_input((7, 16))).macs == 4 * 7 * 16 * 16 + 2 * 7 * 7 * 16 + 2 * 7 * 16 * 32


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.it = kind(16, 24, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.it(x)[0]


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_are_counted(kind, gates):
    # two layers, five steps: input and hidden products of every gate
    assert trace(Recurrent(kind), one_input((5, 16))).macs == 5 * gates * 24 * ((16 + 24) + (24 + 24))


def test_order_is_that_of_the_calls_and_modes_are_restored():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(8, 4)
            self.first = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)
            self.dropout = nn.Dropout()

        def forward(self, x):
            return self.second(self.first(self.first(self.dropout(x))))

    model = Backwards()
    model.dropout.eval()
    found = trace(model, one_input((3, 8)))
    assert list(found.positions.items()) == [("first", 6), ("second", 3)]
    assert model.training
    assert not model.dropout.training
    assert not model.first.weight.is_meta
    assert not model.first._forward_hooks


def test_modules_reached_under_two_names_keep_their_parameters():
    class Inner(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = shared.weight

        def forward(self, x):
            return self.tied(self.shared(x))

    model = nn.ModuleDict({"shared": nn.Linear(4, 4)})
    model["inner"] = Inner(model["shared"])
    model.forward = model["inner"].forward
    before = {name: parameter.clone() for name, parameter in model.named_parameters(remove_duplicate=False)}
    kept = dict(model.named_parameters(remove_duplicate=False))
    assert trace(model, one_input((3, 4))).macs == 2 * 3 * 16
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is kept[name] and torch.equal(after[name], before[name]) for name in before)


def test_what_a_forward_registers_is_gone_after_a_trace():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.ones(4, device=x.device))
            return self.linear(x) + self.cache

    model = Caching()
    trace(model, one_input((3, 4)))
    assert model(torch.randn(2, 4)).isfinite().all()


def test_fast_path_setting_is_restored():
    before = torch.backends.mha.get_fastpath_enabled()
    trace(nn.Linear(2, 2), one_input((2,)))
    assert torch.backends.mha.get_fastpath_enabled() is before
