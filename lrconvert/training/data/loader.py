"""`Loader`: the batches of an epoch, the same whatever the processes, and from any step on."""

from collections.abc import Iterator

import torch

from lrconvert.errors import UsageError
from lrconvert.training.data.draws import Draws
from lrconvert.training.data.source import Batch, Source


class Loader:
    """Cuts a source into batches, and each batch into the micro-batches of processes and accumulation steps.

    Step s of an epoch takes places s·B … (s+1)·B of the epoch's permutation, and micro-batch a of process r takes
    b = B / (world · accumulate) of them from (a · world + r) · b on. So the global batch, and with it what happens to
    each of its images, does not depend on how it is divided.

    Args:
        source: the samples.
        batch_size: B, images an optimizer step takes, over all processes and accumulation steps.
        seed: of order and augmentation.
        rank: r, of this process.
        world: number of processes.
        accumulate: micro-batches whose gradients each process adds up for a step.
        workers: processes that decode and augment; see `Source.reader`.
        pin_memory: see `Source.reader`.

    Raises:
        UsageError: the batch cannot be divided evenly.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._parts = world * accumulate
        if batch_size < 1 or batch_size % self._parts:
            works = max(1, round(batch_size / self._parts)) * self._parts
            raise UsageError(
                f"batch size {batch_size} cannot be divided among {world} processes × {accumulate} accumulation steps: "
                f"take {works}"
            )
        self.source = source
        self.batch_size = batch_size
        self.micro_batch_size = batch_size // self._parts
        self.seed = seed
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self._read = source.reader(workers, pin_memory)

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch; the images left over by the last whole batch wait for another epoch's order.

        Raises:
            UsageError: there are fewer images than a batch takes.
        """
        n = len(self.source)
        if n < self.batch_size:
            largest = n - n % self._parts
            fix = f"take at most {largest}" if largest else f"each of {self._parts} micro-batches needs an image"
            raise UsageError(f"batch size {self.batch_size} is more than the {n} images to train on: {fix}")
        return n // self.batch_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's shuffled, augmented micro-batches, `accumulate` of them a step.

        Args:
            epoch: from 0; each has its own order and draws.
            first_step: steps that are passed over, without reading their images.

        Raises:
            UsageError: there are fewer images than a batch takes.
        """
        draws = Draws(self.seed, epoch)
        order = draws.permutation(len(self.source))[: self.steps * self.batch_size]
        cut = order.view(-1, self.accumulate, self.world, self.micro_batch_size)
        return self._read(cut[first_step:, :, self.rank].flatten(0, 1).unbind(), draws)

    def once(self) -> Iterator[Batch]:
        """Every sample exactly once over all processes, in order and not augmented, in batches of micro-batch size.

        Process r takes the r-th of `world` stretches, whose lengths differ by one at most. So the number of batches,
        the last of which may be smaller, can differ by one too: reduce sums at the end, not in each batch.
        """
        own = torch.arange(len(self.source)).tensor_split(self.world)[self.rank]
        return self._read(own.split(self.micro_batch_size) if len(own) else (), None)
