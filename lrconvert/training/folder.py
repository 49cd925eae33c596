"""The folder of a run: what lies in it, and when it may be written to.

recipe.yaml         the recipe, resolved
state.pt            everything to go on with
metrics.jsonl       one line an epoch
best.safetensors    the weights with the best validation accuracy of the current phase
report.json         the record, once the run has ended
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.errors import CheckpointError, OutputExistsError, UsageError
from lrconvert.recipe import Recipe, dump_recipe, load_recipe

RECIPE, STATE, METRICS, BEST, REPORT = "recipe.yaml", "state.pt", "metrics.jsonl", "best.safetensors", "report.json"
_NAMES = (RECIPE, STATE, METRICS, BEST, REPORT)
# What may differ when a run goes on: where and how fast it runs, not what comes out.
_MOVABLE = {"data_dir", "download", "device", "workers", "checkpoint_steps"}


class RunFolder:
    """The folder at `path`, which need not exist yet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe, self.state, self.metrics, self.best, self.report = (self.path / name for name in _NAMES)

    def check(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """Refuse a run that would destroy another, or itself; nothing is changed.

        Raises:
            OutputExistsError: there is something of a run here already, or a file in the folder's place.
            UsageError: there is nothing to resume, or a run with another recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(f"{self.path} is a file; choose a folder to write the run to")
        if resume:
            self._check_same(recipe, overwrite)
            return
        there = next((name for name in _NAMES if (self.path / name).exists()), None)
        if there is not None and not overwrite:
            raise OutputExistsError(
                f"{self.path} holds a run ({there}); add --resume to go on with it, --overwrite to start anew"
            )
        for key in ("checkpoint", "teacher"):
            needed = getattr(recipe, key)
            if needed is not None and Path(needed).resolve() in [(self.path / name).resolve() for name in _NAMES]:
                raise UsageError(f"{needed} is the run's {key}, and would be overwritten; choose another --output")

    def _check_same(self, recipe: Recipe, overwrite: bool) -> None:
        if overwrite:
            raise UsageError("--resume goes on with a run, --overwrite starts anew: choose one")
        if not self.recipe.is_file():
            raise UsageError(f"{self.path} holds no run to resume; leave --resume out to start one")
        before, now = load_recipe(self.recipe).model_dump(), recipe.model_dump()
        changed = next((key for key in now if now[key] != before[key] and key not in _MOVABLE), None)
        if changed is not None:
            raise UsageError(
                f"{self.path}: that run has {changed} {before[changed]!r}, this recipe {now[changed]!r}; "
                f"resume it with its own {self.recipe}"
            )

    def prepare(self, recipe: Recipe, resume: bool) -> None:
        """Make the folder ready, once everything that can be wrong with a run has been found out.

        Raises:
            CheckpointError: it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be made ({error.strerror})") from None
        for name in _NAMES:
            for left in self.path.glob(f".{name}.*"):  # of a write that was killed
                shutil.rmtree(left, ignore_errors=True)
        if not resume:
            for name in _NAMES:
                (self.path / name).unlink(missing_ok=True)
            _write(self.recipe, dump_recipe(recipe))

    def write_metrics(self, history: Iterable[Mapping[str, Any]]) -> None:
        """All epochs so far, one line each."""
        _write(self.metrics, "".join(f"{json.dumps(each)}\n" for each in history))

    def write_report(self, text: str) -> None:
        """The record of the finished run."""
        _write(self.report, text + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
