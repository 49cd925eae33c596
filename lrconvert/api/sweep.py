"""`sweep`: a network at several budgets, so that one can be chosen by what it costs and what it loses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from lrconvert.analysis import Progress
from lrconvert.api.cache import Cache
from lrconvert.api.common import resolve_device
from lrconvert.api.timing import bench_for
from lrconvert.api.trials import Examples, Trials
from lrconvert.api.validation import Validation
from lrconvert.budget import ALLOCATORS, KINDS, Budget
from lrconvert.errors import TargetError, UnknownNameError, UsageError
from lrconvert.layers import Layer
from lrconvert.network import Network, Source, open_network
from lrconvert.plan import Plan
from lrconvert.planning import Candidates, candidates_of, plan_options
from lrconvert.report.decisions import macs_after
from lrconvert.report.record_sweep import SweepPoint, SweepRecord
from lrconvert.spectrum import Spectrum

By = Literal["params", "macs"]

RATIOS = (0.8, 0.6, 0.5, 0.4, 0.3)
_BUDGET_OF: Mapping[By, str] = {"params": "param_ratio", "macs": "mac_ratio"}


def sweep(
    source: Source,
    *,
    ratios: Sequence[float] = RATIOS,
    by: By = "params",
    allocators: Sequence[str] = (),
    calibrate: str | None = None,
    examples: int = 256,
    held_out: int = 128,
    seed: int = 0,
    evaluate: str | None = None,
    data_dir: str | Path = "data",
    latency: bool = False,
    batch_size: int = 1,
    channels_last: bool = False,
    cache: str | Path | None = None,
    keep_first: int | None = None,
    keep_last: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> SweepRecord:
    """Factorize a network within several budgets, in memory, and report what each costs and loses.

    Args:
        source: a checkpoint's path or a live model, which is left as it is.
        ratios: budgets, compressed / original over the whole network.
        by: what they count.
        allocators: who distributes them, see `lrconvert.budget.ALLOCATORS`; without any the default: "output_error"
            with examples, else "relative_error".
        calibrate: examples without labels, see `lrconvert.samples.read_samples`: layers are then factorized for least
            error of the output, and errors are those of the output, predicted and measured.
        examples, held_out: of these, to calibrate on, and others to measure errors on.
        seed: of their choice.
        evaluate: dataset on whose validation images accuracy is measured, see `lrconvert.training.data.open_dataset`.
        data_dir: where the datasets lie.
        latency: whether to measure the time of one call too.
        batch_size, channels_last: of that call.
        cache: folder where spectra, calibrations and measurements are kept for other sweeps of the same file: those
            compute only what is new. A checkpoint's path, size and time of change tell whether it is the same.
        keep_first, keep_last, include, exclude: see `lrconvert.make_plan`.
        model, model_args, input_shape, device, progress: see `lrconvert.analyze`.

    Raises:
        UsageError: a setting makes no sense, or the network cannot be run where it has to be.
        TargetError: none of the budgets can be met.
    """
    if by not in get_args(By):
        raise UnknownNameError("unit of budgets", by, get_args(By))
    names = tuple(dict.fromkeys(allocators)) or (("output_error",) if calibrate is not None else _default(by))
    budgets = [Budget(_BUDGET_OF[by], ratio, name) for name in names for ratio in sorted(set(ratios))]
    if not budgets:
        raise UsageError("a sweep needs budgets: name some ratios")
    for name in names:
        if ALLOCATORS[name].curve is None and calibrate is None:
            raise UsageError(f"--allocator {name} needs examples: --calibrate DATA")
    network, where = open_network(source, model, model_args, input_shape), resolve_device(device)
    if cache is not None and network.checkpoint is None:
        raise UsageError("a cache folder tells networks apart by their files, and a live model has none")
    runs = calibrate is not None or evaluate is not None or latency
    if runs and network.checkpoint is not None and network.architecture is None:
        raise UsageError(f"{network.name} has to be run: name its --model (graphs cannot be)")
    options = plan_options(
        budget=budgets[0], keep_first=keep_first, keep_last=keep_last, include=tuple(include), exclude=tuple(exclude)
    )
    candidates = candidates_of(network, options)
    if calibrate is not None:
        wanted = Examples(calibrate, examples, held_out, seed, data_dir, measure="sensitivity" in names)
    trials = Trials(
        network,
        Cache(cache),
        where,
        examples=wanted if calibrate is not None else None,
        validation=None if evaluate is None else Validation(evaluate, data_dir, network),
        bench=bench_for(network, batch_size, where, channels_last) if latency else None,
        progress=progress,
    )
    return _record(network, by, trials, *_points(candidates, budgets, trials, progress))


def _default(by: By) -> tuple[str, ...]:
    return (KINDS[_BUDGET_OF[by]].allocator,)


def _points(
    candidates: Candidates, budgets: Sequence[Budget], trials: Trials, progress: Progress | None
) -> tuple[list[SweepPoint], list[str]]:
    """(a point for each of `budgets`, which rise within an allocator; notes on those that cannot be met)."""
    spectra = trials.spectra(candidates.layers)
    advance = progress("trying budgets", len(budgets)) if progress else None
    points: list[SweepPoint] = []
    notes: list[str] = []
    refusal: TargetError | None = None
    for budget in budgets:
        within = replace(candidates, options=replace(candidates.options, rule=budget))
        try:
            plan = within.plan(spectra, {}, trials.curves(budget.allocator))
        except TargetError as error:
            refusal = error
            notes.append(f"{budget.allocator}: {error}")
        else:
            point = _measured(_point(plan, budget, candidates, spectra, trials), plan, trials)
            smaller = points[-1] if points and points[-1].allocator == budget.allocator else None
            if smaller is not None and smaller.loss < point.loss:
                point = smaller.model_copy(update={"ratio": budget.target})
            points.append(point)
        if advance:
            advance()
    if refusal is not None and not points:
        raise refusal
    return points, notes


def _point(
    plan: Plan, budget: Budget, candidates: Candidates, spectra: Mapping[str, Spectrum], trials: Trials
) -> SweepPoint:
    """What is predicted of `plan`."""
    network = candidates.network
    return SweepPoint(
        allocator=budget.allocator,
        ratio=budget.target,
        plan_ratio=budget.target,
        num_params=network.num_params - plan.saved_params,
        macs=macs_after(plan, network.trace),
        low_rank=len(plan.low_rank),
        error_predicted=_output_error(plan, trials) if trials.examples else _weight_error(plan, candidates, spectra),
    )


def _output_error(plan: Plan, trials: Trials) -> float | None:
    """Predicted ‖y′ − y‖ / ‖y‖; None where a factorized layer has no curve."""
    curves = trials.output_curves
    total = 0.0
    for layer in plan.low_rank:
        if layer.name not in curves:
            return None
        assert layer.rank is not None
        total += float(curves[layer.name][layer.rank])
    return total**0.5


def _weight_error(plan: Plan, candidates: Candidates, spectra: Mapping[str, Spectrum]) -> float:
    """√(total ‖W − W_r‖² / total ‖W‖²) over the candidates."""

    def energy(layer: Layer) -> float:
        return float((spectra[layer.name].values ** 2).sum())

    norms = {layer.name: energy(layer) for layer in candidates.layers}
    lost = sum((layer.error or 0.0) ** 2 * norms[layer.name] for layer in plan.low_rank)
    total = sum(norms.values())
    return (lost / total) ** 0.5 if total else 0.0


def _measured(point: SweepPoint, plan: Plan, trials: Trials) -> SweepPoint:
    """`point`, with what can be measured of `plan`."""
    found: dict[str, Any] = {}
    if trials.examples is not None:
        found["error_measured"], found["agreement"], found["held_out"] = trials.error(plan)
    if trials.validation is not None:
        found["accuracy"] = trials.accuracy(plan)
    if trials.bench is not None:
        found["latency_dense_ms"], found["latency_ms"] = trials.latency(plan)
    return point.model_copy(update=found)


def _record(
    network: Network, by: By, trials: Trials, points: Sequence[SweepPoint], notes: Sequence[str]
) -> SweepRecord:
    names = list(dict.fromkeys(point.allocator for point in points))
    rows = sorted(points, key=lambda point: (names.index(point.allocator), -point.ratio))
    validation, examples = trials.validation, trials.examples
    held_out = max(point.held_out for point in points)
    if examples is not None and not held_out:
        notes = [*notes, f"{examples.data} has no examples left to measure errors on: calibrate on fewer (--examples)"]
    return SweepRecord(
        source=network.name,
        model=network.architecture.name if network.architecture else None,
        by=by,
        calibrated=examples is not None,
        held_out=held_out or None,
        validation=validation.name if validation else None,
        num_params=network.num_params,
        macs=network.trace.macs if network.trace else None,
        accuracy=trials.accuracy(None) if validation else None,
        latency_note=str(trials.bench) if trials.bench else None,
        notes=(*network.notes, *trials.notes, *notes),
        points=tuple(row.model_copy(update={"pareto": not _beaten(row, rows, by)}) for row in rows),
    )


def _beaten(row: SweepPoint, others: Sequence[SweepPoint], by: By) -> bool:
    """Whether another row costs and loses no more, and one of them less."""

    def figures(point: SweepPoint) -> tuple[float, float]:
        return float(point.num_params if by == "params" else point.macs or 0), point.loss

    cost, loss = figures(row)
    return any(each[0] <= cost and each[1] <= loss and each != (cost, loss) for each in map(figures, others))
