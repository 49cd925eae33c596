"""A checkpoint as transformers loads it: older names, other prefixes, the weights of experts stacked in one tensor."""

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrconvert.errors import CheckpointError
from lrconvert.models.architecture import Converted
from lrconvert.tensors import TensorRef


def renamed(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """Key in a checkpoint to the key in `model`'s state dict; None for a tensor that others are made of.

    Args:
        model: one of transformers, on any device.
        keys: of a checkpoint; one that the model knows nothing of keeps its name.
    """
    own = _Keys(model)
    return {
        key: name if pattern is None or key in own.shapes else None for key, (name, pattern) in own.of(keys).items()
    }


def converted(model: Any, tensors: Mapping[str, TensorRef]) -> dict[str, Converted] | None:
    """`tensors` as the state dict of `model` has them: renamed, merged or split; None where they are so already.

    Args:
        model: one of transformers, on any device.
        tensors: of a dense checkpoint.

    Returns:
        By key of the model, in the order of the file. What is made of others is made when it is read.
    """
    from transformers.core_model_loading import dot_natural_key

    keys = _Keys(model)
    names = keys.of(sorted(tensors, key=dot_natural_key))  # experts are stacked in the order of their numbers
    groups: dict[str, _Group] = {}
    for key, (name, pattern) in names.items():
        if pattern is not None:
            group = groups.setdefault(name, _Group(name, keys.converter(pattern), model))
            group.sources.append((pattern, tensors[key]))
    if all(name == key and pattern is None for key, (name, pattern) in names.items()):
        return None
    found: dict[str, Converted] = {}
    for key, ref in tensors.items():
        name, pattern = names[key]
        if pattern is None:
            original = names.get(ref.alias_of, (ref.alias_of,))[0] if ref.alias_of else None
            found[name] = Converted(replace(ref, alias_of=original), key)
            continue
        made = groups[name].refs(keys.shapes)
        if not made:  # the model has no place for it, as for a layer that it leaves out: it stays what it is
            found[key] = Converted(ref, key)
        for target, each in made.items():
            found.setdefault(target, Converted(each, key))
    return found


class _Keys:
    """What `model` calls the tensors of a checkpoint."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        conversions = get_model_conversion_mapping(model)
        self.prefix, self.own = model.base_model_prefix, model.state_dict()
        self.converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self.renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
        self.shapes = {key: tuple(value.shape) for key, value in self.own.items()}

    def of(self, keys: Iterable[str]) -> dict[str, tuple[str, str | None]]:
        """Key to the model's key, and the pattern of the converter that makes something of it, if there is one."""
        from transformers.core_model_loading import rename_source_key

        found = {key: rename_source_key(key, self.renamings, self.converters, self.prefix, self.own) for key in keys}
        # A key of the model that would become none of its keys was not meant.
        return {
            key: (key, None) if key in self.own and name not in self.own else (name, pattern)
            for key, (name, pattern) in found.items()
        }

    def converter(self, pattern: str) -> Any:
        """The converter that has a pattern."""
        return next(each for each in self.converters if pattern in each.source_patterns)


@dataclass
class _Group:
    """Tensors of a checkpoint that make one of the model, or several.

    Attributes:
        name: the first of the model's keys.
        converter: of transformers, what makes them.
        model: whose they are.
        sources: the pattern of the converter that each matches, and what it is.
    """

    name: str
    converter: Any
    model: Any
    sources: list[tuple[str, TensorRef]] = field(default_factory=list)

    def refs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRef]:
        """By key, what is made; without a shape in `shapes` the model does not have it."""
        first, *others = self.converter.target_patterns
        names = [self.name, *(self.name.replace(first, other, 1) for other in others)]
        return {
            name: TensorRef(shapes[name], self.dtype, lambda name=name: self.read(name, shapes[name]))  # type: ignore[misc]
            for name in names
            if name in shapes
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of the sources; of several one that holds them all."""
        dtypes = {ref.dtype for _, ref in self.sources}
        if len(dtypes) > 1 and any(dtype.itemsize < 2 for dtype in dtypes):
            return torch.float32  # torch has no rule for 8 bits
        return functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The model's tensor `name`."""
        converter = copy.deepcopy(self.converter)
        for number, (pattern, ref) in enumerate(self.sources):
            converter.add_tensor(self.name, str(number), pattern, lambda ref=ref: ref.read().to(self.dtype))
        try:
            made = converter.convert(self.name, model=self.model, config=self.model.config)[name]
        except Exception as error:
            raise CheckpointError(f"{name} cannot be made of what the checkpoint has for it: {error}") from error
        tensor: Tensor = made[0] if isinstance(made, list) else made
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: the checkpoint makes {tuple(tensor.shape)} of it, the model has {shape}")
        return tensor.contiguous()
