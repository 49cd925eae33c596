"""The law: reshape-then-load equals factorize-the-state-dict, and at full rank it equals the dense model.

Tested for every layer kind over drawn shapes, strides, paddings, dilations, groups and biases.
"""

import copy

import pytest
import torch
from drawn import KINDS, cancels, modules, plans
from helpers import TOLERANCE, assert_close
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lrconvert
from lrconvert.errors import PlanError
from lrconvert.factorization import factorizing, merging
from lrconvert.layers import LowRank, packed
from lrconvert.layers.recurrent import LowRankRecurrent
from lrconvert.plan import LayerPlan, Plan
from lrconvert.rewrite import layout_of, run
from lrconvert.surgery import factorize_module, merge_module, plan_of, reshape
from lrconvert.tensors import refs_of


def plan_for(model, name, kind, groups, rank):
    weight = model.get_submodule(name).weight
    key = f"{name}.weight" if name else "weight"
    layer = LayerPlan(name=name, weight=key, kind=kind, shape=tuple(weight.shape), groups=groups, rank=rank)
    return Plan(layers=(layer,))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_law(kind, data):
    drawn = data.draw(modules(kinds=[kind]))
    full_rank, training, steps = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.booleans())
    model = torch.nn.ModuleDict({"it": drawn.module}).train(training)
    plan = data.draw(plans(drawn.module, full_rank))
    dense_output = drawn.call(model["it"]).detach()

    # the tensors, and a model that was reshaped and loaded with them
    tensors = dict(run(factorizing(refs_of(model.state_dict()), plan)))
    reshaped = reshape(copy.deepcopy(model), plan)
    reshaped.load_state_dict(tensors, strict=True)
    # the live model
    live = factorize_module(copy.deepcopy(model), plan)
    assert isinstance(live["it"], LowRank)
    assert live["it"].training is training
    assert plan_of(live) == plan
    with pytest.MonkeyPatch.context() as patch:
        # Both executions of a recurrent layer must obey, whichever would be chosen.
        patch.setattr(LowRankRecurrent, "_steps_pay", lambda *_: steps)
        # Without gradients its factors are laid out for oneDNN, which only wide ones are.
        patch.setattr(packed, "WIDE", 1)
        output = drawn.call(live["it"]).detach()
        assert torch.equal(output, drawn.call(reshaped["it"]).detach())
        assume(output.any())  # an RNN of ReLUs may answer with nothing but zeros
        assume(not cancels(drawn.module, output))
        with torch.no_grad():
            assert_close(drawn.call(live["it"]), output)

    # the merged tensors, and the dense model with them
    merged = dict(run(merging(refs_of(tensors), plan)))
    dense = copy.deepcopy(model)
    dense.load_state_dict(merged, strict=True)
    assert_close(output, drawn.call(dense["it"]).detach(), TOLERANCE[drawn.dtype])
    back = merge_module(copy.deepcopy(live))
    assert type(back["it"]) is type(drawn.module)
    assert all(torch.equal(value, merged[key]) for key, value in back.state_dict().items())
    assert torch.equal(drawn.call(back["it"]), drawn.call(dense["it"]))
    if full_rank:
        assert_close(output, dense_output, TOLERANCE[drawn.dtype])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(modules(), st.data())
def test_announced_layout_and_sizes_are_what_is_made(drawn, data):
    model = torch.nn.ModuleDict({"it": drawn.module})
    plan = data.draw(plans(drawn.module))
    steps = factorizing(refs_of(model.state_dict()), plan)
    tensors = dict(run(steps))
    assert layout_of(steps) == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    for decision in plan.layers:
        assert decision.num_params_after == sum(tensors[decision.key(factor)].numel() for factor in ("u", "v"))


