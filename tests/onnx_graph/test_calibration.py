"""Graphs factorized for least error of what they compute on examples."""

import copy
import shutil

import numpy as np
import onnx
import pytest
import torch
from graphs import FLOAT, graph, random, run
from helpers import assert_close
from onnx import TensorProto, helper
from torch import nn

import lrconvert
from lrconvert.errors import LrconvertError, UsageError
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


def test_a_weight_that_is_a_constant_node(tmp_path):
    weight = helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(random(IN, OUT)))
    path = graph(tmp_path / "a.onnx", [weight, node("MatMul", "x", "w")], {"x": [None, IN]}, {})
    calibration = lrconvert.calibrate(path, [Call((mixed(60, IN),), {}, 60)])
    assert calibration.measured.keys() == {"w"}


def test_a_batch_that_the_graph_fixes(tmp_path):
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], {"x": [4, IN]}, {"w": random(IN, OUT)})
    np.savez(tmp_path / "x.npz", mixed(30, IN).numpy())
    assert lrconvert.calibrate(path, tmp_path / "x.npz").examples == 28
    with pytest.raises(UsageError, match="takes 4 examples at once"):
        lrconvert.calibrate(path, tmp_path / "x.npz", count=3)


def test_texts_and_the_tokenizer_beside_the_graph(real_checkpoints, tmp_path):
    pytest.importorskip("transformers")
    source, folder = real_checkpoints["minilm"], tmp_path / "minilm"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder)
    (folder / "onnx").mkdir()
    path = folder / "onnx" / "model.onnx"
    lrconvert.export(source, path, "onnx")
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "boil",
        "their",
        "jug",
        "of",
        "liquid",
        "oxygen",
    ]
    lines = [" ".join([*words[i % len(words) :], f"{i} times"][: 3 + i]) for i in range(17)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    calibration = lrconvert.calibrate(path, tmp_path / "texts.txt", measure=False)
    assert calibration.examples == 17
    # What the mask hides counts no more in a graph than in its model.
    theirs = lrconvert.calibrate(source, tmp_path / "texts.txt", two_sided=False)
    name = "encoder.layer.3.attention.self.query"
    mine, its = (each.responses[name] for each in (calibration, theirs))
    assert_close(mine.mean, its.mean, 1e-4)
    # The model has a bias that makes up for the mean.
    assert_close(mine.signal - mine.mean[:, :, None] * mine.mean[:, None, :], its.signal, 1e-4)
    record = lrconvert.factorize(
        path, "rank_ratio=0.5", calibration=calibration, output=tmp_path / "b.onnx", include=["*encoder.layer*"]
    )
    assert record.difference <= 1e-4
    (folder / "tokenizer.json").unlink()
    for file in folder.glob("vocab*"):
        file.unlink()
    with pytest.raises(LrconvertError, match=r"model\.onnx has no tokenizer beside it"):
        lrconvert.calibrate(path, tmp_path / "texts.txt")
    other = graph(tmp_path / "o.onnx", [node("MatMul", "x", "w")], {"x": [None, IN]}, {"w": random(IN, OUT)})
    with pytest.raises(UsageError, match="takes x, not input_ids"):
        lrconvert.calibrate(other, tmp_path / "texts.txt")


def test_what_the_graph_does_not_take(tmp_path, cli):
    given = {"x": [None, 3, IN], "n": helper.make_tensor_value_info("n", TensorProto.INT64, [None, 1])}
    nodes = [
        helper.make_node("Cast", ["n"], ["f"], to=FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        node("Add", "f", "h"),
    ]
    path = graph(tmp_path / "a.onnx", nodes, given, {"w": random(IN, OUT)})

    def refused(match, **arrays):
        tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
        with pytest.raises(UsageError, match=match):
            lrconvert.calibrate(path, [Call((), tensors, 2)])

    x, n = np.ones((2, 3, IN), np.float32), np.ones((2, 1), np.int64)
    refused(r"takes x, n, but the examples give x$", x=x)
    refused(r"takes x, n, but the examples give x, n, z$", x=x, n=n, z=n)
    refused(
        r"input 'x' takes float \(\?, 3, 48\), but the examples hold float32 \(2, 4, 48\)", x=x.repeat(2, 1)[:, :4], n=n
    )
    refused(r"input 'n' takes int64 \(\?, 1\), but the examples hold float32", x=x, n=n.astype(np.float32))
    refused("cannot be run with these examples: .*Add", x=x, n=n)
    np.save(tmp_path / "x.npy", x)
    arguments = ("-o", tmp_path / "b.onnx", "--rank", "3", "--calibrate", tmp_path / "x.npy")
    assert "fitted in turn" in cli.fails(2, "factorize", path, *arguments, "--sequential")
    assert "takes x, n" in cli.fails(2, "factorize", path, *arguments)
    assert not (tmp_path / "b.onnx").exists()


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
