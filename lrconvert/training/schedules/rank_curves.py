"""Curves of stable ranks over the epochs, and when they have settled. Plain numbers: no tensor, no model.

Source: Cuttlefish section 3.4, dϱ/dt ≤ ε for every layer. How the derivative is taken follows the authors' code: of the
smoothed curve, and averaged, because a curve of one measurement an epoch is noisy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from lrconvert.errors import UsageError


@dataclass(frozen=True)
class StabilityCriterion:
    """When a curve counts as settled.

    Attributes:
        window: N, epochs of the exponential moving average, α = 2/(N+1); nothing settles before epoch N.
        mean_of: M, the last slopes whose mean is compared with ε.
        epsilon: ε, stable ranks per epoch.
        relax: (layers left, factor) pairs: while at most so many layers have not settled, ε is multiplied by the
            factor; of several pairs that apply, by that of the fewest layers. Keeps one restless layer from holding up
            the switch.
    """

    window: int
    mean_of: int
    epsilon: float
    relax: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.window < 1 or self.mean_of < 1 or self.epsilon < 0:
            raise UsageError(f"a stability criterion needs window and mean_of of 1 or more, and epsilon ≥ 0: {self}")
        object.__setattr__(self, "relax", tuple(sorted((int(most), float(factor)) for most, factor in self.relax)))

    @classmethod
    def cifar(cls) -> Self:
        """The authors' numbers for CIFAR and SVHN, 200 to 300 epochs."""
        return cls(15, 11, 0.1, ((1, 5.0), (2, 2.5)))

    @classmethod
    def imagenet_cnn(cls) -> Self:
        """The authors' numbers for ResNet-50 and WideResNet-50-2 on ImageNet, 90 epochs."""
        return cls(5, 5, 0.33, ((3, 5.0), (6, 2.5)))

    @classmethod
    def transformer(cls) -> Self:
        """The authors' numbers for DeiT and ResMLP on ImageNet, 300 epochs."""
        return cls(5, 5, 0.411, ((4, 5.0), (9, 2.5)))

    def threshold(self, layers_left: int) -> float:
        """ε while so many layers have not settled."""
        return self.epsilon * next((factor for most, factor in self.relax if layers_left <= most), 1.0)

    def slope(self, curve: Sequence[float]) -> float:
        """Mean of the last M absolute slopes of the smoothed curve, stable ranks per epoch; two points at least.

        Slopes are central differences, one-sided at the two ends.
        """
        return float(np.abs(np.gradient(smoothed(curve, self.window)))[-self.mean_of :].mean())


def smoothed(curve: Sequence[float], window: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Exponential moving average with α = 2/(window+1), starting at the first value."""
    alpha = 2 / (window + 1)
    average = np.array(curve, dtype=np.float64)
    for index in range(1, len(average)):
        average[index] = alpha * average[index] + (1 - alpha) * average[index - 1]
    return average


@dataclass
class RankCurves:
    """The stable ranks of the tracked layers, epoch by epoch.

    Attributes:
        criterion: when a curve counts as settled.
        ranks: layer name to stable ranks: at initialisation, then after each epoch; means over a layer's groups.
        settled: layer name to the epochs after which it settled; layers that have not are missing.
    """

    criterion: StabilityCriterion
    ranks: dict[str, list[float]] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """Epochs measured, the initial weights not counted."""
        return min((len(curve) for curve in self.ranks.values()), default=1) - 1

    @property
    def restless(self) -> list[str]:
        """The layers that have not settled."""
        return [name for name in self.ranks if name not in self.settled]

    def add(self, measured: Mapping[str, float]) -> None:
        """Append one measurement of every layer, and note which layers have settled with it.

        A layer that has settled once stays so. Which ε holds is decided before any layer of this epoch is looked at.
        """
        for name, rank in measured.items():
            self.ranks.setdefault(name, []).append(rank)
        epochs, restless = self.epochs, self.restless
        if epochs < self.criterion.window:
            return
        limit = self.criterion.threshold(len(restless))
        for name in restless:
            if self.criterion.slope(self.ranks[name]) <= limit:
                self.settled[name] = epochs

    def state_dict(self) -> dict[str, Any]:
        """Plain data for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The curves that `state_dict` described, perhaps by way of JSON."""
        criterion = dict(state["criterion"])
        relax = tuple((int(most), float(factor)) for most, factor in criterion.pop("relax"))
        ranks = {name: list(curve) for name, curve in state["ranks"].items()}
        return cls(StabilityCriterion(**criterion, relax=relax), ranks, dict(state["settled"]))
