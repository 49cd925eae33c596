"""Factors fitted in turn: least squares against LAPACK's, and only as far as other examples agree."""

import copy

import pytest
import torch
from helpers import assert_close
from torch import nn

import lrconvert
from lrconvert import sequential
from lrconvert.errors import UsageError, WeightError
from lrconvert.inputs import Call
from lrconvert.sequential import fit_in_turn


def calls(count, *shape, dtype=torch.float64, **named):
    return [Call((torch.randn(*shape, dtype=dtype),), named, shape[0]) for _ in range(count)]


def factorized(dense, rank, **settings):
    return lrconvert.factorize(copy.deepcopy(dense), f"rank={rank}", keep_first=0, keep_last=False, **settings)


def positions(tensor):
    """(positions, channels) of images or of vectors."""
    return tensor.movedim(1, -1).flatten(0, -2)


@pytest.fixture
def unregularised(monkeypatch):
    monkeypatch.setattr(sequential, "_RIDGES", (1e-14,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda bias: nn.Linear(12, 10, bias), (40, 12)),
        (lambda bias: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias), (4, 6, 7, 7)),
        (lambda bias: nn.Conv2d(8, 12, 3, groups=2, bias=bias), (4, 8, 6, 6)),
        (lambda bias: nn.Conv1d(6, 8, 3, bias=bias), (6, 6, 11)),
    ],
)
@pytest.mark.usefixtures("unregularised")
@torch.no_grad()
def test_a_single_layer_becomes_the_least_squares_fit(layer, shape, bias):
    dense = nn.Sequential(layer(bias).double())
    # Some channels are far larger than others, which no truncation of the weight alone knows.
    sizes = torch.logspace(-1, 1, shape[1], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    examples = [Call((sizes * (1 + call.args[0]),), {}, call.size) for call in calls(4, *shape)]
    small = factorized(dense, 2)
    u = copy.deepcopy(small[0].u)
    fits = fit_in_turn(small, dense, examples)

    y, z = (torch.cat([positions(module(call.args[0])) for call in examples]) for module in (dense[0], u))
    groups = small[0].factored["weight"].groups
    want = []
    for z_group, y_group in zip(z.chunk(groups, 1), y.chunk(groups, 1), strict=True):
        known = torch.cat([z_group, torch.ones(len(z), 1)], 1) if bias else z_group
        want.append(known @ torch.linalg.lstsq(known, y_group).solution)
    got = torch.cat([positions(small(call.args[0])) for call in examples])
    assert_close(got, torch.cat(want, 1), 1e-9)
    assert torch.equal(small[0].u.weight, u.weight)
    assert fits["0"].error_after < fits["0"].error_before


def test_layers_behind_others_learn_from_what_these_give():
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)).double()
    small = factorized(dense, 6)
    before = copy.deepcopy(small)
    sizes = torch.logspace(-1, 0.5, 16, dtype=torch.float64)
    fits = fit_in_turn(small, dense, [Call((sizes * (1 + call.args[0]),), {}, 64) for call in calls(8, 64, 16)])
    assert list(fits) == ["0", "2"]  # the last would not shrink
    x = sizes * (1 + torch.randn(2000, 16, dtype=torch.float64))
    with torch.no_grad():
        errors = [float((model(x) - dense(x)).norm() / dense(x).norm()) for model in (before, small)]
    assert errors[1] < 0.6 * errors[0]
    assert all(fit.error_after <= fit.error_before for fit in fits.values())


