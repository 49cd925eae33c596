"""Optimizers by name, with weight decay only where it belongs."""

from collections.abc import Iterable

import torch
from torch import nn

from lrconvert.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, undecayed: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """A fresh optimizer for the trainable parameters of `model`.

    Args:
        model: dense or factorized.
        recipe: names the optimizer and its settings.
        undecayed: parameters that something else decays (factors under Frobenius decay); besides these, no parameter
            of one dimension is decayed (Cuttlefish appendix; Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
    """
    spared = {id(parameter) for parameter in undecayed}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [each for each in trainable if each.ndim > 1 and id(each) not in spared]
    others = [each for each in trainable if each.ndim <= 1 or id(each) in spared]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, recipe.weight_decay), (others, 0.0))
        if parameters
    ]
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
