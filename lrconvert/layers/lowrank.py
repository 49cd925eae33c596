"""The module that takes a dense layer's place: two ordinary layers, applied one after the other."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import ModelError


class ShapeOnly(Tensor):
    """A meta tensor that refuses to be multiplied.

    torch multiplies a tensor on the CPU by one on the meta device without an error, and returns whatever was in memory.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass on what reads shape, dtype or device; raise for a product."""
        if func in _PRODUCTS:
            raise ModelError(
                f"a factorized layer has no weight to multiply by, but its parent passed it to {func.__name__}: "
                "keep the layer dense with --exclude"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


_PRODUCTS = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
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


class LowRank(nn.Module):
    """`v(u(x))`: the factor `u` is applied first, `v` second; `v` carries the bias of the dense layer.

    The children are plain `nn.Linear` or `nn.Conv*d`, so state-dict keys read `layer.u.weight`, `layer.v.weight`
    and `layer.v.bias`, and DDP, torch.compile and exporters see nothing unusual.

    Attributes:
        dense_shape: shape of the weight that `u` and `v` replace, out first.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, u: nn.Module, v: nn.Module, dense_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.u = u
        self.v = v
        self.dense_shape = dense_shape

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> Self:
        """Uninitialised factors of `dense` at `rank` per group, on its device and in its dtype."""
        raise TypeError(f"{cls.__name__} does not say how to take the place of {type(dense).__name__}")

    def dense(self) -> nn.Module:
        """The uninitialised dense layer whose place this module took, on its device and in its dtype."""
        raise TypeError(f"{type(self).__name__} does not say which layer it took the place of")

    @property
    def kind(self) -> str:
        """The key of `lrconvert.layers.FAMILIES` that this module belongs to."""
        raise TypeError(f"{type(self).__name__} does not say its kind")

    @property
    def rank(self) -> int:
        """Width between the factors, per group."""
        raise TypeError(f"{type(self).__name__} does not say its rank")

    @property
    def groups(self) -> int:
        """Groups that are factorized each on their own."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would return for `x`, up to the truncation."""
        out: Tensor = self.v(self.u(x))
        return out

    @property
    def weight(self) -> Tensor:
        """A meta tensor with the dense weight's shape and dtype: never data.

        Other code reads `layer.weight` for its shape or dtype (transformers' weight initialisation,
        nn.TransformerEncoderLayer). Being on the meta device, it also keeps torch's fused encoder path from
        running, which would multiply the factors out on every call.
        """
        u = self.u.weight
        assert isinstance(u, Tensor)
        shape = torch.empty(self.dense_shape, dtype=u.dtype, device="meta")
        # Graph capture has no use for a subclass, and checks devices itself.
        return shape if torch.compiler.is_compiling() or type(shape) is not Tensor else shape.as_subclass(ShapeOnly)

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's bias, kept by `v`."""
        bias = self.v.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def extra_repr(self) -> str:
        """The dense layer's own description, so that a printed model stays readable."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)