def test_what_examples_that_did_not_fit_reject_is_left_alone():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 10)).double()
    first, *rest = calls(4, 40, 12)
    small = factorized(dense, 3)
    # The quarter that chooses has inputs that the factors already are the best for: any change makes those worse.
    exact = torch.linalg.pinv(small[0].u.weight @ small[0].u.weight.mT)
    inside = (torch.randn(40, 3, dtype=torch.float64) @ exact @ small[0].u.weight).detach()
    before = copy.deepcopy(small.state_dict())
    fits = fit_in_turn(small, dense, [Call((inside,), {}, 40), *rest])
    assert fits["0"].error_after == fits["0"].error_before == pytest.approx(0, abs=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert fit_in_turn(small, dense, [first, *rest])["0"].error_after < 1


class Tokens(nn.Module):
    """Three layers with one input, another behind them, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.log = []

    def forward(self, x, attention_mask=None):
        self.log.append("run")
        return self.out(self.out(self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)))


def test_one_pass_for_layers_with_one_input_and_all_calls_of_a_shared_one():
    dense = Tokens().double()
    small = factorized(dense, 3)
    examples = calls(4, 6, 5, 8)
    assert list(fit_in_turn(small, dense, examples)) == ["q", "k", "v", "out"]
    # A look at what runs when, and two steps on four calls.
    assert (len(small.log), len(dense.log)) == (9, 8)


def test_hidden_tokens_do_not_matter():
    dense = Tokens().double()
    clean = calls(4, 6, 5, 8)
    mask = (torch.rand(6, 5) > 0.4).long()
    dirty = [Call((torch.where(mask[..., None] == 1, call.args[0], 1e3),), {}, 6) for call in clean]
    fitted = []
    for examples in (clean, dirty):
        small = factorized(dense, 3)
        fit_in_turn(small, dense, [Call(call.args, {"attention_mask": mask}, 6) for call in examples])
        fitted.append(small.state_dict())
    assert all(torch.equal(tensor, fitted[1][name]) for name, tensor in fitted[0].items())


def test_recurrent_and_transposed_layers_stay_as_they_are():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm = nn.ConvTranspose1d(6, 9, 3), nn.LSTM(9, 20, batch_first=True)
            self.head = nn.Linear(20, 20)

        def forward(self, x):
            return self.head(self.lstm(self.conv(x).mT)[0])

    dense = Mixed()
    small = factorized(dense, 2, include=["*"])
    before = copy.deepcopy(small.state_dict())
    assert list(fit_in_turn(small, dense, calls(2, 3, 6, 7, dtype=torch.float32))) == ["head"]
    changed = {name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= {"head.v.weight", "head.v.bias"}


class Fire(nn.Module):
    """Two layers with one input, what the first returns being changed in place before the second runs."""

    def __init__(self, in_place):
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(12, 10)
        self.in_place = in_place

    def forward(self, x):
        first = self.first(x)
        first = first.relu_().mul_(3) if self.in_place else first.relu() * 3
        return first + self.second(x)


def test_what_is_changed_in_place_later_is_seen_as_it_was():
    dense = Fire(in_place=True).double()
    plain = Fire(in_place=False).double()
    plain.load_state_dict(dense.state_dict())
    examples = calls(6, 50, 12)
    fitted = []
    for network in (dense, plain):
        small = factorized(network, 2)
        fit_in_turn(small, network, examples)
        fitted.append(small.state_dict())
    assert all(torch.equal(tensor, fitted[1][name]) for name, tensor in fitted[0].items())


def test_an_input_that_was_changed_in_place_is_another_one():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            x = x + 0
            x += self.a(x).tanh()
            return self.b(x)

    small = factorized(Residual(), 2)
    assert sequential._steps(small, calls(1, 4, 12, dtype=torch.float32)[0]) == [{"a": 1}, {"b": 1}]


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_the_activations_does_not_matter(scale):
    sizes = torch.logspace(-1, 1, 12, dtype=torch.float64)
    examples = [Call((sizes * (1 + call.args[0]),), {}, 40) for call in calls(4, 40, 12)]
    dense = nn.Sequential(nn.Linear(12, 10)).double()
    scaled = copy.deepcopy(dense)
    with torch.no_grad():
        scaled[0].bias *= scale
    errors = []
    for network, factor in ((dense, 1), (scaled, scale)):
        small = factorized(network, 2)
        given = [Call((factor * call.args[0],), {}, 40) for call in examples]
        errors.append(fit_in_turn(small, network, given)["0"].error_after)
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_embeddings_stay_as_they_are():
    dense = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16))
    small = factorized(dense, 4, include_embeddings=True)
    assert type(small[0]).__name__ == "LowRankEmbedding"
    before = copy.deepcopy(small[0].state_dict())
    examples = [Call((torch.randint(10, (8, 5)),), {}, 8) for _ in range(4)]
    assert list(fit_in_turn(small, dense, examples)) == ["1"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in small[0].state_dict().items())


def test_experts_that_see_other_tokens_in_both_networks_stay_as_they_are():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.one, self.two, self.last = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x):
            chosen = self.gate(x).sum(1) > 0
            out = x.clone()
            out[chosen], out[~chosen] = self.one(x[chosen]), self.two(x[~chosen])
            return self.last(out)

    torch.manual_seed(0)
    dense = Experts()
    small = factorized(dense, 2)
    assert list(fit_in_turn(small, dense, calls(4, 200, 12, dtype=torch.float32))) == ["gate", "last"]


def test_encoder_layers_of_torch_with_padding():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, attention_mask):
            return self.encoder(x, src_key_padding_mask=attention_mask == 0)

    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    dense = Encoder().eval()
    small = factorized(dense, 4)
    fits = fit_in_turn(small, dense, [Call((torch.randn(2, 4, 16),), {"attention_mask": mask}, 2) for _ in range(4)])
    assert "encoder.layers.1.linear2" in fits


def test_layers_called_by_keyword():
    from transformers.pytorch_utils import Conv1D

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Conv1D(10, 12)

        def forward(self, x):
            return self.layer(x=x)

    dense = Keyword()
    assert list(fit_in_turn(factorized(dense, 2), dense, calls(4, 5, 6, 12, dtype=torch.float32))) == ["layer"]


def test_outputs_that_are_not_finite_name_the_layer():
    dense = nn.Sequential(nn.Linear(12, 10))
    small = factorized(dense, 2)
    examples = calls(4, 5, 12, dtype=torch.float32)
    examples[1].args[0][0, 0] = torch.nan
    with pytest.raises(WeightError, match="0: its outputs are NaN"):
        fit_in_turn(small, dense, examples)


def test_one_batch_cannot_be_told_from_chance():
    dense = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(UsageError, match="two batches"):
        fit_in_turn(factorized(dense, 2), dense, calls(1, 4, 12))
