"""`.pt`, `.pth` and `.bin` files of torch.save: read without running code, a tensor at a time where the file allows.

The zip format (torch 1.6 and later) is opened under FakeTensorMode, which yields shapes and the offset of every
storage in the file but no data (https://docs.pytorch.org/tutorials/unstable/gpu_direct_storage.html). The older
format can only be read whole.
"""

import contextlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lrconvert.checkpoints.checkpoint import Checkpoint
from lrconvert.checkpoints.header import KEY, Header, read_header
from lrconvert.checkpoints.quantized import Quantized, describe
from lrconvert.checkpoints.strided import strided_reader
from lrconvert.checkpoints.torch_load import load_inert, pickled
from lrconvert.checkpoints.unwrap import unwrap
from lrconvert.errors import CheckpointError, UnsafeCheckpointError
from lrconvert.tensors import TensorRef, refs_of


def read_torch(path: Path, key: str | None = None) -> Checkpoint:
    """Open a file written by torch.save.

    Args:
        path: the file.
        key: the key of the state dict in it, where the user chose one.

    Raises:
        UnsafeCheckpointError: reading it would run code.
        CheckpointError: it is damaged, holds no state dict, or is of a kind that lrconvert does not read.
        UsageError: there is no state dict under `key`.
    """
    in_zip = zipfile.is_zipfile(path)
    if not in_zip and _starts_like_a_zip(path):
        raise CheckpointError(f"{path}: the end of the file is missing; download or copy it again")
    if in_zip:
        _refuse_other_archives(path)
    lazy = in_zip
    try:
        content, unopened = load_inert(path, str(path), FakeTensorMode() if lazy else contextlib.nullcontext())
    except UnsafeCheckpointError:
        raise
    except CheckpointError:
        if not lazy:
            raise
        # Some tensors (sparse and quantized ones) have no fake form. The file may be whole all the same.
        lazy = False
        content, unopened = load_inert(path, str(path), contextlib.nullcontext())
    _refuse_packed(path, content)
    try:
        state, notes = unwrap(content, str(path), key)
    except UnsafeCheckpointError:
        raise
    except CheckpointError:
        if unopened:
            raise pickled(str(path), unopened[0]) from None
        raise
    for name, tensor in state.items():
        _refuse_special(path, name, tensor)
    metadata = content if isinstance(content, dict) else {}
    header = read_header(metadata, str(path))
    tensors = _lazy(path, state) if lazy else refs_of(state)
    if unopened:
        shown = ", ".join(unopened[:3]) + (f", … ({len(unopened)} in all)" if len(unopened) > 3 else "")
        notes = (*notes, f"not opened, since that would run code: {shown}")
    if not in_zip:
        notes = (*notes, "written by torch before 1.6: read whole, not a tensor at a time; torch.save it again")
    weights, size = sum(ref.nbytes for ref in tensors.values() if not ref.alias_of), path.stat().st_size
    if size - weights > max(0.1 * size, 1e6):
        notes = (*notes, f"{weights:,} of the file's {size:,} bytes are its weights")
    # Lightning saves the module that trains, and the network is its attribute, most often called so.
    likely = ("model.", "module.") if "pytorch-lightning_version" in metadata else ("module.",)
    return Checkpoint(path, "torch", tensors, header, notes, {path: tuple(tensors)}, likely_prefixes=likely)


def _lazy(path: Path, state: dict[str, Tensor]) -> dict[str, TensorRef]:
    """References to the tensors of a zip file, from the fake tensors it was opened as."""
    refs: dict[str, TensorRef] = {}
    seen: dict[tuple[object, ...], str] = {}
    for key, fake in state.items():
        shape, stride, start = tuple(fake.shape), tuple(fake.stride()), fake.untyped_storage()._checkpoint_offset
        assert isinstance(start, int)
        offset = start + int(fake.storage_offset()) * fake.dtype.itemsize
        first = seen.setdefault((offset, shape, stride), key) if fake.numel() else key
        read = strided_reader(path, offset, shape, stride, fake.dtype)
        refs[key] = TensorRef(shape, fake.dtype, read, None if first == key else first)
    return refs


def write_torch(path: Path, tensors: Iterable[tuple[str, Tensor]], order: Iterable[str], header: Header | None) -> None:
    """Write {"state_dict": …, "lrconvert": header} with torch.save; all tensors are in memory at once."""
    made = {key: _without_surroundings(tensor) for key, tensor in tensors}
    for key, original in (header.shared if header else {}).items():
        made[key] = made[original]
    content: dict[str, Any] = {"state_dict": {key: made[key] for key in order}}
    if header is not None:
        content[KEY] = header.model_dump_json(exclude_defaults=True)
    save_torch(content, path)


def save_torch(content: Any, path: Path) -> None:
    """torch.save, raising OSError for what is the system's fault."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's zip writer hides what the system said, a full disk for one, behind an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _without_surroundings(tensor: Tensor) -> Tensor:
    """`tensor`, copied if its memory is part of more: torch.save would write all of it, for every part."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _starts_like_a_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refuse_other_archives(path: Path) -> None:
    """Raise for a zip file that torch.save did not write, naming what it is."""
    names = names_in_zip(path)
    if any(name.endswith("constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript archive, whose weights are inside its code; write its state dict once with "
            f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path}: a zip file, but not one that torch.save wrote")


def names_in_zip(path: Path) -> list[str]:
    """Names of the records in a zip file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: not a whole torch file ({error}); download or copy it again") from None


def _refuse_packed(path: Path, content: Any) -> None:
    """Raise for what torch's own quantization packs into tuples: they are no tensors, and would only seem missing."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if str(key).endswith("_packed_params"):
            layer = str(key).split("._packed_params")[0]
            raise CheckpointError(describe(path, {layer: Quantized("torch.ao.quantization", str(key))}))
        _refuse_packed(path, value)


def _refuse_special(path: Path, key: str, tensor: Tensor) -> None:
    """Raise for a tensor that is no plain array of numbers."""
    if tensor.is_quantized:
        raise CheckpointError(describe(path, {key: Quantized(f"torch ({tensor.dtype})", key)}))
    if tensor.layout != torch.strided:
        raise CheckpointError(
            f"{path}: '{key}' is sparse; only plain tensors can be factorized: save it with .to_dense()"
        )
    if tensor.is_meta:
        raise CheckpointError(
            f"{path}: '{key}' has no values, it was saved from the meta device: save the model with its weights loaded"
        )
