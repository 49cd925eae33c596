"""What tables for people share: numbers as text, and the tables that several records have."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lrconvert.budget import KINDS
from lrconvert.plan import Target
from lrconvert.report import record as records


def count(number: float | None, unit: str = "") -> str:
    """1234567 as "1.23 M"; "–" for None."""
    if number is None:
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f} {letter}{unit}"
    return f"{number:g} {unit}".rstrip()


def shape_text(shape: Sequence[int]) -> str:
    """(64, 3, 7, 7) as "64×3×7×7"."""
    return "×".join(str(size) for size in shape)


def new_table(*columns: tuple[str, str], title: str = "") -> Table:
    """A table of (heading, justification) columns, long names folded."""
    table = Table(box=None, pad_edge=False, title=title or None, title_justify="left", header_style="bold")
    for heading, justify in columns:
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=justify == "right")  # type: ignore[arg-type]
    return table


def before_and_after(rows: Sequence[tuple[str, float | None, float | None, str]]) -> Table:
    """What a network cost before and after: (name, before, after, unit)."""
    table = new_table(("", "left"), ("before", "right"), ("after", "right"), ("after/before", "right"))
    for name, before, after, unit in rows:
        if before is None or after is None:
            continue
        ratio = f"{after / before:.3f}" if before else "–"
        table.add_row(name, count(before, unit), count(after, unit), ratio)
    return table


def target_text(target: Target) -> str:
    """What a budget asked for and what the plan reaches: "parameters 0.600 of dense, asked 0.6"."""
    if target.kind == "max_error":
        return f"error {target.reached:.4f}, asked at most {target.asked:g}"
    if target.kind == "min_accuracy":
        return f"accuracy {target.reached:.4f} on the validation images (measured), asked at least {target.asked:g}"
    return f"{KINDS[target.kind].unit} {target.reached:.3f} of dense, asked {target.asked:g}"


def print_reasons(console: Console, heading: str, reasons: Counter[str]) -> None:
    """Reasons to stay dense with how many layers each holds for; those of one sort ("sort: detail") become one line."""
    if not reasons:
        return
    sorts = Counter(reason.partition(":")[0] for reason in reasons)
    shown: Counter[str] = Counter()
    for reason, number in reasons.items():
        sort = reason.partition(":")[0]
        shown[sort if sorts[sort] > 2 else reason] += number
    console.print(f"\n{heading}", style="bold")
    for reason, number in shown.most_common():
        console.print(f"  {number:4} × {reason}", soft_wrap=True)


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """One line a note."""
    for note in notes:
        console.print(f"note: {note}")


def print_pivots(console: Console, rows: Sequence[records.LayerDecision]) -> None:
    """Say how many of `rows` are pivoted, if any."""
    if pivoted := sum(row.pivoted for row in rows):
        factors = "1 first factor" if pivoted == 1 else f"{pivoted} first factors"
        console.print(f"pivoted: {factors}, without r² numbers that their product does not need.", style="dim")


def decision_table(rows: Sequence[records.LayerDecision], wide: bool) -> Table:
    """One row a layer: its rank, or that it stays dense."""
    extra = [("kind", "left"), ("params", "right"), ("MACs", "right"), ("why", "left")]
    columns = [("layer", "left"), ("shape", "left"), ("rank", "right"), ("full", "right"), ("size", "right")]
    table = new_table(*columns, ("error", "right"), *(extra if wide else ()))
    for row in rows:
        cells = [
            row.name or "(root)",
            shape_text(row.shape) + (f" /{row.groups}" if row.groups > 1 else ""),
            "dense" if row.rank is None else str(row.rank),
            str(row.full_rank),
            f"{row.num_params_after / row.num_params_before:.0%}" if row.num_params_before else "–",
            "–" if row.error is None else f"{row.error:.3f}",
        ]
        if wide:
            cells += [row.kind, count(row.num_params_after), count(row.macs_after), row.reason]
        table.add_row(*cells, style="dim" if row.rank is None else None)
    return table
