"""A sweep as a picture: what budgets lose against what they cost, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.errors import UsageError
from lrconvert.report.record_sweep import SweepPoint, SweepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")

# What a point has of something, where that is known.
_Value = Callable[[SweepPoint], float | None]


def check_picture(path: Path) -> None:
    """Raise UsageError unless a picture can be written to `path`; call it before long work."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: pictures are {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'lrconvert[plot]'")


def save_picture(record: SweepRecord, path: Path, *, overwrite: bool = False) -> None:
    """Write the picture of `record` in the format that the suffix of `path` says.

    Raises:
        UsageError: the suffix is another, or matplotlib is not installed.
        OutputExistsError: `path` exists and `overwrite` is False.
        CheckpointError: it cannot be written.
    """
    check_picture(path)
    figure = picture(record)
    with atomic_path(path, overwrite) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=150)


def picture(record: SweepRecord) -> Figure:
    """A panel for each cost that is known, parameters, MACs and latency, with a curve for each allocator."""
    from matplotlib.figure import Figure

    name, loss, dense = _loss(record)
    costs: list[tuple[str, _Value]] = [
        ("parameters, of dense", lambda point: point.num_params / record.num_params),
        ("MACs, of dense", lambda point: point.macs / record.macs if point.macs and record.macs else None),
        ("latency, of dense (measured)", lambda point: point.latency_ratio),
    ]
    known = [(label, cost) for label, cost in costs if all(cost(point) is not None for point in record.points)]
    allocators = list(dict.fromkeys(point.allocator for point in record.points))
    figure = Figure(figsize=(4.2 * len(known), 3.8), layout="constrained")
    figure.suptitle(record.source + (f"  {record.model}" if record.model else ""), parse_math=False)
    for axes, (label, cost) in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        axes.set_xlabel(label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        for allocator, marker in zip(allocators, cycle("os^Dv*"), strict=False):
            points = [
                (cost(point), found)
                for point in record.points
                if point.allocator == allocator and (found := loss(point)) is not None and isfinite(found)
            ]
            axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=allocator)
        if dense is not None:
            axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(known)))
    return figure


def _loss(record: SweepRecord) -> tuple[str, _Value, float | None]:
    """(name, value of a point, value of the dense network) of what is drawn upwards."""
    if record.validation is not None:
        return f"accuracy on {record.validation}", lambda point: point.accuracy, record.accuracy
    if record.held_out is not None:
        return "error of the output, measured", lambda point: point.error_measured, None
    what = "the output" if record.calibrated else "the weights"
    return f"error of {what}, predicted", lambda point: point.error_predicted, None
