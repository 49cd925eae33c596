"""timm's networks: factorized, loaded on meta and strictly, equal to the merged dense network, ONNX equal."""

import copy
import sys

import pytest
import torch
from helpers import assert_close, run_seeded

import lrconvert
from lrconvert.errors import ModelError, UnknownNameError, UsageError
from lrconvert.inputs import one_input
from lrconvert.layers import LowRank
from lrconvert.models import find_architecture
from lrconvert.network import open_network

timm = pytest.importorskip("timm")

# name to (input size, arguments that make it small)
NETWORKS = {
    "vit_tiny_patch16_224": (64, {"depth": 2, "img_size": 64}),
    "deit_tiny_patch16_224": (64, {"depth": 2, "img_size": 64}),
    "swin_tiny_patch4_window7_224": (56, {"depths": [2, 2], "num_heads": [3, 6], "img_size": 56}),
    "swinv2_tiny_window8_256": (64, {"depths": [2, 2], "num_heads": [3, 6], "img_size": 64}),
    "beit_base_patch16_224": (64, {"depth": 2, "embed_dim": 96, "num_heads": 3, "img_size": 64}),
    "eva02_tiny_patch14_224": (56, {"depth": 2, "img_size": 56}),
    "convnext_atto": (64, {"depths": [1, 1, 2, 1]}),
    "efficientnet_b0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),  # convolutions that pad by themselves
    "mixer_s32_224": (96, {"img_size": 96}),
    "resmlp_12_224": (64, {"img_size": 64}),
}
# Those that are factorized once more, with pivots.
PIVOTED = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "efficientnet_b0", "mixer_s32_224")


def dense_model(name, args):
    model = timm.create_model(name, **args)
    # Zero heads equal anything, and layer scales of 1e-6 hide the layers behind them.
    for key, parameter in model.named_parameters():
        if key.endswith((".gamma", ".ls1", ".ls2")):
            torch.nn.init.constant_(parameter, 0.5)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.fixture(scope="module", params=[*NETWORKS, *(f"{name} pivoted" for name in PIVOTED)])
def network(request, short_lived_folder):
    """(input size, folder, record) at rank ratio 1/4 in every layer that can be; dense, small and merged files."""
    name, _, pivoted = request.param.partition(" ")
    size, args = NETWORKS[name]
    with short_lived_folder() as folder:
        torch.manual_seed(0)
        torch.save(dense_model(name, args).state_dict(), folder / "dense.pt")
        record = lrconvert.factorize(
            folder / "dense.pt",
            "rank_ratio=0.25",
            output=folder / "small.safetensors",
            model=f"timm/{name}",
            model_args=args,
            keep_first=0,
            keep_last=False,
            pivoted=bool(pivoted),
        )
        lrconvert.export(folder / "small.safetensors", folder / "merged.safetensors", "dense")
        yield size, folder, record


def test_equal_to_the_merged_network(network):
    size, folder, record = network
    assert record.order == "execution"
    small = lrconvert.load(folder / "small.safetensors")
    merged = lrconvert.load(folder / "merged.safetensors")
    assert sum(parameter.numel() for parameter in small.parameters()) == record.num_params_after
    factorized = sum(row.rank is not None for row in record.layers)
    assert sum(isinstance(module, LowRank) for module in small.modules()) == factorized >= 8
    inputs = torch.randn(4, 3, size, size)
    assert_close(run_seeded(small.eval(), inputs), run_seeded(merged.eval(), inputs), 1e-5)
    # The dense network is another one: what the factors leave out shows.
    name = record.model.removeprefix("timm/")
    dense = lrconvert.load(folder / "dense.pt", record.model, model_args=NETWORKS[name][1])
    with pytest.raises(AssertionError, match="relative difference"):
        assert_close(run_seeded(small, inputs), run_seeded(dense, inputs), 1e-3)
    # Batch statistics of random networks amplify float32 rounding, so train mode is compared in float64.
    small = small.double().train()
    merged = lrconvert.merge(copy.deepcopy(small))
    assert_close(run_seeded(small, inputs.double()), run_seeded(merged, inputs.double()), 1e-10)


def test_onnx_is_equal_to_the_network(network, tmp_path):
    size, folder, _ = network
    record = lrconvert.export(
        folder / "small.safetensors", tmp_path / "small.onnx", "onnx", input_shape=(3, size, size)
    )
    assert record.batch_sizes == (1, 3)
    assert record.difference is not None
    assert record.difference < 1e-4


