"""From a network to its plan: which layers may be factorized, and then, from their spectra, which are.

The one path to a plan, for `make_plan` and for the training schedules alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lrconvert.allocation import FloatArray
from lrconvert.budget import Budget
from lrconvert.cost import Trace
from lrconvert.errors import PlanError, UsageError
from lrconvert.layers import Layer, View
from lrconvert.network import Network, refuse_quantized
from lrconvert.plan import (
    Plan,
    PlanOptions,
    allowed_ranks,
    counts,
    decide,
    reasons_to_stay_dense,
)
from lrconvert.plan_budget import Prices, mac_prices, param_prices, plan_within
from lrconvert.ranks import Evidence, closed_form_xi, parse_rule
from lrconvert.spectrum import Spectrum
from lrconvert.surgery import plan_of
from lrconvert.views import in_spatial_view, split, with_norms, with_pivoted_factors


def plan_options(
    rule: str = "auto",
    *,
    budget: Budget | None = None,
    keep_first: int | None = None,
    keep_last: bool = True,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    floor: float = 0.0,
    rank_multiple: int = 1,
    layer_ranks: Mapping[str, int] | None = None,
    splits: Mapping[str, int] | None = None,
    include_embeddings: bool = False,
    extra_norm: bool = False,
    view: View = "channel",
    pivoted: bool = False,
) -> PlanOptions:
    """Plan options from a rule's text ("energy=0.9"), or a budget beside "auto", and the settings of `PlanOptions`.

    Raises:
        UsageError: there are another rule and a budget, or a setting makes no sense.
    """
    if budget is not None and rule != "auto":
        raise UsageError(f"{rule} and {budget.option} both choose the ranks: give one of them")
    return PlanOptions(
        budget or parse_rule(rule),
        keep_first,
        keep_last,
        tuple(include),
        tuple(exclude),
        floor,
        rank_multiple,
        tuple((layer_ranks or {}).items()),
        tuple((splits or {}).items()),
        include_embeddings,
        extra_norm,
        view,
        pivoted,
    )


@dataclass(frozen=True)
class Candidates:
    """The layers of a network that may become low rank, before their spectra are known.

    Attributes:
        network: the network, its layers split as the options ask.
        options: what was asked for.
        layers: the candidates, in the network's order.
    """

    network: Network
    options: PlanOptions
    layers: tuple[Layer, ...]

    @property
    def shrinkable(self) -> tuple[Layer, ...]:
        """The candidates that get smaller at some rank that the options allow: those that can be factorized."""
        return tuple(layer for layer in self.layers if allowed_ranks(layer, self.options))

    @property
    def keep_first(self) -> int:
        """K, the leading layers that stay dense: as asked, or what the default comes to in this network."""
        if self.options.keep_first is not None:
            return self.options.keep_first
        leading = next((layer for layer in self.network.layers if counts(layer)), None)
        return 0 if leading in self.layers else 1

    def plan(
        self,
        spectra: Mapping[str, Spectrum],
        xi: Mapping[str, float],
        curves: Mapping[str, FloatArray] | None = None,
        prices: Prices | None = None,
    ) -> Plan:
        """The plan that follows from what is known of the candidates, each by layer name.

        Args:
            spectra: of their weights.
            xi: ξ of each.
            curves: for a budget, what the candidates err at every rank instead of what the allocator takes from the
                spectra; see `lrconvert.plan_budget.plan_within`.
            prices: for a budget, in another unit than parameters and MACs.

        Raises:
            TargetError: the budget cannot be met.
        """
        names = {layer.name for layer in self.layers}
        # A layer named with --include is factorized even where its kind was a guess: the user settled it.
        layers = [replace(layer, dense_reason="") if layer.name in names else layer for layer in self.network.layers]
        budget, order = self.options.rule, self.network.order
        if not isinstance(budget, Budget):
            return decide(layers, spectra, self.options, order, xi)
        evidence = {
            layer.name: Evidence(layer, spectra[layer.name], xi.get(layer.name, closed_form_xi(layer)))
            for layer in self.layers
        }
        return plan_within(budget, layers, evidence, prices or self.prices(budget), self.options, order, curves)

    def prices(self, budget: Budget) -> Prices:
        """What the candidates cost in the unit of `budget`, where that can be counted: parameters or MACs."""
        if budget.kind == "mac_ratio":
            return mac_prices(self.layers, _traced(self.network, budget))
        return param_prices(self.layers, self.network.num_params)


def candidates_of(network: Network, options: PlanOptions) -> Candidates:
    """The layers of `network` that `options` let become low rank.

    Raises:
        PlanError: the network is factorized already.
        CheckpointError: layers that the patterns choose are stored quantized.
        PatternError: a pattern matches no layer.
        UsageError: BatchNorms, the spatial view or pivots were asked for in a graph, or a share of MACs that are not
            known.
    """
    refuse_factorized(network)
    refuse_quantized(network, options.include, options.exclude)
    graph = network.checkpoint is not None and network.checkpoint.graph is not None
    if graph and (options.extra_norm or options.view != "channel" or options.pivoted):
        raise UsageError(
            f"{network.name} is a graph: no extra BatchNorm, no spatial view, no pivoted factors; factorize the model"
        )
    if isinstance(options.rule, Budget) and options.rule.kind == "mac_ratio":
        _traced(network, options.rule)
    layers = split(network.layers, options.splits)
    layers = in_spatial_view(layers) if options.view == "spatial" else layers
    layers = with_pivoted_factors(layers) if options.pivoted else layers
    network = replace(network, layers=with_norms(layers) if options.extra_norm else layers)
    reasons = reasons_to_stay_dense(network.layers, options)
    return Candidates(network, options, tuple(layer for layer in network.layers if layer.name not in reasons))


def _traced(network: Network, budget: Budget) -> Trace:
    """What a forward pass of `network` showed; UsageError, with the way to make it, where there was none."""
    if network.trace is not None:
        return network.trace
    graph = network.checkpoint is not None and network.checkpoint.graph is not None
    fix = network.notes[-1] if network.module is not None or graph else "name the architecture with --model"
    raise UsageError(f"{budget.option} needs the MACs of {network.name}: {fix}")


def refuse_factorized(network: Network) -> None:
    """Raise PlanError when `network` has low-rank layers."""
    header = network.checkpoint.header if network.checkpoint else None
    in_file = header is not None and header.plan is not None and bool(header.plan.low_rank)
    if in_file or (network.module is not None and plan_of(network.module).low_rank):
        raise PlanError(
            f"{network.name} is factorized already; start from the dense network, or multiply it out first: "
            "lrconvert export --format dense for a file, lrconvert.merge for a model"
        )
