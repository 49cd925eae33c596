"""Keys as transformers renames them when it loads a checkpoint: older names, other prefixes, experts merged."""

from collections.abc import Iterable
from typing import Any


def renamed(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """Key in a checkpoint to the key in `model`'s state dict; None for a tensor that is merged with others.

    Args:
        model: one of transformers, on any device.
        keys: of a checkpoint; one that the model knows nothing of keeps its name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    own = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    names: dict[str, str | None] = {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        names[key] = name if converter is None else None
    return names