def test_a_name_may_carry_the_tag_of_its_weights():
    plain = find_architecture("timm/vit_tiny_patch16_224")
    tagged = find_architecture("timm/vit_tiny_patch16_224.augreg_in21k", {"depth": 1})
    assert plain.inputs == tagged.inputs == one_input((3, 224, 224))
    assert tagged.build().head.out_features == 21_843
    assert find_architecture("timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k").inputs == one_input((3, 384, 384))


def test_arguments_change_the_input_shape():
    assert find_architecture("timm/convnext_atto", {"in_chans": 1}).inputs == one_input((1, 224, 224))
    assert find_architecture("timm/vit_tiny_patch16_224", {"img_size": 64}).inputs == one_input((3, 64, 64))
    assert find_architecture("timm/vit_tiny_patch16_224", {"img_size": [32, 64]}).inputs == one_input((3, 32, 64))


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(
        UnknownNameError, match=r"timm model 'vit_tini_patch16_224': did you mean 'vit_tiny_patch16_224'"
    ):
        find_architecture("timm/vit_tini_patch16_224")
    with pytest.raises(UnknownNameError, match=r"tag of timm/vit_tiny_patch16_224 'augreg_in22k'.*'augreg_in21k'"):
        find_architecture("timm/vit_tiny_patch16_224.augreg_in22k")
    # timm would look this one up on the internet.
    with pytest.raises(UnknownNameError, match="timm model 'hf-hub:timm/vit_tiny_patch16_224'"):
        find_architecture("timm/hf-hub:timm/vit_tiny_patch16_224")
    with pytest.raises(ModelError, match=r"timm/convnext_atto\(wide=True\) cannot be built"):
        find_architecture("timm/convnext_atto", {"wide": True}).build()


@pytest.mark.parametrize("args", [{"pretrained": True}, {"checkpoint_path": "weights.pt"}])
def test_weights_are_never_loaded(args):
    with pytest.raises(UsageError, match="the checkpoint brings them"):
        find_architecture("timm/convnext_atto", args)


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'lrconvert\[timm\]'"):
        find_architecture("timm/convnext_atto")


def test_on_the_command_line(cli, tmp_path):
    dense, small = tmp_path / "dense.pt", tmp_path / "small.safetensors"
    torch.save(dense_model("deit_tiny_patch16_224", {"depth": 2, "num_classes": 10}).state_dict(), dense)
    model = ("--model", "timm/deit_tiny_patch16_224", "--model-arg", "depth=2", "--model-arg", "num_classes=10")
    analysis = cli("analyze", dense, *model, "--json")
    assert analysis.code == 0, analysis.err
    assert '"order": "execution"' in analysis.out
    assert cli("factorize", dense, "-o", small, "--rank-ratio", "0.25", *model).code == 0
    assert "timm/deit_tiny_patch16_224" in cli("info", small).out
    assert len(lrconvert.load(small).blocks) == 2
    line = cli.fails(1, "analyze", dense, "--model", "timm/deit_tiny_patch16_224", "--model-arg", "depth=2")
    assert "--model-arg num_classes=10" in line


@pytest.mark.parametrize("tag", [None, "our_own"])
def test_a_folder_as_on_the_hub_names_its_architecture(tmp_path, tag):
    torch.manual_seed(0)
    dense = timm.create_model("convnext_atto", num_classes=7, depths=(1, 1, 2, 1)).eval()
    if tag is not None:
        dense.pretrained_cfg = {**dense.pretrained_cfg, "tag": tag, "mean": [0.1, 0.2, 0.3]}
    timm.models.save_for_hf(dense, tmp_path / "dense", model_args={"depths": [1, 1, 2, 1]})
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    assert record.order == "execution"
    assert record.model == ("timm/convnext_atto" if tag else "timm/convnext_atto.d2_in1k")
    small = lrconvert.load(tmp_path / "small")
    assert small.head.fc.out_features == 7
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(lrconvert.load(tmp_path / "dense")(x), dense(x), 1e-6)
        assert_close(small(x), lrconvert.merge(copy.deepcopy(small))(x), 1e-4)
    mean = open_network(tmp_path / "small").images.mean
    assert mean == ((0.1, 0.2, 0.3) if tag else (0.485, 0.456, 0.406))


@pytest.mark.parametrize("config", ["{", "[]", '{"architecture": 3}', '{"architecture": "convnext_gigantic"}'])
def test_other_folders_name_none(tmp_path, config):
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(config)
    assert open_network(tmp_path).architecture is None
