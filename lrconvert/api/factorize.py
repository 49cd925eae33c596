"""`factorize` and `merge`: doing what a plan says to a file or to a live model."""

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from lrconvert.analysis import Progress, analyze_layers
from lrconvert.api.common import header_for, resolve_device
from lrconvert.api.make_plan import data_aware, make_plan
from lrconvert.calibration import Calibration
from lrconvert.checkpoints import Checkpoint, check_output, open_checkpoint, write_checkpoint
from lrconvert.checkpoints.folder import left_behind
from lrconvert.errors import NothingToCompressError, UsageError
from lrconvert.factorization import factorizing
from lrconvert.hf.mark import mark
from lrconvert.inputs import Call, shape_of
from lrconvert.loading import model_of
from lrconvert.network import Network, Source, open_network, refuse_quantized
from lrconvert.plan import Plan
from lrconvert.plan_check import check_plan
from lrconvert.planning import refuse_factorized
from lrconvert.report.decisions import layer_decisions, macs_after
from lrconvert.report.record import FactorizeRecord
from lrconvert.response import Response
from lrconvert.rewrite import overruled
from lrconvert.sequential import check_examples, fit_in_turn
from lrconvert.surgery import check_fits, factorize_module, merge_module
from lrconvert.tensors import shapes_of

if TYPE_CHECKING:
    from lrconvert.onnx_graph.check import Outcome
    from lrconvert.onnx_graph.graph import Graph


@overload
def factorize(source: nn.Module, plan: Plan | str = ..., **settings: Any) -> nn.Module: ...
@overload
def factorize(
    source: str | Path | Checkpoint | Network, plan: Plan | str = ..., **settings: Any
) -> FactorizeRecord: ...


