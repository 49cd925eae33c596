"""Finding the state dict inside what training scripts save around it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrconvert.errors import CheckpointError

# The averaged weights come first: they are the ones that were evaluated (timm does the same).
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "network",
    "net",
    "params",
    "weights",
)
PREFIXES = ("module.", "_orig_mod.")


def unwrap(content: Any, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in `content` and one note for every step taken to get there.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    notes: list[str] = []
    while isinstance(content, Mapping):
        wrapper = next((key for key in WRAPPERS if _holds_tensors(content.get(key))), None)
        if wrapper is None:
            break
        left = [str(key) for key in content if key not in (wrapper, "lrconvert")]
        notes.append(f"read from '{wrapper}'" + (f"; left behind: {', '.join(left)}" if left else ""))
        content = content[wrapper]
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if (isinstance(content, Mapping))
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{where}: no tensors in it; save a state dict with torch.save(model.state_dict(), path)")
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        notes.append(f"not tensors, left behind: {', '.join(other)}")
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
            notes.append(f"prefix '{prefix}' removed from every key")
    return tensors, tuple(notes)


def _holds_tensors(value: Any) -> bool:
    """Whether `value` is a mapping with a tensor in it, perhaps one wrapper further down."""
    return isinstance(value, Mapping) and any(
        isinstance(item, Tensor) or (key in WRAPPERS and _holds_tensors(item)) for key, item in value.items()
    )
