"""`distill` on files, folders and live models, in Python and on the command line."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import num_params
from safetensors.torch import load_file

import lrconvert
from lrconvert.checkpoints import open_checkpoint
from lrconvert.errors import ModelError, OutputExistsError, UsageError
from lrconvert.inputs import Call
from lrconvert.models.zoo.digits_cnn import DigitsCNN


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A dense file, a factorized one and 64 images, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    dense = DigitsCNN(width=16).eval()
    lrconvert.save(dense, "dense.safetensors", architecture="zoo/digits_cnn", model_args={"width": 16})
    lrconvert.factorize("dense.safetensors", "rank_ratio=0.25", output="small.safetensors")
    np.savez("images.npz", torch.randn(64, 1, 8, 8).numpy())
    return tmp_path


BRIEF = {"epochs": 4, "batch_size": 8, "examples": 64, "lr": 1e-2}


def test_a_file_is_distilled_into_another_that_differs_in_its_factors_alone(files):
    record = lrconvert.distill(
        "small.safetensors", "dense.safetensors", "images.npz", output="better.safetensors", **BRIEF
    )
    assert record.error_after < record.error_before
    assert (record.examples, record.held_out, record.steps, record.compared) == (56, 8, 28, "outputs")
    before, after = (load_file(f"{name}.safetensors") for name in ("small", "better"))
    assert set(before) == set(after)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    factors = [key for key in before if ".u." in key or ".v." in key]
    assert moved == set(factors)
    assert record.trained_params == sum(before[key].numel() for key in factors)
    assert record.num_params == num_params(lrconvert.load("small.safetensors"))
    headers = [open_checkpoint(f"{name}.safetensors").header for name in ("small", "better")]
    assert headers[0] == headers[1]
    # What the record says of the written weights holds for them.
    again = lrconvert.distill(
        "better.safetensors", "dense.safetensors", "images.npz", output="third.safetensors", **BRIEF
    )
    assert again.error_before == pytest.approx(record.error_after, rel=1e-5)


def test_a_live_model_is_trained_in_place_and_half_precision_files_stay_so(files):
    dense = lrconvert.load("dense.safetensors")
    small = lrconvert.load("small.safetensors")
    calls = [Call((torch.randn(8, 1, 8, 8),), {}, 8) for _ in range(8)]
    record = lrconvert.distill(small, dense, calls, epochs=4, lr=1e-2)
    assert record.output is None
    assert record.error_after < record.error_before
    lrconvert.save(copy.deepcopy(small).half(), "half.pt", architecture="zoo/digits_cnn", model_args={"width": 16})
    lrconvert.distill("half.pt", dense, calls, output="again.pt", epochs=2)
    tensors = open_checkpoint("again.pt").tensors
    assert {ref.dtype for key, ref in tensors.items() if key.endswith("weight")} == {torch.float16}
    with torch.no_grad():
        lrconvert.load("again.pt").float()(calls[0].args[0])


def test_what_cannot_be_distilled_is_refused_before_anything_is_read(files):
    dense, small = lrconvert.load("dense.safetensors"), lrconvert.load("small.safetensors")
    with pytest.raises(UsageError, match="no factors to train"):
        lrconvert.distill("dense.safetensors", "dense.safetensors", "none.npz", output="x.safetensors")
    with pytest.raises(UsageError, match="its own teacher"):
        lrconvert.distill(small, small, [])
    with pytest.raises(UsageError, match="0 batch"):
        lrconvert.distill(small, dense, [])
    with pytest.raises(UsageError, match="no output"):
        lrconvert.distill(small, dense, [], output="x.safetensors")
    with pytest.raises(UsageError, match="needs an output path"):
        lrconvert.distill("small.safetensors", dense, [])
    with pytest.raises(UsageError, match="give one of them"):
        lrconvert.distill(small, dense, [], minutes=1, epochs=1)
    with pytest.raises(UsageError, match="minutes must be above 0"):
        lrconvert.distill(small, dense, [], minutes=0)
    with pytest.raises(OutputExistsError):
        lrconvert.distill("small.safetensors", dense, [], output="images.npz")
    other = DigitsCNN(width=16, num_classes=7)
    with pytest.raises(ModelError, match="the teacher does not fit"):
        lrconvert.distill(small, other, [Call((torch.randn(8, 1, 8, 8),), {}, 8)] * 2, epochs=1)


def test_the_command_line(files, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    line = ("distill", "small.safetensors", "--teacher", "dense.safetensors", "--data", "images.npz")
    result = cli(*line, "-o", "better.safetensors", "--epochs", 3, "--batch-size", 8, "--examples", 64)
    assert result.code == 0, result.err
    assert "taught by dense.safetensors on images.npz" in result.out
    assert "error of outputs before" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    assert "exists" in cli.fails(1, *line, "-o", "better.safetensors")
    result = cli(*line, "-o", "better.safetensors", "--overwrite", "--minutes", 0.05, "--batch-size", 8, "--json")
    record = json.loads(result.out)
    assert record["command"] == "distill"
    assert record["steps"] > 0
    assert cli("info", "better.safetensors").code == 0
    assert "both say how long" in cli.fails(2, *line, "-o", "x.safetensors", "--minutes", 1, "--epochs", 1)
