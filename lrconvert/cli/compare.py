"""`lrconvert compare`."""

from pathlib import Path
from typing import Annotated

import typer

from lrconvert.cli import options


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, usually the dense one.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, usually made from it.")],
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="For outputs and latency.")] = 1,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Put two checkpoints side by side: size, weights layer by layer, and where the model is known, speed."""
    import lrconvert
    from lrconvert.cli.output import Sink

    sink = Sink(as_json, as_csv, quiet, verbose)
    record = lrconvert.compare(
        first,
        second,
        model=model,
        model_args=options.parse_model_args(model_arg),
        input_shape=options.parse_shape(input_shape),
        batch_size=batch_size,
    )
    sink.show(record)
