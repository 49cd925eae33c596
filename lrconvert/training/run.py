"""A whole run in a folder: build, train, keep the best weights, test once, report; or go on where one stopped.

recipe.yaml         the recipe, resolved
state.pt            everything to go on with
metrics.jsonl       one line an epoch
best.safetensors    the weights with the best validation accuracy of the current phase
report.json         the record, once the run has ended
"""

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lrconvert.checkpoints import open_checkpoint
from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.cost import Trace, trace
from lrconvert.errors import LrconvertError, OutputExistsError, UsageError
from lrconvert.inputs import one_input
from lrconvert.loading import load, save
from lrconvert.models import find_architecture
from lrconvert.recipe import Recipe, dump_recipe, load_recipe
from lrconvert.report.decisions import layer_decisions
from lrconvert.report.record import EpochMetrics, PhaseTime, TrainRecord
from lrconvert.training.data import Augment, Dataset, open_dataset
from lrconvert.training.engine import Engine
from lrconvert.training.events import Listener
from lrconvert.training.method import make_schedule
from lrconvert.training.processes import accelerated
from lrconvert.training.schedules import LowRankSchedule
from lrconvert.training.state import read_state, write_state

RECIPE, STATE, METRICS, BEST, REPORT = "recipe.yaml", "state.pt", "metrics.jsonl", "best.safetensors", "report.json"


