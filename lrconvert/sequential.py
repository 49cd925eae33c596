"""Fitting the factors of a network one layer after the other, each on what the compressed layers before it give.

Calibration sees the inputs that a weight has in the dense network. Behind other factors it meets others, and errors add
up. So each layer's second factor is fitted anew: of z, what the first factor makes of the inputs that the layer has in
the factorized network, V and its bias make the least-squares fit of y, what the dense layer returns for the same
examples. (Zhang et al. 2016, https://arxiv.org/abs/1505.06798, call it asymmetric reconstruction.) No metric of the
outputs would change that fit: every row of V is one of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrconvert.calling import calling
from lrconvert.errors import UsageError, WeightError
from lrconvert.inputs import Call
from lrconvert.layers import low_rank_modules
from lrconvert.layers.conv import LowRankConv
from lrconvert.layers.linear import LowRankLinear
from lrconvert.modes import at_rest
from lrconvert.moments import summed_products, wide
from lrconvert.outputs import shown_rows, token_mask

# Ridges that are tried, as shares of the mean variance of z, pulling towards the factor as it was.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# One call in so many says which of them to take, or to leave the factor as it was.
_ASIDE = 4

_Layer = LowRankLinear | LowRankConv


@dataclass(frozen=True)
class Fit:
    """What became of one layer.

    Attributes:
        error_before: ‖y′ − y‖ / ‖y‖ of its outputs, on the examples that chose the ridge.
        error_after: the same of a factor that was fitted to the others; the one that is kept was fitted to all.
    """

    error_before: float
    error_after: float


def check_examples(calls: Sequence[Call]) -> None:
    """Raise UsageError where there are not enough of them to fit to some and to choose by others."""
    if len(calls) < 2:
        raise UsageError(
            "fitting layers in turn takes two batches of examples at least: calibrate on more (--examples), or with a "
            "smaller batch"
        )


def fit_in_turn(
    small: nn.Module,
    dense: nn.Module,
    calls: Sequence[Call],
    *,
    device: torch.device | None = None,
    progress: Callable[[str, int], Callable[[], None]] | None = None,
) -> dict[str, Fit]:
    """Fit second factors, and the biases beside them, of the layers of `small`, in the order they run.

    Layers that run one after the other on the same input are fitted together; for each such step both networks run on
    all calls, as far as these layers.

    Args:
        small: factorized, changed in place. Embeddings, recurrent layers, attention in one module, transposed
            convolutions and the spatial view stay as they are; so do layers that the first call does not reach, and
            those that are not called on as many positions in both networks, as experts behind a router may be. Where
            they are, row by row the positions must be the same ones.
        dense: the network that it was made from.
        calls: batches of examples, two at least; one in four chooses the ridges.
        device: where to run; both networks are moved there and back.
        progress: from what is done and its number of units, a function to call after each.

    Returns:
        By path, the layers that were fitted.

    Raises:
        UsageError: there is one call only.
        WeightError: a layer's outputs are not finite.
    """
    check_examples(calls)
    with at_rest(small, device=device) as here, at_rest(dense, device=device), torch.no_grad():
        steps = _steps(small, calls[0])
        advance = progress("fitting layers in turn", len(steps)) if progress else None
        fits: dict[str, Fit] = {}
        for step in steps:
            fits |= _fitted(step, small, dense, calls, here)
            if advance:
                advance()
    return fits


def _layers(small: nn.Module) -> dict[str, _Layer]:
    """By path, the layers that can be fitted."""
    return {
        path: module
        for path, module in low_rank_modules(small)
        if isinstance(module, _Layer) and module.factored["weight"].layout.pointwise_last
    }


def _steps(small: nn.Module, call: Call) -> list[dict[str, int]]:
    """Layers that are fitted together, in the order they run: path to how often a forward pass calls each."""
    steps: list[dict[str, int]] = []
    times: dict[str, int] = {}
    last: tuple[Tensor, int] | None = None

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal last
        tensor = _input(args, kwargs)
        if path not in times:
            # Changed in place, it is another input.
            if last is None or tensor is not last[0] or tensor._version != last[1]:
                steps.append({})
            steps[-1][path] = 0
        times[path] = times.get(path, 0) + 1
        last = tensor, tensor._version

    with ExitStack() as hooks:
        for path, layer in _layers(small).items():
            hooks.callback(layer.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
        call.run(small)
    return [{path: times[path] for path in step} for step in steps]


def _fitted(
    step: Mapping[str, int], small: nn.Module, dense: nn.Module, calls: Sequence[Call], device: torch.device
) -> dict[str, Fit]:
    """Fit the layers of one step."""
    layers = {path: layer for path, layer in _layers(small).items() if path in step}
    sums = {path: (_LeastSquares.of(layer), _LeastSquares.of(layer)) for path, layer in layers.items()}
    for number, call in enumerate(calls):
        mask = token_mask(call, device)
        wanted = _watched(dense, {path: dense.get_submodule(path) for path in step}, step, call)
        got = _watched(small, {path: layer.v for path, layer in layers.items()}, step, call)
        for path in list(sums):
            ys = [_rows(y, layers[path], mask) for _, y in wanted[path]]
            zs, outputs = ([_rows(pair[at], layers[path], mask) for pair in got[path]] for at in (0, 1))
            if [each.shape for each in ys] != [each.shape for each in outputs]:
                del sums[path]
                continue
            to_fit, to_choose = sums[path]
            for y, z, output in zip(ys, zs, outputs, strict=True):
                (to_choose if number % _ASIDE == 0 else to_fit).add(y, z, output)
    return {path: _improve(path, layers[path], *each) for path, each in sums.items()}


class _Reached(Exception):
    """Every layer that was asked for has run: the rest of the forward pass is of no use."""


def _watched(
    model: nn.Module, modules: Mapping[str, nn.Module], times: Mapping[str, int], call: Call
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By name, (input, output) of every call of `modules`, in a forward pass that ends with the last of them."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def take(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # Copies: what follows may work in place.
        seen[name].append((_input(args, kwargs).clone(), output.clone()))
        if all(len(seen[each]) == times[each] for each in seen):
            raise _Reached

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(partial(take, name), with_kwargs=True).remove)
        hooks.enter_context(calling(model))
        with suppress(_Reached):
            call.run(model)
    return seen


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with, by place or by name."""
    tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tensor


