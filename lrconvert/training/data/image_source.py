"""A source that decodes and augments one image at a time, here or in worker processes."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lrconvert.errors import LrconvertError
from lrconvert.training.data.augment import Transform
from lrconvert.training.data.draws import Draws
from lrconvert.training.data.images import Images
from lrconvert.training.data.source import Batch, Reader

# The draws of an epoch, or None for evaluation, and the samples of one batch.
_Request = tuple[Draws | None, list[int]]


class ImageSource:
    """Images that are read one at a time, and transformed with torch's generator seeded for each.

    Args:
        images: what is read.
        training: transform of an image for training.
        evaluation: transform of an image for evaluation.
    """

    def __init__(self, images: Images, training: Transform, evaluation: Transform) -> None:
        self.images = images
        self.training = training
        self.evaluation = evaluation

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, request: _Request) -> Batch | LrconvertError:
        """One batch. An error is returned, since a DataLoader would bury its line in a worker's traceback."""
        draws, chosen = request
        transform = self.evaluation if draws is None else self.training
        # A dataset of the user's may draw numbers for evaluation too.
        seeds = Draws(0, 0) if draws is None else draws
        state = torch.get_rng_state()
        try:
            samples = []
            for index in chosen:
                # Only the CPU's generator: torch.manual_seed would reseed every GPU too.
                torch.default_generator.manual_seed(seeds.sample_seed(index))
                image, label = self.images[index]
                samples.append((transform(image), label))
            return _stack(samples)
        except LrconvertError as error:
            return error
        finally:
            torch.set_rng_state(state)

    def reader(self, workers: int, pin_memory: bool) -> Reader:
        """Reads in `workers` processes, which are kept from pass to pass; in this one for 0.

        A pass that is started ends the one before it.
        """
        return partial(self._read_here, pin_memory) if workers == 0 else _WorkerReader(self, workers, pin_memory)

    def _read_here(self, pin_memory: bool, batches: Sequence[Tensor], draws: Draws | None) -> Iterator[Batch]:
        for chosen in batches:
            images, labels = _raised(self.__getitems__((draws, chosen.tolist())))
            yield (images.pin_memory(), labels.pin_memory()) if pin_memory else (images, labels)


class _WorkerReader:
    """A DataLoader that is told before each pass which batches to read."""

    def __init__(self, source: ImageSource, workers: int, pin_memory: bool) -> None:
        self.requests = _Requests()
        self.loader: Any = DataLoader(
            source,  # type: ignore[arg-type]
            batch_sampler=self.requests,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            persistent_workers=True,
            # Its own, or starting a pass would advance the caller's generator.
            generator=torch.Generator(),
        )

    def __call__(self, batches: Sequence[Tensor], draws: Draws | None) -> Iterator[Batch]:
        self.requests.of_pass = [(draws, chosen.tolist()) for chosen in batches]
        return map(_raised, self.loader)


class _Requests:
    """The batch sampler: a DataLoader keeps the one it was made with, so this one is filled anew for each pass.

    It does not know its reader: in a cycle, the DataLoader would be collected late, maybe by a forked worker of
    another one, where its destructor fails.
    """

    def __init__(self) -> None:
        self.of_pass: list[_Request] = []

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.of_pass)


def _unchanged(batch: Batch | LrconvertError) -> Batch | LrconvertError:
    return batch


def _raised(batch: Batch | LrconvertError | list[Tensor]) -> Batch:
    """The batch, unless it is an error. Pinning turns the pair into a list."""
    if isinstance(batch, LrconvertError):
        raise batch
    images, labels = batch
    return images, labels


def _stack(samples: list[tuple[Tensor, int]]) -> Batch:
    images = [image for image, _ in samples]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise LrconvertError(f"images of one batch have shapes {shapes[0]} and {shapes[-1]}: set img_size")
    return torch.stack(images), torch.tensor([label for _, label in samples])
