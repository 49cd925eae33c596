"""The plans of the papers' networks in recipes/plans."""

from pathlib import Path

import pytest
import torch
from helpers import num_params

import lrconvert
from lrconvert.models import find_architecture
from lrconvert.surgery import reshape

PLANS = Path(__file__).parents[1] / "recipes" / "plans"
COUNTS = {
    "pufferfish-resnet18-cifar": ("zoo/resnet18_cifar", {}, 11_173_962, 3_336_266),
    "pufferfish-vgg19-cifar": ("zoo/vgg19_bn_cifar", {}, 20_560_330, 8_370_634),
    "pufferfish-vgg19-cifar-one-linear": ("zoo/vgg19_bn_cifar", {"num_linear": 1}, 20_035_018, 8_107_466),
    "pufferfish-resnet50-imagenet": ("torchvision/resnet50", {}, 25_557_032, 15_202_344),
    "pufferfish-lstm-wikitext2": ("zoo/lstm_lm", {}, 85_962_278, 67_962_278),
    "pufferfish-transformer-multi30k": ("zoo/transformer", {}, 48_978_432, 26_696_192),
    "cuttlefish-deit-base": ("timm/deit_base_patch16_224", {}, 86_567_656, 58_256_104),
    "cuttlefish-resmlp-s36": ("timm/resmlp_36_224", {}, 44_690_488, 28_765_240),
}


def test_every_plan_is_counted():
    assert {path.stem for path in PLANS.iterdir()} == set(COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_plans_give_the_papers_counts(name):
    source, args, dense, low_rank = COUNTS[name]
    model = find_architecture(source, args).build("meta")
    assert num_params(model) == dense
    assert num_params(reshape(model, lrconvert.load_plan(PLANS / f"{name}.json"))) == low_rank


def test_a_plan_runs_from_the_command_line(tmp_path, cli):
    name = "pufferfish-resnet18-cifar"
    source, args, _, low_rank = COUNTS[name]
    torch.save(find_architecture(source, args).build("cpu").state_dict(), tmp_path / "dense.pt")
    small = tmp_path / "small.safetensors"
    assert (
        cli("factorize", tmp_path / "dense.pt", "--model", source, "--plan", PLANS / f"{name}.json", "-o", small).code
        == 0
    )
    assert num_params(lrconvert.load(small)) == low_rank
