"""Runs that are killed by the system, twenty times, and end with the weights of one that never was."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from lrconvert.recipe import make_recipe
from lrconvert.training.run import run
from lrconvert.training.state import read_state

KILLS = 20
RECIPE = make_recipe(
    {
        "model": "zoo/digits_cnn",
        "model_args": {"width": 16},
        "dataset": "digits",
        "crop_padding": 1,
        "epochs": 6,
        "batch_size": 64,
        "opt": "adamw",
        "lr": 0.01,
        "sched": "cosine",
        "checkpoint_steps": 5,
        "low_rank": {"method": "cuttlefish", "keep_first": 1, "window": 1, "mean_of": 1, "epsilon": 9.0, "relax": []},
    }
)


def train(folder):
    torch.set_num_threads(1)
    run(RECIPE, folder, resume=(folder / "recipe.yaml").exists())


def weights(folder):
    return read_state(folder / "state.pt")["engine"]["model"]


@pytest.mark.slow
@pytest.mark.dist
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path):
    # A server that has imported everything, and forks: starting a run then takes no seconds of imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lrconvert.training.run", "sklearn.datasets", __name__])
    whole = context.Process(target=train, args=(tmp_path / "whole",))
    whole.start()
    whole.join()
    started = time.monotonic()
    again = context.Process(target=train, args=(tmp_path / "again",))
    again.start()
    again.join()
    assert (whole.exitcode, again.exitcode) == (0, 0)
    duration = time.monotonic() - started
    expected = weights(tmp_path / "whole")
    assert any(".u." in key for key in expected), "the run never switched"

    generator, killed, finished, phases = random.Random(0), 0, 0, set()
    while killed < KILLS or not finished:
        folder = tmp_path / f"run{finished}"
        child = context.Process(target=train, args=(folder,))
        child.start()
        child.join(timeout=generator.uniform(0.1, 0.9) * duration)
        if child.is_alive() and killed < KILLS:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
            if (folder / "state.pt").exists():
                phases.add(any(".u." in key for key in weights(folder)))
            continue
        child.join()
        assert child.exitcode == 0
        finished += 1
        found = weights(folder)
        assert found.keys() == expected.keys()
        for key in expected:
            assert torch.equal(found[key], expected[key]), key
    assert phases == {False, True}, "no kill before the switch, or none after it"