def run(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> TrainRecord:
    """Train as `recipe` says.

    Args:
        recipe: what to do.
        output: folder for all that the run writes; made if it is missing.
        resume: go on with the run that is in `output`, which must have the same recipe.
        overwrite: start anew over a run that is in `output`.
        listener: hears of progress, in the first process.

    Raises:
        OutputExistsError: there is a run in `output`, and neither `resume` nor `overwrite` was asked for.
        UsageError: the recipe asks for something that does not exist or does not go together.
        LrconvertError: the data is missing, the loss is no number any more, or the memory is too small; the message
            names the last good state.
    """
    folder = Path(output)
    _check_folder(recipe, folder, resume, overwrite)
    with accelerated(recipe) as accelerator:
        alone = accelerator.is_main_process
        heard = listener if listener is not None and alone else Listener()
        if alone:
            _prepare(recipe, folder, resume)
        accelerator.wait_for_everyone()
        return Run(recipe, folder, accelerator, heard).finish()


class Run:
    """One run in its folder.

    Args:
        recipe: what to do.
        folder: where it writes; holds the recipe, and the state if there is one to go on from.
        accelerator: processes, device and precision.
        listener: hears of progress.
    """

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Accelerator, listener: Listener) -> None:
        self.recipe, self.folder, self.accelerator, self.listener = recipe, folder, accelerator, listener
        self.started = time.perf_counter()
        with accelerator.main_process_first():
            self.dataset = dataset_of(recipe)
        for note in self.dataset.notes:
            listener.note(note)
        model = self._build()
        self.trace = _traced(model, self.dataset)
        self.num_params_before = sum(parameter.numel() for parameter in model.parameters())
        model.to(accelerator.device)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        if recipe.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        teacher = None
        if recipe.teacher is not None:
            teacher = load(recipe.teacher, recipe.model if not _names_model(recipe.teacher) else None)
            teacher.to(accelerator.device).requires_grad_(False)
        state = read_state(folder / STATE) if (folder / STATE).exists() else None
        self.seconds_before = state["seconds"] if state else 0.0
        before = state["engine"]["schedule"] if state else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is in its notes
            schedule = make_schedule(recipe, model, self.dataset.input_shape, accelerator.num_processes, before)
        for note in schedule.notes:
            listener.note(note)
        self.engine = Engine(recipe, schedule, self.dataset, accelerator, listener, teacher)
        if state is not None:
            self.engine.load_state_dict(state["engine"])
            listener.note(f"going on from epoch {self.engine.progress.epoch}, step {self.engine.progress.step}")

    @property
    def schedule(self) -> LowRankSchedule:
        """The run's low-rank schedule."""
        return self.engine.schedule

    def finish(self) -> TrainRecord:
        """Train what is left, test the best weights, and write the report."""
        recipe, engine = self.recipe, self.engine
        self._save()
        self.listener.begin(engine.progress.epoch, recipe.epochs, engine.loader.steps)
        try:
            while engine.progress.epoch < recipe.epochs:
                metrics = engine.train_epoch(recipe.checkpoint_steps, self._save)
                self._keep(metrics)
                self.listener.epoch(metrics)
        except LrconvertError as error:
            raise type(error)(
                f"{error}; the last good state is {self.folder / STATE} (--resume goes on from it)"
            ) from None
        finally:
            self.listener.end()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.schedule.finish()
        test = self._test()
        record = self._record(test)
        if self.accelerator.is_main_process:
            _write(self.folder / REPORT, record.model_dump_json(indent=2) + "\n")
        return record

    def _build(self) -> nn.Module:
        recipe = self.recipe
        if recipe.checkpoint is not None:
            return load(recipe.checkpoint, recipe.model, model_args=recipe.model_args or None).train()
        assert recipe.model is not None
        torch.manual_seed(recipe.seed)
        return find_architecture(recipe.model, recipe.model_args).build("cpu").train()

    def _keep(self, metrics: EpochMetrics) -> None:
        """After an epoch: the best weights, the log, and then the state, which must not be ahead of them."""
        progress = self.engine.progress
        # The switch came after this epoch's validation: its figure is the dense network's.
        if not metrics.switched and metrics.validation_accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = metrics.validation_accuracy, metrics.epoch
            if self.accelerator.is_main_process:
                self._write_best()
        if self.accelerator.is_main_process:
            lines = (json.dumps(each) for each in progress.history)
            _write(self.folder / METRICS, "".join(f"{line}\n" for line in lines))
        self._save()

    def _write_best(self) -> None:
        model, args = architecture_of(self.recipe)
        save(
            self.engine.evaluated,
            self.folder / BEST,
            architecture=model,
            model_args=args,
            input_shape=self.dataset.input_shape,
            overwrite=True,
        )

    def _save(self) -> None:
        engine = self.engine.state_dict()
        if self.accelerator.is_main_process:
            seconds = self.seconds_before + time.perf_counter() - self.started
            write_state(self.folder / STATE, {"engine": engine, "seconds": seconds})

    def _test(self) -> tuple[float, float] | None:
        """(loss, accuracy) of the best weights on the test images, read back from their file."""
        if self.dataset.test is None:
            return None
        self.accelerator.wait_for_everyone()
        model, args = architecture_of(self.recipe)
        best = load(self.folder / BEST, model, model_args=args or None)
        best.to(self.accelerator.device)
        if self.recipe.channels_last:
            best.to(memory_format=torch.channels_last)
        return self.engine.evaluate(self.dataset.test, best)

    def _record(self, test: tuple[float, float] | None) -> TrainRecord:
        engine, schedule, recipe = self.engine, self.schedule, self.recipe
        model, progress = engine.model, engine.progress
        history = tuple(EpochMetrics(**each) for each in progress.history)
        times = {phase: _phase(history, phase) for phase in ("full-rank", "low-rank")}
        after = _traced(model, self.dataset)
        seconds = self.seconds_before + time.perf_counter() - self.started
        full_rank = [each for each in history if each.phase == "full-rank"]
        trained, tracked = (
            sum(getattr(each, f"{what}_seconds") for each in full_rank) for what in ("train", "tracking")
        )
        return TrainRecord(
            output=str(self.folder),
            model=recipe.model or architecture_of(recipe)[0] or str(recipe.checkpoint),
            dataset=self.dataset.name,
            method=recipe.low_rank.method,
            processes=self.accelerator.num_processes,
            device=str(self.accelerator.device),
            amp=recipe.amp,
            epochs=len(history),
            switch_epoch=schedule.switch_epoch,
            keep_first=schedule.keep_first if recipe.low_rank.method != "dense" else None,
            num_params_before=self.num_params_before,
            num_params_after=sum(parameter.numel() for parameter in model.parameters()),
            trainable_params_after=sum(each.numel() for each in model.parameters() if each.requires_grad),
            macs_before=self.trace.macs if self.trace else None,
            macs_after=after.macs if after else None,
            validation_accuracy=progress.best_accuracy,
            best_epoch=progress.best_epoch,
            test_loss=test[0] if test else None,
            test_accuracy=test[1] if test else None,
            seconds=seconds,
            full_rank=times["full-rank"],
            low_rank=times["low-rank"],
            tracking_seconds=schedule.tracking_seconds,
            profiling_seconds=schedule.profiling_seconds,
            switch_seconds=schedule.switch_seconds,
            tracking_share=tracked / trained if schedule.curves is not None and trained else None,
            traffic=engine.traffic_figures(),
            notes=tuple(schedule.notes),
            curves={name: tuple(curve) for name, curve in schedule.curves.ranks.items()} if schedule.curves else {},
            layers=layer_decisions(schedule.plan, self.trace) if schedule.plan is not None else (),
            history=history,
        )


