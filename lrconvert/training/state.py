"""The state of a run on disk: written atomically, read without running code."""

from pathlib import Path
from typing import Any

import torch

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.checkpoints.torch_file import save_torch
from lrconvert.errors import CheckpointError

_VERSION = 1


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what `Engine.state_dict` returned.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    with atomic_path(path, overwrite=True) as temporary:
        save_torch({"version": _VERSION, **state}, temporary)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or another version wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; there is no run to go on with in {path.parent}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not the state of a run ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or state.pop("version", None) != _VERSION:
        raise CheckpointError(f"{path}: not the state of a run that this version of lrconvert can go on with")
    return state
