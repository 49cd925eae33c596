"""Metrics of a run as TensorBoard logs."""

from pathlib import Path

from lrconvert.errors import LrconvertError
from lrconvert.report.record_training import EpochMetrics
from lrconvert.training.events import Listener


class TensorBoard(Listener):
    """Writes one point an epoch to the folder `path`.

    Raises:
        LrconvertError: tensorboard is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise LrconvertError("TensorBoard logs need tensorboard: pip install tensorboard") from None
        self.writer = SummaryWriter(str(path))

    def epoch(self, metrics: EpochMetrics) -> None:
        """Every figure of the epoch."""
        for name, value in metrics.model_dump(exclude={"epoch", "phase", "switched"}).items():
            self.writer.add_scalar(name, value, metrics.epoch + 1)
        self.writer.flush()

    def end(self) -> None:
        """Close the log."""
        self.writer.close()
