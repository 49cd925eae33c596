"""`make_plan`: which layers to factorize and at which ranks, by a rule, a budget, examples or measured time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lrconvert import hardware
from lrconvert.allocation import FloatArray
from lrconvert.analysis import Analysis, Progress, analyze_layers
from lrconvert.api.common import resolve_device
from lrconvert.api.min_accuracy import plan_by_accuracy
from lrconvert.api.timing import plan_by_time, timing_for
from lrconvert.api.validation import measuring
from lrconvert.budget import Budget, one_budget
from lrconvert.calibration import Calibration
from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.layers import Layer, View
from lrconvert.network import Network, Source, open_network
from lrconvert.plan import LayerPlan, Plan
from lrconvert.plan_budget import Prices
from lrconvert.planning import Candidates, candidates_of, plan_options
from lrconvert.response import Response
from lrconvert.speed import Goal


def make_plan(
    source: Source | Analysis,
    rule: str = "auto",
    *,
    param_ratio: float | None = None,
    mac_ratio: float | None = None,
    latency_ratio: float | None = None,
    max_error: float | None = None,
    min_accuracy: float | None = None,
    allocator: str | None = None,
    keep_first: int | None = None,
    keep_last: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    floor: float = 0.0,
    rank_multiple: int | Literal["auto"] = 1,
    layer_ranks: Mapping[str, int] | None = None,
    splits: Mapping[str, int] | None = None,
    include_embeddings: bool = False,
    extra_norm: bool = False,
    view: View = "channel",
    pivoted: bool = False,
    goal: Goal = "size",
    batch_size: int = 1,
    channels_last: bool = False,
    calibration: Calibration | None = None,
    evaluate: str | None = None,
    data_dir: str | Path = "data",
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    init: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Plan:
    """Decide which layers to factorize and at which ranks. Nothing is changed or written.

    Args:
        source: a checkpoint's path, a live model, or an analysis made earlier.
        rule: name of a rank rule, perhaps with its number: "auto", "rank_ratio=0.25", "energy=0.9"; see
            `lrconvert.ranks.RULES`.
        param_ratio, mac_ratio: a budget instead of a rule: parameters, or multiply-accumulates, of the whole network,
            compressed / original. Reached within 1 %.
        latency_ratio: a budget: time of one call, compressed / original, measured; what is predicted is within 1 %.
        max_error: a budget: fewest parameters with at most this √(total ‖W − W_r‖² / total ‖W‖²) over the layers that
            may be factorized.
        min_accuracy: a budget: fewest parameters, within 1 %, with at least this accuracy, measured after factorizing
            at some eight ratios of parameters.
        allocator: how a budget is distributed, see `lrconvert.budget.ALLOCATORS`; each budget has a default.
        keep_first, keep_last, include, exclude, floor, rank_multiple: see `lrconvert.plan.PlanOptions`; the multiple
            "auto" is what the device likes, see `lrconvert.hardware`.
        layer_ranks: pattern to rank, overruling rule and budget.
        splits: pattern to number of parts: the outputs of these layers are that many matrices, factorized each on its
            own ({"*.qkv": 3}), or, with 1, together ({"lstm*": 1}).
        include_embeddings: factorize embeddings too.
        extra_norm: put a BatchNorm between the factors of linear layers and convolutions, to train them with
            (Cuttlefish section 4.1).
        view: "spatial" factorizes convolutions of two dimensions into one across and one down, as SI&FD does, instead
            of one with the whole kernel and one of kernel 1.
        pivoted: store the first factors of linear layers, attention and convolutions of kernel 1 without their pivots:
            the same network in r·(m + n − r) parameters a layer instead of r·(m + n), so that a budget of parameters
            buys higher ranks; to store and to run, not to train. See `lrconvert.layers.pivots`.
        goal: "speed" leaves layers dense that are not 5 % faster at their rank, spends a budget where it saves most
            error for the time it takes, and refuses a plan that makes the whole model no faster; "both" leaves those
            dense that are slower; "size" asks nothing. All but "size" run the model to measure that on `device`, which
            takes up to a minute.
        batch_size, channels_last: of the calls that are timed.
        calibration: what `calibrate` learned. Layers that it knows are factorized for least error of the output; a
            budget is then distributed by its `allocator`, and "auto" gives all layers together the parameters that
            Cuttlefish's ranks would take.
        evaluate, data_dir: for `min_accuracy`, the dataset that it is measured on, and where that lies: its validation
            images, see `lrconvert.training.data.open_dataset`.
        model, model_args, input_shape, init, device, progress: see `analyze`.

    Raises:
        UsageError: the rule is unknown or a setting makes no sense.
        PlanError: the network is factorized already.
        TargetError: no choice of ranks meets the budget; the message says how near one comes.
    """
    if goal not in get_args(Goal):
        raise UnknownNameError("goal", goal, get_args(Goal))
    network = source.network if isinstance(source, Analysis) else open_network(source, model, model_args, input_shape)
    where = resolve_device(device)
    targets = {"param_ratio": param_ratio, "mac_ratio": mac_ratio, "latency_ratio": latency_ratio}
    targets |= {"max_error": max_error, "min_accuracy": min_accuracy}
    if (min_accuracy is None) != (evaluate is None):
        raise UsageError("--min-accuracy and --evaluate DATASET, the labelled images to measure it on, go together")
    if calibration is not None and any(target is not None for target in targets.values()):
        allocator = allocator or calibration.allocator
    options = plan_options(
        rule,
        budget=one_budget(allocator, **targets),
        keep_first=keep_first,
        keep_last=keep_last,
        include=tuple(include),
        exclude=tuple(exclude),
        floor=floor,
        rank_multiple=_preferred_multiple(network, where) if rank_multiple == "auto" else rank_multiple,
        layer_ranks=layer_ranks,
        splits=splits,
        include_embeddings=include_embeddings,
        extra_norm=extra_norm,
        view=view,
        pivoted=pivoted,
    )
    budget = options.rule if isinstance(options.rule, Budget) else None
    by_time = goal != "size" or (budget is not None and budget.kind == "latency_ratio")
    if min_accuracy is not None and goal != "size":
        raise UsageError("--min-accuracy looks for the fewest parameters: --for size, or another budget")
    timing = timing_for(network, batch_size, where, channels_last) if by_time else None
    candidates = candidates_of(network, options)
    if isinstance(source, Analysis):
        missing = [layer.name for layer in candidates.layers if layer.name not in source.spectra]
        if missing:
            raise UsageError(f"the analysis left {missing[0]} out; analyze without include and exclude")
        if options.splits or view != "channel":
            raise UsageError("splits and views change the matrices: make the plan from the model, not an analysis")
        analysis = source
    else:
        initial = open_network(init) if init is not None else None
        analysis = analyze_layers(candidates.network, candidates.layers, initial, where, progress)
    xi = {layer.name: analysis.xi(layer) for layer in candidates.layers}
    if calibration is not None and budget is None and rule == "auto":
        # What calibration does not know cannot be weighed against the rest: it stays dense.
        known = _curves(calibration.allocator, calibration, candidates.layers) or {}
        together = [layer for layer in candidates.plan(analysis.spectra, xi).low_rank if layer.name in known]
        saved = sum(layer.layer.num_params - layer.num_params_after for layer in together)
        budget = Budget("param_ratio", 1 - saved / network.num_params, calibration.allocator) if together else None
        candidates = replace(candidates, options=replace(options, rule=budget or options.rule))
    curves = _curves(budget.allocator, calibration, candidates.layers) if calibration and budget else None

    def decide(prices: Prices | None = None, within: Candidates = candidates) -> Plan:
        plan = within.plan(analysis.spectra, xi, curves, prices)
        return plan if calibration is None else data_aware(plan, calibration.responses)

    if budget is not None and evaluate is not None:
        accuracy = measuring(network, evaluate, data_dir, where, calibration.responses if calibration else {})
        return plan_by_accuracy(budget, candidates, lambda within: decide(within=within), accuracy)
    return decide() if timing is None else plan_by_time(candidates, decide, goal, timing)


def _curves(allocator: str, calibration: Calibration, layers: Iterable[Layer]) -> Mapping[str, FloatArray] | None:
    """What `layers` err at every rank, where `allocator` takes it from `calibration`."""
    if allocator == "sensitivity" and not calibration.measured:
        tried = next((f": {note}" for note in calibration.notes if "can be measured" in note), "")
        raise UsageError(f"--allocator sensitivity needs measurements{tried or ': calibrate(…, measure=True)'}")
    curves = calibration.curves_for(allocator)
    if curves is None:
        return None
    known = [layer.name for layer in layers if matches_response(layer, calibration.responses)]
    return {name: curves[name] for name in known if name in curves}


def matches_response(layer: Layer, responses: Mapping[str, Response]) -> bool:
    """Whether there is a response of `layer`, seen as the matrices that calibration saw.

    Raises:
        UsageError: there is one, of other matrices.
    """
    response = responses.get(layer.name)
    if response is None or layer.view != "channel":
        return False
    if len(response.signal) != layer.groups:
        raise UsageError(f"{layer.name}: calibrated in {len(response.signal)} part(s), planned in {layer.groups}")
    if response.signal.shape[1] != layer.full_rank:
        raise UsageError(f"{layer.name}: the calibration is that of another network")
    return True


def data_aware(plan: Plan, responses: Mapping[str, Response]) -> Plan:
    """`plan`, with least error of the output where calibration left a response of the layer, by its name.

    Raises:
        UsageError: it is the response of other matrices.
    """

    def aware(layer: LayerPlan) -> LayerPlan:
        if layer.rank is None or not matches_response(layer.layer, responses):
            return layer
        error = responses[layer.name].spectrum.error(layer.rank)
        return layer.model_copy(update={"data_aware": True, "error": error})

    return plan.model_copy(update={"layers": tuple(map(aware, plan.layers))})


def _preferred_multiple(network: Network, device: torch.device) -> int:
    """The multiple of ranks that `device` likes for the weights of `network`."""
    dtypes = (network.tensors[layer.weight].dtype for layer in network.layers if not layer.dense_reason)
    return hardware.rank_multiple(device, next(dtypes, torch.float32))
