"""Modules that own several weights, in the company they keep: encoders, their fused paths, and packed executions."""

import copy

import pytest
import torch
from helpers import assert_close
from torch import nn

import lrconvert
from lrconvert.inputs import one_input
from lrconvert.layers import packed
from lrconvert.layers.lstm_steps import LSTMSteps
from lrconvert.layers.recurrent import LowRankRecurrent


def factorized(model, **settings):
    """A factorized copy, and the dense model with the same products for weights."""
    small = lrconvert.factorize(copy.deepcopy(model), "rank=3", keep_first=0, keep_last=False, **settings)
    return small, lrconvert.merge(copy.deepcopy(small))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_and_decoder_layers_in_train_and_eval(training, norm_first):
    settings = {"nhead": 4, "dim_feedforward": 48, "batch_first": True, "norm_first": norm_first}
    encoder, decoder = nn.TransformerEncoderLayer(32, **settings), nn.TransformerDecoderLayer(32, **settings)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for layer, arguments in ((encoder, (x, mask)), (decoder, (x, memory, mask))):
        outputs = []
        for model in factorized(layer):
            torch.manual_seed(1)  # dropout
            with torch.no_grad():
                outputs.append(model.train(training)(*arguments))
        assert_close(*outputs)


def test_an_encoder_with_padding_whose_first_layer_stays_dense():
    # A dense first layer would hand nested tensors to the factorized second one.
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    small, merged = factorized(encoder, exclude=["layers.0.*"])
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        got, want = (model(x, src_key_padding_mask=padding) for model in (small, merged))
    assert_close(got[~padding], want[~padding])


def test_the_fused_encoder_path_does_not_run_on_factors(monkeypatch):
    small, _ = factorized(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval())
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
    with torch.no_grad():
        assert small(torch.randn(2, 5, 32)).shape == (2, 5, 32)


@pytest.mark.parametrize("steps", [True, False])
def test_gradients_of_a_factorized_lstm_are_those_of_its_product(monkeypatch, steps):
    monkeypatch.setattr(LowRankRecurrent, "_steps_pay", lambda *_: steps)
    small, dense = factorized(nn.LSTM(6, 8, 2, bidirectional=True).double())
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    gradients = []
    for model in (small, dense):
        output, (hidden, cell) = model(x)
        (output.sin().sum() + hidden.sum() + cell.square().sum()).backward()
        gradients.append(x.grad.clone())
        x.grad = None
    assert_close(*gradients)
    # the chain rule through W = V·U, for each gate
    factors, weight = small.hh_l0, dense.weight_hh_l0.grad.unflatten(0, (4, 8))
    v = factors.v.weight.detach().unflatten(0, (4, 8))
    assert_close(factors.u.weight.grad.unflatten(0, (4, 3)), v.mT @ weight)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_way_back_through_an_lstm_is_its_derivative(groups):
    shapes = (4, 3, 2, 5), (2, 5), (2, 5), (groups * 3, 5), (20, 3)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *given: LSTMSteps.apply(*given)[:3], inputs)
    for used in range(3):  # the others have no gradient at all
        assert torch.autograd.gradcheck(lambda *given, used=used: LSTMSteps.apply(*given)[used], inputs)


def test_gradients_through_an_lstm_can_be_differentiated_themselves():
    shapes = (4, 3, 2, 3), (2, 3), (2, 3), (4, 3), (12, 1)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(lambda *given: LSTMSteps.apply(*given)[:3], inputs)
    # a penalty on a gradient that itself was asked for without one
    (by_shares,) = torch.autograd.grad(LSTMSteps.apply(*inputs)[0].sum(), inputs[:1], create_graph=True)
    by_shares.square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_an_lstm_in_training_may_be_traced_transformed_and_have_its_outputs_changed(monkeypatch):
    monkeypatch.setattr(LowRankRecurrent, "_steps_pay", lambda *_: True)
    monkeypatch.setattr(packed, "WIDE", 1)
    small, dense = factorized(nn.LSTM(6, 8))
    x = torch.randn(5, 3, 6)

    def loss(module, one):
        return module(one.unsqueeze(1))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(lambda one: loss(small, one)), in_dims=1)(x)
    assert_close(each, torch.stack([torch.func.grad(lambda one: loss(dense, one))(one) for one in x.unbind(1)]))
    gradients = []
    for module in (small, dense):
        given = x.clone().requires_grad_()
        output = module(given)[0]
        (output.relu_() if module is small else output.relu()).square().sum().backward()
        gradients.append(given.grad)
    assert_close(*gradients)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            traced = torch.jit.trace(small.eval(), x, check_trace=False)
            assert_close(traced(2 * x)[0], dense(2 * x)[0])
    with pytest.raises(RuntimeError, match="at least one time step"):
        small(x[:0])


