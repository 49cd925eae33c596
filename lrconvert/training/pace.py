"""How far a run is that may last a number of epochs or a time by the clock, and the learning rate that follows."""

import math
import time
from dataclasses import dataclass
from typing import Protocol

# Share of a run in which the learning rate climbs, and from which share of its height.
_WARMUP, _WARMUP_FROM = 0.05, 0.2


class Pace(Protocol):
    """Says how far a run is."""

    @property
    def units(self) -> int:
        """How many units of progress there are, for those who watch."""

    @property
    def unit(self) -> str:
        """What they are."""

    def share(self, steps: int) -> float:
        """What is done after `steps` steps: from 0, and 1 or more when no other step should be begun."""


@dataclass(frozen=True)
class BySteps:
    """A run of `total` steps."""

    total: int

    @property
    def units(self) -> int:
        """As many as steps."""
        return self.total

    @property
    def unit(self) -> str:
        """Steps."""
        return "steps"

    def share(self, steps: int) -> float:
        """Steps done, of all."""
        return steps / self.total


@dataclass(frozen=True)
class ByClock:
    """A run from `began` to `deadline`, both by `time.monotonic`."""

    began: float
    deadline: float

    @property
    def units(self) -> int:
        """As many as seconds."""
        return max(math.ceil(self.deadline - self.began), 1)

    @property
    def unit(self) -> str:
        """Seconds."""
        return "seconds"

    def share(self, steps: int) -> float:
        """Time gone, of all; 1 already when another step, as long as those before, would end after the deadline."""
        now = time.monotonic()
        each = (now - self.began) / steps if steps else 0.0
        return 1.0 if now + each >= self.deadline else (now - self.began) / (self.deadline - self.began)


def rate(share: float) -> float:
    """The learning rate as a share of its height, when `share` of a run is done: a short climb, then half a cosine."""
    climb = min(_WARMUP_FROM + (1 - _WARMUP_FROM) * share / _WARMUP, 1.0)
    return climb * (1 + math.cos(math.pi * min(share, 1.0))) / 2
