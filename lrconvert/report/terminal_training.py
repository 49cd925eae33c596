"""Records of the trainer as tables for people."""

from collections.abc import Sequence

from rich.console import Console

from lrconvert.report import record_training as records
from lrconvert.report.tables import before_and_after, count, decision_table, new_table, print_notes

_BARS = "▁▂▃▄▅▆▇█"


def curve_picture(curve: Sequence[float]) -> str:
    """One bar for each value of a rank curve, the largest the highest."""
    top = max(curve, default=0.0)
    return "".join(_BARS[min(int(value / top * (len(_BARS) - 1) + 0.5), len(_BARS) - 1)] for value in curve if top)


def render_train(record: records.TrainRecord, console: Console, wide: bool, verbose: bool) -> None:
    """What a training run did."""
    console.print(f"\n{record.model} on {record.dataset}, {record.method} → {record.output}", style="bold")
    print_notes(console, record.notes)
    if record.curves:
        curves = new_table(("rank curve", "left"), ("at start", "right"), ("at switch", "right"), ("", "left"))
        for name, curve in record.curves.items():
            curves.add_row(name, f"{curve[0]:.1f}", f"{curve[-1]:.1f}", curve_picture(curve))
        console.print(curves)
        console.print("Stable rank at initialisation and after each full-rank epoch.\n", style="dim")
    if record.layers:
        console.print(decision_table([row for row in record.layers if row.rank is not None or verbose], wide))
        console.print(f"\nE = {record.switch_epoch} full-rank epochs, K = {record.keep_first} leading layers dense")
    elif record.method != "dense":
        console.print("The network never became low rank.")
    console.print()
    console.print(
        before_and_after(
            [
                ("parameters", record.num_params_before, record.num_params_after, ""),
                ("MACs", record.macs_before, record.macs_after, ""),
            ]
        )
    )
    if record.trainable_params_after != record.num_params_after:
        console.print(f"{record.trainable_params_after:,} parameters are trained")
    times = new_table(("measured", "left"), ("epochs", "right"), ("time", "right"), ("images/s", "right"))
    for name, phase in (("full rank", record.full_rank), ("low rank", record.low_rank)):
        if phase.epochs:
            times.add_row(name, str(phase.epochs), f"{phase.seconds:.1f} s", f"{phase.images_per_second or 0:,.0f}")
    if record.tracking_share is not None:
        share = f"{record.tracking_share:.3%} of an epoch"
        times.add_row("rank tracking", "", f"{record.tracking_seconds:.3g} s", share)
    for name, seconds in (
        ("profiling for K", record.profiling_seconds),
        ("the switch", record.switch_seconds),
    ):
        if seconds:
            share = f"{seconds / record.seconds:.2%} of the run"
            times.add_row(name, "", f"{seconds:.3g} s", share)
    times.add_row("whole run", str(record.epochs), f"{record.seconds:.1f} s", "")
    console.print()
    console.print(times)
    for traffic in record.traffic:
        console.print(
            f"{traffic.phase}: {count(traffic.bytes_per_step, 'B')} of gradients a step and process "
            f"({traffic.method}; {count(traffic.uncompressed_bytes_per_step, 'B')} uncompressed)"
        )
    console.print(
        f"\nbest validation accuracy {record.validation_accuracy:.2%} (epoch {record.best_epoch + 1})"
        + (f", test accuracy {record.test_accuracy:.2%}" if record.test_accuracy is not None else "")
    )
    console.print(f"{record.processes} process(es) on {record.device}, mixed precision: {record.amp}", style="dim")
    console.print(f"The weights are in {record.output}/best.safetensors")


def render_evaluate(record: records.EvaluateRecord, console: Console, wide: bool, verbose: bool) -> None:
    """What an evaluation measured."""
    console.print(f"{record.source} on {record.dataset}", style="bold")
    rows = new_table(("", "left"), ("", "right"))
    rows.add_row("parameters", f"{record.num_params:,}")
    rows.add_row("MACs", count(record.macs))
    rows.add_row(f"accuracy, {record.images:,} {record.split} images", f"{record.accuracy:.2%}")
    rows.add_row("loss", f"{record.loss:.4f}")
    spread = f"{record.latency_low_ms:.2f}–{record.latency_high_ms:.2f}, n {record.latency_runs}"
    rows.add_row(f"latency, batch of {record.batch_size} on {record.device}", f"{record.latency_ms:.2f} ms ({spread})")
    console.print(rows)


def render_distill(record: records.DistillRecord, console: Console, wide: bool, verbose: bool) -> None:
    """What a distillation did and measured."""
    to = f" → {record.output}" if record.output else ""
    console.print(f"{record.source}{to}", style="bold")
    console.print(f"taught by {record.teacher} on {record.data}")
    print_notes(console, record.notes)
    rows = new_table(("", "left"), ("", "right"))
    rows.add_row("parameters, trained", f"{record.num_params:,}, {record.trained_params:,}")
    rows.add_row("examples, held out", f"{record.examples:,}, {record.held_out:,}")
    early = " (the error fell no more)" if record.stopped_early else ""
    rows.add_row("steps, epochs", f"{record.steps:,}, {record.epochs:.1f}{early}")
    rows.add_row("time", f"{record.seconds:.1f} s on {record.device}")
    rows.add_row(f"error of {record.compared} before", f"{record.error_before:.4f}")
    rows.add_row("and after", f"{record.error_after:.4f}")
    console.print(rows)
    besides = f"; {len(record.blocks)} blocks were compared too" if record.blocks else ""
    console.print(f"error: ‖y′ − y‖/‖y‖ on held-out examples, measured{besides}", style="dim")
