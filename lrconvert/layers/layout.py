"""How each kind of weight is stored, seen as matrices, and how two factor matrices are stored in its place.

Shapes: a matrix view is (groups, rows, columns). Its factors are a left one (groups, rows, rank) and a right one
(groups, rank, columns) whose product approximates it. A stored pair is `u`, the weight of the layer applied first, and
`v`, the weight of the layer applied second; which matrix becomes which depends on whether rows are outputs or inputs.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

Shape = tuple[int, ...]
View = Literal["channel", "spatial"]


@dataclass(frozen=True)
class Layout:
    """A weight stored out first: (out, in/groups, *kernel); the matrix view of a group is (out/groups, in·kernel).

    Attributes:
        dims: dimensions of the stored weight; None for any number.
        grouped: whether the weight may consist of several matrices.
        pivoted: whether `u` is stored without its pivots, see `lrconvert.layers.pivots`.
        pointwise_last: whether `v` is applied to every position alike, so that a constant before it is one after it.
    """

    dims: int | None = None
    grouped: bool = True
    pivoted: bool = False
    pointwise_last: ClassVar[bool] = True

    def matrix_shape(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(rows, columns) of the view of one group."""
        return shape[0] // groups, math.prod(shape[1:])

    def stacked(self, shape: Shape) -> int:
        """Size of the dimension that divides into the groups: the outputs."""
        return shape[0]

    def matrices(self, weight: Tensor, groups: int) -> Tensor:
        """(groups, rows, columns) of a stored weight."""
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def weight(self, matrices: Tensor, shape: Shape) -> Tensor:
        """The stored weight of `shape` that has these matrices."""
        return matrices.reshape(shape)

    def factor_shapes(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """Shapes of the stored `u` and `v` at `rank` per group."""
        columns = shape[1] - rank if self.pivoted else shape[1]
        return (groups * rank, columns, *shape[2:]), (shape[0], rank, *[1] * (len(shape) - 2))

    def pair(self, left: Tensor, right: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The stored `u` and `v` of the factors of a weight of `shape`."""
        u, v = self.factor_shapes(shape, left.shape[0], left.shape[2])
        return right.reshape(u), left.reshape(v)

    def factors(self, u: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The left and right factors that a stored pair holds; the inverse of `pair`."""
        return v.reshape(groups, v.shape[0] // groups, -1), u.reshape(groups, u.shape[0] // groups, -1)


class InFirst(Layout):
    """A linear weight stored (in, out), as transformers' Conv1D does; its factors are stored out first."""

    def matrix_shape(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(out/groups, in)."""
        return shape[1] // groups, shape[0]

    def stacked(self, shape: Shape) -> int:
        """The outputs."""
        return shape[1]

    def matrices(self, weight: Tensor, groups: int) -> Tensor:
        """(groups, out/groups, in) view."""
        return super().matrices(weight.mT, groups)

    def weight(self, matrices: Tensor, shape: Shape) -> Tensor:
        """The (in, out) weight."""
        return matrices.reshape(shape[1], shape[0]).mT

    def factor_shapes(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """(groups·rank, in) and (out, rank)."""
        return super().factor_shapes((shape[1], shape[0]), groups, rank)


class TransposedConv(Layout):
    """A transposed convolution's weight (in, out/groups, *kernel); the view of a group is (in/groups, out·kernel).

    `u` is a convolution of kernel 1 at the input's resolution, `v` the transposed convolution with the kernel.
    """

    pointwise_last = False

    def factor_shapes(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """(groups·rank, in/groups, 1, …) and (groups·rank, out/groups, *kernel)."""
        ones = [1] * (len(shape) - 2)
        return (groups * rank, shape[0] // groups, *ones), (groups * rank, *shape[1:])

    def pair(self, left: Tensor, right: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The left factor, transposed, is applied first."""
        u, v = self.factor_shapes(shape, left.shape[0], left.shape[2])
        return left.mT.reshape(u), right.reshape(v)

    def factors(self, u: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The inverse of `pair`."""
        left = u.reshape(groups, u.shape[0] // groups, -1).mT
        return left, v.reshape(groups, v.shape[0] // groups, -1)


class SpatialConv(Layout):
    """A 2-dimensional convolution's weight (out, in, kh, kw) seen as (out·kh, in·kw); one group.

    `u` is a convolution of kernel (1, kw), across, `v` one of kernel (kh, 1), down. Khodak et al. 2021,
    https://arxiv.org/abs/2105.01029; Jaderberg et al. 2014, https://arxiv.org/abs/1405.3866.
    """

    pointwise_last = False

    def matrix_shape(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(out·kh, in·kw)."""
        return shape[0] * shape[2], shape[1] * shape[3]

    def matrices(self, weight: Tensor, groups: int) -> Tensor:
        """(1, out·kh, in·kw) of a stored weight."""
        return weight.transpose(1, 2).reshape(1, *self.matrix_shape(tuple(weight.shape), groups))

    def weight(self, matrices: Tensor, shape: Shape) -> Tensor:
        """The (out, in, kh, kw) weight."""
        return matrices.reshape(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)

    def factor_shapes(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """(rank, in, 1, kw) and (out, rank, kh, 1)."""
        return (rank, shape[1], 1, shape[3]), (shape[0], rank, shape[2], 1)

    def pair(self, left: Tensor, right: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The left factor, (out·kh, rank), is applied second."""
        u, v = self.factor_shapes(shape, 1, left.shape[2])
        return right.reshape(u), left.reshape(shape[0], shape[2], -1).mT.reshape(v)

    def factors(self, u: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The inverse of `pair`."""
        left = v.squeeze(3).mT.reshape(1, -1, v.shape[1])
        return left, u.reshape(1, u.shape[0], -1)


class Table(Layout):
    """An embedding (entries, features): `u` is a narrow table (entries, rank), `v` a linear layer (features, rank)."""

    def factor_shapes(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """(entries, rank) and (features, rank)."""
        return (shape[0], rank), (shape[1], rank)

    def pair(self, left: Tensor, right: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The left factor is the table."""
        return left[0], right[0].mT

    def factors(self, u: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The inverse of `pair`."""
        return u[None], v.mT[None]


class Experts(Layout):
    """Weights of a mixture of experts, (experts, out, in): a matrix each, and so are their factors."""

    def matrix_shape(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(out, in)."""
        return shape[1], shape[2]

    def matrices(self, weight: Tensor, groups: int) -> Tensor:
        """The weight itself."""
        return weight

    def weight(self, matrices: Tensor, shape: Shape) -> Tensor:
        """The matrices themselves."""
        return matrices

    def factor_shapes(self, shape: Shape, groups: int, rank: int) -> tuple[Shape, Shape]:
        """(experts, rank, in) and (experts, out, rank)."""
        rows, columns = self.matrix_shape(shape, groups)
        return (shape[0], rank, columns), (shape[0], rows, rank)

    def pair(self, left: Tensor, right: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The right factor is applied first."""
        return right, left

    def factors(self, u: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The inverse of `pair`."""
        return v, u


class ExpertsInFirst(Experts):
    """The same stored (experts, in, out); the factors are stored out first."""

    def matrix_shape(self, shape: Shape, groups: int) -> tuple[int, int]:
        """(out, in)."""
        return shape[2], shape[1]

    def matrices(self, weight: Tensor, groups: int) -> Tensor:
        """(experts, out, in) view."""
        return weight.mT

    def weight(self, matrices: Tensor, shape: Shape) -> Tensor:
        """The (experts, in, out) weight."""
        return matrices.mT


# By kind of layer; every other kind of weight is seen out first, for its shape only.
LAYOUTS: dict[str, Layout] = {
    "linear": Layout(2),
    "conv1d": Layout(3),
    "conv2d": Layout(4),
    "conv3d": Layout(5),
    "lstm": Layout(2),
    "gru": Layout(2),
    "rnn": Layout(2),
    "attention": Layout(2),
    "transposed_linear": InFirst(2),
    "conv_transpose1d": TransposedConv(3),
    "conv_transpose2d": TransposedConv(4),
    "conv_transpose3d": TransposedConv(5),
    "experts": Experts(3),
    "transposed_experts": ExpertsInFirst(3),
    "embedding": Table(2, grouped=False),
}
OTHER = Layout()
SPATIAL: dict[str, Layout] = {"conv2d": SpatialConv(4, grouped=False)}


def layout_for(kind: str, view: View = "channel", pivoted: bool = False) -> Layout:
    """How a weight of `kind` is stored and seen; a kind without a spatial view has the one in `LAYOUTS`."""
    channel = LAYOUTS.get(kind, OTHER)
    layout = SPATIAL.get(kind, channel) if view == "spatial" else channel
    return replace(layout, pivoted=True) if pivoted else layout
