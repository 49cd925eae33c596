"""Convolutions, plain and transposed, of one to three dimensions, with groups.

Plain: `u` has the kernel, stride, padding and dilation, `v` is a convolution of kernel 1. Stride belongs on `u`: on
`v`, the larger factor would run at the full resolution for nothing (Pufferfish, section 2.3, and the authors' code,
which puts the downsample stride on `v`). Transposed: `u` is a convolution of kernel 1 at the small resolution of the
input, `v` a transposed convolution with the rest. Each group is factorized on its own: both factors are grouped.

In the spatial view of a 2-dimensional convolution `u` runs across, with the horizontal half of all settings, and `v`
down, with the vertical half. As `u` works on every row alone, and has no bias, it does not matter that rows are padded
after it, in any padding mode.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import skip_init

from lrconvert.layers.eager import has_hooks
from lrconvert.layers.lowrank import Factored, LowRankLayer, full_name, where
from lrconvert.layers.norm import norm_between
from lrconvert.layers.parts import run_in_parts
from lrconvert.layers.pivoted import PivotedConv

CONV_TYPES: dict[str, type[_ConvNd]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
TRANSPOSED_TYPES: dict[str, type[_ConvTransposeNd]] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
# timm's: it pads its input first, as much as its own kernel and stride need.
PADS_ITSELF = "timm.layers.conv2d_same.Conv2dSame"
# What the factors are, unless somebody wrapped them.
_FACTORS = (*CONV_TYPES.values(), PivotedConv)


class LowRankConv(LowRankLayer):
    """Takes the place of a convolution; (batch, in_channels, *size) to (batch, out_channels, *size)."""

    shown = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "rank")

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        assert isinstance(dense, _ConvNd)
        width, shared = _between(dense, wanted["weight"])
        conv, kernel = CONV_TYPES[wanted["weight"].kind], _kind_with_kernel(dense, wanted["weight"].kind)
        spatial = wanted["weight"].view == "spatial"
        first, second = (_along(dense, 1), _along(dense, 0)) if spatial else (_settings(dense), {"kernel_size": 1})
        if wanted["weight"].pivoted:
            self.u: nn.Module = PivotedConv(dense, width, **where(dense.weight))
        else:
            self.u = skip_init(kernel, dense.in_channels, width, bias=False, **first, **shared)
        self.bn = norm_between(wanted["weight"], where(dense.weight))
        last = kernel if spatial else conv
        self.v = skip_init(last, width, dense.out_channels, bias=dense.bias is not None, **second, **shared)

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would return for `x`, up to the truncation."""
        batched = isinstance(x, Tensor) and x.dim() == len(self.factored["weight"].shape)
        if not batched or not self._keeps_samples_apart():
            return super().forward(x)
        return run_in_parts(super().forward, x, self._most)

    def _keeps_samples_apart(self) -> bool:
        """Whether no child looks at a batch as a whole, nor anybody at what one makes of it."""
        if type(self.u) not in _FACTORS or type(self.v) not in _FACTORS or has_hooks(self.u) or has_hooks(self.v):
            return False
        bn: Any = self.bn
        return bn is None or not (bn.training or bn.running_mean is None or has_hooks(bn))

    def _most(self, sample: torch.Size) -> int:
        """Numbers in the largest of input, output and what is between, for a `sample` (channels, *size).

        But for what padding adds or its absence takes.
        """
        factored, positions = self.factored["weight"], math.prod(sample[1:])
        first, both = (math.prod(stride) for stride in (cast(nn.Conv2d, self.u).stride, self.stride))
        between = factored.groups * factored.rank * positions // first
        return max(sample.numel(), between, factored.shape[0] * positions // both)


class LowRankConvTranspose(LowRankLayer):
    """Takes the place of a transposed convolution."""

    shown = LowRankConv.shown

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        assert isinstance(dense, _ConvTransposeNd)
        width, shared = _between(dense, wanted["weight"])
        transposed = TRANSPOSED_TYPES[wanted["weight"].kind]
        bias, settings = dense.bias is not None, {**_settings(dense), "output_padding": dense.output_padding}
        conv = CONV_TYPES[f"conv{len(dense.kernel_size)}d"]
        self.u = skip_init(conv, dense.in_channels, width, kernel_size=1, bias=False, **shared)
        self.bn = norm_between(wanted["weight"], where(dense.weight))
        self.v = skip_init(transposed, width, dense.out_channels, bias=bias, **settings, **shared)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """What the dense layer would return for `x`, up to the truncation; `output_size` as for the dense layer."""
        out: Tensor = self.v(self.between(self.u(x)), output_size)
        return out


def _between(dense: _ConvNd, factored: Factored) -> tuple[int, dict[str, Any]]:
    """Channels between the factors, and what both factors share with the dense convolution."""
    return factored.groups * factored.rank, {"groups": dense.groups, **where(dense.weight)}


def _kind_with_kernel(dense: _ConvNd, kind: str) -> type[nn.Module]:
    """The class of a factor that has a kernel: one that pads as the dense convolution does."""
    return type(dense) if full_name(type(dense)) == PADS_ITSELF else CONV_TYPES[kind]


def _settings(dense: _ConvNd) -> dict[str, Any]:
    """What the factor with the kernel takes over."""
    names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
    if full_name(type(dense)) == PADS_ITSELF:  # it has one mode only
        names.remove("padding_mode")
    return {name: getattr(dense, name) for name in names}


def _along(dense: _ConvNd, axis: int) -> dict[str, Any]:
    """What a convolution along one axis takes over: along the others its kernel, stride and dilation are 1."""

    def there(values: tuple[int, ...], elsewhere: int) -> tuple[int, ...]:
        return tuple(value if at == axis else elsewhere for at, value in enumerate(values))

    along = {
        "kernel_size": there(dense.kernel_size, 1),
        "stride": there(dense.stride, 1),
        "padding": dense.padding if isinstance(dense.padding, str) else there(dense.padding, 0),
        "dilation": there(dense.dilation, 1),
    }
    return _settings(dense) | along
