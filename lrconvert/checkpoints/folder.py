"""Folders as Hugging Face libraries write them: one weight file, or shards with an index, and everything else."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from lrconvert.checkpoints.checkpoint import Checkpoint, with_shared
from lrconvert.checkpoints.header import Header
from lrconvert.checkpoints.hf_config import is_transformers
from lrconvert.checkpoints.safetensors_file import read_safetensors
from lrconvert.checkpoints.torch_file import read_torch
from lrconvert.errors import CheckpointError
from lrconvert.tensors import TensorRef

# The weight files looked for, the best first.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# Copies of the dense weights in other formats: a factorized folder must not carry them along.
_WEIGHTS = tuple(
    f"*.{suffix}"
    for suffix in (
        *("safetensors", "bin", "pt", "pth", "ckpt", "pt2", "h5", "keras", "msgpack", "npz", "ot", "gguf", "ggml"),
        *("onnx", "onnx_data", "onnx.data", "tflite", "mlmodel", "mlpackage", "engine", "data-00000-of-*", "ckpt.*"),
    )
)
# The other half of OpenVINO's weights, which are a .bin.
_GRAPHS = ("openvino*.xml",)
# Folders that hold nothing else: exported graphs, Meta's own format, and what training saves on its way.
_FOLDERS = ("onnx", "openvino", "coreml", "tflite", "original", "checkpoint-*", "global_step*")
# What training saves to go on from; it fits the dense parameters only.
_TRAINING = ("optimizer*", "scheduler*", "scaler.pt", "rng_state*", "random_states*", "training_args.bin")
INDEX = ".index.json"


def read_folder(path: Path) -> Checkpoint:
    """Open a folder; the first of `WEIGHT_FILES` that it holds is read.

    Raises:
        CheckpointError: there is no weight file, or a shard is missing.
    """
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        single = [file for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for file in path.glob(pattern)]
        if len(single) != 1:
            what = f"{len(single)} weight files, and no index" if single else "no weight file"
            raise CheckpointError(f"{path}: {what} in this folder; name the file to read")
        found = single[0]
    inner = read_index(found) if found.name.endswith(INDEX) else _read_file(found)
    return replace(inner, path=path, format="folder")


def read_index(path: Path) -> Checkpoint:
    """Open the shards that an index names.

    Raises:
        CheckpointError: the index cannot be read, or names a shard or tensor that is not there.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error})") from None
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise CheckpointError(f"{path}: not an index of shards (its weight_map should name a file for every tensor)")
    shards: dict[str, Checkpoint] = {}
    for name in sorted(set(weight_map.values())):
        shard = path.parent / name
        # By name only: in the Hugging Face cache the shards are links to files elsewhere.
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(f"{path}: names the shard '{name}', which is not beside it; download it again")
        shards[name] = _read_file(shard)
    tensors: dict[str, TensorRef] = {}
    for key, name in weight_map.items():
        if key not in shards[name].tensors:
            raise CheckpointError(f"{path}: says '{key}' is in {name}, but it is not; download both again")
        tensors[key] = shards[name].tensors[key]
    first = next(iter(shards.values()))
    shared = first.header.shared if first.header else {}
    tensors = with_shared(tensors, shared)
    weight_map |= {key: weight_map[original] for key, original in shared.items() if original in weight_map}
    files = {path.parent / name: tuple(key for key, where in weight_map.items() if where == name) for name in shards}
    return Checkpoint(path, "folder", tensors, first.header, first.notes, files, first.metadata)


def _read_file(path: Path) -> Checkpoint:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything of the folder `source` into `target`, but for what `left_behind` names."""
    skipped = {path.name for path in _dense_copies(source)} | {".git"}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return skipped & set(names) if Path(folder) == source else set()

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)


def left_behind(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Notes on what is in a folder, is not read, and is not carried over either."""
    if checkpoint.format != "folder" or not checkpoint.path.is_dir():
        return ()
    read = {path.name for path in checkpoint.files}
    names = sorted(path.name for path in _dense_copies(checkpoint.path) if path.name not in read)
    names = [name for name in names if not name.endswith(INDEX)]
    training = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _TRAINING)]
    copies = [name for name in names if name not in training]
    found = {"other copies of the dense weights": copies, "training state of the dense network": training}
    return tuple(f"{what}, not carried over: {', '.join(some)}" for what, some in found.items() if some)


def _dense_copies(folder: Path) -> set[Path]:
    """Weight files at the top of a folder, their indexes, and folders of nothing else. Other folders hold parts of
    their own (sentence-transformers' Dense layers), and stay.
    """
    files = {path for pattern in (*_WEIGHTS, *_GRAPHS, f"*{INDEX}") for path in folder.glob(pattern)}
    return files | {path for pattern in _FOLDERS for path in folder.glob(pattern) if path.is_dir()}


# How the line begins that a factorized folder has in its README.md.
_NOTE = "> **Low-rank weights.**"


def write_card(path: Path, header: Header) -> None:
    """Say in the folder's README.md what its weights are and what opens them.

    Most libraries would open a factorized folder as the dense architecture, with random weights where factors are.
    """
    assert header.plan is not None
    note = (
        f"{_NOTE} {len(header.plan.low_rank)} layers of this checkpoint are factorized by "
        f"{header.written_by}. Do not open it with `from_pretrained`: the factorized layers would get random weights. "
        "`lrconvert info` describes it, `lrconvert.load(path, model)` loads it, and "
        "`lrconvert export --format dense` turns it back into the dense architecture.\n"
    )
    if is_transformers(path):
        note = (
            f"{_NOTE} {len(header.plan.low_rank)} layers of this checkpoint are factorized by "
            f"{header.written_by}. With `import lrconvert`, `from_pretrained` loads it; without, transformers refuses "
            "it (sizes do not match: do not silence that, or the factorized layers get random weights). "
            "`lrconvert.load(path)` loads it too, `lrconvert info` describes it, and `lrconvert export --format dense` "
            "turns it back into the dense architecture.\n"
        )
    card = path / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    front = ""
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        end = text.index("\n---\n", 4) + len("\n---\n")
        front, text = text[:end], text[end:]
    # A folder that was made of a factorized one says so once.
    kept = "\n".join(line for line in text.split("\n") if not line.startswith(_NOTE)).strip("\n")
    card.write_text(f"{front}\n{note}\n{kept}\n" if kept else f"{front}\n{note}", encoding="utf-8")
