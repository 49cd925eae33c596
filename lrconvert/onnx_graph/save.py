"""Writing a graph, with its large tensors in a file beside it where one message could not hold them.

A protobuf message holds at most 2 GB, so larger graphs keep their data in NAME.onnx.data
(https://github.com/onnx/onnx/blob/main/docs/ExternalData.md).
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from onnx import ModelProto, TensorProto

from lrconvert.onnx_graph.graph import Draft
from lrconvert.onnx_graph.scopes import scopes_of
from lrconvert.onnx_graph.tensors import bytes_of, data_place, is_external, nbytes_of
from lrconvert.rewrite import CPU, run

# Bytes of tensors that a graph may hold itself; the rest of a message needs room too.
INLINE_LIMIT = 1_900_000_000
# Smaller tensors stay in the graph, where shape inference finds them; onnx has the same limit.
_SMALL = 1024
# Memory maps want tensors at multiples of a page.
_ALIGNMENT = 4096
_CHUNK = 1 << 24


def data_path(path: Path) -> Path:
    """The file for what does not fit into the graph at `path`."""
    return path.with_name(path.name + ".data")


def save(
    draft: Draft, path: Path, device: torch.device = CPU, progress: Callable[[], None] | None = None
) -> ModelProto:
    """Compute what is missing in `draft` and write it, tensor by tensor; what is external stays so.

    Args:
        draft: used up by this.
        path: a path that does not exist yet; external data goes to `data_path(path)`.
        device: the device that the steps compute on.
        progress: called after each step.
    """
    pending = {id(tensor) for _, tensor in draft.targets.values()}
    scopes = scopes_of(draft.model)
    constants = [(value.graph, value.tensor) for value in scopes.values if value.tensor is not None]
    others = [(graph, tensor) for graph, tensor in constants if id(tensor) not in pending]
    total = sum(nbytes_of(tensor) for _, tensor in others)
    total += sum(
        torch.Size(shape).numel() * dtype.itemsize for step in draft.steps for shape, dtype in step.outputs.values()
    )
    main = draft.model.graph
    if total <= INLINE_LIMIT and not any(is_external(tensor) for _, tensor in constants):
        for key, made in run(draft.steps, device, progress):
            _put_inside(draft.targets[key][1], bytes_of(made))
    else:
        with data_path(path).open("wb") as file:
            for graph, tensor in others:
                if is_external(tensor):
                    _copy(tensor, draft.folder, file)
                elif graph is main and nbytes_of(tensor) >= _SMALL and tensor.HasField("raw_data"):
                    _put_outside(tensor, tensor.raw_data, file)
            for key, made in run(draft.steps, device, progress):
                graph, tensor = draft.targets[key]
                data = bytes_of(made)
                if graph is main and len(data) >= _SMALL:
                    _put_outside(tensor, data, file)
                else:
                    _put_inside(tensor, data)
    path.write_bytes(draft.model.SerializeToString())
    return draft.model


def _clear(tensor: TensorProto) -> None:
    """Leave nothing but name, shape and type."""
    bare = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, doc_string=tensor.doc_string)
    tensor.CopyFrom(bare)


def _put_inside(tensor: TensorProto, data: bytes) -> None:
    _clear(tensor)
    tensor.raw_data = data


def _put_outside(tensor: TensorProto, data: bytes, file: BinaryIO) -> None:
    start = _aligned(file)
    file.write(data)
    _point(tensor, file, start, len(data))


def _copy(tensor: TensorProto, folder: Path, file: BinaryIO) -> None:
    source, offset, left = data_place(tensor, folder, tensor.name)
    start, length = _aligned(file), left
    with source.open("rb") as original:
        original.seek(offset)
        while left:
            chunk = original.read(min(left, _CHUNK))
            file.write(chunk)
            left -= len(chunk)
    _point(tensor, file, start, length)


def _aligned(file: BinaryIO) -> int:
    """Pad `file` to the next boundary and say where that is."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    return file.tell()


def _point(tensor: TensorProto, file: BinaryIO, start: int, length: int) -> None:
    """Make `tensor` say where its data is."""
    _clear(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", Path(file.name).name), ("offset", str(start)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
