"""Finding the state dict inside what training scripts save around it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrconvert.checkpoints.torch_load import Opaque, pickled
from lrconvert.errors import CheckpointError, UsageError

# The averaged weights come first: they are the ones that were evaluated (timm does the same).
AVERAGED = (
    "state_dict_ema",
    "model_ema",
    "model_ema_state_dict",
    "ema_state_dict",
    "ema_model",
    "params_ema",
    "ema",
)
PLAIN = (
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
WRAPPERS = (*AVERAGED, *PLAIN)
# Tensors under such keys are no weights.
_NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "loss", "callback", "metric")


def unwrap(content: Any, where: str, key: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in `content` and one note for every step taken to get there.

    Args:
        content: what torch.load returned.
        where: the file, for messages.
        key: the key of the state dict, or its path ("model.ema"), where the user chose it.

    Raises:
        CheckpointError: there is no state dict in it, or there are several that only the user can choose from.
        UsageError: there is none under `key`.
    """
    notes: list[str] = []
    if key is not None:
        content = _at(content, key, where)
        notes.append(f"read from '{key}'")
    while isinstance(content, Mapping):
        wrapper = _choose(content, where)
        if wrapper is None:
            break
        notes.append(_note(content, wrapper))
        content = content[wrapper]
    tensors = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{where}: no tensors in it; save a state dict with torch.save(model.state_dict(), path)")
    other = {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}
    for value in other.values():
        if isinstance(value, Opaque):
            # Among the weights it may well be one of them: leaving it out would lose it.
            raise pickled(where, value.path)
    if other:
        notes.append(f"not tensors, left behind: {', '.join(other)}")
    return tensors, tuple(notes)


def _choose(content: Mapping[Any, Any], where: str) -> str | None:
    """The key of `content` that the state dict is under, or None when `content` is the state dict."""
    found = [key for key in WRAPPERS if _holds_tensors(content.get(key))]
    for key in PLAIN:
        if not found and isinstance(content.get(key), Opaque):
            raise pickled(where, content[key].path)
    if found:
        plain = [key for key in found if key in PLAIN]
        # An average of the parameters alone, without running statistics, is no network.
        complete = [key for key in found if not plain or _count(content[key]) >= _count(content[plain[0]])]
        return complete[0]
    if any(isinstance(value, Tensor) for value in content.values()):
        return None
    others = [
        key for key, value in content.items() if isinstance(key, str) and _is_weights(key) and _holds_tensors(value)
    ]
    if len(others) > 1:
        raise CheckpointError(f"{where}: holds several state dicts ({', '.join(others)}); choose with --checkpoint-key")
    return others[0] if others else None


def _note(content: Mapping[Any, Any], wrapper: str) -> str:
    left = [_described(key, value) for key, value in content.items() if key not in (wrapper, "lrconvert")]
    note = f"read from '{wrapper}'"
    twins = [key for key in WRAPPERS if key != wrapper and _holds_tensors(content.get(key))]
    if wrapper in AVERAGED and twins:
        note += f", the averaged weights (--checkpoint-key {twins[0]} reads the others)"
    elif twins:
        lacking = " and is incomplete" if _count(content[twins[0]]) < _count(content[wrapper]) else ""
        note += f" (there is '{twins[0]}' too{lacking}: --checkpoint-key {twins[0]} reads it)"
    return note + (f"; left behind: {', '.join(left)}" if left else "")


def _described(key: Any, value: Any) -> str:
    return f"{key} ({value.path}, not opened)" if isinstance(value, Opaque) else str(key)


def _at(content: Any, key: str, where: str) -> Any:
    """What `content` holds under a key, or under keys joined by dots; keys may have dots of their own."""
    found = _descend(content, key)
    if not isinstance(found, Mapping):
        items = content.items() if isinstance(content, Mapping) else ()
        known = ", ".join(str(name) for name, value in items if _holds_tensors(value))
        raise UsageError(f"{where}: no state dict under '{key}'; known: {known or 'none, it is not wrapped'}")
    return found


def _descend(content: Any, key: str) -> Any:
    if not key or not isinstance(content, Mapping):
        return None if key else content
    for name, value in content.items():
        if key == name or key.startswith(f"{name}."):
            found = _descend(value, key[len(str(name)) + 1 :])
            if found is not None:
                return found
    return None


def _is_weights(key: str) -> bool:
    return not any(word in key.lower() for word in _NOT_WEIGHTS)


def _count(value: Any) -> int:
    """Tensors in a mapping, however deep."""
    if not isinstance(value, Mapping):
        return 0
    return sum(1 if isinstance(item, Tensor) else _count(item) for item in value.values())


def _holds_tensors(value: Any) -> bool:
    """Whether `value` is a mapping with a tensor in it, perhaps one wrapper further down."""
    return isinstance(value, Mapping) and any(
        isinstance(item, Tensor) or (key in WRAPPERS and _holds_tensors(item)) for key, item in value.items()
    )
