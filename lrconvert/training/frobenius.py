"""Frobenius decay: weight decay on the product of two factors, ½λ‖V·U‖², instead of on each factor.

Cuttlefish section 4.1 and Khodak et al. 2021, https://arxiv.org/abs/2105.01029. With u (r, n) and v (m, r) the
gradients are λ·(VᵀV)·U and λ·V·(UUᵀ): the Gram matrices are (r, r), so a layer costs 2r²(m + n) multiply-accumulates,
and V·U is never formed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lrconvert.errors import UsageError
from lrconvert.layers import Factored, low_rank_modules
from lrconvert.layers.pivoted import refuse_to_train


@dataclass(frozen=True)
class _Pair:
    """The stored factors of one weight."""

    u: nn.Parameter
    v: nn.Parameter
    factored: Factored

    def add_gradients(self, coefficient: float) -> None:
        factored, layout = self.factored, self.factored.layout
        left, right = layout.factors(self.u, self.v, factored.groups)
        # The stored pair is the matrices in another order, so its gradient is the matrices' gradient in that order.
        gradients = layout.pair(left @ (right @ right.mT), (left.mT @ left) @ right, factored.shape)
        for parameter, gradient in zip((self.u, self.v), gradients, strict=True):
            if parameter.requires_grad and parameter.grad is not None:
                parameter.grad.add_(gradient, alpha=coefficient)


class FrobeniusDecay:
    """Adds the gradient of ½λ‖V·U‖² for every factorized weight of a model: convolutions, gates, projections, all.

    The factors are left out of the optimizer's own weight decay (`factor_parameters` says which they are), else they
    decay twice.

    Args:
        model: a factorized model, perhaps wrapped (DDP, torch.compile); its factors are looked up now, so that a model
            factorized later needs a new `FrobeniusDecay`.
        coefficient: λ; the papers take the weight decay of the other layers.

    Raises:
        UsageError: the coefficient is negative, factors are pivoted, or a BatchNorm stands between factors, whose
            product is then no weight.
    """

    def __init__(self, model: nn.Module, coefficient: float) -> None:
        if not coefficient >= 0:
            raise UsageError(f"the coefficient of Frobenius decay must be 0 or more, not {coefficient:g}")
        refuse_to_train(model)
        self.coefficient = coefficient
        self._pairs = tuple(_pairs(model))
        if any(pair.factored.norm for pair in self._pairs):
            raise UsageError("Frobenius decay and a BatchNorm between the factors exclude each other: choose one")

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add to the `.grad` of the factors, in their dtype; those that are frozen or without a gradient are skipped.

        To be called once per optimizer step: after the last backward pass, after gradients are unscaled and clipped
        (as an optimizer's own weight decay comes after clipping), before `optimizer.step()`.
        """
        for pair in self._pairs:
            pair.add_gradients(self.coefficient)


def factor_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The weights of all `u` and `v` in `model`: what Frobenius decay decays, and no optimizer should.

    Biases are not among them. A set is for looking up; for an order that is the same in every process, go through
    `model.named_parameters()`.
    """
    return {parameter for pair in _pairs(model) for parameter in (pair.u, pair.v)}


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    for _, module in low_rank_modules(model):
        for path, factored in module.factored.items():
            u, v = (module.get_parameter(each) for each in module.counterparts(path)[:2])
            yield _Pair(u, v, factored)
