"""`train`, `finetune` and `evaluate`: the built-in trainer as three calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrconvert.checkpoints import open_checkpoint
from lrconvert.errors import UsageError
from lrconvert.loading import load
from lrconvert.network import open_network
from lrconvert.recipe import Recipe, load_recipe, make_recipe
from lrconvert.recipes import find_recipe
from lrconvert.report.record_training import EvaluateRecord, TrainRecord
from lrconvert.timer import latencies
from lrconvert.training.build import check_together, dataset_of
from lrconvert.training.evaluation import evaluate_model, placed, split_loader
from lrconvert.training.events import Listener
from lrconvert.training.processes import accelerated
from lrconvert.training.run import run

# Fine-tuning without a recipe: a short run that suits factors of a trained network.
_FINETUNE = {
    "epochs": 3,
    "batch_size": 128,
    "opt": "adamw",
    "lr": 5e-4,
    "sched": "cosine",
    "warmup_epochs": 0.2,
    "weight_decay": 1e-4,
    "clip_grad": 1.0,
}


def train(
    recipe: str | Path | Recipe | Mapping[str, Any],
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> TrainRecord:
    """Train a network, from full rank to low rank.

    Args:
        recipe: a YAML file, the name of a recipe that comes with lrconvert, a `Recipe`, or its fields.
        output: folder for weights, state, log and report; see `lrconvert.training.folder`.
        overrides: "key=value" texts that overrule the recipe.
        resume, overwrite, listener: see `lrconvert.training.run.run`.

    Raises:
        UsageError: the recipe makes no sense.
        LrconvertError: training cannot go on; the message says why and from where to resume.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(find_recipe(str(recipe)), overrides)
    elif isinstance(recipe, Recipe):
        recipe = make_recipe(recipe.model_dump(), overrides) if overrides else recipe
    else:
        recipe = make_recipe(recipe, overrides)
    return run(recipe, output, resume=resume, overwrite=overwrite, listener=listener)


def finetune(
    checkpoint: str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
    **fields: Any,
) -> TrainRecord:
    """Train a checkpoint, usually a factorized one, a little further.

    Args:
        checkpoint: a file that `load` reads, or a recipe (.yaml) that names one.
        output, overrides, resume, overwrite, listener: see `train`.
        fields: fields of the recipe: `dataset` is needed; `teacher`, the dense checkpoint, recovers most. Without
            more it is three epochs of AdamW.

    Raises:
        UsageError: the settings make no sense.
        LrconvertError: training cannot go on; the message says why.
    """
    if Path(checkpoint).suffix in (".yaml", ".yml"):
        if fields:
            raise UsageError(f"{', '.join(fields)}: a recipe says it all; overrule its fields with overrides")
        return train(checkpoint, output, overrides=overrides, resume=resume, overwrite=overwrite, listener=listener)
    open_checkpoint(checkpoint)
    recipe = make_recipe({**_FINETUNE, **fields, "checkpoint": str(checkpoint)}, overrides)
    return run(recipe, output, resume=resume, overwrite=overwrite, listener=listener)


def evaluate(
    checkpoint: str | Path,
    dataset: str,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    latency_runs: int = 20,
    **fields: Any,
) -> EvaluateRecord:
    """Accuracy of a checkpoint on the test images of a data set, and the latency of one batch.

    Args:
        checkpoint: dense or factorized.
        dataset: by name, see `lrconvert.training.data`.
        model, model_args: the architecture, where the file does not name it.
        overrides, fields: more fields of a recipe: `data_dir`, `batch_size`, `img_size`, `device`, `amp` …
        latency_runs: batches that are timed.

    Raises:
        UsageError: the settings make no sense.
        LrconvertError: the data is missing.
    """
    settings = {**_FINETUNE, **fields, "checkpoint": str(checkpoint), "dataset": dataset}
    settings |= {"model": model, "model_args": dict(model_args or {})}
    recipe = make_recipe(settings, overrides)
    network = open_network(checkpoint, recipe.model, recipe.model_args or None)
    images = dataset_of(recipe)
    with accelerated(recipe) as accelerator:
        found = load(checkpoint, recipe.model, model_args=recipe.model_args or None).to(accelerator.device)
        if recipe.channels_last:
            found = found.to(memory_format=torch.channels_last)
        check_together(found, images)
        source = images.test if images.test is not None else images.validation
        loader = split_loader(source, recipe, accelerator)
        loss, accuracy = evaluate_model(found, loader, recipe, accelerator)
        batch = placed(next(loader.once())[0], recipe, accelerator)

        def call() -> None:
            with torch.no_grad(), accelerator.autocast():
                found(batch)

        latency = latencies([call], latency_runs, device=accelerator.device)[0]
        return EvaluateRecord(
            source=str(checkpoint),
            model=network.architecture.name if network.architecture else None,
            dataset=images.name,
            split="test" if images.test is not None else "validation",
            images=len(source),
            num_params=sum(parameter.numel() for parameter in found.parameters()),
            macs=network.trace.macs if network.trace else None,
            loss=loss,
            accuracy=accuracy,
            latency_ms=latency.median_ms,
            latency_low_ms=latency.low_ms,
            latency_high_ms=latency.high_ms,
            latency_runs=latency.n,
            batch_size=len(batch),
            device=str(accelerator.device),
        )
