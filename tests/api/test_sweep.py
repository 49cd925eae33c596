"""Sweeps on digits: what is reported is what a factorized network does, and is computed once."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import num_params
from PIL import Image

import lrconvert
from lrconvert.api import trials
from lrconvert.cost import trace
from lrconvert.errors import (
    TargetError,
    UnknownNameError,
    UsageError,
)
from lrconvert.fidelity import fidelity, outputs_of
from lrconvert.inputs import one_input
from lrconvert.models.zoo.digits_cnn import INPUT_SHAPE
from lrconvert.network import open_network
from lrconvert.samples import read_samples
from lrconvert.training.evaluation import accuracy_of

RATIOS = (0.7, 0.4, 0.2)


def test_rows_are_what_factorizing_by_hand_gives(file, trained, digits):
    record = lrconvert.sweep(file, ratios=RATIOS, calibrate="digits", examples=64, held_out=48, evaluate="digits")
    assert [point.ratio for point in record.points] == sorted(RATIOS, reverse=True)
    assert (record.held_out, record.calibrated, record.validation) == (48, True, "digits")
    assert record.accuracy == accuracy_of(trained, digits.validation) > 0.9
    assert {point.allocator for point in record.points} == {"output_error"}
    point = record.points[1]
    assert point.plan_ratio == 0.4
    calibration = lrconvert.calibrate(file, "digits", count=64)
    small = lrconvert.load(file)
    small = lrconvert.factorize(
        small, lrconvert.make_plan(small, param_ratio=0.4, calibration=calibration), calibration=calibration
    )
    assert point.num_params == num_params(small) <= 0.4 * num_params(trained)
    assert point.macs == trace(small, one_input(INPUT_SHAPE)).macs
    assert point.accuracy == accuracy_of(small, digits.validation)
    held_out = read_samples("digits", open_network(file), count=48, skip=64).calls
    found = fidelity(outputs_of(small, held_out), outputs_of(trained, held_out))
    assert point.error_measured == pytest.approx(found.error, rel=1e-4)
    assert point.agreement == found.agreement


def test_errors_without_data_are_those_of_the_weights(file):
    record = lrconvert.sweep(file, ratios=RATIOS, by="macs")
    model = lrconvert.load(file)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    plan = lrconvert.make_plan(model, mac_ratio=0.4, input_shape=INPUT_SHAPE)
    merged = lrconvert.merge(lrconvert.factorize(model, plan)).state_dict()
    keys = [f"{name}.weight" for name in ("conv2", "conv3", "conv4", "hidden")]
    lost = sum(float((merged[key] - weights[key]).double().square().sum()) for key in keys)
    norm = sum(float(weights[key].double().square().sum()) for key in keys)
    point = record.points[1]
    assert point.error_predicted == pytest.approx((lost / norm) ** 0.5, rel=1e-4)
    assert 0.396 <= point.macs / record.macs <= 0.4
    assert (point.error_measured, point.accuracy, record.held_out) == (None, None, None)


def test_a_larger_budget_never_does_worse_and_the_front_is_marked(file):
    names = ("output_error", "uniform", "absolute_error", "sensitivity")
    record = lrconvert.sweep(
        file, ratios=(0.9, 0.7, 0.5, 0.3, 0.2, 0.1), allocators=names, calibrate="digits", examples=32, held_out=32
    )
    assert [point.allocator for point in record.points[::6]] == list(names)
    for name in names:
        losses = [point.error_measured for point in record.points if point.allocator == name]
        assert losses == sorted(losses)
        assert losses[0] < losses[-1]
    for point in record.points:
        beaten = any(
            other.num_params <= point.num_params
            and other.error_measured <= point.error_measured
            and (other.num_params, other.error_measured) != (point.num_params, point.error_measured)
            for other in record.points
        )
        assert point.pareto == (not beaten)
        assert point.plan_ratio <= point.ratio


def test_a_worse_plan_of_a_larger_budget_gives_way(file, monkeypatch):
    # The fewer parameters, the better.
    monkeypatch.setattr(trials.Trials, "error", lambda self, plan: (1 - plan.saved_params / 1e6, None, 32))
    record = lrconvert.sweep(file, ratios=RATIOS, calibrate="digits", examples=32)
    assert [point.plan_ratio for point in record.points] == [0.2, 0.2, 0.2]
    assert [point.ratio for point in record.points] == [0.7, 0.4, 0.2]
    assert len({point.num_params for point in record.points}) == 1


EVERYTHING = {"calibrate": "digits", "examples": 32, "held_out": 32, "evaluate": "digits", "cache": "cache"}


def test_with_a_cache_folder_another_sweep_computes_only_what_is_new(file, calls):
    first = lrconvert.sweep(file, ratios=RATIOS, **EVERYTHING)
    assert calls == {"analyze_layers": 1, "calibrate": 1, "outputs_of": 4, "accuracy_of": 4, "factorized": 0}
    assert lrconvert.sweep(file, ratios=RATIOS, **EVERYTHING) == first
    assert calls == {"analyze_layers": 1, "calibrate": 1, "outputs_of": 4, "accuracy_of": 4, "factorized": 0}
    more = lrconvert.sweep(file, ratios=(*RATIOS, 0.5), **EVERYTHING)
    assert calls == {"analyze_layers": 1, "calibrate": 1, "outputs_of": 6, "accuracy_of": 5, "factorized": 0}
    assert set(first.points) <= {point.model_copy(update={"pareto": True}) for point in more.points} | set(more.points)
    # The responses from the file make the same factors.
    alone = lrconvert.sweep(file, ratios=(0.5,), **{**EVERYTHING, "cache": None})
    assert alone.points[0].accuracy == more.points[1].accuracy
    assert alone.points[0].error_measured == pytest.approx(more.points[1].error_measured)
    # Other examples, and a changed file, are other keys.
    lrconvert.sweep(file, ratios=RATIOS, **{**EVERYTHING, "examples": 31})
    assert calls["calibrate"] == 3
    os.utime(file, ns=(1, 1))
    lrconvert.sweep(file, ratios=RATIOS, **EVERYTHING)
    assert calls["calibrate"] == 4
    assert calls["analyze_layers"] == 3


def test_damaged_and_foreign_cache_files_are_computed_anew(file, calls, tmp_path):
    first = lrconvert.sweep(file, ratios=RATIOS, **EVERYTHING)
    files = sorted((tmp_path / "cache").iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    whole = {path: path.read_bytes() for path in files}
    for damage in (
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"",
    ):
        for path, data in whole.items():
            path.write_bytes(damage(data))
        before = dict(calls)
        again = lrconvert.sweep(file, ratios=RATIOS, **EVERYTHING)
        assert again.points == first.points
        assert calls["calibrate"] == before["calibrate"] + 1
        assert calls["accuracy_of"] == before["accuracy_of"] + 4
        assert set((tmp_path / "cache").iterdir()) == set(files)
    # A whole file of another key.
    accuracies = sorted((tmp_path / "cache").glob("accuracy-*"))
    accuracies[0].write_bytes(accuracies[1].read_bytes())
    before = dict(calls)
    assert lrconvert.sweep(file, ratios=RATIOS, **EVERYTHING) == first
    assert calls["accuracy_of"] == before["accuracy_of"] + 1


def test_latency_is_measured_once_and_a_live_model_is_left_as_it_was(trained, calls):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    record = lrconvert.sweep(
        trained, ratios=(0.5,), allocators=("uniform", "uniform"), latency=True, input_shape=INPUT_SHAPE
    )
    (point,) = record.points
    assert calls["factorized"] == 1
    assert point.latency_ms > 0
    assert point.latency_ratio == point.latency_ms / point.latency_dense_ms
    assert "batch 1" in record.latency_note
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    with pytest.raises(UsageError, match="a live model has none"):
        lrconvert.sweep(trained, cache="cache")


def test_budgets_that_cannot_be_met_are_noted_or_refused(file):
    record = lrconvert.sweep(file, ratios=(0.5, 0.01))
    assert [point.ratio for point in record.points] == [0.5]
    assert any("--param-ratio 0.01 cannot be reached: the closest is 0.0" in note for note in record.notes)
    with pytest.raises(TargetError, match=r"--param-ratio 0\.02 cannot be reached"):
        lrconvert.sweep(file, ratios=(0.01, 0.02))
    for settings, error, message in [
        ({"ratios": ()}, UsageError, "needs budgets"),
        ({"ratios": (1.5,)}, UsageError, "at most 1, not 1.5"),
        ({"by": "time"}, UnknownNameError, "unknown unit of budgets 'time'"),
        ({"allocators": ["best"]}, UnknownNameError, "unknown allocator 'best'"),
        ({"allocators": ["output_error"]}, UsageError, "needs examples: --calibrate DATA"),
        ({"evaluate": "digit"}, UnknownNameError, "did you mean 'digits'"),
    ]:
        with pytest.raises(error, match=message):
            lrconvert.sweep(file, **settings)
    torch.save(lrconvert.load(file).state_dict(), "bare.pt")
    for settings in ({"evaluate": "digits"}, {"calibrate": "digits"}, {"latency": True}):
        with pytest.raises(UsageError, match="has to be run: name its --model"):
            lrconvert.sweep("bare.pt", **settings)
    assert len(lrconvert.sweep("bare.pt", ratios=(0.6, 0.5)).points) == 2


def test_the_whole_budget_is_the_dense_network(file, trained):
    record = lrconvert.sweep(file, ratios=(1.0, 0.5), calibrate="digits", examples=32, held_out=32, evaluate="digits")
    whole = record.points[0]
    assert (whole.num_params, whole.low_rank) == (num_params(trained), 0)
    assert (whole.error_predicted, whole.error_measured, whole.accuracy) == (0, 0, record.accuracy)


def test_a_graph_is_swept_by_its_weights_alone(file):
    lrconvert.export(file, "digits.onnx", "onnx")
    graph, model = (lrconvert.sweep(each, ratios=(0.6, 0.4), cache="cache") for each in ("digits.onnx", file))
    assert [point.ratio for point in graph.points] == [0.6, 0.4]
    for point, other in zip(graph.points, model.points, strict=True):
        # The exporter folds norms into their convolutions: other weights, and fewer parameters.
        assert point.error_predicted == pytest.approx(other.error_predicted, abs=0.1)
    assert graph.macs == model.macs
    with pytest.raises(UsageError, match="graphs cannot be"):
        lrconvert.sweep("digits.onnx", evaluate="digits")
    with pytest.raises(UsageError, match="a graph, which cannot be evaluated"):
        lrconvert.make_plan("digits.onnx", min_accuracy=0.5, evaluate="digits")


def test_where_no_examples_are_left_errors_are_only_predicted(file):
    record = lrconvert.sweep(file, ratios=(0.5,), calibrate="digits", examples=2000)
    assert record.held_out is None
    assert record.points[0].error_measured is None
    assert record.points[0].error_predicted > 0
    assert any("no examples left" in note for note in record.notes)


# The command line


def test_the_command_line_shows_writes_and_draws(cli, file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = ("sweep", file, "--ratios", "0.7,0.4,0.2", "--allocator", "output_error", "--allocator", "uniform")
    run += ("--calibrate", "digits", "--examples", "32", "--evaluate", "digits", "--cache", "cache")
    shown = cli(*run, "--plot", "sweep.png")
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "accuracy: on the validation images of digits, measured." in shown.out
    with Image.open("sweep.png") as image:
        assert image.width > image.height > 300
    record = json.loads(cli(*run, "--json").out)
    assert (record["command"], len(record["points"]), record["held_out"]) == ("sweep", 6, 128)
    rows = list(csv.DictReader(io.StringIO(cli(*run, "--csv", "--plot", "sweep.svg").out)))
    assert [float(row["ratio"]) for row in rows] == [0.7, 0.4, 0.2] * 2
    assert "<svg" in Path("sweep.svg").read_text()


def test_one_line_errors_of_sweep(cli, file):
    assert "at most 1, not 2" in cli.fails(2, "sweep", file, "--ratios", "2")
    assert "write numbers with commas" in cli.fails(2, "sweep", file, "--ratios", "0.5;0.4")
    assert "pictures are .svg, .png or .pdf files" in cli.fails(2, "sweep", file, "--plot", "sweep.html")
    assert "--calibrate DATA, which is missing" in cli.fails(2, "sweep", file, "--examples", "9")
    assert "cannot be reached: the closest is" in cli.fails(3, "sweep", file, "--ratios", "0.001")
    Path("there.svg").touch()
    assert "exists" in cli.fails(1, "sweep", file, "--plot", "there.svg")
