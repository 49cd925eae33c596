"""Singular values of a weight, what follows from them, and the factors that keep the largest.

Shapes: a matrix view is (groups, rows, columns); singular values are (groups, full_rank), descending, float64.

Both come from the small Gram matrix, W·Wᵀ or Wᵀ·W. That is several times faster than an SVD but squares the condition
number: with a float64 product σ below about 1e-8·σ_max are noise, with a float32 product those below 3e-4·σ_max, as
trained weights have them. So a float32 product is tried where its noise is not likely to show in the result, and a
float64 product takes its place where it does.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrconvert.errors import WeightError

LinAlgErrors: tuple[type[Exception], ...] = (torch.linalg.LinAlgError, np.linalg.LinAlgError)  # type: ignore[attr-defined]

# Up to this full rank float64 costs next to nothing.
ALWAYS_DOUBLE = 128
# Eigenvalues of a float32 product are off by at most about 2e-7 of the largest: 9e-8 was the most seen, from flat to
# σ_i ∝ i⁻⁴ and from 130×4000 to 200×200000. σ = √λ, so noise δ in λ moves σ by δ/(2σ): by more than 1e-4·σ_max below
# this share of it.
_LEAST_SINGLE = 2e-7 / (2 * 1e-4)
# A spectrum is likely to stay above that where a quarter of the rows has nothing below this share of its own σ_max: for
# random rows of any length it has not, and for σ_i ∝ 1/i it has. No quarter says how a square matrix ends.
_FLAT, _LEAST_ASPECT = 0.2, 1.1
# A basis from float32 eigenvectors loses up to about this share of ‖W‖² more than the best one, times the number of
# rows: 2.0e-9 was the most seen, at 2048×2048 with σ_i ∝ 1/i.
_VECTOR_NOISE = 2e-9
# How far noise may move a truncation error, relative to the best.
_ERROR_TOLERANCE = 1e-4
# ‖W‖² in this range: float32 squares neither over- nor underflow.
SAFE_ENERGY = (1e-20, 1e30)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's weight.

    Attributes:
        values: singular values (groups, full_rank), descending, float64, on the CPU.
        energy: ‖W‖² of each group (groups,), float64.
    """

    values: Tensor
    energy: Tensor

    @property
    def full_rank(self) -> int:
        """Number of singular values per group."""
        return self.values.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether every element of the weight is zero."""
        return not bool(self.energy.any())

    def stable_rank(self) -> Tensor:
        """Σσ² / σ_max² of each group (groups,), a real number from 1 to full rank; 0 for a zero group.

        Cuttlefish section 3.3; Rudelson & Vershynin 2007, https://arxiv.org/abs/math/0503442.
        """
        top = self.values[:, 0] ** 2
        return torch.where(top > 0, self.energy / torch.where(top > 0, top, 1.0), 0.0)

    def accumulative_rank(self, p: float) -> int:
        """Smallest r with σ₁ + … + σ_r ≥ p · Σσ, the largest over groups (Cuttlefish appendix C.2)."""
        return _smallest_rank(self.values, p)

    def energy_rank(self, e: float) -> int:
        """Smallest r with σ₁² + … + σ_r² ≥ e · Σσ², the largest over groups."""
        return _smallest_rank(self.values**2, e)

    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ, the largest over groups, from 1 to full rank; 0 for a zero weight.

        Roy & Vetterli 2007, https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf.
        """
        shares = self.values / self.values.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        entropies = -torch.xlogy(shares, shares).sum(dim=1)
        return 0.0 if self.is_zero else float(entropies.exp().max())

    def tail_energies(self) -> Tensor:
        """Σσ² of all groups without each one's first r values, at every r from 0 to full rank (full_rank + 1,)."""
        energies = (self.values**2).sum(dim=0)
        # Summed from the smallest, so that the small end keeps its digits.
        tails = energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    def error(self, rank: int) -> float:
        """‖W − W_r‖ / ‖W‖ of the best approximation of `rank` per group (Eckart–Young); 0 for a zero weight."""
        total = float((self.values**2).sum())
        return (float((self.values[:, rank:] ** 2).sum()) / total) ** 0.5 if total else 0.0


