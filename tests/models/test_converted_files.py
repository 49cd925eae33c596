"""Files of transformers whose tensors are not those of the model: renamed, merged, turned, in several types."""

import copy

import pytest
import torch
from helpers import assert_close
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lrconvert
from lrconvert.errors import CheckpointError

transformers = pytest.importorskip("transformers")
networks = pytest.importorskip("hf_networks")


def stored(folder, change):
    """Change the tensors of a folder's file."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata=metadata)


def test_experts_of_a_sharded_folder(tmp_path):
    """The tensors that make one of the model's lie in several files."""
    dense = networks.build("mixtral")
    dense.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.5", output=tmp_path / "small")
    small, live = lrconvert.load(tmp_path / "small"), lrconvert.factorize(copy.deepcopy(dense), "rank_ratio=0.5")
    assert_close(networks.run(small, tmp_path / "dense"), networks.run(live, tmp_path / "dense"), 1e-5)
    compared = lrconvert.compare(tmp_path / "small", tmp_path / "dense")
    assert not compared.only_first
    assert not compared.only_second


def test_experts_that_are_not_all_there(tmp_path):
    networks.build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = {key: tensor for key, tensor in tensors.items() if ".experts.2." not in key}
    save_file(lost, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj: the checkpoint makes \(3, 192, 64\) of it"):
        lrconvert.analyze(tmp_path)
    # Without the model they are layers of their own.
    (tmp_path / "config.json").unlink()
    assert sum(".experts." in layer.name for layer in lrconvert.analyze(tmp_path).network.layers) == 2 * 3 * 3


def test_experts_of_several_types_become_one(tmp_path):
    networks.build("mixtral").save_pretrained(tmp_path / "dense")
    stored(
        tmp_path / "dense", lambda tensors: {k: v.bfloat16() if ".experts.0." in k else v for k, v in tensors.items()}
    )
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small", exclude=["*down_proj"])
    kept = load_file(tmp_path / "small" / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    dense = lrconvert.load(tmp_path / "dense").get_parameter("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(kept, dense)


def test_experts_that_the_model_has_no_place_for_are_kept(tmp_path):
    networks.build("mixtral").save_pretrained(tmp_path / "dense")
    more = lambda tensors: tensors | {k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items()}  # noqa: E731
    stored(tmp_path / "dense", more)
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small", include=["*q_proj"])
    assert any("unknown to the model" in note for note in record.notes)
    assert more(load_file(tmp_path / "dense" / "model.safetensors")).keys() == {
        key.replace(".u.weight", ".weight")
        for key in load_file(tmp_path / "small" / "model.safetensors")
        if not key.endswith(".v.weight")
    }


def test_experts_stored_the_other_way_round(tmp_path):
    """(experts, in, out) in the file, (experts, out, in) in the model; the keys are the same."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**networks.TEXT, **networks.SIZES, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**text, "num_experts": 4, "moe_intermediate_size": 24},
        vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "dense")

    def turned(tensors):
        return {k: v.mT.contiguous() if ".experts." in k else v for k, v in tensors.items()}

    stored(tmp_path / "dense", turned)
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.5", output=tmp_path / "small")
    assert sum(row.kind == "experts" and row.rank is not None for row in record.layers) == 4
    live = lrconvert.merge(lrconvert.factorize(model, "rank_ratio=0.5")).state_dict()
    merged = lrconvert.merge(lrconvert.load(tmp_path / "small")).state_dict()
    for key in live:
        if ".experts." in key:
            assert_close(merged[key], live[key], 1e-5)


def test_a_factorized_folder_with_experts_apart(tmp_path):
    """As lrconvert wrote them while it left experts as they are in the file."""
    networks.build("mixtral").save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small", exclude=["*experts*"])
    want = networks.run(lrconvert.load(tmp_path / "small"), tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    apart = {key: tensor for key, tensor in dense.items() if ".block_sparse_moe." in key}
    stored(tmp_path / "small", lambda tensors: {k: v for k, v in tensors.items() if ".mlp." not in k} | apart)
    assert_close(networks.run(lrconvert.load(tmp_path / "small"), tmp_path / "dense"), want, 1e-6)
    compared = lrconvert.compare(tmp_path / "small", tmp_path / "dense")
    assert not compared.only_first
    assert not compared.only_second
    assert lrconvert.export(tmp_path / "small", tmp_path / "small.onnx", "onnx").difference < 1e-4


def test_older_names_are_the_models(tmp_path):
    networks.build("bert").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    older = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, path, metadata={"format": "pt"})
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.5", output=tmp_path / "small")
    assert record.order == "execution"
    assert any("read under other names" in note for note in record.notes)
    small = lrconvert.load(tmp_path / "small")
    theirs, found = type(small).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(found.values())
    assert_close(networks.run(small, tmp_path / "dense"), networks.run(theirs, tmp_path / "dense"), 1e-6)
