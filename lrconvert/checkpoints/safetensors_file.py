"""safetensors files: read a tensor at a time, written as a stream.

The safetensors library writes a file from tensors that are all in memory. A checkpoint larger than memory needs them
written one by one, which the format makes easy: 8 bytes of length, a JSON header, then the data
(https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrconvert.checkpoints.checkpoint import Checkpoint, with_shared
from lrconvert.checkpoints.header import KEY, Header, read_header
from lrconvert.errors import CheckpointError
from lrconvert.tensors import TensorRef

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file; only its header is read.

    Raises:
        CheckpointError: the file is not a whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: _ref(path, key, file) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from None
    header = read_header(metadata, str(path))
    other = {key: value for key, value in (metadata or {}).items() if key not in ("format", KEY)}
    # The library's own save_model leaves a tied tensor out and notes the key that it kept.
    noted = {key: kept for key, kept in other.items() if kept in tensors and key not in tensors}
    tensors = with_shared(tensors, header.shared if header else noted)
    other = {key: value for key, value in other.items() if key not in noted}
    return Checkpoint(path, "safetensors", tensors, header, files={path: tuple(tensors)}, metadata=other)


def _ref(path: Path, key: str, file: safe_open) -> TensorRef:
    part = file.get_slice(key)
    name = part.get_dtype()
    if name not in DTYPES:
        raise CheckpointError(f"{path}: '{key}' has the type {name}, which lrconvert does not read")

    def read() -> Tensor:
        # Opened anew for every tensor: pages of a mapping stay resident for as long as it lives.
        with safe_open(path, "pt") as fresh:
            tensor: Tensor = fresh.get_tensor(key)
            return tensor

    return TensorRef(tuple(part.get_shape()), DTYPES[name], read)


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    header: Header | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file in one pass over `tensors`.

    Args:
        path: a path that does not exist yet.
        layout: (shape, dtype) of every tensor by key, in the order of the file.
        tensors: (key, tensor), each key of `layout` once, in any order.
        header: goes into the metadata.
        metadata: more entries of the metadata, from the file that this one is made from.
    """
    # The largest element size first keeps every tensor aligned, as the safetensors library writes them.
    ordered = sorted(layout.items(), key=lambda item: -item[1][1].itemsize)
    about = {**(metadata or {}), "format": "pt"}
    if header is not None:
        about[KEY] = header.model_dump_json(exclude_defaults=True)
    entries: dict[str, object] = {"__metadata__": about}
    offsets: dict[str, int] = {}
    end = 0
    for key, (shape, dtype) in ordered:
        if dtype not in _NAMES:
            raise CheckpointError(f"{path}: '{key}' is {dtype}, which safetensors cannot hold; write a .pt file")
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        offsets[key] = start
        entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    missing = set(layout)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key, tensor in tensors:
            shape, dtype = layout[key]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise AssertionError(f"{key}: {tuple(tensor.shape)} {tensor.dtype} was announced as {shape} {dtype}")
            missing.remove(key)
            file.seek(8 + len(text) + offsets[key])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if missing:
        raise AssertionError(f"announced but never written: {sorted(missing)}")