def _smallest_rank(terms: Tensor, share: float) -> int:
    """Smallest r whose first r terms reach `share` of the sum of all, the largest over groups."""
    running = terms.cumsum(dim=1)
    # The last running sum is the total: another summation order could differ in the last digit and leave a share
    # of 1.0 unreachable.
    short = running < share * running[:, -1:]
    return min(int(short.sum(dim=1).max()) + 1, terms.shape[1])


def spectrum_of(matrices: Tensor, name: str) -> Spectrum:
    """Singular values of `matrices` (groups, rows, columns), computed on the device they are on.

    Raises:
        WeightError: a value is NaN or infinite; `name` is the layer named in the message.
    """
    wide = widened(matrices)
    if _is_likely_flat(wide):
        found = _spectrum_from(gram_of(wide, torch.float32))
        if found is not None and bool((found.values[:, -1] >= _LEAST_SINGLE * found.values[:, 0]).all()):
            return found
    found = _spectrum_from(gram_of(wide, torch.float64))
    if found is not None:
        return found
    energy = finite_energy(matrices, name)
    return Spectrum(torch.linalg.svdvals(wide.double()).cpu(), energy.cpu())


def _is_likely_flat(wide: Tensor) -> bool:
    """Whether the singular values of `wide` (groups, small, large) are likely to be exact by a float32 product."""
    if not _may_be_single(wide) or wide.shape[2] < _LEAST_ASPECT * wide.shape[1]:
        return False
    part = _spectrum_from(gram_of(wide[:, ::4], torch.float64))
    return part is not None and bool((part.values[:, -1] >= _FLAT * part.values[:, 0]).all())


def _spectrum_from(gram: Tensor) -> Spectrum | None:
    """The spectrum that a Gram matrix holds; None where it is not finite, or too small or large for float32."""
    energy = gram.diagonal(dim1=1, dim2=2).double().sum(dim=1)
    low, high = SAFE_ENERGY if gram.dtype == torch.float32 else (-1.0, math.inf)
    if not bool(((energy > low) & (energy < high)).all()):
        return None
    try:
        # Rounding may leave some eigenvalues below zero.
        return Spectrum(eigenvalues(gram).clamp(min=0).sqrt().cpu(), energy.cpu())
    except LinAlgErrors:
        return None


def factors_of(matrices: Tensor, rank: int, name: str, expected_error: float | None = None) -> tuple[Tensor, Tensor]:
    """The two factors of the best approximation of `rank`, each carrying √σ (Pufferfish section 2.1).

    Args:
        matrices: (groups, rows, columns), any floating dtype.
        rank: singular values kept in each group.
        name: the layer, for messages.
        expected_error: ‖W − W_r‖ / ‖W‖ if it is known; spares a float32 attempt that would be in vain.

    Returns:
        u (groups, rank, columns) and v (groups, rows, rank), in the input's dtype, with v·u ≈ matrices.

    The small side's eigenvectors give one factor, the weight's projection on them the other, so at full rank the
    product is the weight itself.
    """
    energy = finite_energy(matrices, name)
    wide = widened(matrices)
    pair = None
    # The truncation error is √lost, so noise δ in what is lost moves it by δ/(2·lost) of itself.
    least_lost = wide.shape[1] * _VECTOR_NOISE / (2 * _ERROR_TOLERANCE)
    promising = expected_error is None or expected_error**2 >= least_lost
    if promising and _may_be_single(wide) and bool(((energy > SAFE_ENERGY[0]) & (energy < SAFE_ENERGY[1])).all()):
        pair = _basis_and_projection(wide, rank, torch.float32, name)
        if not bool((energy - _energy(pair[1]) >= least_lost * energy).all()):
            pair = None
    if pair is None:
        pair = _basis_and_projection(wide, rank, torch.float64, name)
    basis, projection = pair
    scale = torch.linalg.vector_norm(projection, dim=2)
    largest = scale.amax(dim=1, keepdim=True)
    # The split does not change the product, so a vanishing σ may take any positive scale: never divide by zero.
    tiny = torch.finfo(torch.float32).eps ** 2
    root = torch.where(scale > tiny * largest, scale, torch.where(largest > 0, largest, 1.0)).sqrt()
    wide_u, wide_v = projection / root[:, :, None], basis * root[:, None, :]
    if matrices.shape[1] <= matrices.shape[2]:
        u, v = wide_u, wide_v
    else:
        u, v = wide_v.mT, wide_u.mT
    u, v = (factor.to(matrices.dtype).contiguous() for factor in (u, v))
    for factor in (u, v):
        if not bool(torch.isfinite(factor).all()):
            raise WeightError(f"{name}: the factors overflow {matrices.dtype}; convert the checkpoint to float32 first")
    return u, v


