"""The plan: which layer, which kind, which rank, and for each layer left dense, why. Plain data, decided here.

Nothing in this file touches a tensor. A plan is printed, edited, saved, run again, and stored in every file that
lrconvert writes, so that a factorized model can be rebuilt from its file alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field

from lrconvert.budget import Budget
from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.layers import LAYOUTS, Layer, View
from lrconvert.patterns import check_patterns, first_match, matches
from lrconvert.ranks import Evidence, Rule, closed_form_xi
from lrconvert.spectrum import Spectrum

Order = Literal["execution", "file"]

# Reasons that both rules and budgets have.
ALL_ZERO = "all zero"
GIVEN = "given"


class LayerPlan(BaseModel):
    """The decision for one layer.

    Attributes:
        name: path of the layer in the model.
        weight: key of its weight.
        kind: kind of layer, see `lrconvert.layers.FAMILIES`.
        shape: shape of the dense weight, out first.
        groups: matrices in the weight, each factorized on its own.
        rank: singular values kept per group; None for a layer that stays dense.
        reason: the rule that chose the rank, or why the layer stays dense.
        error: predicted ‖W − W_r‖ / ‖W‖; None for a layer that stays dense.
        evidence: "module" when a model settled the kind, "shape" when it was read from the file alone.
        norm: whether a BatchNorm stands between the factors, with the key "layer.bn.weight" and so on.
        view: which matrix the weight is seen as, see `lrconvert.layers.Layer`.
        pivoted: whether the first factor is stored without its pivots, with "layer.u.order" beside it, see
            `lrconvert.layers.pivots`.
        data_aware: whether the factors are those of least output error (see `lrconvert.response`); `error` is then
            predicted of the outputs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weight: str
    kind: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    groups: int = Field(1, ge=1)
    rank: int | None = Field(None, ge=1)
    reason: str = ""
    error: float | None = None
    evidence: Literal["module", "shape"] = "module"
    norm: bool = False
    view: View = "channel"
    pivoted: bool = False
    data_aware: bool = False

    @classmethod
    def of(cls, layer: Layer, rank: int | None, reason: str = "", error: float | None = None) -> Self:
        """The decision to give `layer` this rank, or to leave it dense."""
        return cls(
            name=layer.name,
            weight=layer.weight,
            kind=layer.kind,
            shape=layer.shape,
            groups=layer.groups,
            rank=rank,
            reason=reason,
            error=error,
            evidence=layer.evidence,
            norm=layer.norm and rank is not None,
            view=layer.view,
            pivoted=layer.pivoted and rank is not None,
        )

    @property
    def layer(self) -> Layer:
        """The layer that was decided on."""
        return Layer(
            self.name,
            self.weight,
            self.kind,
            self.shape,
            self.groups,
            evidence=self.evidence,
            norm=self.norm,
            view=self.view,
            pivoted=self.pivoted,
        )

    @property
    def num_params_after(self) -> int:
        """Elements of the weight, or of the factors and the norm that replace it; without bias."""
        return self.layer.num_params if self.rank is None else self.layer.num_low_rank_params(self.rank)

    def key(self, factor: Literal["u", "bn", "v"], parameter: str = "weight") -> str:
        """State-dict key of a factor, or of the norm between them: "layer.u.weight"."""
        return f"{self.layer.factor_path(factor)}.{parameter}"

    @property
    def bias_key(self) -> str:
        """State-dict key of the bias that moves to `v`, whether there is one or not."""
        return self.layer.bias_key


class Target(BaseModel):
    """What a budget asked for, and what the plan reaches.

    Attributes:
        kind: of the budget, see `lrconvert.budget.KINDS`.
        asked, reached: in the unit of that kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    asked: float
    reached: float


class PlanLatency(BaseModel):
    """Milliseconds of one call of the model, see `lrconvert.bench`.

    Attributes:
        dense_ms: of the dense model, measured: the fastest of several.
        predicted_ms: of the factorized model, from the times of its layers alone and of the dense model.
        measured_ms: of the factorized model, measured likewise, in turns with the dense one.
        measured_on: device, threads and batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense_ms: float
    predicted_ms: float
    measured_ms: float
    measured_on: str

    @property
    def ratio(self) -> float:
        """Factorized / dense, measured."""
        return self.measured_ms / self.dense_ms


