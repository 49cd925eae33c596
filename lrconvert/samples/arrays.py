"""Calls with inputs that are tensors already, from a file of numpy, torch or safetensors."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrconvert.errors import LrconvertError, UnsafeCheckpointError
from lrconvert.samples.wanted import Found, Wanted, are_inputs, as_call, cut, part

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")

# As numpy.savez calls arrays that it is given no name for.
_UNNAMED = re.compile(r"arr_(\d+)")


def read_arrays(path: Path, wanted: Wanted) -> Found:
    """Inputs from a file in which the first dimension of every tensor is the examples.

    - .npz, .npy, .safetensors: a single array is the positional input, whatever it is called; several are named
      inputs, unless numpy numbered them (arr_0, arr_1, …): then they are positional, in that order.
    - .pt, .pth: a tensor or a tuple of tensors are positional inputs, a dict of tensors named ones.

    Nothing that is stored in a file is run.

    Raises:
        LrconvertError: the file cannot be read, or holds something else.
    """
    call = as_call(_READERS[path.suffix](path), str(path))
    chosen = wanted.choose(call.size, str(path))
    calls = tuple(cut(part(call, chosen), wanted.batch_size))
    return Found(calls, f"{len(chosen):,} examples of {path}, out of {call.size:,}")


def _read_numpy(path: Path) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return torch.from_numpy(loaded)
        with loaded:
            return _by_name({name: torch.from_numpy(loaded[name]) for name in loaded.files}, path)
    except LrconvertError:
        raise
    except TypeError as error:
        raise LrconvertError(f"{path}: arrays must be of numbers ({error})") from error
    except Exception as error:  # zipfile's, zlib's and numpy's own ways to fail
        raise LrconvertError(f"{path}: not a file of numpy's, or damaged ({error}); save plain arrays") from error


def _read_safetensors(path: Path) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    try:
        return _by_name(load_file(path), path)
    except (SafetensorError, OSError) as error:
        raise LrconvertError(f"{path}: not a whole safetensors file ({error})") from error


def _by_name(tensors: dict[str, Tensor], path: Path) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
    if not tensors:
        raise LrconvertError(f"{path}: holds no arrays")
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    numbers = [_UNNAMED.fullmatch(name) for name in tensors]
    if all(numbers):
        return tuple(tensors[name] for name in sorted(tensors, key=lambda name: int(name.removeprefix("arr_"))))
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path}: holds more than tensors, and reading that could run code; save a tensor, or a tuple or plain "
            "dict of tensors"
        ) from error
    except Exception as error:  # anything may come out of a damaged pickle
        raise LrconvertError(f"{path}: not a torch file, or a damaged one; save it again") from error
    if not are_inputs(loaded):
        raise LrconvertError(f"{path}: holds {_described(loaded)}, not a tensor, nor a tuple or dict of tensors alone")
    return loaded


def _described(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        kinds = sorted({type(each).__name__ for each in (value.values() if isinstance(value, dict) else value)})
        return f"a {type(value).__name__} of {', '.join(kinds) or 'nothing'}"
    return f"an object of type {type(value).__name__}"


_READERS = {
    ".npz": _read_numpy,
    ".npy": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}
