"""nn.Conv1d, Conv2d, Conv3d: `u` has the kernel, stride, padding and dilation, `v` is a convolution of kernel 1.

With groups, each group is factorized on its own: `u` and `v` are grouped as the dense layer was. Stride belongs on
`u`: on `v`, the larger factor would run at the full resolution for nothing (Pufferfish, section 2.3, and the
authors' code, which puts the downsample stride on `v`).
"""

from typing import Any, Self

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import skip_init

from lrconvert.layers.lowrank import LowRank

CONV_TYPES: dict[str, type[_ConvNd]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


class LowRankConv(LowRank):
    """Takes the place of a convolution; (batch, in_channels, *size) to (batch, out_channels, *size)."""

    shown = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "rank")

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> Self:
        """Uninitialised factors of the convolution `dense`, `rank` channels per group between them."""
        assert isinstance(dense, _ConvNd)
        conv = CONV_TYPES[f"conv{len(dense.kernel_size)}d"]
        shared: dict[str, Any] = {
            "groups": dense.groups,
            "device": dense.weight.device,
            "dtype": dense.weight.dtype,
        }
        u = skip_init(
            conv,
            dense.in_channels,
            dense.groups * rank,
            kernel_size=dense.kernel_size,
            stride=dense.stride,
            padding=dense.padding,
            dilation=dense.dilation,
            padding_mode=dense.padding_mode,
            bias=False,
            **shared,
        )
        v = skip_init(
            conv, dense.groups * rank, dense.out_channels, kernel_size=1, bias=dense.bias is not None, **shared
        )
        return cls(u, v, tuple(dense.weight.shape))

    def dense(self) -> _ConvNd:
        """An uninitialised convolution with the same settings."""
        carried = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        settings = {name: getattr(self.u, name) for name in carried}
        where = {"device": self.u.weight.device, "dtype": self.u.weight.dtype}
        conv = skip_init(
            CONV_TYPES[self.kind], self.in_channels, self.out_channels, bias=self.bias is not None, **settings, **where
        )
        assert isinstance(conv, _ConvNd)
        return conv

    @property
    def kind(self) -> str:
        """ "conv1d", "conv2d" or "conv3d"."""
        return f"conv{len(self.kernel_size)}d"

    @property
    def in_channels(self) -> int:
        """Input channels, as nn.Conv2d names them."""
        return self.dense_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Output channels, as nn.Conv2d names them."""
        return self.dense_shape[0]

    @property
    def groups(self) -> int:
        """Convolution groups, the same in both factors."""
        return int(self.u.groups)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """Channels between the factors, per group."""
        return int(self.u.out_channels) // self.groups  # type: ignore[arg-type]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel of the dense convolution, carried by `u`."""
        return tuple(self.u.kernel_size)  # type: ignore[arg-type]

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of the dense convolution, carried by `u`."""
        return tuple(self.u.stride)  # type: ignore[arg-type]

    @property
    def padding(self) -> str | tuple[int, ...]:
        """Padding of the dense convolution, carried by `u`."""
        padding = self.u.padding
        return padding if isinstance(padding, str) else tuple(padding)  # type: ignore[arg-type]

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation of the dense convolution, carried by `u`."""
        return tuple(self.u.dilation)  # type: ignore[arg-type]
