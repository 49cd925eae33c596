"""How long inference takes, measured: every layer dense and at several ranks, and what a plan makes of the model.

Layers of one shape with inputs of one size are timed once, alone, as `lrconvert.profiling` does for training; the dense
layer and all ranks take turns, and the fastest of each counts. A layer alone finds more of its weights in the cache
than in the network, and what surrounds it there costs time too, so what layers save alone is not quite what the network
saves. Predictions are therefore scaled once the network was run at some ranks, see `LatencyTable.corrected`.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrconvert.bench import FEWEST_TURNS, MOST_TURNS, Bench, factorized
from lrconvert.layers import Layer
from lrconvert.plan import Plan
from lrconvert.single_layers import Arguments, alike, calls_of, choices, copy_of, random_block, with_data
from lrconvert.timer import times_in_turns

# Times are taken at multiples of this. Vector units and tensor cores work on so many numbers at once, or fewer: with
# AVX-512 a 3×3 convolution takes as long at rank 8 as at rank 16, and times between two multiples lie above their line.
RANK_STEP = 16
MOST_RANKS, FEWEST_RANKS = 12, 3


@dataclass(frozen=True)
class LayerLatency:
    """Milliseconds that one layer takes in a forward pass of the model, all its calls together.

    Attributes:
        dense_ms: of the dense layer.
        ranks: that were timed, increasing.
        ms: at these ranks, made non-decreasing.
    """

    dense_ms: float
    ranks: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, rank: int | None) -> float:
        """The time at `rank`, None for dense: interpolated; beyond the ranks that were timed, that of the nearest."""
        return self.dense_ms if rank is None else float(np.interp(rank, self.ranks, self.ms))

    def curve(self, full_rank: int) -> npt.NDArray[np.float64]:
        """The time at every rank (full_rank + 1,), from 0 up."""
        return np.interp(np.arange(full_rank + 1), self.ranks, self.ms)


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of a model and of its layers.

    Attributes:
        layers: by name; layers that are never called, or that no rank makes smaller, are missing.
        model_ms: of the whole dense model.
        measured_on: device, threads and batch.
        scale: what factorized layers save in the model, as a share of what they save alone; see `corrected`.
    """

    layers: Mapping[str, LayerLatency]
    model_ms: float
    measured_on: str
    scale: float = 1.0

    @classmethod
    def of(cls, layers: Mapping[str, LayerLatency], model_ms: float, measured_on: str) -> "LatencyTable":
        """The table of `layers` that were timed alone, in a model that takes `model_ms`."""
        # Together they cannot take longer than the model: where they do, the machine was busier when they were timed.
        alone = sum(latency.dense_ms for latency in layers.values())
        return cls(layers, model_ms, measured_on, min(1.0, model_ms / alone) if alone else 1.0)

    def layer_ms(self, name: str, rank: int | None) -> float:
        """Time that the layer `name` takes of the model's at `rank`, None for dense; 0 for one that is missing."""
        layer = self.layers.get(name)
        return 0.0 if layer is None else layer.dense_ms - self.scale * (layer.dense_ms - layer.at(rank))

    def predicted_ms(self, plan: Plan) -> float:
        """Time of the whole model, factorized by `plan`."""
        changes = (self.layer_ms(layer.name, layer.rank) - self.layer_ms(layer.name, None) for layer in plan.low_rank)
        return self.model_ms + sum(changes)

    def corrected(self, plan: Plan, ratio: float) -> "LatencyTable":
        """The table that predicts `ratio` of the dense model's time for `plan`, as it was measured.

        A plan that does not save time says nothing about how much a faster one would: then the table stays.
        """
        predicted, measured = self.model_ms - self.predicted_ms(plan), self.model_ms * (1 - ratio)
        return replace(self, scale=self.scale * measured / predicted) if min(predicted, measured) > 0 else self


class Timing(Protocol):
    """What a network is timed with."""

    def table(self, layers: Sequence[Layer]) -> LatencyTable:
        """Times of the network, and of each of `layers` dense and at ranks up to break-even."""

    def in_turns(self, plan: Plan) -> tuple[float, float]:
        """Milliseconds of one call: (dense, factorized by `plan`)."""

    def __str__(self) -> str:
        """On what."""


class ModelTiming:
    """Times a model on a bench.

    Args:
        model: dense; it is left as it is.
        bench: on what.
    """

    def __init__(self, model: nn.Module, bench: Bench) -> None:
        self.model, self.bench = bench.place(model), bench

    def __str__(self) -> str:
        return str(self.bench)

    def table(self, layers: Sequence[Layer]) -> LatencyTable:
        """See `measure`."""
        return measure(self.model, layers, self.bench)

    def in_turns(self, plan: Plan) -> tuple[float, float]:
        """The fastest of each, see `Bench.measure`."""
        dense, low_rank = self.bench.measure([self.model, factorized(self.model, plan)])
        return dense, low_rank


