"""Plans by measured time, from Python and from the command line. Times are made up, but for where only fields count."""

import json

import pytest
import torch
from helpers import with_spectrum
from torch import nn

import lrconvert
import lrconvert.api.timing
import lrconvert.latency
import lrconvert.network
from lrconvert.bench import Bench
from lrconvert.errors import NothingToCompressError, TargetError, UnknownNameError, UsageError
from lrconvert.inputs import Input
from lrconvert.latency import LatencyTable, LayerLatency

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(),
        nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )
"""


def model_of():
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


# Layer "2" takes a tenth of a millisecond a rank, layer "4" is slower at rank 8 already. The first and last stay dense.
FAST = LayerLatency(10.0, tuple(range(8, 64, 8)), tuple(rank / 10 for rank in range(8, 64, 8)))
SLOW = LayerLatency(2.0, (8, 56), (2.5, 4.0))


@pytest.fixture
def clock(monkeypatch):
    """What the model is made to take: a function from (ranks by layer) to milliseconds, dense 20."""
    state = {
        "whole": lambda ranks: (
            20 - sum({"2": FAST, "4": SLOW}[n].dense_ms - {"2": FAST, "4": SLOW}[n].at(r) for n, r in ranks.items())
        )
    }

    def measured(model, layers, bench, **_):
        assert [layer.name for layer in layers] == ["2", "4"]
        return LatencyTable({"2": FAST, "4": SLOW}, 20.0, str(bench))

    def run(self, models, *_):
        ranks = {name: module.rank for name, module in models[1].named_modules() if hasattr(module, "factored")}
        return [20.0, state["whole"](ranks)]

    monkeypatch.setattr(lrconvert.latency, "measure", measured)
    monkeypatch.setattr(Bench, "measure", run)
    return state


def plan_of(**settings):
    return lrconvert.make_plan(model_of(), input_shape=(64,), device="cpu", **settings)


def ranks(plan):
    return {layer.name: layer.rank for layer in plan.layers}


def test_for_speed_and_both_layers_that_get_slower_stay_dense(clock):
    for goal, slow in (("size", 32), ("both", None), ("speed", None)):
        plan = plan_of(rule="rank_ratio=0.25", goal=goal)
        assert ranks(plan) == {"0": None, "2": 32, "4": slow, "6": None}
        assert (plan.latency is None) == (goal == "size")
    assert plan.layers[2].reason == "slower: 2 ms dense, 3.25 ms at rank 32"
    assert plan.latency.measured_ms == pytest.approx(20 - 10 + 3.2)
    assert plan.latency.predicted_ms == pytest.approx(plan.latency.measured_ms)


def test_a_budget_of_parameters_is_met_by_the_layers_that_get_faster(clock):
    total = sum(parameter.numel() for parameter in model_of().parameters())
    plan = plan_of(param_ratio=0.8, goal="speed")
    assert ranks(plan)["4"] is None
    assert plan.layers[2].reason == "slower: 2 ms dense, 2.5 ms at rank 8"
    assert (total - plan.saved_params) / total == pytest.approx(0.8, rel=0.01)
    assert ranks(plan_of(param_ratio=0.8))["4"] is not None
    with pytest.raises(TargetError):
        plan_of(param_ratio=0.5, goal="speed")


def test_for_speed_a_budget_keeps_what_costs_least_time(monkeypatch):
    # Both layers have one shape and spectrum, but a rank of "2" takes ten times as long as one of "4".
    ranks_timed = tuple(range(8, 64, 8))
    times = {
        name: LayerLatency(10.0, ranks_timed, tuple(each * rank for rank in ranks_timed))
        for name, each in (("2", 0.1), ("4", 0.01))
    }
    monkeypatch.setattr(lrconvert.latency, "measure", lambda *_: LatencyTable(times, 20.0, "here"))
    monkeypatch.setattr(Bench, "measure", lambda *_: [20.0, 10.0])
    model = model_of()
    for name in ("2", "4"):
        weight = with_spectrum(128, 128, 0.9 ** torch.arange(128), torch.float32)
        model.get_submodule(name).weight.data.copy_(weight)
    total = sum(parameter.numel() for parameter in model.parameters())

    def plan_for(goal, **budget):
        plan = lrconvert.make_plan(model, input_shape=(64,), device="cpu", goal=goal, **budget)
        return plan, ranks(plan)["2"], ranks(plan)["4"]

    for goal in ("size", "both"):
        _, slow, quick = plan_for(goal, param_ratio=0.5)
        assert abs(slow - quick) <= 1
    plan, slow, quick = plan_for("speed", param_ratio=0.5)
    assert slow < quick - 8
    assert 0.495 <= (total - plan.saved_params) / total <= 0.5
    both, speed = (plan_for(goal, max_error=0.3)[0] for goal in ("both", "speed"))
    assert max(both.target.reached, speed.target.reached) <= 0.3
    assert speed.saved_params < both.saved_params
    time = {
        plan: sum(times[layer.name].at(layer.rank) for layer in found.low_rank)
        for plan, found in (("both", both), ("speed", speed))
    }
    assert time["speed"] < time["both"]


def test_a_latency_is_met_as_predicted(clock):
    plan = plan_of(latency_ratio=0.7)
    assert ranks(plan) == {"0": None, "2": 40, "4": None, "6": None}
    assert plan.target.kind == "latency_ratio"
    assert plan.target.reached == pytest.approx(0.7)
    assert plan.latency.ratio == pytest.approx(0.7)
    assert plan.layers[2].reason == "slower: 2 ms dense, 2.5 ms at rank 8"
    assert ranks(plan_of(latency_ratio=0.7, goal="speed")) == ranks(plan)


def test_a_latency_that_is_missed_in_truth_is_aimed_at_again(clock):
    clock["whole"] = lambda ranks: 20 - 0.8 * sum(10 - rank / 10 for rank in ranks.values())
    plan = plan_of(latency_ratio=0.7)
    assert ranks(plan)["2"] == 25  # 0.8 · (10 − 2.5) is 30 % of 20
    assert plan.latency.ratio == pytest.approx(0.7)
    assert plan.target.reached == pytest.approx(0.7)


def test_a_latency_out_of_reach_is_refused_with_the_closest(clock):
    with pytest.raises(TargetError, match=r"--latency-ratio 0.3 cannot be reached: the closest is 0.54"):
        plan_of(latency_ratio=0.3)
    # What layers save alone, the model saves in part only: the second try knows.
    clock["whole"] = lambda ranks: 20 - 0.5 * sum(10 - rank / 10 for rank in ranks.values())
    with pytest.raises(TargetError, match=r"the closest is 0.77"):
        plan_of(latency_ratio=0.6)


def test_a_model_that_gets_no_faster_is_refused(clock):
    clock["whole"] = lambda ranks: 20.5
    with pytest.raises(NothingToCompressError, match=r"20 ms dense, 20.5 ms with 1 layers") as error:
        plan_of(rule="rank_ratio=0.25", goal="speed")
    assert error.value.exit_code == 3
    with pytest.raises(NothingToCompressError, match=r"--param-ratio 0.8 makes this model no faster"):
        plan_of(param_ratio=0.8, goal="speed")
    assert plan_of(rule="rank_ratio=0.25", goal="both").latency.ratio > 1  # it is not slower in any layer, and smaller


def test_what_cannot_be_timed_is_said():
    with pytest.raises(UsageError, match="--input-shape"):
        lrconvert.make_plan(model_of(), "rank=8", goal="speed")
    with pytest.raises(UnknownNameError, match="'speed'"):
        plan_of(goal="sped")
    with pytest.raises(UsageError, match="--batch-size"):
        plan_of(goal="speed", batch_size=0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    state = model_of().state_dict()
    for name in ("2.weight", "4.weight"):
        state[name] = with_spectrum(128, 128, 0.9 ** torch.arange(128), torch.float32)
    torch.save(state, "dense.pt")
    return ("dense.pt", "--model", "net.py:build", "--input-shape", "64", "--device", "cpu")


def test_times_are_really_measured():
    plan = plan_of(rule="rank_ratio=0.25", goal="both", batch_size=2, channels_last=True)
    for layer in plan.layers[1:3]:
        assert layer.rank == 32 or layer.reason.startswith("slower: ")
    if plan.low_rank:
        assert plan.latency.dense_ms > 0
        assert plan.latency.measured_on.endswith("batch 2, channels_last")


def test_the_record_says_what_was_measured_and_on_what(cli, folder, clock):
    arguments = ("--rank-ratio", "0.25", "--for", "both", "--batch-size", "4", "--rank-multiple", "auto")
    result = cli("factorize", *folder, "-o", "small.safetensors", *arguments, "--json")
    record = json.loads(result.out)
    assert record["latency_before_ms"] == 20
    assert record["latency_after_ms"] == pytest.approx(13.2)
    assert record["latency_after_predicted_ms"] == pytest.approx(13.2)
    assert "batch 4" in record["latency_note"]
    assert "latency" in cli("factorize", *folder, "--dry-run", *arguments).out


def test_the_command_line_refuses_with_exit_code_3(cli, folder, clock):
    clock["whole"] = lambda ranks: 30.0
    line = cli.fails(3, "factorize", *folder, "--dry-run", "--rank-ratio", "0.25", "--for", "speed")
    assert "20 ms dense, 30 ms" in line
    assert "cannot be reached" in cli.fails(3, "factorize", *folder, "--dry-run", "--latency-ratio", "0.1")
    assert "--rank-multiple 3.5" in cli.fails(2, "factorize", *folder, "--dry-run", "--auto", "--rank-multiple", "3.5")


def test_auto_leaves_layers_dense_that_get_slower(cli, folder, clock):
    text = cli("factorize", *folder, "--dry-run", "--auto", "-v").out
    record = json.loads(cli("factorize", *folder, "--dry-run", "--auto", "--json").out)
    assert [row["rank"] is None for row in record["layers"]] == [True, False, True, True]
    assert "latency 20 ms → " in text
    assert "predicted" in text
    record = json.loads(cli("factorize", *folder, "--dry-run", "--auto", "--layer-rank", "4=16", "--json").out)
    assert {row["name"]: row["rank"] for row in record["layers"]}["4"] == 16  # given by name
    record = json.loads(cli("factorize", *folder, "--dry-run", "--auto", "--for", "size", "--json").out)
    assert record["latency_before_ms"] is None


def test_a_model_that_looks_into_its_mask_is_timed_with_one(monkeypatch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x, mask=None):
            if mask is not None and not mask.all():
                x = x * mask
            return self.head(self.second(self.first(x)))

    inputs = (Input((64,), "x"), Input((64,), "mask", kind="mask"))
    monkeypatch.setattr(lrconvert.network, "inputs_of_live", lambda _: inputs)
    network = lrconvert.network.open_network(Masked())
    assert network.trace is not None
    assert lrconvert.api.timing.bench_for(network, 2, torch.device("cpu"), False).inputs == inputs
