"""Sweeps and `--min-accuracy` on digits: what is reported is what a factorized network does, and is computed once."""

import csv
import io
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from helpers import num_params
from torch import nn

import lrconvert
from lrconvert.api import trials, validation
from lrconvert.api.cache import Cache
from lrconvert.cost import trace
from lrconvert.errors import (
    CheckpointError,
    LrconvertError,
    NothingToCompressError,
    TargetError,
    UnknownNameError,
    UsageError,
)
from lrconvert.fidelity import fidelity, outputs_of
from lrconvert.inputs import one_input
from lrconvert.models.zoo.digits_cnn import INPUT_SHAPE, DigitsCNN
from lrconvert.network import open_network
from lrconvert.samples import read_samples
from lrconvert.training.data import Loader, open_dataset
from lrconvert.training.evaluation import accuracy_of

RATIOS = (0.7, 0.4, 0.2)


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits")


@pytest.fixture(scope="module")
def trained(digits):
    """A network that knows its digits, after a few seconds."""
    torch.manual_seed(0)
    model = DigitsCNN(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = Loader(digits.train, batch_size=64, seed=0)
    for _ in range(4):
        for images, labels in loader.once():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def file(trained, tmp_path, monkeypatch):
    """Its checkpoint, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    lrconvert.save(trained, "digits.safetensors", architecture="zoo/digits_cnn", model_args={"width": 16})
    return "digits.safetensors"


@pytest.fixture
def calls(monkeypatch):
    """How often spectra, calibration, accuracy and outputs were really computed."""
    counts = dict.fromkeys(("analyze_layers", "calibrate", "outputs_of", "accuracy_of", "factorized"), 0)

    def counted(module, name):
        real = getattr(module, name)

        def call(*arguments, **named):
            counts[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    for name in ("analyze_layers", "calibrate", "outputs_of", "factorized"):
        counted(trials, name)
    counted(validation, "accuracy_of")
    return counts


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


def test_a_cache_keeps_what_it_is_given(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5)}
    for cache in (Cache(tmp_path / "new" / "folder"), Cache(tmp_path / "new" / "folder")):
        found = cache.tensors("some", {"of": [1, 2.5]}, lambda: tensors)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert cache.numbers("some", {"of": 1}, lambda: {"x": 0.1}) == {"x": 0.1}
    again = Cache(tmp_path / "new" / "folder")
    assert again.numbers("some", {"of": 1}, lambda: pytest.fail("computed")) == {"x": 0.1}
    assert again.numbers("some", {"of": 2}, lambda: {"x": 0.2}) == {"x": 0.2}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, and a cache is a folder"):
        Cache(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be made"):
        Cache(tmp_path / "file" / "folder")


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
    assert graph.macs is None
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


# --min-accuracy


def test_the_fewest_parameters_that_are_accurate_enough(file, trained, digits):
    dense = accuracy_of(trained, digits.validation)
    asked = dense - 0.05
    model = lrconvert.load(file)
    plan = lrconvert.make_plan(model, min_accuracy=asked, evaluate="digits")
    assert (plan.target.kind, plan.target.asked) == ("min_accuracy", asked)
    assert plan.rule == f"min_accuracy={asked:g} by relative_error"
    assert {layer.reason for layer in plan.low_rank} == {f"min accuracy {asked:g}"}
    small = lrconvert.factorize(model, plan)
    assert plan.target.reached == accuracy_of(small, digits.validation) >= asked
    ratio = num_params(small) / num_params(trained)
    assert ratio < 0.9
    # Some percent fewer are too few, or the bisection would have gone on.
    fewer = lrconvert.load(file)
    fewer = lrconvert.factorize(fewer, param_ratio=0.97 * ratio)
    assert accuracy_of(fewer, digits.validation) < asked


def test_calibrated_plans_are_measured_data_aware(file, digits, calls):
    model = lrconvert.load(file)
    calibration = lrconvert.calibrate(model, "digits", count=64)
    asked = accuracy_of(model, digits.validation) - 0.05
    plan = lrconvert.make_plan(model, min_accuracy=asked, evaluate="digits", calibration=calibration)
    assert calls["accuracy_of"] <= 10
    assert all(layer.data_aware for layer in plan.low_rank)
    small = lrconvert.factorize(model, plan, calibration=calibration)
    assert plan.target.reached == accuracy_of(small, digits.validation)


def test_accuracy_that_cannot_be_had_is_refused_with_the_closest(file, trained, digits, monkeypatch):
    dense = accuracy_of(trained, digits.validation)
    with pytest.raises(TargetError, match="that is the dense network") as caught:
        lrconvert.make_plan(file, min_accuracy=min(dense + 1e-4, 1.0) if dense < 1 else 1.0, evaluate="digits")
    assert caught.value.closest == dense
    shown = float(re.search(r"closest is (0\.\d+)", str(caught.value))[1])
    assert dense - 1e-4 <= shown <= dense
    # A network that any factorization ruins.
    real = validation.Validation.accuracy
    monkeypatch.setattr(
        validation.Validation,
        "accuracy",
        lambda self, model: real(self, model) if num_params(model) == num_params(trained) else 0.5,
    )
    with pytest.raises(TargetError, match=r"closest is 0\.5; ask for that, or fine-tune") as caught:
        lrconvert.make_plan(file, min_accuracy=0.6, evaluate="digits")
    assert caught.value.exit_code == 3


def test_few_layers_have_few_plans(digits):
    """Two layers of rank 16 or dense: most ratios are refused by themselves, and the nearest are tried."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64, bias=False) for _ in range(4)), nn.Linear(64, 10))
    true = accuracy_of(model, digits.validation)
    settings = {"evaluate": "digits", "rank_multiple": 16, "keep_first": 2}
    plan = lrconvert.make_plan(model, min_accuracy=max(true / 4, 0.01), **settings)
    assert plan.low_rank
    assert plan.target.reached >= plan.target.asked
    with pytest.raises(NothingToCompressError, match="no layer to factorize; allow more"):
        lrconvert.make_plan(model, min_accuracy=0.01, evaluate="digits", keep_first=9)


def test_what_accuracy_needs_is_asked_for(file, trained, tmp_path):
    for settings, message in [
        ({"min_accuracy": 0.9}, "--evaluate DATASET"),
        ({"evaluate": "digits"}, "--evaluate DATASET"),
        ({"min_accuracy": 90, "evaluate": "digits"}, "at most 1, not 90"),
        ({"min_accuracy": 0.9, "evaluate": "digits", "param_ratio": 0.5}, "one budget at a time"),
        ({"min_accuracy": 0.9, "evaluate": "digits", "goal": "speed"}, "--for size"),
    ]:
        with pytest.raises(UsageError, match=message):
            lrconvert.make_plan(file, **settings)
    torch.save(trained.state_dict(), "bare.pt")
    with pytest.raises(LrconvertError, match="--model"):
        lrconvert.make_plan("bare.pt", min_accuracy=0.5, evaluate="digits")
    with pytest.raises(UsageError, match="digits has 10 classes, and the model returns"):
        lrconvert.make_plan(DigitsCNN(16, num_classes=7), min_accuracy=0.5, evaluate="digits")
    with pytest.raises(UsageError, match="cannot be called with images"):
        lrconvert.make_plan(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), min_accuracy=0.5, evaluate="digits")


