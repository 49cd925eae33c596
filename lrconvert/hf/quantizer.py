"""The plug-in: to transformers, a factorized model is a quantized one, whose config.json holds the plan.

transformers builds the dense model on the meta device; the quantizer reshapes it by the plan, and the factors load by
name. Only the structure differs from a dense model: it trains, is cast and is saved like any other.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrconvert import __version__
from lrconvert.checkpoints.header import KEY, Header
from lrconvert.checkpoints.hf_config import METHOD, from_config, to_config
from lrconvert.errors import PlanError
from lrconvert.factorization import replacements
from lrconvert.layers import EXPERT_KINDS
from lrconvert.layers.pivoted import check_orders
from lrconvert.models.huggingface_keys import renamed
from lrconvert.plan import Plan
from lrconvert.surgery import merge_module, plan_of, reshape


class LrconvertConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json holds under "quantization_config": the layers of the plan that are factorized.

    Args:
        layers: as `lrconvert.checkpoints.hf_config` writes them.
        kwargs: what else the entry holds.

    Raises:
        PlanError: the layers make no plan.
    """

    def __init__(self, layers: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.layers = layers or {}
        self.written_by = kwargs.get("written_by", f"lrconvert {__version__}")
        from_config(self.layers)

    @property
    def plan(self) -> Plan:
        """The plan, without its dense layers."""
        return from_config(self.layers)


class LrconvertQuantizer(HfQuantizer):  # type: ignore[misc]
    """Reshapes a model before its weights are loaded, and says how it is saved."""

    quantization_config: LrconvertConfig
    # Of a model that this is attached to: see `_file_format`.
    attached = False
    file_format: Any = None

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """What transformers makes of a file's tensors, but for what would make something of the factors of experts."""
        experts = [layer for layer in self.quantization_config.plan.low_rank if layer.kind in EXPERT_KINDS]
        factors = [key for layer in experts for key in replacements(layer)]
        conversions = super().update_weight_conversions(weight_conversions, model)
        return [
            each
            for each in conversions
            if not isinstance(each, WeightConverter) or not any(each.rename_source_key(key)[1] for key in factors)
        ]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan = _renamed(self.quantization_config.plan, model)
        if not plan.low_rank:
            return model
        reshaped: Any = reshape(model, plan)
        if reshaped is not model:
            raise PlanError(f"{type(model).__name__} is itself the layer to factorize: it cannot be loaded this way")
        # The empty tensors in the place of dense weights: they are there for whoever loads without lrconvert.
        marks = {layer.weight for layer in (*plan.low_rank, *self.quantization_config.plan.low_rank)}
        ignored: Any = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *(f"^{re.escape(key)}$" for key in marks)}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_orders(model)
        attach(model, self)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: the state dict with the marks of a factorized folder, and lrconvert's header."""
        plan = plan_of(model)
        model.config.quantization_config = self.quantization_config = _config_of(plan)
        state = model.state_dict()
        state |= {layer.weight: torch.empty(0, dtype=model.dtype) for layer in plan.low_rank}
        header = Header(written_by=self.quantization_config.written_by, plan=plan)
        return state, {KEY: header.model_dump_json(exclude_defaults=True)}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model._weight_conversions = _file_format(model)
        return merge_module(model)

    def is_serializable(self) -> bool:
        """Whether save_pretrained works: it does."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the Trainer may train it: plain factors are ordinary parameters."""
        return not any(layer.pivoted for layer in self.quantization_config.plan.layers)

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile may be used: it may."""
        return True


def register() -> None:
    """Add the plug-in to transformers' tables; a second time does nothing."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LrconvertConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, LrconvertQuantizer)


def mark_pretrained(model: Any) -> None:
    """Have `model`, one of transformers, saved as what it is now: factorized, or dense again."""
    plan = plan_of(model)
    own = isinstance(getattr(model, "hf_quantizer", None), LrconvertQuantizer)
    if plan.low_rank:
        attach(model, LrconvertQuantizer(_config_of(plan)))
    elif own:
        model._weight_conversions = _file_format(model)
        model.hf_quantizer.remove_quantization_config(model)


def attach(model: Any, quantizer: LrconvertQuantizer) -> None:
    """Make `quantizer` the one that saves `model`, which is trained and cast like any other all the same."""
    # The file's own format would be made of dense weights: factors are saved under the model's keys.
    quantizer.file_format, quantizer.attached = _file_format(model), True
    model._weight_conversions = []
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.quantization_method = METHOD
    # transformers refuses to cast or train what is quantized, and these are ordinary weights.
    model.is_quantized = False
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_is_quantized", False):
            module.config._is_quantized = False


def _file_format(model: Any) -> Any:
    """What transformers makes of a dense state dict for the model's files; None for what it does by default."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, LrconvertQuantizer) and quantizer.attached:
        return quantizer.file_format
    return getattr(model, "_weight_conversions", None)


def _config_of(plan: Plan) -> LrconvertConfig:
    return LrconvertConfig(to_config(plan))


def _renamed(plan: Plan, model: Any) -> Plan:
    """`plan` with the names that `model` has for its layers, as transformers renames the keys of a checkpoint.

    A layer that the model does not have, as the head when only the base model is loaded, is left out.
    """
    own, names = model.state_dict(), renamed(model, [layer.weight for layer in plan.low_rank])
    layers = []
    for layer in plan.low_rank:
        key = names[layer.weight]
        if key is None:
            raise PlanError(f"{layer.weight}: transformers merges this weight with others, so it cannot be factorized")
        if key in own:
            name = "" if key == "weight" else key.removesuffix(".weight")
            layers.append(layer.model_copy(update={"name": name, "weight": key}))
    return plan.model_copy(update={"layers": tuple(layers)})
