"""What tells networks and data from others, and from what they were before, unread: for the keys of a cache."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lrconvert.network import Network
from lrconvert.training.data import DATASETS


def data_key(data: str, data_dir: str | Path) -> dict[str, Any]:
    """What tells the data of a name, file or folder from others, and from what they were before."""
    if data in DATASETS and data != "folder":
        return {"data": data, "data_dir": str(Path(data_dir).resolve())}
    file = data.rpartition(":")[0]
    place = data_dir if data == "folder" else file if file.endswith(".py") else data
    return {"data": data, "data_dir": stamp(Path(place))}


def network_key(network: Network) -> dict[str, Any]:
    """What tells the weights and the architecture of `network` from others; a live model has only its name."""
    checkpoint, architecture = network.checkpoint, network.architecture
    key: dict[str, Any] = {"network": network.name}
    if checkpoint is not None:
        files = sorted(checkpoint.files) or [checkpoint.path]
        # The notes say which of several state dicts was read.
        key |= {"files": [stamp(file) for file in files], "prefix": checkpoint.prefix, "notes": checkpoint.notes}
    if architecture is not None:
        code = architecture.name.rpartition(":")[0]
        key |= {"model": architecture.name, "model_args": repr(sorted(architecture.args.items()))}
        key |= {"code": stamp(Path(code))} if code.endswith(".py") else {}
    return key


def stamp(path: Path) -> list[Any]:
    """What tells a file from what it was before, without reading it: its place, size and time of change.

    Of a folder, those of what lies directly in it count too.
    """
    path = path.resolve()
    if not path.exists():
        return [str(path)]
    status = path.stat()
    if not path.is_dir():
        return [str(path), status.st_size, status.st_mtime_ns]
    inside = sorted([each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in path.iterdir())
    return [str(path), status.st_mtime_ns, hashlib.sha256(json.dumps(inside).encode()).hexdigest()]
