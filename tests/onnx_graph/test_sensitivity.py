"""What low ranks of a graph's layers do to its outputs, measured."""

import numpy as np
import onnx
import pytest
import torch
from graphs import FLOAT, graph, random, run
from onnx import TensorProto, helper

import lrconvert
from lrconvert.errors import UsageError
from lrconvert.inputs import Call
from lrconvert.network import open_network

IN = 32
WHOLE = {"keep_first": 0, "keep_last": False}


def op(kind, *names, out="y", **attributes):
    return helper.make_node(kind, list(names), [out], **attributes)


def examples(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 0.9 ** torch.arange(shape[-1])


def lost(path, small, x):
    """‖y′ − y‖² of each output, for one example."""
    pairs = zip(run(path, x=x.numpy()), run(small, x=x.numpy()), strict=True)
    return [float(((got - want).double() ** 2).sum()) / len(x) for want, got in pairs]


def at_half(path, calibration, layer, small):
    """Factorize one layer at half its break-even rank, which is measured; returns that rank."""
    rank = round(0.5 * next(each for each in open_network(path).layers if each.name == layer).break_even_rank)
    chosen = {"include": [layer], "output": small, "overwrite": True, "calibration": calibration}
    lrconvert.factorize(path, f"rank={rank}", **chosen, **WHOLE)
    return rank


@pytest.mark.parametrize("names", [("", ""), ("v", "w")])
def test_constants_are_known_by_what_their_nodes_compute(names, tmp_path):
    """The tensor in a Constant node may be called anything, nothing, or what another one computes."""
    nodes = []
    for output, name in zip(("w", "v"), names, strict=True):
        value = onnx.numpy_helper.from_array(random(IN, IN), name)
        nodes.append(helper.make_node("Constant", [], [output], value=value))
    nodes += [op("MatMul", "x", "w", out="h"), op("Tanh", "h", out="g"), op("MatMul", "g", "v")]
    path, x = graph(tmp_path / "a.onnx", nodes, {"x": [None, IN]}, {}), examples(64, IN)
    calibration = lrconvert.calibrate(path, [Call((x,), {}, 64)])
    assert calibration.measured.keys() == {"w", "v"}
    for layer, curve in calibration.measured.items():
        rank = at_half(path, calibration, layer, tmp_path / "b.onnx")
        assert curve[rank] == pytest.approx(lost(path, tmp_path / "b.onnx", x)[0], rel=1e-3)


def heads(path, scale):
    """A trunk and two heads, of which the first is multiplied by `scale`."""
    torch.manual_seed(0)
    nodes = [
        op("MatMul", "x", "trunk", out="t"),
        op("Tanh", "t", out="s"),
        op("MatMul", "s", "a", out="u"),
        op("Mul", "u", "scale", out="first"),
        op("MatMul", "s", "b", out="second"),
        op("ArgMax", "u", out="label"),
    ]
    constants = {name: random(IN, IN) for name in ("trunk", "a", "b")} | {"scale": np.float32(scale)}
    outputs = [helper.make_tensor_value_info("label", TensorProto.INT64, None)]
    outputs += [helper.make_tensor_value_info(name, FLOAT, None) for name in ("first", "second")]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", FLOAT, [None, IN])],
            outputs,
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def test_layers_of_a_second_head_are_measured_by_it(tmp_path):
    x, ranks = examples(64, IN), []
    for scale in (1.0, 1e3, 1e-3):
        path = heads(tmp_path / f"{scale}.onnx", scale)
        calibration = lrconvert.calibrate(path, [Call((x,), {}, 64)])
        _, first, second = (float((each.double() ** 2).sum()) for each in run(path, x=x.numpy()))
        at = {}
        for layer in ("trunk", "a", "b"):
            rank = at_half(path, calibration, layer, tmp_path / "b.onnx")
            _, *at[layer] = lost(path, tmp_path / "b.onnx", x)
            own = at[layer][0] if layer != "b" else at[layer][1] * first / second
            assert calibration.measured[layer][rank] == pytest.approx(own, rel=1e-3)
        plan = lrconvert.make_plan(path, param_ratio=0.65, calibration=calibration, **WHOLE)
        ranks.append([layer.rank for layer in plan.layers])
    assert ranks[0] == ranks[1] == ranks[2]


def test_outputs_that_are_not_finite_or_change_their_shape(tmp_path):
    """The logarithm of what is below 0 is no number; what is above 0 is more or less of it."""
    torch.manual_seed(0)
    nodes = [
        op("MatMul", "x", "w", out="h"),
        op("Log", "h", out="log"),
        op("Greater", "h", "zero", out="is"),
        op("Reshape", "is", "flat", out="mask"),
        op("Reshape", "h", "flat", out="all"),
        op("Compress", "all", "mask", out="found"),
    ]
    constants = {"w": random(IN, IN), "zero": np.float32(0), "flat": np.array([-1])}
    x = examples(64, IN)
    paths = [
        graph(tmp_path / f"{name}.onnx", nodes, {"x": [None, IN]}, constants, outputs)
        for name, outputs in {"both": ("found", "log"), "found": ("found",)}.items()
    ]
    calls = [Call((x,), {}, 64)]
    calibration = lrconvert.calibrate(paths[0], calls)
    rank = at_half(paths[0], calibration, "w", tmp_path / "b.onnx")
    (found, want), (_, got) = (run(each, x=x.numpy()) for each in (paths[0], tmp_path / "b.onnx"))
    known = want.isfinite()
    error = torch.where(got[known].isfinite(), got[known] - want[known], -want[known]).double().square().sum() / 64
    unit = found.double().square().sum() / want[known].double().square().sum()
    assert calibration.measured["w"][rank] == pytest.approx(float(error * unit), rel=1e-3)
    nothing = lrconvert.calibrate(paths[1], calls)
    assert not nothing.measured
    assert nothing.allocator == "output_error"
    assert any("no layer's effect can be measured" in note for note in nothing.notes)
    with pytest.raises(UsageError, match=r"needs measurements: no layer's effect .* change shape$"):
        lrconvert.make_plan(paths[1], param_ratio=0.8, allocator="sensitivity", calibration=nothing, **WHOLE)
    assert lrconvert.make_plan(paths[1], param_ratio=0.875, calibration=nothing, **WHOLE).low_rank


def test_layers_that_cannot_be_measured_stay_dense(tmp_path):
    """onnxruntime takes no bfloat16 from outside; nothing that is returned depends on the last weight's product."""
    torch.manual_seed(0)
    half = helper.make_tensor("w", TensorProto.BFLOAT16, [IN, IN], torch.randn(IN * IN).tolist())
    nodes = [
        op("Cast", "w", out="c", to=FLOAT),
        op("MatMul", "x", "c", out="h"),
        op("Tanh", "h", out="g"),
        op("MatMul", "g", "v"),
        op("MatMul", "y", "last", out="z"),
    ]
    path = graph(
        tmp_path / "a.onnx", nodes, {"x": [None, IN]}, {"w": half, "v": random(IN, IN), "last": random(IN, IN)}
    )
    calibration = lrconvert.calibrate(path, [Call((examples(64, IN),), {}, 64)])
    assert calibration.responses.keys() == {"w", "v", "last"}
    assert calibration.measured.keys() == {"v"}
    plan = lrconvert.make_plan(path, param_ratio=0.9, calibration=calibration, **WHOLE)
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["w"] == reasons["last"] == "calibration says nothing of it"
    assert [layer.name for layer in plan.low_rank] == ["v"]


def test_nothing_is_measured_that_nobody_asks_for(tmp_path, cli, monkeypatch):
    path = graph(tmp_path / "a.onnx", [op("MatMul", "x", "w")], {"x": [None, IN]}, {"w": random(IN, IN)})
    np.save(tmp_path / "x.npy", examples(64, IN).numpy())
    measured = []
    monkeypatch.setattr("lrconvert.api.calibrate.measured_curves", lambda *_: measured.append(1) or {})

    def times(*settings):
        measured.clear()
        given = ("--calibrate", tmp_path / "x.npy", "--keep-first", "0", "--factorize-last", "--dry-run")
        cli("factorize", path, *given, *settings)
        return len(measured)

    assert times("--rank-ratio", "0.25") == 0
    assert times("--param-ratio", "0.8", "--allocator", "uniform") == 0
    assert times("--param-ratio", "0.8") == 1
    assert times("--auto") == 1
    assert times("--param-ratio", "0.8", "--allocator", "sensitivity") == 1
