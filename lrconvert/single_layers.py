"""Layers taken out of a model to be timed alone: copies of them, and inputs of the sizes that they meet in it.

Values do not matter for time, so no weight is copied: those of all copies are views of one block of random numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lrconvert.cost import observe
from lrconvert.inputs import Inputs
from lrconvert.layers import Layer
from lrconvert.layers.lowrank import without_data
from lrconvert.layers.pivoted import Pivoted
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import reshape

# Positional and named arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Elements between two weights in the block start at multiples of this, as an allocator would place them.
_ALIGNMENT = 64


def calls_of(model: nn.Module, owners: Sequence[str], inputs: Inputs, batch_size: int) -> dict[str, list[Arguments]]:
    """By path, the arguments of every call of each module in a forward pass; tensors are on the meta device."""
    paths = {model.get_submodule(owner): owner for owner in owners}
    calls: dict[str, list[Arguments]] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.setdefault(paths[module], []).append((arguments, named))

    observe(model, inputs, batch_size, paths, record)
    return calls


def alike(module: nn.Module, calls: Sequence[Arguments], layer: Layer) -> object:
    """Equal for two weights whose modules are of one kind and shape, and are called with tensors of one shape."""
    tensors = [leaf for leaf in tree_leaves(list(calls)) if isinstance(leaf, Tensor)]
    # Attention is another job when queries, keys and values are one tensor.
    first = {id(tensor): at for at, tensor in reversed(list(enumerate(tensors)))}
    shapes = tuple((tuple(tensor.shape), first[id(tensor)]) for tensor in tensors)
    return type(module), module.extra_repr(), layer.parameter, layer.shape, layer.groups, shapes


def random_block(modules: Sequence[nn.Module], device: torch.device) -> Tensor:
    """Random numbers for the parameters of any one of `modules`, dense or at ranks up to break-even."""
    sizes = [
        sum(parameter.numel() + 2 * _ALIGNMENT for parameter in module.parameters()) + _ALIGNMENT for module in modules
    ]
    return torch.randn(max(sizes, default=0), device=device).mul_(0.02)


def copy_of(
    module: nn.Module, ranks: Mapping[Layer, int | None], block: Tensor, channels_last: bool = False
) -> nn.Module:
    """A copy of `module`, with the weights in `ranks` at these ranks; those at None, and all others, are dense.

    Its parameters are views of `block`, but for those that `channels_last` lays out anew; its buffers are ones, but for
    the orders of pivoted factors: inputs are to be taken from all over, as they will be.
    """
    decisions = []
    for layer, rank in ranks.items():
        path = layer.name.removeprefix(layer.owner).removeprefix(".")
        decisions.append(LayerPlan.of(replace(layer, name=path, weight=layer.parameter), rank))
    module = reshape(without_data(module), Plan(layers=tuple(decisions)))
    start = 0
    for name, parameter in list(module.named_parameters()):
        values = block[start : start + parameter.numel()].view(parameter.shape).to(parameter.dtype)
        _set(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        start += math.ceil(parameter.numel() / _ALIGNMENT) * _ALIGNMENT
    for name, buffer in list(module.named_buffers()):
        _set(module, name, torch.ones_like(buffer, device=block.device))
    for factor in module.modules():
        if isinstance(factor, Pivoted):
            factor.order = torch.argsort(torch.rand(factor.order.shape, device=block.device)).int()
    return module.to(memory_format=torch.channels_last) if channels_last else module


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, tensor)


def choices(module: nn.Module) -> int:
    """How many things a whole number among the arguments of `module` may name: experts, or 1 where that is all one."""
    return int(getattr(module, "num_experts", 1))


def with_data(
    call: Arguments, like: Tensor, channels_last: bool = False, requires_grad: bool = False, choices: int = 1
) -> Arguments:
    """`call` with random tensors, of the floating dtype and on the device of `like`, in the place of those without.

    What was one tensor stays one tensor; whole numbers go through all `choices` again and again, 0 where there is one;
    anything that is no tensor comes back as it is.
    """
    made: dict[int, Tensor] = {}

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = _random_like(leaf, like, channels_last, requires_grad, choices)
        return made[id(leaf)]

    filled: Arguments = tree_map(fill, call)
    return filled


def _random_like(leaf: Tensor, like: Tensor, channels_last: bool, requires_grad: bool, choices: int) -> Tensor:
    if not leaf.is_floating_point():
        return (torch.arange(leaf.numel(), device=like.device) % choices).to(leaf.dtype).reshape(leaf.shape)
    tensor = torch.randn(leaf.shape, dtype=like.dtype, device=like.device)
    if channels_last and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_(requires_grad)
