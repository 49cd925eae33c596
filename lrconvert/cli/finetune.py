"""`lrconvert finetune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lrconvert.cli import options
from lrconvert.errors import UsageError


def finetune(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT|RECIPE", help="A checkpoint, usually factorized; or a recipe."),
    ],
    overrides: options.Overrides = None,
    dataset: options.Dataset = None,
    data_dir: options.DataDir = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="The dense checkpoint, whose outputs are imitated.", metavar="CKPT")
    ] = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    output: options.RunFolder = Path("run"),
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    tensorboard: options.TensorBoard = None,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a checkpoint a little further, by default three epochs of AdamW.

    Any field of a recipe can be given as KEY=VALUE (epochs=5 lr=1e-3).
    """
    import lrconvert
    from lrconvert.cli.output import Sink
    from lrconvert.cli.watch import watching

    fields: dict[str, Any] = options.given(dataset=dataset, data_dir=data_dir, teacher=teacher, model=model)
    if model_arg:
        fields["model_args"] = options.parse_model_args(model_arg)
    if dataset is None and checkpoint.suffix not in (".yaml", ".yml") and not _names(overrides, "dataset"):
        raise UsageError("--dataset: name the data to train on (digits, cifar10, folder, file.py:factory, …)")
    sink = Sink(as_json, as_csv, quiet, verbose)
    with watching(sink, tensorboard) as listener:
        record = lrconvert.finetune(
            checkpoint,
            output,
            overrides=overrides or (),
            resume=resume,
            overwrite=overwrite,
            listener=listener,
            **fields,
        )
    sink.show(record)


def _names(overrides: list[str] | None, key: str) -> bool:
    return any(text.startswith(f"{key}=") for text in overrides or ())
