"""Where architectures come from: one file per source, and here the choice between them by name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.models import huggingface, python_file, timm, torchvision, zoo
from lrconvert.models.architecture import Architecture
from lrconvert.models.huggingface import inputs_of_live

__all__ = ["Architecture", "architecture_in", "find_architecture", "inputs_of_live"]

# Prefix of the name to the function that makes (name without prefix, keyword arguments) an architecture.
SOURCES: dict[str, Callable[[str, Mapping[str, Any]], Architecture]] = {
    "hf": huggingface.architecture,
    "timm": timm.architecture,
    "torchvision": torchvision.architecture,
    "zoo": zoo.architecture,
}


def architecture_in(folder: Path) -> Architecture | None:
    """The architecture that the config.json of a folder describes, in the way of transformers or of timm, if any."""
    return huggingface.architecture_in(folder) or timm.architecture_in(folder)


def find_architecture(name: str, args: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture behind "torchvision/NAME", "timm/NAME", "hf/DIR", "zoo/NAME" or "file.py:factory".

    Raises:
        UnknownNameError: no source has this name.
        UsageError: the name is of no known form.
        ModelError: a Python file cannot be imported, or has no such factory; a library is not installed.
    """
    file, colon, factory = name.rpartition(":")
    if colon and file.endswith(".py"):
        return python_file.architecture(file, factory, args or {})
    source, slash, rest = name.partition("/")
    if not slash:
        raise UsageError(f"model '{name}': write SOURCE/NAME (torchvision/resnet18) or file.py:factory")
    if source not in SOURCES:
        raise UnknownNameError("model source", source, SOURCES)
    return SOURCES[source](rest, args or {})
