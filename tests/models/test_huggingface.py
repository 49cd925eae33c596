"""transformers' networks: found from their folder, factorized, equal to the merged dense network, ONNX equal."""

import json
import shutil
import sys

import pytest
import torch
from helpers import assert_close

import lrconvert
from lrconvert.errors import ModelError
from lrconvert.exporters.check import tensors_in
from lrconvert.inputs import examples
from lrconvert.layers import LowRank
from lrconvert.models import find_architecture

transformers = pytest.importorskip("transformers")
networks = pytest.importorskip("hf_networks")

# Why layers of each stay dense at rank ratio 1/4, when the first and last need not: reason to number.
DENSE = {
    "bert": {"embedding": 3},
    "gpt2": {"embedding": 1, "shared": 1},
    "llama": {"shared": 1},
    "t5": {"embedding": 2, "shared": 1},
    "whisper": {"embedding": 1, "shared": 1, "WhisperPositionalEmbedding": 1},
    "clip": {"embedding": 3},
}


@pytest.fixture(scope="module", params=networks.NETWORKS)
def network(request, tmp_path_factory):
    """(name, folder with dense, small and merged, record) at rank ratio 1/4 in every layer that can be."""
    folder = tmp_path_factory.mktemp(request.param)
    networks.build(request.param).save_pretrained(folder / "dense")
    record = lrconvert.factorize(
        folder / "dense", "rank_ratio=0.25", output=folder / "small", keep_first=0, keep_last=False
    )
    lrconvert.export(folder / "small", folder / "merged", "dense")
    return request.param, folder, record


def run(model, folder, batch=2):
    inputs = find_architecture(f"hf/{folder}").inputs
    _, named = examples(inputs, batch, torch.float32)
    with torch.no_grad():
        return torch.cat([tensor.flatten() for tensor in tensors_in(model(**named))])


def test_equal_to_the_merged_network(network):
    name, folder, record = network
    assert record.order == "execution"
    assert record.macs_after < record.macs_before
    assert not record.notes
    small, merged, dense = (lrconvert.load(folder / which) for which in ("small", "merged", "dense"))
    assert type(small) is type(merged) is type(networks.NETWORKS[name]())
    assert sum(parameter.numel() for parameter in small.parameters()) == record.num_params_after
    factorized = sum(row.rank is not None for row in record.layers)
    assert sum(isinstance(module, LowRank) for module in small.modules()) == factorized >= 8
    out = run(small, folder / "dense")
    assert_close(out, run(merged, folder / "dense"), 1e-5)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_close(out, run(dense, folder / "dense"), 1e-3)


def test_what_stays_dense_says_why(network):
    name, _, record = network
    reasons = {}
    for row in record.layers:
        if row.rank is None:
            word = row.reason.replace(":", "").split()[0]
            reasons[word] = reasons.get(word, 0) + 1
    assert reasons == DENSE[name]


def test_half_the_rank(network, tmp_path):
    _, folder, _ = network
    lrconvert.factorize(folder / "dense", "rank_ratio=0.5", output=tmp_path / "small")
    small = lrconvert.load(tmp_path / "small")
    out = run(small, folder / "dense")
    assert_close(out, run(lrconvert.merge(small), folder / "dense"), 1e-5)


def test_the_dense_folder_is_loaded_as_transformers_does(network):
    _, folder, _ = network
    mine = lrconvert.load(folder / "dense")
    theirs = type(mine).from_pretrained(folder / "dense")
    assert_close(run(mine, folder / "dense"), run(theirs, folder / "dense"), 1e-6)


def test_onnx_is_equal_to_the_network(network, tmp_path):
    _, folder, _ = network
    record = lrconvert.export(folder / "small", tmp_path / "small.onnx", "onnx")
    assert record.batch_sizes == (1, 3)
    assert record.difference < 1e-4


def test_pt2_is_equal_to_the_network(network, tmp_path):
    name, folder, _ = network
    if name in ("bert", "gpt2", "t5"):  # one of each sort: a second or more each
        assert lrconvert.export(folder / "small", tmp_path / "small.pt2", "pt2").difference < 1e-5
