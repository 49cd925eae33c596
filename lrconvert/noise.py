"""How many singular values of a matrix stand out from noise: two estimates that need no number from the user.

Both take a matrix as a signal of low rank plus independent noise of equal variance, and know of its singular values
only. σ below are descending; a matrix has `rows` ≤ `columns`, and β = rows / columns.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def hard_threshold_rank(values: Values, rows: int, columns: int) -> int:
    """Singular values above the optimal hard threshold for unknown noise: ω(β) times their median.

    Source: Gavish & Donoho 2014, https://arxiv.org/abs/1305.5870, with ω(β) = λ*(β) / √μ_β computed, not approximated.

    Args:
        values: all singular values.
        rows, columns: of the matrix, in either order.
    """
    beta = min(rows, columns) / max(rows, columns)
    return int((values > _omega(beta) * np.median(values)).sum())


def _omega(beta: float) -> float:
    """The threshold over the median singular value; 2.858 for a square matrix."""
    best = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return best / math.sqrt(_marchenko_pastur_median(beta))


def _marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko–Pastur distribution, of which σ²/columns of pure unit noise are drawn."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # With x = low + (high − low)·sin²t the density times dx/dt is smooth at both ends.
    angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi / 2
    x = low + (high - low) * np.sin(angle) ** 2
    mass = (np.sin(angle) * np.cos(angle)) ** 2 / x
    up_to = (np.cumsum(mass) - mass / 2) / mass.sum()
    return float(np.interp(0.5, up_to, x))


def variational_bayes_rank(values: Values, rows: int, columns: int) -> int:
    """The rank that empirical variational Bayes matrix factorization finds, analytically, its noise estimated.

    Source: Nakajima, Sugiyama, Babacan & Tomioka 2013, https://jmlr.org/papers/v14/nakajima13a.html, theorem 2 (the
    threshold) and corollary 1 (the free energy whose minimum is the noise).

    Args:
        values: all singular values.
        rows, columns: of the matrix, in either order.
    """
    rows, columns = min(rows, columns), max(rows, columns)
    alpha = rows / columns
    # 2.5129: where the free energies with and without a component cross, for every α (section 4.3).
    bar = 2.5129 * math.sqrt(alpha)
    edge = (1 + bar) * (1 + alpha / bar)
    squares = values**2
    if not squares.any():
        return 0
    most = max(min(math.ceil(rows / (1 + alpha)) - 1, rows - 1), 0)
    high = squares.sum() / (rows * columns)
    low = max(squares[most] / (columns * edge), squares[most:].mean() / columns, 1e-12 * high)
    noise = _minimum(lambda variance: _free_energy(squares, variance, alpha, columns, edge), low, max(high, low))
    return int((squares > columns * noise * edge).sum())


def _free_energy(squares: Values, variance: float, alpha: float, columns: int, edge: float) -> float:
    """Up to terms without `variance`, the free energy of the solution at this noise."""
    x = np.maximum(squares / (columns * variance), 1e-300)
    signal, noise = x[x > edge], x[x <= edge]
    shifted = signal - (1 + alpha)
    tau = (shifted + np.sqrt(shifted**2 - 4 * alpha)) / 2
    parts = (noise - np.log(noise)).sum() + (signal - tau).sum()
    parts += np.log((tau + 1) / signal).sum() + alpha * np.log(tau / alpha + 1).sum()
    return float(parts)


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Where `function` is least between `low` and `high`: the best of a logarithmic grid, then golden sections."""
    grid = np.geomspace(low, high, 64) if high > low else np.array([low])
    at = int(np.argmin([function(point) for point in grid]))
    left, right = math.log(grid[max(at - 1, 0)]), math.log(grid[min(at + 1, len(grid) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = right - golden * (right - left), left + golden * (right - left)
        if function(math.exp(a)) <= function(math.exp(b)):
            right = b
        else:
            left = a
    return math.exp((left + right) / 2)
