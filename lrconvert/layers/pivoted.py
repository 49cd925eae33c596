"""The first factors whose pivots are not stored, see `lrconvert.layers.pivots`.

A form to store and to run a network in, not one to train it in: all singular values of the weight are in the second
factor, so that one learning rate does not suit both, and averages of weights would average the order of columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lrconvert.errors import UsageError
from lrconvert.layers.eager import runs_eagerly
from lrconvert.layers.pivots import check_order, with_pivots

# Rows that are sorted at a time: so many stay in the cache until they are multiplied.
_ROWS = 1024
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Pivoted(nn.Module):
    """A first factor, uninitialised.

    Attributes:
        weight: (groups·rank, in − rank, *ones).
        order: (groups, in), int32, see `pivots.pivot`.
        into: its inputs.
        rank, groups: of the weight.
    """

    order: Tensor

    def __init__(
        self,
        into: int,
        rank: int,
        groups: int = 1,
        kernel: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.into, self.rank, self.groups = into, rank, groups
        self.weight = nn.Parameter(torch.empty(groups * rank, into - rank, *kernel, device=device, dtype=dtype))
        order = torch.arange(into, dtype=torch.int32, device=device)
        self.register_buffer("order", order.expand(groups, -1).contiguous())

    def whole(self) -> Tensor:
        """The weight (groups·rank, in, *ones), with its pivots."""
        rest = self.weight.flatten(1).unflatten(0, (self.groups, -1))
        return with_pivots(rest, self.order).flatten(0, 1)[(..., *(None,) * (self.weight.dim() - 2))]


class PivotedLinear(Pivoted):
    """The first factor of a linear layer: (…, in) to (…, groups·rank)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of every group, what it lets through and adds."""
        parts = [self.part(x, group) for group in range(self.groups)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def part(self, x: Tensor, group: int) -> Tensor:
        """What one group makes of `x`: (…, rank)."""
        weight = self.weight.unflatten(0, (self.groups, -1))[group]
        return _first(x, self.order[group], weight, self.rank)

    @property
    def in_features(self) -> int:
        """As nn.Linear names them."""
        return self.into

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.into}, rank={self.rank}, groups={self.groups}"


class PivotedConv(Pivoted):
    """The first factor of a convolution of kernel 1 in one group.

    (batch, in, *size) to (batch, rank, *size), or both without a batch.
    """

    def __init__(self, dense: _ConvNd, rank: int, **place: Any) -> None:
        super().__init__(dense.in_channels, rank, kernel=dense.kernel_size, **place)
        self.stride = dense.stride
        self.padding, self.padding_mode = dense._reversed_padding_repeated_twice, dense.padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """What it lets through and adds, at the positions that the stride leaves."""
        dims, columns = len(self.stride), self.into
        eager = runs_eagerly(x)
        if eager and x.shape[-1 - dims] != columns:
            raise RuntimeError(f"expected {columns} input channels, got {x.shape[-1 - dims]}")
        together = eager and dims == 2 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if any(self.padding):
            x = functional.pad(x, self.padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        if any(step > 1 for step in self.stride):
            at: list[Any] = [slice(None, None, step) for step in self.stride]
            x = x[(..., *at)]
        convolve = _CONVOLUTIONS[dims]
        if together:  # the channels of a pixel: one by one they would be slow to take
            return _first(x.movedim(1, -1), self.order[0], self.weight.flatten(1), self.rank).movedim(-1, 1)
        if eager and _multiplies_pivots(x, x.numel() // columns, self.rank, columns):
            return convolve(x, self.whole())
        through, rest = (x.index_select(-1 - dims, part) for part in self.order[0].tensor_split([self.rank]))
        return through + convolve(rest, self.weight) if self.rank < columns else through

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_channels={self.into}, rank={self.rank}, stride={self.stride}"


def _first(x: Tensor, order: Tensor, weight: Tensor, rank: int) -> Tensor:
    """What a first factor without its pivots, `weight` (rank, in − rank), makes of `x`: (…, in) to (…, rank)."""
    if not runs_eagerly(x):
        return _let_through(x, order, weight, rank)
    if x.shape[-1] != len(order):
        raise RuntimeError(f"expected {len(order)} input features, got {x.shape[-1]}")
    if not x.is_cpu:
        return _let_through(x, order, weight, rank)
    rows = x.reshape(-1, x.shape[-1])
    if _multiplies_pivots(x, len(rows), rank, len(order)):
        return functional.linear(x, with_pivots(weight[None], order[None])[0])
    parts = [_let_through(part, order, weight, rank) for part in rows.split(_ROWS)]
    return torch.cat(parts).reshape(*x.shape[:-1], rank)


def _let_through(x: Tensor, order: Tensor, weight: Tensor, rank: int) -> Tensor:
    """The pivots of `x`, and the product of the rest with `weight`."""
    x = x.index_select(-1, order)
    return functional.linear(x[..., rank:], weight) + x[..., :rank]


def _multiplies_pivots(x: Tensor, rows: int, rank: int, columns: int) -> bool:
    """Whether to put the pivots back into the weight, and to multiply by them too.

    To let inputs through, they are copied. On a CPU that takes as long as some 60 multiply-accumulates each (measured
    with AVX-512), of which rank² / columns are saved. Few rows are copied sooner than the weight.
    """
    return x.is_cpu and rows > rank and rank**2 < 64 * columns


def refuse_to_train(model: nn.Module) -> None:
    """Raise UsageError where factors of `model` are pivoted."""
    name = next((name for name, module in model.named_modules() if isinstance(module, Pivoted)), None)
    if name is not None:
        raise UsageError(
            f"{name.removesuffix('.u') or 'the layer'} has pivoted factors, a form to store and to run a network in: "
            "train one that was factorized without --pivoted, or this one after `lrconvert export --format plain`; "
            "`--format pivoted` is the way back"
        )


def check_orders(model: nn.Module) -> None:
    """Raise CheckpointError where the order of a pivoted factor of `model` is not one of its columns."""
    for name, module in model.named_modules():
        if isinstance(module, Pivoted) and not module.order.is_meta:
            check_order(f"{name}.order".lstrip("."), module.order)