@pytest.mark.parametrize("joint", [True, False])
def test_gradients_of_wide_factors_are_those_of_narrow_ones(monkeypatch, joint):
    monkeypatch.setattr(LowRankRecurrent, "_steps_pay", lambda *_: True)
    small, _ = factorized(nn.LSTM(6, 8), splits={"*": 1} if joint else {})
    x = torch.randn(5, 3, 6)
    found = []
    for wide in (1, 10**9):
        monkeypatch.setattr(packed, "WIDE", wide)
        small.zero_grad()
        small(x)[0].sin().sum().backward()
        found.append([parameter.grad for parameter in small.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_kept_products_follow_their_factors():
    small, _ = factorized(nn.LSTM(6, 8).eval())
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        before = small(x)[0]
        assert torch.equal(small(x)[0], before)
        small.ih_l0.u.weight.mul_(2)
        after = small(x)[0]
        assert_close(after, lrconvert.merge(copy.deepcopy(small))(x)[0])
    assert not torch.equal(before, after)
    assert small._kept is not None
    assert copy.deepcopy(small)._kept is None


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("joint", [True, False])
def test_wide_factors_are_laid_out_once_for_inference_and_follow_what_they_are_made_of(monkeypatch, make, joint):
    monkeypatch.setattr(LowRankRecurrent, "_steps_pay", lambda *_: True)
    monkeypatch.setattr(packed, "WIDE", 8 * 3)
    small, dense = factorized(make(6, 8, 2, bidirectional=True).eval(), splits={"*": 1} if joint else {})
    x = torch.randn(5, 3, 6)
    with_gradients = small(x)[0].detach()
    assert small._kept is None
    with torch.no_grad():
        assert_close(small(x)[0], dense(x)[0])
        kept = small._kept[1]["packed"]
        assert len(kept) == 8
        assert_close(small(x)[0], with_gradients)
        assert small._kept[1]["packed"] is kept
        small.hh_l1.v.weight.data.mul_(2)
        assert_close(small(x)[0], lrconvert.merge(copy.deepcopy(small))(x)[0])
    assert small._kept[1]["packed"] is not kept
    with torch.no_grad():
        monkeypatch.setattr(packed, "WIDE", 10**9)
        small.hh_l1.v.weight.mul_(1)
        small(x)
    assert small._kept[1]["packed"] == {}


def test_a_wrong_initial_state_is_refused():
    small, _ = factorized(nn.GRU(6, 8))
    with pytest.raises(RuntimeError, match=r"the initial state has shape \[\(1, 2, 8\)\], expected \[\(1, 3, 8\)\]"):
        small(torch.randn(5, 3, 6), torch.zeros(1, 2, 8))


def test_a_split_projection_is_three_matrices():
    model = nn.ModuleDict({"qkv": nn.Linear(16, 48)})
    joint = lrconvert.make_plan(model, "rank=4", keep_first=0, keep_last=False)
    apart = lrconvert.make_plan(model, "rank=4", keep_first=0, keep_last=False, splits={"qkv": 3})
    assert (joint.layers[0].num_params_after, apart.layers[0].num_params_after) == (4 * 64, 3 * 4 * 32)
    weight = model["qkv"].weight.detach().clone()
    merged = lrconvert.merge(lrconvert.factorize(model, apart))["qkv"].weight.detach()
    for part, whole in zip(merged.chunk(3), weight.chunk(3), strict=True):
        u, s, v = torch.linalg.svd(whole)
        assert_close(part, u[:, :4] * s[:4] @ v[:4])


def test_embeddings_stay_dense_unless_asked_for():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16))
    assert [layer.name for layer in lrconvert.make_plan(model, "rank=3", keep_first=0, keep_last=False).low_rank] == [
        "1"
    ]
    plan = lrconvert.make_plan(model, "rank=3", keep_first=0, keep_last=False, include_embeddings=True)
    assert [layer.name for layer in plan.low_rank] == ["0", "1"]


