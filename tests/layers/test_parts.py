"""A large batch in parts: equal to all of it at once, and only where nothing else depends on the batch."""

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.fx import symbolic_trace

import lrconvert
from lrconvert.layers import parts
from lrconvert.layers.lowrank import LowRankLayer

CONVOLUTIONS = {
    "1d": nn.Conv1d(12, 16, 3, padding=1),
    "2d": nn.Conv2d(12, 16, 3, padding=1),
    "kernel 1": nn.Conv2d(12, 16, 1),
    "no bias": nn.Conv2d(12, 16, 3, bias=False),
    "strided": nn.Conv2d(12, 16, 3, stride=(2, 1), padding=(0, 2), padding_mode="circular"),
    "grouped": nn.Conv2d(12, 16, 3, groups=2, dilation=2),
    "3d": nn.Conv3d(12, 16, (1, 3, 3)),
    "16 bits": nn.Conv2d(12, 16, 3).bfloat16(),
}


def factorized(conv, **options):
    torch.manual_seed(0)
    return lrconvert.factorize(nn.Sequential(conv).eval(), "rank=2", keep_first=0, keep_last=False, **options)[0]


def inputs(conv, batch=7):
    torch.manual_seed(1)
    return torch.randn(batch, 12, *(6, 7, 8)[: conv.weight.dim() - 2], dtype=conv.weight.dtype)


@pytest.fixture
def sizes(monkeypatch):
    """Batches that reach the first factor, with a limit at which 7 samples of any test go 2 at a time, or fewer."""
    monkeypatch.setattr(parts, "_GIVEN_BACK", 16_000)
    monkeypatch.setattr(parts, "_AT_HAND", 11_000)
    seen = []

    def watch(layer):
        layer.u.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        return seen

    return watch


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_equal_to_all_at_once(name, sizes, monkeypatch):
    conv = CONVOLUTIONS[name]
    layer, x = factorized(conv), inputs(conv)
    with torch.no_grad():
        want = LowRankLayer.forward(layer, x)
        size = layer._most(x.shape[1:]) * x.element_size()
        monkeypatch.setattr(parts, "_GIVEN_BACK", 6 * size)
        monkeypatch.setattr(parts, "_AT_HAND", 2 * size)
        seen = sizes(layer)
        got = layer(x)
    assert seen == [2, 2, 2, 1]
    assert_close(got, want)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("options", [{"view": "spatial"}, {"extra_norm": True}, {"pivoted": True}], ids=str)
def test_other_forms(options, sizes):
    conv = CONVOLUTIONS["kernel 1" if "pivoted" in options else "2d"]
    layer, x = factorized(conv, **options), inputs(conv)
    with torch.no_grad():
        want = LowRankLayer.forward(layer, x)
        seen = sizes(layer)
        assert_close(layer(x), want)
    assert sum(seen) == 7
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("shape", "stride", "size"), [((3, 8, 10), 1, 16 * 80), ((64, 8, 10), 1, 64 * 80), ((3, 8, 10), 2, 16 * 20)]
)
def test_the_largest_tensor(shape, stride, size):
    """By hand: 16 channels come out, at the positions that the stride leaves."""
    layer = factorized(nn.Conv2d(shape[0], 16, 3, stride=stride, padding=1))
    assert layer._most(torch.Size(shape)) == size
    with torch.no_grad():
        out = layer(torch.randn(1, *shape))
    assert max(out.numel(), torch.Size(shape).numel()) >= size


class TestAllAtOnce:
    """Where parts would change what is computed or recorded."""

    @pytest.fixture
    def layer(self):
        return factorized(CONVOLUTIONS["2d"])

    @pytest.fixture
    def x(self):
        return inputs(CONVOLUTIONS["2d"])

    def test_with_gradients(self, layer, x, sizes):
        seen = sizes(layer)
        layer(x)
        assert seen == [7]

    def test_a_norm_that_learns(self, x, sizes):
        layer = factorized(CONVOLUTIONS["2d"], extra_norm=True).train()
        seen = sizes(layer)
        with torch.no_grad():
            layer(x)
        assert seen == [7]

    def test_channels_last(self, layer, x, sizes):
        seen = sizes(layer)
        with torch.no_grad():
            layer(x.contiguous(memory_format=torch.channels_last))
        assert seen == [7]

    def test_a_small_batch_and_none(self, layer, x, sizes):
        seen = sizes(layer)
        with torch.no_grad():
            layer(x[:2])
            assert layer(x[:0]).shape == (0, 16, 6, 7)
            assert layer(x[0]).shape == (16, 6, 7)
        assert [*seen[:2], len(seen)] == [2, 0, 3]

    def test_samples_that_are_too_large_by_themselves(self, layer, x, sizes, monkeypatch):
        monkeypatch.setattr(parts, "_GIVEN_BACK", 100)
        seen = sizes(layer)
        with torch.no_grad():
            layer(x)
        assert seen == [7]

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace")
    def test_graphs(self, layer, x, sizes):
        with torch.no_grad():
            want = layer(x)
            batch = torch.export.Dim("batch", min=2)
            exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
            assert sum("conv" in str(node.target) for node in exported.graph.nodes) == 2
            assert_close(exported.module()(x), want)
            graph = symbolic_trace(layer)
            assert sum(node.op == "call_module" for node in graph.graph.nodes) == 2
            traced = torch.jit.trace(layer, x[:3])
            assert_close(traced(x), want)
            assert_close(torch.func.vmap(layer)(x.unsqueeze(0))[0], want)