@pytest.mark.parametrize("groups", [1, 4])
def test_low_rank_module_answers_like_the_dense_one(groups):
    conv = torch.nn.Conv2d(8, 12, (3, 5), stride=2, padding=1, dilation=2, groups=groups)
    low_rank = factorize_module(
        torch.nn.ModuleDict({"it": conv}), plan_for(torch.nn.ModuleDict({"it": conv}), "it", "conv2d", groups, 2)
    )["it"]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(low_rank, name) == getattr(conv, name)
    assert low_rank.weight.shape == conv.weight.shape
    assert low_rank.weight.dtype == conv.weight.dtype
    assert low_rank.weight.is_meta
    assert torch.equal(low_rank.bias, conv.bias)
    assert low_rank.rank == 2
    assert low_rank.u.stride == conv.stride
    assert low_rank.v.stride == (1, 1)
    assert "rank=2" in repr(low_rank)

    linear = torch.nn.Linear(7, 9)
    root = factorize_module(linear, plan_for(linear, "", "linear", 1, 3))
    assert (root.in_features, root.out_features, root.rank) == (7, 9, 3)
    assert list(root.state_dict()) == ["u.weight", "v.weight", "v.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_keep_their_dtype(dtype):
    weight = torch.randn(40, 50).to(dtype)
    model = torch.nn.ModuleDict({"it": torch.nn.Linear(50, 40)}).to(dtype)
    model["it"].weight.data = weight.clone()
    plan = plan_for(model, "it", "linear", 1, 40)
    tensors = dict(run(factorizing(refs_of(model.state_dict()), plan)))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    merged = dict(run(merging(refs_of(tensors), plan)))
    assert_close(merged["it.weight"], weight)


def test_other_tensors_come_through_untouched():
    odd = {
        "it.weight": torch.randn(8, 9),
        "it.bias": torch.randn(8),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "bf16": torch.randn(5).bfloat16(),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "transposed": torch.randn(4, 6).T,
    }
    layer = LayerPlan(name="it", weight="it.weight", kind="linear", shape=(8, 9), rank=2)
    made = dict(run(factorizing(refs_of(odd), Plan(layers=(layer,)))))
    assert set(made) == {*odd, "it.u.weight", "it.v.weight", "it.v.bias"} - {"it.weight", "it.bias"}
    for key in set(odd) - {"it.weight", "it.bias"}:
        assert made[key].dtype == odd[key].dtype
        assert torch.equal(
            made[key].contiguous().view(torch.uint8) if made[key].dim() else made[key],
            odd[key].contiguous().view(torch.uint8) if odd[key].dim() else odd[key],
        )
    assert torch.equal(made["it.v.bias"], odd["it.bias"])


def test_gradients_and_frozen_weights_are_kept():
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    model[1].requires_grad_(False)
    lrconvert.factorize(model, "rank=4", keep_first=0, keep_last=False)
    assert all(parameter.requires_grad for parameter in model[0].parameters())
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    model(torch.randn(3, 20)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model[0].parameters())


def test_plan_of_a_factorized_model_is_its_plan():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(64, 32))
    wanted = Plan(
        layers=(
            LayerPlan(name="0", weight="0.weight", kind="conv2d", shape=(16, 4, 3, 3), groups=2, rank=3),
            LayerPlan(name="2", weight="2.weight", kind="linear", shape=(32, 64), rank=5),
        )
    )
    assert plan_of(factorize_module(model, wanted)) == wanted
    assert plan_of(merge_module(model)) == Plan(layers=())


def test_nothing_changes_when_a_plan_does_not_fit():
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    good = LayerPlan(name="0", weight="0.weight", kind="linear", shape=(20, 20), rank=3)
    for change, message in (
        ({"name": "2", "weight": "2.weight"}, "2"),
        ({"shape": (20, 21)}, "the plan says"),
        ({"kind": "conv2d"}, "the plan says conv2d"),
    ):
        bad = good.model_copy(update={"name": "1", "weight": "1.weight"} | change)
        with pytest.raises(PlanError, match=message):
            reshape(model, Plan(layers=(good, bad)))
        assert [type(layer) for layer in model] == [torch.nn.Linear, torch.nn.Linear]


def test_merging_tensors_that_do_not_match_the_plan_is_refused():
    layer = LayerPlan(name="it", weight="it.weight", kind="linear", shape=(8, 9), rank=2)
    with pytest.raises(PlanError, match=r"it\.v\.weight: the plan expects shape \(8, 2\), the checkpoint has nothing"):
        merging(refs_of({"it.u.weight": torch.zeros(2, 9)}), Plan(layers=(layer,)))
