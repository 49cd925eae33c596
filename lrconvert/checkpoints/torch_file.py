"""`.pt`, `.pth` and `.bin` files of torch.save: read without running code, a tensor at a time where the file allows.

The zip format (torch 1.6 and later) is opened under FakeTensorMode, which yields shapes and the offset of every
storage in the file but no data (https://docs.pytorch.org/tutorials/unstable/gpu_direct_storage.html). The older
format can only be read whole.
"""

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lrconvert.checkpoints.checkpoint import Checkpoint
from lrconvert.checkpoints.header import KEY, Header, read_header
from lrconvert.checkpoints.unwrap import unwrap
from lrconvert.errors import CheckpointError, UnsafeCheckpointError
from lrconvert.tensors import TensorRef, refs_of

_SAVE_AGAIN = "in the program that made it, write torch.save(model.state_dict(), path)"


def read_torch(path: Path) -> Checkpoint:
    """Open a file written by torch.save.

    Raises:
        UnsafeCheckpointError: reading it would run code.
        CheckpointError: it is damaged, holds no state dict, or is of a kind that lrconvert does not read.
    """
    in_zip = zipfile.is_zipfile(path)
    if not in_zip and _starts_like_a_zip(path):
        raise CheckpointError(f"{path}: the end of the file is missing; download or copy it again")
    if in_zip:
        _refuse_other_archives(path)
    lazy = in_zip
    try:
        content = _load(path, FakeTensorMode() if lazy else contextlib.nullcontext())
    except UnsafeCheckpointError:
        raise
    except CheckpointError:
        if not lazy:
            raise
        # Some tensors (sparse ones) have no fake form. The file may be whole all the same.
        lazy, content = False, _load(path, contextlib.nullcontext())
    state, notes = unwrap(content, str(path))
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: '{key}' is sparse or quantized; only plain tensors can be factorized")
    metadata = content if isinstance(content, dict) else {}
    header = read_header(metadata, str(path))
    tensors = _lazy(path, state) if lazy else refs_of(state)
    if not in_zip:
        notes = (*notes, "written by torch before 1.6: read whole, not a tensor at a time")
    weights, size = sum(ref.nbytes for ref in tensors.values() if not ref.alias_of), path.stat().st_size
    if size - weights > max(0.1 * size, 1e6):
        notes = (*notes, f"{weights:,} of the file's {size:,} bytes are its weights")
    return Checkpoint(path, "torch", tensors, header, notes, {path: tuple(tensors)})


def _load(path: Path, mode: contextlib.AbstractContextManager[Any]) -> Any:
    """What torch.load returns in `mode`, with every failure in one line."""
    try:
        with mode, warnings.catch_warnings():
            # torch warns of what it then refuses, or of costs that do not arise here.
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _explain(path, error) from None
    except Exception as error:
        # Anything may come out of a damaged pickle: an index out of range, a missing attribute, no memory. Only
        # torch's own errors say more than that.
        reason = f" ({str(error).splitlines()[0]})" if isinstance(error, RuntimeError) and str(error) else ""
        raise CheckpointError(
            f"{path}: not a torch file, or a damaged one{reason}; download or copy it again"
        ) from None


def _lazy(path: Path, state: dict[str, Tensor]) -> dict[str, TensorRef]:
    """References to the tensors of a zip file, from the fake tensors it was opened as."""
    refs: dict[str, TensorRef] = {}
    seen: dict[tuple[object, ...], str] = {}
    for key, fake in state.items():
        place = (fake.untyped_storage()._checkpoint_offset, fake.storage_offset(), fake.shape, fake.stride())
        first = seen.setdefault(place, key) if fake.numel() else key
        refs[key] = TensorRef(tuple(fake.shape), fake.dtype, _reader(path, fake), None if first == key else first)
    return refs


def _reader(path: Path, fake: Tensor) -> Any:
    """A function that reads one tensor: the bytes of the file that it spans, and no more."""
    shape, stride, dtype = tuple(fake.shape), fake.stride(), fake.dtype
    start = fake.untyped_storage()._checkpoint_offset
    assert isinstance(start, int)
    first = start + int(fake.storage_offset()) * dtype.itemsize
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if fake.numel() else 0

    def read() -> Tensor:
        if not span:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(span * dtype.itemsize)
        with path.open("rb") as file:
            file.seek(first)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{path}: ends before its tensors do; copy it again")
        return torch.frombuffer(data, dtype=dtype).as_strided(shape, stride).contiguous()

    return read


def write_torch(path: Path, tensors: Iterable[tuple[str, Tensor]], order: Iterable[str], header: Header | None) -> None:
    """Write {"state_dict": …, "lrconvert": header} with torch.save; all tensors are in memory at once."""
    made = dict(tensors)
    for key, original in (header.shared if header else {}).items():
        made[key] = made[original]
    content: dict[str, Any] = {"state_dict": {key: made[key] for key in order}}
    if header is not None:
        content[KEY] = header.model_dump_json(exclude_defaults=True)
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's zip writer hides what the system said, a full disk for one, behind an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _starts_like_a_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refuse_other_archives(path: Path) -> None:
    """Raise for a zip file that torch.save did not write, naming what it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: not a whole torch file ({error}); download or copy it again") from None
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(f"{path}: a TorchScript archive; {_SAVE_AGAIN}")
    if any("archive_format" in name for name in names):
        raise CheckpointError(f"{path}: a torch.export archive; {_SAVE_AGAIN}")
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote")


def _explain(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """What the weights-only unpickler refused, in one line."""
    text = str(error)
    name = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text)
    if name is None:
        reason = text.splitlines()[0] if text else "unreadable pickle"
        return CheckpointError(f"{path}: not a torch file, or a damaged one ({reason}); download or copy it again")
    return UnsafeCheckpointError(
        f"{path}: holds a pickled '{name.group(1)}', and reading that would run code; {_SAVE_AGAIN}"
    )
