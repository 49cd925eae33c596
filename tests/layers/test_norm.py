"""The BatchNorm between two factors: built, counted, saved, loaded, and folded into a dense layer again."""

import copy
import json
import math

import pytest
import torch
from drawn import cancels, modules, plans
from helpers import TOLERANCE, assert_close
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import lrconvert
from lrconvert.checkpoints.hf_config import from_config, to_config
from lrconvert.cost import trace
from lrconvert.errors import PlanError
from lrconvert.factorization import factorizing, merging
from lrconvert.inputs import one_input
from lrconvert.layers import COMPOSITE_KINDS, LAYOUTS
from lrconvert.layers.norm import EPS
from lrconvert.plan import LayerPlan, Plan
from lrconvert.rewrite import layout_of, run
from lrconvert.surgery import factorize_module, merge_module, plan_of, reshape
from lrconvert.tensors import refs_of

KINDS = sorted(LAYOUTS.keys() - COMPOSITE_KINDS - {"embedding"})
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def plan_for(module, kind, rank, groups=1, norm=True):
    """A plan for a model that is one layer."""
    shape = tuple(module.weight.shape)
    return Plan(
        layers=(LayerPlan(name="", weight="weight", kind=kind, shape=shape, groups=groups, rank=rank, norm=norm),)
    )


