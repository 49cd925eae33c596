"""Stable ranks alone, for training that follows them epoch by epoch: ‖W‖² / σ_max² needs no other singular value.

Both come from the small Gram matrix, whose trace is ‖W‖² and whose largest eigenvalue is σ_max². That eigenvalue is
found by Lanczos iterations: for a few dozen matrix-vector products, where all eigenvalues take about n of them.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lrconvert.parallel import map_layers
from lrconvert.spectrum import ALWAYS_DOUBLE, SAFE_ENERGY, eigenvalues, gram_of, widened

# An eigenvalue is accepted once the residual of its vector is at most this, relative to it. For a well separated one
# the error is then near the square of this; where the next one is closer than this, they are the same for our purpose.
_RESIDUAL = 5e-7
# Iterations between two looks at the residual (each waits for the device), and before all eigenvalues are computed.
# 512×4608 and 512×512 normal weights, the slowest seen in practice, take 64; trained ones 16.
_LOOK_EVERY, _MOST = 16, 128
# Elements of the Gram matrices that iterate together on a GPU.
_TOGETHER = 1 << 24


def stable_rank_of(matrices: Tensor) -> Tensor:
    """Σσ² / σ_max² of each group (groups,) of `matrices` (groups, rows, columns), within 1e-6 of itself, float64.

    0 for a zero group, NaN for one with values that are not finite. Computed on the device of `matrices`; the result
    is on the CPU. Neither `matrices` nor the state of any random generator is changed.
    """
    return _from_grams(_gram(matrices))


def stable_ranks(views: Sequence[Tensor]) -> list[Tensor]:
    """`stable_rank_of` each of `views`, several at a time."""
    found: dict[int, Tensor] = {}
    on_cpu = [index for index, view in enumerate(views) if view.is_cpu]
    one_each = map_layers(
        lambda index: stable_rank_of(views[index]),
        on_cpu,
        size=lambda index: views[index].numel(),
        device=torch.device("cpu"),
    )
    found.update(one_each)
    for indices in _batches(views, set(range(len(views))) - set(on_cpu)):
        grams = [_gram(views[index]) for index in indices]
        ranks = _from_grams(torch.cat(grams)).split([len(gram) for gram in grams])
        found.update(zip(indices, ranks, strict=True))
    return [found[index] for index in range(len(views))]


def _batches(views: Sequence[Tensor], indices: Iterable[int]) -> Iterator[list[int]]:
    """`indices` in groups whose Gram matrices are of one size, for one GPU kernel to do the work of many."""
    waiting: dict[tuple[int, torch.device], list[int]] = {}
    for index in sorted(indices):
        size = min(views[index].shape[1:])
        batch = waiting.setdefault((size, views[index].device), [])
        batch.append(index)
        if sum(len(views[each]) for each in batch) * size**2 >= _TOGETHER:
            yield waiting.pop((size, views[index].device))
    yield from waiting.values()


def _gram(matrices: Tensor) -> Tensor:
    """The small Gram matrices (groups, small, small) in float64."""
    wide = widened(matrices.detach())
    # A float32 product is off by 2e-7 at most, but a GPU may be set to round its factors to ten bits (TF32).
    if wide.is_cpu and wide.dtype == torch.float32:
        gram = gram_of(wide, torch.float32).double()
        energy = _trace(gram)
        if bool(((energy > SAFE_ENERGY[0]) & (energy < SAFE_ENERGY[1])).all()):
            return gram
    return gram_of(wide, torch.float64)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).sum(dim=1)


def _from_grams(gram: Tensor) -> Tensor:
    """Stable ranks (count,) on the CPU from Gram matrices (count, n, n)."""
    energy = _trace(gram)
    usable = torch.isfinite(energy) & (energy > 0)
    # A multiple of a matrix has the same stable rank: none of these can over- or underflow.
    gram = torch.where(usable[:, None, None], gram / torch.where(usable, energy, 1.0)[:, None, None], 0.0)
    top = eigenvalues(gram.cpu())[:, 0] if gram.shape[1] <= ALWAYS_DOUBLE else _largest_eigenvalues(gram)
    energy, usable = energy.cpu(), usable.cpu()
    return torch.where(usable, 1 / torch.where(usable, top, 1.0), torch.where(energy == 0, 0.0, torch.nan))


def _largest_eigenvalues(gram: Tensor) -> Tensor:
    """The largest eigenvalue of each matrix (count,) on the CPU.

    Lanczos iterations without reorthogonalisation: what they lose is the other eigenvalues, which come out several
    times, while the largest stays as accurate as the arithmetic (Paige 1980, https://doi.org/10.1016/0024-3795(80)90167-6).
    """
    count, size, _ = gram.shape
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(gram.device).expand(count, size)
    vector, before = start / torch.linalg.vector_norm(start, dim=1, keepdim=True), torch.zeros_like(start)
    beta = torch.zeros(count, 1, dtype=torch.float64, device=gram.device)
    diagonal, off = [], []
    for iteration in range(1, _MOST + 1):
        # From the left, as the matrices are symmetric: torch's product on the CPU is eight times as fast that way.
        image = torch.bmm(vector[:, None, :], gram)[:, 0] - beta * before
        alpha = (image * vector).sum(dim=1, keepdim=True)
        image = image - alpha * vector
        beta = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        # Zero where the vectors so far span an invariant space: then what follows is zero, and adds nothing.
        before, vector = vector, image / torch.where(beta > 0, beta, 1.0)
        diagonal.append(alpha)
        off.append(beta)
        if iteration % _LOOK_EVERY == 0:
            top, residual = _largest_ritz_value(torch.cat(diagonal, 1).cpu(), torch.cat(off, 1).cpu())
            bad = residual > _RESIDUAL * top
            if not bool(bad.any()):
                return top
    top[bad] = eigenvalues(gram[bad.to(gram.device)].cpu())[:, 0]
    return top


def _largest_ritz_value(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """(value, residual of its vector), each (count,), of tridiagonal matrices of `diagonal` (count, k) and `off`."""
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(off[:, :-1], 1) + torch.diag_embed(off[:, :-1], -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values[:, -1], off[:, -1] * vectors[:, -1, -1].abs()
