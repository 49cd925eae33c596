"""Loss and accuracy of a model on a split, over all processes."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lrconvert.recipe import Recipe
from lrconvert.training.data import Loader, Source


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
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for images, labels in loader.once():
        labels = labels.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = model(placed(images, recipe, accelerator))
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        hits = (logits.argmax(1) == labels).sum()
        sums += torch.stack((loss.double(), hits.double(), torch.full_like(loss, len(labels)).double()))
    loss, correct, count = accelerator.reduce(sums, "sum").tolist()
    return loss / count, correct / count
