"""What every schedule is: a model, the epoch it switches at, and a state that survives a restart."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from lrconvert.analysis import analyze_layers
from lrconvert.errors import NothingToCompressError, UsageError
from lrconvert.hf.mark import mark
from lrconvert.network import open_network
from lrconvert.plan import Plan
from lrconvert.planning import Candidates, candidates_of, plan_options
from lrconvert.surgery import factorize_module, reshape
from lrconvert.training.schedules.agreement import copy_from_first, decided_by_first, is_first
from lrconvert.training.schedules.rank_curves import RankCurves

Phase = Literal["full-rank", "low-rank"]


class LowRankSchedule(ABC):
    """When `model` becomes low rank, and at which ranks.

    Made once, before the first epoch and before the model is wrapped (DistributedDataParallel, torch.compile); after
    every epoch `step` is called, and when it returns True the model was factorized in place: build a new optimizer,
    and wrap the model again. In a distributed run every process makes its schedule and calls `step`; rank 0 decides.

    Attributes:
        model: the bare model.
        phase: "full-rank", and "low-rank" from the switch on.
        plan: what was factorized, from the switch on.
        switch_epoch: E, the full-rank epochs that were trained, from the switch on.
        keep_first: K, the leading layers that stay dense.
        curves: stable ranks epoch by epoch, where the schedule tracks them.
        tracking_seconds: spent on measuring stable ranks so far, the initial ones included.
        profiling_seconds: spent on finding K.
        switch_seconds: spent on deciding on ranks and factorizing.
        notes: what a user should know about the run.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...] | None, rule: str, settings: dict[str, Any]):
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
            raise UsageError(
                f"give the schedule the bare model, not a {type(model).__name__}; wrap it afterwards, and again "
                "after the switch"
            )
        self.model = model
        self.phase: Phase = "full-rank"
        self.plan: Plan | None = None
        self.switch_epoch: int | None = None
        self.keep_first = 0
        self.curves: RankCurves | None = None
        self.tracking_seconds = 0.0
        self.profiling_seconds = 0.0
        self.switch_seconds = 0.0
        self.notes: list[str] = []
        self._input_shape = input_shape
        self._options = plan_options(rule, **settings)
        if self._options.pivoted:
            raise UsageError("pivoted factors are a form to store and to run a network in: train it with plain ones")

    @abstractmethod
    def _start(self) -> None:
        """What is to be done before the first epoch, unless the schedule goes on from an earlier state."""

    @abstractmethod
    def _is_due(self, epochs: int) -> bool:
        """Whether to switch after so many full-rank epochs."""

    def step(self, epoch: int) -> bool:
        """Call after each epoch, once; `epoch` counts from 0.

        Returns:
            True when the model was just factorized, which happens once: its factors are new parameters, and the
            optimizer must be built anew.

        Raises:
            WeightError: a weight is NaN or infinite.
        """
        return self.phase == "full-rank" and self._is_due(epoch + 1) and self._switch(epoch + 1)

    def finish(self) -> None:
        """Call after the last epoch: says so where the model never became low rank."""
        if self.phase == "full-rank":
            self._say("the whole training was at full rank: the model is dense")

    def state_dict(self) -> dict[str, Any]:
        """Plain data (JSON will do) that `load_state_dict`, or the argument `state`, goes on from."""
        return {
            "schedule": type(self).__name__,
            "phase": self.phase,
            "plan": self.plan.model_dump(mode="json") if self.plan else None,
            "switch_epoch": self.switch_epoch,
            "keep_first": self.keep_first,
            "curves": self.curves.state_dict() if self.curves else None,
            "tracking_seconds": self.tracking_seconds,
            "profiling_seconds": self.profiling_seconds,
            "switch_seconds": self.switch_seconds,
            "notes": list(self.notes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with the dense model, freshly built, that an earlier run started with.

        If that run had switched, the model is reshaped by its plan; its weights are loaded, and the optimizer is
        built, after this. A schedule made with `state=` is spared the measurements of a first start.

        Raises:
            UsageError: the state is another schedule's, or of before the switch that this one has made.
            PlanError: the plan does not fit the model.
        """
        if state["schedule"] != type(self).__name__:
            raise UsageError(f"this is the state of {state['schedule']}, not of {type(self).__name__}")
        plan = Plan.model_validate(state["plan"]) if state["plan"] else None
        if self.plan is not None:
            if plan is None or _ranks(plan) != _ranks(self.plan):
                raise UsageError("the model is low rank already, by another plan: build it and its schedule anew")
        elif plan is not None:
            mark(reshape(self.model, plan))
        self.plan = plan
        self.phase = state["phase"]
        self.switch_epoch = state["switch_epoch"]
        self.keep_first = state["keep_first"]
        self.curves = RankCurves.from_state(state["curves"]) if state["curves"] else None
        self.tracking_seconds = state["tracking_seconds"]
        self.profiling_seconds = state["profiling_seconds"]
        self.switch_seconds = state["switch_seconds"]
        self.notes = list(state["notes"])

    def _begin(self, state: Mapping[str, Any] | None) -> None:
        """The last thing that a constructor does."""
        if state is not None:
            self.load_state_dict(state)
        else:
            self._start()

    def _candidates(self) -> Candidates:
        """The layers that may become low rank.

        Raises:
            NothingToCompressError: there is none.
            UsageError: the model is itself one layer.
        """
        candidates = candidates_of(open_network(self.model, input_shape=self._input_shape), self._options)
        if not candidates.shrinkable:
            raise NothingToCompressError(
                f"{candidates.network.name}: no layer can become low rank; try a smaller keep_first, another floor, "
                "or include=[LAYER]"
            )
        if any(not layer.owner for layer in candidates.layers):
            raise UsageError(
                f"the model is itself one layer ({candidates.network.name}), which cannot be replaced in place: "
                "put it into an nn.Sequential"
            )
        return candidates

    def _xi(self, candidates: Candidates) -> dict[str, float]:
        """Measured ξ by layer name; the closed form holds for layers that are not in it."""
        return {}

    def _decide(self) -> Plan:
        candidates = self._candidates()
        spectra = analyze_layers(candidates.network, candidates.layers, None, self._device).spectra
        return candidates.plan(spectra, self._xi(candidates))

    def _switch(self, epochs: int) -> bool:
        """Factorize now, after so many full-rank epochs; False when no layer would get smaller."""
        started = self._now()
        plan = decided_by_first(self._decide)
        if not plan.low_rank:
            self._say("at the ranks found no layer would get smaller: training goes on at full rank")
            return False
        decided_by_first(lambda: self._factorize(plan))
        if not is_first():
            reshape(self.model, plan)
        copy_from_first((*self.model.parameters(), *self.model.buffers()))
        mark(self.model)
        self.plan, self.phase, self.switch_epoch = plan, "low-rank", epochs
        self.switch_seconds += self._now() - started
        return True

    def _factorize(self, plan: Plan) -> None:
        factorize_module(self.model, plan, self._device)

    def _switch_before_training(self) -> None:
        if not self._switch(0):
            raise NothingToCompressError(f"{type(self.model).__name__}: {self.notes[-1].partition(':')[0]}")

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _say(self, note: str) -> None:
        """Note something once, and warn of it."""
        if note not in self.notes:
            self.notes.append(note)
            if is_first():
                warnings.warn(note, stacklevel=4)


def _ranks(plan: Plan) -> dict[str, int | None]:
    return {layer.name: layer.rank for layer in plan.low_rank}
