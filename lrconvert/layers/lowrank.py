"""The module that takes a dense module's place; for most: two ordinary layers, applied one after the other."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import ModelError
from lrconvert.layers.layout import Layout, View, layout_for


class ShapeOnly(Tensor):
    """A meta tensor that refuses to be multiplied, and says that it is where the factors are (`stands_for`).

    torch multiplies a tensor on the CPU by one on the meta device without an error, and returns whatever was in memory.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass on what reads shape, dtype or device; raise for a product, or for anything else with real tensors."""
        given = list(_tensors_in((args, kwargs or {})))
        here = next((tensor for tensor in given if isinstance(tensor, ShapeOnly)), None)
        if func in (Tensor.to, Tensor.type_as) and here is not None and given[0] is not here:
            return given[0].to(here.stands_for, here.dtype)  # "like that weight" means like its factors
        if func in _PRODUCTS or any(not isinstance(tensor, ShapeOnly) and not tensor.is_meta for tensor in given):
            raise ModelError(
                f"a factorized layer has no weight to multiply by, but its parent passed it to {func.__name__}: "
                "keep the layer dense with --exclude"
            )
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, ShapeOnly) and here is not None:
            result.stands_for = here.stands_for
        return result

    stands_for: torch.device = torch.device("meta")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of the factors: other code puts what it computes there."""
        return self.stands_for

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Itself: there is nothing to copy."""
        return self


_PRODUCTS = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
    functional.embedding,
    functional.multi_head_attention_forward,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
}


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


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
    """

    kind: str
    shape: tuple[int, ...]
    rank: int
    groups: int = 1
    norm: bool = False
    view: View = "channel"

    @property
    def layout(self) -> Layout:
        """How the weight and its factors are stored."""
        return layout_for(self.kind, self.view)


class LowRank(nn.Module):
    """A module in the place of a dense one, some or all of whose weights are factorized.

    What it does not have itself it answers as the dense module would: `in_features`, `stride`, `batch_first`, and, as
    tensors without data, the weights that were factorized (see `shape_only`).

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
        return shape_only(found, next(self.parameters())) if isinstance(found, Tensor) else found


class LowRankLayer(LowRank):
    """`v(u(x))` in the place of a layer with one weight: `u` is applied first, `v` second, and carries the bias.

    The children are plain layers of torch.nn, so state-dict keys read `layer.u.weight`, `layer.v.weight` and
    `layer.v.bias`, and DDP, torch.compile and exporters see nothing unusual. With a norm it is `v(bn(u(x)))`, and
    `bn`, else None, is a BatchNorm.
    """

    u: nn.Module
    v: nn.Module
    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        self.bn: nn.Module | None = None

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
        bias = self.v.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def extra_repr(self) -> str:
        """The dense layer's own description, so that a printed model stays readable."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)


def where(tensor: Tensor) -> dict[str, Any]:
    """Device and dtype of `tensor`, as keyword arguments of a layer."""
    return {"device": tensor.device, "dtype": tensor.dtype}


def shape_only(dense: Tensor, factor: Tensor) -> Tensor:
    """A tensor without data in the place of the weight `dense` that was factorized.

    Other code reads `layer.weight` for its shape, dtype or device (transformers' weight initialisation,
    nn.TransformerEncoderLayer). Being on the meta device, or a subclass, it also keeps torch's fused encoder path from
    running, which would multiply the factors out on every call.
    """
    weight = torch.empty(dense.shape, dtype=factor.dtype, device="meta")
    # Graph capture has no use for a subclass, and checks devices itself.
    if torch.compiler.is_compiling() or type(weight) is not Tensor:
        return weight
    answer: ShapeOnly = weight.as_subclass(ShapeOnly)
    answer.stands_for = factor.device
    return answer


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