def trained(bn, shift=True):
    """Give `bn` the state of one that has learnt and seen something."""
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2)
        bn.running_var.uniform_(0.5, 2)
        bn.num_batches_tracked.fill_(7)
        if shift:
            bn.bias.normal_()
            bn.running_mean.normal_()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_law_with_a_norm(kind, data):
    drawn = data.draw(modules(kinds=[kind]))
    full_rank = data.draw(st.booleans())
    # One row alone cannot be normalised by its batch.
    training = drawn.call(drawn.module).dim() > 1 and data.draw(st.booleans())
    model = nn.ModuleDict({"it": drawn.module}).train(training)
    plan = data.draw(plans(drawn.module, full_rank, norm=True))

    steps = factorizing(refs_of(model.state_dict()), plan)
    tensors = dict(run(steps))
    assert layout_of(steps) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    (decision,) = plan.layers
    parameters = [key for key in tensors if key.startswith("it.") and key.endswith(("u.weight", "v.weight", "bn.bias"))]
    parameters.append("it.bn.weight")
    assert decision.num_params_after == sum(tensors[key].numel() for key in parameters)

    reshaped = reshape(copy.deepcopy(model), plan)
    reshaped.load_state_dict(tensors, strict=True)
    live = factorize_module(copy.deepcopy(model), plan)
    assert plan_of(live) == plan
    assert [name for name, _ in live["it"].named_children()] == ["u", "bn", "v"]
    assert live["it"].bn.training is training
    assert all(torch.equal(value, tensors[key]) for key, value in live.state_dict().items())
    if full_rank:
        # A norm that has seen nothing divides what lies between the factors by the root of 1 + ε, and not the bias.
        scaled = copy.deepcopy(drawn.module)
        scaled.weight.data /= math.sqrt(1 + EPS)
        expected = drawn.call(scaled).detach()
        assume(not cancels(scaled, expected))
        assert_close(drawn.call(copy.deepcopy(live).eval()["it"]), expected, TOLERANCE[drawn.dtype])
    output = drawn.call(live["it"])
    assert torch.equal(output, drawn.call(reshaped["it"]))
    assert int(live["it"].bn.num_batches_tracked) == training
    assert all(torch.equal(value, reshaped.state_dict()[key]) for key, value in live.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_running_statistics_are_folded(kind, data):
    drawn = data.draw(modules(kinds=[kind]))
    shift = data.draw(st.booleans())
    plan = data.draw(plans(drawn.module, norm=True))
    model = factorize_module(nn.ModuleDict({"it": drawn.module}), plan).eval()
    trained(model["it"].bn, shift)
    state = copy.deepcopy(model.state_dict())
    if shift and (model["it"].bias is None or kind.startswith("conv_transpose")):
        uneven = kind.startswith("conv_transpose")
        why = "a bias, the same everywhere, cannot stand for" if uneven else "a dense layer without a bias cannot add"
        with pytest.raises(PlanError, match=f"it: {why} what the BatchNorm between its factors adds"):
            merge_module(model)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        return
    output = drawn.call(model["it"]).detach()
    merged = dict(run(merging(refs_of(state), plan)))
    back = merge_module(model)
    assert all(torch.equal(value, merged[key]) for key, value in back.state_dict().items())
    assert_close(drawn.call(back["it"]).detach(), output, 10 * TOLERANCE[drawn.dtype])


def test_what_lies_between_is_normalised_channel_by_channel():
    linear = nn.Linear(12, 9)
    low_rank = factorize_module(linear, plan_for(linear, "linear", 4))
    x = torch.randn(3, 5, 12)
    narrow = low_rank.u(x)
    by_hand = (narrow - narrow.mean((0, 1))) / torch.sqrt(narrow.var((0, 1), correction=0) + 1e-5)
    assert_close(low_rank(x).detach(), low_rank.v(by_hand).detach())
    assert_close(low_rank.bn.running_mean, 0.1 * narrow.mean((0, 1)).detach())


@pytest.mark.parametrize(
    ("module", "kind", "size"),
    [(nn.Conv1d(5, 6, 3), "conv1d", (5, 9)), (nn.ConvTranspose2d(6, 5, 3), "conv_transpose2d", (6, 5, 5))],
)
def test_inputs_without_a_batch(module, kind, size):
    low_rank = factorize_module(module, plan_for(module, kind, 4)).eval()
    trained(low_rank.bn)
    x = torch.randn(size)
    assert_close(low_rank(x).detach(), low_rank(x[None])[0].detach())


def test_a_frozen_weight_gives_a_frozen_norm():
    linear = nn.Linear(12, 9)
    linear.weight.requires_grad_(False)
    low_rank = factorize_module(linear, plan_for(linear, "linear", 4))
    learning = {name for name, parameter in low_rank.named_parameters() if parameter.requires_grad}
    assert learning == {"v.bias"}


def test_macs_are_those_without_a_norm():
    counts = []
    for norm in (False, True):
        conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        counts.append(
            trace(factorize_module(conv, plan_for(conv, "conv2d", 5, norm=norm)), one_input((8, 10, 10))).macs
        )
    assert counts == [25 * 5 * (72 + 12)] * 2


def test_half_precision():
    linear = nn.Linear(12, 9).bfloat16()
    low_rank = factorize_module(linear, plan_for(linear, "linear", 4))
    assert low_rank.bn.weight.dtype == low_rank.bn.running_var.dtype == torch.bfloat16
    assert low_rank.bn.num_batches_tracked.dtype == torch.int64
    assert low_rank(torch.randn(6, 12).bfloat16()).isfinite().all()


def test_only_layers_that_can_have_it_get_it():
    model = nn.ModuleDict({"lstm": nn.LSTM(32, 32), "linear": nn.Linear(64, 64)})
    plan = lrconvert.make_plan(model, "rank=4", extra_norm=True, keep_first=0, keep_last=False)
    assert {layer.name: layer.norm for layer in plan.low_rank} == {
        "lstm.weight_ih_l0": False,
        "lstm.weight_hh_l0": False,
        "linear": True,
    }
    assert from_config(to_config(plan)).low_rank[2].norm
    assert "norm" not in to_config(plan)["lstm.weight_ih_l0"]


def test_from_the_command_line_to_a_trained_model_and_back(cli, small_model, tmp_path):
    dense, small, after = (tmp_path / name for name in ("dense.pt", "small.safetensors", "after.safetensors"))
    torch.save(small_model.state_dict(), dense)
    saved = tmp_path / "plan.json"
    job = ("factorize", dense, "-o", small, "--rank-ratio", "0.25", "--extra-bn", "--save-plan", saved, "--json")
    record = json.loads(cli(*job).out)
    keys = {f"3.bn.{name}" for name in STATE} | {"3.u.weight", "3.v.weight", "3.v.bias"}
    assert {key for key in load_file(small) if key.startswith("3.")} == keys
    again = tmp_path / "again.safetensors"
    assert cli("factorize", dense, "-o", again, "--plan", saved).code == 0
    assert all(torch.equal(value, load_file(again)[key]) for key, value in load_file(small).items())
    assert "--extra-bn would change nothing" in cli.fails(
        2, "factorize", dense, "-o", "x.pt", "--plan", saved, "--extra-bn"
    )

    model = lrconvert.load(small, copy.deepcopy(small_model)).train()
    assert record["num_params_after"] == sum(parameter.numel() for parameter in model.parameters())
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    lrconvert.save(model, after)
    loaded = lrconvert.load(after, copy.deepcopy(small_model)).eval()
    x = torch.randn(4, 3, 8, 8)
    output = model.eval()(x).detach()
    assert torch.equal(loaded(x), output)
    assert json.loads(cli("info", after, "--json").out)["num_params"] == record["num_params_after"]

    folded = tmp_path / "folded.safetensors"
    assert cli("export", after, "-o", folded, "--format", "dense").code == 0
    small_model.load_state_dict(load_file(folded))
    assert_close(small_model.eval()(x).detach(), output)
    rows = json.loads(cli("compare", after, folded, "--json").out)["layers"]
    assert {row["name"] for row in rows} == {"0", "3", "5", "6"}
    assert all(row["difference"] < 1e-6 for row in rows)


def test_a_norm_that_no_dense_layer_can_hold_leaves_no_file(cli, tmp_path):
    model = nn.Sequential(nn.Linear(30, 30, bias=False))
    lrconvert.factorize(model, "rank=4", extra_norm=True)
    trained(model[0].bn)
    lrconvert.save(model, tmp_path / "small.pt")
    line = cli.fails(1, "export", tmp_path / "small.pt", "-o", tmp_path / "dense.pt", "--format", "dense")
    assert "0: a dense layer without a bias cannot add what the BatchNorm between its factors adds" in line
    assert not (tmp_path / "dense.pt").exists()