def dataset_of(recipe: Recipe) -> Dataset:
    """The recipe's data set, read or downloaded.

    Raises:
        LrconvertError: it is not there; the message says how it should lie.
    """
    augment = Augment(
        crop_padding=recipe.crop_padding,
        hflip=recipe.hflip,
        scale=recipe.scale,
        ratio=recipe.ratio,
        aa=recipe.aa,
        reprob=recipe.reprob,
    )
    return open_dataset(
        recipe.dataset,
        data_dir=recipe.data_dir,
        download=recipe.download,
        img_size=recipe.img_size,
        mean=recipe.mean,
        std=recipe.std,
        augment=augment,
        args=recipe.dataset_args,
        validation=recipe.validation,
    )


def architecture_of(recipe: Recipe) -> tuple[str | None, dict[str, Any]]:
    """Name and arguments of the recipe's architecture: its own, or those that its checkpoint names."""
    if recipe.model is not None:
        return recipe.model, recipe.model_args
    header = open_checkpoint(str(recipe.checkpoint)).header
    return (header.model, header.model_args) if header is not None else (None, {})


def _names_model(path: str) -> bool:
    header = open_checkpoint(path).header
    return header is not None and header.model is not None


def _check_folder(recipe: Recipe, folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file; choose a folder to write the run to")
    if resume:
        if overwrite:
            raise UsageError("--resume goes on with a run, --overwrite starts anew: choose one")
        if not (folder / RECIPE).is_file():
            raise UsageError(f"{folder} holds no run to resume; leave --resume out to start one")
        before, now = load_recipe(folder / RECIPE).model_dump(), recipe.model_dump()
        changed = next((key for key in now if now[key] != before[key]), None)
        if changed is not None:
            raise UsageError(
                f"{folder}: that run has {changed} {before[changed]!r}, this recipe {now[changed]!r}; "
                f"resume it with its own {folder / RECIPE}"
            )
    elif (folder / RECIPE).exists() and not overwrite:
        raise OutputExistsError(f"{folder} holds a run; add --resume to go on with it, --overwrite to start anew")


def _prepare(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Make the folder, and take away what an earlier run, or a killed write, left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (RECIPE, STATE, METRICS, BEST, REPORT)
    for name in names:
        for left in folder.glob(f".{name}.*"):
            shutil.rmtree(left, ignore_errors=True)
    if not resume:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        _write(folder / RECIPE, dump_recipe(recipe))


def _write(path: Path, text: str) -> None:
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _traced(model: nn.Module, dataset: Dataset) -> Trace | None:
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
