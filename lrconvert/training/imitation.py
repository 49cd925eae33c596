"""Training the factors of a network to compute what the dense one computes, on examples without labels.

Hinton et al. 2015 (https://arxiv.org/abs/1503.02531) imitate logits; Romero et al. 2015 (FitNets,
https://arxiv.org/abs/1412.6550) hidden activations too. Here the two networks differ in their factors alone, so that
hidden activations are compared as they are.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.fidelity import distance
from lrconvert.heads import Head
from lrconvert.inputs import Call
from lrconvert.layers import low_rank_modules
from lrconvert.layers.pivoted import refuse_to_train
from lrconvert.modes import at_rest
from lrconvert.training.matching import Watched, blocks_of, check_alike, relative_error
from lrconvert.training.pace import ByClock, BySteps, Pace, rate
from lrconvert.training.teacher import Teacher

_CLIP = 1.0
# How often the held-out error is measured, and after how many times without a lower one the run ends.
_LOOKS, _PATIENCE = 10, 5
# Bytes of the teacher's activations that are kept.
_MEMORY = 4 << 30

Progress = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Imitated:
    """What a run did.

    Attributes:
        error_before, error_after: ‖y′ − y‖ / ‖y‖ of the outputs on held-out examples, measured.
        steps: taken, those after the weights that were kept included.
        epochs: passes over the training examples.
        examples, held_out: trained on, and watched.
        trained: names of the parameters that were trained.
        blocks: names of the modules whose outputs were compared, besides the network's.
        stopped_early: whether it ended because the held-out error fell no more.
    """

    error_before: float
    error_after: float
    steps: int
    epochs: float
    examples: int
    held_out: int
    trained: tuple[str, ...]
    blocks: tuple[str, ...]
    stopped_early: bool


def imitate(
    small: nn.Module,
    teacher: nn.Module,
    calls: Sequence[Call],
    *,
    deadline: float | None = None,
    epochs: float | None = None,
    lr: float = 1e-3,
    held_out: float = 0.05,
    head: Head | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    memory: int = _MEMORY,
    progress: Progress | None = None,
) -> Imitated:
    """Train the factors of `small`, and the biases beside them, until it computes what `teacher` computes.

    AdamW on ‖y′ − y‖² / ‖y‖², a mean over the outputs and those of every block (`matching.blocks_of`), all alike; the
    learning rate climbs and falls over the whole run, see `pace.rate`. Both networks are in eval mode: dropout is off,
    and no running statistics change. The weights with the least error on held-out examples are kept.

    Args:
        small: factorized, in float32; changed in place. Modes and gradients are afterwards as they were.
        teacher: the dense network it was made from.
        calls: batches of examples, whose order is drawn anew in each epoch.
        deadline: when to be done, by `time.monotonic`; or
        epochs: how many passes over the examples. The same seed then gives the same weights on one device.
        lr: the highest learning rate.
        held_out: share of the calls that are watched instead of trained on; one at least.
        head: what of the outputs counts, see `matching.Watched`.
        seed: of the order, and of what is held out.
        device: where to run; both networks are moved there and back.
        memory: bytes of the teacher's activations to keep.
        progress: from what is done and its number of units, a function to call after each.

    Raises:
        UsageError: there is nothing to train, factors are pivoted, there are too few calls, a number is out of range,
            or the deadline comes before the first step.
        ModelError: the teacher does not compute tensors like those of `small`.
        LrconvertError: the loss is no number any more; `small` then has its best weights so far.
    """
    if (deadline is None) == (epochs is None):
        raise UsageError("distillation takes a deadline or a number of epochs: give one of them")
    for what, value in (("epochs", epochs), ("the learning rate", lr)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{what} of distillation must be above 0, not {value:g}")
    trained = trainable(small)
    if not trained:
        raise UsageError("the network has no factors to train: factorize it first")
    half = next((name for name, parameter in trained.items() if parameter.dtype.itemsize < 4), None)
    if half is not None:
        raise UsageError(f"{half} is in {trained[half].dtype}: call model.float(), factors are trained in float32")
    if len(calls) < 2:
        raise UsageError(f"{len(calls)} batch(es) of examples, of which one is held out: give more, or smaller ones")
    with at_rest(small, trained.values(), device) as here, at_rest(teacher, device=device):
        run = _Run(small, teacher, calls, trained, held_out, head, seed, here, memory)
        return run.finish(deadline, epochs, lr, progress)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of `model` and the biases of their modules, by name.

    Raises:
        UsageError: factors are pivoted.
    """
    refuse_to_train(model)
    found: dict[str, nn.Parameter] = {}
    for path, module in low_rank_modules(model):
        factors = {name for weight in module.factored for name in module.counterparts(weight)}
        for name, parameter in module.named_parameters():
            if name in factors or parameter.dim() == 1:
                found[f"{path}.{name}".lstrip(".")] = parameter
    return found


