"""Graphs factorized for least error of what they compute on examples."""

import copy

import numpy as np
import onnx
import pytest
import torch
from graphs import graph, random, run
from helpers import assert_close
from onnx import TensorProto, helper
from torch import nn

import lrconvert
from lrconvert.errors import UsageError
from lrconvert.inputs import Call
from lrconvert.network import open_network

IN, OUT = 48, 40
WHOLE = {"keep_first": 0, "keep_last": False}


def node(op, *names, **attributes):
    return helper.make_node(op, list(names), ["y"], **attributes)


def mixed(*shape, seed=0):
    """Inputs that say much of some directions and little of others."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    spread = torch.randn(channels, channels, generator=generator) * 0.02 ** (torch.arange(channels) / channels)
    return torch.einsum("nc...,dc->nd...", torch.randn(shape, generator=generator), spread) + 0.1


# Node, inputs, weight: every way in which a weight is multiplied.
PRODUCTS = {
    "tokens": (node("MatMul", "x", "w"), mixed(20, 7, IN).mT.contiguous().mT, random(IN, OUT)),
    "weight first": (node("MatMul", "w", "x"), mixed(20, IN, 7), random(OUT, IN)),
    "gemm": (node("Gemm", "x", "w", alpha=0.5), mixed(60, IN), random(IN, OUT)),
    "gemm of a transposed weight": (node("Gemm", "x", "w", transB=1), mixed(60, IN), random(OUT, IN)),
    "wide": (node("MatMul", "x", "w"), mixed(60, 12), random(12, OUT)),
    "conv": (
        node("Conv", "x", "w", strides=[2, 1], pads=[1, 0, 0, 2], dilations=[1, 2]),
        mixed(20, 8, 9, 11),
        random(12, 8, 3, 3),
    ),
    "same upper": (node("Conv", "x", "w", strides=[2], auto_pad="SAME_UPPER"), mixed(30, 8, 12), random(40, 8, 3)),
    "same lower": (node("Conv", "x", "w", strides=[2], auto_pad="SAME_LOWER"), mixed(30, 8, 12), random(40, 8, 3)),
    "valid": (node("Conv", "x", "w", auto_pad="VALID"), mixed(30, 8, 12), random(12, 8, 3)),
    "groups": (node("Conv", "x", "w", group=4), mixed(30, 16, 9), random(32, 4, 5)),
    "volume": (node("Conv", "x", "w", pads=[1] * 6), mixed(9, 4, 5, 6, 7), random(16, 4, 3, 3, 3)),
}


def relative_error(path, other, x):
    want, got = (torch.as_tensor(run(each, x=x.numpy())[0]).double() for each in (path, other))
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_predicted_error_is_that_of_the_outputs(name, tmp_path):
    made, x, weight = PRODUCTS[name]
    path = graph(tmp_path / "a.onnx", [made], {"x": [None, *x.shape[1:]]}, {"w": weight})
    calls = [Call((part,), {}, len(part)) for part in x.split(8)]
    # Fewer than it would take: all positions are looked at.
    calibration = lrconvert.calibrate(path, calls)
    rank = open_network(path).layers[0].full_rank // 3
    aware = lrconvert.factorize(path, f"rank={rank}", calibration=calibration, output=tmp_path / "b.onnx", **WHOLE)
    plain = lrconvert.factorize(path, f"rank={rank}", output=tmp_path / "c.onnx", **WHOLE)
    assert aware.layers[0].data_aware
    found = relative_error(path, tmp_path / "b.onnx", x)
    assert found == pytest.approx(aware.layers[0].error, rel=1e-3)
    assert found < relative_error(path, tmp_path / "c.onnx", x)
    assert aware.num_params_after == plain.num_params_after


def test_a_vector_on_the_right(tmp_path):
    path = graph(tmp_path / "a.onnx", [node("MatMul", "w", "x")], {"x": [IN]}, {"w": random(OUT, IN)})
    x = mixed(60, IN)
    calibration = lrconvert.calibrate(path, [Call((each,), {}, 1) for each in x])
    record = lrconvert.factorize(path, "rank=9", calibration=calibration, output=tmp_path / "b.onnx", **WHOLE)
    want, got = (torch.stack([run(file, x=each.numpy())[0] for each in x]) for file in (path, tmp_path / "b.onnx"))
    assert float((got - want).norm() / want.norm()) == pytest.approx(record.layers[0].error, rel=1e-3)


def test_weights_that_are_used_in_two_ways_go_by_themselves(tmp_path):
    """As x·W and as z·Wᵀ: what the one meets says nothing of the other."""
    nodes = [node("MatMul", "x", "w"), helper.make_node("Transpose", ["w"], ["t"])]
    nodes += [helper.make_node("MatMul", ["y", "t"], ["z"]), helper.make_node("MatMul", ["z", "v"], ["o"])]
    constants = {"w": random(IN, OUT), "v": random(IN, OUT)}
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, IN]}, constants, ("y", "o"))
    calibration = lrconvert.calibrate(path, [Call((mixed(60, IN),), {}, 60)])
    assert calibration.responses.keys() == {"v"}
    record = lrconvert.factorize(path, "rank=9", calibration=calibration, output=tmp_path / "b.onnx", **WHOLE)
    assert [(row.name, row.data_aware) for row in record.layers] == [("w", False), ("v", True)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 24, 3, stride=2, bias=False)
        self.third = nn.Linear(24, 30, bias=False)
        self.last = nn.Linear(30, 10, bias=False)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.last(torch.tanh(self.third(x)))


@pytest.fixture
def net(tmp_path):
    """A network, its graph, and calls with examples."""
    torch.manual_seed(0)
    model = Net().eval()
    for weight in model.parameters():  # as training leaves them: not alike in all directions
        u, v, w = torch.linalg.svd(weight.data.flatten(1), full_matrices=False)
        weight.data = (u * v * 0.8 ** torch.arange(len(v)) @ w).reshape(weight.shape) * 3
    torch.onnx.export(
        copy.deepcopy(model),
        (torch.randn(2, 3, 12, 12),),
        tmp_path / "a.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    return model, tmp_path / "a.onnx", [Call((x,), {}, 8) for x in mixed(64, 3, 12, 12).split(8)]


def test_a_graph_meets_what_its_model_meets(net):
    model, path, calls = net
    theirs = lrconvert.calibrate(model, calls, two_sided=False).responses
    mine = lrconvert.calibrate(path, calls).responses
    assert mine.keys() == theirs.keys() == {"first", "second", "third", "last"}
    for name, response in mine.items():
        assert response.side == theirs[name].side
        assert_close(response.signal, theirs[name].signal, 1e-5)
        assert_close(response.spectrum.values, theirs[name].spectrum.values, 1e-5)


def test_measurements_are_those_of_one_layer_at_a_time(net, tmp_path):
    _, path, calls = net
    calibration = lrconvert.calibrate(path, calls[:2])
    assert calibration.allocator == "sensitivity"
    layer = next(each for each in open_network(path).layers if each.name == "second")
    rank = round(0.5 * layer.break_even_rank)
    lrconvert.factorize(
        path, f"rank={rank}", calibration=calibration, include=["second"], output=tmp_path / "b.onnx", **WHOLE
    )
    x = torch.cat([call.args[0] for call in calls[:2]])
    want, got = (run(each, x=x.numpy())[0] for each in (path, tmp_path / "b.onnx"))
    assert float(((got - want) ** 2).sum()) / 16 == pytest.approx(calibration.measured["second"][rank], rel=1e-3)


def test_a_budget_goes_where_it_matters(net, tmp_path):
    """On other examples, the outputs keep more than by the weights alone."""
    _, path, calls = net
    calibration = lrconvert.calibrate(path, calls)
    errors = {}
    for name, settings in {
        "weights": {},
        "uniform": {"calibration": calibration, "allocator": "uniform"},
        "default": {"calibration": calibration},
    }.items():
        small = tmp_path / f"{name}.onnx"
        record = lrconvert.factorize(path, "auto", param_ratio=0.4, output=small, **settings, **WHOLE)
        assert 0.396 <= record.num_params_after / record.num_params_before <= 0.4
        errors[name] = relative_error(path, small, mixed(64, 3, 12, 12, seed=1))
    assert errors["default"] < 0.9 * errors["weights"]
    assert errors["uniform"] < 0.9 * errors["weights"]
    described = lrconvert.info(tmp_path / "default.onnx")
    assert any("calibrated on 64 examples" in note for note in described.notes)
    assert "sensitivity" in described.rule


def test_auto_with_examples_spends_what_auto_would(net, tmp_path):
    _, path, calls = net
    plain = lrconvert.factorize(path, "auto", output=tmp_path / "a.small.onnx", **WHOLE)
    aware = lrconvert.factorize(
        path, "auto", calibration=lrconvert.calibrate(path, calls), output=tmp_path / "b.small.onnx", **WHOLE
    )
    assert aware.num_params_after <= plain.num_params_after
    assert aware.num_params_after > 0.98 * plain.num_params_after


def test_weights_of_bodies_and_recurrent_operators_are_not_seen(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("LSTM", ["h", "i", "r"], ["y"], hidden_size=16),
    ]
    constants = {"w": random(IN, OUT), "i": random(1, 64, OUT), "r": random(1, 64, 16)}
    path = graph(tmp_path / "a.onnx", nodes, {"x": [5, None, IN]}, constants)
    x = mixed(5, IN, 8).mT.contiguous()
    calibration = lrconvert.calibrate(path, [Call((x,), {}, 5)])
    assert calibration.responses.keys() == {"w"}
    record = lrconvert.factorize(path, "rank=4", calibration=calibration, output=tmp_path / "b.onnx", **WHOLE)
    assert [(row.name, row.data_aware) for row in record.layers] == [("w", True), ("i", False), ("r", False)]
    alone = graph(tmp_path / "c.onnx", nodes[1:], {"h": [5, None, OUT]}, {key: constants[key] for key in ("i", "r")})
    with pytest.raises(UsageError, match="met no weight"):
        lrconvert.calibrate(alone, [Call((torch.randn(5, 2, OUT),), {}, 5)])


def test_half_precision_and_data_in_another_file(tmp_path):
    weights = {"w": random(IN, OUT, dtype=np.float16)}
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], {"x": [None, IN]}, weights, kind=TensorProto.FLOAT16)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="a.data", size_threshold=0)
    calls = [Call((mixed(60, IN),), {}, 60)]
    record = lrconvert.factorize(
        path, "rank=9", calibration=lrconvert.calibrate(path, calls), output=tmp_path / "b.onnx", **WHOLE
    )
    found = relative_error(path, tmp_path / "b.onnx", calls[0].args[0].half())
    assert found == pytest.approx(record.layers[0].error, rel=0.02)


def test_on_the_command_line(net, tmp_path, cli):
    _, path, calls = net
    np.save(tmp_path / "x.npy", torch.cat([call.args[0] for call in calls]).numpy())
    small = tmp_path / "small.onnx"
    result = cli(
        "factorize", path, "-o", small, "--mac-ratio", "0.6", "--calibrate", tmp_path / "x.npy", "--keep-first", 0
    )
    assert result.code == 0, result.err
    assert "sensitivity" in result.out + result.err
    assert "64 examples" in cli("info", small).out
