"""Graphs exported from the networks of timm and transformers, factorized with no Python model at all."""

import pytest
import timm
import torch
from hf_networks import NETWORKS, build

import lrconvert
from lrconvert.errors import PlanError, UsageError
from lrconvert.network import open_network
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.inputs import one_example

TIMM = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "swin_tiny_patch4_window7_224": {"depths": [2, 2], "num_heads": [3, 6], "img_size": 56},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
    "efficientnet_b0": {},
    "mixer_s32_224": {"img_size": 96},
    "resmlp_12_224": {"img_size": 64},
}


# In a graph the weights of all experts are a stack that is looked up, which stays dense: the rest is factorized.
STACKS = ("gpt_oss", "granite_moe", "mixtral")


def factorized_as_a_graph(folder):
    """The record of factorizing folder/dense.onnx, which was run beside the graph with merged weights."""
    record = lrconvert.factorize(
        folder / "dense.onnx", "rank_ratio=0.25", output=folder / "small.onnx", keep_first=0, keep_last=False
    )
    assert open_network(folder / "small.onnx").trace.macs == record.macs_after < record.macs_before
    return record


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_transformers_networks(tmp_path, name):
    build(name).save_pretrained(tmp_path / "dense")
    lrconvert.export(tmp_path / "dense", tmp_path / "dense.onnx", "onnx")
    record = factorized_as_a_graph(tmp_path)
    assert record.macs_before == open_network(tmp_path / "dense").trace.macs
    assert record.difference is not None
    assert record.difference <= 1e-4
    assert record.num_params_after < (0.95 if name in STACKS else 0.75) * record.num_params_before


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timm_networks(tmp_path, name):
    torch.manual_seed(0)
    torch.save(timm.create_model(name, **TIMM[name]).state_dict(), tmp_path / "dense.pt")
    source = {
        "model": f"timm/{name}",
        "model_args": TIMM[name],
        "input_shape": (3, 64, 64) if name in ("convnext_atto", "efficientnet_b0") else None,
    }
    lrconvert.export(tmp_path / "dense.pt", tmp_path / "dense.onnx", "onnx", **source)
    record = factorized_as_a_graph(tmp_path)
    assert record.macs_before == open_network(tmp_path / "dense.pt", **source).trace.macs
    assert record.difference is not None
    assert record.difference <= 1e-4
    assert record.num_params_after < record.num_params_before


def test_a_dense_export_and_its_factorized_graph_are_compared(tmp_path):
    """The header names an architecture, which is that of the module, not needed for the graph."""
    build("bert").save_pretrained(tmp_path / "dense")
    lrconvert.export(tmp_path / "dense", tmp_path / "dense.onnx", "onnx")
    factorized_as_a_graph(tmp_path)
    record = lrconvert.compare(tmp_path / "dense.onnx", tmp_path / "small.onnx")
    assert record.output_difference > 1e-3
    assert record.second.macs < record.first.macs
    beside = lrconvert.compare(tmp_path / "dense", tmp_path / "small.onnx")
    assert (beside.first.model, beside.second.model) == ("hf/BertForSequenceClassification", None)
    with pytest.raises(UsageError, match="needs no model"):
        lrconvert.compare(tmp_path / "dense.onnx", tmp_path / "small.onnx", model="hf/BertModel")


def test_ids_are_drawn_from_the_whole_table(tmp_path):
    build("bert").save_pretrained(tmp_path / "dense")
    lrconvert.export(tmp_path / "dense", tmp_path / "dense.onnx", "onnx")
    (feed, *_) = one_example(Graph(tmp_path / "dense.onnx"), None, batch=4)
    assert 80 < feed["input_ids"].max() < 99
    assert feed["attention_mask"].min() == 1


def test_a_graph_exported_from_a_factorized_model_is_not_multiplied_out(tmp_path):
    build("bert").save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    lrconvert.export(tmp_path / "small", tmp_path / "small.onnx", "onnx")
    with pytest.raises(PlanError, match="exported from a factorized model, multiply that out"):
        lrconvert.export(tmp_path / "small.onnx", tmp_path / "merged.onnx", "dense")
    assert not (tmp_path / "merged.onnx").exists()
