"""What a network returns, as tensors without the places that belong to no token of the call."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrconvert.inputs import Call


def tensors_in(returned: Any) -> list[Tensor]:
    """The tensors in what a module returned, in their order, out of tuples, lists and dictionaries.

    What other objects hold is left out: a cache of keys and values is no result.
    """
    return [tensor for _, tensor in named_tensors_in(returned)]


def named_tensors_in(returned: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """`tensors_in` with names: "output" alone, "output" and "output1" in a tuple, "logits" or "text.logits" by keys."""
    if isinstance(returned, Tensor):
        return [(name or "output", returned)]
    parts: list[tuple[str, Any]] = []
    if isinstance(returned, Mapping):
        parts = [(f"{name}.{key}" if name else str(key), part) for key, part in returned.items()]
    elif isinstance(returned, list | tuple):
        parts = [(f"{name or 'output'}{number or ''}", part) for number, part in enumerate(returned)]
    return [found for key, part in parts for found in named_tensors_in(part, key)]


def floats_in(returned: Any) -> list[Tensor]:
    """The floating-point tensors among `tensors_in`: logits or hidden states come first."""
    return [tensor for tensor in tensors_in(returned) if tensor.is_floating_point()]


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
