"""Graphs as torch exports them: layers keep their names, and factors compute what merged weights do."""

import contextlib
import io
import logging
import warnings

import onnx
import pytest
import torch
from graphs import ops, run
from helpers import assert_close
from torch import nn

import lrconvert
from lrconvert.network import open_network


def export(model, path, *inputs, batch=True):
    """torch.onnx.export with a dynamic batch, its chatter kept quiet."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # the exporter stores what is equal only once
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if batch else None
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(model.eval(), inputs, str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    finally:
        logging.disable(logging.NOTSET)
    return path


class Block(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv2(torch.relu(self.conv1(x)))))


class Residual(nn.Module):
    """A small residual network with a grouped, a strided and a dilated convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16, 1), Block(16, 2))
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(torch.relu(self.down(self.blocks(self.stem(x)))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 16, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0])


def both_ways(path, folder, rule, feed, **settings):
    small, back = folder / "small.onnx", folder / "back.onnx"
    record = lrconvert.factorize(path, rule, output=small, **settings)
    assert record.difference <= 1e-4
    assert record.num_params_after < record.num_params_before
    onnx.checker.check_model(str(small), full_check=True)
    lrconvert.export(small, back, "dense")
    assert ops(back) == ops(path)
    assert_close(run(small, **feed)[0], run(back, **feed)[0], 1e-4)
    return record


@pytest.mark.parametrize("rule", ["rank_ratio=0.25", "rank=6"])
def test_residual_network(tmp_path, rule):
    x = torch.randn(2, 3, 16, 16)
    model = Residual()
    path = export(model, tmp_path / "a.onnx", x)
    record = both_ways(path, tmp_path, rule, {"x": x.numpy()})
    assert {row.name for row in record.layers} == {
        "stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "down", "head"
    }  # fmt: skip
    groups = {row.name: row.groups for row in record.layers}
    assert groups["blocks.1.conv1"] == 2
    reasons = {row.name: row.reason for row in record.layers if row.rank is None}
    assert reasons["stem"] == "first layer"
    assert reasons["head"] == "last classifier"


def test_a_graph_gets_the_ranks_that_its_model_gets(tmp_path):
    # conv2 is left out: the exporter folds the batch norm behind it into its weight
    x = torch.randn(2, 3, 16, 16)
    model = Residual()
    path = export(model, tmp_path / "a.onnx", x)
    mine = {layer.name: layer.rank for layer in lrconvert.make_plan(path, "rank_ratio=0.5", exclude=["*conv2"]).layers}
    theirs = lrconvert.make_plan(model, "rank_ratio=0.5", exclude=["*conv2"], input_shape=(3, 16, 16))
    assert mine == {layer.name: layer.rank for layer in theirs.layers}
    small = tmp_path / "small.onnx"
    lrconvert.factorize(path, "rank_ratio=0.5", exclude=["*conv2"], output=small)
    with torch.no_grad():
        want = lrconvert.factorize(model, theirs)(x)
    assert_close(run(small, x=x.numpy())[0], want, 1e-4)


@pytest.mark.parametrize("rule", ["rank_ratio=0.25", "rank=6"])
def test_recurrent_network(tmp_path, rule):
    x = torch.randn(2, 7, 12)
    path = export(Recurrent(), tmp_path / "a.onnx", x, batch=False)
    kinds = [layer.kind for layer in open_network(path).layers]
    assert sorted(kinds) == ["gru"] * 2 + ["linear"] + ["lstm"] * 4
    record = both_ways(path, tmp_path, rule, {"x": x.numpy()}, keep_first=0)
    assert sum(row.rank is not None for row in record.layers) >= 4


def test_encoder_layers_have_the_names_of_their_biases(tmp_path):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    src = torch.randn(2, 5, 32)
    path = export(model, tmp_path / "a.onnx", src)
    record = both_ways(path, tmp_path, "rank_ratio=0.25", {"src": src.numpy()})
    parts = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert {row.name for row in record.layers} == {f"layers.{n}.{part}" for n in (0, 1) for part in parts}


def test_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 50, (2, 6))
    path = export(model, tmp_path / "a.onnx", ids, batch=False)
    record = lrconvert.factorize(path, "rank_ratio=0.25", output=tmp_path / "b.onnx")
    assert record.difference <= 1e-4
    reasons = {row.name: row.reason for row in record.layers}
    assert any("word_embeddings" in name and reason.startswith("embedding") for name, reason in reasons.items())
    ranks = {row.name: row.rank for row in record.layers if row.rank}
    assert sum("encoder.layer" in name for name in ranks) >= 11
