"""`lrconvert evaluate`."""

from typing import Annotated, Any

import typer

from lrconvert.cli import options


def evaluate(
    checkpoint: options.Checkpoint,
    dataset: Annotated[str, typer.Option("--dataset", help="What to evaluate on: a name, or file.py:factory.")],
    overrides: options.Overrides = None,
    data_dir: options.DataDir = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Accuracy on a data set's test images, and the latency of a batch.

    Any field of a recipe can be given as KEY=VALUE (batch_size=256 img_size=224 amp=bf16).
    """
    import lrconvert
    from lrconvert.cli.output import Sink

    fields: dict[str, Any] = options.given(data_dir=data_dir, model=model)
    sink = Sink(as_json, as_csv, quiet, verbose)
    record = lrconvert.evaluate(
        checkpoint,
        dataset,
        model_args=options.parse_model_args(model_arg),
        overrides=overrides or (),
        **fields,
    )
    sink.show(record)
