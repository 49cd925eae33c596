"""Biases of a graph make up for what the factors of their weights take from the mean."""

import numpy as np
import onnx
import pytest
import torch
from graphs import FLOAT, graph, random, run
from helpers import assert_close
from onnx import TensorProto, helper

import lrconvert
from lrconvert.inputs import Call

IN, OUT, RANK = 48, 40, 9
WHOLE = {"keep_first": 0, "keep_last": False}


def op(kind, *names, out="y", **attributes):
    return helper.make_node(kind, list(names), [out], **attributes)


def constant(name, array):
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))


# Nodes, shape of the inputs, constants.
CORRECTED = {
    "gemm": ([op("Gemm", "x", "w", "b")], (60, IN), {"w": random(IN, OUT), "b": random(OUT)}),
    "gemm of a transposed weight": (
        [op("Gemm", "x", "w", "b", transB=1)],
        (60, IN),
        {"w": random(OUT, IN), "b": random(1, OUT)},
    ),
    "product and sum": (
        [op("MatMul", "x", "w", out="h"), op("Add", "b", "h")],
        (20, 7, IN),
        {"w": random(IN, OUT), "b": random(1, 1, OUT)},
    ),
    "conv": ([op("Conv", "x", "w", "b", strides=[2])], (20, 8, 30), {"w": random(24, 8, 3), "b": random(24)}),
    "groups": ([op("Conv", "x", "w", "b", group=2)], (20, 24, 9), {"w": random(48, 12, 3), "b": random(48)}),
    "in a node": (
        [constant("b", random(OUT)), op("Gemm", "x", "w", "b")],
        (60, IN),
        {"w": random(IN, OUT)},
    ),
}
# What is added to more than one product, or not just once, is left alone.
LEFT = {
    "twice the bias": ([op("Gemm", "x", "w", "b", beta=2.0)], (60, IN), {"w": random(IN, OUT), "b": random(OUT)}),
    "a number for every place": (
        [op("MatMul", "x", "w", out="h"), op("Add", "h", "b")],
        (20, 7, IN),
        {"w": random(IN, OUT), "b": random(7, OUT)},
    ),
    "shared": (
        [op("Gemm", "x", "w", "b", out="h"), op("Gemm", "x", "v", "b", out="g"), op("Add", "h", "g")],
        (60, IN),
        {"w": random(IN, OUT), "v": random(IN, OUT), "b": random(OUT)},
    ),
    "of a weight that is used twice": (
        [op("Gemm", "x", "w", "b", out="h"), op("Gemm", "h", "w")],
        (60, IN),
        {"w": random(IN, IN), "b": random(IN)},
    ),
    "the product is an output": (
        [op("MatMul", "x", "w", out="h"), op("Add", "h", "b")],
        (60, IN),
        {"w": random(IN, OUT), "b": random(OUT)},
    ),
}


def examples(shape):
    torch.manual_seed(0)
    return torch.randn(shape) * torch.rand(shape[1:]) + torch.randn(shape[1:])


def build(case, path, kind=FLOAT):
    nodes, shape, constants = case
    outputs = ("y", "h") if case is LEFT["the product is an output"] else ("y",)
    return graph(path, nodes, {"x": [None, *shape[1:]]}, constants, outputs, kind=kind), examples(shape)


def factorized(path, x, small):
    calibration = lrconvert.calibrate(path, [Call((x,), {}, len(x))])
    return lrconvert.factorize(path, f"rank={RANK}", calibration=calibration, output=small, **WHOLE)


@pytest.mark.parametrize("name", CORRECTED)
def test_the_mean_output_stays(name, tmp_path):
    path, x = build(CORRECTED[name], tmp_path / "a.onnx")
    record = factorized(path, x, tmp_path / "b.onnx")
    want, got = (run(each, x=x.numpy())[0].double() for each in (path, tmp_path / "b.onnx"))
    channel = 1 if name in ("conv", "groups") else -1
    places = [axis for axis in range(want.dim()) if axis != channel % want.dim()]
    assert_close(got.mean(places), want.mean(places), 1e-5)
    # The error is that of what varies.
    varying = want - want.mean(places, keepdim=True)
    assert float((got - want).norm() / varying.norm()) == pytest.approx(record.layers[0].error, rel=1e-4)
    assert record.difference < 1e-4
    lrconvert.export(tmp_path / "b.onnx", tmp_path / "c.onnx", "dense")
    assert_close(run(tmp_path / "c.onnx", x=x.numpy())[0], got.float(), 1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_other_biases_stay(name, tmp_path):
    path, x = build(LEFT[name], tmp_path / "a.onnx")
    factorized(path, x, tmp_path / "b.onnx")
    before, after = (
        {tensor.name: tensor for tensor in onnx.load(str(each)).graph.initializer}["b"]
        for each in (path, tmp_path / "b.onnx")
    )
    assert before == after


def test_half_precision_and_data_in_another_file(tmp_path):
    constants = {"w": random(IN, OUT, dtype=np.float16), "b": random(OUT, dtype=np.float16)}
    case = ([op("Gemm", "x", "w", "b")], (60, IN), constants)
    path, x = build(case, tmp_path / "a.onnx", TensorProto.FLOAT16)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="a.data", size_threshold=0)
    x = x.half()
    factorized(path, x, tmp_path / "b.onnx")
    want, got = (run(each, x=x.numpy())[0].double() for each in (path, tmp_path / "b.onnx"))
    assert float((got.mean(0) - want.mean(0)).norm() / want.mean(0).norm()) < 2e-3
    assert next(each for each in onnx.load(tmp_path / "b.onnx").graph.initializer if each.name == "b").data_type == 10
