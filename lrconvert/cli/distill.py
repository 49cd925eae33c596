"""`lrconvert distill`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from lrconvert.cli import options


def distill(
    small: Annotated[Path, typer.Argument(metavar="SMALL", help="A factorized checkpoint: a file or a folder.")],
    teacher: Annotated[Path, typer.Option("--teacher", help="The dense checkpoint it was made from.", metavar="DENSE")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Examples without labels: a text file, a folder of images, .npz, .pt, a dataset, file.py:factory.",
        ),
    ],
    output: options.Output,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="How long, with everything; 5 unless epochs are given.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the examples; then the same seed repeats a run.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=2, help="To take out of DATA.")] = 4000,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Examples a step.")] = 32,
    lr: Annotated[float, typer.Option("--lr", help="The highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of examples and their order.")] = 0,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train the factors to compute what the dense network computes, on examples without labels."""
    started = time.monotonic()

    import lrconvert
    from lrconvert.cli.output import Sink

    sink = Sink(as_json, as_csv, quiet, verbose)
    with sink.progress() as progress:
        record = lrconvert.distill(
            small,
            teacher,
            data,
            output=output,
            minutes=minutes,
            epochs=epochs,
            examples=examples,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            model=model,
            model_args=options.parse_model_args(model_arg),
            overwrite=overwrite,
            device=device,
            started=started,
            progress=progress,
        )
    sink.show(record)
