"""Examples as a graph takes them: names, types, fixed sizes, and texts."""

import shutil

import numpy as np
import pytest
import torch
from graphs import FLOAT, graph, random, run
from helpers import assert_close
from onnx import TensorProto, helper

import lrconvert
from lrconvert.errors import LrconvertError, UsageError
from lrconvert.inputs import Call

IN, OUT = 48, 40
WHOLE = {"keep_first": 0, "keep_last": False}


def node(op, *names, out="y", **attributes):
    return helper.make_node(op, list(names), [out], **attributes)


def examples(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.9 ** torch.arange(shape[-1])


def test_a_batch_that_the_graph_fixes(tmp_path):
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], {"x": [4, IN]}, {"w": random(IN, OUT)})
    np.savez(tmp_path / "x.npz", examples(30, IN).numpy())
    # However many are asked for at once.
    for reading in ({}, {"batch_size": 3}, {"batch_size": 8}):
        calibration = lrconvert.calibrate(path, tmp_path / "x.npz", **reading)
        assert calibration.examples == 28
        assert calibration.notes[0].endswith("2 left out: the graph takes 4 at once")
    with pytest.raises(UsageError, match="takes 4 examples at once: give more than 3"):
        lrconvert.calibrate(path, tmp_path / "x.npz", count=3)
    with pytest.raises(UsageError, match="needs examples, and there are none"):
        lrconvert.calibrate(path, [])


def test_a_batch_that_is_not_in_front(tmp_path):
    """As recurrent networks have it: 5 steps of any number of examples."""
    path = graph(tmp_path / "a.onnx", [node("MatMul", "x", "w")], {"x": [5, None, IN]}, {"w": random(IN, OUT)})
    assert lrconvert.calibrate(path, [Call((examples(5, 8, IN),), {}, 8)]).examples == 8


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
    assert_close(mine.signal, its.signal, 1e-4)
    record = lrconvert.factorize(
        path, "rank_ratio=0.5", calibration=calibration, output=tmp_path / "b.onnx", include=["*encoder.layer*"]
    )
    assert record.difference <= 1e-4
    # The Hub's cache has links into a folder of blobs, and the tokenizer is beside the link.
    (tmp_path / "blobs").mkdir()
    path.rename(tmp_path / "blobs" / "0123")
    path.symlink_to("../../blobs/0123")
    assert lrconvert.calibrate(path, tmp_path / "texts.txt", measure=False).examples == 17
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


def test_a_mask_without_its_name_is_one_all_the_same(tmp_path):
    given = {
        name: helper.make_tensor_value_info(name, kind, ["batch", "length", *rest])
        for name, kind, rest in (("x", FLOAT, [IN]), ("attention_mask", TensorProto.INT64, []))
    }
    nodes = [
        node("MatMul", "x", "w", out="h"),
        node("Cast", "attention_mask", out="m", to=FLOAT),
        node("Unsqueeze", "m", "last", out="shown"),
        node("Mul", "h", "shown"),
    ]
    path = graph(tmp_path / "a.onnx", nodes, given, {"w": random(IN, OUT), "last": np.array([2])})
    x, mask = examples(4, 9, IN), torch.arange(9) < torch.tensor([[9], [4], [2], [7]])
    named = lrconvert.calibrate(path, [Call((), {"x": x, "attention_mask": mask.long()}, 4)])
    bare = lrconvert.calibrate(path, [Call((x, mask.long()), {}, 4)])
    hidden = x * mask[:, :, None] * 1e9 ** (~mask[:, :, None]).float()
    for found in (named, bare, lrconvert.calibrate(path, [Call((hidden, mask.long()), {}, 4)])):
        assert_close(found.responses["w"].signal, named.responses["w"].signal, 1e-6)


def test_numbers_of_the_graphs_own_type(tmp_path):
    def of(kind, shape=(None, IN), nodes=None):
        given = {"x": helper.make_tensor_value_info("x", kind, shape)}
        nodes = nodes or [node("Cast", "x", out="f", to=FLOAT), node("MatMul", "f", "w")]
        return graph(tmp_path / f"{kind}.onnx", nodes, given, {"w": random(IN, OUT)})

    def calibrated(path, x):
        return lrconvert.calibrate(path, [Call((x,), {}, len(x))], measure=False)

    whole = torch.randint(0, 255, (64, IN))
    # As they are in files, whatever they were before.
    np.savez(tmp_path / "x.npz", whole.numpy())
    for kind, dtype in ((TensorProto.UINT8, torch.uint8), (TensorProto.INT32, torch.int32)):
        path = of(kind)
        signal = calibrated(path, whole.to(dtype)).responses["w"].signal
        assert_close(lrconvert.calibrate(path, tmp_path / "x.npz", measure=False).responses["w"].signal, signal, 1e-6)
    with pytest.raises(UsageError, match="hold uint8: scale and normalize them"):
        calibrated(of(FLOAT), whole.to(torch.uint8))
    with pytest.raises(UsageError, match="takes float16, but the examples hold numbers that are too large for it"):
        calibrated(of(TensorProto.FLOAT16), torch.full((64, IN), 1e5))
    # Numbers that only float64 can tell apart.
    nodes = [node("Sub", "x", "far", out="near"), node("Cast", "near", out="f", to=FLOAT), node("MatMul", "f", "w")]
    given = {"x": helper.make_tensor_value_info("x", TensorProto.DOUBLE, [None, IN])}
    path = graph(tmp_path / "far.onnx", nodes, given, {"w": random(IN, OUT), "far": np.float64(1.7e9)})
    x = examples(64, IN)
    calibration = calibrated(path, x.double() + 1.7e9)
    small = tmp_path / "small.onnx"
    record = lrconvert.factorize(path, "rank=8", calibration=calibration, output=small, **WHOLE)
    want, got = (run(each, x=x.double().numpy() + 1.7e9)[0].double() for each in (path, small))
    assert float((got - want).norm() / want.norm()) == pytest.approx(record.layers[0].error, rel=1e-4)


def test_graphs_that_cannot_be_run(tmp_path):
    nodes = [helper.make_node("Foo", ["x"], ["f"], domain="my.ops"), node("MatMul", "f", "w")]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", FLOAT, [None, IN])],
            [helper.make_tensor_value_info("y", FLOAT, None)],
            [helper.make_tensor("w", FLOAT, [IN, OUT], random(IN, OUT).flatten())],
        ),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)],
        ir_version=8,
    )
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=r"onnxruntime cannot load .*Foo.*: leave the examples out"):
        lrconvert.calibrate(path, [Call((examples(8, IN),), {}, 8)])
