"""Stable ranks by Lanczos iterations against LAPACK's SVD, where it is easy and where it is not."""

import numpy as np
import pytest
import torch
from helpers import with_spectrum

import lrconvert.stable_rank
from lrconvert.stable_rank import stable_rank_of, stable_ranks

FULL = 300
SPECTRA = {
    "flat": np.ones(FULL),
    "linear": np.linspace(1, 0, FULL),
    "decay 0.5": np.arange(1, FULL + 1) ** -0.5,
    "decay 2": np.arange(1, FULL + 1.0) ** -2,
    "rank 1": np.r_[3.0, np.zeros(FULL - 1)],
    "top twice": np.r_[1, 1, np.linspace(0.9, 0.1, FULL - 2)],
    # what a single vector sees of two close values is their mean, until they are told apart
    **{f"top two {gap:g} apart": np.r_[1, 1 - gap, np.linspace(0.9, 0.1, FULL - 2)] for gap in (1e-3, 1e-5, 1e-6)},
    "cluster of 20": np.r_[1 - np.arange(20) * 1e-5, np.linspace(0.9, 0.1, FULL - 20)],
}


def by_svd(matrices):
    values = torch.linalg.svdvals(matrices.double())
    return (values**2).sum(1) / values[:, 0] ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_within_a_millionth_of_the_svd(values, dtype):
    matrix = with_spectrum(FULL, 500, values, dtype)[None]
    torch.testing.assert_close(stable_rank_of(matrix), by_svd(matrix), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (64, 576), (512, 512), (512, 1152), (700, 300)], ids=str)
def test_random_weights(shape):
    matrix = torch.randn(1, *shape)
    torch.testing.assert_close(stable_rank_of(matrix), by_svd(matrix), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_scale_of_the_weight_does_not_matter(scale):
    matrix = torch.randn(1, 200, 300) * scale
    torch.testing.assert_close(stable_rank_of(matrix), by_svd(matrix), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [4, 200])
def test_zero_groups_and_values_that_are_not_finite(size):
    groups = torch.randn(3, size, size)
    groups[1] = 0
    groups[2, 1, 1] = torch.nan
    found = stable_rank_of(groups)
    torch.testing.assert_close(found[:1], by_svd(groups[:1]), rtol=1e-6, atol=0)
    assert found[1] == 0
    assert found[2].isnan()


def test_all_eigenvalues_where_the_iterations_do_not_converge(monkeypatch):
    groups = torch.stack([with_spectrum(FULL, 400, SPECTRA[name]) for name in ("decay 2", "linear")])
    monkeypatch.setattr(lrconvert.stable_rank, "_MOST", 8)  # enough for the first, and not for the second
    torch.testing.assert_close(stable_rank_of(groups), by_svd(groups), rtol=1e-6, atol=0)
    grams = groups @ groups.mT
    torch.testing.assert_close(lrconvert.stable_rank._from_grams(grams), by_svd(groups), rtol=1e-6, atol=0)


def test_layers_that_iterate_together(monkeypatch):
    # as on a GPU, in batches of no more than two matrices of 130×130
    views = [torch.randn(groups, 130 + wide, 130, dtype=torch.float64) for groups, wide in ((1, 0), (3, 9), (1, 40))]
    monkeypatch.setattr(lrconvert.stable_rank, "_TOGETHER", 2 * 130**2)
    assert list(lrconvert.stable_rank._batches(views, {2, 0, 1})) == [[0, 1], [2]]
    grams = torch.cat([view.mT @ view for view in views])
    expected = torch.cat([by_svd(view) for view in views])
    torch.testing.assert_close(lrconvert.stable_rank._from_grams(grams), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(stable_ranks(views)), expected, rtol=1e-6, atol=0)


def test_nothing_but_the_result_changes():
    weight = torch.randn(200, 300, requires_grad=True)
    before, state = weight.detach().clone(), torch.get_rng_state()
    rank = stable_rank_of(weight[None])
    assert not rank.requires_grad
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(stable_rank_of(weight[None]), rank)


def test_a_zero_matrix_among_those_that_iterate_together():
    grams = torch.stack([torch.zeros(200, 200), torch.eye(200)]).double()
    assert lrconvert.stable_rank._iterated_together(grams).tolist() == pytest.approx([0, 1])
