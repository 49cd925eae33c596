"""`--min-accuracy` on digits: the fewest parameters whose measured accuracy is enough."""

import re

import pytest
import torch
from helpers import num_params
from torch import nn

import lrconvert
from lrconvert.api import validation
from lrconvert.errors import (
    LrconvertError,
    NothingToCompressError,
    TargetError,
    UsageError,
)
from lrconvert.models.zoo.digits_cnn import DigitsCNN
from lrconvert.training.evaluation import accuracy_of


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
