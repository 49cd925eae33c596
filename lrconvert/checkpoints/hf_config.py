"""config.json of a folder of transformers: it says that the folder is factorized, and how.

transformers asks for a quantization method by its name; ours is registered by `lrconvert.hf`, and rebuilds the model
from what is written here. Without lrconvert, transformers would ignore the entry, build the dense model, and give every
missing weight random numbers. So each of those weights is in the file after all, as a tensor without elements: its
shape does not fit, and that is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lrconvert.checkpoints.checkpoint import Checkpoint
from lrconvert.checkpoints.header import Header
from lrconvert.errors import PlanError
from lrconvert.plan import LayerPlan, Plan

CONFIG = "config.json"
METHOD = "lrconvert"
_ENTRY = "quantization_config"
# What transformers calls it, and did before.
_DTYPE = ("dtype", "torch_dtype")
_KEPT = {"kind", "shape", "rank", "groups"}
_KEPT_WHERE_SET = {"norm", "view", "pivoted"}


def to_config(plan: Plan) -> dict[str, Any]:
    """Factorized layers of `plan` as JSON: key of the dense weight to its decision, without what was only a reason."""
    return {
        layer.weight: layer.model_dump(mode="json", include=_KEPT)
        | layer.model_dump(mode="json", include=_KEPT_WHERE_SET, exclude_defaults=True)
        for layer in plan.low_rank
    }


def from_config(layers: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The plan that `to_config` wrote.

    Raises:
        PlanError: it cannot be understood.
    """
    try:
        return Plan(
            layers=tuple(
                LayerPlan(
                    name="" if weight == "weight" else weight.removesuffix(".weight"), weight=weight, **dict(layer)
                )
                for weight, layer in layers.items()
            )
        )
    except (ValidationError, TypeError) as error:
        raise PlanError(f"the plan in {CONFIG} cannot be read: {str(error).splitlines()[0]}") from None


def is_transformers(folder: Path) -> bool:
    """Whether the folder holds a model of transformers."""
    return "model_type" in _read(folder)


def write_config(folder: Path, header: Header | None, dtype: torch.dtype | None = None) -> None:
    """Say in the config.json of a folder that is being written how it is factorized, or that it is not any more.

    And of what `dtype` its weights are, where they were converted: transformers would load them as what they were.
    """
    config = _read(folder)
    if "model_type" not in config:
        return
    if dtype is not None:
        config = _with_dtype(config, str(dtype).removeprefix("torch."))
    before = config.get(_ENTRY)
    if isinstance(before, dict) and before.get("quant_method") == METHOD:
        del config[_ENTRY]
    if header is not None and header.plan is not None:
        layers = to_config(header.plan)
        config[_ENTRY] = {"quant_method": METHOD, "written_by": header.written_by, "layers": layers}
    elif _ENTRY not in config and before is None and dtype is None:
        return
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def marks(folder: Path, header: Header | None) -> dict[str, torch.dtype]:
    """Keys, and types, of the empty tensors that go into a folder being written; none but for transformers."""
    if header is None or header.plan is None or not is_transformers(folder):
        return {}
    return dict.fromkeys((layer.weight for layer in header.plan.low_rank), torch.float32)


def without_marks(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` without the empty tensors that stand for its dense weights."""
    if checkpoint.header is None or checkpoint.header.plan is None:
        return checkpoint
    found = {layer.weight for layer in checkpoint.header.plan.low_rank if _is_empty(checkpoint, layer.weight)}
    return replace(
        checkpoint,
        tensors={key: ref for key, ref in checkpoint.tensors.items() if key not in found},
        files={file: tuple(key for key in keys if key not in found) for file, keys in checkpoint.files.items()},
    )


def _is_empty(checkpoint: Checkpoint, key: str) -> bool:
    ref = checkpoint.tensors.get(key)
    return ref is not None and not ref.numel


def _with_dtype(config: Any, dtype: str) -> Any:
    """`config`, and those of its parts, with another `dtype` where they name one."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _with_dtype(value, dtype) for key, value in config.items()
    }


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
