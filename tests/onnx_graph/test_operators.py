"""Every operator that is factorized: exact at full rank, and at a lower rank what LAPACK's SVD makes of the weight."""

import numpy as np
import onnx
import pytest
from graphs import graph, ops, random, run, truncated
from helpers import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

import lrconvert
from lrconvert.network import open_network
from lrconvert.plan import LayerPlan, Plan

FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def plan_at(path, rank=None):
    """A plan that factorizes everything that can be, at `rank`, or at full rank."""
    layers = [layer for layer in open_network(path).layers if not layer.dense_reason]
    assert layers, "nothing to factorize, and everything would pass"
    return Plan(
        layers=tuple(
            LayerPlan.of(layer, layer.full_rank if rank is None else min(rank, layer.full_rank)) for layer in layers
        )
    )


def check(folder, build, feed, weight, per_group=None, rank=2):
    """Full rank equals the dense graph; `rank` equals the dense graph around a truncated weight; and back again.

    `build(path, weight)` writes the graph; `per_group(weight, f)` applies f to each matrix of it.
    """
    dense, small, back = folder / "dense.onnx", folder / "small.onnx", folder / "back.onnx"
    build(dense, weight)
    lrconvert.factorize(dense, plan_at(dense), output=small, overwrite=True)
    for got, want in zip(run(small, **feed), run(dense, **feed), strict=True):
        assert_close(got, want)
    record = lrconvert.factorize(dense, plan_at(dense, rank), output=small, overwrite=True)
    assert record.difference is not None
    assert record.difference <= 1e-4
    approximated = (per_group or (lambda w, f: f(w)))(weight, lambda matrix: truncated(matrix, rank))
    build(folder / "oracle.onnx", approximated)
    want = run(folder / "oracle.onnx", **feed)
    for got, expected in zip(run(small, **feed), want, strict=True):
        assert_close(got, expected, 2e-5)
    onnx.checker.check_model(str(small))
    lrconvert.export(small, back, "dense", overwrite=True)
    # what did nothing, an Identity or two transpositions, does not come back
    assert {**ops(dense), **ops(back)} == ops(dense)
    for got, expected in zip(run(back, **feed), want, strict=True):
        assert_close(got, expected, 2e-5)
    return small


