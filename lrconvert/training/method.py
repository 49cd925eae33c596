"""The low-rank schedule that a recipe asks for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrconvert.recipe import CuttlefishSettings, PlanSettings, PufferfishSettings, Recipe, SIFDSettings
from lrconvert.training.schedules import (
    SIFD,
    Cuttlefish,
    Dense,
    LowRankSchedule,
    Pufferfish,
    StabilityCriterion,
)

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What of the settings is no option of a plan.
_OWN = {"method", "frobenius_decay", "full_rank_epochs", "rank_ratio", "rule", "max_full_rank_epochs"}
_CRITERION = {"window", "mean_of", "epsilon", "relax"}


def make_schedule(
    recipe: Recipe,
    model: nn.Module,
    input_shape: tuple[int, ...],
    processes: int = 1,
    state: Mapping[str, Any] | None = None,
) -> LowRankSchedule:
    """The schedule of `recipe`, which may factorize `model` at once.

    Args:
        recipe: the run's.
        model: the bare model, on its device.
        input_shape: shape of one image.
        processes: that share a batch.
        state: of the schedule of an earlier run, to go on from.
    """
    chosen = recipe.low_rank
    if not isinstance(chosen, PlanSettings):
        return Dense(model, state=state)
    settings: dict[str, Any] = chosen.model_dump(exclude=_OWN | _CRITERION)
    settings |= {"input_shape": input_shape, "state": state}
    if isinstance(chosen, PufferfishSettings):
        return Pufferfish(model, chosen.full_rank_epochs, chosen.rank_ratio, **settings)
    if isinstance(chosen, SIFDSettings):
        settings["keep_first"] = 1 if chosen.keep_first is None else chosen.keep_first
        return SIFD(model, chosen.rank_ratio, **settings)
    assert isinstance(chosen, CuttlefishSettings)
    at_a_time = recipe.batch_size // recipe.grad_accum_steps // processes
    return Cuttlefish(
        model,
        rule=chosen.rule,
        criterion=StabilityCriterion(**chosen.model_dump(include=_CRITERION)),
        max_full_rank_epochs=chosen.max_full_rank_epochs,
        batch_size=at_a_time if chosen.keep_first is None else None,
        autocast=_AUTOCAST[recipe.amp],
        channels_last=recipe.channels_last,
        **settings,
    )
