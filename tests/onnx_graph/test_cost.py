"""Multiply-accumulates of a graph: of every operator that multiplies, as often as it runs."""

import numpy as np
import onnx
import pytest
import torch
from graphs import FLOAT, graph, random, tensor
from onnx import TensorProto, helper

import lrconvert
from lrconvert.errors import TargetError, UsageError
from lrconvert.network import open_network

BATCH, IN, OUT = 1, 48, 40


def macs(path, **settings):
    network = open_network(path, **settings)
    assert network.trace is not None, network.notes
    return network.trace.macs


def node(op, *names, **attributes):
    return helper.make_node(op, list(names), ["y"], **attributes)


# Node, shape of its input x, constants, and what it should cost.
OPERATORS = {
    "conv": (node("Conv", "x", "w", strides=[2, 2]), [None, 8, 9, 11], {"w": random(12, 8, 3, 3)}, 4 * 5 * 12 * 8 * 9),
    "groups": (node("Conv", "x", "w", group=4), [None, 8, 9], {"w": random(12, 2, 3)}, 7 * 12 * 2 * 3),
    "transposed": (
        node("ConvTranspose", "x", "w", strides=[2, 2], group=2),
        [None, 8, 5, 7],
        {"w": random(8, 6, 3, 3)},
        5 * 7 * 8 * 6 * 9,
    ),
    "gemm": (node("Gemm", "x", "w", "b"), [None, IN], {"w": random(IN, OUT), "b": random(OUT)}, IN * OUT),
    "gemm of transposes": (
        node("Gemm", "x", "w", transA=1, transB=1),
        [IN, 5],
        {"w": random(OUT, IN)},
        5 * IN * OUT,
    ),
    "tokens": (node("MatMul", "x", "w"), [None, 7, IN], {"w": random(IN, OUT)}, 7 * IN * OUT),
    "weight first": (node("MatMul", "w", "x"), [None, IN, 7], {"w": random(OUT, IN)}, 7 * IN * OUT),
    "products of inputs": (node("MatMul", "x", "x"), [None, 3, 6, 6], {}, 3 * 6**3),
    "attention": (
        node("Attention", "x", "x", "x"),
        [None, 2, 9, 16],
        {},
        2 * (2 * 9 * 9 * 16),
    ),
    "einsum": (
        node("Einsum", "x", "w", equation="b...i, io -> b...o"),
        [None, 3, 5, IN],
        {"w": random(IN, OUT)},
        3 * 5 * IN * OUT,
    ),
    "einsum that does not say what it keeps": (
        node("Einsum", "x", "w", equation="ij,jk"),
        [3, IN],
        {"w": random(IN, OUT)},
        3 * IN * OUT,
    ),
    "einsum of three": (
        node("Einsum", "x", "w", "v", equation="bi,ij,jk->bk"),
        [None, IN],
        {"w": random(IN, 6), "v": random(6, OUT)},
        IN * 6 + 6 * OUT,
    ),
    "sum by einsum": (node("Einsum", "x", equation="bi->b"), [None, IN], {}, 0),
    "addition": (node("Add", "x", "w"), [None, IN], {"w": random(IN)}, 0),
    # Kept in the file, but computed once when it is loaded.
    "lstm": (
        node("LSTM", "x", "w", "r", hidden_size=16),
        [5, 1, 12],
        {"w": random(1, 64, 12), "r": random(1, 64, 16)},
        5 * 64 * (12 + 16),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, tmp_path):
    made, shape, constants, want = OPERATORS[name]
    path = graph(tmp_path / "a.onnx", [made], {"x": shape}, constants, opset=23 if name == "attention" else 18)
    assert macs(path) == want


def test_attention_to_a_past(tmp_path):
    """3 queries in 4 heads look at 5 earlier keys and their own 3."""
    made = helper.make_node("Attention", ["x", "y", "y", "", "p", "p"], ["z", "keys", "values"])
    given = {"x": [1, 4, 3, 8], "y": [1, 2, 3, 8], "p": [1, 2, 5, 8]}
    path = graph(tmp_path / "a.onnx", [made], given, {}, ("z", "keys", "values"), opset=23)
    assert macs(path) == 2 * (4 * 3 * 8 * 8)


def test_any_shape_and_old_operators(tmp_path):
    given = {"x": helper.make_tensor_value_info("x", FLOAT, None)}
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], given, {"w": random(IN, OUT)})
    assert "input 'x' may have any shape: --input-shape" in open_network(path).notes[-1]
    assert macs(path, input_shape=(7, IN)) == 7 * IN * OUT
    old = graph(tmp_path / "b.onnx", [node("MatMul", "x", "w")], {"x": [1, IN]}, {"w": random(IN, OUT)}, opset=8)
    assert "counted from opset 9 on, and this graph has 8" in open_network(old).notes[-1]


