"""The record of a run."""

from torch import nn

from lrconvert.cost import Trace, trace
from lrconvert.inputs import one_input
from lrconvert.recipe import Recipe
from lrconvert.report.decisions import layer_decisions
from lrconvert.report.record_training import EpochMetrics, PhaseTime, TrainRecord
from lrconvert.training.data import Dataset
from lrconvert.training.engine import Engine


def summarize(
    recipe: Recipe,
    engine: Engine,
    output: str,
    model: str,
    before: tuple[int, Trace | None],
    test: tuple[float, float] | None,
    seconds: float,
) -> TrainRecord:
    """The record of a run that has ended.

    Args:
        recipe: what was asked for.
        engine: what was done.
        output: the run's folder.
        model: name of the architecture.
        before: parameters of the network as training began, and its trace.
        test: (loss, accuracy) on the test images.
        seconds: of the whole run.
    """
    schedule, network, progress, dataset = engine.schedule, engine.model, engine.progress, engine.dataset
    history = tuple(EpochMetrics(**each) for each in progress.history)
    full_rank = [each for each in history if each.phase == "full-rank"]
    trained, tracked = (sum(getattr(each, f"{what}_seconds") for each in full_rank) for what in ("train", "tracking"))
    after = traced(network, dataset)
    return TrainRecord(
        output=output,
        model=model,
        dataset=dataset.name,
        method=recipe.low_rank.method,
        processes=engine.accelerator.num_processes,
        device=str(engine.accelerator.device),
        amp=recipe.amp,
        epochs=len(history),
        switch_epoch=schedule.switch_epoch,
        keep_first=schedule.keep_first if recipe.low_rank.method != "dense" else None,
        num_params_before=before[0],
        num_params_after=sum(parameter.numel() for parameter in network.parameters()),
        trainable_params_after=sum(each.numel() for each in network.parameters() if each.requires_grad),
        macs_before=before[1].macs if before[1] else None,
        macs_after=after.macs if after else None,
        validation_accuracy=progress.best_accuracy,
        best_epoch=progress.best_epoch,
        test_loss=test[0] if test else None,
        test_accuracy=test[1] if test else None,
        seconds=seconds,
        full_rank=_phase(history, "full-rank"),
        low_rank=_phase(history, "low-rank"),
        tracking_seconds=schedule.tracking_seconds,
        profiling_seconds=schedule.profiling_seconds,
        switch_seconds=schedule.switch_seconds,
        tracking_share=tracked / trained if schedule.curves is not None and trained else None,
        traffic=engine.traffic_figures(),
        notes=tuple(schedule.notes),
        curves={name: tuple(curve) for name, curve in schedule.curves.ranks.items()} if schedule.curves else {},
        layers=layer_decisions(schedule.plan, before[1]) if schedule.plan is not None else (),
        history=history,
    )


def traced(model: nn.Module, dataset: Dataset) -> Trace | None:
    """None where the model cannot run on the meta device: all that is lost is figures in the report."""
    try:
        return trace(model, one_input(dataset.input_shape))
    except Exception:
        return None


def _phase(history: tuple[EpochMetrics, ...], phase: str) -> PhaseTime:
    epochs = [each for each in history if each.phase == phase]
    seconds = sum(each.train_seconds + each.evaluation_seconds + each.tracking_seconds for each in epochs)
    trained = sum(each.train_seconds for each in epochs)
    images = sum(each.images_per_second * each.train_seconds for each in epochs)
    return PhaseTime(epochs=len(epochs), seconds=seconds, images_per_second=images / trained if trained else None)
