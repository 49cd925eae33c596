"""Make trained networks smaller and faster by low-rank factorization.

The names below are the public API; everything else may change. They are imported on first use, so that
`lrconvert --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lrconvert.hf.hook import install as _install

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lrconvert.api.analyze import analyze
    from lrconvert.api.calibrate import calibrate
    from lrconvert.api.compare import compare
    from lrconvert.api.distill import distill
    from lrconvert.api.export import export
    from lrconvert.api.factorize import factorize, merge
    from lrconvert.api.info import info
    from lrconvert.api.make_plan import make_plan
    from lrconvert.api.sweep import sweep
    from lrconvert.api.train import evaluate, finetune, train
    from lrconvert.checkpoints.plan_file import load_plan, save_plan
    from lrconvert.errors import LrconvertError
    from lrconvert.inputs import Input
    from lrconvert.loading import load, save
    from lrconvert.plan import LayerPlan, Plan
    from lrconvert.training.schedules import SIFD, Cuttlefish, Dense, Pufferfish, StabilityCriterion

__all__ = [
    "SIFD",
    "Cuttlefish",
    "Dense",
    "Input",
    "LayerPlan",
    "LrconvertError",
    "Plan",
    "Pufferfish",
    "StabilityCriterion",
    "analyze",
    "calibrate",
    "compare",
    "distill",
    "evaluate",
    "export",
    "factorize",
    "finetune",
    "info",
    "load",
    "load_plan",
    "make_plan",
    "merge",
    "save",
    "save_plan",
    "sweep",
    "train",
]

_HOME = {
    "Cuttlefish": "training.schedules",
    "Dense": "training.schedules",
    "Input": "inputs",
    "LayerPlan": "plan",
    "LrconvertError": "errors",
    "Plan": "plan",
    "Pufferfish": "training.schedules",
    "SIFD": "training.schedules",
    "StabilityCriterion": "training.schedules",
    "analyze": "api.analyze",
    "calibrate": "api.calibrate",
    "compare": "api.compare",
    "distill": "api.distill",
    "evaluate": "api.train",
    "export": "api.export",
    "factorize": "api.factorize",
    "finetune": "api.train",
    "info": "api.info",
    "load": "loading",
    "load_plan": "checkpoints.plan_file",
    "make_plan": "api.make_plan",
    "merge": "api.factorize",
    "save": "loading",
    "save_plan": "checkpoints.plan_file",
    "sweep": "api.sweep",
    "train": "api.train",
}


# From here on `from_pretrained` of transformers loads folders that lrconvert factorized.
_install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lrconvert' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lrconvert.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
