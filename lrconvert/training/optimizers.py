"""Optimizers by name, with weight decay only where it belongs; and Signum, which torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from lrconvert.errors import UsageError
from lrconvert.recipe import Recipe
from lrconvert.training.signum import MOMENTUM, signs


def make_optimizer(
    model: nn.Module, recipe: Recipe, undecayed: Iterable[nn.Parameter] = (), processes: int = 1
) -> Optimizer:
    """A fresh optimizer for the trainable parameters of `model`.

    Args:
        model: dense or factorized.
        recipe: names the optimizer and its settings.
        undecayed: parameters that something else decays (factors under Frobenius decay). Besides these, no vector is
            decayed (Cuttlefish appendix; Goyal et al. 2017, https://arxiv.org/abs/1706.02677), nor what a model of
            timm names in `no_weight_decay`.
        processes: that train together; for Signum these vote on the signs, and SGD follows.
    """
    spared = {id(parameter) for parameter in undecayed}
    own = getattr(model, "no_weight_decay", None)  # names, in models of timm
    spared |= {id(parameter) for name, parameter in model.named_parameters() if own and name in own()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A vector may be stored with more dimensions: ResMLP's scales are (1, 1, d).
    spared |= {id(each) for each in trainable if each.numel() == max(each.shape, default=1)}
    decayed = [each for each in trainable if id(each) not in spared]
    others = [each for each in trainable if id(each) in spared]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, recipe.weight_decay), (others, 0.0))
        if parameters
    ]
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    if recipe.opt == "signum":
        return Signum(groups, recipe.lr) if processes == 1 else torch.optim.SGD(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


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
