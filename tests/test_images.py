"""What folders say of how images are prepared for their network."""

import json

import pytest

import lrconvert
from lrconvert.checkpoints import open_checkpoint
from lrconvert.images import ImagePreparation, images_in

HALF = ImagePreparation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
VIT = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("preprocessor_config.json", VIT, HALF),
        ("preprocessor_config.json", {**VIT, "do_normalize": True}, HALF),
        ("preprocessor_config.json", {**VIT, "do_normalize": False}, None),
        ("preprocessor_config.json", {"image_mean": [0.5]}, None),
        ("preprocessor_config.json", {"image_mean": "gray", "image_std": [1.0]}, None),
        ("preprocessor_config.json", [1, 2], None),
        ("config.json", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "tag": "x"}}, HALF),
        ("config.json", {"pretrained_cfg": None}, None),
        ("config.json", {"mean": [0.5] * 3, "std": [0.5] * 3}, None),
        ("other.json", VIT, None),
    ],
)
def test_mean_and_std_of_a_folder(tmp_path, file, content, found):
    (tmp_path / file).write_text(json.dumps(content))
    assert images_in(tmp_path) == (found or ImagePreparation())


def test_what_a_folder_says_goes_along_with_its_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text(json.dumps(VIT))
    lrconvert.factorize(tmp_path / "dense", "rank=8", output=tmp_path / "small")
    lrconvert.factorize(tmp_path / "dense", "rank=8", output=tmp_path / "small.safetensors")
    lrconvert.export(tmp_path / "small", tmp_path / "small.onnx", "onnx")
    for made in ("dense", "small", "small.safetensors", "small.onnx"):
        assert open_checkpoint(tmp_path / made).images == HALF
