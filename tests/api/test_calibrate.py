"""Data-aware factorization end to end: a network trained on digits, files, budgets and the command line."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import CommandLine, assert_close
from sklearn.datasets import load_digits
from torch import nn

import lrconvert
from lrconvert.errors import PlanError, TargetError, UsageError
from lrconvert.models.zoo.digits_cnn import DigitsCNN
from lrconvert.network import open_network
from lrconvert.samples import read_samples


@pytest.fixture(scope="module")
def digits():
    """(dense network trained on digits, images and labels to test on)."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    torch.manual_seed(0)
    model = DigitsCNN(width=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        for chosen in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval(), x[1200:], y[1200:]


@pytest.fixture
def folder(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lrconvert.save(digits[0], "dense.safetensors", architecture="zoo/digits_cnn", model_args={"width": 16})
    return tmp_path


def error_of(model, dense, x):
    with torch.no_grad():
        want = dense(x)
        return float(torch.linalg.vector_norm(model(x) - want) / torch.linalg.vector_norm(want))


def test_calibration_lowers_the_error_of_the_output_at_the_same_size(digits, folder):
    dense, x, _ = digits
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=200)
    assert calibration.examples == 200
    errors = {}
    for name, settings in {
        "weights": {"plan": "rank_ratio=0.3"},
        "data": {"plan": "rank_ratio=0.3", "calibration": calibration},
    }.items():
        record = lrconvert.factorize("dense.safetensors", output=f"{name}.safetensors", **settings)
        errors[name] = error_of(lrconvert.load(f"{name}.safetensors"), dense, x)
        assert all(row.data_aware == (name == "data") for row in record.layers if row.rank is not None)
    assert errors["data"] < 0.8 * errors["weights"]


def test_calls_of_the_model_are_calibrated_on_as_they_are(digits, folder):
    calls = read_samples("digits", open_network("dense.safetensors"), count=60).calls
    by_calls = lrconvert.calibrate("dense.safetensors", calls)
    by_name = lrconvert.calibrate("dense.safetensors", "digits", count=60)
    assert by_calls.notes == ("60 examples",)
    assert by_calls.responses.keys() == by_name.responses.keys()
    for name, response in by_name.responses.items():
        assert torch.equal(response.signal, by_calls.responses[name].signal)
    samples = read_samples("digits", open_network("dense.safetensors"), count=60)
    for other in (samples, iter(calls)):
        assert lrconvert.calibrate("dense.safetensors", other).examples == 60
    with pytest.raises(UsageError, match=r"takes lrconvert\.samples\.Call\(args, kwargs, size\), not Tensor"):
        lrconvert.calibrate("dense.safetensors", [torch.ones(2, 1, 8, 8)])
    with pytest.raises(UsageError, match="count: calls are taken as they are"):
        lrconvert.calibrate("dense.safetensors", calls, count=7)


@pytest.mark.parametrize("allocator", ["output_error", "sensitivity"])
def test_a_budget_is_met_and_beats_uniform_ranks(digits, folder, allocator):
    dense, x, _ = digits
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=200, measure=allocator == "sensitivity")
    errors = {}
    for name in (allocator, "uniform"):
        record = lrconvert.factorize(
            "dense.safetensors",
            output=f"{name}.safetensors",
            param_ratio=0.5,
            allocator=name,
            calibration=calibration,
            keep_first=0,
        )
        assert record.num_params_after / record.num_params_before == pytest.approx(0.5, rel=0.01)
        small = lrconvert.load(f"{name}.safetensors")
        assert sum(parameter.numel() for parameter in small.parameters()) == record.num_params_after
        errors[name] = error_of(small, dense, x)
    assert errors[allocator] < errors["uniform"]


def test_auto_spends_what_cuttlefish_would(folder):
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=100)
    plain = lrconvert.make_plan("dense.safetensors", "auto")
    aware = lrconvert.make_plan("dense.safetensors", "auto", calibration=calibration)
    assert aware.saved_params == pytest.approx(plain.saved_params, rel=0.05)
    assert {layer.rank for layer in aware.layers} != {layer.rank for layer in plain.layers}


def test_a_live_model_becomes_what_its_file_becomes(digits, folder):
    dense, x, _ = digits
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=100)
    lrconvert.factorize("dense.safetensors", "rank_ratio=0.4", output="s.safetensors", calibration=calibration)
    live = lrconvert.factorize(copy.deepcopy(dense), "rank_ratio=0.4", calibration=calibration)
    with torch.no_grad():
        assert_close(live(x), lrconvert.load("s.safetensors")(x))


