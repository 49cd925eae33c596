"""Lengths that an exported graph takes: any, where the model does, and else those of the examples, which is said."""

import json

import onnx
import pytest
import torch
from torch import nn

import lrconvert
from lrconvert.checkpoints import Header
from lrconvert.errors import VerificationError
from lrconvert.exporters import GRAPHS, write_model
from lrconvert.exporters.check import check_against, lengths_checked
from lrconvert.inputs import Input
from lrconvert.network import open_network
from lrconvert.onnx_graph.graph import LENGTHS_KEY, Graph

WORDS = 50


class Pooled(nn.Module):
    """Ids (batch, tokens) and a mask to the mean of what is shown (batch, 8)."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(WORDS, 64), nn.Linear(64, 64)

    def forward(self, ids, mask):
        shown = mask.unsqueeze(2)
        return {"mean": (self.out(self.table(ids)) * shown).sum(1) / shown.sum(1)}


class OneLength(nn.Module):
    """Ids (batch, 6) to (batch, 4): it has weights for each place."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(WORDS, 8), nn.Linear(6 * 8, 4)

    def forward(self, ids):
        return self.out(self.table(ids).flatten(1))


class Half(nn.Module):
    """Ids (batch, 6) to half of them: a view that torch exports for this length alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WORDS, 8)

    def forward(self, ids):
        return self.table(ids[:, : int(ids.shape[1]) // 2]) if ids.shape[1] == 6 else self.table(ids)


INPUTS = (
    Input((12,), "ids", "index", WORDS, length="tokens"),
    Input((12,), "mask", "mask", length="tokens"),
)
IDS = (Input((6,), "ids", "index", WORDS, length="tokens"),)


def dims(path):
    graph = onnx.load(path).graph
    return {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("target", sorted(GRAPHS))
def test_open_lengths_are_checked_at_two(target, tmp_path):
    checked, note = write_model(target, Pooled().eval(), INPUTS, tmp_path / f"m.{target}", Header(), 1e-4)
    assert note is None
    assert checked.lengths == {"tokens": (12, 5)}
    if target == "onnx":
        assert dims(tmp_path / "m.onnx") == {
            "ids": ["batch", "tokens"],
            "mask": ["batch", "tokens"],
            "mean": ["batch", 64],
        }


@pytest.mark.parametrize("target", sorted(GRAPHS))
@pytest.mark.parametrize("kind", [OneLength, Half])
def test_a_length_that_cannot_be_open_is_fixed_and_said(target, kind, tmp_path):
    checked, note = write_model(target, kind().eval(), IDS, tmp_path / f"m.{target}", Header(), 1e-4)
    assert note.startswith("it takes 6 tokens, no other number (")
    assert "\n" not in note
    assert checked.lengths == {}
    if target == "onnx":
        assert dims(tmp_path / "m.onnx")["ids"] == ["batch", 6]


def test_a_graph_that_ignores_the_mask_is_refused(tmp_path):
    model = Pooled().eval()

    def run(_, named):
        with torch.no_grad():
            return [model(named["ids"], torch.ones_like(named["mask"]))["mean"]]

    with pytest.raises(VerificationError, match="outputs differ from the model's"):
        check_against(model, run, INPUTS, 1e-4, tmp_path)


def test_lengths_that_are_alike_are_checked_at_different_ones():
    inputs = (Input((9,), "a", length="source"), Input((9,), "b", length="target"), Input((1,), "c", length="last"))
    assert lengths_checked(inputs) == {"source": (9, 4), "target": (9, 5), "last": (1, 3)}


def test_what_a_graph_costs_is_counted_at_the_lengths_of_its_examples(tmp_path):
    write_model("onnx", Pooled().eval(), INPUTS, tmp_path / "dense.onnx", Header(), 1e-4)
    assert open_network(tmp_path / "dense.onnx").trace.macs == 12 * 64 * 64
    assert open_network(tmp_path / "dense.onnx", input_shape=(5,)).trace.macs == 5 * 64 * 64
    lrconvert.factorize(
        tmp_path / "dense.onnx", "rank=8", output=tmp_path / "small.onnx", keep_first=0, keep_last=False
    )
    assert open_network(tmp_path / "small.onnx").trace.macs == 12 * 8 * (64 + 64)
    assert dims(tmp_path / "small.onnx") == dims(tmp_path / "dense.onnx")


@pytest.mark.parametrize("noted", ["[1, 2]", "{", "7", json.dumps({"tokens": -3, "x": "y"})])
def test_lengths_that_make_no_sense_are_passed_over(noted, tmp_path):
    write_model("onnx", Pooled().eval(), INPUTS, tmp_path / "m.onnx", Header(), 1e-4)
    model = onnx.load(tmp_path / "m.onnx")
    next(entry for entry in model.metadata_props if entry.key == LENGTHS_KEY).value = noted
    onnx.save(model, tmp_path / "m.onnx")
    assert Graph(tmp_path / "m.onnx").lengths == {}
