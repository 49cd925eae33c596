"""The recipes that come with lrconvert: where they are, and what their headers say."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lrconvert.errors import LrconvertError, UnknownNameError

# Beside the package in a checkout, inside it when installed from a wheel.
_FOLDERS = (Path(__file__).parent / "_recipes", Path(__file__).parent.parent / "recipes")


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that comes with lrconvert.

    Attributes:
        name: its path below the folder of recipes, without the suffix ("cifar10/resnet18-cuttlefish").
        path: the file.
        summary: first line of its header.
    """

    name: str
    path: Path
    summary: str


def list_recipes() -> tuple[RecipeFile, ...]:
    """All recipes, by name; files that begin with "_" are bases of others."""
    return tuple(sorted(_files(), key=lambda each: each.name))


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with lrconvert.

    Raises:
        UnknownNameError: it is neither.
        LrconvertError: the file is missing.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise LrconvertError(f"{name}: no such file; `lrconvert recipes list` shows the recipes by name")
        return Path(name)
    known = {each.name: each.path for each in _files()}
    if name not in known:
        raise UnknownNameError("recipe", name, known)
    return known[name]


def _files() -> Iterator[RecipeFile]:
    folder = next((each for each in _FOLDERS if each.is_dir()), None)
    for path in folder.rglob("*.yaml") if folder else ():
        if not path.name.startswith("_"):
            name = str(path.relative_to(folder).with_suffix("")).replace("\\", "/")  # type: ignore[arg-type]
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            yield RecipeFile(name, path, first.lstrip("# ").strip())
