"""Eval mode for a while: every module gets its own mode back, whatever happens."""

import pytest
import torch

from lrconvert.modes import evaluating


def test_every_module_gets_its_mode_back_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before
