"""Cuttlefish: E, K and the ranks are found while training."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.errors import UsageError
from lrconvert.layers import Layer
from lrconvert.planning import Candidates
from lrconvert.profiling import Profile, profile
from lrconvert.ranks import xi_from
from lrconvert.spectrum import finite_energy
from lrconvert.stable_rank import stable_ranks
from lrconvert.training.schedules.agreement import decided_by_first
from lrconvert.training.schedules.rank_curves import RankCurves, StabilityCriterion
from lrconvert.training.schedules.schedule import LowRankSchedule

_CIFAR = StabilityCriterion.cifar()


class Cuttlefish(LowRankSchedule):
    """Low rank once the stable ranks have settled, at ranks scaled by what they were at first (Cuttlefish, MLSys 2023).

    The constructor measures every layer's stable rank at initialisation, for ξ, and finds K by profiling where it can;
    `step` measures again, and switches after the first epoch at which all tracked layers have settled. Exactly the
    layers that may be factorized are tracked. Nothing is measured when the schedule goes on from a `state`.

    Args:
        model: the bare model, with its initial weights, on the device it is trained on.
        input_shape: shape of one input without the batch: for profiling, and to know the order of the layers.
        rule: chooses the ranks at the switch; see `lrconvert.ranks.RULES`. "auto" is the scaled stable rank, for linear
            layers at least the accumulative rank at 0.8.
        criterion: when a curve counts as settled; its presets are the authors' numbers.
        max_full_rank_epochs: switch after so many epochs even where ranks have not settled; a note then says so.
        keep_first: K; None for profiling where `batch_size` is given, else for one layer.
        batch_size: of the training, for profiling; with it, `input_shape` is needed too unless the model tells it.
        autocast: the dtype of mixed-precision training, for profiling.
        channels_last: whether images are channels_last in training, for profiling.
        state: what `state_dict` returned, to go on from it.
        settings: more of `lrconvert.make_plan`: floor, exclude, include, rank_multiple …

    Attributes:
        profile: what profiling measured, where it did.

    Raises:
        NothingToCompressError: no layer can become low rank.
        UsageError: an argument makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_shape: tuple[int, ...] | None = None,
        rule: str = "auto",
        criterion: StabilityCriterion = _CIFAR,
        max_full_rank_epochs: int | None = None,
        keep_first: int | None = None,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if max_full_rank_epochs is not None and max_full_rank_epochs < 1:
            raise UsageError(f"max_full_rank_epochs must be 1 or more, not {max_full_rank_epochs}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be 1 or more, not {batch_size}")
        super().__init__(model, input_shape, rule, {"keep_first": keep_first, **settings})
        self.criterion = criterion
        self.max_full_rank_epochs = max_full_rank_epochs
        self.profile: Profile | None = None
        self._batch_size, self._autocast, self._channels_last = batch_size, autocast, channels_last
        self._tracked: tuple[Layer, ...] = ()
        self._begin(state)

    def finish(self) -> None:
        """Call after the last epoch: says so where ranks never settled."""
        if self.phase == "full-rank" and self.curves is not None and self.curves.restless:
            self._say(f"{_unsettled(self.curves)}: the whole training was at full rank; set max_full_rank_epochs")
        else:
            super().finish()

    def state_dict(self) -> dict[str, Any]:
        """Plain data, with the profile."""
        return {**super().state_dict(), "profile": asdict(self.profile) if self.profile else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As for every schedule; the criterion is the one of the earlier run."""
        super().load_state_dict(state)
        self.profile = Profile.from_state(state["profile"]) if state["profile"] else None
        self._take_keep_first()
        if self.phase == "full-rank":
            self._track(self._candidates())
            assert self.curves is not None
            if self.curves.ranks.keys() != {layer.name for layer in self._tracked}:
                raise UsageError("the state tracks other layers: give the schedule the arguments of the earlier run")

    def _start(self) -> None:
        candidates = self._candidates()
        if self._options.keep_first is None and self._batch_size is not None:
            self.profile = decided_by_first(lambda: self._profile(candidates))
            self.profiling_seconds = self.profile.seconds
            if not self.profile.pays:
                best = max(stack.speedup for stack in self.profile.stacks)
                self._say(
                    f"no layer gets {self.profile.threshold:g} times as fast at rank ratio {self.profile.rank_ratio:g} "
                    f"(the best {best:.2f} times): the network gets smaller rather than faster"
                )
            self._take_keep_first()
            candidates = self._candidates()
        self._track(candidates)
        self.curves = RankCurves(self.criterion)
        self._measure()

    def _profile(self, candidates: Candidates) -> Profile:
        network = candidates.network
        if network.inputs is None or network.trace is None:
            why = f" ({network.notes[-1]})" if network.notes else ""
            raise UsageError(f"no forward pass to profile{why}: give input_shape, or keep_first and no batch_size")
        assert self._batch_size is not None
        return profile(
            self.model,
            network.layers,
            candidates.shrinkable,
            network.inputs,
            self._batch_size,
            autocast=self._autocast,
            channels_last=self._channels_last,
        )

    def _take_keep_first(self) -> None:
        """Let K be what profiling found, if it found layers that pay."""
        if self.profile is not None and self.profile.pays:
            self._options = replace(self._options, keep_first=self.profile.keep_first)

    def _track(self, candidates: Candidates) -> None:
        self._tracked, self.keep_first = candidates.shrinkable, candidates.keep_first

    def _measure(self) -> None:
        """Add the stable rank of every tracked layer to its curve."""
        started = self._now()
        assert self.curves is not None
        self.curves.add(decided_by_first(self._stable_ranks))
        self.tracking_seconds += self._now() - started

    def _stable_ranks(self) -> dict[str, float]:
        views = [_matrices(layer, self.model.get_parameter(layer.weight).detach()) for layer in self._tracked]
        found = {}
        for layer, view, ranks in zip(self._tracked, views, stable_ranks(views), strict=True):
            if bool(ranks.isnan().any()):
                finite_energy(view, layer.name)  # says what is wrong with it
            found[layer.name] = float(ranks.mean())
        return found

    def _is_due(self, epochs: int) -> bool:
        self._measure()
        assert self.curves is not None
        if not self.curves.restless:
            return True
        if self.max_full_rank_epochs is None or epochs < self.max_full_rank_epochs:
            return False
        if epochs == self.max_full_rank_epochs:
            self._say(f"{_unsettled(self.curves)}: switched all the same, at max_full_rank_epochs")
        return True

    def _xi(self, candidates: Candidates) -> dict[str, float]:
        assert self.curves is not None
        initial = {name: curve[0] for name, curve in self.curves.ranks.items()}
        return {layer.name: xi_from(layer, initial[layer.name]) for layer in candidates.layers if layer.name in initial}


def _matrices(layer: Layer, weight: Tensor) -> Tensor:
    """The matrices of `weight`, their columns in whatever order spares a copy: singular values do not depend on it."""
    if layer.kind == "conv2d" and layer.view == "channel" and not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)  # contiguous if the weight is channels_last
    return layer.layout.matrices(weight, layer.groups)


def _unsettled(curves: RankCurves) -> str:
    restless = curves.restless
    return (
        f"the ranks of {len(restless)} of {len(curves.ranks)} layers had not settled after {curves.epochs} epochs "
        f"({', '.join(restless[:3])}{', …' if len(restless) > 3 else ''})"
    )
