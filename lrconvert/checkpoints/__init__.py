"""Reading checkpoints lazily and writing them atomically: one file per format, and here the choice between them."""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from lrconvert.checkpoints import folder, hf_config
from lrconvert.checkpoints.atomic import atomic_path, check_writable
from lrconvert.checkpoints.checkpoint import Checkpoint
from lrconvert.checkpoints.header import KEY, WRITTEN_BY, Header
from lrconvert.checkpoints.prefix import fitted, without_wrappers
from lrconvert.checkpoints.pt2_file import is_pt2, read_pt2
from lrconvert.checkpoints.quantized import find_quantized
from lrconvert.checkpoints.safetensors_file import read_safetensors, write_safetensors
from lrconvert.checkpoints.torch_file import names_in_zip, read_torch, write_torch
from lrconvert.errors import CheckpointError, OutputExistsError, UsageError
from lrconvert.rewrite import CPU, Rewrite, aliases_of, converting, layout_of, run

__all__ = [
    "KEY",
    "WRITTEN_BY",
    "Checkpoint",
    "Header",
    "check_output",
    "fitted",
    "open_checkpoint",
    "write_checkpoint",
]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
FILE_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# Files of other worlds that people try, by how they start.
FOREIGN = {
    b"GGUF": "a GGUF file, made for llama.cpp and mostly quantized; factorize the checkpoint that it was made from",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow; give the network's PyTorch checkpoint (.safetensors or .pt)",
}


def open_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: a file, an index of shards, or a folder. No tensor is read and no code is run.

    Args:
        path: file or folder.
        key: which state dict, in a file that wraps one or several ("state_dict", "model.ema"); without it the
            averaged weights are taken where there are any.

    Raises:
        CheckpointError: it is missing, damaged, or of a kind that lrconvert does not read.
        UsageError: there is no state dict under `key`.
    """
    path = Path(path)
    try:
        checkpoint = without_wrappers(hf_config.without_marks(_open(path, key)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if key is not None and checkpoint.format not in ("torch", "pt2"):
        where = "one torch file: name it" if checkpoint.format == "folder" else "files of torch.save, and this is none"
        raise UsageError(f"{path}: --checkpoint-key chooses within {where}")
    quantized = find_quantized(checkpoint.tensors, _folder_of(checkpoint) if checkpoint.format == "folder" else None)
    return replace(checkpoint, quantized=quantized)


def _open(path: Path, key: str | None) -> Checkpoint:
    if path.is_dir():
        return folder.read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: the file is empty; download or save it again")
    if path.name.endswith(folder.INDEX):
        return folder.read_index(path)
    if path.suffix == ".onnx":
        from lrconvert.checkpoints.onnx_file import read_onnx

        return read_onnx(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return read_safetensors(path)
    for magic, what in FOREIGN.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    if zipfile.is_zipfile(path) and is_pt2(names_in_zip(path)):
        return read_pt2(path, key)
    return read_torch(path, key)


def check_output(path: Path, source: Checkpoint | None, overwrite: bool) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Raises:
        UsageError: the name does not say which format to write.
        OutputExistsError: it exists and `overwrite` is False, or is a folder that lrconvert did not write.
    """
    check_writable(path, overwrite)
    if source is not None and source.graph is not None:
        if path.suffix != ".onnx" or path.is_dir():
            raise UsageError(f"{path}: a graph stays a graph; end the output in .onnx")
        return
    if path.suffix in FILE_SUFFIXES:
        if path.is_dir():
            raise OutputExistsError(f"{path} is a folder; choose another output")
        return
    if path.suffix == ".pt2":
        raise UsageError(
            f"{path}: a graph is not rewritten: write {path.stem}.safetensors, then turn that into a graph with "
            "lrconvert export --format pt2"
        )
    if source is None or source.format != "folder":
        raise UsageError(f"{path}: end the output in {' or '.join(FILE_SUFFIXES[:2])} to choose its format")
    if path.resolve().is_relative_to(_folder_of(source).resolve()):
        raise UsageError(f"{path} lies inside {source.path}, which is copied into it; choose another output")
    if path.exists() and not _may_replace(path):
        # Replacing deletes: nothing but our own work is ever deleted.
        raise OutputExistsError(f"{path} is not a folder that lrconvert wrote; choose another output")


def _folder_of(source: Checkpoint) -> Path:
    return source.path if source.path.is_dir() else source.path.parent


def _may_replace(path: Path) -> bool:
    """Whether `path` is an empty folder, or one that lrconvert wrote."""
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        return open_checkpoint(path).header is not None
    except CheckpointError:
        return False


def write_checkpoint(
    path: Path,
    steps: Sequence[Rewrite],
    header: Header | None,
    source: Checkpoint | None = None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    device: torch.device = CPU,
    progress: Callable[[], None] | None = None,
) -> None:
    """Run `steps` and write what they make, in the format that the name of `path` says.

    A path without a suffix is a folder, written when `source` is one: as many shards as it has, with an index, and
    everything in it that is not a weight.

    Args:
        path: file or folder to write.
        steps: what to write.
        header: stored in every weight file.
        source: the checkpoint that the steps read.
        dtype: of all floating-point numbers, where they are to be converted.
        overwrite: replace an existing output.
        device: the device that the steps compute on.
        progress: called after each step.
    """
    check_output(path, source, overwrite)
    if dtype is not None:
        steps = converting(steps, dtype)
    shared = aliases_of(steps)
    order = list(layout_of(steps))
    if header is not None and shared:
        header = header.model_copy(update={"shared": shared})
        steps = [step for step in steps if not shared.keys() & step.outputs.keys()]
    with atomic_path(path, overwrite) as temporary:
        if path.suffix == ".safetensors":
            metadata = source.metadata if source is not None else None
            write_safetensors(temporary, layout_of(steps), run(steps, device, progress), header, metadata)
        elif path.suffix in TORCH_SUFFIXES:
            write_torch(temporary, run(steps, device, progress), order, header)
        else:
            assert source is not None
            _write_folder(temporary, steps, header, source, dtype, device, progress)


def _write_folder(
    path: Path,
    steps: Sequence[Rewrite],
    header: Header | None,
    source: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device,
    progress: Callable[[], None] | None,
) -> None:
    folder.copy_companions(_folder_of(source), path)
    hf_config.write_config(path, header, dtype)
    marks = hf_config.marks(path, header)
    file_of = {key: file for file, keys in source.files.items() for key in keys}
    groups = [[step for step in steps if file_of[step.source] == file] for file in source.files]
    groups = [group for group in groups if group]
    weight_map, total = {}, 0
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        layout, tensors = layout_of(group), run(group, device, progress)
        if number == len(groups):
            layout |= {key: ((0,), dtype) for key, dtype in marks.items()}
            tensors = chain(tensors, ((key, torch.empty(0, dtype=dtype)) for key, dtype in marks.items()))
        write_safetensors(path / name, layout, tensors, header, source.metadata)
        weight_map.update(dict.fromkeys(layout, name))
        total += sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / f"model.safetensors{folder.INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if header is not None and header.plan is not None:
        folder.write_card(path, header)