@FEW
@given(data=st.data())
def test_convolutions(tmp_path, data):
    dims = data.draw(st.integers(1, 3), "dims")
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    wide, out = groups * data.draw(st.integers(2, 4)), groups * data.draw(st.integers(2, 5))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    settings = {"group": groups, "strides": [data.draw(st.integers(1, 2)) for _ in range(dims)]}
    padding = data.draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]), "padding")
    if padding in ("none", "pads"):  # ONNX Runtime has no dilation together with auto_pad
        settings["dilations"] = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    if padding == "pads":
        settings["pads"] = [data.draw(st.integers(0, 2)) for _ in range(2 * dims)]
    elif padding != "none":
        settings["auto_pad"] = padding
    if data.draw(st.booleans(), "kernel_shape given"):
        settings["kernel_shape"] = kernel
    bias = data.draw(st.booleans(), "bias")

    def build(path, weight):
        names = ["x", "a.weight", "a.bias"][: 2 + bias]
        node = helper.make_node("Conv", names, ["y"], name="/a/Conv", **settings)
        constants = {"a.weight": weight, "a.bias": offset}
        graph(path, [node], {"x": [None, wide, *[9] * dims]}, dict(list(constants.items())[: 1 + bias]))

    offset = random(out)
    weight = random(out, wide // groups, *kernel)

    def per_group(weight, approximate):
        parts = [approximate(part.reshape(len(part), -1)).reshape(part.shape) for part in np.split(weight, groups)]
        return np.concatenate(parts)

    small = check(tmp_path, build, {"x": random(2, wide, *[9] * dims, scale=1)}, weight, per_group)
    found = open_network(small).tensors
    assert {"a.u.weight", "a.v.weight"} <= set(found)
    assert found["a.u.weight"].shape[2:] == tuple(kernel)


@FEW
@given(data=st.data())
def test_transposed_convolutions(tmp_path, data):
    dims = data.draw(st.integers(1, 3), "dims")
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    wide, out = groups * data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    strides = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    settings = {"group": groups, "strides": strides}
    if data.draw(st.booleans(), "pads given"):
        settings["pads"] = [data.draw(st.integers(0, 1)) for _ in range(2 * dims)]
    if data.draw(st.booleans(), "output_padding given"):
        settings["output_padding"] = [stride - 1 for stride in strides]
    if data.draw(st.booleans(), "kernel_shape given"):
        settings["kernel_shape"] = kernel
    bias = data.draw(st.booleans(), "bias")

    def build(path, weight):
        names = ["x", "a.weight", "a.bias"][: 2 + bias]
        node = helper.make_node("ConvTranspose", names, ["y"], name="/a/ConvTranspose", **settings)
        constants = {"a.weight": weight, "a.bias": offset}
        graph(path, [node], {"x": [None, wide, *[5] * dims]}, dict(list(constants.items())[: 1 + bias]))

    offset, weight = random(groups * out), random(wide, out, *kernel)

    def per_group(weight, approximate):
        parts = [approximate(part.reshape(len(part), -1)).reshape(part.shape) for part in np.split(weight, groups)]
        return np.concatenate(parts)

    small = check(tmp_path, build, {"x": random(2, wide, *[5] * dims, scale=1)}, weight, per_group)
    found = open_network(small).tensors
    assert found["a.u.weight"].shape[2:] == (1,) * dims
    assert found["a.v.weight"].shape[1:] == (out, *kernel)
    assert ops(small)["Conv"] == ops(small)["ConvTranspose"] == 1


@FEW
@given(data=st.data())
def test_gemm(tmp_path, data):
    into, out = data.draw(st.integers(3, 7)), data.draw(st.integers(3, 7))
    attributes = {
        name: data.draw(values, name)
        for name, values in {
            "transA": st.sampled_from([0, 1]),
            "transB": st.sampled_from([0, 1]),
            "alpha": st.sampled_from([1.0, 0.5]),
            "beta": st.sampled_from([1.0, 2.0]),
        }.items()
        if data.draw(st.booleans(), f"{name} given")
    }
    bias = data.draw(st.sampled_from([None, (out,), (1, out), (), (4, 1)]), "bias")
    offset = random(*(bias or ()))

    def build(path, weight):
        names = ["x", "w"] + ["b"] * (bias is not None)
        constants = {"w": weight} | ({"b": offset} if bias is not None else {})
        graph(path, [helper.make_node("Gemm", names, ["y"], **attributes)], {"x": list(x.shape)}, constants)

    x = random(4, into, scale=1)
    x = np.ascontiguousarray(x.T) if attributes.get("transA") else x
    check(tmp_path, build, {"x": x}, random(*((out, into) if attributes.get("transB") else (into, out))))


@pytest.mark.parametrize("on_the_left", [False, True])
@pytest.mark.parametrize("way", [[], ["Identity"], ["Transpose"], ["Transpose", "Identity", "Transpose"], ["Cast"]])
def test_matmul_of_a_weight_that_passes_through_other_nodes(tmp_path, on_the_left, way):
    into, out = 7, 5

    def build(path, weight):
        nodes, name = [], "w"
        for index, op in enumerate(way):
            extra = {"to": onnx.TensorProto.FLOAT} if op == "Cast" else {}
            nodes.append(helper.make_node(op, [name], [f"w{index}"], **extra))
            name = f"w{index}"
        nodes.append(helper.make_node("MatMul", [name, "x"] if on_the_left else ["x", name], ["y"]))
        graph(path, nodes, {"x": [2, 3, into, 4] if on_the_left else [2, 3, into]}, {"w": weight})

    stored = (out, into) if on_the_left != (way.count("Transpose") == 1) else (into, out)
    x = random(2, 3, into, 4, scale=1) if on_the_left else random(2, 3, into, scale=1)
    check(tmp_path, build, {"x": x}, random(*stored, dtype=np.float64 if way == ["Cast"] else np.float32))


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_recurrent_layers_gate_by_gate(tmp_path, op, direction):
    hidden, into, both = 5, 6, 1 + (direction == "bidirectional")
    rows = GATES[op] * hidden
    bias, x = random(both, 2 * rows), random(7, 2, into, scale=1)
    extra = {"linear_before_reset": 1} if op == "GRU" else {}

    def build(path, weights):
        node = helper.make_node(op, ["x", "W", "R", "B"], ["y"], hidden_size=hidden, direction=direction, **extra)
        graph(path, [node], {"x": [None, None, into]}, {"W": weights[0], "R": weights[1], "B": bias})

    def per_gate(weights, approximate):
        return [
            np.stack([np.concatenate([approximate(gate) for gate in np.split(way, GATES[op])]) for way in weight])
            for weight in weights
        ]

    weights = random(both, rows, into, scale=0.5), random(both, rows, hidden, scale=0.5)
    small = check(tmp_path, build, {"x": x}, weights, per_gate)
    found = open_network(small).tensors
    assert found["W.u"].shape == (both * GATES[op], 2, into)
    assert found["W.v"].shape == (both * GATES[op], hidden, 2)
    assert open_network(tmp_path / "dense.onnx").layers[0].kind == op.lower()


def test_numbers_of_parameters_are_those_of_the_graph(tmp_path):
    node = helper.make_node("LSTM", ["x", "W", "R"], ["y"], hidden_size=16)
    path = graph(tmp_path / "a.onnx", [node], {"x": [3, 1, 20]}, {"W": random(1, 64, 20), "R": random(1, 64, 16)})
    record = lrconvert.factorize(path, "rank=3", output=tmp_path / "b.onnx", keep_first=0)
    made = onnx.load(str(tmp_path / "b.onnx")).graph.initializer
    stored = sum(np.prod(each.dims) for each in made if each.data_type == onnx.TensorProto.FLOAT)
    assert record.num_params_after == stored == 4 * 3 * (16 + 20) + 4 * 3 * (16 + 16)
    assert record.num_params_before == 64 * 20 + 64 * 16
