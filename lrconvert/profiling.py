"""Which layers get faster when they are factorized: Cuttlefish's algorithm 2, which finds K.

A stack is all layers with the same weight and the same input; one of them is trained for a few iterations, dense and
at rank ratio ρ̄ = 1/4, on random inputs of the size that it meets in the network. It is worth factorizing when the dense
one takes more than v = 1.5 times as long, as section 3.5 says; the condition printed in algorithm 2 is inverted. The
layer is timed alone, as in the paper's figure 4: in the time of the whole network a single stack could never make a
difference of 1.5 times.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrconvert.inputs import Inputs
from lrconvert.layers import Layer
from lrconvert.plan import units
from lrconvert.single_layers import Arguments, alike, calls_of, choices, copy_of, random_block, with_data
from lrconvert.timer import times_in_turns


@dataclass(frozen=True)
class StackTiming:
    """What a stack of equal layers takes.

    Attributes:
        names: its layers, in the order they run.
        dense_ms, low_rank_ms: median time of one training iteration, forward and backward, of one of them.
    """

    names: tuple[str, ...]
    dense_ms: float
    low_rank_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast the factorized layer is."""
        return self.dense_ms / self.low_rank_ms


@dataclass(frozen=True)
class Profile:
    """What profiling found.

    Attributes:
        stacks: in the order their first layers run.
        keep_first: K, as `PlanOptions` counts it: up to the last layer before the first stack that is worth it.
        threshold: v, the speed-up from which a stack is worth it.
        rank_ratio: ρ̄ that it was timed at.
        iterations: training iterations of a layer that were run, dense and low rank, all stacks together.
        seconds: how long profiling took.
    """

    stacks: tuple[StackTiming, ...]
    keep_first: int
    threshold: float
    rank_ratio: float
    iterations: int
    seconds: float

    @property
    def pays(self) -> bool:
        """Whether any stack is worth factorizing; where none is, K is all layers."""
        return any(stack.speedup > self.threshold for stack in self.stacks)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The profile that `dataclasses.asdict` made plain data of, perhaps by way of JSON."""
        stacks = tuple(StackTiming(**{**stack, "names": tuple(stack["names"])}) for stack in state["stacks"])
        return cls(**{**state, "stacks": stacks})


def profile(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Layer],
    inputs: Inputs,
    batch_size: int,
    *,
    rank_ratio: float = 0.25,
    iterations: int = 11,
    threshold: float = 1.5,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    device: torch.device | None = None,
) -> Profile:
    """Time the stacks of `model`, which is left as it was: copies of single layers are trained.

    Args:
        model: the dense model.
        layers: all its layers, in execution order.
        candidates: those that may be factorized.
        inputs: what the model is called with.
        batch_size: examples in a training step.
        rank_ratio: ρ̄.
        iterations: τ, of each kind and stack; the first is not counted. Dense and low rank take turns, so that a change
            in the machine's speed meets both.
        threshold: v.
        autocast: the dtype of mixed precision, if any.
        channels_last: whether images and convolutions are channels_last.
        device: where to train; that of the model if None.
    """
    started = time.perf_counter()
    device = device or next(model.parameters()).device
    modules = {layer.owner: model.get_submodule(layer.owner) for layer in candidates}
    calls = {owner: made[:1] for owner, made in calls_of(model, list(modules), inputs, batch_size).items()}
    stacks: dict[object, list[Layer]] = {}
    for layer in candidates:
        if layer.owner in calls:
            stacks.setdefault(alike(modules[layer.owner], calls[layer.owner], layer), []).append(layer)
    timings, timed = [], {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        block = random_block(list(modules.values()), device)
        for stack in stacks.values():
            owner = stack[0].owner
            if owner not in timed:
                weights = [layer for layer in candidates if layer.owner == owner]
                ranks = {layer: max(1, int(rank_ratio * layer.full_rank + 1e-9)) for layer in weights}
                pair = [copy_of(modules[owner], each, block, channels_last) for each in ({}, ranks)]
                steps = [_Step(module.train(), calls[owner][0], autocast, channels_last) for module in pair]
                timed[owner] = _times(steps, iterations, device)
            dense, low_rank = timed[owner]
            timings.append(StackTiming(tuple(layer.name for layer in stack), dense, low_rank))
    return Profile(
        tuple(timings),
        _keep_first(layers, candidates, timings, threshold),
        threshold,
        rank_ratio,
        2 * iterations * len(timed),
        time.perf_counter() - started,
    )


def _keep_first(
    layers: Sequence[Layer], candidates: Sequence[Layer], timings: Sequence[StackTiming], threshold: float
) -> int:
    worth_it = {name for timing in timings if timing.speedup > threshold for name in timing.names}
    order = units(layers)
    keep_first = min(1, order.index(candidates[0].unit))
    for layer in candidates:
        if layer.name in worth_it:
            break
        keep_first = order.index(layer.unit) + 1
    return keep_first


class _Step:
    """One training iteration of a single layer: forward, and backward to its weights and inputs."""

    def __init__(self, module: nn.Module, call: Arguments, autocast: torch.dtype | None, channels_last: bool) -> None:
        self.module, self.autocast = module, autocast
        weight = next(module.parameters())
        self.device = weight.device
        self.arguments, self.named = with_data(call, weight, channels_last, requires_grad=True, choices=choices(module))
        self.gradients: list[Tensor] = []

    def __call__(self) -> None:
        self.module.zero_grad(set_to_none=True)
        for leaf in tree_leaves((self.arguments, self.named)):
            if isinstance(leaf, Tensor):
                leaf.grad = None
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.module(*self.arguments, **self.named)
        trained = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not self.gradients:
            self.gradients = [torch.randn_like(tensor) for tensor in trained]
        torch.autograd.backward(trained, self.gradients)


def _times(steps: Sequence[_Step], iterations: int, device: torch.device) -> tuple[float, ...]:
    """Median milliseconds of each of `steps`, run in turns; the first turn is not counted."""
    return tuple(statistics.median(taken) for taken in times_in_turns(steps, iterations - 1, device))
