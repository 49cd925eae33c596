"""What a run tells whoever watches it; the command line shows it, a test records it."""

from collections.abc import Sequence

from lrconvert.report.record_training import EpochMetrics


class Listener:
    """Hears of everything and does nothing; subclasses show what they like. Only the first process speaks."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def begin(self, first_epoch: int, epochs: int, steps: int) -> None:
        """Training begins at `first_epoch` of `epochs`, `steps` steps each."""

    def step(self, epoch: int, step: int, loss: float, images_per_second: float) -> None:
        """`step` steps of an epoch are done; told about twice a second."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """An epoch is done."""

    def end(self) -> None:
        """Training is done, or failed."""


class Listeners(Listener):
    """Passes everything on to several listeners."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = listeners

    def note(self, text: str) -> None:
        """To all."""
        for each in self.listeners:
            each.note(text)

    def begin(self, first_epoch: int, epochs: int, steps: int) -> None:
        """To all."""
        for each in self.listeners:
            each.begin(first_epoch, epochs, steps)

    def step(self, epoch: int, step: int, loss: float, images_per_second: float) -> None:
        """To all."""
        for each in self.listeners:
            each.step(epoch, step, loss, images_per_second)

    def epoch(self, metrics: EpochMetrics) -> None:
        """To all."""
        for each in self.listeners:
            each.epoch(metrics)

    def end(self) -> None:
        """To all."""
        for each in self.listeners:
            each.end()
