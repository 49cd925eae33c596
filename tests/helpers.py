"""What tests compare with, and how they run the command line."""

import re
from dataclasses import dataclass

import torch

from lrconvert.cli import main

# Relative difference that rounding alone may cause in a few layers: a few hundred units in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def assert_close(got, want, tolerance=None):
    """‖got − want‖ ≤ tolerance · ‖want‖, by dtype unless given; the reference must not be zero."""
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    size = torch.linalg.vector_norm(want.double())
    assert size > 0, "the reference is zero, and everything would pass"
    difference = float(torch.linalg.vector_norm(got.double() - want.double()) / size)
    limit = TOLERANCE[want.dtype] if tolerance is None else tolerance
    assert difference <= limit, f"relative difference {difference:.2e} is more than {limit:.0e}"


def num_params(model):
    """Parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def run_seeded(model, inputs):
    """The model's output, with the same dropout and stochastic depth each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        return model(inputs)


def with_spectrum(rows, columns, values, dtype=torch.float64):
    """A random (rows, columns) matrix with the given singular values."""
    full = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, full, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, full, dtype=torch.float64))
    return ((u * torch.as_tensor(values, dtype=torch.float64)) @ v.T).to(dtype)


@dataclass(frozen=True)
class Result:
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


class CommandLine:
    """`lrconvert ARGUMENTS` in this process."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments):
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return Result(code, out, err)

    def fails(self, code, *arguments):
        """Run, expect `code` and exactly one line on stderr, and return that line."""
        result = self(*arguments)
        assert result.code == code, (result.code, result.err)
        lines = result.err.strip().splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("error: ")
        assert not re.search(r"Traceback|<class|object at 0x", result.err)
        return lines[0]
