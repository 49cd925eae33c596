"""A network that knows its digits, its checkpoint, and how often things are computed."""

import pytest
import torch
from torch import nn

import lrconvert
from lrconvert.api import trials, validation
from lrconvert.models.zoo.digits_cnn import DigitsCNN
from lrconvert.training.data import Loader, open_dataset


@pytest.fixture(scope="session")
def digits():
    return open_dataset("digits")


@pytest.fixture(scope="session")
def trained(digits):
    """A network that knows its digits, after a few seconds."""
    torch.manual_seed(0)
    model = DigitsCNN(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = Loader(digits.train, batch_size=64, seed=0)
    for _ in range(4):
        for images, labels in loader.once():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def file(trained, tmp_path, monkeypatch):
    """Its checkpoint, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    lrconvert.save(trained, "digits.safetensors", architecture="zoo/digits_cnn", model_args={"width": 16})
    return "digits.safetensors"


@pytest.fixture
def calls(monkeypatch):
    """How often spectra, calibration, accuracy and outputs were really computed."""
    counts = dict.fromkeys(("analyze_layers", "calibrate", "outputs_of", "accuracy_of", "factorized"), 0)

    def counted(module, name):
        real = getattr(module, name)

        def call(*arguments, **named):
            counts[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    for name in ("analyze_layers", "calibrate", "outputs_of", "factorized"):
        counted(trials, name)
    counted(validation, "accuracy_of")
    return counts
