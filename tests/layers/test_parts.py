"""A large batch in parts: equal to all of it at once, and only where nothing else depends on the batch."""

import os
import platform

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


at_once = LowRankLayer.forward


def factorized(conv, **options):
    torch.manual_seed(0)
    return lrconvert.factorize(nn.Sequential(conv).eval(), "rank=2", keep_first=0, keep_last=False, **options)[0]


def inputs(conv, batch=7):
    torch.manual_seed(1)
    return torch.randn(batch, 12, *(6, 7, 8)[: conv.weight.dim() - 2], dtype=conv.weight.dtype)


@pytest.fixture
def sizes(monkeypatch):
    """Batches that the factors meet, with limits at which 7 samples of any test here go in parts."""
    monkeypatch.setattr(parts, "_GIVEN_BACK", 16_000)
    monkeypatch.setattr(parts, "_AT_HAND", 11_000)
    monkeypatch.setattr(parts, "_gives_back", lambda: True)
    seen = []

    def forward(layer, x):
        if type(x) is torch.Tensor and not torch.jit.is_tracing():
            seen.append(len(x))
        return at_once(layer, x)

    monkeypatch.setattr(LowRankLayer, "forward", forward)
    return seen


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_equal_to_all_at_once(name, sizes, monkeypatch):
    conv = CONVOLUTIONS[name]
    layer, x = factorized(conv), inputs(conv)
    with torch.no_grad():
        want = at_once(layer, x)
        size = layer._most(x.shape[1:]) * x.element_size()
        monkeypatch.setattr(parts, "_GIVEN_BACK", 6 * size)
        monkeypatch.setattr(parts, "_AT_HAND", 2 * size)
        got = layer(x)
    assert sizes == [2, 2, 2, 1]
    assert_close(got, want)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("options", [{"view": "spatial"}, {"extra_norm": True}, {"pivoted": True}], ids=str)
def test_other_forms(options, sizes):
    conv = CONVOLUTIONS["kernel 1" if "pivoted" in options else "2d"]
    layer, x = factorized(conv, **options), inputs(conv)
    with torch.no_grad():
        want = at_once(layer, x)
        assert_close(layer(x), want)
    assert sum(sizes) == 7
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("shape", "stride", "size"), [((3, 8, 10), 1, 16 * 80), ((64, 8, 10), 1, 64 * 80), ((3, 8, 10), 2, 16 * 20)]
)
def test_the_largest_tensor(shape, stride, size):
    """By hand: 16 channels come out, at the positions that the stride leaves."""
    layer = factorized(nn.Conv2d(shape[0], 16, 3, stride=stride, padding=1))
    assert layer._most(torch.Size(shape)) == size
    with torch.no_grad():
        out = layer(torch.randn(1, *shape))
    assert max(out.numel(), torch.Size(shape).numel()) == size


def test_on_the_device_of_the_input(sizes):
    layer, x = factorized(CONVOLUTIONS["2d"]), inputs(CONVOLUTIONS["2d"])
    with torch.no_grad(), torch.device("meta"):
        assert layer(x).device.type == "cpu"
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("environment", "libc", "gives_back"),
    [
        ({}, "glibc", True),
        (
            {"MALLOC_ARENA_MAX": "1", "LD_PRELOAD": "libfoo.so", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
            "glibc",
            True,
        ),
        ({}, "", False),
        ({"MALLOC_MMAP_MAX_": "0"}, "glibc", False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"}, "glibc", False),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "glibc", False),
    ],
)
def test_who_keeps_memory(environment, libc, gives_back, monkeypatch):
    for name in [*os.environ]:
        if name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    assert parts._gives_back.__wrapped__() is gives_back


class TestAllAtOnce:
    """Where parts would change what is computed or recorded."""

    @pytest.fixture
    def layer(self):
        return factorized(CONVOLUTIONS["2d"])

    @pytest.fixture
    def x(self):
        return inputs(CONVOLUTIONS["2d"])

    def test_with_gradients(self, layer, x, sizes):
        layer(x)
        assert sizes == [7]

    def test_a_norm_that_learns(self, x, sizes):
        layer = factorized(CONVOLUTIONS["2d"], extra_norm=True).train()
        with torch.no_grad():
            layer(x)
        assert sizes == [7]

    def test_a_norm_without_running_statistics(self, x, sizes):
        layer = factorized(CONVOLUTIONS["2d"], extra_norm=True)
        layer.bn.running_mean = layer.bn.running_var = None
        with torch.no_grad():
            assert_close(layer(x), at_once(layer, x))
        assert sizes == [7]

    def test_factors_that_somebody_wrapped(self, layer, x, sizes):
        layer.u = nn.Sequential(layer.u, nn.Identity())
        with torch.no_grad():
            layer(x)
        assert sizes == [7]

    @pytest.mark.parametrize("factor", ["u", "v"])
    def test_hooks_see_all_of_a_batch(self, layer, x, sizes, factor):
        seen = []
        layer.get_submodule(factor).register_forward_hook(lambda _, args, out: seen.append(len(out)))
        with torch.no_grad():
            layer(x)
        assert sizes == seen == [7]

    def test_where_memory_is_kept(self, layer, x, sizes, monkeypatch):
        monkeypatch.setattr(parts, "_gives_back", lambda: False)
        with torch.no_grad():
            layer(x)
        assert sizes == [7]

    def test_channels_last(self, layer, x, sizes):
        with torch.no_grad():
            layer(x.contiguous(memory_format=torch.channels_last))
        assert sizes == [7]

    def test_a_small_batch_and_none(self, layer, x, sizes):
        with torch.no_grad():
            layer(x[:2])
            assert layer(x[:0]).shape == (0, 16, 6, 7)
            assert layer(x[0]).shape == (16, 6, 7)
        assert sizes[:2] == [2, 0]
        assert len(sizes) == 3

    def test_samples_that_are_too_large_by_themselves(self, layer, x, sizes, monkeypatch):
        monkeypatch.setattr(parts, "_GIVEN_BACK", 100)
        with torch.no_grad():
            layer(x)
        assert sizes == [7]

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace")
    def test_graphs(self, layer, x, sizes):
        with torch.no_grad():
            want = layer(x)
            batch = torch.export.Dim("batch", min=2)
            exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
            assert sum("conv" in str(node.target) for node in exported.graph.nodes) == 2
            assert_close(exported.module()(x), want)
            compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
            assert_close(compiled(x), want)
            assert_close(compiled(x[:5]), want[:5])
            graph = symbolic_trace(layer)
            assert sum(node.op == "call_module" for node in graph.graph.nodes) == 2
            traced = torch.jit.trace(layer, x[:3])
            assert_close(traced(x), want)
            assert_close(torch.func.vmap(layer)(x.unsqueeze(0))[0], want)
