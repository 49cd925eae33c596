"""What the user of a network reads of its output, where a folder says it: sentence-transformers' pooled embeddings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrconvert.errors import ModelError

# From what a network returned and the mask of the call's tokens, if it has one: the tensor that its user reads.
Head = Callable[[Any, Tensor | None], Tensor]

_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def sentence_head(folder: Path) -> Head | None:
    """The head that makes embeddings (batch, d) of sentences as the modules.json of `folder` says.

    Returns:
        None where there is no modules.json, or one with other parts than a transformer, a pooling of one kind (the mean
        of tokens, or the first one) and a normalization.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return None
        config = json.loads((folder / modules[1]["path"] / "config.json").read_text(encoding="utf-8"))
        modes = [mode for mode, wanted in config.items() if mode.startswith("pooling_mode_") and wanted]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # A folder of another library, or a damaged one: its weights are all that is needed.
        return None
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        return None
    pooling, normalized = _POOLINGS[modes[0]], len(kinds) == 3

    def head(returned: Any, mask: Tensor | None) -> Tensor:
        hidden = getattr(returned, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise ModelError(f"{folder} makes embeddings of sentences, but its model returns no hidden states")
        pooled = hidden[:, 0] if pooling == "cls" else _mean(hidden, mask)
        return functional.normalize(pooled, dim=-1) if normalized else pooled

    return head


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (batch, d) of the tokens (batch, length, d) that the mask (batch, length) shows."""
    if mask is None:
        return hidden.mean(dim=1)
    shown = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.sum(hidden * shown, dim=1) / shown.sum(dim=1).clamp(min=1)
