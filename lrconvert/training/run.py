"""A whole run: build, train, keep the best weights, test once, report; or go on where one stopped."""

import time
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.images import ImagePreparation
from lrconvert.loading import load, save
from lrconvert.recipe import Recipe
from lrconvert.report.record_training import EpochMetrics, TrainRecord
from lrconvert.training.build import architecture_of, check_together, dataset_of, model_of, teacher_of
from lrconvert.training.engine import Engine
from lrconvert.training.events import Listener
from lrconvert.training.folder import RunFolder
from lrconvert.training.method import make_schedule
from lrconvert.training.processes import accelerated, first_then_others
from lrconvert.training.schedules.agreement import decided_by_first
from lrconvert.training.state import read_state, write_state
from lrconvert.training.summary import summarize, traced


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
        output: folder for all that the run writes, see `lrconvert.training.folder`; made if it is missing.
        resume: go on with the run that is in `output`, which must have the same recipe.
        overwrite: start anew over a run that is in `output`.
        listener: hears of progress, in the first process.

    Raises:
        OutputExistsError: there is a run in `output`, and neither `resume` nor `overwrite` was asked for.
        UsageError: the recipe asks for something that does not exist or does not go together.
        LrconvertError: the data is missing, the loss is no number any more, or the memory is too small; the message
            names the last good state.
    """
    folder = RunFolder(output)
    with accelerated(recipe) as accelerator:
        decided_by_first(lambda: folder.check(recipe, resume, overwrite))
        heard = listener if listener is not None and accelerator.is_main_process else Listener()
        made = Run(recipe, folder, resume, accelerator, heard)
        decided_by_first(lambda: folder.prepare(recipe, resume))
        return made.finish()


class Run:
    """One run in its folder. Nothing is written before `finish`.

    Args:
        recipe: what to do.
        folder: where it writes.
        resume: go on from the state in `folder`, if there is one yet.
        accelerator: processes, device and precision.
        listener: hears of progress.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, resume: bool, accelerator: Accelerator, listener: Listener
    ) -> None:
        self.recipe, self.folder, self.accelerator, self.listener = recipe, folder, accelerator, listener
        self.started = time.perf_counter()
        dataset = first_then_others(lambda: dataset_of(recipe))
        for note in dataset.notes:
            listener.note(note)
        model = model_of(recipe)
        self.before = (sum(parameter.numel() for parameter in model.parameters()), traced(model, dataset))
        check_together(model, dataset)
        model.to(accelerator.device)
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        teacher = teacher_of(recipe)
        if teacher is not None:
            check_together(teacher, dataset, "teacher")
            teacher.to(accelerator.device)
        state = read_state(folder.state) if resume and folder.state.exists() else None
        if state is not None and state["processes"] != accelerator.num_processes:
            raise UsageError(
                f"{folder.path}: that run has {state['processes']} process(es), and here are "
                f"{accelerator.num_processes}: resume it with as many"
            )
        self.seconds_before = state["seconds"] if state else 0.0
        before = state["engine"]["schedule"] if state else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is in its notes
            schedule = make_schedule(recipe, model, dataset.input_shape, accelerator.num_processes, before)
        for note in schedule.notes:
            listener.note(note)
        self.engine = Engine(recipe, schedule, dataset, accelerator, listener, teacher)
        self.steps = self.engine.loader.steps  # refuses a batch that is larger than the data
        if state is not None:
            self.engine.load_state_dict(state["engine"])
            listener.note(f"going on from epoch {self.engine.progress.epoch + 1}, step {self.engine.progress.step}")

    def finish(self) -> TrainRecord:
        """Train what is left, test the best weights, and write the report."""
        recipe, engine, schedule = self.recipe, self.engine, self.engine.schedule
        self._save()
        self.listener.begin(engine.progress.epoch, recipe.epochs, self.steps)
        try:
            while engine.progress.epoch < recipe.epochs:
                said = len(schedule.notes)
                metrics = engine.train_epoch(recipe.checkpoint_steps, self._save)
                self._keep(metrics)
                self.listener.epoch(metrics)
                for note in schedule.notes[said:]:
                    self.listener.note(note)
        except LrconvertError as error:
            last = f"the last good state is {self.folder.state} (--resume goes on from it)"
            raise type(error)(f"{error}; {last}") from error
        except KeyboardInterrupt:
            self.listener.note(f"stopped; --resume goes on from {self.folder.state}")
            raise
        finally:
            self.listener.end()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.finish()
        test = self._test()
        record = summarize(
            recipe,
            engine,
            str(self.folder.path),
            architecture_of(recipe)[0] or str(recipe.checkpoint),
            self.before,
            test,
            self._seconds(),
        )
        if self.accelerator.is_main_process:
            self.folder.write_report(record.model_dump_json(indent=2))
        return record

    def _keep(self, metrics: EpochMetrics) -> None:
        """After an epoch: the best weights, the log, and then the state, which must not be ahead of them."""
        progress = self.engine.progress
        # The switch came after this epoch's validation: its figure is the dense network's.
        better = not metrics.switched and metrics.validation_accuracy > progress.best_accuracy
        if better:
            progress.best_accuracy, progress.best_epoch = metrics.validation_accuracy, metrics.epoch
        decided_by_first(lambda: self._write_files(better))
        self._save()

    def _write_files(self, better: bool) -> None:
        if better:
            model, args = architecture_of(self.recipe)
            dataset = self.engine.dataset
            save(
                self.engine.evaluated,
                self.folder.best,
                architecture=model,
                model_args=args,
                input_shape=dataset.input_shape,
                images=ImagePreparation(
                    img_size=dataset.framing.size, mean=dataset.normalization.mean, std=dataset.normalization.std
                ),
                overwrite=True,
            )
        self.folder.write_metrics(self.engine.progress.history)

    def _save(self) -> None:
        engine = self.engine.state_dict()
        state = {"engine": engine, "seconds": self._seconds(), "processes": self.accelerator.num_processes}
        decided_by_first(lambda: write_state(self.folder.state, state))

    def _seconds(self) -> float:
        """That the run has taken, with those before it was resumed."""
        return self.seconds_before + time.perf_counter() - self.started

    def _test(self) -> tuple[float, float] | None:
        """(loss, accuracy) of the best weights on the test images, read back from their file."""
        test = self.engine.dataset.test
        if test is None:
            return None
        model, args = architecture_of(self.recipe)
        best = load(self.folder.best, model, model_args=args or None).to(self.accelerator.device)
        if self.recipe.channels_last:
            best.to(memory_format=torch.channels_last)
        return self.engine.evaluate(test, best)
