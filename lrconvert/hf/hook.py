"""Telling transformers about lrconvert, whichever of the two is imported first, and without importing either."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module whose tables we add to.
REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register with transformers: now if it is imported already, otherwise as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        importlib.import_module("lrconvert.hf.quantizer").register()
    except Exception as error:
        # Whatever is wrong with another version of transformers, importing it must go on working.
        warnings.warn(
            f"lrconvert could not register with transformers, which will refuse its folders: {error}", stacklevel=2
        )


class _Finder(MetaPathFinder):
    """Finds one module, where Python would have found it, and has us registered once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's own spec with our loader around its own; None for every other module."""
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as `loader` does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader itself does it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and then our registration."""
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
