"""Graphs timed: what is timed, and what plans make of it. The clock is a made-up one, but for one run of all."""

import math

import numpy as np
import onnx
import pytest
import torch
from graphs import FLOAT, graph, random
from onnx import TensorProto, helper

import lrconvert
import lrconvert.onnx_graph.check
import lrconvert.onnx_graph.latency
from lrconvert.errors import NothingToCompressError, UsageError
from lrconvert.network import open_network
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.latency import GraphTiming

WHOLE = {"keep_first": 0, "keep_last": False}


@pytest.fixture
def clock(monkeypatch):
    """A session takes a millisecond for every thousand numbers in its constants, and half a one for each node."""
    now = [0.0]

    class Session:
        def __init__(self, model, folder=None):
            constants = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
            self.ms = constants / 1000 + len(model.graph.node) / 2
            self.shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
            sessions.append(self)

        def run(self, _, feed):
            now[0] += self.ms

    def turns(jobs, *_, **__):
        taken = []
        for job in jobs:
            start = now[0]
            job()
            taken.append([9e9, now[0] - start])
        return taken

    sessions = []
    for module in (lrconvert.onnx_graph.check, lrconvert.onnx_graph.latency):
        monkeypatch.setattr(module, "open_session", Session)
    monkeypatch.setattr(lrconvert.onnx_graph.latency, "times_in_turns", turns)
    return sessions


def op(kind, *names, out="y", **attributes):
    return helper.make_node(kind, list(names), [out], **attributes)


