"""`lrconvert sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from lrconvert.cli import options
from lrconvert.cli.memory import return_freed_memory
from lrconvert.errors import UsageError


def sweep(
    checkpoint: options.Checkpoint,
    ratios: Annotated[
        str | None, typer.Option("--ratios", help="Budgets, compressed / original.", metavar="0.8,0.6,0.5,0.4,0.3")
    ] = None,
    by: Annotated[str, typer.Option("--by", help="What budgets count: params or macs.")] = "params",
    allocator: Annotated[
        list[str] | None,
        typer.Option("--allocator", help="How budgets are distributed; several are compared.", metavar="NAME"),
    ] = None,
    calibrate: options.Calibrate = None,
    examples: options.Examples = None,
    evaluate: options.Evaluate = None,
    data_dir: options.DataDir = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure the time of one call too.")] = False,
    batch_size: options.TimedBatch = None,
    channels_last: options.ChannelsLast = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", help="Keep what is computed here: another budget then costs nothing.", metavar="FOLDER"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture: .svg, .png or .pdf.", metavar="FILE")
    ] = None,
    keep_first: options.KeepFirst = None,
    factorize_last: options.FactorizeLast = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    checkpoint_key: options.CheckpointKey = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare budgets: error or accuracy against parameters, MACs and latency, as a table and a picture.

    No checkpoint is written.
    """
    count = options.parse_examples(examples, calibrate)

    from lrconvert.api.sweep import RATIOS
    from lrconvert.api.sweep import sweep as run
    from lrconvert.checkpoints import open_checkpoint
    from lrconvert.checkpoints.atomic import check_writable
    from lrconvert.cli.output import Sink
    from lrconvert.report.picture import check_picture, save_picture

    return_freed_memory()
    sink = Sink(as_json, as_csv, quiet, verbose)
    if plot is not None:
        check_picture(plot)
        check_writable(plot, overwrite)
    with sink.progress() as progress:
        record = run(
            open_checkpoint(checkpoint, checkpoint_key),
            ratios=_parse_ratios(ratios) if ratios is not None else RATIOS,
            by=by,  # type: ignore[arg-type]
            allocators=allocator or (),
            calibrate=calibrate,
            examples=count,
            evaluate=evaluate,
            data_dir=data_dir or "data",
            latency=latency,
            batch_size=1 if batch_size is None else batch_size,
            channels_last=channels_last,
            cache=cache,
            keep_first=keep_first,
            keep_last=not factorize_last,
            include=include or (),
            exclude=exclude or (),
            model=model,
            model_args=options.parse_model_args(model_arg),
            input_shape=options.parse_shape(input_shape),
            device=device,
            progress=progress,
        )
    if plot is not None:
        save_picture(record, plot, overwrite=overwrite)
    sink.show(record)


def _parse_ratios(text: str) -> list[float]:
    """[0.6, 0.5] from "0.6,0.5"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--ratios {text}: write numbers with commas between, like 0.8,0.6,0.5") from None
