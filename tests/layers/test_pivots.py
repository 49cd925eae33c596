"""Pivoted factors: the same product in fewer numbers, and the modules that multiply by it."""

import copy
import warnings

import pytest
import torch
from helpers import TOLERANCE, assert_close, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import lrconvert
from lrconvert.errors import PlanError, UsageError, WeightError
from lrconvert.factorization import factorizing
from lrconvert.inputs import Call
from lrconvert.layers import Layer
from lrconvert.layers import pivoted as modules
from lrconvert.layers.pivoted import PivotedLinear
from lrconvert.layers.pivots import pivot, with_pivots
from lrconvert.models.zoo.digits_cnn import DigitsCNN
from lrconvert.plan import LayerPlan, Plan
from lrconvert.rewrite import run
from lrconvert.surgery import factorize_module, merge_module
from lrconvert.tensors import refs_of
from lrconvert.training.frobenius import FrobeniusDecay
from lrconvert.views import can_pivot


def without_pivots(right, order, rank):
    """The columns (groups, rows, columns − rank) of `right` (groups, rows, columns) that are not pivots."""
    return torch.stack([each[:, kept[rank:].long()] for each, kept in zip(right, order, strict=True)])


def decision(module, rank, kind="linear", **settings):
    """For a model that is one layer, pivoted."""
    shape = tuple(module.weight.shape)
    return LayerPlan(name="", weight="weight", kind=kind, shape=shape, rank=rank, pivoted=True, **settings)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_product_stays_and_no_coefficient_is_large(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    groups, rows, columns = (data.draw(st.integers(1, most)) for most in (3, 40, 40))
    rank = data.draw(st.integers(1, min(rows, columns)))
    true_rank = data.draw(st.integers(1, rank))  # a weight may have less than it was asked for
    left = torch.randn(groups, rows, true_rank, dtype=torch.float64) @ torch.randn(true_rank, rank, dtype=torch.float64)
    right = torch.randn(groups, rank, columns, dtype=torch.float64)
    # Graded, as the factors of a weight are.
    right *= 10.0 ** -(data.draw(st.floats(0, 8)) ** torch.linspace(0, 1, rank, dtype=torch.float64)[:, None])
    kept, rest, order = pivot(left, right)
    assert kept.shape == left.shape
    assert rest.shape == (groups, rank, columns - rank)
    assert (order.dtype, order.shape) == (torch.int32, (groups, columns))
    assert all(sorted(each) == list(range(columns)) for each in order.tolist())
    assert_close(kept @ with_pivots(rest, order), left @ right, 1e-11)
    assert not rest.numel() or float(rest.abs().max()) <= 1.5 + 1e-9
    # The pivots of the product are columns of it.
    assert_close(kept, (left @ right).gather(2, order.long()[:, None, :rank].expand(-1, rows, -1)), 1e-11)
    assert torch.equal(without_pivots(with_pivots(rest, order), order, rank), rest)


def test_elimination_alone_would_leave_large_coefficients():
    # Kahan's and Wilkinson's examples grow under partial pivoting: the last column of this one doubles row by row.
    size = 24
    growing = torch.eye(size) - torch.ones(size, size).tril(-1)
    growing[:, -1] = 1
    right = torch.cat([growing, torch.eye(size)]).double().mT[None]
    rest = pivot(torch.eye(size)[None], right)[1]
    assert float(rest.abs().max()) <= 1.5


def test_a_zero_weight_has_pivots_too():
    kept, rest, order = pivot(torch.zeros(1, 5, 2), torch.zeros(1, 2, 7))
    assert not kept.any()
    assert torch.isfinite(rest).all()
    assert sorted(order[0].tolist()) == list(range(7))


@pytest.mark.parametrize("rank", [1, 40, 99])
def test_linear_layer_holds_fewer_numbers_than_plain_factors(rank):
    linear = nn.Linear(100, 120)
    plan = Plan(layers=(decision(linear, rank),))
    low_rank = factorize_module(copy.deepcopy(linear), plan)
    plain = factorize_module(
        copy.deepcopy(linear), Plan(layers=(plan.layers[0].model_copy(update={"pivoted": False}),))
    )
    assert list(low_rank.state_dict()) == ["u.weight", "u.order", "v.weight", "v.bias"]
    x = torch.randn(3, 5, 100)
    assert_close(low_rank(x), plain(x))
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (plain, low_rank)]
    assert sizes[0] - sizes[1] == rank**2
    assert sizes[1] - 120 == plan.layers[0].num_params_after == rank * (100 + 120 - rank) < 100 * 120
    assert low_rank.u.weight.grad_fn is None
    low_rank(x).square().sum().backward()
    assert low_rank.u.weight.grad.any()


