"""Models of timm: "timm/vit_base_patch16_224", with or without the tag of its weights (".augreg_in21k").

A tag changes what the factory builds: "vit_base_patch16_224.augreg_in21k" has that checkpoint's 21,843 classes.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lrconvert.errors import LrconvertError, ModelError, UnknownNameError, UsageError
from lrconvert.inputs import one_input
from lrconvert.models.architecture import Architecture

# Arguments of timm.create_model that read weights from somewhere.
_WEIGHTS = ("pretrained", "checkpoint_path")


def architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    """The timm model `name`, without pretrained weights. Nothing is downloaded.

    Args:
        name: as timm.list_models() or timm.list_pretrained() gives it.
        args: keyword arguments of timm.create_model (num_classes, img_size, …).

    Raises:
        ModelError: timm is not installed.
        UnknownNameError: timm has no such model, or the model no such tag.
        UsageError: the arguments ask for weights.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(
            f"timm/{name} needs timm, which cannot be imported ({error}): pip install 'lrconvert[timm]'"
        ) from error
    base, _, tag = name.partition(".")
    known = timm.list_models()
    if base not in known:
        raise UnknownNameError("timm model", name, known)
    tags = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(base)]
    if tag and tag not in tags:
        raise UnknownNameError(f"tag of timm/{base}", tag, tags)
    if any(args.get(argument) for argument in _WEIGHTS):
        raise UsageError("timm's weights are not loaded here: the checkpoint brings them")
    return Architecture(
        f"timm/{name}",
        dict(args),
        partial(timm.create_model, name, pretrained=False),
        one_input(_input_shape(name, args)),
    )


def architecture_in(folder: Path) -> Architecture | None:
    """The architecture that a folder as timm puts on the Hugging Face Hub describes, if timm is there and knows it."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(described, dict) or not isinstance(described.get("architecture"), str):
        return None
    pretrained, args = described.get("pretrained_cfg"), described.get("model_args")
    tag = pretrained.get("tag") if isinstance(pretrained, dict) else None
    args = dict(args) if isinstance(args, dict) else {}
    if isinstance(described.get("num_classes"), int):
        args.setdefault("num_classes", described["num_classes"])
    # A tag of somebody's own says nothing to timm.
    for name in (f"{described['architecture']}.{tag}", described["architecture"]):
        try:
            return architecture(name, args)
        except LrconvertError:
            continue
    return None


def _input_shape(name: str, args: Mapping[str, Any]) -> tuple[int, ...] | None:
    """(channels, height, width) that the model's default weights take, as far as `args` do not change it."""
    import timm

    known = timm.models.get_pretrained_cfg(name)
    if known is None:
        return None
    channels, height, width = known.input_size
    size = args.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return (int(args.get("in_chans") or channels), int(height), int(width))