class _Run:
    """One run: which calls it trains on and which it watches, and the best weights so far."""

    def __init__(
        self,
        small: nn.Module,
        teacher: nn.Module,
        calls: Sequence[Call],
        trained: Mapping[str, nn.Parameter],
        held_out: float,
        head: Head | None,
        seed: int,
        device: torch.device,
        memory: int,
    ) -> None:
        self.calls, self.trained = calls, trained
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(calls), generator=self.generator).tolist()
        aside = min(max(round(len(calls) * held_out), 1), len(calls) - 1)
        self.watched, self.seen = order[:aside], order[aside:]
        blocks = blocks_of(small)
        self.small = Watched(small, blocks, head)
        self.teacher = Teacher(Watched(teacher, blocks, head), calls, device, memory)
        self.best_error = math.inf
        self.best = self._weights()

    def finish(self, deadline: float | None, epochs: float | None, lr: float, progress: Progress | None) -> Imitated:
        """Train until `deadline` or for `epochs`."""
        began = time.monotonic()
        before = self._error()
        if not math.isfinite(before):
            raise LrconvertError("the networks' outputs are NaN or infinite before any training: look at their weights")
        self.best_error = before
        pace: Pace = BySteps(max(round((epochs or 0) * len(self.seen)), 1))
        if deadline is not None:
            # What is left after the last step is one more look.
            now = time.monotonic()
            pace = ByClock(now, deadline - (now - began))
        try:
            steps, stopped_early = self._train(pace, lr, progress)
        finally:
            self._restore()
        if not steps:
            raise UsageError("the time was over before the first step: give it more minutes")
        sizes = [sum(self.calls[number].size for number in part) for part in (self.seen, self.watched)]
        return Imitated(
            error_before=before,
            error_after=self.best_error,
            steps=steps,
            epochs=steps / len(self.seen),
            examples=sizes[0],
            held_out=sizes[1],
            trained=tuple(self.trained),
            blocks=self.small.blocks,
            stopped_early=stopped_early,
        )

    def _train(self, pace: Pace, lr: float, progress: Progress | None) -> tuple[int, bool]:
        """(steps that were taken, whether the run ended before its time)."""
        optimizer = torch.optim.AdamW(self.trained.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        advance = progress(f"distilling, {pace.unit}", pace.units) if progress else None
        steps = looks = told = waited = 0
        lowest = math.inf
        for number in self._numbers():
            share = pace.share(steps)
            if share >= 1:
                break
            if share * _LOOKS >= looks + 1:
                looks += 1
                # Beside the looks before, not the start: a high learning rate first makes good factors worse.
                error = self._look()
                lowest, waited = (error, 0) if error < lowest else (lowest, waited + 1)
                if waited == _PATIENCE:
                    return steps, True
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(share)
            self._step(number, optimizer, steps)
            steps += 1
            while advance and told < int(share * pace.units):
                advance()
                told += 1
        self._look()
        return steps, False

    def _numbers(self) -> Iterator[int]:
        """Numbers of the calls to train on, shuffled in every epoch, without end."""
        while True:
            for place in torch.randperm(len(self.seen), generator=self.generator).tolist():
                yield self.seen[place]

    def _step(self, number: int, optimizer: torch.optim.Optimizer, steps: int) -> None:
        wanted = self.teacher(number)
        loss = relative_error(self.small(self.calls[number]).tensors, wanted.tensors)
        if not bool(loss.isfinite()):
            raise LrconvertError(f"the loss is not a number any more, after {steps} steps: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), _CLIP)
        optimizer.step()

    def _look(self) -> float:
        """Measure the held-out error, and keep the weights if they are the best so far."""
        error = self._error()
        if error < self.best_error:
            self.best_error, self.best = error, self._weights()
        return error

    @torch.no_grad()
    def _error(self) -> float:
        """‖y′ − y‖ / ‖y‖ of the outputs on the watched calls."""

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for number in self.watched:
                got, wanted = self.small(self.calls[number]), self.teacher(number)
                check_alike(got.outputs, wanted.outputs)
                yield from zip(got.outputs, wanted.outputs, strict=True)

        return distance(pairs())

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(self.best[name])
