"""ONNX tensors as torch tensors, read one at a time; those in a file beside the graph are read only when asked for.

External data: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from lrconvert.errors import CheckpointError
from lrconvert.tensors import TensorRef

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.UINT32: torch.uint32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def is_external(tensor: TensorProto) -> bool:
    """Whether the data is in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def nbytes_of(tensor: TensorProto) -> int:
    """Size of the data."""
    if is_external(tensor):
        return int(_external(tensor).get("length", 0)) or _numel(tensor) * DTYPES[tensor.data_type].itemsize
    return int(tensor.ByteSize())


def data_place(tensor: TensorProto, folder: Path, where: str) -> tuple[Path, int, int]:
    """(file, first byte, number of bytes) of a tensor outside the graph.

    Raises:
        CheckpointError: the file is missing, too short, or not inside the graph's folder.
    """
    entries = _external(tensor)
    path = (folder / entries.get("location", "")).resolve()
    # A graph is data from somewhere else: it may not name any file it likes.
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise CheckpointError(
            f"{where}: the data of '{tensor.name}' should be in '{entries.get('location', '')}' beside the graph, and "
            "is not there; copy that file too"
        )
    start, length = int(entries.get("offset", 0)), nbytes_of(tensor)
    if path.stat().st_size < start + length:
        raise CheckpointError(f"{path}: ends before the tensors of {where} do; copy it again")
    return path, start, length


def read_tensor(tensor: TensorProto, folder: Path, where: str) -> Tensor:
    """The data of `tensor`, in its own shape and dtype.

    Raises:
        CheckpointError: its data is missing or has another size than its shape says.
    """
    dtype = DTYPES[tensor.data_type]
    if is_external(tensor):
        path, start, length = data_place(tensor, folder, where)
        with path.open("rb") as file:
            file.seek(start)
            data = bytearray(file.read(length))
    elif tensor.HasField("raw_data"):
        data = bytearray(tensor.raw_data)
    else:
        try:
            data = bytearray(np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes())
        except ValueError as error:
            raise CheckpointError(
                f"{where}: '{tensor.name}' cannot be read ({error}); export the graph again"
            ) from None
    if len(data) != _numel(tensor) * dtype.itemsize:
        raise CheckpointError(
            f"{where}: '{tensor.name}' has {len(data)} bytes, its shape {tuple(tensor.dims)} asks for "
            f"{_numel(tensor) * dtype.itemsize}; export the graph again"
        )
    return torch.frombuffer(data, dtype=dtype).reshape(tuple(tensor.dims)) if data else torch.empty(0, dtype=dtype)


def ref_of(tensor: TensorProto, folder: Path, where: str) -> TensorRef:
    """A reference to `tensor` as it is stored."""
    return TensorRef(tuple(tensor.dims), DTYPES[tensor.data_type], lambda: read_tensor(tensor, folder, where))


def announce(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorProto:
    """A tensor without data, to be filled when it is saved."""
    return TensorProto(name=name, dims=shape, data_type=NUMBERS[dtype])


def bytes_of(tensor: Tensor) -> bytes:
    """The data as ONNX stores it: row by row, little-endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _numel(tensor: TensorProto) -> int:
    return torch.Size(tuple(tensor.dims)).numel()
