"""`distill`: the factors of a network learn, in minutes and without labels, to compute what the dense one does."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lrconvert.analysis import Progress
from lrconvert.api.common import resolve_device
from lrconvert.checkpoints import Checkpoint, check_output, open_checkpoint, write_checkpoint
from lrconvert.errors import ModelError, UsageError
from lrconvert.heads import sentence_head
from lrconvert.inputs import Call
from lrconvert.loading import load
from lrconvert.network import Network, open_network
from lrconvert.report.record_training import DistillRecord
from lrconvert.rewrite import check_written, moving, overruled
from lrconvert.samples import read_samples
from lrconvert.training.imitation import imitate, trainable

_MINUTES = 5.0


def distill(
    small: str | Path | nn.Module,
    teacher: str | Path | nn.Module,
    data: str | Sequence[Call],
    *,
    output: str | Path | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    examples: int = 4000,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str = "auto",
    started: float | None = None,
    progress: Progress | None = None,
) -> DistillRecord:
    """Train the factors of a factorized network until it computes what the dense one does; see `training.imitation`.

    Args:
        small: a factorized checkpoint, or a live factorized model, which is changed in place. Only its factors are
            trained, and the biases beside them.
        teacher: the dense network it was made from: a checkpoint or a live model.
        data: examples without labels: what `lrconvert.samples.read_samples` reads, or calls of the model. One part in
            twenty is held out, to watch the run.
        output: what to write, for a checkpoint; its suffix says the format, and a folder stays a folder.
        minutes: how long it may take, reading, measuring and writing included; 5 unless `epochs` are given.
        epochs: passes over the examples, instead; the same seed then gives the same weights on the same machine.
        examples, batch_size: to take out of `data`, and at a time; calls are taken as they are.
        lr: the highest learning rate.
        seed: of the choice of examples, and their order.
        model, model_args: the architecture, where the files do not name it.
        overwrite: replace an existing output.
        device: where to train.
        started: when the minutes began to count, by `time.monotonic`; now if it is not given.
        progress: see `analyze`.

    Raises:
        UsageError: there is nothing to train, or the settings make no sense.
        ModelError: an architecture is not known, or the teacher does not fit.
        OutputExistsError: the output exists.
        LrconvertError: the data cannot be read, or the loss is no number any more.
    """
    began = time.monotonic() if started is None else started
    where = resolve_device(device)
    if minutes is not None and epochs is not None:
        raise UsageError("minutes and epochs both say how long to train: give one of them")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UsageError(f"minutes must be above 0, not {minutes:g}")
    opened = time.monotonic()
    source = None if isinstance(small, nn.Module) else _factorized(open_checkpoint(small))
    if source is None and output is not None:
        raise UsageError("a live model is trained in place: no output; lrconvert.save writes it")
    if source is not None:
        if output is None:
            raise UsageError("distilling a checkpoint needs an output path")
        check_output(Path(output), source, overwrite)
    student = small if isinstance(small, nn.Module) else load(small, model, model_args=model_args).float()
    # Writing will take about as long as reading did.
    writing = 0.0 if source is None else time.monotonic() - opened
    dense = teacher if isinstance(teacher, nn.Module) else _teacher(teacher, source, model, model_args)
    if source is not None:
        check_written(trainable(student), source.tensors, source.path)
    if dense is student:
        raise UsageError("the network cannot be its own teacher: give the dense one, a copy from before factorizing")
    notes: tuple[str, ...] = ()
    if isinstance(data, str):
        network = _network(small, teacher, model, model_args)
        samples = read_samples(data, network, count=examples, batch_size=batch_size, seed=seed)
        calls, notes = samples.calls, samples.notes
    else:
        calls = tuple(data)
    folders = [Path(each) for each in (small, teacher) if not isinstance(each, nn.Module)]
    head = next((found for found in map(sentence_head, folders) if found), None)
    done = imitate(
        student,
        dense,
        calls,
        deadline=began + 60 * (minutes or _MINUTES) - writing if epochs is None else None,
        epochs=epochs,
        lr=lr,
        head=head,
        seed=seed,
        device=where,
        progress=progress,
    )
    if source is not None:
        same = [moving(key, ref, key) for key, ref in source.tensors.items()]
        steps = overruled(same, trainable(student))
        write_checkpoint(Path(str(output)), steps, source.header, source, overwrite=overwrite, device=where)
    return DistillRecord(
        source=_name(small),
        teacher=_name(teacher),
        data=data if isinstance(data, str) else f"{len(calls)} calls",
        output=str(output) if output else None,
        num_params=sum(parameter.numel() for parameter in student.parameters()),
        trained_params=sum(parameter.numel() for parameter in trainable(student).values()),
        compared="sentence embeddings" if head else "outputs",
        blocks=done.blocks,
        examples=done.examples,
        held_out=done.held_out,
        steps=done.steps,
        epochs=done.epochs,
        seconds=time.monotonic() - began,
        error_before=done.error_before,
        error_after=done.error_after,
        stopped_early=done.stopped_early,
        device=str(where),
        notes=notes,
    )


def _factorized(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, if it has factors that can be trained."""
    if checkpoint.graph is not None:
        raise ModelError(f"{checkpoint.path} is a graph: distill the checkpoint first, and export it then")
    if checkpoint.header is None or checkpoint.header.plan is None or not checkpoint.header.plan.low_rank:
        raise UsageError(f"{checkpoint.path} has no factors to train: write it with lrconvert factorize")
    return checkpoint


def _teacher(
    path: str | Path, source: Checkpoint | None, model: str | None, model_args: Mapping[str, Any] | None
) -> nn.Module:
    """The dense network in a file, which need not name its architecture if the factorized one does."""
    checkpoint = open_checkpoint(path)
    header = source.header if source is not None else None
    if model is None and checkpoint.format != "folder" and header and header.model and ".py:" not in header.model:
        model, model_args = header.model, header.model_args
    return load(checkpoint, model, model_args=model_args).float()


def _network(
    small: str | Path | nn.Module,
    teacher: str | Path | nn.Module,
    model: str | None,
    model_args: Mapping[str, Any] | None,
) -> Network:
    """What the examples are read for: a checkpoint if there is one, for it may have a tokenizer beside it."""
    for source in (small, teacher):
        if not isinstance(source, nn.Module):
            return open_network(source, model, model_args)
    return open_network(small)


def _name(source: str | Path | nn.Module) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)
