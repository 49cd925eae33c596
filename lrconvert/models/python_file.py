"""Models of the user's own: "path/to/file.py:factory", a function or class that returns an nn.Module."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lrconvert.errors import LrconvertError, ModelError
from lrconvert.inputs import one_input
from lrconvert.models.architecture import Architecture


def architecture(file: str, factory: str, args: Mapping[str, Any]) -> Architecture:
    """The callable `factory` of the Python file `file`, which is imported, and so run.

    The file may set `input_shape` (of one floating-point input, without the batch) beside the factory, or `inputs`,
    a list of `lrconvert.Input`.

    Raises:
        ModelError: the file is missing or fails, or has no such callable.
    """
    found, module = import_callable(file, factory, ModelError, "--model")
    inputs = tuple(getattr(module, "inputs", ())) or one_input(getattr(module, "input_shape", None))
    return Architecture(f"{file}:{factory}", dict(args), found, inputs)


def import_callable(
    file: str, name: str, failure: type[LrconvertError], option: str
) -> tuple[Callable[..., Any], ModuleType]:
    """The callable `name` of the Python file `file`, which is imported, and so run; and the module.

    Args:
        file: path of the file.
        name: of the callable.
        failure: raised when the file is missing or fails, or has no such callable.
        option: what the user named the file by.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise failure(f"{file}: no such file; {option} takes path/to/file.py:factory")
    module_name = f"_lrconvert_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise failure(f"{file}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # The file's own folder, so that it can import its neighbours as it can when run.
    sys.path.insert(0, str(path.parent))
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise failure(f"{file}: fails when imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise failure(f"{file} has no callable '{name}'; it has: {', '.join(names) or 'none'}")
    return found, module
