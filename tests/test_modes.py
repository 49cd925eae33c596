"""Eval mode and rest for a while: a model comes back as it was, whatever happens."""

import pytest
import torch

from lrconvert.modes import Unremarkable, at_rest, evaluating
from lrconvert.network import open_network


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


def test_a_model_at_rest_trains_only_what_it_is_told_and_comes_back_with_its_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[0].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones(2, 2)
    before = [parameter.requires_grad for parameter in model.parameters()]

    def fail():
        with at_rest(model, [model[0].bias]) as device:
            assert device == torch.device("cpu")
            assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, False, False]
            assert not model[2].training
            model(torch.ones(1, 2)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert model[2].training
    assert model[0].bias.grad is None
    assert torch.equal(model[1].weight.grad, torch.ones(2, 2))


def test_what_is_asked_of_numbers_that_are_not_there():
    mask = torch.empty(2, 5, dtype=torch.bool, device="meta")
    tokens = torch.empty(2, 5, dtype=torch.int64, device="meta")
    with Unremarkable():
        assert mask.all()
        assert mask.sum() == mask.numel()
        assert not mask.any()
        assert 7 not in tokens
        assert (tokens == 1).all()
        with pytest.raises(RuntimeError, match="meta"):
            tokens.max().item()
        assert not torch.tensor([True, False]).all()  # numbers that are there are looked at
        assert torch.tensor([True, False]).any()
    with pytest.raises(RuntimeError, match="meta"):
        bool(mask.all())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_a_model_with_a_compiled_part_is_left_as_it_was():
    compiled = torch.jit.script(torch.nn.Linear(8, 8))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), compiled, torch.nn.Linear(8, 3))
    want = model(torch.ones(2, 8))
    network = open_network(model, input_shape=(8,))
    assert any("1 is compiled by torch.jit" in note for note in network.notes)
    assert torch.equal(model(torch.ones(2, 8)), want)
