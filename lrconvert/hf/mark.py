"""Models of transformers that were factorized, or merged, in memory: they are saved as what they are."""

import sys

from torch import nn


def mark(model: nn.Module) -> nn.Module:
    """Have every model of transformers in `model` saved as what it is now; others come back as they are.

    Sub-models are saved with the model around them.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None:
        from lrconvert.hf.quantizer import mark_pretrained

        for each in _outermost(model, modeling.PreTrainedModel):
            mark_pretrained(each)
    return model


def _outermost(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in _outermost(child, kind)]
