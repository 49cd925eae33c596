"""What a factorized layer answers when it is asked for its weight: everything but the numbers.

Other code reads a weight's shape, dtype or device (transformers' weight initialisation, nn.TransformerEncoderLayer).
Some multiplies by it without calling the layer, `functional.linear(x, layer.weight, bias)`: the attention of
torchvision's Swin and of timm's BEiT, EVA and Swin v2 does. That product is taken with the factors; others are refused.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import ModelError


class StandIn(Tensor):
    """A meta tensor that says it is where the factors are (`stands_for`), and refuses to be multiplied but for that.

    torch multiplies a tensor on the CPU by one on the meta device without an error, and returns whatever was in memory.
    Being a subclass, it also keeps torch's fused encoder path from running, which would multiply the factors out on
    every call.
    """

    stands_for: torch.device = torch.device("meta")
    layer: nn.Module | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the product with the factors, or pass on what reads shape, dtype or device; raise for the rest."""
        kwargs = kwargs or {}
        if func is functional.linear:
            x, weight, bias = linear_operands(*args, **kwargs)
            layer = getattr(weight, "layer", None)
            if layer is not None:
                return product_by_call(layer, x, bias)
        given = list(_tensors_in((args, kwargs)))
        here = next((tensor for tensor in given if isinstance(tensor, StandIn)), None)
        if func in (Tensor.to, Tensor.type_as) and here is not None and given[0] is not here:
            return given[0].to(here.stands_for, here.dtype)  # "like that weight" means like its factors
        if func in _PRODUCTS or any(not isinstance(tensor, StandIn) and not tensor.is_meta for tensor in given):
            raise ModelError(
                f"a factorized layer has no weight to multiply by, but its parent passed it to {func.__name__}: "
                "keep the layer dense with --exclude"
            )
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, StandIn) and here is not None:
            result.stands_for = here.stands_for
        return result

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device of the factors: other code puts what it computes there."""
        return self.stands_for

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Itself: there is nothing to copy."""
        return self


class CapturedStandIn:
    """The same while a graph is captured, which has no use for a subclass: no tensor, but torch's functions take it."""

    def __init__(self, shape: tuple[int, ...], factor: Tensor, layer: nn.Module | None) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), factor.dtype, factor.device
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the product with the factors; the rest sees a meta tensor, which no captured graph computes with."""
        kwargs = kwargs or {}
        if func is functional.linear:
            x, weight, bias = linear_operands(*args, **kwargs)
            layer = getattr(weight, "layer", None)
            if layer is not None:
                return product_by_call(layer, x, bias)
        return func(*(_on_meta(each) for each in args), **{name: _on_meta(each) for name, each in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        """What a meta tensor answers."""
        return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)


def stand_in(shape: tuple[int, ...], factor: Tensor, layer: nn.Module | None) -> Any:
    """What stands for a weight that was factorized.

    Args:
        shape: of the weight.
        factor: has its dtype, on its device.
        layer: which is called for a product of functional.linear with the weight; None where that would be another one.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return CapturedStandIn(shape, factor, layer)
    answer: StandIn = torch.empty(shape, dtype=factor.dtype, device="meta").as_subclass(StandIn)
    answer.stands_for, answer.layer = factor.device, layer
    return answer


def linear_operands(input: Tensor, weight: Any, bias: Tensor | None = None) -> tuple[Tensor, Any, Tensor | None]:
    """What functional.linear was called with, by place or by name."""
    return input, weight, bias


def product_by_call(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias, where `bias` may be another than that of the linear `layer`, which is called."""
    out: Tensor = layer(x)
    own: Any = layer.bias
    if bias is own:
        return out
    out = out if own is None else out - own
    return out if bias is None else out + bias


def _on_meta(value: Any) -> Any:
    """`value`, or a meta tensor for what stands in."""
    if isinstance(value, CapturedStandIn):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


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