def measure(model: nn.Module, layers: Sequence[Layer], bench: Bench, seconds: float = 30.0) -> LatencyTable:
    """Time `model`, and each of `layers` dense and at ranks up to break-even.

    Args:
        model: the dense model, placed on the bench.
        layers: those that may be factorized.
        bench: on what.
        seconds: about how long the layers may take, all together. Slow ones are timed less often and at fewer ranks,
            but never less than three times at three ranks.
    """
    weights: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.break_even_rank:
            weights.setdefault(layer.owner, []).append(layer)
    modules = {owner: model.get_submodule(owner) for owner in weights}
    calls = calls_of(model, list(modules), bench.inputs, bench.batch_size)
    stacks: dict[object, list[str]] = {}
    for owner in calls:
        key = tuple(alike(modules[owner], calls[owner], layer) for layer in weights[owner])
        stacks.setdefault(key, []).append(owner)
    found: dict[str, LayerLatency] = {}
    with torch.random.fork_rng([bench.device] if bench.device.type == "cuda" else []):
        (model_ms,) = bench.measure([model])
        block = random_block(list(modules.values()), bench.device)
        share = share_of(seconds, len(stacks))
        for owners in stacks.values():
            first = owners[0]
            stack = _Stack(modules[first], weights[first], calls[first], block, bench)
            for position, latency in enumerate(stack.measure(next(share))):
                found |= {weights[owner][position].name: latency for owner in owners}
    return LatencyTable.of(found, model_ms, str(bench))


def share_of(seconds: float, parts: int) -> Iterator[float]:
    """For each of `parts` in turn, how long it may take: an equal share of what the others left of `seconds`."""
    end = time.perf_counter() + seconds
    for left in range(parts, 0, -1):
        yield (end - time.perf_counter()) / left


@dataclass(frozen=True)
class _Stack:
    """A module that is to be timed for all that are like it.

    Attributes:
        module: in the model.
        weights: those of its weights that may be factorized.
        calls: of the module, in a forward pass of the model.
        block: of random numbers for its parameters.
        bench: on what.
    """

    module: nn.Module
    weights: Sequence[Layer]
    calls: Sequence[Arguments]
    block: Tensor
    bench: Bench

    def measure(self, seconds: float) -> Iterator[LayerLatency]:
        """Times of the weights, in their order; they add up to those of the module.

        Where there are several, each is timed at its ranks while the others have a middle one, and gets a share of the
        module's time in proportion to its parameters: leaving a fused operator, say, is then paid for by all together.
        """
        dense = self.run({})
        (once,) = times_in_turns([dense], 1, self.bench.device, least=1)
        several = len(self.weights)
        ranks = [affordable_ranks(layer.break_even_rank, min(once), seconds, several) for layer in self.weights]
        middle = tuple(each[len(each) // 2] for each in ranks)
        jobs = list(
            dict.fromkeys((*middle[:at], rank, *middle[at + 1 :]) for at, each in enumerate(ranks) for rank in each)
        )
        runs = [self.run(dict(zip(self.weights, job, strict=True))) for job in jobs]
        times = times_in_turns([dense, *runs], MOST_TURNS, self.bench.device, seconds, FEWEST_TURNS)
        dense_ms, *low_rank_ms = (min(taken) for taken in times)
        ms = dict(zip(jobs, low_rank_ms, strict=True))
        total = sum(layer.num_params for layer in self.weights)
        for at, (layer, each) in enumerate(zip(self.weights, ranks, strict=True)):
            share = layer.num_params / total
            others = (1 - share) * ms[middle]
            # A disturbed measurement may leave less than nothing.
            own = [max(0.0, ms[*middle[:at], rank, *middle[at + 1 :]] - others) for rank in each]
            yield LayerLatency(share * dense_ms, each, tuple(non_decreasing(own)))

    def run(self, ranks: Mapping[Layer, int]) -> "_Run":
        """The calls of the module with its weights at these ranks."""
        channels_last = self.bench.channels_last
        copy = copy_of(self.module, ranks, self.block, channels_last).eval()
        like = next(copy.parameters())
        return _Run(copy, [with_data(call, like, channels_last, choices=choices(copy)) for call in self.calls])


@dataclass(frozen=True)
class _Run:
    """All calls of one layer in a forward pass."""

    module: nn.Module
    calls: Sequence[Arguments]

    def __call__(self) -> None:
        with torch.inference_mode():
            for arguments, named in self.calls:
                self.module(*arguments, **named)


def affordable_ranks(break_even: int, dense_ms: float, seconds: float, several: int = 1) -> tuple[int, ...]:
    """The ranks to time of a layer that takes `dense_ms`, one of `several` that share `seconds`; see `measure`."""
    affordable = int(seconds * 1e3 / (dense_ms * (FEWEST_TURNS + 1))) // several
    most = min(max(affordable, FEWEST_RANKS), max(MOST_RANKS // several, FEWEST_RANKS))
    return ranks_to_time(break_even, most)


def ranks_to_time(break_even: int, most: int) -> tuple[int, ...]:
    """At most `most` ranks up to `break_even`, which is one: evenly spaced multiples of 16 from 16 on."""
    ranks = [*range(RANK_STEP, break_even, RANK_STEP), break_even]
    chosen = np.linspace(len(ranks) - 1, 0, min(most, len(ranks))).round().astype(int)
    return tuple(ranks[at] for at in chosen[::-1])


def non_decreasing(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in least squares, by pooling neighbours in the wrong order."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [mean for pool in pools for mean in [statistics.fmean(pool)] * len(pool)]
