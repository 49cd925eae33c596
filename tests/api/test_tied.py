"""Tied weights: found, kept dense, stored once, counted once, and tied again when loaded."""

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import lrconvert
from lrconvert.checkpoints import open_checkpoint
from lrconvert.layers import LowRank


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.one = nn.Linear(32, 64)
        self.two = nn.Linear(64, 32)
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.two(self.one(self.embedding(x)).relu()))


@pytest.mark.parametrize("name", ["small.pt", "small.safetensors"])
def test_a_tied_checkpoint_stays_tied(tmp_path, name):
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    record = lrconvert.factorize(tmp_path / "dense.pt", "rank=4", output=tmp_path / name, keep_first=0, keep_last=False)
    reasons = {row.name: row.reason for row in record.layers}
    assert reasons["embedding"] == "shared with head.weight"
    assert reasons["head"] == "shared with embedding.weight"
    assert record.num_params_before == sum(parameter.numel() for parameter in model.parameters())
    assert lrconvert.info(tmp_path / name).num_params == record.num_params_after
    assert record.nbytes_after < record.nbytes_before
    tensors = open_checkpoint(tmp_path / name).tensors
    assert [key for key, ref in tensors.items() if ref.alias_of] == ["head.weight"]

    loaded = lrconvert.load(tmp_path / name, Tied())
    assert loaded.head.weight is loaded.embedding.weight
    assert isinstance(loaded.one, LowRank)
    lrconvert.export(tmp_path / name, tmp_path / "merged.safetensors", "dense")
    tokens = torch.arange(10)
    assert torch.allclose(lrconvert.load(tmp_path / "merged.safetensors", Tied())(tokens), loaded(tokens), atol=1e-5)


def test_a_file_that_stores_a_tied_weight_once_loads(tmp_path):
    model = Tied()
    save_model(model, str(tmp_path / "m.safetensors"))
    (tmp_path / "net.py").write_text("from test_tied_net import Tied\n")
    for target in (Tied(), f"{tmp_path / 'net.py'}:Tied"):
        import sys
        import types

        sys.modules["test_tied_net"] = types.ModuleType("test_tied_net")
        sys.modules["test_tied_net"].Tied = Tied
        loaded = lrconvert.load(tmp_path / "m.safetensors", target)
        assert loaded.head.weight is loaded.embedding.weight
        assert torch.equal(loaded.head.weight, model.head.weight)


def test_a_parent_that_multiplies_by_the_weight_in_its_own_way_fails_loudly():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(32, 32)
            self.out = nn.Linear(32, 32)

        def forward(self, x):
            return self.out(x @ self.proj.weight + self.proj.bias)

    plan = lrconvert.make_plan(Reads(), "rank=4", input_shape=(32,), keep_first=0, keep_last=False)
    assert {layer.name: layer.reason for layer in plan.layers if layer.rank is None} == {
        "proj": "never called in a forward pass"
    }
    blind = lrconvert.factorize(Reads(), "rank=4", keep_first=0, keep_last=False)
    with pytest.raises(lrconvert.LrconvertError, match="its parent passed it to matmul: keep the layer dense"):
        blind(torch.randn(2, 32))