@pytest.mark.parametrize(("dims", "channels_last"), [(1, False), (2, False), (2, True), (3, False)])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2}, {"padding": 1, "stride": 3}, {"padding": 1, "padding_mode": "replicate"}, {"padding": "same"}],
    ids=str,
)
def test_convolution_of_kernel_1(dims, channels_last, batched, settings):
    order = torch.channels_last if channels_last else torch.contiguous_format
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](9, 12, 1, **settings)
    x = torch.randn(*([2] if batched else []), 9, *range(5, 5 + dims))
    conv, x = conv.to(memory_format=order), x.to(memory_format=order) if batched else x
    kept = decision(conv, 7, f"conv{dims}d")
    low_rank = factorize_module(copy.deepcopy(conv), Plan(layers=(kept,)))
    merged = merge_module(copy.deepcopy(low_rank))
    assert type(merged) is type(conv)
    assert_close(low_rank(x), merged(x))
    assert kept.num_params_after == sum(parameter.numel() for parameter in low_rank.parameters()) - 12
    if batched:
        assert low_rank(x).is_contiguous(memory_format=order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits_costs_a_few_times_that_of_plain_factors(dtype):
    weight = with_spectrum(150, 200, torch.linspace(0, -3, 150).exp().double() ** 2, torch.float32)
    model = nn.Linear(200, 150).to(dtype)
    model.weight.data = weight.to(dtype)
    low = model.weight.detach().double()
    u, singular, v = torch.linalg.svd(low, full_matrices=False)
    best = u[:, :60] * singular[:60] @ v[:60]
    errors = []
    for pivoted in (False, True):
        plan = Plan(layers=(decision(model, 60).model_copy(update={"pivoted": pivoted}),))
        tensors = dict(run(factorizing(refs_of(model.state_dict()), plan)))
        right = tensors["u.weight"].double()
        if pivoted:
            right = with_pivots(right[None], tensors["u.order"])[0]
        assert tensors["u.weight"].dtype == tensors["v.weight"].dtype == dtype
        errors.append(float((tensors["v.weight"].double() @ right - best).norm() / best.norm()))
    assert 0 < errors[1] < 4 * errors[0]
    assert errors[0] < TOLERANCE[dtype]


def test_which_layers_can_be_pivoted():
    def can(kind, shape, **settings):
        return can_pivot(Layer("a", "a.weight", kind, shape, **settings))

    assert can("linear", (8, 6))
    assert can("linear", (9, 6), groups=3)
    assert can("transposed_linear", (8, 6))
    assert can("attention", (18, 6), groups=3)
    assert can("conv2d", (8, 6, 1, 1))
    assert can("conv1d", (8, 6, 1))
    assert not can("conv2d", (8, 6, 3, 3))
    assert not can("conv2d", (8, 6, 1, 1), groups=2)
    assert not can("conv_transpose2d", (8, 6, 1, 1))
    assert not can("embedding", (8, 6))
    assert not can("lstm", (8, 6), groups=4)
    conv = nn.Conv2d(6, 8, 3)
    with pytest.raises(PlanError, match="the factors of this conv2d cannot be pivoted"):
        factorize_module(conv, Plan(layers=(decision(conv, 3, "conv2d"),)))


@settings(deadline=None)
@given(rows=st.integers(1, 60), columns=st.integers(1, 60), groups=st.integers(1, 3), norm=st.booleans())
def test_break_even_of_pivoted_factors(rows, columns, groups, norm):
    layer = Layer("a", "a.weight", "linear", (groups * rows, columns), groups, pivoted=True, norm=norm)

    def numbers(rank):  # an entry of the order takes the room of two
        return groups * (rank * (rows + columns - rank) + 2 * rank * norm + 2 * columns)

    shrinking = [rank for rank in range(1, min(rows, columns) + 1) if numbers(rank) < layer.num_params]
    assert layer.break_even_rank == max(shrinking, default=0)


def factor(rank=9, columns=40, groups=1):
    """A first factor with random numbers and order."""
    made = PivotedLinear(columns, rank, groups)
    nn.init.normal_(made.weight)
    made.order.copy_(torch.stack([torch.randperm(columns) for _ in range(groups)]))
    return made


@pytest.mark.parametrize("multiplies", [True, False])
def test_either_way_to_run_it_is_the_plain_product(multiplies, monkeypatch):
    monkeypatch.setattr(modules, "_multiplies_pivots", lambda *_: multiplies)
    first = factor(groups=2)
    plain = first.whole().detach()
    # Some numbers of it are the identity's, all others those that are stored.
    assert sorted(plain.flatten().tolist()) == sorted(
        first.weight.flatten().tolist() + 2 * (9 * [1.0] + (81 - 9) * [0.0])
    )
    for x in (torch.randn(2500, 40), torch.randn(2, 7, 40), torch.randn(40)):
        assert_close(first(x), functional.linear(x, plain))
    x = torch.randn(30, 40, requires_grad=True)
    twin = plain.clone().requires_grad_()
    coefficients = torch.randn(30, 18)
    (first(x) * coefficients).sum().backward()
    (functional.linear(x.detach(), twin) * coefficients).sum().backward()
    assert_close(x.grad, coefficients @ plain)
    assert_close(first.weight.grad, without_pivots(twin.grad.unflatten(0, (2, 9)), first.order, 9).flatten(0, 1))


@pytest.mark.parametrize(("rank", "rows", "multiplies"), [(9, 200, True), (90, 200, False), (9, 9, False)])
def test_pivots_are_multiplied_where_copying_inputs_would_take_longer(rank, rows, multiplies, monkeypatch):
    seen = []
    monkeypatch.setattr(modules, "with_pivots", lambda *args: seen.append(1) or with_pivots(*args))
    factor(rank, 100)(torch.randn(rows, 100))
    assert bool(seen) is multiplies


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_graphs_hold_what_is_stored(kind):
    layer = nn.Linear(48, 40) if kind == "linear" else nn.Conv2d(48, 40, 1, stride=2)
    plan = Plan(layers=(decision(layer, 8, "linear" if kind == "linear" else "conv2d"),))
    model = factorize_module(layer, plan).eval()
    x = torch.randn(100, 48) if kind == "linear" else torch.randn(2, 48, 12, 12)
    want = model(x)
    exported = torch.export.export(model, (x,), strict=False)
    assert exported.state_dict.keys() == model.state_dict().keys()
    assert not any("argsort" in str(node.target) for node in exported.graph.nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that traces are old
        traced = torch.jit.trace(model, x)
    for graph in (exported.module(), torch.compile(model, backend="eager", fullgraph=True), traced):
        assert_close(graph(x), want)
    assert_close(torch.fx.symbolic_trace(nn.Sequential(model))(x), want)
    assert_close(torch.func.vmap(model)(x[None])[0], want)


def test_mixed_precision():
    model = factorize_module(nn.Linear(48, 40), Plan(layers=(decision(nn.Linear(48, 40), 30),)))
    x = torch.randn(100, 48)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), want, TOLERANCE[torch.bfloat16])