# Node, inputs, weight: each is timed without its bias.
PRODUCTS = {
    "conv": (op("Conv", "x", "w", "b", strides=[2, 1], group=2), [None, 32, 9, 9], random(64, 16, 3, 3)),
    "transposed": (op("ConvTranspose", "x", "w", "b", strides=[2, 2]), [None, 48, 5, 5], random(48, 64, 2, 2)),
    "gemm": (op("Gemm", "x", "w", "b", transB=1), [None, 96], random(64, 96)),
    "matmul": (op("MatMul", "x", "w"), [None, 7, 96], random(96, 64)),
    "weight first": (op("MatMul", "w", "x"), [None, 96, 7], random(64, 96)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_timed_dense_and_at_ranks(name, tmp_path, clock):
    node, shape, weight = PRODUCTS[name]
    path = graph(tmp_path / "a.onnx", [node], {"x": shape}, {"w": weight, "b": random(64)})
    (layer,) = open_network(path).layers
    table = GraphTiming(Graph(path), 3, None).table([layer])
    found = table.layers["w"]
    assert found.dense_ms == pytest.approx(weight.size / 1000 + 0.5)
    assert found.ranks[0] == 16
    assert found.ranks[-1] == layer.break_even_rank
    assert found.ms == pytest.approx([layer.num_low_rank_params(rank) / 1000 + 1 for rank in found.ranks])
    assert table.measured_on.endswith("batch 3")


def test_uses_and_runs_are_counted_and_recurrent_weights_cost_nothing(tmp_path, clock):
    body = helper.make_graph(
        [op("MatMul", "c", "looped", out="d"), op("Identity", "go", out="on")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("c", FLOAT, [1, 64]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("d", FLOAT, [1, 64]),
        ],
    )
    nodes = [
        op("MatMul", "x", "twice", out="a"),
        op("Tanh", "a", out="b"),
        op("MatMul", "b", "twice", out="c"),
        op("MatMul", "c", "alike", out="e"),
        helper.make_node("Loop", ["trips", "", "e"], ["f"], body=body),
        op("Unsqueeze", "f", "zero", out="g"),
        helper.make_node("LSTM", ["g", "wi", "wh"], ["y"], hidden_size=16),
    ]
    constants = {name: random(64, 64) for name in ("twice", "alike", "looped")}
    constants |= {"trips": np.array(5), "zero": np.array([0]), "wi": random(1, 64, 64), "wh": random(1, 64, 16)}
    path = graph(tmp_path / "a.onnx", nodes, {"x": [1, 64]}, constants)
    table = GraphTiming(Graph(path), 1, None).table(open_network(path).layers)
    each = 64 * 64 / 1000 + 0.5
    dense = {name: layer.dense_ms for name, layer in table.layers.items()}
    assert dense == pytest.approx({"twice": 2 * each, "alike": each, "looped": 5 * each, "wi": 0, "wh": 0})
    # Weights that are multiplied alike are timed once.
    assert sum(session.shapes == {"w": (64, 64)} for session in clock) == 3


def two(tmp_path, **settings):
    """The wide layer gains at low ranks; the narrow one has so few numbers that a second node costs more."""
    nodes = [op("MatMul", "x", "narrow", out="h"), op("Tanh", "h", out="g"), op("MatMul", "g", "wide")]
    constants = {"narrow": random(32, 32), "wide": random(32, 400)}
    return graph(tmp_path / "a.onnx", nodes, {"x": [settings.get("batch"), 32]}, constants)


def test_layers_that_get_slower_stay_dense(tmp_path, clock):
    path = two(tmp_path)
    for goal, narrow in (("size", 4), ("both", None), ("speed", None)):
        plan = lrconvert.make_plan(path, "rank=4", goal=goal, **WHOLE)
        assert {layer.name: layer.rank for layer in plan.layers} == {"narrow": narrow, "wide": 4}
        assert (plan.latency is None) == (goal == "size")
    assert plan.layers[0].reason == "slower: 1.52 ms dense, 1.96 ms at rank 4"  # as at 15, the least that is timed
    # Three nodes and all weights; four, and the factors.
    assert plan.latency.dense_ms == pytest.approx(1.5 + (32 * 32 + 32 * 400) / 1000)
    assert plan.latency.measured_ms == pytest.approx(2 + (32 * 32 + 4 * 432) / 1000)
    assert plan.latency.measured_on.startswith("CPU, onnxruntime")
    with pytest.raises(NothingToCompressError, match="makes this model no faster on CPU, onnxruntime"):
        lrconvert.make_plan(path, "rank=4", goal="speed", exclude=["wide"], **WHOLE)


def test_a_budget_of_time(tmp_path, clock, cli):
    plan = lrconvert.make_plan(two(tmp_path), latency_ratio=0.705, **WHOLE)
    assert plan.latency.ratio == pytest.approx(0.705, rel=0.03)
    assert plan.target.reached == pytest.approx(0.705, rel=0.01)
    arguments = ("--keep-first", "0", "--factorize-last", "--dry-run")
    assert "latency" in cli("factorize", tmp_path / "a.onnx", "--latency-ratio", "0.705", *arguments).out
    auto = cli("factorize", tmp_path / "a.onnx", "--auto", "--layer-rank", "wide=4", *arguments).out
    assert "slower" in auto or "would not shrink" in auto


def test_what_cannot_be_timed(tmp_path, clock):
    fixed = two(tmp_path, batch=4)
    assert lrconvert.make_plan(fixed, "rank=4", goal="both", **WHOLE).latency.measured_on.endswith("batch 4")
    for settings, match in (
        ({"batch_size": 3}, "takes 4 examples at once, not 3: leave --batch-size out"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"channels_last": True}, "leave --channels-last out"),
    ):
        with pytest.raises(UsageError, match=match):
            lrconvert.make_plan(fixed, "rank=4", goal="both", **settings, **WHOLE)
    path = graph(tmp_path / "b.onnx", [op("MatMul", "x", "w")], {"x": [None, "length", 32]}, {"w": random(32, 400)})
    with pytest.raises(UsageError, match=r"--for size does without: no MACs: .*--input-shape"):
        lrconvert.make_plan(path, "rank=4", goal="both", **WHOLE)
    assert lrconvert.make_plan(path, "rank=4", goal="both", input_shape=(7, 32), **WHOLE).low_rank


def test_in_onnxruntime(tmp_path):
    """Nothing is made up here, and nothing is said of how long it takes."""
    nodes = [
        op("Conv", "x", "c", "cb", out="h", pads=[1, 1, 1, 1], group=2),
        op("ConvTranspose", "h", "t", out="g", strides=[2, 2]),
        op("Cast", "w16", out="w"),
        op("GlobalAveragePool", "g", out="p"),
        op("Flatten", "p", out="f"),
        op("MatMul", "f", "w", out="k"),
        op("Gemm", "k", "v", "vb", transB=1),
    ]
    nodes[2].attribute.append(helper.make_attribute("to", FLOAT))
    constants = {
        "c": random(64, 16, 3, 3),
        "cb": random(64),
        "t": random(64, 48, 2, 2),
        "w16": random(48, 80, dtype=np.float16),
        "v": random(96, 80),
        "vb": random(96),
    }
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 32, 8, 8]}, constants)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="a.data", size_threshold=0)
    timing = GraphTiming(Graph(path), 2, None)
    layers = open_network(path).layers
    table = timing.table(layers)
    assert table.layers.keys() == {"c", "t", "w16", "v"}
    assert all(layer.dense_ms > 0 and min(layer.ms) > 0 for layer in table.layers.values())
    plan = lrconvert.make_plan(path, "rank=4", **WHOLE)
    assert min(timing.in_turns(plan)) > 0
    torch.manual_seed(0)
    record = lrconvert.factorize(path, plan, output=tmp_path / "b.onnx")  # whichever layers time would spare
    assert record.difference is not None