def factorize(
    source: Source,
    plan: Plan | str = "auto",
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    calibration: Calibration | None = None,
    sequential: bool = False,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> nn.Module | FactorizeRecord:
    """Factorize a live model in place, or a checkpoint into another file.

    Args:
        source: a live model, or a checkpoint's path.
        plan: a plan, or the name of a rule to make one with; "auto" also with a budget (`param_ratio=0.6`).
        output: file or folder to write, for a checkpoint; its suffix says the format.
        overwrite: replace an existing output.
        dry_run: decide and report, write nothing.
        calibration: what `calibrate` learned: layers that it knows are factorized for least error of the output.
        sequential: then fit each layer to what the dense one returns for the examples of the calibration, on what the
            factorized layers before it give; see `lrconvert.sequential`. Both networks are run as often as there are
            layers behind one another.
        model, model_args, input_shape, device, progress: see `analyze`.
        settings: more arguments of `make_plan`, when `plan` is a rule.

    Returns:
        The model, changed in place (only a model that is itself one layer is a new object); or, for a checkpoint,
        the record of what was done.

    Raises:
        NothingToCompressError: the plan factorizes no layer.
        PlanError: the plan does not match.
        OutputExistsError: the output exists.
    """
    started = time.perf_counter()
    where = resolve_device(device)
    network = open_network(source, model, model_args, input_shape)
    graph = network.checkpoint.graph if network.checkpoint else None
    refuse_factorized(network)
    if graph is not None and sequential:
        raise UsageError(f"{network.name} is a graph, whose layers are not fitted in turn: leave sequential out")
    if sequential and calibration is None:
        raise UsageError("fitting layers in turn takes the examples of a calibration: calibration=calibrate(…)")
    if sequential and calibration is not None:
        check_examples(calibration.calls)
    if isinstance(source, nn.Module):
        if output is not None or dry_run:
            raise UsageError("a live model is factorized in place: no output, no dry run; lrconvert.save writes it")
    elif not dry_run:
        if output is None:
            raise UsageError("factorizing a checkpoint needs an output path")
        check_output(Path(output), network.checkpoint, overwrite)
    if isinstance(plan, str):
        plan = make_plan(network, plan, calibration=calibration, device=device, progress=progress, **settings)
    elif settings:
        raise UsageError(f"{', '.join(settings)}: a finished plan takes no more settings")
    else:
        if graph is not None:
            graph.check(plan)
        else:
            check_plan(plan, shapes_of(network.tensors))
            refuse_quantized(network, [layer.name for layer in plan.low_rank])
        if network.module is not None:
            check_fits(network.module, plan)
        plan = plan if calibration is None else data_aware(plan, calibration.responses)
        plan = _with_errors(plan, network, where, progress)
    if sequential and plan.target is not None and plan.target.kind == "min_accuracy":
        raise UsageError("--min-accuracy was measured before fitting layers in turn, which changes it: leave one out")
    responses = calibration.responses if calibration else None
    if not plan.low_rank:
        raise NothingToCompressError(_why_nothing(plan, network))
    notes = tuple(f"calibrated on {note}" for note in calibration.notes) if calibration else ()
    examples = calibration.calls if calibration and sequential and not dry_run else ()
    if isinstance(source, nn.Module):
        dense = copy.deepcopy(source) if examples else source
        small = factorize_module(source, plan, where, responses=responses)
        if examples:
            fit_in_turn(small, dense, examples, device=where, progress=progress)
        return mark(small)
    if graph is not None:
        path, outcome = None if dry_run else Path(str(output)), None
        if path is not None:
            outcome = _write_graph(network, graph, plan, path, overwrite, where, responses, notes, progress)
        return _record(network, plan, path, time.perf_counter() - started, outcome, notes)
    steps = factorizing(network.tensors, plan, where, responses)
    if examples:
        values, fitted = _fitted(network, plan, responses, examples, where, progress)
        steps, notes = overruled(steps, values), (*notes, *fitted)
    elif sequential:
        notes = (*notes, "dry run: layers are fitted in turn when the file is written")
    if not dry_run:
        advance = progress("factorizing", len(steps)) if progress else None
        write_checkpoint(
            Path(str(output)),
            steps,
            header_for(network, plan, notes),
            network.checkpoint,
            overwrite=overwrite,
            device=where,
            progress=advance,
        )
    return _record(network, plan, None if dry_run else Path(str(output)), time.perf_counter() - started, notes=notes)


def _fitted(
    network: Network,
    plan: Plan,
    responses: Mapping[str, Response] | None,
    examples: Sequence[Call],
    device: torch.device,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """By key, the factors and biases of `network` factorized by `plan` and fitted in turn; and what that did."""
    dense = model_of(network)
    small = factorize_module(copy.deepcopy(dense), plan, device, responses=responses)
    fits = fit_in_turn(small, dense, examples, device=device, progress=progress)
    names = {f"{path}.{name}".lstrip(".") for path in fits for name in ("u.weight", "v.weight", "v.bias")}
    values = {name: parameter.detach() for name, parameter in small.named_parameters() if name in names}
    if not fits:
        return values, ("no layer could be fitted in turn",)
    before, after = fmean(fit.error_before for fit in fits.values()), fmean(fit.error_after for fit in fits.values())
    return values, (f"{len(fits)} layers fitted in turn: error of their outputs {before:.3g} → {after:.3g} on average",)


def _write_graph(
    network: Network,
    graph: "Graph",
    plan: Plan,
    output: Path,
    overwrite: bool,
    device: torch.device,
    responses: Mapping[str, Response] | None,
    notes: tuple[str, ...],
    progress: Progress | None,
) -> "Outcome":
    from lrconvert.checkpoints.onnx_file import write_graph

    return write_graph(
        output,
        graph,
        plan,
        header_for(network, plan, notes),
        input_shape=shape_of(network.inputs),
        overwrite=overwrite,
        device=device,
        responses=responses,
        progress=progress("factorizing", len(plan.low_rank)) if progress else None,
    )


def merge(model: nn.Module) -> nn.Module:
    """Multiply every pair of factors in `model` out again, in place; see `export` for files.

    Returns:
        The model; a new object only when the model is itself one low-rank layer.
    """
    return mark(merge_module(model))


def _with_errors(plan: Plan, network: Network, device: torch.device, progress: Progress | None) -> Plan:
    """`plan` with the predicted errors that it lacks, as one that was read from a file does."""
    lacking = [layer.layer for layer in plan.low_rank if layer.error is None]
    if not lacking:
        return plan
    spectra = analyze_layers(network, lacking, None, device, progress).spectra
    return plan.model_copy(
        update={
            "layers": tuple(
                layer.model_copy(update={"error": spectra[layer.name].error(layer.rank)})
                if layer.rank is not None and layer.name in spectra
                else layer
                for layer in plan.layers
            )
        }
    )


def _why_nothing(plan: Plan, network: Network) -> str:
    reasons: dict[str, int] = {}
    for layer in plan.layers:
        reasons[layer.reason] = reasons.get(layer.reason, 0) + 1
    most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    shown = "; ".join(f"{count}× {reason}" for reason, count in most) or "no weight of two or more dimensions"
    return f"{network.name}: no layer to factorize ({shown}); try another rule, --keep-first 0, or --include LAYER"


def _smaller_only(plan: Plan, graph: bool) -> tuple[str, ...]:
    """A note on layers that factorizing makes smaller, but not faster."""
    if not any(layer.kind in ("lstm", "gru", "rnn") for layer in plan.low_rank):
        return ()
    where = "" if graph else ", except on a CPU from several hundred hidden units on"
    return (f"recurrent layers get smaller, not faster{where}: their weights are multiplied out to run",)


def _record(
    network: Network,
    plan: Plan,
    output: Path | None,
    seconds: float,
    outcome: "Outcome | None" = None,
    notes: Sequence[str] = (),
) -> FactorizeRecord:
    rows = layer_decisions(plan, network.trace)
    return FactorizeRecord(
        source=network.name,
        output=str(output) if output else None,
        model=network.architecture.name if network.architecture else None,
        order=plan.order,
        rule=plan.rule,
        target=plan.target,
        latency_before_ms=plan.latency.dense_ms if plan.latency else None,
        latency_after_predicted_ms=plan.latency.predicted_ms if plan.latency else None,
        latency_after_ms=plan.latency.measured_ms if plan.latency else None,
        latency_note=plan.latency.measured_on if plan.latency else None,
        num_params_before=network.num_params,
        num_params_after=network.num_params - plan.saved_params,
        macs_before=network.trace.macs if network.trace else None,
        macs_after=macs_after(plan, network.trace),
        nbytes_before=network.checkpoint.nbytes if network.checkpoint else None,
        nbytes_after=open_checkpoint(output).nbytes if output else None,
        seconds=seconds if output else None,
        checked_with=outcome.runner if outcome and outcome.difference is not None else None,
        difference=outcome.difference if outcome else None,
        notes=(
            *network.notes,
            *(left_behind(network.checkpoint) if network.checkpoint else ()),
            *([outcome.note] if outcome else []),
            *notes,
            *_smaller_only(plan, graph=network.checkpoint is not None and network.checkpoint.graph is not None),
        ),
        layers=rows,
    )
