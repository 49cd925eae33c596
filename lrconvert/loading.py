"""`load` and `save`: a model from a checkpoint, and a checkpoint from a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrconvert.checkpoints import (
    WRITTEN_BY,
    Checkpoint,
    Header,
    fitted,
    open_checkpoint,
    write_checkpoint,
)
from lrconvert.errors import ModelError, UsageError
from lrconvert.fit import as_model_has_it, fit, not_loaded
from lrconvert.hf.mark import mark
from lrconvert.images import ImagePreparation
from lrconvert.layers.pivoted import check_orders
from lrconvert.layers.survey import tied_names
from lrconvert.models import Architecture
from lrconvert.network import Network, architecture_of, own_architecture
from lrconvert.rewrite import moving
from lrconvert.surgery import plan_of
from lrconvert.tensors import load_into, refs_of


def load(
    source: str | Path | Checkpoint,
    model: nn.Module | str | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> nn.Module:
    """A model with a checkpoint's weights; a factorized checkpoint gives a factorized model.

    Args:
        source: a checkpoint, dense or factorized.
        model: a live dense model to put the weights into (its layers are replaced in place), or the name of an
            architecture; not needed for a file that names its own.
        model_args: keyword arguments of a named architecture.
        device: where the weights go, unless `model` is live: then they go where it is.

    Returns:
        The model in eval mode, or in the mode that a live `model` was in.

    Raises:
        ModelError: no architecture is known, or it does not match the checkpoint; a live model is not changed.
        PlanError: the plan in the file does not fit the model.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.graph is not None:
        raise ModelError(f"{checkpoint.path} is a graph: onnxruntime runs it, torch cannot load it")
    if isinstance(model, nn.Module):
        if model_args:
            raise UsageError("model_args go with the name of an architecture, not with a live model")
        checkpoint = fitted(checkpoint, model.state_dict())
        return mark(_fill(fit(model, checkpoint, type(model).__name__), checkpoint))
    architecture = architecture_of(checkpoint, model, model_args)
    if architecture is None:
        architecture = own_architecture(checkpoint)
        if architecture is not None and architecture.from_folder is not None:
            try:
                return mark(_build(architecture, checkpoint)).eval().to(device)
            except ModelError:
                # Its keys are not the model's, but the library may know how they became it.
                return architecture.from_folder(checkpoint.path).eval().to(device)
    if architecture is None:
        named = checkpoint.header.model if checkpoint.header else None
        why = f"names {named}, a Python file, which is only run when you ask" if named else "names no architecture"
        raise ModelError(
            f"{checkpoint.path} {why}; give one: load(path, model), --model SOURCE/NAME (torchvision/resnet18, "
            "timm/…, hf/…) or --model file.py:factory"
        )
    return mark(_build(architecture, checkpoint)).eval().to(device)


def model_of(network: Network) -> nn.Module:
    """The model of `network` with its weights: the live one itself, or one that is built and loaded.

    Raises:
        ModelError: nothing says what the network's architecture is.
    """
    if network.checkpoint is None and network.module is not None:
        return network.module
    if network.checkpoint is None or network.architecture is None:
        raise ModelError(f"{network.name} names no architecture; give one with --model")
    return _build(network.architecture, network.checkpoint).eval()


def save(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    images: ImagePreparation | None = None,
    overwrite: bool = False,
) -> None:
    """Write a live model, factorized or not, so that `load` rebuilds it.

    Args:
        model: the model.
        path: a .safetensors or .pt file.
        architecture: name of the dense architecture ("torchvision/resnet50"), to load the file without a model.
        model_args: its keyword arguments.
        input_shape: shape of one input without the batch, for MACs and exports of what is not built by name alone.
        images: how images are prepared for it, which `evaluate`, `finetune` and `calibrate` then do.
        overwrite: replace an existing file.
    """
    plan = plan_of(model)
    header = Header(
        written_by=WRITTEN_BY,
        model=architecture,
        model_args=dict(model_args or {}),
        input_shape=input_shape,
        images=images,
        plan=plan if plan.low_rank else None,
    )
    steps = [moving(key, ref, key) for key, ref in refs_of(model.state_dict()).items()]
    write_checkpoint(Path(path), steps, header, overwrite=overwrite)


def _build(architecture: Architecture, checkpoint: Checkpoint) -> nn.Module:
    """The model with the checkpoint's weights, in their dtype where the constructor need not run on real parameters."""
    model = architecture.build()
    checkpoint = as_model_has_it(checkpoint, model, architecture)
    model = _fill(fit(model, checkpoint, architecture.name), checkpoint)
    # Buffers that are computed by the constructor and not saved: only a real constructor makes them.
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model = _fill(fit(architecture.build_without_parameters(), checkpoint, architecture.name), checkpoint)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    state = {key: ref.read() for key, ref in checkpoint.tensors.items()}
    for key in not_loaded(model, state):
        del state[key]
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    tied = tied_names(model)
    for names in tied:
        stored = next((state[name] for name in names if name in state), None)
        if stored is not None:
            state |= dict.fromkeys(names, stored)
    with torch.no_grad():
        load_into(model, state, assign=on_meta)
    check_orders(model)
    if on_meta:
        # Assigning gave every name a parameter of its own: tie them again.
        for names in tied:
            parameter = model.get_parameter(names[0])
            for name in names[1:]:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, parameter)
    return model
