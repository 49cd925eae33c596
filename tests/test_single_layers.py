"""Layers taken out of a model: their copies and their inputs."""

import pytest
import torch
from torch import nn

from lrconvert.inputs import Input, one_input
from lrconvert.layers.survey import layers_of_module
from lrconvert.single_layers import alike, calls_of, copy_of, random_block, with_data
from lrconvert.views import with_pivoted_factors

CPU = torch.device("cpu")


class Twice(nn.Module):
    """A layer that is called twice, with inputs of two sizes, and attention in two uses."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.own, self.cross = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        x = self.shared(x) + self.shared(x[:, :1])
        x = self.own(x, x, x, need_weights=False)[0]
        return self.cross(x, x + 1, x + 2)[0]


def test_every_call_is_seen():
    model = Twice()
    calls = calls_of(model, ["shared", "own", "cross"], one_input((5, 8)), 3)
    assert [arguments[0].shape for arguments, _ in calls["shared"]] == [(3, 5, 8), (3, 1, 8)]
    assert calls["own"][0][1] == {"need_weights": False}
    layers = {layer.weight: layer for layer in layers_of_module(model)}
    keys = [
        alike(model.get_submodule(owner), calls[owner], layers[f"{owner}.in_proj_weight"]) for owner in ("own", "cross")
    ]
    assert keys[0] != keys[1]  # one tensor three times is another job than three tensors
    arguments, _ = with_data(calls["own"][0], torch.zeros(0))
    assert arguments[0] is arguments[1] is arguments[2]
    arguments, _ = with_data(calls["cross"][0], torch.zeros(0))
    assert arguments[0] is not arguments[1]


def test_inputs_are_of_the_dtype_of_the_weights_but_for_whole_numbers():
    call = ((torch.empty(2, 3, 4, 4, device="meta"), torch.ones(2, dtype=torch.int64, device="meta"), "as it is"), {})
    (image, index, text), _ = with_data(call, torch.zeros(0, dtype=torch.bfloat16), channels_last=True)
    assert (image.shape, image.dtype, text) == ((2, 3, 4, 4), torch.bfloat16, "as it is")
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(index, torch.zeros(2, dtype=torch.int64))
    routes = ((torch.empty(3, 2, dtype=torch.int64, device="meta"),), {})
    ((chosen,), _) = with_data(routes, torch.zeros(0), choices=4)
    assert chosen.tolist() == [[0, 1], [2, 3], [0, 1]]  # all experts have something to do


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(12, 20),
        nn.Conv2d(8, 16, 3, groups=2, dtype=torch.float16),
        nn.LSTM(8, 12, num_layers=2, bidirectional=True),
        nn.MultiheadAttention(8, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_copies_are_made_of_the_block_alone(module):
    model = nn.ModuleDict({"it": module})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [layer for layer in layers_of_module(model) if layer.break_even_rank]
    block = random_block([module], CPU)
    for ranks in ({}, {layer: layer.break_even_rank for layer in layers}):
        copy = copy_of(module, ranks, block)
        sizes = sum(parameter.numel() for parameter in copy.parameters())
        assert sizes == sum(p.numel() for p in module.parameters()) - sum(
            layer.num_params - layer.num_low_rank_params(rank) for layer, rank in ranks.items()
        )
        starts = set()
        for parameter in copy.parameters():
            assert parameter.dtype == next(module.parameters()).dtype
            assert parameter.isfinite().all()
            starts.add(parameter.data_ptr())
        assert len(starts) == len(list(copy.parameters()))  # no two weights are in one place
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pivoted_factors_take_their_inputs_from_all_over():
    linear = nn.Linear(300, 200)
    (layer,) = with_pivoted_factors(layers_of_module(nn.ModuleDict({"it": linear})))
    order = copy_of(linear, {layer: 20}, random_block([linear], CPU)).u.order
    assert (order.dtype, order.shape) == (torch.int32, (1, 300))
    assert sorted(order[0].tolist()) == list(range(300)) != order[0].tolist()


def test_an_index_stays_in_the_table():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    calls = calls_of(model, ["0"], (Input((6,), kind="index", high=10),), 2)
    arguments, named = with_data(calls["0"][0], torch.zeros(0))
    assert copy_of(model[0], {}, random_block([model[0]], CPU))(*arguments, **named).shape == (2, 6, 4)
