"""Stable ranks alone, for training that follows them epoch by epoch: ‖W‖² / σ_max² needs no other singular value.

σ_max² is the largest eigenvalue of W·Wᵀ, found by Lanczos iterations: for a few dozen products with a vector, where
all eigenvalues take as many as the matrix has rows. Without reorthogonalisation: what that loses is the other
eigenvalues, which come out several times, while the largest stays as accurate as the arithmetic (Paige 1980,
https://doi.org/10.1016/0024-3795(80)90167-6).

On the CPU each product reads W itself, twice: a trained layer needs so few that its Gram matrix would take longer to
form. numpy computes it: what torch adds to every call is as much as a small product takes. On a GPU, where starting a
kernel is what takes time, the Gram matrices of many layers iterate together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrconvert.allocation import FloatArray
from lrconvert.parallel import map_layers
from lrconvert.spectrum import ALWAYS_DOUBLE, SAFE_ENERGY, eigenvalues, gram_of, widened

# An eigenvalue is accepted once it is known to be off by no more than this, relative to it.
_TOLERANCE = 3e-7
# Rounding of a float32 product with a vector, relative to the eigenvalue: 6e-7 was the most seen.
_ROUNDING = 1e-6
# Iterations between two looks at the residual (on a GPU each waits for the device), and before all eigenvalues are
# computed. 512×4608 normal weights take 64; with σ_i ∝ i^-0.3, as after training, 16. More looks are no gain: the
# residual of a cluster's mean is small for a few iterations, until the values in it are told apart.
_LOOK_EVERY, _MOST = 8, 128
# Up to this full rank all eigenvalues cost next to nothing.
_SMALL = 32
# Elements of the Gram matrices that iterate together on a GPU.
_TOGETHER = 1 << 24


def stable_rank_of(matrices: Tensor) -> Tensor:
    """Σσ² / σ_max² of each group (groups,) of `matrices` (groups, rows, columns), within 1e-6 of itself, float64.

    0 for a zero group, NaN for one with values that are not finite. Computed on the device of `matrices`; the result
    is on the CPU. Neither `matrices` nor the state of any random generator is changed.
    """
    wide = widened(matrices.detach())
    if wide.is_cpu and wide.shape[1] > _SMALL:
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
        top = _largest_eigenvalue(wide.numpy())
        if top is not None:
            return energy[None] / top
    gram = gram_of(wide[None], torch.float64)
    return _ranks(gram, lambda scaled: eigenvalues(scaled)[:, 0])


def _largest_eigenvalue(matrix: np.ndarray[Any, Any]) -> float | None:
    """σ_max² of `matrix` (small, large), with products in its own precision; None if it does not converge."""
    vector = _start(len(matrix)).numpy()
    before, beta = np.zeros_like(vector), 0.0
    diagonal: list[float] = []
    off: list[float] = []
    while len(off) < _MOST:
        image = (matrix @ (vector.astype(matrix.dtype) @ matrix)).astype(np.float64)
        alpha = float(image @ vector)
        image -= alpha * vector + beta * before
        beta = float(np.linalg.norm(image))
        # Where the vectors so far span an invariant space only rounding is left: zeros add nothing from here on.
        beta = beta if beta > _ROUNDING * alpha else 0.0
        before, vector = vector, image / beta if beta else np.zeros_like(image)
        diagonal.append(alpha)
        off.append(beta)
        if len(off) % _LOOK_EVERY == 0:
            top, bound = _largest_ritz_value(np.array([diagonal]), np.array([off]))
            if bound[0] <= _TOLERANCE * top[0]:
                return float(top[0])
    return None


def _start(size: int) -> Tensor:
    """The same vector (size,) every time, of length 1."""
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return start / torch.linalg.vector_norm(start)


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
    vector = _start(size).to(gram.device).expand(count, size)
    before = torch.zeros_like(vector)
    beta = torch.zeros(count, 1, dtype=torch.float64, device=gram.device)
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    converged = torch.zeros(count, dtype=torch.bool)
    while not bool(converged.all()) and len(off) < _MOST:
        # From the left, as they are symmetric: torch has the faster product for that.
        image = torch.bmm(vector[:, None, :], gram)[:, 0]
        alpha = (image * vector).sum(dim=1, keepdim=True)
        image = image - alpha * vector - beta * before
        beta = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        beta = torch.where(beta > _ROUNDING * alpha, beta, 0.0)
        before, vector = vector, torch.where(beta > 0, image / torch.where(beta > 0, beta, 1.0), 0.0)
        diagonal.append(alpha)
        off.append(beta)
        if len(off) % _LOOK_EVERY == 0:
            values, bounds = _largest_ritz_value(torch.cat(diagonal, 1).cpu().numpy(), torch.cat(off, 1).cpu().numpy())
            top, converged = torch.from_numpy(values), torch.from_numpy(bounds <= _TOLERANCE * values)
    if not bool(converged.all()):
        top[~converged] = eigenvalues(gram[(~converged).to(gram.device)].cpu())[:, 0]
    return top


def _largest_ritz_value(diagonal: FloatArray, off: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(value, how far off it is at most), each (count,), of tridiagonal matrices of `diagonal` (count, k) and `off`.

    A value is off by at most the residual ρ of its vector, and by at most ρ² / gap to the next one (Kato–Temple;
    Parlett, The Symmetric Eigenvalue Problem, section 4.5): far less where it is well separated.
    """
    count, size = diagonal.shape
    matrix = np.zeros((count, size, size))
    places = np.arange(size)
    matrix[:, places, places] = diagonal
    matrix[:, places[1:], places[:-1]] = off[:, :-1]  # eigh reads the lower half
    values, vectors = np.linalg.eigh(matrix)
    residual = off[:, -1] * np.abs(vectors[:, -1, -1])
    gap = values[:, -1] - values[:, -2] - residual
    return values[:, -1], np.divide(residual**2, gap, out=residual.copy(), where=gap > residual)
