"""Two processes and one: the same batches, ranks and losses; and the commands as torchrun starts them."""

import json
import os
import subprocess
import sys

import pytest

NET = """
from torch import nn

def net():
    # No BatchNorm: each process would see the statistics of its own half.
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 10),
    )
"""
RECIPE = """
dataset: digits
crop_padding: 1
epochs: 4
batch_size: 64
lr: 0.05
device: cpu
low_rank: {method: cuttlefish, keep_first: 1, window: 1, mean_of: 1, epsilon: 9.0, relax: [], max_full_rank_epochs: 2}
"""


def lrconvert(folder, processes, *arguments):
    """Run the command line, under torchrun where there are several processes, and return what it printed as JSON."""
    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(f"model: {folder / 'net.py'}:net\n{RECIPE}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(torchrun if processes > 1 else []), "-m", "lrconvert"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*start, *map(str, arguments), "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    records = [
        lrconvert(tmp_path, processes, "train", tmp_path / "recipe.yaml", "-o", tmp_path / f"run{processes}")
        for processes in (1, 2)
    ]
    one, two = records
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["switch_epoch"] == two["switch_epoch"]
    ranks = [{layer["name"]: layer["rank"] for layer in record["layers"]} for record in records]
    assert ranks[0] == ranks[1]
    assert any(ranks[0].values())
    first = [record["history"][0] for record in records]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-5)
    # Every image is counted once: the accuracies are the same counts.
    assert first[0]["validation_accuracy"] == first[1]["validation_accuracy"]
    assert one["test_accuracy"] == pytest.approx(two["test_accuracy"], abs=2 / 359)
    assert [each["phase"] for each in two["traffic"]] == ["full-rank", "low-rank"]
    full, low = (each["bytes_per_step"] for each in two["traffic"])
    assert full == 4 * two["num_params_before"]
    assert low == 4 * two["trainable_params_after"]


@pytest.mark.dist
@pytest.mark.slow
def test_compressed_gradients_train_too_and_a_finished_run_reports_again(tmp_path):
    settings = ["compression={method: powersgd, rank: 2, start_step: 2, phase: full-rank}", "epochs=3"]
    whole = lrconvert(tmp_path, 2, "train", tmp_path / "recipe.yaml", *settings, "-o", tmp_path / "whole")
    full, low = whole["traffic"]
    assert (full["method"], low["method"]) == ("powersgd", "none")
    assert full["bytes_per_step"] < full["uncompressed_bytes_per_step"] / 3
    again = lrconvert(tmp_path, 2, "train", tmp_path / "recipe.yaml", *settings, "-o", tmp_path / "whole", "--resume")
    assert again["test_accuracy"] == whole["test_accuracy"]
