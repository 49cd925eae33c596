"""The module that takes a dense module's place; for most: two ordinary layers, applied one after the other."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lrconvert.layers.layout import Layout, View, layout_for
from lrconvert.layers.stand_in import stand_in


@dataclass(frozen=True)
class Factored:
    """How one weight of a module is factorized.

    Attributes:
        kind: a key of `lrconvert.layers.LAYOUTS`.
        shape: shape of the dense weight as it was stored.
        rank: singular values kept per group.
        groups: matrices in the weight.
        norm: whether a BatchNorm stands between the factors.
        view: which matrix the weight is seen as.
        pivoted: whether the first factor is stored without its pivots.
    """

    kind: str
    shape: tuple[int, ...]
    rank: int
    groups: int = 1
    norm: bool = False
    view: View = "channel"
    pivoted: bool = False

    @property
    def layout(self) -> Layout:
        """How the weight and its factors are stored."""
        return layout_for(self.kind, self.view, self.pivoted)


class LowRank(nn.Module):
    """A module in the place of a dense one, some or all of whose weights are factorized.

    What it does not have itself it answers as the dense module would: `in_features`, `stride`, `batch_first`, and, by
    what stands in for them, the weights that were factorized (see `lrconvert.layers.stand_in`).

    Args:
        dense: the module whose place it takes; only its structure is kept.
        wanted: by path from the module ("weight", "weight_ih_l0", "out_proj.weight"), the weights to factorize.

    Attributes:
        factored: `wanted`.
    """

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__()
        self.factored = dict(wanted)
        # In a tuple, so that it is not registered: its parameters are not this module's.
        self._skeleton = (without_data(dense),)

    def counterparts(self, parameter: str) -> tuple[str, ...]:
        """Paths of the parameters here that stand for `parameter` of the dense module.

        For a weight that was factorized these are `u`, `v`, and what stands between them.
        """
        raise TypeError(f"{type(self).__name__} does not say what stands for {parameter}")

    def multiplies_by(self, weight: str) -> bool:
        """Whether this module computes x·weightᵀ of its input x, and a bias, no more."""
        return False

    def recorded(self, weight: str) -> Tensor:
        """What torch.compile and torch.fx, which follow tensors only, may have for a factorized weight: no data."""
        return torch.empty(self.factored[weight].shape, dtype=self.factors(weight).u.weight.dtype, device="meta")

    def factors(self, weight: str) -> Any:
        """What holds the factors `u` and `v` of a factorized weight."""
        raise TypeError(f"{type(self).__name__} does not say what holds the factors of {weight}")

    def dense(self) -> nn.Module:
        """The uninitialised dense module whose place this one took, on its device and in its dtype."""
        own = next(self.parameters())
        dense = copy.deepcopy(self._skeleton[0]).to(own.dtype).to_empty(device=own.device)
        for name, buffer in self.named_buffers(recurse=False):
            setattr(dense, name, buffer)
        return dense

    def __getattr__(self, name: str) -> Any:
        """What the dense module would answer, for data only: a method would run on a module without weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            skeleton = self.__dict__.get("_skeleton")
            if not skeleton or name.startswith("__") or not hasattr(skeleton[0], name):
                raise
            found = getattr(skeleton[0], name)
            if callable(found) or (isinstance(found, Tensor) and name not in self.factored):
                raise
        if not isinstance(found, Tensor):
            return found
        factor = self.factors(name).u.weight
        if torch.compiler.is_dynamo_compiling() or isinstance(factor, Proxy):
            return self.recorded(name)
        return stand_in(self.factored[name].shape, factor, self if self.multiplies_by(name) else None)


class LowRankLayer(LowRank):
    """`v(u(x))` in the place of a layer with one weight: `u` is applied first, `v` second, and carries the bias.

    The children are plain layers of torch.nn, so state-dict keys read `layer.u.weight`, `layer.v.weight` and
    `layer.v.bias`, and DDP, torch.compile and exporters see nothing unusual, unless `u` is pivoted. With a norm it is
    `v(bn(u(x)))`, and `bn`, else None, is a BatchNorm.
    """

    u: nn.Module
    v: nn.Module
    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        self.bn: nn.Module | None = None

    def factors(self, weight: str) -> Any:
        """This layer."""
        return self

    @property
    def rank(self) -> int:
        """Width between the factors, per group."""
        return self.factored["weight"].rank

    def counterparts(self, parameter: str) -> tuple[str, ...]:
        """Both factors, and the norm between them, for the weight; `v` has the bias."""
        if parameter != "weight":
            return ("v.bias",)
        return ("u.weight", "v.weight", *(("bn.weight", "bn.bias") if self.bn is not None else ()))

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would return for `x`, up to the truncation."""
        out: Tensor = self.v(self.between(self.u(x)))
        return out

    def between(self, narrow: Tensor) -> Tensor:
        """The outputs of `u`, channels in the second dimension or without a batch, as `v` takes them."""
        if self.bn is None:
            return narrow
        batched = narrow.dim() == len(self.factored["weight"].shape)
        out: Tensor = self.bn(narrow) if batched else self.bn(narrow.unsqueeze(0)).squeeze(0)
        return out

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's bias, kept by `v`."""
        bias: Any = self.v.bias
        return bias

    def extra_repr(self) -> str:
        """The dense layer's own description, so that a printed model stays readable."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)


def where(tensor: Tensor) -> dict[str, Any]:
    """Device and dtype of `tensor`, as keyword arguments of a layer."""
    return {"device": tensor.device, "dtype": tensor.dtype}


def full_name(kind: type) -> str:
    """Module and name of a class, to know one of a library that need not be imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


def without_data(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device, made without copying its data first."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for tensor in tensors
    }
    return copy.deepcopy(module, memo=dict(empty))


def low_rank_modules(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """(path, module) of every replacement in `model`, but not of the parts of one."""
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            outer = name
            while outer:
                outer = outer.rpartition(".")[0]
                if isinstance(model.get_submodule(outer), LowRank):
                    break
            else:
                yield name, module
