"""The record of one weight that could be factorized: plain data, no tensors."""

import math
from dataclasses import dataclass
from typing import Literal

Evidence = Literal["module", "shape"]


@dataclass(frozen=True)
class Layer:
    """One weight of a network and what is known about the layer that owns it.

    Attributes:
        name: path of the layer in the model ("layer4.0.conv1"); empty for a model that is itself one layer.
        weight: key of the weight in the state dict ("layer4.0.conv1.weight").
        kind: a factorizable kind ("linear", "conv2d") or, for any other weight, a word for what it is ("embedding").
        shape: shape of the weight, out first: (out, in/groups, *kernel).
        groups: convolution groups; each group is factorized on its own.
        dense_reason: why the layer stays dense at any rank; empty when it can be factorized.
        evidence: "module" when a model settled the kind, "shape" when it was read from names and shapes alone.
        guess: True when `dense_reason` comes from a guess that naming the layer overrules.
    """

    name: str
    weight: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    dense_reason: str = ""
    evidence: Evidence = "module"
    guess: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix view of one group: (out/groups, in/groups · kernel elements)."""
        return self.shape[0] // self.groups, math.prod(self.shape[1:])

    @property
    def full_rank(self) -> int:
        """min(rows, columns) of the matrix view."""
        return min(self.matrix_shape)

    @property
    def num_params(self) -> int:
        """Elements of the dense weight, without bias."""
        return math.prod(self.shape)

    @property
    def break_even_rank(self) -> int:
        """Largest rank whose two factors hold fewer elements than the dense weight; 0 when there is none."""
        rows, columns = self.matrix_shape
        return max((rows * columns - 1) // (rows + columns), 0) if rows and columns else 0

    def num_low_rank_params(self, rank: int) -> int:
        """Elements of the two factors at `rank` per group, without bias."""
        return self.groups * rank * sum(self.matrix_shape)