def test_quantized_products_are_counted(tmp_path):
    signed = np.ones((12, 8, 3, 3), np.int8)
    given = helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 8, 9, 11])
    path = graph(
        tmp_path / "a.onnx", [node("ConvInteger", "x", "w")], {"x": given}, {"w": signed}, kind=TensorProto.INT32
    )
    assert open_network(path).notes[-1] == "no MACs: input 'x' is of a kind that cannot be made up"
    nodes = [helper.make_node("Cast", ["x"], ["c"], to=TensorProto.UINT8), node("ConvInteger", "c", "w")]
    integer = helper.make_tensor_value_info("x", FLOAT, [None, 8, 9, 11])
    path = graph(tmp_path / "b.onnx", nodes, {"x": integer}, {"w": signed}, kind=TensorProto.INT32)
    assert macs(path) == 7 * 9 * 12 * 8 * 9


def test_a_body_counts_as_often_as_it_runs(tmp_path):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["state", "w"], ["next"]), helper.make_node("Identity", ["go"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)]
    constants = {"times": np.int64(3), "w": random(IN, IN)}
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, IN]}, constants)
    assert macs(path) == 3 * IN * IN
    record = lrconvert.factorize(path, "rank=4", output=tmp_path / "b.onnx", keep_first=0, keep_last=False)
    assert (record.macs_before, record.macs_after) == (3 * IN * IN, 3 * 4 * 2 * IN)
    assert macs(tmp_path / "b.onnx") == record.macs_after


def test_of_branches_the_one_that_is_taken_counts(tmp_path):
    def branch(name, width):
        nodes = [helper.make_node("MatMul", ["x", f"{name}.w"], [f"{name}.y"])]
        outputs = [helper.make_tensor_value_info(f"{name}.y", FLOAT, None)]
        return helper.make_graph(nodes, name, [], outputs, [tensor(f"{name}.w", random(IN, width))])

    nodes = [
        helper.make_node("Greater", ["n", "none"], ["c"]),
        node("If", "c", then_branch=branch("then", OUT), else_branch=branch("else", 7)),
    ]
    number = helper.make_tensor_value_info("n", TensorProto.INT64, [])
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, IN], "n": number}, {"none": np.int64(-1)})
    assert macs(path) in (IN * OUT, IN * 7)
    assert len(open_network(path).trace.positions) == 1


def test_a_weight_that_is_used_twice_is_applied_twice(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Transpose", ["w"], ["t"]),
        node("MatMul", "h", "t"),
    ]
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 5, IN]}, {"w": random(IN, OUT)})
    network = open_network(path)
    assert network.trace.positions == {"w": 10}
    assert network.trace.macs == 10 * IN * OUT


def test_what_is_computed_from_constants_alone_costs_nothing(tmp_path):
    """As the factors of recurrent weights are multiplied out: once, when the graph is loaded."""
    weights = {"w": random(1, 256, 64), "r": random(1, 256, 64)}
    lstm = node("LSTM", "x", "w", "r", hidden_size=64)
    path = graph(tmp_path / "a.onnx", [lstm], {"x": [5, 1, 64]}, weights)
    record = lrconvert.factorize(path, "rank=4", output=tmp_path / "b.onnx", keep_first=0, keep_last=False)
    assert sum(row.rank is not None for row in record.layers) == 2
    assert record.macs_after == record.macs_before == macs(tmp_path / "b.onnx") == 5 * 256 * 128
    with pytest.raises(TargetError, match="--mac-ratio"):
        lrconvert.factorize(path, "auto", mac_ratio=0.5, output=tmp_path / "c.onnx", keep_first=0, keep_last=False)


