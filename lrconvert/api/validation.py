"""Accuracy of a network, dense and factorized, on the labelled images that a dataset keeps for validation."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from lrconvert.errors import UsageError
from lrconvert.inputs import Call, shape_of
from lrconvert.loading import model_of
from lrconvert.modes import evaluating
from lrconvert.network import Network
from lrconvert.plan import Plan
from lrconvert.response import Response
from lrconvert.surgery import factorize_module
from lrconvert.training.data import DATASETS, Dataset, Loader, open_dataset
from lrconvert.training.evaluation import accuracy_of


def tried(dense: nn.Module, plan: Plan | None, device: torch.device, responses: Mapping[str, Response]) -> nn.Module:
    """A copy of `dense` on `device`, factorized by `plan` unless that is None; data-aware layers need `responses`."""
    model = copy.deepcopy(dense)
    if plan is not None and plan.low_rank:
        model = factorize_module(model, plan, device, responses=responses)
    return model.to(device)


@dataclass(frozen=True)
class Validation:
    """Labelled images to measure accuracy on.

    Attributes:
        name: of the dataset, see `lrconvert.training.data.open_dataset`.
        data_dir: where it lies.
        network: whose accuracy is measured; it says how images are to be prepared.
    """

    name: str
    data_dir: str | Path
    network: Network

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset, opened.

        Raises:
            LrconvertError: there is none, or it cannot be read.
        """
        shape = shape_of(self.network.inputs)
        any_size = self.name in DATASETS and DATASETS[self.name].size is not None
        known = shape[1] if any_size and shape is not None and len(shape) == 3 else None
        images = self.network.images
        size = known if images.img_size is None else images.img_size
        return open_dataset(self.name, data_dir=self.data_dir, img_size=size, mean=images.mean, std=images.std)

    def accuracy(self, model: nn.Module) -> float:
        """The share of the validation images that `model` puts into their class.

        Raises:
            UsageError: the model does not take these images, or has fewer classes.
        """
        self._check(model)
        return accuracy_of(model, self.dataset.validation)

    def _check(self, model: nn.Module) -> None:
        """Try one image."""
        images, _ = next(iter(Loader(self.dataset.validation, batch_size=1, seed=0).once()))
        try:
            with evaluating(model), torch.no_grad():
                logits = Call((images,), {}, len(images)).run(model)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.name}: the model cannot be called with images {tuple(images.shape[1:])}: {reason}"
            ) from error
        shape = tuple(getattr(logits, "shape", ()))
        if len(shape) != 2 or shape[1] < self.dataset.num_classes:
            raise UsageError(
                f"{self.name} has {self.dataset.num_classes} classes, and the model returns "
                f"{shape or type(logits).__name__} for one image: choose the dataset that it was trained on"
            )


def measuring(
    network: Network, name: str, data_dir: str | Path, device: torch.device, responses: Mapping[str, Response]
) -> Callable[[Plan | None], float]:
    """What says how accurate `network` is when a plan has factorized it, or dense, for None; see `Validation`.

    Raises:
        UsageError: the network is a graph.
        ModelError: nothing says what its architecture is.
    """
    if network.checkpoint is not None and network.checkpoint.graph is not None:
        raise UsageError(f"{network.name} is a graph, which cannot be evaluated: factorize the model it came from")
    dense, validation = model_of(network), Validation(name, data_dir, network)
    return lambda plan: validation.accuracy(tried(dense, plan, device, responses))
