"""Fitting the factors of a network one layer after the other, each on what the compressed layers before it give.

Calibration sees the inputs that a weight has in the dense network. Behind other factors it meets others, and errors add
up. So each layer's second factor is fitted anew: of z, what the first factor makes of the inputs that the layer has in
the factorized network, V and its bias make the least-squares fit of y, what the dense layer returns for the same
examples. (Zhang et al. 2016, https://arxiv.org/abs/1505.06798, call it asymmetric reconstruction.) No metric of the
outputs would change that fit: every row of V is one of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from lrconvert.errors import UsageError
from lrconvert.inputs import Call
from lrconvert.layers import low_rank_modules
from lrconvert.layers.lowrank import LowRankLayer
from lrconvert.modes import at_rest
from lrconvert.outputs import token_mask

# Ridges that are tried, as shares of the mean of z², pulling towards the factor as it was.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# One call in so many says which of them to take, or to leave the factor as it was.
_ASIDE = 4


@dataclass(frozen=True)
class Fit:
    """What became of one layer.

    Attributes:
        error_before, error_after: ‖y′ − y‖ / ‖y‖ of its outputs, on the examples that chose the ridge.
    """

    error_before: float
    error_after: float


def fit_in_turn(
    small: nn.Module,
    dense: nn.Module,
    calls: Sequence[Call],
    *,
    device: torch.device | None = None,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> dict[str, Fit]:
    """Fit second factors, and the biases beside them, of the layers of `small`, in the order they run.

    Layers with the same input are fitted together; for each such step both networks run on all calls, as far as these
    layers.

    Args:
        small: factorized, changed in place. Recurrent layers, attention in one module, transposed convolutions and the
            spatial view stay as they are.
        dense: the network that it was made from.
        calls: batches of examples, two at least; a quarter of them chooses the ridges.
        device: where to run; both networks are moved there and back.
        progress: from what is done and its number of units, a function to call after each.

    Returns:
        By path, the layers that were fitted.

    Raises:
        UsageError: there is one call only.
    """
    if len(calls) < 2:
        raise UsageError("fitting layers in turn takes two batches of examples at least: give more, or smaller ones")
    with at_rest(small, device=device) as here, at_rest(dense, device=device), torch.no_grad():
        steps = _steps(small, calls[0])
        advance = progress("fitting layers in turn", len(steps)) if progress else None
        fits: dict[str, Fit] = {}
        for step in steps:
            fits |= _fitted(step, small, dense, calls, here)
            if advance:
                advance()
    return fits


def _layers(small: nn.Module) -> dict[str, LowRankLayer]:
    """By path, the layers that can be fitted."""
    return {
        path: module
        for path, module in low_rank_modules(small)
        if isinstance(module, LowRankLayer) and module.factored["weight"].layout.pointwise_last
    }


def _steps(small: nn.Module, call: Call) -> list[dict[str, int]]:
    """Layers that are fitted together, in the order they run: path to how often a forward pass calls each."""
    inputs: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks:
        for path, module in _layers(small).items():
            # The tensors are kept, so that no two of them have one identity.
            hooks.callback(
                module.register_forward_pre_hook(lambda _, args, path=path: inputs.append((path, args[0]))).remove
            )
        call.run(small)
    steps: dict[int, dict[str, int]] = {}
    first: dict[str, int] = {}
    for path, tensor in inputs:
        step = steps.setdefault(first.setdefault(path, id(tensor)), {})
        step[path] = step.get(path, 0) + 1
    return list(steps.values())


def _fitted(
    step: Mapping[str, int], small: nn.Module, dense: nn.Module, calls: Sequence[Call], device: torch.device
) -> dict[str, Fit]:
    """Fit the layers of one step."""
    layers = {path: layer for path, layer in _layers(small).items() if path in step}
    moments = {path: (_Moments.of(layer), _Moments.of(layer)) for path, layer in layers.items()}
    for number, call in enumerate(calls):
        mask = token_mask(call, device)
        wanted = _watched(dense, {path: dense.get_submodule(path) for path in step}, step, call)
        got = _watched(small, {path: layer.v for path, layer in layers.items()}, step, call)
        for path, (to_fit, to_choose) in moments.items():
            part = to_choose if number % _ASIDE == 0 else to_fit
            for (_, y), (z, output) in zip(wanted[path], got[path], strict=True):
                part.add(*(_rows(each, layers[path], mask) for each in (y, z, output)))
    return {path: _improve(layers[path], *moments[path]) for path in step}


class _Reached(Exception):
    """Every layer that was asked for has run: the rest of the forward pass is of no use."""


def _watched(
    model: nn.Module, modules: Mapping[str, nn.Module], times: Mapping[str, int], call: Call
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By name, (input, output) of every call of `modules`, in a forward pass that ends with the last of them."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def take(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name].append((args[0], output))
        if all(len(seen[each]) == times[each] for each in seen):
            raise _Reached

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(partial(take, name)).remove)
        with suppress(_Reached):
            call.run(model)
    return seen


def _rows(tensor: Tensor, layer: LowRankLayer, mask: Tensor | None) -> Tensor:
    """(positions, channels) of what goes into `layer` or comes out, without hidden tokens."""
    dims = len(layer.factored["weight"].shape)
    if dims > 2:  # a convolution, of (batch, channels, …) or (channels, …)
        return tensor.movedim(1 - dims, -1).flatten(0, -2)
    # (batch, length, …), or (batch · length, channels) where the dense layer is transformers' Conv1D.
    if mask is not None and (tensor.shape[:2] == mask.shape if tensor.dim() > 2 else len(tensor) == mask.numel()):
        return tensor.flatten(0, -2)[mask.flatten().repeat_interleave(tensor.shape[2:-1].numel())]
    return tensor.reshape(-1, tensor.shape[-1])


@dataclass
class _Moments:
    """Sums over positions, in float64, on the CPU.

    Attributes:
        zz: (groups, s, s) of what goes into `v` and a one, s = rank + 1.
        ez: (groups, rows, s) of what its outputs lack, and that.
        ee, yy: squares of what they lack, and of what was wanted.
    """

    zz: Tensor
    ez: Tensor
    ee: float = 0.0
    yy: float = 0.0

    @classmethod
    def of(cls, layer: LowRankLayer) -> Self:
        """Nothing yet."""
        groups, size = layer.factored["weight"].groups, layer.rank + 1
        weight = layer.v.weight
        assert isinstance(weight, Tensor)
        zz, ez = (torch.zeros(groups, rows, size, dtype=torch.float64) for rows in (size, len(weight) // groups))
        return cls(zz, ez)

    def add(self, y: Tensor, z: Tensor, output: Tensor) -> None:
        """Count positions (n, channels) where `output` came of `z` and `y` was wanted."""
        groups = len(self.zz)
        lacking, narrow = (_wide(each).unflatten(1, (groups, -1)).movedim(1, 0) for each in (y - output, z))
        narrow = torch.cat([narrow, torch.ones_like(narrow[:, :, :1])], dim=2)
        self.zz += (narrow.mT @ narrow).double().cpu()
        self.ez += (lacking.mT @ narrow).double().cpu()
        self.ee += float(lacking.double().square().sum())
        self.yy += float(y.double().square().sum())

    def __add__(self, other: Self) -> Self:
        return type(self)(self.zz + other.zz, self.ez + other.ez, self.ee + other.ee, self.yy + other.yy)

    def change(self, ridge: float) -> Tensor:
        """What to add to `v` and its bias, (groups, rows, s): least squares of what is lacking, and of the change."""
        mean = self.zz.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        penalty = ridge * mean[:, None, None] * torch.eye(self.zz.shape[1], dtype=torch.float64)
        return torch.linalg.solve(self.zz + penalty, self.ez, left=False)

    def left_by(self, change: Tensor) -> float:
        """`ee` after such a change."""
        return max(self.ee - 2 * float((change * self.ez).sum()) + float((change @ self.zz * change).sum()), 0.0)


def _wide(rows: Tensor) -> Tensor:
    """`rows` in float32, or float64 if they were."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _improve(layer: LowRankLayer, to_fit: _Moments, to_choose: _Moments) -> Fit:
    """Change `v` and the bias of `layer` as much as examples that did not fit them agree to."""
    bias = layer.bias
    if bias is None:
        to_fit, to_choose = (_without_one(moments) for moments in (to_fit, to_choose))
    left, ridge = min((to_choose.left_by(to_fit.change(ridge)), ridge) for ridge in _RIDGES)
    scale = max(to_choose.yy, torch.finfo(torch.float64).tiny)
    before = (to_choose.ee / scale) ** 0.5
    if not left < to_choose.ee:
        return Fit(before, before)
    change = (to_fit + to_choose).change(ridge)
    weight = layer.v.weight
    assert isinstance(weight, Tensor)
    rank = layer.rank
    weight += change[:, :, :rank].reshape(weight.shape).to(weight)
    if bias is not None:
        bias += change[:, :, rank].flatten().to(bias)
    return Fit(before, (left / scale) ** 0.5)


def _without_one(moments: _Moments) -> _Moments:
    return _Moments(moments.zz[:, :-1, :-1], moments.ez[:, :, :-1], moments.ee, moments.yy)