def finite_energy(matrices: Tensor, name: str) -> Tensor:
    """‖W‖² of each group (groups,) in float64.

    Raises:
        WeightError: a value is NaN or infinite. The sum shows it for free: float32 squares cannot overflow float64.
    """
    wide = matrices if matrices.dtype.itemsize > 1 else matrices.float()  # float8 has no arithmetic of its own
    energy = _energy(wide)
    if not bool(torch.isfinite(energy).all()):
        bad = matrices.numel() - int(torch.isfinite(wide).sum())
        what = f"{bad} of {matrices.numel()} values are NaN or infinite" if bad else "its values overflow float64"
        raise WeightError(
            f"{name or 'weight'}: {what}; use an earlier checkpoint, or leave the layer out with --exclude '{name}'"
        )
    return energy


def _energy(matrices: Tensor) -> Tensor:
    """‖W‖² of each group (groups,) in float64, some rows at a time: torch would make a float64 copy of the whole."""
    rows = max(1, (1 << 20) // max(matrices.shape[2], 1))
    parts = [torch.linalg.vector_norm(part, dim=(1, 2), dtype=torch.float64) for part in matrices.split(rows, dim=1)]
    return torch.stack(parts).square().sum(dim=0)


def widened(matrices: Tensor) -> Tensor:
    """(groups, small, large) in float32, or float64 if it was: eigenvectors of the first side are the short ones."""
    if matrices.dtype not in (torch.float32, torch.float64):
        matrices = matrices.float()
    return matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT


def _may_be_single(wide: Tensor) -> bool:
    """Whether a float32 product is worth trying."""
    return wide.shape[1] > ALWAYS_DOUBLE and wide.dtype == torch.float32


def gram_of(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """wide·wideᵀ (groups, small, small) in `dtype`.

    On the CPU numpy computes it: for a matrix times its own transpose numpy calls BLAS's syrk, which does half the
    work, and its OpenBLAS uses AVX-512 where torch's MKL does not (on AMD; 1.7 times as fast over ResNet-50's
    layers). In float64 the product is summed over slices of columns, so that no float64 copy of the weight is ever
    whole in memory.
    """
    step = wide.shape[2] if dtype == wide.dtype else max(1024, wide.shape[1] // 2)
    gram = wide.new_zeros((wide.shape[0], wide.shape[1], wide.shape[1]), dtype=dtype)
    for start in range(0, wide.shape[2], step):
        part = wide[:, :, start : start + step].to(dtype)
        if part.is_cpu:
            array = part.numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at what comes out
                gram += torch.from_numpy(array @ array.swapaxes(1, 2))
        else:
            gram += part @ part.mT
    return gram


def eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues (groups, small) in float64, descending; numpy's LAPACK on the CPU, as for the product."""
    gram = gram.double()
    values = torch.from_numpy(np.linalg.eigvalsh(gram.numpy())) if gram.is_cpu else torch.linalg.eigvalsh(gram)
    return values.flip(1)


def eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors (groups, small, small) by ascending eigenvalue; numpy's LAPACK is the faster one in float64 only."""
    if gram.is_cpu and gram.dtype == torch.float64:
        return torch.from_numpy(np.linalg.eigh(gram.numpy()).eigenvectors)
    return torch.linalg.eigh(gram).eigenvectors


def _basis_and_projection(wide: Tensor, rank: int, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (groups, small, rank) and the weight projected on them (groups, rank, large)."""
    try:
        basis = eigenvectors(gram_of(wide, dtype))[:, :, -rank:].flip(2)
    except LinAlgErrors:
        try:
            basis = torch.linalg.svd(wide.double(), full_matrices=False).U[:, :, :rank]
        except LinAlgErrors as error:
            raise WeightError(f"{name}: the singular value decomposition did not converge ({error})") from error
    if dtype == wide.dtype:
        return basis, basis.mT @ wide
    projection = wide.new_empty((wide.shape[0], rank, wide.shape[2]), dtype=dtype)
    step = max(1024, wide.shape[1] // 2)
    for start in range(0, wide.shape[2], step):
        projection[:, :, start : start + step] = basis.mT @ wide[:, :, start : start + step].to(dtype)
    return basis, projection
