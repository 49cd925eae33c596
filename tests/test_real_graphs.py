"""The main job on real ONNX graphs: a voice detector of branches and LSTMs, and three networks that read text."""

import numpy as np
import pytest
import torch
from graphs import run
from helpers import assert_close

import lrconvert
from lrconvert.checkpoints import open_checkpoint

SILERO = ["silero", "silero-op15", "silero-half", "silero-op18"]
NAMES = [*SILERO, "ocr-detect", "ocr-read", "ocr-turn"]


@pytest.mark.parametrize("rule", ["rank_ratio=0.25", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_factorize_describe_run_and_merge_back(real_checkpoints, name, rule, tmp_path):
    source, small, dense = real_checkpoints[name], tmp_path / "small.onnx", tmp_path / "dense.onnx"
    record = lrconvert.factorize(source, rule, output=small)
    assert record.difference is not None, record.notes
    assert record.difference <= 1e-4
    assert record.num_params_after < 0.9 * record.num_params_before
    assert record.nbytes_after < 0.9 * record.nbytes_before

    described = lrconvert.info(small)
    assert described.num_params == record.num_params_after
    assert [row.name for row in described.low_rank] == [row.name for row in record.layers if row.rank]

    merged = lrconvert.export(small, dense, "dense")
    assert merged.difference <= 1e-4
    errors = {row.name: row.error for row in described.low_rank}
    compared = {row.name: row.difference for row in lrconvert.compare(source, dense).layers}
    keys = {weight.layer.name: weight.layer.weight for weight in open_checkpoint(source).graph.weights}
    for layer, key in keys.items():
        found = compared[key.removesuffix(".weight")]
        assert found == pytest.approx(errors.get(layer, 0.0), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_analyze_reports_every_weight(real_checkpoints, name, cli):
    result = cli("analyze", real_checkpoints[name], "--csv")
    assert result.code == 0
    rows = result.out.splitlines()[1:]
    assert len(rows) == len(open_checkpoint(real_checkpoints[name]).graph.weights) >= 8


def speech(rate, number):
    """A few harmonics of a falling pitch, as (1, samples) windows of what silero-vad takes."""
    size = 576 if rate == 16000 else 288
    time = torch.arange(number * size) / rate
    pitch = 2 * torch.pi * (180 * time - 20 * time**2)
    wave = sum(torch.sin(k * pitch) / k for k in range(1, 9)) * 0.2
    return [window.numpy()[None].astype(np.float32) for window in wave.split(size)]


@pytest.mark.parametrize("rate", [16000, 8000])
def test_silero_hears_the_same_in_both_branches(real_checkpoints, rate, tmp_path):
    small, dense = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    lrconvert.factorize(real_checkpoints["silero"], "energy=0.99", output=small)
    lrconvert.export(small, dense, "dense")
    states = [torch.zeros(2, 1, 128)] * 2
    heard = [[], []]
    for window in speech(rate, 12):
        for index, path in enumerate((small, dense)):
            out, states[index] = run(path, input=window, state=states[index].numpy(), sr=np.int64(rate))
            heard[index].append(out)
    # twelve windows, the state carried from each to the next
    assert_close(torch.cat(heard[0]), torch.cat(heard[1]), 1e-3)
    assert_close(states[0], states[1], 1e-4)
