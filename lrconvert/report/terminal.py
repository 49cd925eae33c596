"""Records as tables for people: 80 columns wide, with more columns where there is more room."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from lrconvert.report import record as records
from lrconvert.report import record_training as training_records
from lrconvert.report.record_sweep import SweepRecord
from lrconvert.report.tables import (
    before_and_after,
    count,
    decision_table,
    new_table,
    print_notes,
    print_pivots,
    print_reasons,
    shape_text,
    target_text,
)
from lrconvert.report.terminal_sweep import render_sweep
from lrconvert.report.terminal_training import render_distill, render_evaluate, render_train

_BARS = "▁▂▃▄▅▆▇█"
_DECADES = 3
WIDE = 110


def render(record: records.Record, console: Console, verbose: bool = False) -> None:
    """Print `record`.

    Args:
        record: any record of `lrconvert.report.record`.
        console: where to, without markup: names may look like it; its width decides how many columns are shown.
        verbose: every row and column, whatever the width.
    """
    for kind, renderer in _RENDERERS.items():
        if isinstance(record, kind):
            renderer(record, console, verbose or console.width >= WIDE, verbose)
            return
    raise TypeError(f"no table for {type(record).__name__}")


def spectrum_picture(profile: Sequence[float], width: int) -> str:
    """One bar for each of `width` values of `profile`, from σ_max down, their height logarithmic over 3 decades."""
    from math import log10

    points = [profile[round(i * (len(profile) - 1) / max(width - 1, 1))] for i in range(min(width, len(profile)))]
    heights = [0.0 if value <= 0 else max(0.0, 1 + log10(value) / _DECADES) for value in points]
    return "".join(_BARS[min(int(height * len(_BARS)), len(_BARS) - 1)] for height in heights)


def _analyze(record: records.AnalyzeRecord, console: Console, wide: bool, verbose: bool) -> None:
    console.print(record.source + (f"  {record.model}" if record.model else ""), style="bold")
    print_notes(console, record.notes)
    columns = [("layer", "left"), ("shape", "left"), ("full", "right"), ("stable", "right"), ("scaled", "right")]
    extra = [("kind", "left"), ("params", "right"), ("MACs", "right"), ("e90", "right"), ("a80", "right")]
    headings = [*columns, *(extra if wide else ()), ("spectrum", "left")]
    rows = []
    for row in record.layers:
        cells = [
            row.name or "(root)",
            shape_text(row.shape) + (f" /{row.groups}" if row.groups > 1 else ""),
            str(row.full_rank),
            f"{row.stable_rank:.1f}",
            f"{row.scaled_stable_rank:.0f}",
        ]
        if wide:
            guess = "?" if row.evidence == "shape" else ""
            cells += [row.kind + guess, count(row.num_params), count(row.macs)]
            cells += [str(row.energy_rank_90), str(row.accumulative_rank_80)]
        rows.append(cells)
    widths = [max(map(len, column)) + 2 for column in zip([name for name, _ in headings[:-1]], *rows, strict=True)]
    bars = min(
        max(console.width - sum(widths), 6), len(max((row.profile for row in record.layers), key=len, default=()))
    )
    table = new_table(*headings)
    for row, cells in zip(record.layers, rows, strict=True):
        table.add_row(*cells, spectrum_picture(row.profile, bars), style="dim" if row.dense_reason else None)
    console.print(table)
    console.print(
        f"\nLayers in {record.order} order. full: min(out, in·k²). stable: Σσ²/σ_max². scaled: ξ·stable. "
        + ("e90, a80: rank for 0.9 of Σσ², 0.8 of Σσ. ?: kind guessed from the shape. " if wide else "")
        + "spectrum: σ/σ_max from first to last, logarithmic, three decades high.",
        style="dim",
    )
    print_reasons(console, "Kept dense", Counter(row.dense_reason for row in record.layers if row.dense_reason))
    size = f", {count(record.nbytes, 'B')} on disk" if record.nbytes else ""
    macs = f", {count(record.macs)} MACs ({record.mac_convention})" if record.macs is not None else ""
    weights = f"{len(record.layers)} weight" + ("" if len(record.layers) == 1 else "s")
    console.print(f"\n{weights}, {record.num_params:,} parameters{macs}{size}")


def _factorize(record: records.FactorizeRecord, console: Console, wide: bool, verbose: bool) -> None:
    to = f" → {record.output}" if record.output else "  (dry run: nothing is written)"
    console.print(f"{record.source}{to}", style="bold")
    console.print(f"rule {record.rule}, layers in {record.order} order")
    if record.rule == "auto":
        console.print("auto: scaled stable rank; linear and attention: accumulative rank 0.8, if larger", style="dim")
    print_notes(console, record.notes)
    rows = [row for row in record.layers if row.rank is not None or verbose]
    console.print(decision_table(rows, wide))
    measure = "of the outputs" if any(row.data_aware for row in rows) else "‖W − VU‖/‖W‖"
    console.print(f"\nsize: elements of both factors / of the weight. error: predicted, {measure}.", style="dim")
    print_pivots(console, rows)
    if not verbose:
        print_reasons(console, "Kept dense", Counter(row.reason for row in record.layers if row.rank is None))
    console.print()
    console.print(
        before_and_after(
            [
                ("parameters", record.num_params_before, record.num_params_after, ""),
                ("MACs", record.macs_before, record.macs_after, ""),
                ("on disk (measured)", record.nbytes_before, record.nbytes_after, "B"),
            ]
        )
    )
    if record.target is not None:
        console.print(target_text(record.target))
    if record.latency_before_ms and record.latency_after_ms and record.latency_after_predicted_ms:
        before, after, predicted = record.latency_before_ms, record.latency_after_ms, record.latency_after_predicted_ms
        console.print(
            f"latency {before:.4g} ms → {after:.4g} ms, {after / before:.3f} of dense (measured; "
            f"{predicted / before:.3f} predicted)"
        )
        console.print(f"on {record.latency_note}", style="dim")
    if record.macs_before is not None:
        console.print(f"MACs: {record.mac_convention}.", style="dim")
    if record.seconds is not None:
        console.print(f"{record.seconds:.1f} s", style="dim")
    if record.output is not None and not record.output.endswith(".onnx"):
        console.print(
            f"Next, to win back what was lost: lrconvert distill {record.output} --teacher {record.source} "
            "--data EXAMPLES -o OUT, or with labels lrconvert finetune",
            style="dim",
        )


def _export(record: records.ExportRecord, console: Console, wide: bool, verbose: bool) -> None:
    console.print(f"{record.source} → {record.output}  ({record.format}, {count(record.nbytes, 'B')})", style="bold")
    if record.difference is None:
        console.print(f"checked: {record.checked_with}")
        return
    batches = " and ".join(str(size) for size in record.batch_sizes)
    lengths = "".join(
        f", {' and '.join(map(str, sizes))} {name.replace('_', ' ')}" for name, sizes in record.lengths.items()
    )
    opset = f", opset {record.opset}" if record.opset else ""
    console.print(
        f"checked: {record.checked_with}, batches of {batches}{lengths}, largest relative difference "
        f"{record.difference:.1e}{opset}"
    )
    print_notes(console, record.notes)


def _compare(record: records.CompareRecord, console: Console, wide: bool, verbose: bool) -> None:
    a, b = record.first, record.second
    console.print(f"A  {a.source}\nB  {b.source}", style="bold")
    table = new_table(
        ("layer", "left"), ("shape", "left"), ("rank A", "right"), ("rank B", "right"), ("B − A", "right")
    )
    shown = [row for row in record.layers if verbose or row.difference or row.rank != (None, None)]
    for row in shown:
        ranks = ["dense" if rank is None else str(rank) for rank in row.rank]
        table.add_row(row.name or "(root)", shape_text(row.shape), *ranks, f"{row.difference:.3g}")
    if shown:
        console.print(table)
    same = len(record.layers) - len(shown)
    console.print(
        f"{same} of {len(record.layers)} weights are equal; B − A: ‖B − A‖/‖A‖ of merged weights", style="dim"
    )
    for side, keys in (("A", record.only_first), ("B", record.only_second)):
        if keys:
            console.print(f"only in {side}: {', '.join(keys[:5])}{', …' if len(keys) > 5 else ''}")
    console.print()
    totals = new_table(("", "left"), ("A", "right"), ("B", "right"), ("B/A", "right"))
    lines: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
        ("parameters", a.num_params, b.num_params, count),
        ("MACs", a.macs, b.macs, count),
        ("on disk (measured)", a.nbytes, b.nbytes, lambda value: count(value, "B")),
        ("latency (measured)", a.latency_ms, b.latency_ms, lambda value: f"{value:.2f} ms"),
    ]
    for name, first, second, text in lines:
        if first is not None and second is not None:
            totals.add_row(name, text(first), text(second), f"{second / first:.3f}" if first else "–")
    console.print(totals)
    if record.latency_note:
        console.print(f"latency: {record.latency_note}", style="dim")
    if record.output_difference is not None:
        console.print(f"outputs differ by {record.output_difference:.2e} (‖b − a‖/‖a‖, one random batch)")


def _info(record: records.InfoRecord, console: Console, wide: bool, verbose: bool) -> None:
    console.print(record.source, style="bold")
    console.print(
        f"{record.format}, {count(record.nbytes, 'B')}, {record.num_tensors} tensors of "
        f"{', '.join(record.dtypes)}, {record.num_params:,} parameters",
        markup=False,
    )
    print_notes(console, record.notes)
    if record.written_by is None:
        console.print("not written by lrconvert: a dense checkpoint, as far as anything says")
        return
    console.print(f"written by {record.written_by}" + (f" for {record.model}" if record.model else ""))
    if record.rule is None:
        console.print("dense: no plan in it")
        return
    console.print(f"rule {record.rule}" if record.rule else "ranks read from a live model")
    console.print(decision_table(record.low_rank, wide))
    print_pivots(console, record.low_rank)
    print_reasons(console, "Kept dense", Counter(record.dense))
    console.print()
    console.print(before_and_after([("parameters", record.num_params_dense, record.num_params, "")]))


def _demo(record: records.DemoRecord, console: Console, wide: bool, verbose: bool) -> None:
    names = [("", "left"), ("params", "right"), ("MACs", "right"), ("on disk", "right")]
    table = new_table(*names, ("accuracy", "right"), ("latency", "right"))
    for step in record.steps:
        table.add_row(
            step.name,
            count(step.num_params),
            count(step.macs),
            count(step.nbytes, "B"),
            f"{step.accuracy:.1%}",
            f"{step.latency_ms:.2f} ms",
        )
    console.print(table)
    console.print(
        f"accuracy on held-out digits and latency of a batch of {record.batch_size} are measured; "
        f"MACs: {record.mac_convention}.",
        style="dim",
    )
    console.print(f"The files are in {record.folder}")


_RENDERERS: dict[type[records.Record], Callable[[Any, Console, bool, bool], None]] = {
    records.AnalyzeRecord: _analyze,
    records.FactorizeRecord: _factorize,
    records.ExportRecord: _export,
    records.CompareRecord: _compare,
    records.InfoRecord: _info,
    records.DemoRecord: _demo,
    SweepRecord: render_sweep,
    training_records.TrainRecord: render_train,
    training_records.EvaluateRecord: render_evaluate,
    training_records.DistillRecord: render_distill,
}
