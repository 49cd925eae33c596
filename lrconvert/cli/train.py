"""`lrconvert train`."""

from pathlib import Path
from typing import Annotated

import typer

from lrconvert.cli import options


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or one of `lrconvert recipes list`.")],
    overrides: options.Overrides = None,
    output: options.RunFolder = Path("run"),
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    tensorboard: options.TensorBoard = None,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a network: full rank first, then low rank (Pufferfish, Cuttlefish, SI&FD), or dense throughout.

    Several processes: torchrun --nproc-per-node 4 -m lrconvert train RECIPE.
    """
    import lrconvert
    from lrconvert.cli.output import Sink
    from lrconvert.cli.watch import watching

    sink = Sink(as_json, as_csv, quiet, verbose)
    with watching(sink, tensorboard) as listener:
        record = lrconvert.train(
            recipe,
            output,
            overrides=overrides or (),
            resume=resume,
            overwrite=overwrite,
            listener=listener,
        )
    sink.show(record)
