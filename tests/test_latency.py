"""Measured times: what is timed, how it is put together, and what a plan does with it. The clock is a made-up one."""

import numpy as np
import pytest
import torch
from torch import nn

import lrconvert.latency
from lrconvert.bench import Bench, factorized
from lrconvert.errors import NothingToCompressError
from lrconvert.inputs import one_input
from lrconvert.latency import LatencyTable, LayerLatency, ModelTiming, measure, non_decreasing, ranks_to_time
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.speed import reason_too_slow, surely_faster, timed, without_slower


def num_params(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def made_up(monkeypatch):
    """Milliseconds that are a thousandth of a module's parameters, for each call; the whole model takes 100 ms.

    Returns the list of (parameters, ranks, calls) of everything that was timed.
    """
    seen = []

    def turns(jobs, *_, **__):
        for job in jobs:
            seen.append((num_params(job.module), len(job.calls)))
        return [[9e9, num_params(job.module) * len(job.calls) / 1e3] for job in jobs]

    monkeypatch.setattr(lrconvert.latency, "times_in_turns", turns)
    monkeypatch.setattr(Bench, "measure", lambda *_: [100.0])
    return seen


def table_of(model, input_shape, **settings):
    layers = layers_of_module(model)
    return measure(model, layers, Bench(one_input(input_shape), **settings)), {layer.name: layer for layer in layers}


def test_every_layer_is_timed_dense_and_at_ranks(made_up):
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 64, bias=False))
    table, _ = table_of(model, (64,))
    assert table.model_ms == 100
    first = table.layers["0"]
    assert first.dense_ms == pytest.approx(2.048)
    assert first.ranks == (16, 21)  # break-even
    assert first.ms == pytest.approx((16 * 96 / 1e3, 21 * 96 / 1e3))
    assert first.at(None) == first.dense_ms
    assert first.at(18) == pytest.approx(18 * 96 / 1e3)
    assert first.at(4) == first.at(16)
    assert first.curve(32) == pytest.approx([first.at(rank) for rank in range(33)])


def test_stacks_are_timed_once_and_a_layer_called_twice_counts_twice(made_up):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.twice = (nn.Linear(32, 32, bias=False) for _ in range(3))
            self.never = nn.Linear(32, 32)

        def forward(self, x):
            return self.twice(self.twice(self.two(self.one(x))))

    table, _ = table_of(Model(), (32,))
    assert "never" not in table.layers
    assert table.layers["one"] == table.layers["two"]
    assert table.layers["twice"].dense_ms == pytest.approx(2 * table.layers["one"].dense_ms)
    assert table.layers["twice"].ms == pytest.approx([2 * ms for ms in table.layers["one"].ms])
    # two stacks; each: dense once to see how slow it is, then dense and at rank 15
    assert made_up == [(1024, 1), (1024, 1), (960, 1), (1024, 2), (1024, 2), (960, 2)]


