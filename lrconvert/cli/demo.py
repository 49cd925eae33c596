"""`lrconvert demo`."""

from pathlib import Path
from typing import Annotated

import typer

from lrconvert.cli import options


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what the demo writes.")] = Path(
        "lrconvert-demo"
    ),
    overwrite: options.Overwrite = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the training.")] = 0,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run the whole job on the digits of scikit-learn: train, analyze, factorize, fine-tune, export, check."""
    from lrconvert.api.demo import run_demo
    from lrconvert.cli.output import Sink

    sink = Sink(as_json, as_csv, quiet, verbose)

    def say(text: str) -> None:
        if not quiet:
            sink.console.print(text, highlight=False)

    sink.show(
        run_demo(output, overwrite=overwrite, seed=seed, show=sink.show if not (as_json or as_csv) else None, say=say)
    )
