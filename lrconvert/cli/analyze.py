"""`lrconvert analyze`."""

from lrconvert.cli import options
from lrconvert.cli.memory import return_freed_memory


def analyze(
    checkpoint: options.Checkpoint,
    checkpoint_key: options.CheckpointKey = None,
    model: options.Model = None,
    model_arg: options.ModelArg = None,
    input_shape: options.InputShape = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    init: options.Init = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Report the stable rank and the spectrum of every weight.

    Works on any checkpoint. With --model the kinds of layers are exact, they come in execution order, and MACs are
    counted.
    """
    from lrconvert.api.analyze import analyze as run
    from lrconvert.api.analyze import analyze_record
    from lrconvert.checkpoints import open_checkpoint
    from lrconvert.cli.output import Sink

    return_freed_memory()
    sink = Sink(as_json, as_csv, quiet, verbose)
    with sink.progress() as progress:
        analysis = run(
            open_checkpoint(checkpoint, checkpoint_key),
            model=model,
            model_args=options.parse_model_args(model_arg),
            input_shape=options.parse_shape(input_shape),
            include=include or (),
            exclude=exclude or (),
            init=init,
            device=device,
            progress=progress,
        )
    sink.show(analyze_record(analysis))
