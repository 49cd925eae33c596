"""What counts as a layer: exactly from modules, by evidence from files."""

import pytest
import torch
from torch import nn

from lrconvert.layers.survey import layers_of_module, layers_of_tensors


def found(model):
    return {layer.name: layer for layer in layers_of_module(model)}


def guessed(*entries):
    return {layer.name: layer for layer in layers_of_tensors(dict(entries))}


class Standardized(nn.Conv2d):
    """A convolution that changes its weight before use, as timm's StdConv2d does."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Renamed(nn.Linear):
    """A subclass that computes what its base does."""


def test_kinds_and_reasons_in_a_model():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "renamed": Renamed(8, 8),
            "conv": nn.Conv3d(4, 8, 3, groups=2),
            "depthwise": nn.Conv2d(8, 16, 3, groups=8),
            "standardized": Standardized(8, 8, 3),
            "embedding": nn.Embedding(10, 8),
            "lstm": nn.LSTM(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "bn": nn.BatchNorm2d(8),
        }
    )
    layers = found(model)
    assert layers["linear"].kind == layers["renamed"].kind == "linear"
    assert layers["conv"].kind == "conv3d"
    assert layers["conv"].groups == 2
    assert layers["conv"].matrix_shape == (4, 2 * 27)
    assert layers["lstm.weight_ih_l0"].groups == 4
    assert layers["attention.in_proj_weight"].groups == 3
    assert layers["transposed"].kind == "conv_transpose2d"
    assert [name for name, layer in layers.items() if not layer.dense_reason] == [
        "linear",
        "renamed",
        "conv",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj",
        "transposed",
    ]
    expected = {
        "depthwise": "depthwise",
        "standardized": "Standardized changes what Conv2d computes",
        "embedding": "embedding: a table",
        "normed.parametrizations.weight.original1": "parametrized",
    }
    for name, reason in expected.items():
        assert layers[name].dense_reason.startswith(reason), layers[name]
    assert "remove_parametrizations" in layers["normed.parametrizations.weight.original1"].dense_reason


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_old_weight_norm_is_refused_with_the_way_out():
    layers = found(nn.ModuleDict({"it": nn.utils.weight_norm(nn.Linear(8, 8))}))
    assert {layer.kind for layer in layers.values()} == {"parametrized"}
    assert all("remove_weight_norm" in layer.dense_reason for layer in layers.values())


def test_tied_and_shared_weights_are_listed_once_and_stay_dense():
    tied = nn.ModuleDict({"embedding": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    assert list(found(tied)) == ["embedding"]
    layer = nn.Linear(8, 8)
    shared = nn.ModuleDict({"one": layer, "two": layer, "other": nn.Linear(8, 8)})
    assert {name: layer.dense_reason for name, layer in found(shared).items()} == {
        "one": "shared with two",
        "other": "",
    }


def test_a_model_that_is_one_layer_has_the_empty_name():
    (layer,) = layers_of_module(nn.Linear(3, 4))
    assert (layer.name, layer.weight, layer.shape) == ("", "weight", (4, 3))


def test_kinds_guessed_from_a_file():
    layers = guessed(
        ("conv1.weight", (64, 3, 7, 7)),
        ("conv1.bias", (64,)),
        ("audio.weight", (32, 64, 5)),
        ("video.weight", (8, 32, 3, 3, 3)),
        ("fc.weight", (10, 64)),
        ("fc.bias", (10,)),
        ("norm.weight", (64,)),
    )
    assert {name: layer.kind for name, layer in layers.items()} == {
        "conv1": "conv2d",
        "audio": "conv1d",
        "video": "conv3d",
        "fc": "linear",
    }
    assert all(layer.evidence == "shape" and not layer.dense_reason for layer in layers.values())


@pytest.mark.parametrize(
    ("entries", "name", "kind", "reason", "is_guess"),
    [
        ([("word_embeddings.weight", (100, 8))], "word_embeddings", "embedding", "looks like an embedding", True),
        ([("wte.weight", (100, 8))], "wte", "embedding", "looks like an embedding", True),
        ([("dw.weight", (32, 1, 3, 3))], "dw", "conv2d", "depthwise, or a convolution of one input channel", True),
        (
            [("a.weight", (128, 64, 1, 1)), ("b.weight", (128, 4, 3, 3))],
            "b",
            "conv2d",
            "may be grouped (groups=32)",
            True,
        ),
        ([("pos_table", (9, 8))], "pos_table", "parameter", "parameter", False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_file_leaves_open_stays_dense(entries, name, kind, reason, is_guess):
    layer = guessed(*entries)[name]
    assert layer.kind == kind
    assert layer.dense_reason.startswith(reason)
    assert layer.guess is is_guess


def test_evidence_that_clears_a_suspicion():
    # a bias makes a linear layer of what is named like an embedding; equal widths make no group
    assert not guessed(("patch_embed.weight", (8, 9)), ("patch_embed.bias", (8,)))["patch_embed"].dense_reason
    assert not guessed(("a.weight", (64, 3, 3, 3)), ("b.weight", (64, 64, 3, 3)))["b"].dense_reason
    assert not guessed(("a.weight", (256, 64, 1, 1)), ("down.weight", (256, 64, 1, 1)))["down"].dense_reason


def test_all_parameters_with_two_dimensions_are_listed_whatever_they_are():
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(1, 1, 8))
    model.scale = nn.Parameter(torch.zeros(8))
    assert [layer.name for layer in layers_of_module(model)] == ["token"]


@pytest.mark.parametrize(
    ("entries", "name", "kind", "groups"),
    [
        ([("rnn.weight_hh_l0_reverse", (32, 8))], "rnn.weight_hh_l0_reverse", "lstm", 4),
        ([("weight_ih_l1", (24, 5)), ("weight_hh_l1", (24, 8))], "weight_ih_l1", "gru", 3),
        ([("rnn.weight_ih_l0", (8, 5)), ("rnn.weight_hh_l0", (8, 8))], "rnn.weight_ih_l0", "rnn", 1),
        ([("rnn.weight_hh_l0", (32, 3)), ("rnn.weight_hr_l0", (3, 8))], "rnn.weight_hh_l0", "lstm", 4),
        ([("rnn.weight_hh_l0", (32, 3)), ("rnn.weight_hr_l0", (3, 8))], "rnn.weight_hr_l0", "lstm", 1),
        (
            [("attn.in_proj_weight", (24, 8)), ("attn.out_proj.weight", (8, 8))],
            "attn.in_proj_weight",
            "attention",
            3,
        ),
        ([("attn.in_proj_weight", (24, 8)), ("attn.out_proj.weight", (8, 8))], "attn.out_proj", "attention", 1),
        ([("q_proj_weight", (8, 8)), ("out_proj.weight", (8, 8))], "q_proj_weight", "attention", 1),
        ([("c_fc.weight", (8, 32)), ("c_fc.bias", (32,))], "c_fc", "transposed_linear", 1),
        (
            [("c_fc.weight", (8, 32)), ("c_fc.bias", (32,)), ("c_proj.weight", (8, 8)), ("c_proj.bias", (8,))],
            "c_proj",
            "transposed_linear",
            1,
        ),
        ([("up.weight", (64, 32, 2, 2)), ("up.bias", (32,))], "up", "conv_transpose2d", 1),
        ([("up.weight", (64, 8, 2, 2)), ("up.bias", (32,))], "up", "conv_transpose2d", 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_kinds_that_a_file_tells_by_names_and_shapes(entries, name, kind, groups):
    layer = guessed(*entries)[name]
    assert (layer.kind, layer.groups, layer.dense_reason) == (kind, groups, "")
