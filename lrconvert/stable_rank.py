"""Stable ranks alone, for training that follows them epoch by epoch: ‖W‖² / σ_max² needs no other singular value.

σ_max² is the largest eigenvalue of W·Wᵀ, found by Lanczos iterations: for a few dozen products with a vector, where
all eigenvalues take as many as the matrix has rows. On the CPU each product reads W itself, twice: a trained layer
needs so few that its Gram matrix would take longer to form. On a GPU, where starting a kernel is what takes time, the
Gram matrices of many layers iterate together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lrconvert.parallel import map_layers
from lrconvert.spectrum import ALWAYS_DOUBLE, SAFE_ENERGY, eigenvalues, gram_of, widened

# An eigenvalue is accepted once it is known to be off by no more than this, relative to it.
_TOLERANCE = 3e-7
# Rounding of a float32 product with a vector, relative to the eigenvalue: 6e-7 was the most seen.
_ROUNDING = 1e-6
# Iterations between two looks at the residual (each waits for the device), and before all eigenvalues are computed.
# 512×4608 normal weights take 64; with σ_i ∝ i^-0.3, as after training, 16.
_LOOK_EVERY, _MOST = 8, 128
# Elements of the Gram matrices that iterate together on a GPU.
_TOGETHER = 1 << 24


def stable_rank_of(matrices: Tensor) -> Tensor:
    """Σσ² / σ_max² of each group (groups,) of `matrices` (groups, rows, columns), within 1e-6 of itself, float64.

    0 for a zero group, NaN for one with values that are not finite. Computed on the device of `matrices`; the result
    is on the CPU. Neither `matrices` nor the state of any random generator is changed.
    """
    wide = widened(matrices.detach())
    if wide.is_cpu and wide.shape[1] > ALWAYS_DOUBLE:
        return torch.cat([_directly(group) for group in wide])
    return _from_grams(gram_of(wide, torch.float64))


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
        # In float64: a GPU may be set to round the factors of a float32 product to ten bits (TF32).
        grams = [gram_of(widened(views[index].detach()), torch.float64) for index in indices]
        ranks = _from_grams(torch.cat(grams)).split([len(gram) for gram in grams])
        found.update(zip(indices, ranks, strict=True))
    return [found[index] for index in range(len(views))]


def _batches(views: Sequence[Tensor], indices: Iterable[int]) -> Iterator[list[int]]:
    """`indices` in groups whose Gram matrices are of one size, for one kernel to do the work of many."""
    waiting: dict[tuple[int, torch.device], list[int]] = {}
    for index in sorted(indices):
        size = min(views[index].shape[1:])
        batch = waiting.setdefault((size, views[index].device), [])
        batch.append(index)
        if sum(len(views[each]) for each in batch) * size**2 >= _TOGETHER:
            yield waiting.pop((size, views[index].device))
    yield from waiting.values()


def _directly(wide: Tensor) -> Tensor:
    """Stable rank (1,) of one matrix (small, large)."""
    energy = (wide * wide).sum(dim=1).double().sum()
    if SAFE_ENERGY[0] < energy < SAFE_ENERGY[1]:
        top, converged = _largest_eigenvalues(lambda vector: _through(wide, vector), 1, wide.shape[0], wide.device)
        if bool(converged):
            return energy / top
    gram = gram_of(wide[None], torch.float64)
    return _ranks(gram, lambda scaled: eigenvalues(scaled)[:, 0])


def _through(wide: Tensor, vectors: Tensor) -> Tensor:
    """W·Wᵀ times the one vector in `vectors` (1, small), in the precision of W."""
    return torch.mv(wide, torch.mv(wide.mT, vectors[0].to(wide.dtype)))[None].double()


def _from_grams(gram: Tensor) -> Tensor:
    """Stable ranks (count,) on the CPU from Gram matrices (count, small, small) in float64."""
    small = gram.shape[1] <= ALWAYS_DOUBLE
    return _ranks(gram, lambda scaled: eigenvalues(scaled.cpu())[:, 0] if small else _iterated_together(scaled))


def _ranks(gram: Tensor, largest: Callable[[Tensor], Tensor]) -> Tensor:
    energy = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    usable = torch.isfinite(energy) & (energy > 0)
    # A multiple of a matrix has the same stable rank: none of these can over- or underflow.
    scaled = torch.where(usable[:, None, None], gram / torch.where(usable, energy, 1.0)[:, None, None], 0.0)
    top, energy, usable = largest(scaled), energy.cpu(), usable.cpu()
    return torch.where(usable, 1 / torch.where(usable, top, 1.0), torch.where(energy == 0, 0.0, torch.nan))


def _iterated_together(gram: Tensor) -> Tensor:
    """The largest eigenvalue of each Gram matrix (count,) on the CPU."""
    count, size, _ = gram.shape
    # From the left, as they are symmetric: torch has the faster product for that.
    top, converged = _largest_eigenvalues(
        lambda vectors: torch.bmm(vectors[:, None, :], gram)[:, 0], count, size, gram.device
    )
    if not bool(converged.all()):
        top[~converged] = eigenvalues(gram[(~converged).to(gram.device)].cpu())[:, 0]
    return top


def _largest_eigenvalues(
    multiply: Callable[[Tensor], Tensor], count: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(eigenvalue, whether it converged), each (count,) on the CPU, of symmetric matrices, in float64.

    Lanczos iterations without reorthogonalisation: what they lose is the other eigenvalues, which come out several
    times, while the largest stays as accurate as the arithmetic (Paige 1980, https://doi.org/10.1016/0024-3795(80)90167-6).

    Args:
        multiply: (count, size) vectors to their products with the matrices.
        count, size: matrices, and rows of each.
        device: where `multiply` computes.
    """
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / torch.linalg.vector_norm(start)).to(device).expand(count, size)
    before = torch.zeros_like(vector)
    beta = torch.zeros(count, 1, dtype=torch.float64, device=device)
    diagonal, off = [], []
    while True:
        image = multiply(vector)
        alpha = (image * vector).sum(dim=1, keepdim=True)
        image = image - alpha * vector - beta * before
        beta = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        # Where the vectors so far span an invariant space only rounding is left: zeros add nothing from here on.
        beta = torch.where(beta > _ROUNDING * alpha, beta, 0.0)
        before, vector = vector, torch.where(beta > 0, image / torch.where(beta > 0, beta, 1.0), 0.0)
        diagonal.append(alpha)
        off.append(beta)
        if len(off) % _LOOK_EVERY == 0:
            top, bound = _largest_ritz_value(torch.cat(diagonal, 1).cpu(), torch.cat(off, 1).cpu())
            converged = bound <= _TOLERANCE * top
            if bool(converged.all()) or len(off) >= _MOST:
                return top, converged


def _largest_ritz_value(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """(value, how far off it is at most), each (count,), of tridiagonal matrices of `diagonal` (count, k) and `off`.

    A value is off by at most the residual ρ of its vector, and by at most ρ² / gap to the next one (Kato–Temple;
    Parlett, The Symmetric Eigenvalue Problem, section 4.5): far less where it is well separated.
    """
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(off[:, :-1], 1) + torch.diag_embed(off[:, :-1], -1)
    values, vectors = torch.linalg.eigh(matrix)
    residual = off[:, -1] * vectors[:, -1, -1].abs()
    gap = values[:, -1] - values[:, -2] - residual
    return values[:, -1], torch.where(gap > residual, residual**2 / gap, residual)
