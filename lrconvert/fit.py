"""A checkpoint beside its model: tensors under the keys of the model, which its plan reshapes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from lrconvert.checkpoints import Checkpoint, fitted
from lrconvert.errors import ModelError
from lrconvert.factorization import merging, replacements
from lrconvert.layers.survey import tied_names
from lrconvert.models import Architecture
from lrconvert.rewrite import layout_of
from lrconvert.surgery import reshape
from lrconvert.tensors import TensorRef, shapes_of


def as_model_has_it(checkpoint: Checkpoint, model: nn.Module, architecture: Architecture) -> Checkpoint:
    """`checkpoint` with the keys of `model`, one of `architecture`, and with tensors merged or split as it has them.

    Factors keep their keys, which the plan of a factorized checkpoint names.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    checkpoint = fitted(checkpoint, wanted)
    if architecture.converted is None:
        return checkpoint
    plan = checkpoint.header.plan if checkpoint.header else None
    low_rank = plan.low_rank if plan else ()
    factors = {key for layer in low_rank for key in (*replacements(layer), layer.key("v", "bias"))}
    given = {key: ref for key, ref in checkpoint.tensors.items() if key not in factors}
    converted = architecture.converted(model, given)
    if converted is None:
        return checkpoint
    found = {key: each.ref for key, each in converted.items()}
    if _fitting(found, wanted) <= _fitting(given, wanted):
        return checkpoint
    made: dict[str, list[str]] = {key: [key] for key in factors}
    for key, each in converted.items():
        made.setdefault(each.source, []).append(key)
    refs = checkpoint.tensors | found
    changed = sum(key not in found for key in given)
    note = f"{changed} keys are read under other names, or several as one, as {architecture.name} loads them"
    return replace(
        checkpoint,
        tensors={key: refs[key] for source in checkpoint.tensors for key in made.get(source, ())},
        files={
            file: tuple(key for source in keys for key in made.get(source, ()))
            for file, keys in checkpoint.files.items()
        },
        notes=(*checkpoint.notes, note) if changed else checkpoint.notes,
    )


def _fitting(tensors: Mapping[str, TensorRef], wanted: Mapping[str, tuple[int, ...]]) -> int:
    """How many of `tensors` have a key in `wanted`, and its shape."""
    return sum(wanted.get(key) == ref.shape for key, ref in tensors.items())


def fit(module: nn.Module, checkpoint: Checkpoint, name: str) -> nn.Module:
    """The dense `module`, reshaped by the checkpoint's plan if it has one, so that its tensors load strictly.

    Args:
        module: changed in place, but only once it is known that everything fits.
        checkpoint: whose tensors are to fit.
        name: of the module, for messages.

    Raises:
        ModelError: keys or shapes differ.
        PlanError: the plan does not fit the module.
    """
    plan = checkpoint.header.plan if checkpoint.header else None
    if plan is None:
        _check_match(module, shapes_of(checkpoint.tensors), name)
        return module
    merged = layout_of(merging(checkpoint.tensors, plan))
    _check_match(module, {key: shape for key, (shape, _) in merged.items()}, name)
    return reshape(module, plan)


def _check_match(module: nn.Module, found: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raise ModelError unless the dense `module` has the keys and shapes in `found`."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key, shape in wanted.items():
        if key in found and found[key] != shape:
            hint = ""
            if len(shape) <= 2 and shape[1:] == found[key][1:]:
                hint = f"; if its number of classes differs, add --model-arg num_classes={found[key][0]}"
            raise ModelError(f"{key}: {found[key]} in the checkpoint, {shape} in {name}{hint}")
    # Checkpoints from before torch 0.4.1 have no counters, and torch loads them all the same.
    missing = {key for key in wanted if key not in found and not key.endswith("num_batches_tracked")}
    # A weight that the model ties is stored once.
    missing -= {key for names in tied_names(module) for key in names if any(name in found for name in names)}
    unexpected = sorted(found.keys() - wanted.keys() - not_loaded(module, found), key=list(found).index)
    if missing or unexpected:
        parts = [
            f"{len(keys)} key(s) {where} ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})"
            for keys, where in ((sorted(missing), "missing from the checkpoint"), (unexpected, "unknown to the model"))
            if keys
        ]
        hint = "is this the right --model, or does it take a --model-arg?"
        raise ModelError(f"the checkpoint does not match {name}: {'; '.join(parts)}; {hint}")


def not_loaded(module: nn.Module, keys: Iterable[str]) -> set[str]:
    """Those of `keys` that are not in the module's state dict but may be in a checkpoint of it.

    They are buffers that older versions of the module saved, and what a model of transformers says it ignores.
    """
    wanted, buffers = module.state_dict(), dict(module.named_buffers())
    ignored = [re.compile(pattern) for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return {
        key for key in keys if key not in wanted and (key in buffers or any(pattern.search(key) for pattern in ignored))
    }
