"""Folders of sentence-transformers: what is read of a network's output there."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close

from lrconvert.heads import sentence_head

PARTS = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def folder_with(path, parts=PARTS, **modes):
    modules = [{"path": where, "type": f"sentence_transformers.models.{kind}"} for where, kind in parts]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 3, **modes}))
    return path


def returned():
    return SimpleNamespace(last_hidden_state=torch.randn(2, 4, 3, dtype=torch.float64))


def test_the_mean_of_the_tokens_that_are_shown_at_length_one(tmp_path):
    head = sentence_head(folder_with(tmp_path, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False))
    output = returned()
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    means = torch.stack([output.last_hidden_state[0, :2].mean(0), output.last_hidden_state[1].mean(0)])
    assert_close(head(output, mask), means / means.norm(dim=1, keepdim=True))
    mean = output.last_hidden_state.mean(1)
    assert_close(head(output, None), mean / mean.norm(dim=1, keepdim=True))


def test_the_first_token_as_it_is(tmp_path):
    head = sentence_head(folder_with(tmp_path, PARTS[:2], pooling_mode_cls_token=True))
    output = returned()
    assert torch.equal(head(output, None), output.last_hidden_state[:, 0])


@pytest.mark.parametrize(
    "modes", [{"pooling_mode_max_tokens": True}, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}]
)
def test_other_poolings_have_no_head(tmp_path, modes):
    assert sentence_head(folder_with(tmp_path, **modes)) is None


def test_other_folders_have_no_head(tmp_path):
    assert sentence_head(tmp_path) is None
    (tmp_path / "modules.json").write_text("{}")
    assert sentence_head(tmp_path) is None
    folder_with(tmp_path, [*PARTS, ("3_Dense", "Dense")], pooling_mode_mean_tokens=True)
    assert sentence_head(tmp_path) is None
