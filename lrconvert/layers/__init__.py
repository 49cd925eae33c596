"""What can be factorized: one file per family of layers, and here the registry that the rest of lrconvert reads."""

from dataclasses import dataclass

from torch import nn

from lrconvert.layers.conv import CONV_TYPES, LowRankConv
from lrconvert.layers.layer import Evidence, Layer
from lrconvert.layers.linear import LowRankLinear
from lrconvert.layers.lowrank import LowRank

__all__ = ["FAMILIES", "WEIGHT_LAYERS", "Evidence", "Family", "Layer", "LowRank", "family_of"]


@dataclass(frozen=True)
class Family:
    """A kind of layer that can be factorized, and what takes its place.

    Attributes:
        kind: the name that plans and reports use.
        dense: the dense module class. A subclass counts only while it computes as this class does.
        low_rank: the module that takes its place.
    """

    kind: str
    dense: type[nn.Module]
    low_rank: type[LowRank]


FAMILIES: dict[str, Family] = {
    "linear": Family("linear", nn.Linear, LowRankLinear),
    **{kind: Family(kind, conv, LowRankConv) for kind, conv in CONV_TYPES.items()},
}

# Kinds that count when the first K layers are to stay dense: everything that multiplies its input by a matrix.
WEIGHT_LAYERS = frozenset({*FAMILIES, "recurrent", "attention", "conv_transpose", "transposed"})


def family_of(module: nn.Module) -> Family | None:
    """The family whose dense class `module` is an instance of, or None."""
    return next((family for family in FAMILIES.values() if isinstance(module, family.dense)), None)
