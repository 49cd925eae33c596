"""Models of transformers: "hf/DIR", a folder with a config.json, or "hf/ORG/NAME" on the Hugging Face Hub.

Only the configuration is read, and only classes that transformers itself has are built: code that a folder brings is
never run. A header keeps the configuration itself, so that a file that lrconvert wrote loads wherever it is moved to.
"""

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.errors import ModelError
from lrconvert.inputs import Inputs
from lrconvert.layers.experts import running
from lrconvert.models.architecture import Architecture
from lrconvert.models.huggingface_inputs import inputs_of
from lrconvert.models.huggingface_keys import converted, renamed

CONFIG = "config.json"
# How a header names the architecture: "hf/BertModel" with the configuration among its arguments.
_CONFIG_ARG = "config"
# An argument of ours: the class to build instead of the one that the configuration names.
_CLASS_ARG = "architecture"
# What says nothing about the architecture, and would only go stale in a header.
_NOT_STORED = ("quantization_config", "_name_or_path", "auto_map", "transformers_version")


def architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    """The transformers model of a configuration, without weights.

    Args:
        name: a folder, or the model's name on the Hub, whose config.json alone is downloaded; or, with the argument
            `config`, a class of transformers.
        args: `architecture`, a class to build instead of the one in config.json; all others change the configuration
            (num_labels=2).

    Raises:
        ModelError: transformers is not installed, or does not know the model; there is no such folder, or no download.
    """
    if find_spec("transformers") is None:
        raise ModelError(f"hf/{name} needs transformers: pip install 'lrconvert[transformers]'")
    try:
        import transformers
    except Exception as error:
        raise ModelError(f"hf/{name}: transformers cannot be imported ({_first_line(error)})") from error
    args = dict(args)
    stored, chosen = args.pop(_CONFIG_ARG, None), args.pop(_CLASS_ARG, None)
    if stored is not None:
        config = _from_stored(name, stored, args)
        chosen = chosen or name
    else:
        config = _from_folder_or_hub(name, args)
    found = _class_of(config, chosen)
    if found is None:
        raise ModelError(
            f"hf/{name}: transformers {transformers.__version__} has no class {chosen or config.architectures}; code "
            "that a model brings itself is never run: give your own, --model file.py:factory"
        )
    kept = {key: value for key, value in json.loads(config.to_json_string()).items() if key not in _NOT_STORED}
    return Architecture(
        f"hf/{found.__name__}",
        {_CONFIG_ARG: kept},
        partial(_build, found, config),
        inputs_of(found, config),
        renamed,
        converted,
        partial(_from_folder, found),
        as_graph,
    )


def architecture_in(folder: Path) -> Architecture | None:
    """The architecture that a folder's own config.json describes, if transformers is installed and knows it."""
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(described, dict) or "model_type" not in described or find_spec("transformers") is None:
        return None
    try:
        return architecture(str(folder), {})
    except ModelError:
        return None


def inputs_of_live(model: nn.Module) -> Inputs | None:
    """What a live model of transformers is called with; None for any other."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    return inputs_of(type(model), model.config)


@contextmanager
def as_graph(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` can be exported.

    It keeps no cache: a cache is an object, and a graph returns tensors only. Attention is spelled out: torch takes
    apart the fused one of T5 into a graph that does not run (views of what is not contiguous). Experts are chosen by
    looking up their weights: a graph cannot depend on how many tokens go to each.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    wanted = {"use_cache": (True, False), "_attn_implementation": ("sdpa", "eager")}
    changed = []
    for config in configs.values():
        for name, (before, while_exported) in wanted.items():
            if getattr(config, name, None) == before:
                changed.append((config, name, before))
                setattr(config, name, while_exported)
    try:
        with running(model, "batched_mm"):
            yield
    finally:
        for config, name, before in changed:
            setattr(config, name, before)


def _build(kind: Any, parsed: Any, config: Mapping[str, Any]) -> nn.Module:
    """A `kind` of the configuration `parsed`, which `config` is the JSON of."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        # A copy: a model changes its configuration.
        model = kind(copy.deepcopy(parsed))
    model.tie_weights()
    built: nn.Module = model
    return built


def _from_folder(kind: Any, folder: Path) -> nn.Module:
    """What `from_pretrained` makes of a folder.

    Raises:
        ModelError: it cannot, or leaves weights out.
    """
    try:
        found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:
        raise ModelError(f"{folder}: transformers cannot load it as {kind.__name__} ({_first_line(error)})") from error
    model: nn.Module = found[0]
    missing = {what: keys for what, keys in found[1].items() if keys}
    if missing:
        what, keys = next(iter(missing.items()))
        raise ModelError(f"{folder}: not all of {kind.__name__} is in it ({what.replace('_', ' ')}: {min(keys)}, …)")
    return model


def _from_folder_or_hub(name: str, args: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if path.is_file() and path.name == CONFIG:
        path = path.parent
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ModelError(f"hf/{name}: this folder has no {CONFIG}")
    elif name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise ModelError(f"hf/{name}: no such folder")
    try:
        if path.is_dir():
            return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True, **args)
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **args)
    except Exception as error:
        what = "" if path.is_dir() else "no such folder, and nothing from the Hugging Face Hub: "
        raise ModelError(f"hf/{name}: {what}{_first_line(error)}") from error


def _from_stored(name: str, stored: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[stored["model_type"]].from_dict({**_with_infinities(stored), **args})
    except Exception as error:
        raise ModelError(f"hf/{name}: its configuration cannot be read ({_first_line(error)})") from error


def _with_infinities(stored: Any) -> Any:
    """`stored` with the numbers that transformers spells out, as JSON has none: {"__float__": "Infinity"}."""
    if isinstance(stored, Mapping):
        number = stored.get("__float__")
        return {key: _with_infinities(value) for key, value in stored.items()} if number is None else float(number)
    return [_with_infinities(value) for value in stored] if isinstance(stored, list | tuple) else stored


def _class_of(config: Any, chosen: str | None) -> Any:
    """The class of transformers that `chosen`, or else the configuration, names; the base model if it names none."""
    import transformers

    names = [chosen] if chosen else config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None if names else transformers.MODEL_MAPPING.get(type(config), None)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
