"""Profiling: what is a stack, which K follows from which times, and that the model is left alone."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import lrconvert.profiling
from lrconvert.inputs import one_input
from lrconvert.models.zoo.resnet18_cifar import ResNet18Cifar
from lrconvert.network import open_network
from lrconvert.planning import candidates_of, plan_options
from lrconvert.profiling import Profile, profile

RESNET_STACKS = [
    ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"],
    ["layer2.0.conv1"],
    ["layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"],
    ["layer3.0.conv1"],
    ["layer3.0.conv2", "layer3.1.conv1", "layer3.1.conv2"],
    ["layer4.0.conv1"],
    ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"],
]


def profile_of(model, input_shape, batch_size=2, exclude=(), **settings):
    candidates = candidates_of(open_network(model, input_shape=input_shape), plan_options(exclude=exclude))
    layers = candidates.network.layers
    return profile(model, layers, candidates.shrinkable, one_input(input_shape), batch_size, **settings)


@pytest.fixture
def speedups(monkeypatch):
    """Times that follow from the speed-ups in this list, by stack; each stack takes 1 ms at low rank."""
    given = []
    rest = iter(given)
    monkeypatch.setattr(lrconvert.profiling, "_times", lambda *_: (next(rest), 1.0))
    return given


# conv1 is never a candidate. Layers that count: conv1, four of layer1, then in each stage conv1, conv2, shortcut,
# conv1, conv2.
@pytest.mark.parametrize(
    ("given", "keep_first"),
    [
        ([1.2, 1.4, 1.6, 2, 2, 2, 2], 6),  # layer2.0.conv1 is the sixth
        ([1.2, 1.6, 1.4, 2, 2, 2, 2], 5),  # the paper's K for ResNet-18: layer1 stays dense
        ([1.6, 1.2, 1.4, 2, 2, 2, 2], 1),  # what comes after the first stack that is worth it does not matter
        ([1.2, 1.4, 1.4, 1.4, 1.4, 1.4, 1.51], 16),  # layer4.0.conv1 is the last before
        ([1.5, 2, 2, 2, 2, 2, 2], 5),  # more than 1.5 times, not as much
    ],
)
def test_k_is_the_end_of_the_last_leading_stack_that_is_not_worth_it(speedups, given, keep_first):
    speedups.extend(given)
    found = profile_of(ResNet18Cifar(width=4), (3, 32, 32), exclude=("*.shortcut.*",))
    assert [list(stack.names) for stack in found.stacks] == RESNET_STACKS
    assert [stack.speedup for stack in found.stacks] == given
    assert found.keep_first == keep_first
    assert found.pays


def test_no_stack_is_worth_it(speedups):
    speedups.extend([1.0] * 7)
    found = profile_of(ResNet18Cifar(width=4), (3, 32, 32), exclude=("*.shortcut.*",))
    assert not found.pays
    assert found.keep_first == 20  # all but the classifier


def test_equal_weights_at_different_resolutions_are_different_stacks(speedups):
    speedups.extend([1.0, 2.0])
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
    )
    found = profile_of(model, (3, 8, 8))
    assert [stack.names for stack in found.stacks] == [("1",), ("3",)]
    assert found.keep_first == 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_layers_are_trained_on_inputs_of_their_own_size(monkeypatch, autocast):
    seen = []
    step = lrconvert.profiling._Step.__call__

    def spy(self):
        step(self)
        (image,) = self.arguments
        parameters = list(self.module.parameters())
        assert all(bool(parameter.grad.any()) for parameter in parameters)
        assert bool(image.grad.any())
        assert image.is_contiguous(memory_format=torch.channels_last)
        seen.append((tuple(image.shape), sum(parameter.numel() for parameter in parameters), self.gradients[0].dtype))

    monkeypatch.setattr(lrconvert.profiling._Step, "__call__", spy)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    found = profile_of(model, (3, 8, 8), 5, autocast=autocast, channels_last=True)
    # dense 16·16·9 + bias 16; at rank 4: 4·16·9 + 16·4 + 16; in turns, eleven of each
    dtype = autocast or torch.float32
    assert seen == [((5, 16, 4, 4), 2320, dtype), ((5, 16, 4, 4), 656, dtype)] * 11
    assert found.iterations == 22
    assert 0 < found.stacks[0].low_rank_ms < 1e3 * found.seconds


def test_median_without_the_first_iteration(monkeypatch):
    clock = iter([0.0, 0.0, 9.0, 0.0, 0.001, 0.0, 0.003, 0.0, 0.002])
    monkeypatch.setattr(lrconvert.profiling.time, "perf_counter", lambda: next(clock))
    assert lrconvert.profiling._times([lambda: None], 4, torch.device("cpu")) == (2.0,)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )
    model[1].eval()  # a mixture of modes
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    parameters, modes = list(model.parameters()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = profile_of(model, (1, 4, 4))
    assert found.stacks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_with_several_weights_are_timed_once():
    lstm = nn.LSTM(12, 16, batch_first=True)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.lstm = nn.Linear(12, 12), lstm

        def forward(self, x):
            return self.lstm(self.stem(x))[0]

    found = profile_of(Reader(), (3, 12))
    assert {name for stack in found.stacks for name in stack.names} == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert found.iterations == 22


def test_a_profile_comes_through_json(speedups):
    speedups.append(2.0)
    found = profile_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), (3, 8, 8))
    assert Profile.from_state(json.loads(json.dumps(dataclasses.asdict(found)))) == found
