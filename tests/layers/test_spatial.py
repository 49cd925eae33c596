"""The spatial view of a convolution: (out·kh, in·kw), factorized into a convolution across and one down."""

import copy
import json

import pytest
import torch
from helpers import TOLERANCE, assert_close
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lrconvert
from lrconvert.analysis import analyze_layers
from lrconvert.checkpoints.hf_config import from_config, to_config
from lrconvert.cost import trace
from lrconvert.errors import PlanError, UsageError
from lrconvert.factorization import factorize_weight, factorizing, merging
from lrconvert.inputs import one_input
from lrconvert.layers import Layer
from lrconvert.network import open_network
from lrconvert.plan import LayerPlan, Plan
from lrconvert.rewrite import layout_of, run
from lrconvert.surgery import factorize_module, merge_module, plan_of, reshape
from lrconvert.tensors import refs_of
from lrconvert.training.frobenius import FrobeniusDecay


def decision_for(conv, rank, name="it", norm=False):
    shape = tuple(conv.weight.shape)
    return LayerPlan(
        name=name, weight=f"{name}.weight", kind="conv2d", shape=shape, rank=rank, norm=norm, view="spatial"
    )


@st.composite
def convolutions(draw):
    """An ungrouped convolution with any settings, and an input for it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = draw(pairs), draw(pairs)
    assume(kernel != (1, 1))
    padding = draw(st.one_of(st.just("same"), st.just("valid"), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    conv = nn.Conv2d(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 6)),
        kernel,
        (1, 1) if padding == "same" else draw(pairs),
        padding,
        dilation,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )
    size = draw(st.integers(7, 10)), draw(st.integers(7, 10))
    return conv, torch.randn(2, conv.in_channels, *size, dtype=conv.weight.dtype)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(convolutions(), st.booleans(), st.data())
# torch says so of an even kernel, which it pads by copying
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_the_law(drawn, full_rank, data):
    conv, x = drawn
    out, into, high, wide = conv.weight.shape
    full = min(out * high, into * wide)
    rank = full if full_rank else data.draw(st.integers(1, full))
    decision = decision_for(conv, rank)
    plan, model = Plan(layers=(decision,)), nn.ModuleDict({"it": conv})
    assert decision.layer.full_rank == full

    steps = factorizing(refs_of(model.state_dict()), plan)
    tensors = dict(run(steps))
    assert layout_of(steps) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    assert tensors["it.u.weight"].shape == (rank, into, 1, wide)
    assert tensors["it.v.weight"].shape == (out, rank, high, 1)
    assert decision.num_params_after == tensors["it.u.weight"].numel() + tensors["it.v.weight"].numel()
    reshaped = reshape(copy.deepcopy(model), plan)
    reshaped.load_state_dict(tensors, strict=True)
    live = factorize_module(copy.deepcopy(model), plan)
    assert plan_of(live) == plan
    output = live["it"](x).detach()
    assert torch.equal(output, reshaped["it"](x))
    if full_rank:
        assert_close(output, conv(x).detach(), TOLERANCE[x.dtype])

    merged = dict(run(merging(refs_of(tensors), plan)))
    back = merge_module(live)
    assert all(torch.equal(value, merged[key]) for key, value in back.state_dict().items())
    assert_close(back["it"](x).detach(), output, TOLERANCE[x.dtype])


def test_the_error_is_that_of_the_best_approximation_of_this_matrix():
    conv = nn.Conv2d(5, 7, (3, 2)).double()
    weight = conv.weight.detach()
    # written out: entry (out, row; in, column) of the matrix
    matrix = torch.stack([torch.cat([weight[o, :, row] for row in [h]], 1) for o in range(7) for h in range(3)])
    matrix = matrix.reshape(21, 10)
    tail = torch.linalg.svdvals(matrix)[4:].norm()
    u, v = factorize_weight(weight, decision_for(conv, 4)).values()
    product = torch.einsum("orh,riw->oihw", v[..., 0], u[:, :, 0])
    assert float((product - weight).norm()) == pytest.approx(float(tail), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stride", [1, (2, 1), (1, 2), 2])
def test_macs_are_predicted_as_they_are_counted(stride, batch):
    conv = nn.Conv2d(8, 12, 3, stride=stride, padding=1)
    decision = decision_for(conv, 5)
    model = nn.ModuleDict({"it": conv})
    model.forward = lambda x: model["it"](x.expand(batch, -1, -1, -1))
    found = trace(model, one_input((8, 10, 9)))
    rows, columns = (-(-10 // conv.stride[0]), -(-9 // conv.stride[1]))
    assert found.halfway == {"it": batch * 10 * columns}
    predicted = decision.layer.low_rank_macs(found.positions["it"], 5, found.halfway["it"])
    assert predicted == batch * (10 * columns * 5 * 8 * 3 + rows * columns * 12 * 5 * 3)
    del model.forward
    small = factorize_module(model, Plan(layers=(decision,)))
    small.forward = lambda x: small["it"](x.expand(batch, -1, -1, -1))
    assert trace(small, one_input((8, 10, 9))).macs == predicted
    assert decision.layer.low_rank_macs(found.positions["it"], 5) is None


def test_which_layers_are_seen_spatially():
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.ConvTranspose2d(32, 32, 3),
        nn.Flatten(),
        nn.Linear(32, 64),
    )
    plan = lrconvert.make_plan(model, "rank_ratio=0.25", view="spatial", keep_first=0, keep_last=False)
    assert {layer.name: layer.view for layer in plan.low_rank} == {
        "0": "spatial",
        "1": "channel",
        "2": "channel",
        "3": "channel",
        "5": "channel",
    }
    assert plan.layers[0].rank == 12  # a quarter of min(32·3, 16·3)
    assert from_config(to_config(plan)).low_rank[0].view == "spatial"
    assert "view" not in to_config(plan)["1.weight"]
    layer = Layer("a", "a.weight", "conv2d", (32, 16, 3, 3), view="spatial")
    assert layer.num_low_rank_params(layer.break_even_rank) < layer.num_params
    assert layer.num_low_rank_params(layer.break_even_rank + 1) >= layer.num_params


def test_the_gradient_of_frobenius_decay():
    conv = nn.Conv2d(4, 6, (3, 2)).double()
    it = factorize_module(nn.ModuleDict({"it": conv}), Plan(layers=(decision_for(conv, 3),)))["it"]
    product = torch.einsum("orh,riw->oihw", it.v.weight[..., 0], it.u.weight[:, :, 0])
    want = torch.autograd.grad(0.05 * product.square().sum(), [it.u.weight, it.v.weight])
    for factor in (it.u, it.v):
        factor.weight.grad = torch.zeros_like(factor.weight)
    FrobeniusDecay(it, 0.1).add_gradients()
    assert_close(it.u.weight.grad, want[0])
    assert_close(it.v.weight.grad, want[1])


def test_a_norm_between_is_folded_only_without_a_shift():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    model = factorize_module(nn.ModuleDict({"it": conv}), Plan(layers=(decision_for(conv, 5, norm=True),))).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        model["it"].bn.running_var.uniform_(0.5, 2)
    assert_close(merge_module(copy.deepcopy(model))["it"](x).detach(), model["it"](x).detach())
    with torch.no_grad():
        model["it"].bn.bias.normal_()
    with pytest.raises(PlanError, match="a bias, the same everywhere, cannot stand for"):
        merge_module(model)


def test_an_unknown_view_is_refused_and_an_analysis_is_of_one_view(small_model):
    with pytest.raises(UsageError, match="unknown view 'spatail': did you mean 'spatial'"):
        lrconvert.make_plan(small_model, view="spatail")
    network = open_network(small_model)
    analysis = analyze_layers(network, network.layers)
    with pytest.raises(UsageError, match="splits and views change the matrices"):
        lrconvert.make_plan(analysis, view="spatial")


def test_from_the_command_line_to_a_graph(cli, tmp_path):
    source = (
        "from torch import nn\n\ndef make():\n    first = nn.Conv2d(3, 16, 3)\n"
        "    second = nn.Conv2d(16, 24, (3, 5), stride=2, padding=(1, 2))\n"
        "    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(24 * 25, 4))\n"
    )
    (tmp_path / "net.py").write_text(source)
    model = f"{tmp_path / 'net.py'}:make"
    dense, small, graph = (tmp_path / name for name in ("dense.safetensors", "small.safetensors", "small.onnx"))
    exec(source, made := {})
    net = made["make"]()
    lrconvert.save(net, dense)
    named = ("--model", model, "--input-shape", "3,12,12")
    result = cli("factorize", dense, "-o", small, "--rank-ratio", "0.25", "--view", "spatial", *named, "--json")
    record = json.loads(result.out)
    assert {row["name"]: row["rank"] for row in record["layers"]} == {"0": None, "1": 18, "3": None}
    (shown,) = json.loads(cli("info", small, "--json").out)["low_rank"]
    assert (shown["view"], shown["norm"], shown["full_rank"]) == ("spatial", False, 72)
    # across at 10 rows × 5 columns, down at 5 × 5
    rows = {row["name"]: row for row in record["layers"]}
    assert rows["1"]["macs_after"] == 18 * (10 * 5 * 16 * 5 + 5 * 5 * 24 * 3)
    loaded = lrconvert.load(small, copy.deepcopy(net))
    assert record["num_params_after"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert record["macs_after"] == trace(loaded, one_input((3, 12, 12))).macs
    exported = json.loads(cli("export", small, "-o", graph, "--format", "onnx", *named, "--json").out)
    assert exported["difference"] < 1e-5
    found = json.loads(cli("compare", dense, small, "--json").out)["layers"]
    difference = next(row["difference"] for row in found if row["name"] == "1")
    assert difference == pytest.approx(rows["1"]["error"], abs=1e-5)
