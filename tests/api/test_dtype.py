"""`export --dtype`: all floating-point weights in another type, in every format."""

import json

import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lrconvert
from lrconvert.checkpoints import hf_config
from lrconvert.errors import ModelError, UnknownNameError, UsageError, WeightError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def dense(tmp_path):
    """A checkpoint with integers, 8-bit floats and tied weights among its tensors; its path and tensors."""
    torch.manual_seed(0)
    table = torch.randn(40, 32)
    state = {
        "embed.weight": table,
        "hidden.weight": torch.randn(64, 32, dtype=torch.bfloat16),
        "hidden.bias": torch.randn(64, dtype=torch.float64),
        "steps": torch.tensor(7),
        "small": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "head.weight": table,
    }
    torch.save(state, tmp_path / "dense.pt")
    return tmp_path / "dense.pt", state


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_16_bits_and_more(dense, tmp_path, dtype, suffix):
    path, state = dense
    lrconvert.factorize(path, "rank=8", output=tmp_path / "small.safetensors", include=["hidden"])
    lrconvert.export(tmp_path / "small.safetensors", tmp_path / f"out.{suffix}", "dense", dtype=dtype)
    written = lrconvert.analyze(tmp_path / f"out.{suffix}").network.tensors
    assert written["small"].dtype == torch.float8_e4m3fn
    assert torch.equal(written["steps"].read(), state["steps"])
    for key in ("embed.weight", "hidden.bias", "head.weight"):
        assert torch.equal(written[key].read(), state[key].to(DTYPES[dtype]))
    assert written["hidden.weight"].dtype == DTYPES[dtype]
    assert written["head.weight"].alias_of == "embed.weight"


def test_a_number_that_is_too_large_is_named_and_nothing_written(tmp_path):
    torch.save({"a.weight": torch.tensor([[1.0, float("inf")], [2.0, 70_000.0]])}, tmp_path / "a.pt")
    with pytest.raises(WeightError, match=r"a.weight: 7e\+04 is too large for float16; use bfloat16"):
        lrconvert.export(tmp_path / "a.pt", tmp_path / "b.safetensors", "safetensors", dtype="float16")
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
    lrconvert.export(tmp_path / "a.pt", tmp_path / "b.safetensors", "safetensors", dtype="bfloat16")
    assert load_file(tmp_path / "b.safetensors")["a.weight"].isinf().sum() == 1


def test_transformers_loads_what_was_converted(tmp_path):
    transformers, networks = pytest.importorskip("transformers"), pytest.importorskip("hf_networks")
    networks.build("clip").save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    for source in ("small", "dense"):
        lrconvert.export(tmp_path / source, tmp_path / f"{source}16", "safetensors", dtype="float16")
        model = transformers.CLIPModel.from_pretrained(tmp_path / f"{source}16")
        assert {each.dtype for each in model.parameters()} == {torch.float16}
        before = dict(lrconvert.load(tmp_path / source).named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name].half())
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "float32"


def test_every_part_of_a_configuration_says_so(tmp_path):
    parts = {"model_type": "x", "dtype": "float32", "text": {"torch_dtype": "float32", "width": 3}}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    hf_config.write_config(tmp_path, None, torch.bfloat16)
    parts = {"model_type": "x", "dtype": "bfloat16", "text": {"torch_dtype": "bfloat16", "width": 3}}
    assert json.loads((tmp_path / "config.json").read_text()) == parts


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_graph_of_another_type(tmp_path, format):
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))\n"
    )
    dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    torch.save(dense.bfloat16().state_dict(), tmp_path / "dense.pt")
    model = {"model": f"{tmp_path / 'net.py'}:make", "input_shape": (32,)}
    if format == "onnx":
        with pytest.raises(ModelError, match="in bfloat16; --dtype float32 or float16 converts it"):
            lrconvert.export(tmp_path / "dense.pt", tmp_path / "out.onnx", format, **model)
    record = lrconvert.export(tmp_path / "dense.pt", tmp_path / f"out.{format}", format, dtype="float32", **model)
    assert record.difference < 1e-5
    if format == "onnx":
        weights = onnx.load(tmp_path / "out.onnx").graph.initializer
        assert {each.data_type for each in weights if each.dims} == {onnx.TensorProto.FLOAT}
        with pytest.raises(UsageError, match="export the model that it came from"):
            lrconvert.export(tmp_path / "out.onnx", tmp_path / "back.onnx", "dense", dtype="float16")


def test_an_unknown_type_is_refused(dense, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'bfloat16'"):
        lrconvert.export(dense[0], tmp_path / "out.pt", "dense", dtype="bf16")
