"""Linear layers: `u` is rank×in, `v` is out×rank with the bias.

A layer whose outputs are several matrices stacked (queries, keys and values; the gates of a recurrent layer) may have
each of them factorized on its own: then `u` holds their first factors stacked, and `v` is a `BlockLinear`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from lrconvert.layers.lowrank import Factored, LowRankLayer, where
from lrconvert.layers.norm import norm_between
from lrconvert.layers.pivoted import PivotedLinear


class BlockLinear(nn.Module):
    """`groups` linear layers side by side, each with its own share of the input and of the output.

    (…, groups·in) to (…, groups·out); weight (groups·out, in), bias (groups·out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features // groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear initialises each block."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Every block applied to its share of `x`."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same, with any bias."""
        rows = x.reshape(-1, self.groups, self.weight.shape[1]).transpose(0, 1)
        blocks = self.weight.reshape(self.groups, -1, self.weight.shape[1])
        out = torch.bmm(rows, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return out if bias is None else out + bias.to(out.dtype)  # under autocast it is wider

    def extra_repr(self) -> str:
        """Sizes and blocks."""
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"


class LowRankLinear(LowRankLayer):
    """Takes the place of an nn.Linear, or of one that stores its weight (in, out); (…, in) to (…, out)."""

    shown = ("in_features", "out_features", "rank")

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        bias, weight = dense.bias, dense.weight
        assert isinstance(weight, Tensor)
        factors = LinearFactors(wanted["weight"], bias is not None, where(weight))
        self.u = factors.u
        self.bn = norm_between(wanted["weight"], where(weight))
        self.v = factors.v

    def between(self, narrow: Tensor) -> Tensor:
        """The outputs of `u` (…, width); a norm takes all leading dimensions as its batch."""
        if self.bn is None:
            return narrow
        out: Tensor = self.bn(narrow.reshape(-1, narrow.shape[-1])).reshape(narrow.shape)
        return out

    def forward(self, x: Tensor, *bias: Tensor | None) -> Tensor:
        """What the dense layer would return for `x`, up to the truncation.

        `bias`, if given, is added in the place of its own, for a parent that computes
        `functional.linear(x, layer.weight, bias)`.
        """
        narrow = self.between(self.u(x))
        out: Tensor
        if not bias:
            out = self.v(narrow)
        elif isinstance(self.v, BlockLinear):
            out = self.v.product(narrow, *bias)
        else:
            out = functional.linear(narrow, self.v.weight, *bias)  # type: ignore[arg-type]
        return out

    def multiplies_by(self, weight: str) -> bool:
        """Whether the weight is stored (out, in)."""
        return self.factored[weight].kind == "linear"

    def recorded(self, weight: str) -> Tensor:
        """The weight multiplied out, if it is a product: where nothing is made of it, the product is not computed."""
        if self.bn is not None or not self.multiplies_by(weight):
            return super().recorded(weight)
        return multiplied_out(self, self.factored[weight].groups)

    @property
    def in_features(self) -> int:
        """Input features, as nn.Linear names them."""
        return int(self.u.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Output features, as nn.Linear names them."""
        return int(self.v.out_features)  # type: ignore[arg-type]


class LinearFactors(nn.Module):
    """The factors `u` and `v` of a linear weight, uninitialised."""

    def __init__(self, factored: Factored, bias: bool, place: Mapping[str, Any]) -> None:
        super().__init__()
        (out, into), groups = factored.layout.matrix_shape(factored.shape, factored.groups), factored.groups
        out, width = groups * out, groups * factored.rank
        if factored.pivoted:
            self.u: nn.Module = PivotedLinear(into, factored.rank, groups, **place)
        else:
            self.u = skip_init(nn.Linear, into, width, bias=False, **place)
        if factored.groups == 1:
            self.v = skip_init(nn.Linear, width, out, bias=bias, **place)
        else:
            self.v = skip_init(BlockLinear, width, out, factored.groups, bias=bias, **place)

    def forward(self, x: Tensor) -> Tensor:
        """`v(u(x))`."""
        out: Tensor = self.v(self.u(x))
        return out


def multiplied_out(factors: Any, groups: int) -> Tensor:
    """The product of the factors `u` and `v` of a linear weight, or of `groups` stacked: (groups·rows, columns)."""
    first = factors.u.whole() if isinstance(factors.u, PivotedLinear) else factors.u.weight
    if groups == 1:
        return torch.mm(factors.v.weight, first)
    left, right = (factor.unflatten(0, (groups, -1)) for factor in (factors.v.weight, first))
    return torch.bmm(left, right).flatten(0, 1)