def test_a_budget_of_parameters_buys_higher_ranks():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)), nn.Unflatten(1, (8, 8)), nn.Conv1d(8, 8, 3))
    plain, better = (
        lrconvert.make_plan(model, param_ratio=0.6, device="cpu", **settings) for settings in ({}, {"pivoted": True})
    )
    assert not any(layer.pivoted for layer in plain.layers)
    assert {layer.name for layer in better.layers if layer.pivoted} == {layer.name for layer in better.low_rank} - {"6"}
    total = [sum(layer.error**2 for layer in plan.low_rank) / len(plan.low_rank) for plan in (plain, better)]
    assert total[1] < total[0]
    small = lrconvert.factorize(copy.deepcopy(model), better)
    before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, small))
    assert after == before - better.saved_params
    assert after / before == pytest.approx(better.target.reached)
    assert 0.594 < better.target.reached <= 0.6


def test_what_is_written_is_smaller(tmp_path, monkeypatch):
    """Also where the weights take two bytes, and the order of columns four each."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(3))).bfloat16()
    lrconvert.save(model, "dense.safetensors")
    layer = Layer("1", "1.weight", "linear", (40, 40), pivoted=True)
    plan = Plan(layers=(LayerPlan.of(layer, layer.break_even_rank),))
    lrconvert.save(lrconvert.factorize(model, plan), "small.safetensors")
    sizes = [sum(tensor.nbytes for tensor in load_file(f"{name}.safetensors").values()) for name in ("dense", "small")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("damage", ["twice", "outside", "rounded"])
def test_a_damaged_order_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(3)))
    small = lrconvert.factorize(copy.deepcopy(model), "rank=9", pivoted=True)
    lrconvert.save(small, "small.safetensors")
    with safe_open("small.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    order = tensors["1.u.order"]
    if damage == "rounded":
        tensors["1.u.order"] = order.bfloat16()
    else:
        order[0, 0] = order[0, 1] if damage == "twice" else 300
    save_file(tensors, "damaged.safetensors", metadata)
    with pytest.raises(lrconvert.LrconvertError, match=r"1\.u\.order is not an order of 300 columns"):
        lrconvert.load("damaged.safetensors", model)
    with pytest.raises(lrconvert.LrconvertError, match=r"1\.u\.order"):
        lrconvert.export("damaged.safetensors", "dense.safetensors", "dense")


def test_they_are_not_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = DigitsCNN(width=16)
    lrconvert.save(dense, "dense.safetensors", architecture="zoo/digits_cnn", model_args={"width": 16})
    lrconvert.factorize("dense.safetensors", "rank_ratio=0.25", output="small.safetensors", pivoted=True)
    calls = [Call((torch.randn(8, 1, 8, 8),), {}, 8) for _ in range(4)]
    why = "has pivoted factors, a form to store and to run a network in: train one that was factorized without"
    with pytest.raises(UsageError, match=why):
        lrconvert.finetune("small.safetensors", "run", dataset="digits")
    with pytest.raises(UsageError, match=why):
        lrconvert.distill("small.safetensors", "dense.safetensors", calls, output="better.safetensors")
    with pytest.raises(UsageError, match=why):
        lrconvert.distill(lrconvert.load("small.safetensors"), dense, calls, epochs=1)
    with pytest.raises(UsageError, match=why):
        FrobeniusDecay(lrconvert.load("small.safetensors"), 0.1)
    with pytest.raises(UsageError, match="train it with plain ones"):
        lrconvert.Pufferfish(dense, 1, 0.25, input_shape=(1, 8, 8), pivoted=True)
    with pytest.raises(UsageError, match="--extra-bn is to train with, and pivoted factors are not trained"):
        lrconvert.make_plan(dense, "rank=3", extra_norm=True, pivoted=True)


@pytest.mark.parametrize("width", [150, 90])
def test_inputs_of_another_width_are_refused(width):
    linear = factor(9, 100)
    conv = factorize_module(nn.Conv2d(100, 40, 1), Plan(layers=(decision(nn.Conv2d(100, 40, 1), 9, "conv2d"),)))
    image = torch.randn(2, width, 4, 4)
    for call in (
        lambda: linear(torch.randn(3, width)),
        lambda: linear(torch.randn(300, width)),
        lambda: conv(image),
        lambda: conv(image.to(memory_format=torch.channels_last)),
    ):
        with pytest.raises(RuntimeError, match=f"expected 100 input (features|channels), got {width}"):
            call()


def test_what_overflows_16_bits_is_refused():
    linear = nn.Linear(80, 64).half()
    linear.weight.data = torch.randn(64, 80).sign().half() * 64000
    with pytest.raises(WeightError, match=r"the factors overflow torch\.float16"):
        factorize_module(linear, Plan(layers=(decision(linear, 40),)))
