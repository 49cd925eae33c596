"""Factors of least output error, against the textbook formula with both roots, and against the outputs themselves."""

import pytest
import torch
from helpers import assert_close, with_spectrum

from lrconvert.errors import WeightError
from lrconvert.response import Response


def root_of(moment):
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def drawn(rows, columns, seed=0):
    """W, inputs x (n, columns) and output gradients g (n, rows), correlated as those of networks are."""
    torch.manual_seed(seed)
    n = 400
    spread = 1 / torch.arange(1, columns + 1, dtype=torch.float64)
    x = torch.randn(n, columns, dtype=torch.float64) * spread @ torch.randn(columns, columns, dtype=torch.float64)
    g = torch.randn(n, rows, dtype=torch.float64) @ torch.randn(rows, rows, dtype=torch.float64) / rows
    return torch.randn(rows, columns, dtype=torch.float64), x + 0.3, g


def response_of(w, x, g=None):
    c = x.T @ x / len(x)
    gradients = None if g is None else g.T @ g / len(g)
    g = torch.eye(len(w), dtype=torch.float64) if g is None else gradients
    mean = x.mean(0)
    if w.shape[0] <= w.shape[1]:
        return Response(
            "w", "rows", None if gradients is None else gradients[None], (w @ c @ w.T)[None], (w @ mean)[None]
        )
    return Response("w", "columns", c[None], (w.T @ g @ w)[None], mean[None])


SHAPES = [(12, 30), (30, 12), (20, 20)]


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_weight_is_the_truncated_svd_between_both_roots(shape, two_sided):
    w, x, g = drawn(*shape)
    response = response_of(w, x, g if two_sided else None)
    c, metric = x.T @ x / len(x), g.T @ g / len(g) if two_sided else torch.eye(len(w), dtype=torch.float64)
    left, right = root_of(metric), root_of(c)
    whitened = torch.linalg.svd(left @ w @ right)
    full = min(shape)
    values = response.spectrum.values[0]
    assert_close(values, whitened.S, 1e-6)
    for rank in (1, 5, full - 1):
        u, v, _ = response.factors(w[None], rank)
        best = (whitened.U[:, :rank] * whitened.S[:rank]) @ whitened.Vh[:rank]
        want = torch.linalg.solve(left, best) @ torch.linalg.inv(right)
        assert_close((v @ u)[0], want, 1e-5)
        lost = torch.linalg.matrix_norm(left @ (w - (v @ u)[0]) @ right) ** 2
        assert_close(lost, (values[rank:] ** 2).sum(), 1e-6)
        assert_close(torch.linalg.vector_norm(u[0], dim=1), torch.linalg.vector_norm(v[0], dim=0), 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_the_weight_comes_back(shape):
    w, x, g = drawn(*shape)
    u, v, shift = response_of(w, x, g).factors(w[None], min(shape))
    assert_close((v @ u)[0], w, 1e-8)
    assert float(shift.abs().max()) < 1e-8 * float((w @ x.mean(0)).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shift_keeps_the_mean_output(shape):
    w, x, g = drawn(*shape)
    u, v, shift = response_of(w, x, g).factors(w[None], 4)
    approximate = (v @ u)[0]
    assert_close(shift[0] + approximate @ x.mean(0), w @ x.mean(0), 1e-8)


def test_inputs_that_span_few_directions_need_no_more_rank():
    w, x, _ = drawn(12, 30)
    basis = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64)).Q
    x = x @ basis @ basis.T
    u, v, _ = response_of(w, x).factors(w[None], 5)
    assert_close(x @ (v @ u)[0].T, x @ w.T, 1e-6)
    tall, narrow = with_spectrum(30, 12, torch.linspace(2, 1, 12)), x[:, :12]
    basis = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64)).Q
    narrow = narrow @ basis @ basis.T
    u, v, _ = response_of(tall, narrow).factors(tall[None], 3)
    assert_close(narrow @ (v @ u)[0].T, narrow @ tall.T, 1e-2)  # the clamp of the root shows


def test_each_group_is_fitted_on_its_own():
    parts = [drawn(6, 9, seed) for seed in (1, 2, 3)]
    ones = [response_of(*part) for part in parts]
    together = Response(
        "w", "rows", *(torch.cat([getattr(one, name) for one in ones]) for name in ("metric", "signal", "mean"))
    )
    u, v, shift = together.factors(torch.stack([w for w, _, _ in parts]), 3)
    for index, (one, (w, _, _)) in enumerate(zip(ones, parts, strict=True)):
        alone = one.factors(w[None], 3)
        assert_close((v @ u)[index], (alone[1] @ alone[0])[0], 1e-9)
        assert_close(shift[index], alone[2][0], 1e-9)


def test_a_moment_that_is_not_finite_is_refused():
    w, x, g = drawn(6, 9)
    x[3, 3] = torch.inf
    with pytest.raises(WeightError, match=r"w: calibration met values that are NaN or infinite"):
        response_of(w, x, g).factors(w[None], 2)
