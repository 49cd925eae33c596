"""The functions of torch that multiply by a weight, and what each call of them shows of the weight's two sides.

Shapes: n is the positions that the weight is applied to, pixels, tokens or time steps; (groups, n, columns) are the
inputs x of its matrix view, (groups, n, rows) the outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Product:
    """One product with a weight.

    Attributes:
        weight: as it was given: the parameter, or a view of a part of it.
        bias: that was added to the outputs, if any.
        channels: dimension of the outputs that the weight's outputs are in.
        inputs: from the number of groups, x (groups, n, columns).
    """

    weight: Tensor
    bias: Tensor | None
    channels: int
    inputs: Callable[[int], Tensor]

    def outputs(self, like: Tensor, groups: int, keep: Tensor | None = None) -> Tensor:
        """(groups, n, rows) of a tensor that has the shape of the outputs; with `keep`, of these positions only."""
        moved = like.movedim(self.channels, -1)
        # Chosen before they are copied: of a large image most positions may not be wanted.
        at = ... if keep is None else torch.unravel_index(keep, moved.shape[:-1])
        rows = moved[at].reshape(-1, moved.shape[-1])
        return rows.unflatten(1, (groups, -1)).transpose(0, 1)


def product_of(function: object, args: Sequence[Any], kwargs: dict[str, Any]) -> Product | None:
    """What a call of `function` multiplies, if it is a product with a weight."""
    read = _READERS.get(function)
    return None if read is None else read(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    return Product(weight, bias, -1, lambda groups: _rows(input, groups))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Product:
    """transformers' Conv1D: a bias, and x times a weight that is stored (in, out)."""
    return Product(mat2, input, -1, lambda groups: _rows(mat1, groups))


def _matmul(input: Tensor, other: Any) -> Product | None:
    """transformers' FalconLinear: x times the transpose of a weight; the bias is added later."""
    weight = other._base if isinstance(other, Tensor) and other.dim() == 2 else None
    if weight is None or (weight.shape, weight.stride()) != (other.mT.shape, other.mT.stride()):
        return None
    return Product(weight, None, -1, lambda groups: _rows(input, groups))


def _rows(x: Tensor, groups: int) -> Tensor:
    return x.reshape(1, -1, x.shape[-1]).expand(groups, -1, -1)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Product:
    dims = weight.dim() - 2
    steps, apart = _each(stride, dims), _each(dilation, dims)
    return Product(
        weight, bias, -1 - dims, lambda parts: _patches(input, weight.shape[2:], steps, apart, padding, groups)
    )


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Any, groups: int
) -> Tensor:
    """What a convolution multiplies at each position, (groups, n, channels/groups · kernel), out of (…, C, *size)."""
    dims = len(kernel)
    spans = [(width - 1) * step + 1 for width, step in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        ends = [((span - 1) // 2, span - 1 - (span - 1) // 2) if padding == "same" else (0, 0) for span in spans]
    else:
        ends = [(size, size) for size in _each(padding, dims)]
    x = functional.pad(x, [size for pair in reversed(ends) for size in pair])
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    for axis, (span, step, apart) in enumerate(zip(spans, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, span, step)[..., ::apart]
    # (batch, C, *positions, *kernel) → (groups, batch · positions, C/groups · kernel)
    x = x.movedim(1, 1 + dims).unflatten(1 + dims, (groups, -1)).movedim(1 + dims, 0)
    return x.flatten(2 + dims).flatten(1, 1 + dims)


_READERS: dict[object, Callable[..., Product | None]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    functional.conv1d: _conv,
    functional.conv2d: _conv,
    functional.conv3d: _conv,
}
