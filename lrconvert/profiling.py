"""Which layers get faster when they are factorized: Cuttlefish's algorithm 2, which finds K.

A stack is all layers with the same weight and the same input; one of them is trained for a few iterations, dense and
at rank ratio ρ̄ = 1/4, on random inputs of the size that it meets in the network. It is worth factorizing when the dense
one takes more than v = 1.5 times as long, as section 3.5 says; the condition printed in algorithm 2 is inverted. The
layer is timed alone, as in the paper's figure 4: in the time of the whole network a single stack could never make a
difference of 1.5 times.
"""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lrconvert.cost import observe
from lrconvert.inputs import Inputs
from lrconvert.layers import Layer
from lrconvert.plan import LayerPlan, Plan, units
from lrconvert.surgery import reshape

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
    owners = dict.fromkeys(layer.owner for layer in candidates)
    calls = _calls(model, list(owners), inputs, batch_size)
    stacks: dict[object, list[Layer]] = {}
    for layer in candidates:
        if layer.owner in calls:
            stacks.setdefault(_alike(model.get_submodule(layer.owner), calls[layer.owner], layer), []).append(layer)
    timings, timed = [], {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for stack in stacks.values():
            owner = stack[0].owner
            if owner not in timed:
                weights = [layer for layer in candidates if layer.owner == owner]
                pair = _pair(model.get_submodule(owner), weights, rank_ratio, device, channels_last)
                steps = [_Step(module, calls[owner], device, autocast, channels_last) for module in pair]
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


def _calls(model: nn.Module, owners: Sequence[str], inputs: Inputs, batch_size: int) -> dict[str, Arguments]:
    """By path, the arguments of the first call of each module in a forward pass; tensors are on the meta device."""
    paths = {model.get_submodule(owner): owner for owner in owners}
    calls: dict[str, Arguments] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.setdefault(paths[module], (arguments, named))

    observe(model, inputs, batch_size, paths, record)
    return calls


def _alike(module: nn.Module, call: Arguments, layer: Layer) -> object:
    """Equal for two weights whose modules are of one kind and shape, and are called with tensors of one shape."""
    shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(call) if isinstance(leaf, Tensor))
    return type(module), module.extra_repr(), layer.parameter, layer.shape, layer.groups, shapes


def _pair(
    module: nn.Module, weights: Sequence[Layer], rank_ratio: float, device: torch.device, channels_last: bool
) -> tuple[nn.Module, nn.Module]:
    """A dense and a factorized copy of `module`, with small random weights: their values do not matter."""
    dense = copy.deepcopy(module).to(device)
    local = [
        replace(layer, name=layer.name.removeprefix(layer.owner).removeprefix("."), weight=layer.parameter)
        for layer in weights
    ]
    ranks = [max(1, int(rank_ratio * layer.full_rank + 1e-9)) for layer in local]
    plan = Plan(layers=tuple(LayerPlan.of(layer, rank) for layer, rank in zip(local, ranks, strict=True)))
    low_rank = reshape(copy.deepcopy(dense), plan)
    for each in (dense, low_rank):
        each.train()
        for parameter in each.parameters():
            nn.init.normal_(parameter, std=0.02)
        if channels_last:
            each.to(memory_format=torch.channels_last)
    return dense, low_rank


class _Step:
    """One training iteration of a single layer: forward, and backward to its weights and inputs."""

    def __init__(
        self,
        module: nn.Module,
        call: Arguments,
        device: torch.device,
        autocast: torch.dtype | None,
        channels_last: bool,
    ) -> None:
        self.module = module
        self.device, self.autocast = device, autocast
        self.arguments, self.named = tree_map(lambda leaf: _random_like(leaf, device, channels_last), call)
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


def _random_like(leaf: Any, device: torch.device, channels_last: bool) -> Any:
    """A tensor with data in the place of one without; anything else comes back as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    if not leaf.is_floating_point():
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
    tensor = torch.randn(leaf.shape, dtype=leaf.dtype, device=device)
    if channels_last and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor.requires_grad_()


def _times(steps: Sequence[_Step], iterations: int, device: torch.device) -> tuple[float, ...]:
    """Median milliseconds of each of `steps`, run in turns; the first turn is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(iterations):
        for step, taken in zip(steps, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            taken.append((time.perf_counter() - start) * 1e3)
    return tuple(statistics.median(taken[1:]) for taken in times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
