"""Plans as files of their own, to be read and edited by people."""

from pathlib import Path

from pydantic import ValidationError

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.errors import PlanError
from lrconvert.plan import Plan


def save_plan(plan: Plan, path: str | Path, *, overwrite: bool = False) -> None:
    """Write `plan` as indented JSON.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False.
        CheckpointError: it cannot be written.
    """
    with atomic_path(Path(path), overwrite) as temporary:
        temporary.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_plan(path: str | Path) -> Plan:
    """Read a plan that `save_plan` wrote and perhaps somebody edited.

    Errors, latency, and what was reached of a target, are left out: edited ranks have others. `lrconvert.factorize`
    predicts errors anew.

    Raises:
        PlanError: the file is missing, or is not a plan; the message names the field.
    """
    try:
        plan = Plan.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not a plan: it is no text") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{path}: not a plan: {where + ': ' if where else ''}{first['msg']}") from None
    layers = tuple(layer.model_copy(update={"error": None}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers, "target": None, "latency": None})
