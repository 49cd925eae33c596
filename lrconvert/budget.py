"""Budgets by name, what a network may cost or how far it may be off; and allocators, who distribute one over layers.

An allocator says of each layer how much error it makes at each rank, and may say in which proportion the ranks of all
layers grow. A new budget or allocator is one entry here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lrconvert.allocation import FloatArray
from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.ranks import Evidence


@dataclass(frozen=True)
class BudgetKind:
    """What a budget limits.

    Attributes:
        unit: what is counted or measured.
        meaning: of the target, for help texts.
        allocator: the default.
    """

    unit: str
    meaning: str
    allocator: str


KINDS: Mapping[str, BudgetKind] = {
    "param_ratio": BudgetKind("parameters", "compressed / original, over the whole network", "relative_error"),
    "mac_ratio": BudgetKind("MACs", "compressed / original, over the whole network", "relative_error"),
    "latency_ratio": BudgetKind("time", "compressed / original, over the whole network", "relative_error"),
    "max_error": BudgetKind("error", "√(total squared error / total squared norm)", "absolute_error"),
    "min_accuracy": BudgetKind("accuracy", "share of the validation images", "relative_error"),
}


@dataclass(frozen=True)
class Budget:
    """What the whole network may cost, or how far it may be off.

    Attributes:
        kind: one of `KINDS`.
        target: for a ratio, compressed / original over the whole network, reached within 1 %; for "max_error", the root
            of the total squared error over the total squared norm of the layers that may be factorized, both as the
            allocator measures them; for "min_accuracy" the least share of right answers. Above 0, at most 1.
        allocator: one of `ALLOCATORS`.
    """

    kind: str
    target: float
    allocator: str

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise UsageError(f"{self.option} is {KINDS[self.kind].meaning}: above 0, at most 1, not {self.target:g}")
        if self.allocator not in ALLOCATORS:
            raise UnknownNameError("allocator", self.allocator, ALLOCATORS)

    def __str__(self) -> str:
        return f"{self.kind}={self.target:g} by {self.allocator}"

    @property
    def option(self) -> str:
        """How the command line asks for it: "--param-ratio"."""
        return f"--{self.kind.replace('_', '-')}"

    @property
    def words(self) -> str:
        """In a sentence: "param ratio 0.6"."""
        return f"{self.kind.replace('_', ' ')} {self.target:g}"


def one_budget(allocator: str | None = None, **targets: float | None) -> Budget | None:
    """The budget of the one target, by kind, that is not None, distributed by the kind's default unless said otherwise.

    None where all targets are.

    Raises:
        UsageError: there are several, or an allocator without any.
    """
    given = {kind: target for kind, target in targets.items() if target is not None}
    if len(given) > 1:
        names = " and ".join(f"{kind}={target:g}" for kind, target in given.items())
        raise UsageError(f"one budget at a time: {names} were given")
    for kind, target in given.items():
        return Budget(kind, target, allocator or KINDS[kind].allocator)
    if allocator is not None:
        options = ", ".join(f"--{kind.replace('_', '-')}" for kind in targets)
        raise UsageError(f"--allocator {allocator} distributes a budget: give one of {options}")
    return None


@dataclass(frozen=True)
class Allocator:
    """How a budget is distributed.

    Attributes:
        meaning: one line for help texts.
        curve: squared error of a layer at every rank (full_rank + 1,), from 0 up, in a unit that adds over layers; None
            where only a calibration knows it.
        share: ranks of all layers are this, of each, times one common factor; None where errors alone decide.
    """

    meaning: str
    curve: Callable[[Evidence], FloatArray] | None
    share: Callable[[Evidence], float] | None = None


def error_curve(evidence: Evidence) -> FloatArray:
    """‖W − W_r‖² at every rank r from 0 to full rank (full_rank + 1,): what the singular values left out add up to."""
    curve: FloatArray = evidence.spectrum.tail_energies().numpy()
    return curve


def relative_curve(evidence: Evidence) -> FloatArray:
    """‖W − W_r‖² / ‖W‖² at every rank r from 0 to full rank (full_rank + 1,); all 0 for a zero weight."""
    curve = error_curve(evidence)
    return curve / curve[0] if curve[0] else curve


def _scaled_stable_rank(evidence: Evidence) -> float:
    return evidence.xi * float(evidence.spectrum.stable_rank().max())


ALLOCATORS: Mapping[str, Allocator] = {
    "relative_error": Allocator("least total of ‖W − W_r‖² / ‖W‖²", relative_curve),
    "absolute_error": Allocator("least total of ‖W − W_r‖²", error_curve),
    "stable_rank": Allocator("Cuttlefish's scaled stable ranks, times one factor", error_curve, _scaled_stable_rank),
    "output_error": Allocator("least total error of the network's output, predicted by --calibrate", None),
    "sensitivity": Allocator("the same, corrected by what low ranks of each layer were measured to do", None),
    "uniform": Allocator("one rank ratio for all layers", error_curve, lambda evidence: evidence.layer.full_rank),
}
# Those who go by what a calibration knows.
FROM_EXAMPLES = tuple(name for name, allocator in ALLOCATORS.items() if allocator.curve is None)