def test_a_data_aware_plan_runs_again_only_with_data(folder):
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=100)
    plan = lrconvert.make_plan("dense.safetensors", param_ratio=0.6, calibration=calibration)
    lrconvert.save_plan(plan, "plan.json")
    again = lrconvert.load_plan("plan.json")
    with pytest.raises(PlanError, match="give --calibrate"):
        lrconvert.factorize("dense.safetensors", again, output="s.safetensors")
    lrconvert.factorize("dense.safetensors", again, output="s.safetensors", calibration=calibration)
    lrconvert.factorize("dense.safetensors", plan, output="t.safetensors", calibration=calibration)
    first, second = (lrconvert.load(name).state_dict() for name in ("s.safetensors", "t.safetensors"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_command_line(folder, capsys):
    cli = CommandLine(capsys)
    common = ("factorize", "dense.safetensors", "--calibrate", "digits", "--examples", 100, "--param-ratio", 0.5)
    result = cli(*common, "-o", "small.safetensors")
    assert result.code == 0, result.err
    assert "calibrated on 100 images" in result.out
    assert "error: predicted, of the outputs." in " ".join(result.out.split())
    record = json.loads(cli(*common, "--dry-run", "--allocator", "sensitivity", "--json").out)
    assert record["rule"] == "param_ratio=0.5 by sensitivity"
    assert "--calibrate DATA, which is missing" in cli.fails(2, *common[:2], "--auto", "--dry-run", "--examples", 10)
    line = cli.fails(2, *common[:2], "--param-ratio", 0.5, "--allocator", "output_error", "--dry-run")
    assert line == "error: --allocator output_error needs examples: --calibrate DATA"
    line = cli.fails(3, *common[:-1], 0.01, "--dry-run")
    assert "closest" in line or "reach" in line


def test_what_cannot_be_calibrated_is_said(digits, folder):
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=20)
    with pytest.raises(UsageError, match=r"calibrated in 1 part\(s\), planned in 2"):
        lrconvert.make_plan("dense.safetensors", "rank_ratio=0.5", calibration=calibration, splits={"hidden": 2})
    with pytest.raises(UsageError, match="measure=True"):
        lrconvert.make_plan("dense.safetensors", param_ratio=0.5, allocator="sensitivity", calibration=calibration)
    with pytest.raises(TargetError):
        lrconvert.make_plan("dense.safetensors", param_ratio=0.01, calibration=calibration)


def test_layers_fitted_in_turn_are_the_same_in_files_and_live_and_better(digits, folder, cli):
    dense, x, _ = digits
    calibration = lrconvert.calibrate("dense.safetensors", "digits", count=200)
    plan = lrconvert.make_plan("dense.safetensors", "rank_ratio=0.1", calibration=calibration)
    plain = lrconvert.factorize(copy.deepcopy(dense), plan, calibration=calibration)
    small = lrconvert.factorize(copy.deepcopy(dense), plan, calibration=calibration, sequential=True)
    assert error_of(small, dense, x) < 0.95 * error_of(plain, dense, x)
    lrconvert.factorize("dense.safetensors", plan, output="a.safetensors", calibration=calibration, sequential=True)
    assert_close(lrconvert.load("a.safetensors")(x), small(x), 1e-5)

    assert any("layers fitted in turn: error of" in note for note in lrconvert.info("a.safetensors").notes)
    asked = ("factorize", "dense.safetensors", "--rank-ratio", "0.1", "--sequential")
    done = cli(*asked, "--calibrate", "digits", "--examples", "200", "-o", "b.safetensors")
    assert done.code == 0, done.err
    assert_close(lrconvert.load("b.safetensors")(x), small(x), 1e-5)
    assert "fitted in turn when the file is written" in cli(*asked, "--calibrate", "digits", "--dry-run").out
    assert "--calibrate DATA, which is missing" in cli.fails(2, *asked, "-o", "c.safetensors")
    accurate = ("--calibrate", "digits", "--min-accuracy", 0.5, "--evaluate", "digits", "-o", "c.pt")
    assert "leave one of them out" in cli.fails(2, *asked[:2], "--sequential", *accurate)
    live = copy.deepcopy(dense)
    with pytest.raises(UsageError, match="takes the examples of a calibration"):
        lrconvert.factorize(live, plan, sequential=True)
    with pytest.raises(UsageError, match="two batches"):
        lrconvert.factorize(live, plan, calibration=replace(calibration, calls=calibration.calls[:1]), sequential=True)
    assert live.state_dict().keys() == dense.state_dict().keys()
