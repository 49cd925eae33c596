"""Weights of every type: analyzed in float32 or better, written back in their own, with the error that it allows."""

import json

import pytest
import torch
from helpers import with_spectrum
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lrconvert
from lrconvert.checkpoints import open_checkpoint

RANK = 6
REAL = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
# float64's own rounding is below that of the eigenvalues.
LEAST = 1e-13


@pytest.fixture(params=REAL, ids=str)
def dtype(request):
    """Every real type that a weight may have."""
    return request.param


def matrix(dtype, rows=64, columns=48):
    """A (rows, columns) weight of RANK equal singular values, of a size that no type's range cuts."""
    return with_spectrum(rows, columns, [60.0] * RANK + [0.0] * (min(rows, columns) - RANK)).to(dtype)


def best(weight):
    """The best approximation of rank RANK, by LAPACK in float64."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ v[:RANK]


def distance(got, want):
    return float((got.double() - want).norm() / want.norm())


def largest_error(dtype):
    """Rounding moves each element by at most eps/2 of itself, so by as much of ‖factor‖; there are two factors, and
    where all kept σ are equal ‖δv·u‖ ≤ ‖δv‖·σ_max(u) = (eps/2)·‖W‖.
    """
    eps = torch.finfo(dtype).eps
    return max(eps * (1 + eps), LEAST)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_factors_are_of_the_weights_own_type_and_as_good_as_it_allows(tmp_path, dtype, suffix):
    weight, bias = matrix(dtype), torch.ones(64).to(dtype)
    state = {"fc.weight": weight, "fc.bias": bias, "conv.weight": weight.clone().reshape(64, 12, 2, 2)}
    dense, small, merged = (tmp_path / f"{name}{suffix}" for name in ("dense", "small", "merged"))
    (torch.save if suffix == ".pt" else save_file)(state, dense)
    lrconvert.factorize(dense, f"rank={RANK}", output=small, keep_first=0, keep_last=False)
    tensors = {key: ref.read() for key, ref in open_checkpoint(small).tensors.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    wanted = best(weight)
    for name in ("fc", "conv"):
        u, v = (tensors[f"{name}.{factor}.weight"].double().flatten(1) for factor in "uv")
        error = distance(v @ u, wanted)
        assert error <= largest_error(dtype)
        # and no better than rounding leaves it: factors of another type would be
        assert error >= torch.finfo(dtype).eps / 50
    lrconvert.export(small, merged, "dense")
    again = open_checkpoint(merged).tensors
    assert {ref.dtype for ref in again.values()} == {dtype}
    # the product is rounded once more
    assert distance(again["fc.weight"].read(), wanted) <= largest_error(dtype) + torch.finfo(dtype).eps / 2


def test_spectra_are_those_of_the_stored_numbers(tmp_path, dtype, cli):
    weight = torch.randn(96, 80).to(dtype)
    save_file({"a.weight": weight, "b.weight": weight.clone()}, tmp_path / "m.safetensors")
    row, _ = json.loads(cli("analyze", tmp_path / "m.safetensors", "--json").out)["layers"]
    values = torch.linalg.svdvals(weight.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert row["sigma_max"] == pytest.approx(float(values[0]), rel=tolerance)
    assert row["stable_rank"] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=tolerance)


def test_headers_name_types_as_the_library_does(tmp_path, dtype):
    save_file({"fc.weight": matrix(dtype), "head.weight": matrix(dtype)}, tmp_path / "m.safetensors")
    lrconvert.factorize(tmp_path / "m.safetensors", "rank=4", output=tmp_path / "s.safetensors", keep_first=0)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {REAL[dtype]}  # noqa: SIM118 - not a dict
    assert load_file(tmp_path / "s.safetensors")["fc.u.weight"].dtype == dtype


def test_values_that_a_small_type_cannot_hold_are_an_error(tmp_path, cli):
    # torch saturates e4m3fn and makes infinities or NaN of the others
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fnuz):
        weight = torch.zeros(64, 64).to(dtype)
        weight.view(torch.uint8)[0, 0] = torch.tensor([float("nan")]).to(dtype).view(torch.uint8)[0]
        save_file({"a.weight": weight, "b.weight": weight.clone()}, tmp_path / "m.safetensors")
        line = cli.fails(1, "analyze", tmp_path / "m.safetensors")
        assert "1 of 4096 values are NaN or infinite" in line


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("known", [False, True])
def test_complex_weights_stay_dense_and_it_is_said(tmp_path, cli, dtype, known):
    state = {
        "a.weight": torch.randn(32, 32),
        "b.weight": torch.randn(32, 32, dtype=dtype),
        "c.weight": torch.randn(32, 32),
    }
    torch.save(state, tmp_path / "m.pt")
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n"
        "    net = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32, bias=False) for name in 'abc'})\n"
        f"    net['b'].weight = torch.nn.Parameter(net['b'].weight.to({dtype}))\n    return net\n"
    )
    named = ("--model", f"{tmp_path / 'net.py'}:build") if known else ()
    analyzed = json.loads(cli("analyze", tmp_path / "m.pt", "--json", *named).out)
    assert [row["name"] for row in analyzed["layers"]] == ["a", "c"]
    arguments = ("--rank", "4", "--keep-first", "0", "--factorize-last", "--json", *named)
    record = json.loads(cli("factorize", tmp_path / "m.pt", "-o", tmp_path / "s.pt", *arguments).out)
    rows = {row["name"]: row for row in record["layers"]}
    assert rows["b"]["rank"] is None
    assert rows["b"]["reason"] == "complex numbers: only real weights are factorized"
    assert [rows[name]["rank"] for name in "ac"] == [4, 4]
    assert record["num_params_before"] == 3 * 32 * 32
    assert torch.equal(open_checkpoint(tmp_path / "s.pt").tensors["b.weight"].read(), state["b.weight"])


def test_integers_come_through_as_they_are(tmp_path, cli):
    numbers = {
        str(dtype).removeprefix("torch."): torch.randint(0, 2, (64, 64)).to(dtype)
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16)
    }
    state = {f"{name}.weight": value for name, value in numbers.items()}
    save_file({"a.weight": torch.randn(32, 32), "b.weight": torch.randn(32, 32), **state}, tmp_path / "m.safetensors")
    result = cli(
        "factorize", tmp_path / "m.safetensors", "-o", tmp_path / "s.safetensors", "--rank", "4", "--keep-first", "0"
    )
    assert result.code == 0, result.err
    written = open_checkpoint(tmp_path / "s.safetensors").tensors
    assert all(torch.equal(written[key].read(), value) for key, value in state.items())
