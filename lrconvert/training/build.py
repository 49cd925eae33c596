"""What a recipe names, built: the data set, the model, the teacher; and whether they go together."""

from typing import Any

import torch
from torch import nn

from lrconvert.checkpoints import open_checkpoint
from lrconvert.errors import LrconvertError, ModelError
from lrconvert.images import ImagePreparation
from lrconvert.layers.pivoted import refuse_to_train
from lrconvert.loading import load
from lrconvert.models import find_architecture
from lrconvert.modes import evaluating
from lrconvert.recipe import Recipe
from lrconvert.training.data import Augment, Dataset, open_dataset


def dataset_of(recipe: Recipe) -> Dataset:
    """The recipe's data set, read or downloaded; prepared as that which its checkpoint was trained on, if it says how.

    Raises:
        LrconvertError: it is not there; the message says how it should lie.
    """
    augment = Augment(
        crop_padding=recipe.crop_padding,
        hflip=recipe.hflip,
        scale=recipe.scale,
        ratio=recipe.ratio,
        aa=recipe.aa,
        reprob=recipe.reprob,
    )
    images = open_checkpoint(recipe.checkpoint).images if recipe.checkpoint is not None else ImagePreparation()
    return open_dataset(
        recipe.dataset,
        data_dir=recipe.data_dir,
        download=recipe.download,
        img_size=images.img_size if recipe.img_size is None else recipe.img_size,
        mean=images.mean if recipe.mean is None else recipe.mean,
        std=images.std if recipe.std is None else recipe.std,
        augment=augment,
        args=recipe.dataset_args,
        validation=recipe.validation,
    )


def architecture_of(recipe: Recipe) -> tuple[str | None, dict[str, Any]]:
    """Name and arguments of the recipe's architecture: its own, or those that its checkpoint names."""
    if recipe.model is not None:
        return recipe.model, recipe.model_args
    header = open_checkpoint(str(recipe.checkpoint)).header
    return (header.model, header.model_args) if header is not None else (None, {})


def model_of(recipe: Recipe) -> nn.Module:
    """The recipe's model with its initial weights, drawn by its seed or read from its checkpoint; on the CPU.

    Raises:
        ModelError: it cannot be built, or does not match the checkpoint.
        UsageError: factors of it are pivoted.
    """
    if recipe.checkpoint is not None:
        model = load(recipe.checkpoint, recipe.model, model_args=recipe.model_args or None).train()
        refuse_to_train(model)
        return model
    assert recipe.model is not None
    torch.manual_seed(recipe.seed)
    return find_architecture(recipe.model, recipe.model_args).build("cpu").train()


def teacher_of(recipe: Recipe) -> nn.Module | None:
    """The network whose outputs are imitated: what its file says that it is, else the student's architecture.

    Raises:
        ModelError: it is neither.
    """
    if recipe.teacher is None:
        return None
    header = open_checkpoint(recipe.teacher).header
    if header is not None and header.model is not None and ".py:" not in header.model:
        return load(recipe.teacher).requires_grad_(False)
    model, args = architecture_of(recipe)
    return load(recipe.teacher, model, model_args=args or None).requires_grad_(False)


@torch.no_grad()
def check_together(model: nn.Module, dataset: Dataset, what: str = "model") -> None:
    """Refuse a model that cannot take the images, or does not have an output for each class.

    Args:
        model: run once, in eval mode, on one black image; its mode is restored.
        dataset: what it is to be run on.
        what: the model's role, for the message.

    Raises:
        ModelError: they do not go together.
    """
    first = next(model.parameters())
    try:
        with evaluating(model):
            output = model(torch.zeros(1, *dataset.input_shape, device=first.device, dtype=first.dtype))
    except LrconvertError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = "×".join(map(str, dataset.input_shape))
        raise ModelError(f"the {what} cannot take the {size} images of {dataset.name}: {reason}") from error
    shape = tuple(getattr(output, "shape", ()))
    if shape != (1, dataset.num_classes):
        raise ModelError(
            f"the {what} returns {shape or type(output).__name__} for an image of {dataset.name}, which has "
            f"{dataset.num_classes} classes: it should be (1, {dataset.num_classes}); give model_args, or another model"
        )
