"""Plans as files of their own, to be read and edited by people; `lrconvert.plan.load_plan` reads them back."""

from pathlib import Path

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.plan import Plan


def save_plan(plan: Plan, path: str | Path, *, overwrite: bool = False) -> None:
    """Write `plan` as indented JSON.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False.
        CheckpointError: it cannot be written.
    """
    with atomic_path(Path(path), overwrite) as temporary:
        temporary.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
