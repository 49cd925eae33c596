"""torch.load for files that hold more than tensors, and still without running anything that is stored in them.

Training scripts save their arguments, callbacks and random states beside the weights. torch's weights-only reader
refuses a file with any class that it does not know. Here such a class is replaced by an inert one that ignores
whatever it is given, still under torch's reader: the weights are read, and the rest is never built.
"""

import contextlib
import pickle
import re
import warnings
from pathlib import Path
from typing import IO, Any

import torch

from lrconvert.errors import CheckpointError, UnsafeCheckpointError

SAVE_AGAIN = "in the program that made it, write torch.save(model.state_dict(), path)"

# A file that calls these is not a training script's: it is refused although nothing of it would run.
_HOSTILE_MODULES = {"subprocess", "shutil", "runpy", "importlib", "ctypes", "socket", "pty", "code", "webbrowser", "nt"}
_HOSTILE_BUILTINS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}
_MOST_CLASSES = 200


class Opaque:
    """Stands where the file holds an object of a class that is not read. Subclasses carry that class's name."""

    path = ""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_inert(
    source: Path | IO[bytes], where: str, mode: contextlib.AbstractContextManager[Any]
) -> tuple[Any, list[str]]:
    """What torch.load returns in `mode`, and the classes whose objects are `Opaque` in it.

    Args:
        source: the file.
        where: its name, for messages.
        mode: entered around the load.

    Raises:
        UnsafeCheckpointError: it would run code that no training script stores.
        CheckpointError: it is damaged.
    """
    stand_ins: dict[str, type] = {}
    while True:
        try:
            return _load(source, where, mode, stand_ins), list(stand_ins)
        except pickle.UnpicklingError as error:
            if not _add_stand_in(stand_ins, str(error)):
                raise _explain(where, error, stand_ins) from None


def pickled(where: str, name: str) -> UnsafeCheckpointError:
    """The error for a file whose weights are inside an object of the class `name`."""
    return UnsafeCheckpointError(f"{where}: holds a pickled '{name}', and reading that would run code; {SAVE_AGAIN}")


def _load(
    source: Path | IO[bytes], where: str, mode: contextlib.AbstractContextManager[Any], stand_ins: dict[str, type]
) -> Any:
    if not isinstance(source, Path):
        source.seek(0)
    allowed = torch.serialization.safe_globals([(value, name) for name, value in stand_ins.items()])
    try:
        with mode, allowed, warnings.catch_warnings():
            # torch warns of what it then refuses, or of costs that do not arise here.
            warnings.simplefilter("ignore")
            return torch.load(source, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # Anything may come out of a damaged pickle: an index out of range, a missing attribute, no memory. Only
        # torch's own errors say more than that.
        reason = f" ({str(error).splitlines()[0]})" if isinstance(error, RuntimeError) and str(error) else ""
        raise CheckpointError(
            f"{where}: not a torch file, or a damaged one{reason}; download or copy it again"
        ) from None


def _add_stand_in(stand_ins: dict[str, type], refusal: str) -> bool:
    """Add what the weights-only reader missed; False when it refuses for another reason."""
    missing = re.search(r"GLOBAL ([\w.]+) was not an allowed global", refusal)
    if missing:
        path = _full(missing[1])
        if path in stand_ins or len(stand_ins) >= _MOST_CLASSES or _is_hostile(path):
            return False
        module, _, name = path.rpartition(".")
        stand_ins[path] = type(name, (Opaque,), {"path": path, "__module__": module})
        return True
    # Subclasses of dict and list are filled item by item, which the reader does for plain ones only.
    filled = re.search(r"Can only (SETITEM|append|extend).*but got <class '([\w.]+)'>", refusal, re.DOTALL)
    path = _full(filled[2]) if filled else ""
    if filled and issubclass(stand_ins.get(path, object), Opaque):
        plain = dict if filled[1] == "SETITEM" else list
        stand_ins[path] = type(path.rpartition(".")[2], (), {"__new__": lambda cls, *args: plain()})
        return True
    return False


def _full(path: str) -> str:
    """With its module: torch's messages leave that of builtins out."""
    return path if "." in path else f"builtins.{path}"


def _is_hostile(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return module.split(".")[0] in _HOSTILE_MODULES or (module == "builtins" and name in _HOSTILE_BUILTINS)


def _explain(where: str, error: pickle.UnpicklingError, stand_ins: dict[str, type]) -> CheckpointError:
    """What the weights-only unpickler refused, in one line."""
    text = str(error)
    name = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text)
    if name is not None:
        return pickled(where, name[1])
    if stand_ins:
        return pickled(where, next(iter(stand_ins)))
    if "torch.distributed" in text:
        return CheckpointError(f"{where}: holds distributed tensors; gather them before saving, and {SAVE_AGAIN}")
    reason = text.splitlines()[0] if text else "unreadable pickle"
    return CheckpointError(f"{where}: not a torch file, or a damaged one ({reason}); download or copy it again")
