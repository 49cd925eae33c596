"""The multiple that ranks are rounded to."""

import pytest
import torch

from lrconvert.hardware import rank_multiple


@pytest.mark.parametrize(
    ("capability", "dtype", "multiple"),
    [
        ("AVX512", torch.float32, 16),
        ("AVX512", torch.bfloat16, 32),
        ("AVX2", torch.float32, 8),
        ("AVX2", torch.float64, 4),
        ("DEFAULT", torch.float32, 4),
    ],
)
def test_a_cpu_likes_whole_vectors(monkeypatch, capability, dtype, multiple):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert rank_multiple(torch.device("cpu"), dtype) == multiple


def test_a_gpu_likes_eights():
    assert rank_multiple(torch.device("cuda"), torch.float16) == 8