class Plan(BaseModel):
    """The decisions for a whole network.

    Attributes:
        version: of this format.
        order: "execution" when the layers are in the order a forward pass calls them, "file" otherwise.
        rule: the rule or the budget that chose the ranks.
        target: what the budget asked for, where the ranks were chosen within one.
        layers: one decision a layer, in that order.
        latency: of the model with these ranks, where it was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    order: Order = "file"
    rule: str = ""
    target: Target | None = None
    layers: tuple[LayerPlan, ...]
    latency: PlanLatency | None = None

    @property
    def low_rank(self) -> tuple[LayerPlan, ...]:
        """The layers that are factorized."""
        return tuple(layer for layer in self.layers if layer.rank is not None)

    @property
    def saved_params(self) -> int:
        """Parameters that the plan takes away."""
        return sum(layer.layer.num_params - layer.num_params_after for layer in self.low_rank)


@dataclass(frozen=True)
class PlanOptions:
    """What to factorize and how ranks are rounded.

    Attributes:
        rule: chooses the ranks: a rule those of each layer, a budget those of all layers together.
        keep_first: K, how many leading layers stay dense; None for one, unless no other layer can be factorized.
        keep_last: whether the last layer, where it is linear, stays dense, unless no other layer can be factorized.
        include: patterns; when there are any, only matching layers are factorized. A pattern without wildcards also
            overrules `keep_first`, `keep_last` and a guessed reason to stay dense, for the layer it names.
        exclude: patterns of layers that stay dense; they win over `include`.
        floor: smallest rank allowed, as a share of full rank.
        rank_multiple: ranks are rounded up to a multiple of this, or down where up would not shrink the layer.
        layer_ranks: (pattern, rank) pairs that overrule rule and budget; the first match counts.
        splits: (pattern, parts) pairs: the outputs of a linear, recurrent or packed attention weight are that many
            matrices, each factorized on its own; 1 takes them together. The first match counts.
        include_embeddings: whether embeddings, which stay dense unless named, are factorized like other layers.
        extra_norm: whether a BatchNorm stands between the factors of linear layers and convolutions.
        view: which matrix a convolution is seen as; "spatial" for those of two dimensions, one group and a kernel
            larger than 1×1, while all others keep the "channel" view.
        pivoted: whether first factors are stored without their pivots where they can be: in linear layers, attention,
            and convolutions of kernel 1 in one group.
    """

    rule: Rule | Budget
    keep_first: int | None = None
    keep_last: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    floor: float = 0.0
    rank_multiple: int = 1
    layer_ranks: tuple[tuple[str, int], ...] = ()
    splits: tuple[tuple[str, int], ...] = ()
    include_embeddings: bool = False
    extra_norm: bool = False
    view: View = "channel"
    pivoted: bool = False

    def __post_init__(self) -> None:
        if self.keep_first is not None and self.keep_first < 0:
            raise UsageError(f"--keep-first must be 0 or more, not {self.keep_first}")
        if self.rank_multiple < 1:
            raise UsageError(f"--rank-multiple must be 1 or more, not {self.rank_multiple}")
        if not 0 <= self.floor <= 1:
            raise UsageError(f"--rank-floor is a share of full rank from 0 to 1, not {self.floor:g}")
        if self.view not in get_args(View):
            raise UnknownNameError("view", self.view, get_args(View))
        if self.pivoted and self.extra_norm:
            raise UsageError("--extra-bn is to train with, and pivoted factors are not trained: leave one of them out")
        for pattern, rank in self.layer_ranks:
            if rank < 1:
                raise UsageError(f"--layer-rank {pattern}={rank}: a rank is 1 or more")
        for pattern, parts in self.splits:
            if parts < 1:
                raise UsageError(f"--split {pattern}={parts}: a number of parts is 1 or more")


def decide(
    layers: Sequence[Layer],
    spectra: Mapping[str, Spectrum],
    options: PlanOptions,
    order: Order = "file",
    xi: Mapping[str, float] | None = None,
) -> Plan:
    """A plan from spectra and options, each layer by its own spectrum; see `lrconvert.plan_budget` for all together.

    Args:
        layers: every weight of the network, in `order`.
        spectra: by layer name; needed for every layer that `reasons_to_stay_dense` does not name.
        options: what the user asked for.
        order: what the sequence of `layers` is.
        xi: ξ by layer name, where it was measured; the closed form is used elsewhere.

    Raises:
        PatternError: a pattern matches no layer.
    """
    rule = options.rule
    if not isinstance(rule, Rule):
        raise TypeError(f"{rule} is met by all layers together, and no layer can be decided on alone")
    reasons = reasons_to_stay_dense(layers, options)
    decisions = []
    for layer in layers:
        rank, reason = None, reasons.get(layer.name, "")
        if not reason:
            evidence = Evidence(layer, spectra[layer.name], (xi or {}).get(layer.name, closed_form_xi(layer)))
            rank, reason = _rank_or_reason(evidence, rule, options)
        error = None if rank is None else spectra[layer.name].error(rank)
        decisions.append(LayerPlan.of(layer, rank, reason, error))
    return Plan(order=order, rule=str(options.rule), layers=tuple(decisions))


def reasons_to_stay_dense(layers: Sequence[Layer], options: PlanOptions) -> dict[str, str]:
    """By layer name, why a layer stays dense whatever its spectrum; layers not named here need one.

    Raises:
        PatternError: a pattern matches no layer.
    """
    names = [layer.name for layer in layers]
    check_patterns(options.include, names, "--include")
    check_patterns(options.exclude, names, "--exclude")
    check_patterns([pattern for pattern, _ in options.layer_ranks], names, "--layer-rank")
    reasons = {layer.name: reason for layer in layers if (reason := _own_reason(layer, options))}
    at_ends = {name: reason for name, reason in _ends(layers, options).items() if name not in reasons}
    if options.keep_first is None and len(reasons) + len(at_ends) == len(layers):
        return reasons
    return reasons | at_ends


def _own_reason(layer: Layer, options: PlanOptions) -> str:
    """Why `layer` stays dense wherever it stands in the network; empty when nothing says so."""
    if excluded := first_match(options.exclude, layer.name):
        return f"excluded by '{excluded}'"
    named = layer.name in options.include or (options.include_embeddings and layer.kind == "embedding")
    if layer.dense_reason and not (layer.guess and named):
        return layer.dense_reason
    if options.include and not first_match(options.include, layer.name):
        return "not included"
    return ""


def counts(layer: Layer) -> bool:
    """Whether `layer` is one of those that `keep_first` counts, be it factorized or not."""
    return layer.kind in LAYOUTS and layer.kind != "embedding"


def units(layers: Sequence[Layer]) -> list[str]:
    """What `keep_first` counts in a network of `layers`, in order: `Layer.unit` of each that counts, once."""
    return list(dict.fromkeys(layer.unit for layer in layers if counts(layer)))


def _ends(layers: Sequence[Layer], options: PlanOptions) -> dict[str, str]:
    """By layer name, why the first and the last layers stay dense, but for those that are included by name."""
    counted = [layer for layer in layers if counts(layer)]
    keep_first = 1 if options.keep_first is None else options.keep_first
    first = "first layer" if keep_first == 1 else f"first {keep_first} layers"
    leading = units(layers)[:keep_first]
    ends = {layer.name: first for layer in counted if layer.unit in leading}
    tied_head = any(layer.tied_head for layer in layers)
    if options.keep_last and not tied_head and counted and counted[-1].kind == "linear":
        ends.setdefault(counted[-1].name, "last classifier")
    named = {*options.include, *(pattern for pattern, _ in options.layer_ranks)}
    return {name: reason for name, reason in ends.items() if name not in named}


def given_rank(layer: Layer, options: PlanOptions) -> int | None:
    """The rank that `options` give to `layer` by its name, at most full rank; None if they leave it to the rule."""
    given = next((rank for pattern, rank in options.layer_ranks if matches(pattern, layer.name)), None)
    return None if given is None else min(given, layer.full_rank)


def lowest_rank(layer: Layer, options: PlanOptions) -> int:
    """The rank that `options` give to `layer`, or the lowest that they allow, whether that shrinks it or not."""
    return _allowed(layer, options, 1)


def allowed_ranks(layer: Layer, options: PlanOptions) -> range:
    """The ranks that `options` allow and at which `layer` gets smaller, ascending; none where it never does."""
    step = options.rank_multiple if given_rank(layer, options) is None else layer.full_rank
    return range(lowest_rank(layer, options), layer.break_even_rank + 1, step)


def would_not_shrink(layer: Layer, rank: int) -> str:
    """Why `layer` stays dense instead of getting `rank`, which is above its break-even rank."""
    return f"would not shrink: rank {rank}, break-even {layer.break_even_rank}"


def _rank_or_reason(evidence: Evidence, rule: Rule, options: PlanOptions) -> tuple[int | None, str]:
    """(rank, rule) of a layer that may be low rank, or (None, why it stays dense after all)."""
    layer = evidence.layer
    if evidence.spectrum.is_zero:
        return None, ALL_ZERO
    rank = _allowed(layer, options, rule.rank(evidence))
    if rank > layer.break_even_rank:
        return None, would_not_shrink(layer, rank)
    return rank, str(rule) if given_rank(layer, options) is None else GIVEN


def _allowed(layer: Layer, options: PlanOptions, rank: int) -> int:
    """`rank` within the limits of `options`, or the rank that they give instead."""
    given = given_rank(layer, options)
    if given is not None:
        return given
    rank = max(rank, round(options.floor * layer.full_rank), 1)
    return _rounded(rank, options.rank_multiple, layer.break_even_rank)


def _rounded(rank: int, multiple: int, break_even: int) -> int:
    """`rank` rounded up to `multiple`; down where up would not shrink the layer but `rank` would."""
    up = -(-rank // multiple) * multiple
    down = rank // multiple * multiple
    return down if rank <= break_even < up and down else up
