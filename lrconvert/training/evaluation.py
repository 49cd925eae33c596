"""Loss and accuracy of a model on a split, over all processes."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lrconvert.inputs import Call
from lrconvert.modes import evaluating
from lrconvert.recipe import Recipe
from lrconvert.training.data import Batch, Loader, Source


def split_loader(source: Source, recipe: Recipe, accelerator: Accelerator) -> Loader:
    """A loader of `source` for this process, with as many images at a time as the recipe trains on."""
    return Loader(
        source,
        batch_size=recipe.batch_size,
        accumulate=recipe.grad_accum_steps,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=recipe.workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def placed(images: Tensor, recipe: Recipe, accelerator: Accelerator) -> Tensor:
    """`images` on the device of the run, in its memory format."""
    images = images.to(accelerator.device, non_blocking=True)
    return images.contiguous(memory_format=torch.channels_last) if recipe.channels_last else images


@torch.no_grad()
def evaluate_model(model: nn.Module, loader: Loader, recipe: Recipe, accelerator: Accelerator) -> tuple[float, float]:
    """(mean cross entropy, accuracy) of `model` on what `loader` reads; each image counts once, whatever the processes.

    The model is left in eval mode.
    """
    model.eval()

    def call(images: Tensor) -> Tensor:
        with accelerator.autocast():
            logits: Tensor = model(placed(images, recipe, accelerator))
        return logits

    sums = _sums(call, loader.once(), accelerator.device)
    loss, correct, count = accelerator.reduce(sums, "sum").tolist()
    return loss / count, correct / count


@torch.no_grad()
def accuracy_of(model: nn.Module, source: Source, batch_size: int = 128) -> float:
    """The share of the images in `source` that `model` puts into their class; where it is, in this process alone.

    Args:
        model: run in eval mode; its mode is restored.
        source: labelled images, as `open_dataset` gives them.
        batch_size: images at a time.
    """

    def call(images: Tensor) -> Tensor:
        logits: Tensor = Call((images,), {}, len(images)).run(model)
        return logits

    with evaluating(model):
        sums = _sums(call, Loader(source, batch_size=batch_size, seed=0).once(), next(model.parameters()).device)
    _, correct, count = sums.tolist()
    return correct / count


def _sums(call: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device) -> Tensor:
    """(3,) float64 on `device`: cross entropy and right answers of `call`, and images, added up over `batches`."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in batches:
        labels = labels.to(device, non_blocking=True)
        logits = call(images)
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        hits = (logits.argmax(1) == labels).sum()
        sums += torch.stack((loss.double(), hits.double(), torch.full_like(loss, len(labels)).double()))
    return sums
