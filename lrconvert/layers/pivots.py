"""Pivoted factors: of a product V·U of rank r, r² numbers need not be stored.

Some r columns of U, the pivots, can always be made an identity, since V·U = (V·B)·(B⁻¹·U) for those columns B. What
they do to an input is to let it through: with x in that order, U·x = x[:r] + P·x[r:]. Stored are V, P and the order,
r·(m + n − r) numbers for a weight (m, n) instead of r·(m + n), and as many multiply-accumulates: always fewer than
m·n below full rank. Nothing is lost: the product is the same one. This is the interpolative decomposition of numerical
linear algebra, of a weight that is of rank r already; Zhao, Zhang & Cannistraci (ICML 2025,
https://arxiv.org/abs/2501.19090, "PIFA") proposed it for networks, with pivots among the outputs. Pivots among the
inputs leave V and its bias what they were.
"""

import torch
from torch import Tensor

from lrconvert.errors import CheckpointError

# Pivots are exchanged while an entry of P is larger than this, which bounds what rounding P costs.
_LARGEST = 1.5


def pivot(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pivoted factors of the same product.

    Args:
        left, right: (groups, rows, rank) and (groups, rank, columns), any floating dtype; rank at most columns.

    Returns:
        The left factor (groups, rows, rank) and the right one without its pivots (groups, rank, columns − rank), in
        float64, and `order` (groups, columns), int32: which columns are the pivots, then those that were kept.
    """
    lefts, rests, orders = zip(*map(_pivot, left.double(), right.double()), strict=True)
    return torch.stack(lefts), torch.stack(rests), torch.stack(orders)


def _pivot(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rank = len(right)
    # An orthonormal basis has pivots even where the weight has less than this rank.
    basis, triangle = torch.linalg.qr(right.mT)
    order, rest = _chosen(basis)
    return left @ triangle.mT @ basis[order[:rank]].mT, rest.mT, order.int()


def _chosen(basis: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (n,) of `basis` (n, rank), first those that all others are made of, and their coefficients, none large.

    Gaussian elimination finds them, and exchanges then make the determinant larger (Goreinov et al. 2010, "How to find
    a good submatrix"): by more than `_LARGEST` each, so that they come to an end.
    """
    rank = basis.shape[1]
    factored, swaps = torch.linalg.lu_factor(basis)
    order = list(range(len(basis)))
    for at, other in enumerate(swaps.tolist()):
        order[at], order[other - 1] = order[other - 1], order[at]
    rows = torch.tensor(order, device=basis.device)
    rest = torch.linalg.solve_triangular(factored[:rank], factored[rank:], upper=False, left=False, unitriangular=True)
    while True:
        at, column = divmod(int(rest.abs().argmax()), rank) if rest.numel() else (0, 0)
        if not rest.numel() or not rest[at, column].abs() > _LARGEST:
            return rows, rest
        largest = rest[at, column].clone()
        rows[[column, rank + at]] = rows[[rank + at, column]]
        change = rest[at].clone()
        change[column] -= 1
        step = rest[:, column] / largest
        step[at] = 1 + 1 / largest  # the row of what was the pivot
        rest -= torch.outer(step, change)


def with_pivots(rest: Tensor, order: Tensor) -> Tensor:
    """The right factor (groups, rank, columns) that `rest` (groups, rank, columns − rank) is without its pivots."""
    groups, rank, _ = rest.shape
    identity = torch.eye(rank, dtype=rest.dtype, device=rest.device).expand(groups, -1, -1)
    places = order.long().argsort(dim=1)[:, None, :].expand(-1, rank, -1)
    return torch.cat([identity, rest], dim=2).gather(2, places)


def check_order(key: str, order: Tensor) -> None:
    """Raise CheckpointError unless every row of `order`, read from `key`, names every column once."""
    columns = torch.arange(order.shape[1], device=order.device)
    if order.is_floating_point() or not torch.equal(order.long().sort(dim=1).values, columns.expand_as(order)):
        raise CheckpointError(f"{key} is not an order of {len(columns)} columns: the file is damaged, factorize again")
