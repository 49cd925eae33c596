"""`export --format pivoted` and `plain`: the same products, from factors of the other kind."""

import copy
import json
from pathlib import Path

import hf_networks as networks
import pytest
import torch
from helpers import TOLERANCE, assert_close, num_params, run_seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lrconvert
from lrconvert.errors import UsageError, VerificationError, WeightError
from lrconvert.layers.pivots import pivot
from lrconvert.models.zoo.digits_cnn import DigitsCNN


class Mixed(nn.Module):
    """Layers that can be pivoted, and two that cannot be."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 20, 3, padding=1)
        self.point = nn.Conv2d(20, 24, 1)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.linear = nn.Linear(24, 24)
        self.lstm = nn.LSTM(24, 16)

    def forward(self, x):
        x = self.point(self.conv(x)).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.lstm(torch.relu(self.linear(x)))[0]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Makes small.safetensors, plain, and pivoted.safetensors of it; returns their model, and the records of both."""
    monkeypatch.chdir(tmp_path)

    def make(model, **options):
        lrconvert.save(model, "dense.safetensors")
        record = lrconvert.factorize(
            "dense.safetensors", "rank_ratio=0.3", output="small.safetensors", keep_first=0, keep_last=False, **options
        )
        return record, lrconvert.export("small.safetensors", "pivoted.safetensors", "pivoted")

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_network_in_fewer_numbers(files, dtype):
    torch.manual_seed(0)
    model = Mixed().to(dtype).eval()
    factorized, exported = files(model)
    small, pivoted = (lrconvert.load(f"{name}.safetensors", copy.deepcopy(model)) for name in ("small", "pivoted"))
    groups = {"point": 1, "attention.in_proj_weight": 3, "attention.out_proj": 1, "linear": 1}
    ranks = {row.name: row.rank for row in factorized.layers}
    assert num_params(small) - num_params(pivoted) == sum(groups[name] * ranks[name] ** 2 for name in groups)
    x = torch.randn(2, 12, 5, 6, dtype=dtype)
    # Factors in 16 bits are rounded once more.
    assert_close(run_seeded(pivoted.eval(), x), run_seeded(small.eval(), x), TOLERANCE[dtype])
    assert exported.nbytes == Path("pivoted.safetensors").stat().st_size


def test_as_factorized_so_at_once(files):
    torch.manual_seed(0)
    files(Mixed())
    lrconvert.factorize(
        "dense.safetensors",
        "rank_ratio=0.3",
        output="once.safetensors",
        keep_first=0,
        keep_last=False,
        pivoted=True,
    )
    one, two = load_file("once.safetensors"), load_file("pivoted.safetensors")
    assert one.keys() == two.keys()
    assert sum(key.endswith("order") for key in one) == 4
    for key in one:
        if key.endswith((".u.weight", ".v.weight")):
            assert_close(two[key], one[key])
        else:
            assert torch.equal(two[key], one[key])


def test_plain_again_is_as_factorized(files):
    """Balanced, too, not only of the same product: up to signs the factors that were pivoted."""
    torch.manual_seed(0)
    files(Mixed())
    lrconvert.export("pivoted.safetensors", "plain.safetensors", "plain")
    one, two = load_file("small.safetensors"), load_file("plain.safetensors")
    assert one.keys() == two.keys()
    for key in one:
        if key.endswith((".u.weight", ".v.weight")):
            assert_close(two[key].abs(), one[key].abs(), 1e-4)
        else:
            assert torch.equal(two[key], one[key])
    model, x = Mixed().eval(), torch.randn(2, 12, 5, 6)
    small, plain = (lrconvert.load(f"{name}.safetensors", copy.deepcopy(model)) for name in ("small", "plain"))
    assert_close(run_seeded(plain.eval(), x), run_seeded(small.eval(), x))


def test_a_folder_of_transformers(tmp_path, cli):
    networks.build("bert").save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    result = cli("export", tmp_path / "small", "-o", tmp_path / "pivoted", "--format", "pivoted", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["format"] == "pivoted"
    card = (tmp_path / "pivoted" / "README.md").read_text(encoding="utf-8")
    assert card.count("Low-rank weights") == 1
    small, pivoted = (lrconvert.load(tmp_path / name).eval() for name in ("small", "pivoted"))
    assert num_params(pivoted) < num_params(small)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert_close(pivoted(tokens)[0], small(tokens)[0])


def test_what_cannot_be_pivoted(files):
    files(DigitsCNN(width=16))
    with pytest.raises(UsageError, match=r"dense\.safetensors is dense, it has no factors"):
        lrconvert.export("dense.safetensors", "other.safetensors", "pivoted")
    with pytest.raises(UsageError, match="its factors are pivoted already"):
        lrconvert.export("pivoted.safetensors", "twice.safetensors", "pivoted")
    with pytest.raises(UsageError, match="no factors are pivoted"):
        lrconvert.export("small.safetensors", "twice.safetensors", "plain")


@pytest.mark.parametrize("damage", ["u", "v"])
def test_damaged_factors_are_named(files, damage):
    files(Mixed())
    with safe_open("small.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[f"linear.{damage}.weight"][0, 0] = torch.nan
    save_file(tensors, "damaged.safetensors", metadata)
    with pytest.raises(WeightError, match="linear: 1 of 168 values are NaN"):
        lrconvert.export("damaged.safetensors", "other.safetensors", "pivoted")


def test_another_product_is_not_written(files, monkeypatch):
    files(Mixed())
    monkeypatch.setattr("lrconvert.factorization.pivot", lambda left, right: pivot(1.001 * left, right))
    with pytest.raises(VerificationError, match=r"have another product, 1\.0e-03 away"):
        lrconvert.export("small.safetensors", "other.safetensors", "pivoted")
    assert not Path("other.safetensors").exists()
    lrconvert.export("small.safetensors", "other.safetensors", "pivoted", tolerance=0.01)


def test_a_norm_between_the_factors_stays(files):
    """It would not let the inputs through."""
    with pytest.raises(UsageError, match="with no BatchNorm between them"):
        files(DigitsCNN(width=16), extra_norm=True)
