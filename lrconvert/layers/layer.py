"""The record of one weight that could be factorized: plain data, no tensors."""

import bisect
import math
import re
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from lrconvert.layers.layout import Layout, View, layout_for

# One rank, or an array of them.
Ranks = TypeVar("Ranks", int, npt.NDArray[np.float64])
Evidence = Literal["module", "shape"]

# Mixtures of experts: the weights of all experts in one tensor.
EXPERT_KINDS = frozenset({"experts", "transposed_experts"})
# Kinds whose module owns several weights and is replaced as a whole.
COMPOSITE_KINDS = frozenset({"lstm", "gru", "rnn", "attention"}) | EXPERT_KINDS


@dataclass(frozen=True)
class Layer:
    """One weight of a network and what is known about the layer that owns it.

    Attributes:
        name: path of the layer in the model ("layer4.0.conv1"), or, for one of several weights of a module, the key of
            the weight ("lstm.weight_ih_l0"); empty for a model that is itself one layer.
        weight: key of the weight in the state dict ("layer4.0.conv1.weight").
        kind: a factorizable kind ("linear", "conv2d") or, for any other weight, a word for what it is ("norm").
        shape: shape of the weight as it is stored.
        groups: matrices in the weight, each factorized on its own at one common rank: the groups of a convolution, the
            gates of a recurrent layer, the queries, keys and values of a packed projection, or experts.
        dense_reason: why the layer stays dense at any rank; empty when it can be factorized.
        evidence: "module" when a model settled the kind, "shape" when it was read from names and shapes alone.
        tied_head: whether the weight is that of an embedding and of the linear layer after it, the classifier.
        guess: True when `dense_reason` is a default or a guess that naming the layer overrules.
        norm: whether a BatchNorm stands between the factors when it is factorized.
        view: which matrix the weight is seen as: "channel", (out, in·kh·kw), or for a convolution of two dimensions
            "spatial", (out·kh, in·kw).
        pivoted: whether the first factor is stored without its pivots, see `lrconvert.layers.pivots`.
    """

    name: str
    weight: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    dense_reason: str = ""
    evidence: Evidence = "module"
    guess: bool = False
    tied_head: bool = False
    norm: bool = False
    view: View = "channel"
    pivoted: bool = False

    @property
    def layout(self) -> Layout:
        """How the weight is stored."""
        return layout_for(self.kind, self.view, self.pivoted)

    @property
    def owner(self) -> str:
        """Path of the module that owns the weight: what a plan replaces."""
        return self.name.rpartition(".")[0] if self.kind in COMPOSITE_KINDS else self.name

    @property
    def unit(self) -> str:
        """What counts as one layer in a network's depth: all weights of one recurrent layer, attention or mixture."""
        if self.kind not in ("lstm", "gru", "rnn"):
            return self.owner
        number = re.search(r"_l\d+", self.name.rpartition(".")[2])
        return f"{self.owner}{number[0]}" if number else self.name

    @property
    def parameter(self) -> str:
        """Path of the weight from its owner: "weight", "weight_ih_l0", "out_proj.weight"."""
        return self.weight.removeprefix(f"{self.owner}.") if self.owner else self.weight

    @property
    def bias_key(self) -> str:
        """State-dict key of the bias beside the weight of a layer that has no other, whether there is one or not."""
        return f"{self.name}.bias" if self.name else "bias"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix view of one group; (out/groups, in/groups · kernel elements) for most kinds."""
        return self.layout.matrix_shape(self.shape, self.groups)

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
        """Largest rank whose factors hold fewer elements than the dense weight; 0 when there is none."""
        # The order of columns takes the room of two 16-bit numbers each.
        order = 2 * self.groups * self.matrix_shape[1] if self.pivoted else 0
        return bisect.bisect_left(range(1, self.full_rank + 1), self.num_params - order, key=self.num_low_rank_params)

    def num_low_rank_params(self, rank: Ranks) -> Ranks:
        """Elements of the factors at `rank` per group, or at each of several, and of the norm; without bias."""
        pivots = rank if self.pivoted else 0
        return self.groups * rank * (sum(self.matrix_shape) - pivots + (2 if self.norm else 0))

    def macs(self, positions: int) -> int:
        """Multiply-accumulates of the dense layer, at `positions` tokens, pixels or steps; a table is looked up.

        Of experts, positions are pairs of a token and an expert that it goes to.
        """
        if self.kind == "embedding":
            return 0
        return positions * self.num_params // (self.groups if self.kind in EXPERT_KINDS else 1)

    def low_rank_macs(self, positions: int, rank: Ranks, halfway: int | None = None) -> Ranks | None:
        """Multiply-accumulates of the two factors.

        Args:
            positions: tokens, pixels or time steps that the weight is applied to; see `macs` for experts.
            rank: per group, or several.
            halfway: of a convolution of two dimensions, input rows × output columns: where `u` of the spatial view
                runs. None, if not known, makes the answer None in that view.
        """
        if self.kind == "embedding":
            return positions * rank * self.shape[1]
        rows, columns = self.matrix_shape
        if self.view == "channel":
            groups = 1 if self.kind in EXPERT_KINDS else self.groups
            return positions * groups * rank * (rows + columns - (rank if self.pivoted else 0))
        return None if halfway is None else rank * (halfway * columns + positions * rows)

    def factor_path(self, factor: Literal["u", "bn", "v"]) -> str:
        """Path of the module that holds a factor, or the norm: "layer4.0.conv1.u", "lstm.ih_l0.v", "fc1.bn"."""
        path, _, last = self.name.rpartition(".")
        if self.name == self.weight:
            last = factor_name(last)
        return ".".join(part for part in (path, last, factor) if part)


def factor_name(parameter: str) -> str:
    """Name of the module that holds the factors of one of several weights: "in_proj" for "in_proj_weight"."""
    return parameter.removeprefix("weight_").removesuffix("_weight")