def _rows(tensor: Tensor, layer: _Layer, mask: Tensor | None) -> Tensor:
    """(positions, channels) of what goes into `layer` or comes out, without hidden tokens."""
    if isinstance(layer, LowRankConv):  # (batch, channels, …) or (channels, …)
        return tensor.movedim(1 - len(layer.factored["weight"].shape), -1).flatten(0, -2)
    rows = shown_rows(tensor.shape[:-1], mask)
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if rows is None else flat[rows]


@dataclass
class _LeastSquares:
    """Sums over positions, in float64, on the CPU, of which the change follows that leaves least error.

    Attributes:
        zz: (groups, s, s) of what goes into `v` and a one, s = rank + 1.
        ez: (groups, rows, s) of what its outputs lack, and that.
        ee, yy: squares of what they lack, and of what was wanted.
        bias: whether there is one to change.
    """

    zz: Tensor
    ez: Tensor
    bias: bool
    ee: float = 0.0
    yy: float = 0.0

    @classmethod
    def of(cls, layer: _Layer) -> Self:
        """Nothing yet."""
        groups, size = layer.factored["weight"].groups, layer.rank + 1
        weight = layer.v.weight
        assert isinstance(weight, Tensor)
        zz, ez = (torch.zeros(groups, rows, size, dtype=torch.float64) for rows in (size, len(weight) // groups))
        return cls(zz, ez, layer.bias is not None)

    def add(self, y: Tensor, z: Tensor, output: Tensor) -> None:
        """Count positions (n, channels) where `output` came of `z` and `y` was wanted."""
        lacking, narrow = (wide(each).unflatten(1, (len(self.zz), -1)).movedim(1, 0) for each in (y - output, z))
        narrow = torch.cat([narrow, torch.ones_like(narrow[:, :, :1])], dim=2)
        self.zz += summed_products(narrow, narrow)
        self.ez += summed_products(lacking, narrow)
        self.ee += float(lacking.double().square().sum())
        self.yy += float(y.double().square().sum())

    def __add__(self, other: Self) -> Self:
        return type(self)(self.zz + other.zz, self.ez + other.ez, self.bias, self.ee + other.ee, self.yy + other.yy)

    def change(self, ridge: float) -> Tensor:
        """What to add to `v` and to its bias, (groups, rows, s): the least squares of what is lacking, with a penalty
        on the change of `v`.
        """
        zz, ez = self.zz[:, :-1, :-1], self.ez[:, :, :-1]
        if self.bias:  # the bias follows from the means; `v` is fitted to what varies around them
            count = self.zz[:, -1:, -1:].clamp(min=1)
            z, e = self.zz[:, :-1, -1:] / count, self.ez[:, :, -1:] / count
            zz, ez = zz - count * z @ z.mT, ez - count * e @ z.mT
        variance = zz.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        penalty = ridge * variance[:, None, None] * torch.eye(zz.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(zz + penalty, ez, left=False)
        return torch.cat([weight, e - weight @ z if self.bias else torch.zeros_like(ez[:, :, :1])], dim=2)

    def left_by(self, change: Tensor) -> float:
        """`ee` after such a change."""
        return max(self.ee - 2 * float((change * self.ez).sum()) + float((change @ self.zz * change).sum()), 0.0)


def _improve(path: str, layer: _Layer, to_fit: _LeastSquares, to_choose: _LeastSquares) -> Fit:
    """Change `v` and the bias of `layer` as much as examples that did not fit them agree to."""
    both = to_fit + to_choose
    if not math.isfinite(both.ee + both.yy):
        raise WeightError(
            f"{path}: its outputs are NaN or infinite; look for them in the examples, or leave the layer out with "
            f"--exclude '{path}'"
        )
    left, ridge = min((to_choose.left_by(to_fit.change(ridge)), ridge) for ridge in _RIDGES)
    scale = max(to_choose.yy, torch.finfo(torch.float64).tiny)
    before = (to_choose.ee / scale) ** 0.5
    if not left < to_choose.ee:
        return Fit(before, before)
    change = both.change(ridge)
    weight, bias = layer.v.weight, layer.bias
    assert isinstance(weight, Tensor)
    weight.copy_(weight.double() + change[:, :, :-1].reshape(weight.shape).to(weight.device))
    if bias is not None:
        bias.copy_(bias.double() + change[:, :, -1].flatten().to(bias.device))
    return Fit(before, (left / scale) ** 0.5)
