"""Writing so that an interrupted run leaves the old file or none, never half of one."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrconvert.errors import CheckpointError, OutputExistsError


def check_writable(path: Path, overwrite: bool) -> None:
    """Refuse an output that could not be written; call it before long work.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False.
        CheckpointError: the folder it should go into is missing.
    """
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another output or add --overwrite")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; create it first")


@contextmanager
def atomic_path(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or folder to; it takes `path`'s place when the block ends well.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False.
        CheckpointError: the disk is full, the folder is missing, or writing failed otherwise.
    """
    check_writable(path, overwrite)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot be written to ({error.strerror})") from None
    try:
        new = temporary / path.name
        yield new
        _sync(temporary)
        # Files that were written beside it (weights of a large ONNX graph) go first: they are nothing without it.
        for companion in temporary.iterdir():
            if companion != new:
                companion.replace(path.parent / companion.name)
        _replace(new, path, aside=temporary / "old")
        _sync_one(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: {_why(error)}; nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, path: Path, aside: Path) -> None:
    if not path.is_dir():
        new.replace(path)
        return
    # A folder cannot be replaced by one rename: the old one steps aside, and comes back should the second one fail.
    path.rename(aside)
    try:
        new.replace(path)
    except OSError:
        aside.rename(path)
        raise


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full or the file too large ({error.strerror})"
    return f"could not be written ({error.strerror or error})"


def _sync(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync_one(each)


def _sync_one(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
