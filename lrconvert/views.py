"""As which matrices weights are seen: in parts, spatially, with a norm between the factors, and with pivots in one."""

import math
from collections.abc import Sequence
from dataclasses import replace

from lrconvert.errors import UsageError
from lrconvert.layers import COMPOSITE_KINDS, CONV_TYPES, EXPERT_KINDS, LAYOUTS, SPATIAL, Layer
from lrconvert.patterns import check_patterns, matches


def split(layers: Sequence[Layer], splits: Sequence[tuple[str, int]]) -> tuple[Layer, ...]:
    """`layers`, with the number of matrices in each weight that the patterns of `splits` ask for.

    Raises:
        PatternError: a pattern matches no layer.
        UsageError: the outputs of a layer that a pattern names do not divide so.
    """
    check_patterns([pattern for pattern, _ in splits], [layer.name for layer in layers], "--split")
    return tuple(_split(layer, splits) for layer in layers)


def _split(layer: Layer, splits: Sequence[tuple[str, int]]) -> Layer:
    parts = next((parts for pattern, parts in splits if matches(pattern, layer.name)), None)
    if parts is None or parts == layer.groups:
        return layer
    if not can_split(layer, parts):
        raise UsageError(f"--split: {layer.name} ({layer.kind} {layer.shape}) cannot be split in {parts}")
    return replace(layer, groups=parts)


def can_split(layer: Layer, parts: int) -> bool:
    """Whether the outputs of `layer` may be factorized as `parts` matrices, instead of as its own groups."""
    if layer.kind in COMPOSITE_KINDS:
        return parts == 1 and layer.kind not in EXPERT_KINDS
    return layer.kind in ("linear", "transposed_linear") and layer.layout.stacked(layer.shape) % parts == 0


def with_norms(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """`layers`, with a BatchNorm between the factors of every one that can have it."""
    return tuple(replace(layer, norm=can_norm(layer)) for layer in layers)


def can_norm(layer: Layer) -> bool:
    """Whether a BatchNorm may stand between the factors of `layer`: a linear layer or a convolution."""
    return layer.kind in LAYOUTS and layer.kind not in COMPOSITE_KINDS and layer.kind != "embedding"


def with_pivoted_factors(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """`layers`, with the first factor of every one that can be so stored without its pivots."""
    return tuple(replace(layer, pivoted=can_pivot(layer)) for layer in layers)


def can_pivot(layer: Layer) -> bool:
    """Whether the columns of the matrix view of `layer` are its inputs, of which a first factor may let some through.

    A linear layer, an attention, or a convolution of kernel 1 in one group. Recurrent layers go over their factors in
    ways of their own.
    """
    if layer.view != "channel":
        return False
    pointwise = layer.kind in CONV_TYPES and layer.groups == 1 and math.prod(layer.shape[2:]) == 1
    return pointwise or layer.kind in ("linear", "transposed_linear", "attention")


def in_spatial_view(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """`layers`, seen spatially where that makes another matrix."""
    return tuple(replace(layer, view="spatial") if can_be_spatial(layer) else layer for layer in layers)


def can_be_spatial(layer: Layer) -> bool:
    """Whether `layer` has a spatial view of its own: two dimensions, one group, a kernel larger than 1×1."""
    return layer.kind in SPATIAL and layer.groups == 1 and layer.shape[2:] != (1, 1)
