"""Parameters and MACs of the papers' networks, dense and factorized: the papers' own figures, to the last digit.

ResNet-50's are in test_torchvision.py.
"""

import pytest
import torch
from helpers import num_params

import lrconvert
from lrconvert.models import find_architecture

RESNET = {"keep_first": 3, "exclude": ["*.shortcut.*"]}  # dense: conv1, layer1.0, shortcuts, fc
# (model, arguments, settings, parameters, MACs), each of the two dense and at rank ratio 1/4
CNNS = [
    ("resnet18_cifar", {}, RESNET, (11_173_962, 3_336_266), (555_422_720, 216_208_384)),
    ("resnet18_cifar", {"stem_norm": False}, RESNET, (11_173_834, 3_336_138), (555_422_720, 216_208_384)),
    ("vgg19_bn_cifar", {}, {"keep_first": 9}, (20_560_330, 8_370_634), (398_660_608, 289_346_560)),
    ("vgg19_bn_cifar", {"num_linear": 1}, {"keep_first": 9}, (20_035_018, 8_107_466), None),
]
# (model, pattern of the layers, their number, parameters, MACs / 1e9 where known), dense and at rank ratio 1/2
TIMM = [
    ("deit_base_patch16_224", ["*.attn.qkv", "*.mlp.fc?"], 36, (86_567_656, 58_256_104), (17.564, 11.986)),
    ("resmlp_36_224", ["*.mlp_channels.fc?"], 72, (44_690_488, 28_765_240), None),
]


@pytest.mark.parametrize(("name", "args", "settings", "params", "macs"), CNNS)
def test_cnns_of_pufferfish(tmp_path, name, args, settings, params, macs):
    torch.save(find_architecture(f"zoo/{name}", args).build("cpu").state_dict(), tmp_path / "dense.pt")
    record = lrconvert.factorize(
        tmp_path / "dense.pt",
        "rank_ratio=0.25",
        output=tmp_path / "small.safetensors",
        model=f"zoo/{name}",
        model_args=args,
        **settings,
    )
    assert (record.num_params_before, record.num_params_after) == params
    assert macs is None or (record.macs_before, record.macs_after) == macs
    assert num_params(lrconvert.load(tmp_path / "small.safetensors")) == params[1]


def test_transformer_of_pufferfish():
    model = find_architecture("zoo/transformer").build("cpu")
    assert num_params(model) == 48_978_432
    lrconvert.factorize(model, "rank_ratio=0.25", keep_first=0, exclude=["*coder.layers.0.*"])
    assert num_params(model) == 26_696_192
    assert model.output.weight is model.encoder.embedding.weight
    assert model.decoder.embedding.weight is model.encoder.embedding.weight


def test_lstm_of_pufferfish():
    model = find_architecture("zoo/lstm_lm").build("cpu")
    assert num_params(model) == 85_962_278
    lrconvert.factorize(model, "rank_ratio=0.25", keep_first=0)
    assert num_params(model) == 67_962_278
    assert model.decoder.weight is model.encoder.weight
    assert not any(key.startswith("lstm.bias_hh") for key in model.state_dict())


@pytest.mark.parametrize(("name", "include", "number", "params", "macs"), TIMM)
def test_vision_networks_of_cuttlefish(tmp_path, name, include, number, params, macs):
    pytest.importorskip("timm")
    torch.save(find_architecture(f"timm/{name}").build("cpu").state_dict(), tmp_path / "dense.pt")
    record = lrconvert.factorize(
        tmp_path / "dense.pt", "rank_ratio=0.5", model=f"timm/{name}", include=include, keep_first=0, dry_run=True
    )
    assert sum(row.rank is not None for row in record.layers) == number
    assert (record.num_params_before, record.num_params_after) == params
    if macs is not None:
        assert (round(record.macs_before / 1e9, 3), round(record.macs_after / 1e9, 3)) == macs
