"""A training run as it goes: a bar and a table row an epoch on a terminal, plain lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lrconvert.cli.output import Sink, first_process
from lrconvert.report.record_training import EpochMetrics
from lrconvert.training.events import Listener, Listeners

_LOG_SECONDS = 30.0


@contextmanager
def watching(sink: Sink, tensorboard: Path | None) -> Iterator[Listener]:
    """A listener that shows a run where `sink` shows its record, and writes TensorBoard logs if asked."""
    listeners: list[Listener] = [Watch(sink.console, sink.quiet)]
    if tensorboard is not None and first_process():
        from lrconvert.training.tensorboard import TensorBoard

        listeners.append(TensorBoard(tensorboard))
    both = Listeners(listeners)
    try:
        yield both
    finally:
        both.end()


class Watch(Listener):
    """Shows a run on `console`.

    Args:
        console: where to.
        quiet: show nothing.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = self._steps = self._first = 0
        self._spoke = self._began = time.monotonic()

    def note(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            self.console.print(text)

    def begin(self, first_epoch: int, epochs: int, steps: int) -> None:
        """Headings, and the bar of the whole run."""
        self._first, self._epochs, self._steps = first_epoch, epochs, steps
        self._began = self._spoke = time.monotonic()
        if self.quiet:
            return
        self.console.print(
            f"{'epoch':>9}  {'phase':<9}  {'lr':>8}  {'loss':>7}  {'train':>7}  {'valid.':>7}  {'images/s':>9}"
        )
        if self.console.is_terminal:
            text = TextColumn("{task.description}")
            columns = text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=epochs * steps, completed=first_epoch * steps)
            self._bar.start()

    def step(self, epoch: int, step: int, loss: float, images_per_second: float) -> None:
        """Move the bar; in a log a line now and then."""
        text = f"epoch {epoch + 1}/{self._epochs}: loss {loss:.3f}, {images_per_second:,.0f} images/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, completed=epoch * self._steps + step)
        elif not self.quiet and time.monotonic() - self._spoke >= _LOG_SECONDS:
            self._spoke = time.monotonic()
            done = epoch + step / self._steps - self._first
            left = (self._epochs - self._first - done) * (self._spoke - self._began) / done
            self.console.print(f"{text}, step {step}/{self._steps}, about {_duration(left)} left")

    def epoch(self, metrics: EpochMetrics) -> None:
        """One row."""
        if self.quiet:
            return
        self._spoke = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=(metrics.epoch + 1) * self._steps)
        self.console.print(
            f"{metrics.epoch + 1:>4}/{self._epochs:<4}  {metrics.phase:<9}  {metrics.learning_rate:>8.2g}  "
            f"{metrics.loss:>7.4f}  {metrics.accuracy:>7.2%}  {metrics.validation_accuracy:>7.2%}  "
            f"{metrics.images_per_second:>9,.0f}"
        )
        if metrics.switched:
            self.console.print(f"{'':>11}switched to low rank")

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    """3725 as "1 h 2 min"."""
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{minutes} min"
        if minutes < 90
        else f"{minutes // 60} h {minutes % 60} min"
    )
