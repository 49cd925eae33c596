"""Folders of transformers and of sentence-transformers, distilled into folders."""

import json

import numpy as np
import pytest
import torch

import lrconvert

transformers = pytest.importorskip("transformers")

from hf_networks import SIZES, TEXT  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    """A sentence encoder, factorized beside it, and a file of tokens."""
    model = transformers.BertModel(transformers.BertConfig(**TEXT, **SIZES))
    model.save_pretrained(tmp_path / "dense")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts]
    (tmp_path / "dense" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "dense" / "1_Pooling").mkdir()
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", include=["*encoder*"], output=tmp_path / "small")
    lengths = torch.randint(3, 12, (48, 1))
    mask = (torch.arange(12) < lengths).long()
    np.savez(tmp_path / "tokens.npz", input_ids=torch.randint(99, (48, 12)) * mask, attention_mask=mask)
    return tmp_path


def test_a_folder_becomes_a_folder_that_transformers_loads(folder):
    data, settings = str(folder / "tokens.npz"), {"epochs": 10, "batch_size": 8, "examples": 48, "lr": 5e-3}
    record = lrconvert.distill(folder / "small", folder / "dense", data, output=folder / "better", **settings)
    assert record.error_after < record.error_before
    assert record.compared == "sentence embeddings"
    assert record.blocks == ("encoder.layer.0", "encoder.layer.1")
    assert {path.name for path in (folder / "small").iterdir()} == {path.name for path in (folder / "better").iterdir()}
    loaded = transformers.AutoModel.from_pretrained(folder / "better").eval()
    mine = lrconvert.load(folder / "better")
    ids = torch.randint(99, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, mine(ids).last_hidden_state)
