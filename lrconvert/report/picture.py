"""A sweep as a picture: what budgets lose against what they cost, drawn as SVG with nothing but text."""

from collections.abc import Callable, Sequence
from html import escape
from math import floor, isfinite, log10
from pathlib import Path

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.errors import UsageError
from lrconvert.report.record_sweep import SweepPoint, SweepRecord

SUFFIXES = (".svg", ".html")

# Okabe and Ito's colours, which all eyes can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Of one panel, in pixels: the plot, and what is left of it and below.
_WIDTH, _HEIGHT, _LEFT, _BELOW, _ABOVE, _GAP = 300, 220, 58, 46, 46, 24
_LEGEND = 18


def check_picture(path: Path) -> None:
    """Raise UsageError unless `path` can hold a picture; call it before long work."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: pictures are {' or '.join(SUFFIXES)} files, which every browser shows")


def save_picture(record: SweepRecord, path: Path, *, overwrite: bool = False) -> None:
    """Write the picture of `record`: an SVG, or an HTML page with one in it; neither needs anything else.

    Raises:
        UsageError: the suffix is another.
        OutputExistsError: `path` exists and `overwrite` is False.
        CheckpointError: it cannot be written.
    """
    check_picture(path)
    text = picture(record)
    if path.suffix == ".html":
        title = f"<title>{escape(record.source)}</title>"
        text = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{title}\n{text}</html>\n'
    with atomic_path(path, overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def picture(record: SweepRecord) -> str:
    """An SVG with a panel for each cost that is known: parameters, MACs, latency."""
    name, value, dense = _loss(record)
    costs: list[tuple[str, Callable[[SweepPoint], float | None]]] = [
        ("parameters, of dense", lambda point: point.num_params / record.num_params),
        ("MACs, of dense", lambda point: point.macs / record.macs if point.macs and record.macs else None),
        ("latency, of dense (measured)", lambda point: point.latency_ratio),
    ]
    known = [(label, cost) for label, cost in costs if all(cost(point) is not None for point in record.points)]
    allocators = list(dict.fromkeys(point.allocator for point in record.points))
    panel = _LEFT + _WIDTH + _GAP
    size = panel * len(known), _ABOVE + _HEIGHT + _BELOW + _LEGEND * len(allocators)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        _text(8, 18, record.source + (f"  {record.model}" if record.model else ""), 'font-weight="bold"'),
    ]
    for number, (label, cost) in enumerate(known):
        curves = [
            [
                (float(cost(point) or 0.0), found)
                for point in record.points
                if point.allocator == allocator and (found := value(point)) is not None and isfinite(found)
            ]
            for allocator in allocators
        ]
        parts += _panel(number * panel + _LEFT, label, name, curves, dense)
    for number, allocator in enumerate(allocators):
        y = _ABOVE + _HEIGHT + _BELOW + _LEGEND * number
        parts += [_dot(_LEFT, y, number), _text(_LEFT + 10, y + 4, allocator)]
    return "\n".join([*parts, "</svg>", ""])


def _loss(record: SweepRecord) -> tuple[str, Callable[[SweepPoint], float | None], float | None]:
    """(name, value of a point, value of the dense network) of what is drawn upwards."""
    if record.validation is not None:
        return f"accuracy on {record.validation}", lambda point: point.accuracy, record.accuracy
    if record.held_out is not None:
        return "error of the output, measured", lambda point: point.error_measured, None
    what = "the output" if record.calibrated else "the weights"
    return f"error of {what}, predicted", lambda point: point.error_predicted, None


def _panel(
    left: int, x_name: str, y_name: str, curves: Sequence[Sequence[tuple[float, float]]], dense: float | None
) -> list[str]:
    """One plot whose lower left corner is at `left`."""
    points = [point for curve in curves for point in curve]
    low_x, high_x, x_ticks = _axis([x for x, _ in points])
    low_y, high_y, y_ticks = _axis([y for _, y in points] + ([] if dense is None else [dense]))
    bottom = _ABOVE + _HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + _WIDTH * (x - low_x) / (high_x - low_x),
            bottom - _HEIGHT * (y - low_y) / (high_y - low_y),
        )

    parts = []
    for tick in x_ticks:
        x, _ = place(tick, low_y)
        parts += [_line(x, _ABOVE, x, bottom, "#e5e5e5"), _text(x, bottom + 15, f"{tick:g}", 'text-anchor="middle"')]
    for tick in y_ticks:
        _, y = place(low_x, tick)
        parts += [_line(left, y, left + _WIDTH, y, "#e5e5e5")]
        parts += [_text(left - 6, y + 4, f"{tick:g}", 'text-anchor="end"')]
    parts += [_line(left, bottom, left + _WIDTH, bottom, "#222"), _line(left, _ABOVE, left, bottom, "#222")]
    parts += [_text(left + _WIDTH / 2, bottom + 32, x_name, 'text-anchor="middle"')]
    parts += [_text(left, _ABOVE - 8, y_name, 'fill="#555"')]
    if dense is not None:
        _, y = place(low_x, dense)
        parts += [_line(left, y, left + _WIDTH, y, "#222", 'stroke-dasharray="4 3"')]
        parts += [_text(left + _WIDTH, y - 4, "dense", 'text-anchor="end"')]
    for number, curve in enumerate(curves):
        placed = [place(x, y) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts += [f'<polyline points="{path}" fill="none" stroke="{_colour(number)}" stroke-width="1.5"/>']
        parts += [_dot(x, y, number) for x, y in placed]
    return parts


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(first, last, ticks) of an axis that holds `values`: four to nine round numbers."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** floor(log10(span))
    step = next(unit * share for share in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (unit * share) <= 7)
    first, last = floor(low / step), -floor(-high / step)
    last += first == last
    ticks = [round(number * step, 12) for number in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _dot(x: float, y: float, number: int) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_colour(number)}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {more}/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
