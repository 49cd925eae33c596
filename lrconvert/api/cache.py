"""What was computed before, found again by what it was computed from: in memory, and in a folder where one is given.

A file of the folder is named by a hash of its key and holds the key itself, and a hash of its contents. A file that is
damaged, or that something else wrote (another version of lrconvert, too), counts as missing and is written anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrconvert.checkpoints import WRITTEN_BY
from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.errors import CheckpointError, UsageError

# What a result follows from: anything that JSON can hold.
Key = Mapping[str, Any]


class Cache:
    """Results by key. Without a folder they last as long as this object.

    Args:
        folder: where results are kept for other runs; made if it is missing.

    Raises:
        UsageError: `folder` is a file.
        CheckpointError: it cannot be made.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[str, Any] = {}
        if self.folder is not None:
            if self.folder.exists() and not self.folder.is_dir():
                raise UsageError(f"{self.folder} is a file, and a cache is a folder: name another one")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.folder}: cannot be made ({error.strerror})") from None

    def numbers(self, what: str, key: Key, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, or returned when it was last called for `what` and `key`: plain data, as JSON."""
        return self._found(what, key, compute, ".json", _read_numbers, _write_numbers)

    def tensors(self, what: str, key: Key, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Likewise tensors by name, on the CPU, in a safetensors file."""
        return self._found(what, key, compute, ".safetensors", _read_tensors, _write_tensors)

    def _found(
        self,
        what: str,
        key: Key,
        compute: Callable[[], Any],
        suffix: str,
        read: Callable[[Path, str], Any],
        write: Callable[[Path, str, Any], None],
    ) -> Any:
        text = json.dumps({"by": WRITTEN_BY, "what": what, **key}, sort_keys=True)
        if text in self._known:
            return self._known[text]
        path = None if self.folder is None else self.folder / f"{what}-{_hash(text.encode())[:32]}{suffix}"
        value = None if path is None else read(path, text)
        if value is None:
            value = compute()
            if path is not None:
                with atomic_path(path, overwrite=True) as temporary:
                    write(temporary, text, value)
        self._known[text] = value
        return value


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_numbers(path: Path, key: str) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        value = stored["value"]
        intact = stored["key"] == key and stored["sha256"] == _hash(_text(value).encode())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if intact else None


def _write_numbers(path: Path, key: str, value: dict[str, Any]) -> None:
    stored = {"key": key, "sha256": _hash(_text(value).encode()), "value": value}
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _read_tensors(path: Path, key: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None
    return tensors if stored.get("key") == key and stored.get("sha256") == _tensor_hash(tensors) else None


def _write_tensors(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    # Parts of one tensor would be stored as one.
    apart = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(apart, path, metadata={"key": key, "sha256": _tensor_hash(apart)})


def _tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    return _hash(*(part for name in sorted(tensors) for part in (name.encode(), tensors[name].numpy().tobytes())))
