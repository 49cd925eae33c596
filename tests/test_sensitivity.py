"""Measured error curves, against factorizing one layer and running the network."""

import copy

import pytest
import torch
from torch import nn

from lrconvert.calibration import calibrate
from lrconvert.inputs import Call
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.sensitivity import measured_curves
from lrconvert.surgery import factorize_module


def test_a_measured_curve_is_what_the_output_loses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16)).eval()
    x = torch.randn(300, 24) @ torch.randn(24, 24) / 3 + 1
    calls = [Call((part,), {}, 100) for part in x.split(100)]
    layers = layers_of_module(model)
    found = calibrate(model, layers, calls)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    curves = measured_curves(model, layers, found, calls)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for layer in layers:
        curve = curves[layer.name]
        assert len(curve) == layer.full_rank + 1
        assert curve[-1] == 0
        assert (curve[:-1] >= curve[1:]).all()
        rank = round(0.5 * layer.break_even_rank)
        decision = LayerPlan.of(layer, rank).model_copy(update={"data_aware": True})
        small = factorize_module(copy.deepcopy(model), Plan(layers=(decision,)), responses=found.responses)
        with torch.no_grad():
            lost = float(((small(x) - model(x)).double() ** 2).sum(dim=1).mean())
        assert curve[rank] == pytest.approx(lost, rel=1e-4)
