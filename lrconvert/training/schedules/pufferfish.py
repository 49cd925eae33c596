"""Pufferfish: everything by hand."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lrconvert.errors import UsageError
from lrconvert.training.schedules.schedule import LowRankSchedule


class Pufferfish(LowRankSchedule):
    """Low rank at one rank ratio after a fixed number of epochs (Pufferfish, MLSys 2021, algorithm 1).

    Args:
        model: the bare model; with no full-rank epochs it is factorized here and now, so the optimizer comes after.
        full_rank_epochs: E.
        rank_ratio: ρ = r / full rank, rounded down.
        keep_first: K, the leading layers that stay dense.
        input_shape: shape of one input without the batch, to know the order of the layers from a forward pass.
        state: what `state_dict` returned, to go on from it.
        settings: more of `lrconvert.make_plan`: exclude, include, layer_ranks, rank_multiple …

    Raises:
        NothingToCompressError: no layer can become low rank.
    """

    def __init__(
        self,
        model: nn.Module,
        full_rank_epochs: int,
        rank_ratio: float = 0.25,
        *,
        keep_first: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if full_rank_epochs < 0:
            raise UsageError(f"full_rank_epochs must be 0 or more, not {full_rank_epochs}")
        super().__init__(model, input_shape, f"rank_ratio={rank_ratio}", {"keep_first": keep_first, **settings})
        self.full_rank_epochs = full_rank_epochs
        self._begin(state)

    def _start(self) -> None:
        self.keep_first = self._candidates().keep_first
        if self.full_rank_epochs == 0:
            self._switch_before_training()

    def _is_due(self, epochs: int) -> bool:
        return epochs >= self.full_rank_epochs
