"""The module in the place of one that owns several weights: a recurrent one, attention, or a mixture of experts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.layers.layer import factor_name
from lrconvert.layers.linear import LinearFactors, multiplied_out
from lrconvert.layers.lowrank import Factored, LowRank, where


class LowRankComposite(LowRank):
    """In the place of a module with several weights: each is a parameter, as it was, or a child with its factors.

    The factors of "weight_ih_l0" are the child `ih_l0`, those of "in_proj_weight" are `in_proj`.
    """

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        for name, parameter in dense.named_parameters(recurse=False):
            if name in wanted:
                setattr(self, factor_name(name), self.new_factors(wanted[name], where(parameter)))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))

    def new_factors(self, factored: Factored, place: Mapping[str, Any]) -> nn.Module:
        """An uninitialised child with the factors of one weight, on the device and in the dtype that `place` says."""
        return LinearFactors(factored, False, place)

    def counterparts(self, parameter: str) -> tuple[str, ...]:
        """Both factors for a factorized weight; for all else the parameter of the same name, or a child's."""
        child, _, rest = parameter.rpartition(".")
        inner = getattr(self, child) if child else None
        if isinstance(inner, LowRank):
            return tuple(f"{child}.{path}" for path in inner.counterparts(rest))
        name = factor_name(parameter)
        return (f"{name}.u.weight", f"{name}.v.weight") if parameter in self.factored else (parameter,)

    def factors(self, weight: str) -> Any:
        """The child with the factors."""
        return getattr(self, factor_name(weight))

    def product(self, parameter: str) -> Tensor:
        """The weight `parameter`, multiplied out if it is factorized: (groups·rows, columns)."""
        if parameter in self.factored:
            return multiplied_out(self.factors(parameter), self.factored[parameter].groups)
        weight: Tensor = getattr(self, parameter)
        return weight
