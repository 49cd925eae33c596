"""What a factorized layer answers when it is asked for its weight: everything but the numbers.

Other code reads a weight's shape, dtype or device (transformers' weight initialisation, nn.TransformerEncoderLayer).
Some multiplies by it without calling the layer, `functional.linear(x, layer.weight, bias)`: the attention of
torchvision's Swin and of timm's BEiT, EVA and Swin v2 does. That product is taken with the factors; others are refused.
(torch.compile and torch.fx get the factors multiplied out, see `LowRank.recorded`.)
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import ModelError


class StandIn(Tensor):
    """A meta tensor that says it is where the factors are, and refuses to be multiplied but by functional.linear.

    torch multiplies a tensor on the CPU by one on the meta device without an error, and returns whatever was in memory.
    Being a subclass, it also keeps torch's fused encoder path from running, which would multiply the factors out on
    every call.

    Attributes:
        stands_for: the device of the factors.
        layer: which is called for a product with the weight; None for what is not that weight any more.
    """

    stands_for: torch.device = torch.device("meta")
    layer: nn.Module | None = None

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, layer: nn.Module | None) -> "StandIn":
        """One of these."""
        answer: StandIn = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        answer.stands_for, answer.layer = device, layer
        return answer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the product with the factors, or pass on what reads shape, dtype or device; raise for the rest."""
        kwargs = kwargs or {}
        answer = _known(func, args, kwargs)
        if answer is not NotImplemented:
            return answer
        given = list(_tensors_in((args, kwargs)))
        here = next((tensor for tensor in given if isinstance(tensor, StandIn)), None)
        if func in _PRODUCTS or any(not isinstance(tensor, StandIn) and not tensor.is_meta for tensor in given):
            raise _refusal(func.__name__)
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, StandIn) and here is not None:
            result.stands_for, result.layer = here.stands_for, None
        return result

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of the factors: other code puts what it computes there."""
        return self.stands_for

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """One for the copy of the layer."""
        return StandIn.of(self.shape, self.dtype, self.stands_for, copy.deepcopy(self.layer, memo))


class CapturedStandIn:
    """The same for torch.export and torch.jit.trace, which would record a tensor: torch's functions take it for one."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, layer: nn.Module | None) -> None:
        self.shape, self.dtype, self.device, self.layer = torch.Size(shape), dtype, device, layer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Code that asks whether a weight is a tensor takes the branch that it takes without a graph."""
        return Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the product with the factors, or cast; raise for the rest."""
        answer = _known(func, args, kwargs or {})
        if answer is NotImplemented:
            raise _refusal(func.__name__)
        return answer

    def __getattr__(self, name: str) -> Any:
        """What a meta tensor answers, if that has no data, or a cast."""
        if getattr(Tensor, name, None) in _CASTS:
            return partial(_cast, self, getattr(Tensor, name))
        found = getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        if isinstance(found, Tensor) or (callable(found) and name not in _ABOUT):
            raise _refusal(name)
        return found


def stand_in(shape: Sequence[int], factor: Tensor, layer: nn.Module | None) -> Any:
    """What stands for a weight that was factorized.

    Args:
        shape: of the weight.
        factor: has its dtype, on its device.
        layer: which computes the product with the weight, `layer(x)`, or `layer(x, bias)` with a bias that is not its
            own; None where functional.linear would compute another product.
    """
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return (CapturedStandIn if captured else StandIn.of)(shape, factor.dtype, factor.device, layer)


def linear_operands(input: Tensor, weight: Any, bias: Tensor | None = None) -> tuple[Tensor, Any, Tensor | None]:
    """What functional.linear was called with, by place or by name."""
    return input, weight, bias


def _known(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What `func` returns, or NotImplemented where something that stands in is not enough to tell."""
    if func is functional.linear:
        x, weight, bias = linear_operands(*args, **kwargs)
        layer = weight.layer if _stands_in(weight) else None
        if layer is None:
            return NotImplemented
        return layer(x) if bias is layer.bias else layer(x, bias)
    if func in _CASTS and args:
        if _stands_in(args[0]):
            return _cast(args[0], func, *args[1:], **kwargs)
        like = next((each for each in (*args, *kwargs.values()) if _stands_in(each)), None)
        if like is not None:  # "like that weight" means like its factors
            return args[0].to(like.device, like.dtype)
    return NotImplemented


def _cast(weight: Any, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What stands for `weight` in the dtype that `func` gives it, and where its factors are."""
    dtype = _CASTS[func] or weight.dtype
    for given in (*args, *kwargs.values()):
        if isinstance(given, torch.dtype | Tensor):
            dtype = given if isinstance(given, torch.dtype) else given.dtype
    make = CapturedStandIn if type(weight) is CapturedStandIn else StandIn.of
    return make(weight.shape, dtype, weight.device, weight.layer)


def _stands_in(value: Any) -> bool:
    return type(value) in (StandIn, CapturedStandIn)


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"a factorized layer has no weight to multiply by, but its parent passed it to {what}: "
        "keep the layer dense with --exclude"
    )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


# What leaves the numbers of a weight as they are, and the dtype it leaves them in.
_CASTS: dict[Any, torch.dtype | None] = {
    Tensor.to: None,
    Tensor.type_as: None,
    Tensor.contiguous: None,
    Tensor.detach: None,
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
# Methods of a tensor that say something about it.
_ABOUT = (
    "dim",
    "element_size",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "numel",
    "size",
    "stride",
)
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
