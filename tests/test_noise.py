"""Ranks that tell signal from noise, on matrices whose rank is known."""

import math

import numpy as np
import pytest

from lrconvert.noise import _marchenko_pastur_median, _omega, hard_threshold_rank, variational_bayes_rank


def noisy(rows, columns, rank, strength, seed=0):
    """Singular values of unit noise plus `rank` components, `strength` times above the edge of the noise."""
    draw = np.random.default_rng(seed)
    u, _ = np.linalg.qr(draw.normal(size=(rows, max(rank, 1))))
    v, _ = np.linalg.qr(draw.normal(size=(columns, max(rank, 1))))
    edge = math.sqrt(rows) + math.sqrt(columns)
    return np.linalg.svd(draw.normal(size=(rows, columns)) + (rank > 0) * strength * edge * u @ v.T, compute_uv=False)


@pytest.mark.parametrize("find", [hard_threshold_rank, variational_bayes_rank])
@pytest.mark.parametrize(("rows", "columns"), [(100, 100), (64, 576), (576, 64), (50, 400)])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_the_rank_of_a_clear_signal_is_found(find, rows, columns, rank):
    for seed in range(3):
        values = noisy(rows, columns, rank, strength=2.0, seed=seed)
        assert find(values, rows, columns) == rank
        assert find(7.0 * values, rows, columns) == rank, "the unit of the weight must not matter"


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_the_median_of_the_marchenko_pastur_law_is_that_of_noise(beta):
    columns = 1000
    values = np.linalg.svd(np.random.default_rng(0).normal(size=(int(beta * columns), columns)), compute_uv=False)
    assert _marchenko_pastur_median(beta) == pytest.approx(np.median(values**2) / columns, rel=0.01)


def test_the_threshold_is_the_published_one():
    # Gavish & Donoho 2014, table IV, and 2.858 in the abstract.
    assert {beta: round(_omega(beta), 3) for beta in (0.05, 0.5, 1.0)} == {0.05: 1.519, 0.5: 2.171, 1.0: 2.858}


@pytest.mark.parametrize("find", [hard_threshold_rank, variational_bayes_rank])
def test_degenerate_matrices_give_a_rank(find):
    assert find(np.zeros(4), 4, 9) == 0
    assert 0 <= find(np.array([3.0]), 1, 9) <= 1
    assert 0 <= find(np.ones(4), 4, 4) <= 4
