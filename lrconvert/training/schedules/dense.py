"""The schedule of ordinary training, to compare with."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lrconvert.training.schedules.schedule import LowRankSchedule


class Dense(LowRankSchedule):
    """Full rank from the first epoch to the last: `step` always returns False.

    Args:
        model: the bare model.
        state: what `state_dict` returned, to go on from it.
    """

    def __init__(self, model: nn.Module, *, state: Mapping[str, Any] | None = None) -> None:
        super().__init__(model, None, "auto", {})
        self._begin(state)

    def finish(self) -> None:
        """Nothing: a dense model is what was asked for."""

    def _start(self) -> None:
        pass

    def _is_due(self, epochs: int) -> bool:
        return False
