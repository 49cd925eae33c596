"""Attention, recurrent modules and mixtures of experts, for a while, made of separate products.

Torch's own make one call of everything, and transformers' make one of all experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lrconvert.layers.attention import LowRankAttention
from lrconvert.layers.eager import has_hooks
from lrconvert.layers.experts import LowRankExperts, is_experts
from lrconvert.layers.lowrank import LowRank
from lrconvert.layers.recurrent import LowRankRecurrent


class _Stepwise(LowRankRecurrent):
    """Multiplies by the weights step by step, whatever is faster."""

    def _steps_pay(self, input: Tensor, batch: int) -> bool:
        return True


@contextmanager
def explicit(model: nn.Module) -> Iterator[nn.Module]:
    """`model` with every plain nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN and mixture computing product by product.

    The parameters are the same objects. At the end `model` is as it was.
    """
    replaced = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        # A subclass, or hooks, may compute something else.
        if (type(module) in (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN) or is_experts(module))
        and not (has_hooks(module) or "forward" in vars(module))
    ]
    made = {id(module): _separate(module) for _, module in replaced}
    if replaced and not replaced[0][0]:
        yield made[id(model)]
        return
    try:
        for name, module in replaced:
            _put(model, name, made[id(module)])
        yield model
    finally:
        for name, module in replaced:
            _put(model, name, module)


def _separate(dense: nn.Module) -> nn.Module:
    if is_experts(dense):
        separate: LowRank = LowRankExperts(dense, {})
    else:
        separate = LowRankAttention(dense, {}) if isinstance(dense, nn.MultiheadAttention) else _Stepwise(dense, {})
    for name, parameter in dense.named_parameters(recurse=False):
        separate.register_parameter(name, parameter)
    for name, child in dense.named_children():
        separate.add_module(name, child)
    return separate.train(dense.training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
