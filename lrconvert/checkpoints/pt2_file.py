"""`.pt2` archives of torch.export.save, for the weights in them; the graph is neither read nor run.

The archive is a zip file of uncompressed records. `data/weights/NAME_weights_config.json` says for every key which
record its storage is in, with shape, strides and dtype (torch 2.9 and later); before that, the state dict was a file
of torch.save inside the archive.
"""

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lrconvert.checkpoints.checkpoint import Checkpoint
from lrconvert.checkpoints.header import KEY, read_header
from lrconvert.checkpoints.strided import span_of, strided_reader
from lrconvert.checkpoints.torch_load import SAVE_AGAIN, load_inert
from lrconvert.checkpoints.unwrap import unwrap
from lrconvert.errors import CheckpointError, UsageError
from lrconvert.tensors import TensorRef, refs_of

NOTE = "weights of a torch.export archive; its graph is not rewritten"

# torch._export.serde.schema.ScalarType: the numbers are part of the file format.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    29: torch.float8_e4m3fn,
    30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz,
    33: torch.float8_e8m0fnu,
    34: torch.uint32,
    35: torch.uint64,
}
_CONFIG = re.compile(r"(?:.*/)?data/weights/([^/]+)_weights_config\.json")
_NESTED = re.compile(r"(?:.*/)?data/weights/([^/]+)\.pt")
_OLDEST = "serialized_state_dict.pt"
_STRIDED = 7


def is_pt2(names: list[str]) -> bool:
    """Whether a zip file with these records is an archive of torch.export."""
    return any(name.rpartition("/")[2] in ("archive_format", _OLDEST) for name in names)


def read_pt2(path: Path, model: str | None = None) -> Checkpoint:
    """Open the weights of a torch.export archive.

    Args:
        path: the archive.
        model: which of its models, where it holds several.

    Raises:
        CheckpointError: it is damaged, or of a layout that lrconvert does not know.
        UsageError: it holds several models, or not the one that was named.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive, model)
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a whole torch.export archive ({error}); copy it again") from None


def _read(path: Path, archive: zipfile.ZipFile, model: str | None) -> Checkpoint:
    names = archive.namelist()
    extra = next((name for name in names if name.endswith(f"extra/{KEY}") or name == f"extra_files/{KEY}"), None)
    header = read_header({KEY: archive.read(extra).decode()} if extra else None, str(path))
    configs = _by_model(_CONFIG, names)
    nested = _by_model(_NESTED, names) | ({"model": _OLDEST} if _OLDEST in names else {})
    name = _choose(path, {**nested, **configs}, names, model)
    notes: tuple[str, ...] = (NOTE,)
    if name in configs:
        tensors = _tensors(path, archive, configs[name])
    else:
        # Read whole: a torch.save file inside another has no mapping of its own.
        content, _ = load_inert(io.BytesIO(archive.read(nested[name])), str(path), contextlib.nullcontext())
        state, unwrapped = unwrap(content, str(path))
        tensors, notes = refs_of(state), (*notes, *unwrapped, "written by an older torch: read whole")
    return Checkpoint(path, "pt2", tensors, header, notes, {path: tuple(tensors)})


def _by_model(pattern: re.Pattern[str], names: list[str]) -> dict[str, str]:
    return {match[1]: name for name in names if (match := pattern.fullmatch(name))}


def _choose(path: Path, models: Mapping[str, str], names: list[str], wanted: str | None) -> str:
    if not models:
        if any("aotinductor" in name for name in names):
            raise CheckpointError(
                f"{path}: a compiled AOTInductor package; its weights are inside compiled code; give "
                "the checkpoint that it was compiled from"
            )
        raise CheckpointError(f"{path}: a torch.export archive of a layout that lrconvert does not know; {SAVE_AGAIN}")
    if wanted is None and len(models) > 1:
        raise UsageError(f"{path}: holds several models ({', '.join(models)}); choose one with --checkpoint-key")
    if wanted is not None and wanted not in models:
        raise UsageError(f"{path}: no model '{wanted}' in it; known: {', '.join(models)}")
    return wanted or next(iter(models))


def _tensors(path: Path, archive: zipfile.ZipFile, config: str) -> dict[str, TensorRef]:
    """References to the tensors that a config lists; those of one record at one place are marked as shared."""
    try:
        entries = json.loads(archive.read(config))["config"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: {config} cannot be understood ({error}); {SAVE_AGAIN}") from None
    folder = config.rpartition("/")[0]
    refs: dict[str, TensorRef] = {}
    seen: dict[tuple[object, ...], str] = {}
    with path.open("rb") as file:
        for key, entry in entries:
            try:
                shape, stride, offset, dtype = _meta(entry)
                record = archive.getinfo(f"{folder}/{entry['path_name']}")
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: '{key}' is not a plain tensor ({error!r}); {SAVE_AGAIN}") from None
            span = span_of(shape, stride)
            if record.compress_type != zipfile.ZIP_STORED or (span + offset) * dtype.itemsize > record.file_size:
                what = "is shorter than its tensor" if record.compress_type == zipfile.ZIP_STORED else "is compressed"
                raise CheckpointError(f"{path}: the record of '{key}' {what}; write it again with torch.export.save")
            first = _data_offset(file, record) + offset * dtype.itemsize
            same = seen.setdefault((first, shape, stride), key) if span else key
            read = strided_reader(path, first, shape, stride, dtype)
            refs[key] = TensorRef(shape, dtype, read, None if same == key else same)
    return refs


def _meta(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]:
    """(shape, stride, storage offset, dtype) of one entry of a config."""
    meta = entry["tensor_meta"]
    if entry["use_pickle"] or meta["layout"] != _STRIDED:
        raise ValueError("a tensor subclass, or sparse")
    shape, stride = (tuple(int(size["as_int"]) for size in meta[name]) for name in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    if min((*shape, *stride, offset), default=0) < 0 or len(shape) != len(stride):
        raise ValueError("negative sizes")
    return shape, stride, offset, _DTYPES[meta["dtype"]]


def _data_offset(file: Any, record: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed record start: its local header is followed by a name and an extra field."""
    file.seek(record.header_offset + 26)
    lengths = file.read(4)
    return record.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
