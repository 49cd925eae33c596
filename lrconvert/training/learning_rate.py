"""The learning rate at every moment of a run: a function of time, and of the few events that change it."""

import math
from dataclasses import dataclass
from typing import Any

from lrconvert.recipe import Recipe


@dataclass
class LearningRate:
    """The learning rate as `recipe` schedules it.

    Attributes:
        recipe: the run's; see `lrconvert.recipe.Recipe` for its fields.
        switch_epoch: E, once the network has become low rank.
        drops: how often "plateau" has lowered the rate.
        best: the best validation accuracy so far.
        waited: epochs since then.
    """

    recipe: Recipe
    switch_epoch: int | None = None
    drops: int = 0
    best: float = -math.inf
    waited: int = 0

    def at(self, epoch: float) -> float:
        """The learning rate when `epoch` epochs are done, fractions counted."""
        recipe, switch = self.recipe, self.switch_epoch
        if switch is not None and epoch >= switch:
            if recipe.lr_at_switch == "factor":
                return self._scheduled(epoch) * recipe.lr_switch_factor
            end = switch + recipe.warmup_epochs
            # After a milestone a fresh warm-up would climb to a rate that the schedule has left behind.
            if recipe.lr_at_switch == "rewarm" and epoch < end and not self._milestones_passed(switch):
                share = (epoch - switch) / recipe.warmup_epochs
                return recipe.warmup_lr + share * (self._scheduled(end) - recipe.warmup_lr)
        return self._scheduled(epoch)

    def switched(self, epoch: int) -> None:
        """The network became low rank when `epoch` epochs were done."""
        self.switch_epoch = epoch
        # What the dense network reached is no yardstick for the low-rank one.
        self.best, self.waited = -math.inf, 0

    def epoch_ended(self, accuracy: float) -> None:
        """Take note of the validation accuracy, for "plateau"."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
            if self.waited >= self.recipe.patience_epochs:
                self.drops, self.waited = self.drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """What happened so far, as plain data."""
        return {"switch_epoch": self.switch_epoch, "drops": self.drops, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.switch_epoch, self.drops = state["switch_epoch"], state["drops"]
        self.best, self.waited = state["best"], state["waited"]

    def _scheduled(self, epoch: float) -> float:
        recipe = self.recipe
        if epoch < recipe.warmup_epochs:
            return recipe.warmup_lr + epoch / recipe.warmup_epochs * (recipe.lr - recipe.warmup_lr)
        if recipe.sched == "multistep":
            return recipe.lr * recipe.decay_rate ** self._milestones_passed(epoch)
        if recipe.sched == "plateau":
            return max(recipe.lr * recipe.decay_rate**self.drops, recipe.min_lr)
        if recipe.sched == "cosine":
            done = (epoch - recipe.warmup_epochs) / max(recipe.epochs - recipe.warmup_epochs, 1e-9)
            return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return recipe.lr

    def _milestones_passed(self, epoch: float) -> int:
        if self.recipe.sched != "multistep":
            return 0
        at = (each if each >= 1 else each * self.recipe.epochs for each in self.recipe.decay_milestones)
        return sum(epoch >= milestone for milestone in at)