# The command line


def test_the_command_line_shows_writes_and_draws(cli, file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = ("sweep", file, "--ratios", "0.7,0.4,0.2", "--allocator", "output_error", "--allocator", "uniform")
    run += ("--calibrate", "digits", "--examples", "32", "--evaluate", "digits", "--cache", "cache")
    shown = cli(*run, "--plot", "sweep.svg")
    assert shown.code == 0, shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "accuracy: on the validation images of digits, measured." in shown.out
    root = ElementTree.parse("sweep.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = {each.text for each in root.iter(f"{space}text")}
    assert {"parameters, of dense", "MACs, of dense", "accuracy on digits", "output_error", "uniform"} <= texts
    # Two panels of two curves of three points, and a dot for each name.
    assert len(list(root.iter(f"{space}circle"))) == 14
    width, height = float(root.get("width")), float(root.get("height"))
    for dot in root.iter(f"{space}circle"):
        assert 0 < float(dot.get("cx")) < width
        assert 0 < float(dot.get("cy")) < height
    record = json.loads(cli(*run, "--json").out)
    assert (record["command"], len(record["points"]), record["held_out"]) == ("sweep", 6, 128)
    rows = list(csv.DictReader(io.StringIO(cli(*run, "--csv", "--plot", "sweep.html").out)))
    assert [float(row["ratio"]) for row in rows] == [0.7, 0.4, 0.2] * 2
    assert "<svg" in Path("sweep.html").read_text()


def test_one_line_errors_of_sweep(cli, file):
    assert "at most 1, not 2" in cli.fails(2, "sweep", file, "--ratios", "2")
    assert "write numbers with commas" in cli.fails(2, "sweep", file, "--ratios", "0.5;0.4")
    assert "pictures are .svg or .html files" in cli.fails(2, "sweep", file, "--plot", "sweep.png")
    assert "--calibrate DATA, which is missing" in cli.fails(2, "sweep", file, "--examples", "9")
    assert "cannot be reached: the closest is" in cli.fails(3, "sweep", file, "--ratios", "0.001")
    Path("there.svg").touch()
    assert "exists" in cli.fails(1, "sweep", file, "--plot", "there.svg")


def test_least_accuracy_on_the_command_line(cli, file, trained, digits):
    asked = round(accuracy_of(trained, digits.validation) - 0.06, 2)
    run = ("factorize", file, "-o", "small.safetensors", "--evaluate", "digits", "--auto")
    done = cli(*run, "--min-accuracy", asked)
    assert done.code == 0, done.err
    reached = accuracy_of(lrconvert.load("small.safetensors"), digits.validation)
    assert f"accuracy {reached:.4f} on the validation images (measured), asked at least {asked:g}" in done.out
    refused = cli.fails(3, *run, "--overwrite", "--min-accuracy", "1")
    assert "--min-accuracy 1 cannot be reached: the closest is 0.9" in refused
    assert "--evaluate DATASET" in cli.fails(2, "factorize", file, "--dry-run", "--min-accuracy", "0.9")
