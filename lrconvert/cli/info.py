"""`lrconvert info`."""

from lrconvert.cli import options


def info(
    checkpoint: options.Checkpoint,
    checkpoint_key: options.CheckpointKey = None,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Describe a checkpoint, and the plan in it if lrconvert wrote it. No weights are read."""
    import lrconvert
    from lrconvert.checkpoints import open_checkpoint
    from lrconvert.cli.output import Sink

    Sink(as_json, as_csv, quiet, verbose).show(lrconvert.info(open_checkpoint(checkpoint, checkpoint_key)))
