"""Rank rules by name: from the spectrum of one layer, the rank to keep.

A rule is a name and at most one number whose meaning belongs to the rule. A new rule is one decorated function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.layers import EXPERT_KINDS, Layer
from lrconvert.noise import Values, hard_threshold_rank, variational_bayes_rank
from lrconvert.spectrum import Spectrum


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at.

    Attributes:
        layer: kind and shape.
        spectrum: singular values.
        xi: factor ξ of the scaled stable rank.
    """

    layer: Layer
    spectrum: Spectrum
    xi: float


RankFunction = Callable[[Evidence, float], int]


@dataclass(frozen=True)
class RuleKind:
    """A registered rule: its function, what its number means, and the number's range and default.

    Attributes:
        choose: the function.
        meaning: one line for help texts.
        default: the number when none is given; None when one must be given, or when the rule takes none.
        low, high: the number must lie in (low, high]; both None for a rule that takes no number.
        whole: whether it must be a whole number.
    """

    choose: RankFunction
    meaning: str
    default: float | None = None
    low: float | None = None
    high: float | None = None
    whole: bool = False


RULES: dict[str, RuleKind] = {}


@dataclass(frozen=True)
class Rule:
    """A rule ready to use: its name and its number (0.0 where the rule takes none)."""

    name: str
    value: float = 0.0

    def __str__(self) -> str:
        return self.name if RULES[self.name].high is None else f"{self.name}={self.value:g}"

    def rank(self, evidence: Evidence) -> int:
        """The rank to keep, from 1 to full rank."""
        rank = RULES[self.name].choose(evidence, self.value)
        return max(1, min(rank, evidence.layer.full_rank))


def parse_rule(text: str) -> Rule:
    """A rule from "NAME" or "NAME=NUMBER".

    Raises:
        UnknownNameError: no rule has that name.
        UsageError: the number is missing, not a number, or out of the rule's range.
    """
    name, _, number = text.partition("=")
    kind = RULES.get(name)
    if kind is None:
        raise UnknownNameError("rank rule", name, RULES)
    if kind.high is None or kind.low is None:
        if number:
            raise UsageError(f"rule '{name}' takes no number, but '{number}' was given")
        return Rule(name)
    try:
        value = float(number) if number else kind.default
    except ValueError:
        raise UsageError(f"rule '{name}': '{number}' is not a number") from None
    if value is None:
        raise UsageError(f"rule '{name}' needs a number ({kind.meaning}): write {name}=NUMBER")
    if not kind.low < value <= kind.high:
        bounds = f"above {kind.low:g}" + (f", at most {kind.high:g}" if kind.high < 2**31 else "")
        raise UsageError(f"rule '{name}' needs a number {bounds} ({kind.meaning}), not {value:g}")
    if kind.whole and not value.is_integer():
        raise UsageError(f"rule '{name}' needs a whole number ({kind.meaning}), not {value:g}")
    return Rule(name, value)


def closed_form_xi(layer: Layer) -> float:
    """ξ = full rank / stable rank at initialisation, from the shape alone: (1 + √(min/max))², from 1 to 4.

    For i.i.d. initial weights σ_max² tends to s²(√m + √n)² and ‖W‖² to s²mn (the Marchenko–Pastur edge; Geman
    1980, https://doi.org/10.1214/aop/1176994775).
    """
    rows, columns = layer.matrix_shape
    return (1 + math.sqrt(min(rows, columns) / max(rows, columns))) ** 2


def measured_xi(layer: Layer, at_initialisation: Spectrum) -> float:
    """ξ from the same layer's weight at initialisation (Cuttlefish section 3.3); the closed form for a zero weight."""
    return xi_from(layer, float(at_initialisation.stable_rank().mean()))


def xi_from(layer: Layer, stable_rank: float) -> float:
    """ξ from the stable rank at initialisation, the mean over groups; the closed form for a zero weight."""
    return layer.full_rank / stable_rank if stable_rank else closed_form_xi(layer)


def _rule(
    name: str,
    meaning: str,
    default: float | None = None,
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
) -> Callable[[RankFunction], RankFunction]:
    """Register the decorated function as the rule `name`."""

    def register(choose: RankFunction) -> RankFunction:
        RULES[name] = RuleKind(choose, meaning, default, low, high, whole)
        return choose

    return register


def _ceil(rank: float) -> int:
    """Round up, but not for the rounding noise of a rank that is whole already."""
    return math.ceil(rank - 1e-9)


@_rule("stable_rank", "Σσ²/σ_max², as Cuttlefish uses for SVHN")
def _stable_rank(evidence: Evidence, _: float) -> int:
    return _ceil(float(evidence.spectrum.stable_rank().max()))


@_rule("scaled_stable_rank", "ξ times the stable rank, Cuttlefish section 3.3")
def _scaled_stable_rank(evidence: Evidence, _: float) -> int:
    return _ceil(evidence.xi * float(evidence.spectrum.stable_rank().max()))


@_rule("accumulative", "share of the sum of singular values to keep, Cuttlefish appendix C.2", 0.8, 0, 1)
def _accumulative(evidence: Evidence, p: float) -> int:
    return evidence.spectrum.accumulative_rank(p)


@_rule("energy", "share of the sum of squared singular values to keep", 0.9, 0, 1)
def _energy(evidence: Evidence, e: float) -> int:
    return evidence.spectrum.energy_rank(e)


@_rule("rank_ratio", "rank / full rank, Pufferfish's ρ", 0.25, 0, 1)
def _rank_ratio(evidence: Evidence, rho: float) -> int:
    # 1e-9: 0.29 · 100 is 28.999… in binary.
    return int(rho * evidence.layer.full_rank + 1e-9)


@_rule("row_ratio", "rank / rows of the matrix view, to the nearest whole rank, as SI&FD takes it", 0.25, 0, 1)
def _row_ratio(evidence: Evidence, rho: float) -> int:
    return round(rho * evidence.layer.matrix_shape[0])


@_rule("rank", "the same rank in every layer", None, 0, 2**31, whole=True)
def _rank(_: Evidence, rank: float) -> int:
    return int(rank)


@_rule("effective_rank", "exp of the entropy of σ/Σσ (Roy & Vetterli 2007)")
def _effective_rank(evidence: Evidence, _: float) -> int:
    return _ceil(evidence.spectrum.effective_rank())


@_rule("hard_threshold", "singular values above Gavish and Donoho's optimal threshold for unknown noise")
def _hard_threshold(evidence: Evidence, _: float) -> int:
    return _most_of(evidence, hard_threshold_rank)


@_rule("vbmf", "rank of empirical variational Bayes matrix factorization (Nakajima et al. 2013)")
def _vbmf(evidence: Evidence, _: float) -> int:
    return _most_of(evidence, variational_bayes_rank)


def _most_of(evidence: Evidence, rank: Callable[[Values, int, int], int]) -> int:
    """The largest `rank` over the groups."""
    return max(rank(values.numpy(), *evidence.layer.matrix_shape) for values in evidence.spectrum.values)


# Linear layers, however their weights are stored: attention in one module is to get the ranks of attention in four.
_LINEAR = EXPERT_KINDS | {"linear", "transposed_linear", "attention", "embedding"}


@_rule("auto", "Cuttlefish: scaled stable rank, for linear layers and attention at least accumulative rank 0.8")
def _auto(evidence: Evidence, _: float) -> int:
    scaled = _scaled_stable_rank(evidence, 0.0)
    return max(scaled, evidence.spectrum.accumulative_rank(0.8)) if evidence.layer.kind in _LINEAR else scaled
