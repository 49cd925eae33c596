"""Singular values and factors against LAPACK's SVD, closed forms, and the Eckart–Young theorem."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_close, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st

from lrconvert.errors import WeightError
from lrconvert.spectrum import Spectrum, factors_of, spectrum_of

# (1, n), (n, 1) and squares first; 300 and more go through float32 Gram matrices.
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (64, 576), (300, 40), (300, 700), (700, 300), (320, 320)]


def spectrum_with(values):
    values = torch.tensor([values], dtype=torch.float64)
    return Spectrum(values, (values**2).sum(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_an_svd(shape, dtype):
    matrix = torch.randn(shape, dtype=torch.float64).to(dtype)
    values = spectrum_of(matrix[None], "layer").values[0]
    expected = torch.linalg.svdvals(matrix.double())
    assert float((values - expected).abs().max()) <= 1e-4 * float(expected[0])
    assert bool((values[:-1] >= values[1:]).all())


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 4.0])
def test_small_values_survive_the_float32_fast_path(decay):
    expected = torch.arange(1, 401, dtype=torch.float64) ** -decay
    matrix = with_spectrum(400, 900, expected, torch.float32)
    values = spectrum_of(matrix[None], "layer").values[0]
    assert float((values - expected).abs().max()) <= 1e-4


def test_each_group_has_its_own_values():
    groups = torch.randn(3, 20, 50)
    values = spectrum_of(groups, "layer").values
    for group, found in zip(groups, values, strict=True):
        assert_close(found, torch.linalg.svdvals(group.double()), 1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_scale_of_the_weight_does_not_matter(scale):
    matrix = torch.randn(300, 310) * scale
    spectrum = spectrum_of(matrix[None], "layer")
    assert_close(spectrum.values[0], torch.linalg.svdvals(matrix.double()), 1e-4)
    u, v = factors_of(matrix[None], 300, "layer")
    assert_close((v.double() @ u.double())[0], matrix.double(), 1e-5)


def test_stable_rank_of_closed_forms():
    assert float(spectrum_with([1.0] * 8).stable_rank()) == 8.0
    assert float(spectrum_with([2.0, 1.0, 1.0]).stable_rank()) == 1.5
    assert float(spectrum_with([3.0, 0.0, 0.0]).stable_rank()) == 1.0
    assert float(spectrum_with([0.0, 0.0]).stable_rank()) == 0.0


def test_accumulative_and_energy_ranks_of_closed_forms():
    spectrum = spectrum_with([4.0, 3.0, 2.0, 1.0])
    assert [spectrum.accumulative_rank(p) for p in (0.1, 0.4, 0.41, 0.7, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    # squares: 16, 9, 4, 1 of 30
    assert [spectrum.energy_rank(e) for e in (0.5, 16 / 30, 0.54, 25 / 30, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(any),
    st.floats(0, 1, exclude_min=True),
)
def test_ranks_are_the_smallest_that_reach_their_share(values, share):
    values = sorted(values, reverse=True)
    for terms, rank in (
        (values, spectrum_with(values).accumulative_rank(share)),
        ([value**2 for value in values], spectrum_with(values).energy_rank(share)),
    ):
        assert 1 <= rank <= len(values)
        # brute force, with room for the rounding of another summation order
        total = math.fsum(terms)
        assert math.fsum(terms[:rank]) >= share * total * (1 - 1e-12)
        assert rank == 1 or math.fsum(terms[: rank - 1]) <= share * total * (1 + 1e-12)


@pytest.mark.parametrize("rank", [1, 10, 77, 150])
@pytest.mark.parametrize("shape", [(150, 400), (400, 150), (150, 150)], ids=str)
def test_truncation_error_is_the_dropped_tail(shape, rank):
    matrix = torch.randn(shape)
    spectrum = spectrum_of(matrix[None], "layer")
    u, v = factors_of(matrix[None], rank, "layer")
    error = float((matrix - (v @ u)[0]).norm() / matrix.norm())
    assert error == pytest.approx(spectrum.error(rank), abs=1e-5)


def test_tail_energies_of_a_spectrum_of_two_groups_by_hand():
    values = torch.tensor([[3.0, 2.0], [1.0, 0.5]], dtype=torch.float64)
    assert Spectrum(values, (values**2).sum(1)).tail_energies().tolist() == [14.25, 4.25, 0.0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (512, 512), (768, 3072)], ids=str)
def test_truncation_is_within_1e4_of_the_best(shape, decay):
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    matrix = with_spectrum(*shape, values)
    rank = min(shape) // 4
    u, v = factors_of(matrix.float()[None], rank, "layer")
    error = float((matrix - (v.double() @ u.double())[0]).norm())
    best = float(values[rank:].square().sum().sqrt())
    # float32 factors cannot be closer than float32's own rounding of the weight
    rounding = 1e-7 * float(matrix.norm())
    assert error <= best * (1 + 1e-4) + rounding


def test_factors_share_the_singular_values_evenly():
    u, v = factors_of(torch.randn(1, 40, 90), 12, "layer")
    assert_close(v[0].norm(dim=0), u[0].norm(dim=1), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_gives_the_weight_back(shape, dtype):
    matrix = torch.randn(shape, dtype=torch.float64).to(dtype)
    u, v = factors_of(matrix[None], min(shape), "layer")
    assert u.dtype == v.dtype == dtype
    assert u.is_contiguous()
    assert v.is_contiguous()
    assert_close(
        (v.double() @ u.double())[0], matrix.double(), {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    )


def test_exactly_low_rank_weight_is_reproduced():
    matrix = (torch.randn(500, 20, dtype=torch.float64) @ torch.randn(20, 600, dtype=torch.float64)).float()
    u, v = factors_of(matrix[None], 20, "layer")
    assert_close((v @ u)[0], matrix, 1e-6)
    assert spectrum_of(matrix[None], "layer").error(20) < 1e-6


@pytest.mark.parametrize("size", [4, 300])
def test_zero_weight_has_finite_factors(size):
    u, v = factors_of(torch.zeros(1, size, size), 2, "layer")
    assert not u.any()
    assert bool(torch.isfinite(v).all())
    spectrum = spectrum_of(torch.zeros(1, size, size), "layer")
    assert spectrum.is_zero
    assert spectrum.error(1) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused_by_name(bad):
    matrix = torch.randn(1, 4, 5)
    matrix[0, 2, 3] = bad
    for compute in (lambda: spectrum_of(matrix, "block.fc"), lambda: factors_of(matrix, 2, "block.fc")):
        with pytest.raises(WeightError, match=r"block\.fc: 1 of 20 values are NaN or infinite"):
            compute()


def test_eigenvalue_failure_falls_back_to_an_svd(monkeypatch):
    matrix, large = torch.randn(1, 30, 50), torch.randn(1, 200, 300)

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    def fail_too(*_, **__):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(np.linalg, "eigvalsh", fail_too)
    monkeypatch.setattr(np.linalg, "eigh", fail_too)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert_close(spectrum_of(matrix, "layer").values[0], torch.linalg.svdvals(matrix[0].double()), 1e-6)
    assert_close(spectrum_of(large, "layer").values[0], torch.linalg.svdvals(large[0].double()), 1e-6)
    u, v = factors_of(matrix, 30, "layer")
    assert_close((v @ u)[0], matrix[0])
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(WeightError, match="layer: the singular value decomposition did not converge"):
        factors_of(matrix, 30, "layer")


@pytest.mark.parametrize("shape", [(200, 300), (300, 301), (256, 256), (1000, 200)])
@pytest.mark.parametrize("kind", ["random", "flat, and one that is small", "falling"])
def test_every_singular_value_is_exact_to_four_digits_of_the_largest(shape, kind):
    """Whichever product they are from."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    if kind != "random":
        full = min(shape)
        sigma = torch.linspace(1, 0.5, full) if kind.startswith("flat") else 1 / torch.arange(1, full + 1) ** 2
        sigma[-1] = sigma[-1] if kind == "falling" else 1e-5
        matrix = with_spectrum(*shape, sigma, torch.float32)
    want = torch.linalg.svdvals(matrix.double())
    assert float((spectrum_of(matrix[None], "layer").values[0] - want).abs().max()) < 1e-4 * float(want[0])


def test_small_singular_values_are_no_noise():
    sigma = 0.9 ** torch.arange(160, dtype=torch.float64)  # down to 5e-8 of the largest
    found = spectrum_of(with_spectrum(160, 300, sigma, torch.float64)[None], "layer")
    # An eigenvalue is off by some ε of float64 of the largest: the root of that, and less where σ is larger.
    assert float(((found.values[0] - sigma).abs() * (found.values[0] + sigma)).max()) < 1e-14
    assert float((found.values[0] - sigma).abs().max()) < 1e-7
