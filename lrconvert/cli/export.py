"""`lrconvert export`."""

from typing import Annotated

import typer

from lrconvert.cli import options
from lrconvert.cli.memory import return_freed_memory


def export(
    checkpoint: options.Checkpoint,
    output: options.Output,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="onnx, pt2 (torch.export), safetensors; dense: the factors multiplied out again; pivoted: the same "
            "products from fewer numbers, to run and not to train; plain: those as plain factors, to train again.",
        ),
    ],
    checkpoint_key: options.CheckpointKey = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, float16 or bfloat16, for all floating-point weights.", metavar="DTYPE"),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest relative difference from the model's outputs.")
    ] = 1e-4,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a checkpoint in another form, checked before it is kept.

    A graph (onnx, pt2) is run on random inputs and compared with the model.
    """
    import lrconvert
    from lrconvert.checkpoints import open_checkpoint
    from lrconvert.cli.output import Sink

    return_freed_memory()
    sink = Sink(as_json, as_csv, quiet, verbose)
    with sink.progress() as progress:
        record = lrconvert.export(
            open_checkpoint(checkpoint, checkpoint_key),
            output,
            format,
            model=model,
            model_args=options.parse_model_args(model_arg),
            input_shape=options.parse_shape(input_shape),
            dtype=dtype,
            tolerance=tolerance,
            overwrite=overwrite,
            device=device,
            progress=progress,
        )
    sink.show(record)
