"""Quantized checkpoints are refused with the reason, and only where what would be factorized is quantized."""

import json

import pytest
import torch
from safetensors.torch import save_file

import lrconvert
from lrconvert.checkpoints import open_checkpoint
from lrconvert.errors import CheckpointError

F8 = torch.float8_e4m3fn


def int32(*shape):
    return torch.randint(0, 9, shape, dtype=torch.int32)


def bytes_of(*shape):
    return torch.randint(0, 9, shape).to(torch.uint8)


# method to (the keys of one layer, what config.json says, what the message says)
METHODS = {
    "gptq": (
        {"qweight": int32(8, 64), "qzeros": int32(1, 8), "scales": torch.ones(1, 64).half(), "g_idx": int32(64)},
        "gptq",
        "GPTQ",
    ),
    "awq": ({"qweight": int32(64, 8), "qzeros": int32(1, 8), "scales": torch.ones(1, 64).half()}, "awq", "AWQ"),
    "awq without a config": (
        {"qweight": int32(64, 8), "qzeros": int32(1, 8), "scales": torch.ones(8)},
        None,
        "GPTQ or AWQ",
    ),
    "nf4": (
        {
            "weight": bytes_of(2048, 1),
            "weight.absmax": torch.ones(64),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": bytes_of(90),
        },
        "bitsandbytes",
        "bitsandbytes (nf4)",
    ),
    "int8": (
        {"weight": torch.ones(64, 64).to(torch.int8), "SCB": torch.ones(64)},
        "bitsandbytes",
        "bitsandbytes (int8)",
    ),
    "fp8": ({"weight": torch.ones(64, 64).to(F8), "weight_scale_inv": torch.ones(1, 1)}, "fp8", "FP8 with scales"),
    "compressed fp8": (
        {"weight": torch.ones(64, 64).to(F8), "weight_scale": torch.ones(64, 1)},
        "compressed-tensors",
        "compressed-tensors",
    ),
    "compressed int4": (
        {"weight_packed": int32(64, 8), "weight_scale": torch.ones(64, 1), "weight_shape": torch.tensor([64, 64])},
        "compressed-tensors",
        "compressed-tensors",
    ),
    "int8 with scales": (
        {"weight": torch.ones(64, 64).to(torch.int8), "weight_scale": torch.ones(64)},
        None,
        "FP8 or INT8",
    ),
    "quanto": ({"weight._data": torch.ones(64, 64).to(torch.int8), "weight._scale": torch.ones(64, 1)}, None, "quanto"),
    "hqq": ({"W_q": bytes_of(32, 64), "scale": torch.ones(64)}, "hqq", "HQQ"),
}


def write(folder, layer, config=None, **more):
    """A folder of two blocks whose projections are quantized, with an embedding and a head that are not."""
    folder.mkdir(exist_ok=True)
    state = {"embed_tokens.weight": torch.randn(64, 64), "lm_head.weight": torch.randn(64, 64), **more}
    for block in range(2):
        state |= {f"layers.{block}.proj.{key}": value.clone() for key, value in layer.items()}
        state[f"layers.{block}.norm.weight"] = torch.ones(64)
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": config}}))
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_named_with_the_way_out(tmp_path, cli, name):
    layer, config, said = METHODS[name]
    folder = write(tmp_path / "model", layer, config)
    for arguments in (("analyze", folder), ("factorize", folder, "-o", tmp_path / "out", "--rank", "4")):
        line = cli.fails(1, *arguments)
        assert f"2 layers are quantized by {said}" in line
        assert "(layers.0.proj, …)" in line
        assert (
            "factorize the checkpoint from before quantization and quantize the result, or dequantize it first" in line
        )
    # what the file is can still be asked
    assert any(said in note for note in json.loads(cli("info", folder, "--json").out)["notes"])


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_quantized_can_be_factorized_beside_it(tmp_path, cli, name):
    layer, config, _ = METHODS[name]
    folder = write(tmp_path / "model", layer, config)
    for chosen in (("-i", "lm_head"), ("-e", "layers*")):
        out = tmp_path / f"out{chosen[0]}"
        more = ("--factorize-last", "--keep-first", "0", *chosen)
        assert cli("analyze", folder, *chosen).code == 0
        result = cli("factorize", folder, "-o", out, "--rank", "4", *more)
        assert result.code == 0, result.err
        written, source = open_checkpoint(out).tensors, open_checkpoint(folder).tensors
        assert written["lm_head.u.weight"].shape == (4, 64)
        for key, ref in source.items():
            if key.startswith("layers"):
                assert torch.equal(written[key].read().view(torch.uint8), ref.read().view(torch.uint8))
    # a plan made elsewhere does not get past it either
    plan = lrconvert.make_plan(folder, "rank=4", include=["lm_head"], keep_first=0)
    small = next(each for each in plan.layers if each.name == "lm_head")
    chosen = plan.model_copy(
        update={"layers": (small.model_copy(update={"name": "layers.0.proj", "weight": "layers.0.proj.weight"}),)}
    )
    if "weight" in layer and layer["weight"].shape == (64, 64):
        with pytest.raises(CheckpointError, match="one layer is quantized"):
            lrconvert.factorize(folder, chosen, output=tmp_path / "planned")


def test_a_quantized_embedding_is_in_nobodys_way(tmp_path, cli):
    folder = tmp_path / "model"
    folder.mkdir()
    state = {"embed_tokens.weight": torch.ones(64, 64).to(F8), "embed_tokens.weight_scale": torch.ones(64)}
    linears = {f"layers.{n}.proj.weight": torch.randn(64, 64) for n in range(3)}
    save_file({**state, **linears}, folder / "model.safetensors")
    assert cli("analyze", folder).code == 0
    record = json.loads(cli("factorize", folder, "-o", tmp_path / "out", "--rank", "4", "--json").out)
    reasons = {row["name"]: row["reason"] for row in record["layers"]}
    assert reasons["embed_tokens"] == "quantized by FP8 or INT8 with scales"
    assert any(row["rank"] == 4 for row in record["layers"])


def test_a_scale_beside_real_weights_is_no_quantization(tmp_path, cli):
    state = {"a.weight": torch.randn(64, 64), "a.weight_scale": torch.ones(64), "b.weight": torch.randn(64, 64)}
    state |= {"c.scales": torch.ones(3), "c.weight": torch.randn(64, 64).bfloat16()}
    save_file(state, tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").quantized == {}
    assert cli("analyze", tmp_path / "m.safetensors").code == 0


def test_a_model_is_not_blamed_for_quantized_weights(tmp_path, cli):
    layer, _, _ = METHODS["gptq"]
    folder = write(tmp_path / "model", layer)
    line = cli.fails(1, "analyze", folder, "--model", "torchvision/resnet18")
    assert "quantized by GPTQ" in line


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchs_own_quantized_tensors(tmp_path, cli):
    weight = torch.randn(8, 8)
    for tensor in (
        torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        torch.quantize_per_channel(weight, torch.ones(8), torch.zeros(8), 0, torch.quint8),
    ):
        torch.save({"fc.weight": tensor, "fc.bias": torch.zeros(8)}, tmp_path / "m.pt")
        line = cli.fails(1, "analyze", tmp_path / "m.pt")
        assert f"quantized by torch ({tensor.dtype}) (fc.weight)" in line
        assert "dequantize it first" in line
    dynamic = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(8, 8)), {torch.nn.Linear})
    torch.save({"state_dict": dynamic.state_dict(), "epoch": 3}, tmp_path / "m.pt")
    assert "one layer is quantized by torch.ao.quantization (0)" in cli.fails(1, "analyze", tmp_path / "m.pt")
