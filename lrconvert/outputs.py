"""What a network returns, as tensors without the places that belong to no token of the call."""

from collections.abc import Mapping
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