def test_the_weights_of_a_module_share_its_time(made_up):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(128, 4, bias=False, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    table, layers = table_of(Model(), (3, 128))
    packed, out = table.layers["attention.in_proj_weight"], table.layers["attention.out_proj"]
    assert packed.dense_ms + out.dense_ms == pytest.approx(4 * 128 * 128 / 1e3)
    assert packed.dense_ms == pytest.approx(3 * out.dense_ms)
    assert packed.ranks == out.ranks == (16, 32, 48, 63)
    # 48 is the middle: what is timed there are both weights together
    low_rank = sum(layers[name].num_low_rank_params(48) for name in table.layers)
    assert packed.at(48) + out.at(48) == pytest.approx(low_rank / 1e3)
    assert out.at(63) - out.at(16) == pytest.approx((63 - 16) * 256 / 1e3)


def test_layers_save_no_more_than_the_model_takes(made_up):
    table, _ = table_of(nn.Sequential(nn.Linear(512, 512, bias=False)), (512,))
    assert table.layers["0"].dense_ms == pytest.approx(262.144)  # the model takes 100
    assert table.layer_ms("0", None) - table.layer_ms("0", 16) == pytest.approx(100 * (1 - 16 * 1024 / 512**2))


def test_slow_layers_are_timed_at_fewer_ranks(monkeypatch):
    asked = []

    def turns(jobs, *_, **__):
        asked.append(len(jobs))
        return [[500.0]] * len(jobs)

    monkeypatch.setattr(lrconvert.latency, "times_in_turns", turns)
    monkeypatch.setattr(Bench, "measure", lambda *_: [100.0])
    model = nn.Sequential(nn.Linear(512, 512))
    layers, bench = layers_of_module(model), Bench(one_input((512,)))
    for seconds in (1.0, 10.0, 1000.0):
        measure(model, layers, bench, seconds)
    # half a second a call, four times each: 3 ranks at least, or 4, and 12 at most; the first is to see how slow it is
    assert asked == [1, 4, 1, 5, 1, 13]


def test_ranks_are_multiples_of_16_and_break_even():
    assert ranks_to_time(100, 12) == (16, 32, 48, 64, 80, 96, 100)
    assert ranks_to_time(100, 3) == (16, 64, 100)
    assert ranks_to_time(384, 12) == (16, 48, 80, 112, 144, 176, 224, 256, 288, 320, 352, 384)
    assert ranks_to_time(16, 12) == (16,)
    assert ranks_to_time(5, 12) == (5,)


def test_times_do_not_fall_with_rank():
    assert non_decreasing([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    assert non_decreasing([3, 2, 1]) == [2, 2, 2]
    values = np.random.default_rng(0).normal(size=30)
    found = np.array(non_decreasing(values))
    assert (np.diff(found) >= 0).all()
    # The projection on a convex cone: what is left is at right angles to it, and not in the direction of any step up.
    assert (values - found) @ found == pytest.approx(0)
    assert all((values - found)[start:].sum() <= 1e-12 for start in range(1, 30))


def plan_with(**ranks):
    layers = {layer.name: layer for layer in layers_of_module(model_of(*ranks))}
    return Plan(layers=tuple(LayerPlan.of(layers[name], rank, "rule") for name, rank in ranks.items()))


def model_of(*names):
    return nn.ModuleDict({name: nn.Linear(64, 64) for name in names})


TABLE = LatencyTable(
    {
        "fast": LayerLatency(10.0, (8, 16), (2.0, 4.0)),
        "even": LayerLatency(10.0, (8, 16), (9.6, 10.0)),
        "slow": LayerLatency(1.9, (8, 16), (2.0, 2.4)),
    },
    model_ms=40.0,
    measured_on="a clock that is made up",
)


def test_predictions_add_up_and_are_corrected():
    plan = plan_with(fast=12, even=None, slow=16)
    assert TABLE.predicted_ms(plan) == pytest.approx(40 - 7 + 0.5)
    better = TABLE.corrected(plan, 36 / 40)
    assert better.predicted_ms(plan) == pytest.approx(36)
    assert better.layer_ms("fast", 12) == pytest.approx(10 - 7 * 4 / 6.5)
    assert TABLE.corrected(plan, 1.1) == TABLE
    assert TABLE.layer_ms("unknown", 3) == 0


@pytest.mark.parametrize(
    ("goal", "ranks"),
    [
        ("size", {"fast": 8, "even": 8, "slow": 12}),
        ("both", {"fast": 8, "even": 8, "slow": None}),
        ("speed", {"fast": 8, "even": None, "slow": None}),  # 4 % is within noise
    ],
)
def test_layers_that_get_slower_stay_dense(goal, ranks):
    found = without_slower(plan_with(fast=8, even=8, slow=12), TABLE, goal)
    assert {layer.name: layer.rank for layer in found.layers} == ranks
    reasons = {layer.name: layer.reason for layer in found.layers if layer.rank is None}
    if "slow" in reasons:
        assert reasons["slow"] == "slower: 1.9 ms dense, 2.2 ms at rank 12"
    if "even" in reasons:
        assert reasons["even"] == "hardly faster: 10 ms dense, 9.6 ms at rank 8"


def test_a_layer_that_was_not_timed_cannot_be_faster():
    assert "not timed" in reason_too_slow(TABLE, "other", 8, "both")
    assert reason_too_slow(TABLE, "other", 8, "size") == ""


@pytest.fixture
def whole(monkeypatch):
    """Pairs of milliseconds, dense and factorized, that whole models take one time after the other."""
    given = []
    rest = iter(given)
    monkeypatch.setattr(Bench, "measure", lambda *_: next(rest))
    return given


BENCH = Bench(one_input((64,)))


def test_what_was_measured_is_in_the_plan(whole):
    whole.append([50.0, 45.0])
    found = timed(plan_with(fast=8, even=None), ModelTiming(model_of("fast", "even"), BENCH), TABLE)
    assert found.latency.dense_ms == 50
    assert found.latency.measured_ms == 45
    assert found.latency.predicted_ms == pytest.approx(32 * 50 / 40)  # the ratio is predicted, of today's dense time
    assert found.latency.ratio == pytest.approx(0.9)
    assert "batch 1" in found.latency.measured_on
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_layers_that_gain_least_go_until_the_model_is_faster(whole):
    whole += [[40.0, 41.0], [40.0, 39.0]]
    found = surely_faster(
        plan_with(fast=8, even=8, slow=8), ModelTiming(model_of("fast", "even", "slow"), BENCH), TABLE
    )
    assert {layer.name: layer.rank for layer in found.layers} == {"fast": 8, "even": None, "slow": None}
    assert found.layers[1].reason == "gains too little: 0.4 ms"
    assert found.latency.ratio < 1


def test_a_model_that_gets_no_faster_is_refused_with_its_times(whole):
    whole += [[40.0, 41.0], [40.0, 40.0]]
    with pytest.raises(
        NothingToCompressError, match=r"40 ms dense, 41 ms with 2 layers .*; 40 ms with 1 layer"
    ) as error:
        surely_faster(plan_with(fast=8, slow=8), ModelTiming(model_of("fast", "slow"), BENCH), TABLE)
    assert error.value.exit_code == 3
    with pytest.raises(NothingToCompressError, match="every layer"):
        surely_faster(plan_with(fast=None), ModelTiming(model_of("fast"), BENCH), TABLE)


def test_models_are_timed_as_they_are_and_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 32)
    )
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    bench = Bench(one_input((3, 8, 8)), batch_size=2, channels_last=True)
    layers = layers_of_module(model)
    placed = bench.place(model)
    table = measure(placed, layers, bench, seconds=0.1)
    assert set(table.layers) == {"0", "2", "4"}
    assert all(latency.dense_ms > 0 and min(latency.ms) > 0 for latency in table.layers.values())
    assert table.measured_on.endswith("batch 2, channels_last")

    assert placed[2].weight.is_contiguous(memory_format=torch.channels_last)
    plan = Plan(layers=tuple(LayerPlan.of(layer, 4) for layer in layers[1:]))
    low_rank = factorized(placed, plan)
    assert low_rank[0].weight is placed[0].weight
    assert low_rank[2].u.weight.is_contiguous(memory_format=torch.channels_last)
    assert min(bench.measure([placed, low_rank], seconds=0.1)) > 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
