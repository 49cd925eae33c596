"""A sweep as a table for people."""

from rich.console import Console

from lrconvert.report.record_sweep import SweepPoint, SweepRecord
from lrconvert.report.tables import count, new_table, print_notes


def render_sweep(record: SweepRecord, console: Console, wide: bool, verbose: bool) -> None:
    """One row a budget, those that no other row beats marked."""
    console.print(record.source + (f"  {record.model}" if record.model else ""), style="bold")
    print_notes(console, record.notes)
    several = len({point.allocator for point in record.points}) > 1
    measured = record.held_out is not None
    shown = {
        "allocator": several or wide,
        "budget": True,
        "params": True,
        "MACs": record.macs is not None,
        "ms": record.latency_note is not None,
        "error": wide or not measured,
        "measured": measured,
        "agree": wide and measured and any(point.agreement is not None for point in record.points),
        "accuracy": record.validation is not None,
        "": True,
    }
    left = ("allocator", "")
    table = new_table(*((name, "left" if name in left else "right") for name, wanted in shown.items() if wanted))
    for point in record.points:
        cells = zip(shown.values(), _cells(point, record), strict=True)
        table.add_row(*(cell for wanted, cell in cells if wanted), style=None if point.pareto else "dim")
    console.print(table)
    dense = [f"{count(record.num_params)} parameters"]
    dense += [f"{count(record.macs)} MACs"] if record.macs is not None else []
    dense += [f"accuracy {record.accuracy:.2%}"] if record.accuracy is not None else []
    console.print(f"dense: {', '.join(dense)}")
    of = "‖y′ − y‖/‖y‖ of the output" if record.calibrated else "√(total ‖W − VU‖² / total ‖W‖²)"
    of_dense = ["budget", "params", *(name for name in ("MACs", "ms") if shown[name])]
    lines = [
        f"{', '.join(of_dense)}: of dense; the budget is one of {'MACs' if record.by == 'macs' else 'parameters'}."
    ]
    if shown["error"]:
        lines.append(f"error: predicted, {of}.")
    if measured:
        agree = ", and share of equal decisions" if shown["agree"] else ""
        lines.append(f"measured: {of}{agree}, on {record.held_out} held-out examples.")
    if record.validation is not None:
        lines.append(f"accuracy: on the validation images of {record.validation}, measured.")
    if record.latency_note is not None:
        lines.append(f"ms: time of one call, measured in turns with the dense model on {record.latency_note}.")
    lines.append("●: no other row is better at the same cost or less.")
    if any(point.plan_ratio != point.ratio for point in record.points):
        lines.append("=: the plan of a smaller budget, which is better.")
    console.print("\n" + "\n".join(lines), style="dim")


def _cells(point: SweepPoint, record: SweepRecord) -> tuple[str, ...]:
    def of(value: float | None, dense: float | None) -> str:
        return "–" if value is None or not dense else f"{value / dense:.3f}"

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return (
        point.allocator,
        f"{point.ratio:g}",
        of(point.num_params, record.num_params),
        of(point.macs, record.macs),
        number(point.latency_ratio, ".3f"),
        number(point.error_predicted, ".4f"),
        number(point.error_measured, ".4f"),
        number(point.agreement, ".1%"),
        number(point.accuracy, ".2%"),
        ("●" if point.pareto else "") + (f" = {point.plan_ratio:g}" if point.plan_ratio != point.ratio else ""),
    )
