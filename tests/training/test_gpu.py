"""The trainer on a GPU: mixed precision, torch.compile across the switch, and going on where a run stopped."""

import pytest
import torch

from lrconvert.recipe import make_recipe
from lrconvert.training.run import run
from lrconvert.training.state import read_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RECIPE = {
    "model": "zoo/digits_cnn",
    "dataset": "digits",
    "epochs": 6,
    "batch_size": 64,
    "opt": "adamw",
    "lr": 3e-3,
    "weight_decay": 1e-3,
    "sched": "cosine",
    "device": "cuda",
    "low_rank": {"method": "cuttlefish", "window": 1, "mean_of": 1, "epsilon": 9.0, "relax": []},
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"amp": "bf16", "channels_last": True},
        {"amp": "fp16", "clip_grad": 1.0},
        {"amp": "fp16", "low_rank": {"method": "sifd", "rank_ratio": 0.25}},
        {"compile": True, "model_ema": True, "model_ema_decay": 0.9},
    ],
    ids=["float32", "bf16", "fp16 clipped", "fp16 with Frobenius decay", "compiled"],
)
def test_a_run_learns_and_ends_low_rank(tmp_path, fields):
    record = run(make_recipe({**RECIPE, **fields}), tmp_path / "run")
    assert record.device.startswith("cuda")
    assert record.test_accuracy > 0.9
    assert record.num_params_after < record.num_params_before


def test_a_finished_run_reports_again(tmp_path):
    recipe = make_recipe({**RECIPE, "amp": "fp16"})
    first = run(recipe, tmp_path / "run")
    assert read_state(tmp_path / "run" / "state.pt")["engine"]["scaler"]
    assert run(recipe, tmp_path / "run", resume=True).test_accuracy == pytest.approx(first.test_accuracy, abs=0.01)
