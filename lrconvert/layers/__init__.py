"""What can be factorized: one file per family of layers, and here the registry that the rest of lrconvert reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lrconvert.layers.attention import SEPARATE, LowRankAttention
from lrconvert.layers.conv import CONV_TYPES, TRANSPOSED_TYPES, LowRankConv, LowRankConvTranspose
from lrconvert.layers.embedding import LowRankEmbedding
from lrconvert.layers.experts import LowRankExperts, expert_weights, is_experts
from lrconvert.layers.layer import COMPOSITE_KINDS, EXPERT_KINDS, Evidence, Layer
from lrconvert.layers.layout import LAYOUTS, SPATIAL, View
from lrconvert.layers.linear import LowRankLinear
from lrconvert.layers.lowrank import Factored, LowRank, low_rank_modules
from lrconvert.layers.recurrent import GATES, RECURRENT_TYPES, LowRankRecurrent

__all__ = [
    "COMPOSITE_KINDS",
    "CONV_TYPES",
    "EXPERT_KINDS",
    "FAMILIES",
    "LAYOUTS",
    "SPATIAL",
    "Evidence",
    "Factored",
    "Family",
    "Layer",
    "LowRank",
    "View",
    "family_of",
    "low_rank_modules",
]


def _one_weight(module: nn.Module) -> Mapping[str, int]:
    return {"weight": int(getattr(module, "groups", 1))}


def _attention_weights(module: nn.Module) -> Mapping[str, int]:
    packed = module.in_proj_weight is not None
    projections = {"in_proj_weight": 3} if packed else dict.fromkeys(SEPARATE, 1)
    return {**projections, "out_proj.weight": 1}


def _recurrent_weights(module: nn.Module) -> Mapping[str, int]:
    gates = GATES[str(module.mode)]
    names = [name for name in module._flat_weights_names if name.startswith("weight_")]  # type: ignore[union-attr]
    return {name: 1 if name.startswith("weight_hr") else gates for name in names}


@dataclass(frozen=True)
class Family:
    """A kind of module that can be factorized, and what takes its place.

    Attributes:
        kind: the name that plans and reports use, a key of `LAYOUTS`.
        dense: the dense module class. A subclass counts only while it computes as this class does.
        low_rank: the module that takes its place.
        weights: from a dense module, the path of each weight to the number of matrices in it.
    """

    kind: str
    dense: type[nn.Module]
    low_rank: type[LowRank]
    weights: Callable[[nn.Module], Mapping[str, int]] = _one_weight


FAMILIES: dict[str, Family] = {
    "linear": Family("linear", nn.Linear, LowRankLinear),
    **{kind: Family(kind, conv, LowRankConv) for kind, conv in CONV_TYPES.items()},
    **{kind: Family(kind, conv, LowRankConvTranspose) for kind, conv in TRANSPOSED_TYPES.items()},
    **{
        kind: Family(kind, recurrent, LowRankRecurrent, _recurrent_weights)
        for kind, recurrent in RECURRENT_TYPES.items()
    },
    "attention": Family("attention", nn.MultiheadAttention, LowRankAttention, _attention_weights),
    "embedding": Family("embedding", nn.Embedding, LowRankEmbedding),
}


def family_of(module: nn.Module) -> Family | None:
    """The family whose dense class `module` is an instance of, or None."""
    if _is_transposed_linear(module):
        return Family("transposed_linear", type(module), LowRankLinear)
    if is_experts(module):
        kind = "transposed_experts" if module.is_transposed else "experts"
        return Family(kind, type(module), LowRankExperts, expert_weights)
    return next((family for family in FAMILIES.values() if isinstance(module, family.dense)), None)


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, known by name so that transformers need not be imported."""
    return type(module).__qualname__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
