"""Optimizers that torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from lrconvert.errors import UsageError
from lrconvert.training.signum import MOMENTUM, signs


class Signum(Optimizer):
    """SGD by the signs of the momentum: m ← β·m + (1 − β)·g, then p ← p − lr·(sign(m) + weight_decay·p).

    For one process. Several take `compress(model, "signum")`, where momentum and vote are, with `torch.optim.SGD` of
    momentum 0. As there, a momentum of 0 counts as positive.

    Source: Bernstein et al. 2018, https://arxiv.org/abs/1802.04434, algorithm 2 with one worker.

    Args:
        params: parameters, or groups of them.
        lr: how far every element moves in a step.
        momentum: β.
        weight_decay: added to the sign, not to the gradient.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = MOMENTUM,
        weight_decay: float = 0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise UsageError(
                f"Signum needs lr ≥ 0, 0 ≤ momentum < 1 and weight_decay ≥ 0, not {lr}, {momentum}, {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `closure`, if given, computes the loss and gradients anew, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = signs(state["momentum"]).add_(parameter, alpha=group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
        return loss