def test_weights_are_not_read(tmp_path):
    """The data that the graph names is there, but of no use."""
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], {"x": [None, IN]}, {"w": random(IN, OUT)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="a.data", size_threshold=0)
    (tmp_path / "a.data").write_bytes(b"\xff" * (tmp_path / "a.data").stat().st_size)
    assert macs(path) == IN * OUT


def test_open_sizes_are_asked_for(tmp_path, cli):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), node("Add", "h", "z")]
    path = graph(
        tmp_path / "a.onnx", nodes, {"x": [None, "tokens", IN], "z": [None, "tokens", OUT]}, {"w": random(IN, OUT)}
    )
    assert f"no MACs: input 'x' is (?, tokens, {IN}): --input-shape says how large it is" in open_network(path).notes
    with pytest.raises(UsageError, match=r"--mac-ratio needs the MACs.*--input-shape says how large"):
        lrconvert.factorize(path, "auto", mac_ratio=0.5, dry_run=True, keep_first=0, keep_last=False)
    # One symbol is one size.
    assert macs(path, input_shape=(6, IN)) == 6 * IN * OUT
    assert f"{6 * IN * OUT / 1e3:.2f} k MACs" in cli("analyze", path, "--input-shape", f"6,{IN}").out
    ids = {name: helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "n"]) for name in ("mask", "ids")}
    nodes = [
        helper.make_node("Mul", ["ids", "mask"], ["known"]),
        helper.make_node("Gather", ["table", "known"], ["h"]),
        node("MatMul", "h", "w"),
    ]
    path = graph(tmp_path / "b.onnx", nodes, ids, {"table": random(9, IN), "w": random(IN, OUT)})
    assert macs(path, input_shape=(12,)) == 12 * IN * OUT


def test_two_open_inputs_cannot_both_be_given(tmp_path):
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "z")], {"x": [None, 3, "a"], "z": [None, 5, "b"]}, {})
    assert any("input 'z' is (?, 5, b): only one" in note for note in open_network(path, input_shape=(3, 5)).notes)


def test_operators_that_multiply_in_their_own_way_are_named(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), node("MatMul", "h", "v")]
    constants = {"w": random(IN, OUT), "v": random(OUT, OUT)}
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, IN]}, constants)
    model = onnx.load(path)
    model.graph.node[1].op_type, model.graph.node[1].domain = "FusedMatMul", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    network = open_network(path)
    assert network.trace.macs == IN * OUT
    assert "MACs are counted without those of com.microsoft.FusedMatMul" in network.notes


def test_a_graph_that_does_not_run_says_so(tmp_path):
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], {"x": [None, 5, IN]}, {"w": random(IN, OUT)})
    model = onnx.load(path)
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, path)
    assert any("no MACs: onnxruntime cannot run the graph" in note for note in open_network(path).notes)


def test_a_share_of_the_macs(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 32, 3, padding=1), torch.nn.Conv2d(32, 64, 3, stride=2), torch.nn.Conv2d(64, 64, 3)
    )
    torch.save(model.state_dict(), tmp_path / "a.pt")
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), "
        "nn.Conv2d(32, 64, 3, stride=2), nn.Conv2d(64, 64, 3))\n"
    )
    source = f"{tmp_path}/nets.py:build"
    lrconvert.export(tmp_path / "a.pt", tmp_path / "a.onnx", "onnx", model=source, input_shape=(8, 16, 16))
    record = lrconvert.factorize(
        tmp_path / "a.onnx", "auto", mac_ratio=0.5, output=tmp_path / "b.onnx", keep_first=0, keep_last=False
    )
    assert 0.495 <= record.macs_after / record.macs_before <= 0.5
    assert macs(tmp_path / "b.onnx") == record.macs_after
    assert record.macs_before == 9 * (16**2 * 32 * 8 + 7**2 * 64 * 32 + 5**2 * 64 * 64)
