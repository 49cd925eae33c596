"""SI&FD: low rank from the first step."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lrconvert.training.schedules.schedule import LowRankSchedule


class SIFD(LowRankSchedule):
    """Spectral initialisation: the factors are those of the dense layer's initial weight, and E = 0.

    The other half of the method, Frobenius decay, belongs to the optimizer. Source: Khodak et al., ICLR 2021,
    https://arxiv.org/abs/2105.01029.

    Args:
        model: the bare model, with its initial weights. It is factorized here and now: build the optimizer after.
        rank_ratio: ρ; the rank is ρ times the rows of the matrix view (out, or out·kh in the spatial view), to the
            nearest, at least 1.
        keep_first: K, the leading layers that stay dense.
        input_shape: shape of one input without the batch, to know the order of the layers from a forward pass.
        state: what `state_dict` returned, to go on from it.
        settings: more of `lrconvert.make_plan`.

    Raises:
        NothingToCompressError: no layer would get smaller.
    """

    def __init__(
        self,
        model: nn.Module,
        rank_ratio: float,
        keep_first: int = 1,
        *,
        input_shape: tuple[int, ...] | None = None,
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, input_shape, f"row_ratio={rank_ratio}", {"keep_first": keep_first, **settings})
        self._begin(state)

    def _start(self) -> None:
        self.keep_first = self._candidates().keep_first
        self._switch_before_training()

    def _is_due(self, epochs: int) -> bool:
        return False