def test_macs_of_a_factorized_recurrent_layer_are_those_of_its_factors():
    from lrconvert.cost import trace

    small, dense = factorized(nn.LSTM(16, 24, batch_first=True))
    assert trace(dense, one_input((5, 16))).macs == 5 * 4 * 24 * (16 + 24)
    assert trace(small, one_input((5, 16))).macs == 5 * 4 * 3 * ((16 + 24) + (24 + 24))


def test_what_is_missing_in_the_dense_module_is_missing_here():
    small, _ = factorized(nn.ModuleDict({"it": nn.Embedding(30, 16)}), include_embeddings=True)
    assert small["it"].padding_idx is None
    assert "num_embeddings=30" in repr(small)
    attention, _ = factorized(nn.MultiheadAttention(8, 2, bias=False))
    assert attention.in_proj_bias is None


@pytest.mark.parametrize(
    "product",
    [torch.mv, lambda w, x: torch.tensordot(w, x, dims=([1], [0])), lambda w, x: torch.linalg.matmul(w, x)],
)
def test_a_weight_without_data_is_never_multiplied(product):
    small, _ = factorized(nn.Sequential(nn.Linear(16, 24)))
    weight = small[0].weight
    with pytest.raises(lrconvert.LrconvertError, match="no weight to multiply by"):
        product(weight, torch.randn(16))
    x = torch.randn(2).to(weight)
    assert (x.device.type, x.dtype) == ("cpu", torch.float32)
    assert weight.t().device.type == weight.detach().device.type == "cpu"


def test_modules_that_share_a_bias_or_hold_more_stay_dense():
    one, two, three = (nn.Linear(16, 16) for _ in range(3))
    two.bias = one.bias
    three.register_buffer("scale", torch.ones(1))
    model = nn.Sequential(one, two, three, nn.Linear(16, 16))
    plan = lrconvert.make_plan(model, "rank=3", keep_first=0, keep_last=False)
    assert [layer.name for layer in plan.low_rank] == ["3"]
    assert plan.layers[0].reason == "its module shares 0.bias with 1.bias"
    lrconvert.factorize(model, plan)
    assert model[0].bias is model[1].bias


def test_what_was_frozen_stays_frozen():
    lstm = nn.LSTM(8, 8)
    lstm.weight_ih_l0.requires_grad_(False)
    lstm.bias_hh_l0.requires_grad_(False)
    small, dense = factorized(lstm)
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {"ih_l0.u.weight", "ih_l0.v.weight", "bias_hh_l0"}
    frozen = {name for name, parameter in dense.named_parameters() if not parameter.requires_grad}
    assert frozen == {"weight_ih_l0", "bias_hh_l0"}


def test_kept_products_see_changes_through_data_and_leave_autocast_alone():
    small, _ = factorized(nn.GRU(6, 8).eval())
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        before = small(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            small(x)
        assert torch.equal(small(x)[0], before)
        for parameter in small.parameters():  # biases too, which are in no product
            parameter.data.mul_(0.5)
            assert_close(small(x)[0], lrconvert.merge(copy.deepcopy(small))(x)[0])


def test_a_lazy_layer_is_one_line():
    with pytest.raises(lrconvert.LrconvertError, match="run one batch through the model first"):
        lrconvert.make_plan(nn.Sequential(nn.LazyLinear(8)), "rank=2")
