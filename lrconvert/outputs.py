"""What a network returns, as tensors without the places that belong to no token of the call."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lrconvert.inputs import Call


def floats_in(returned: Any) -> list[Tensor]:
    """The floating-point tensors in what a module returned, in their order: logits or hidden states come first."""
    leaves = tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def token_mask(call: Call, device: torch.device) -> Tensor | None:
    """Which tokens (batch, length) of `call` count, as booleans on `device`; None where it does not say."""
    mask = call.kwargs.get("attention_mask")
    return mask.to(device).bool() if mask is not None and mask.dim() == 2 else None


def shown(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The places (tokens, …) of a tensor (batch, length, …) that the mask (batch, length) shows.

    A tensor that has no place for each token, or of which that is not sure, comes back as it is.
    """
    # (batch, length) alone could be logits of as many classes as there are tokens.
    return tensor if mask is None or tensor.dim() < 3 or tensor.shape[:2] != mask.shape else tensor[mask]


def shown_rows(leading: Sequence[int], mask: Tensor | None) -> Tensor | None:
    """Which rows of a tensor (*leading, channels), seen as (rows, channels), the mask (batch, length) shows.

    Args:
        leading: (batch, length, …), or (batch · length,), as transformers' Conv1D computes.
        mask: see `token_mask`.

    Returns:
        Their numbers; None for all, also where there is not a row for each token.
    """
    if mask is None or tuple(leading[:2]) not in (tuple(mask.shape), (mask.numel(),)):
        return None
    return mask.flatten().repeat_interleave(math.prod(leading[2:])).nonzero().flatten()
