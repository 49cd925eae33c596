"""The collectives that gradients pass through, and the bytes that this process hands to them."""

from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

# torch.distributed.GradBucket, which is hidden from type checkers there.
from torch._C._distributed_c10d import GradBucket as GradBucket
from torch.futures import Future


class Collectives:
    """Averaging and gathering over a process group, counted.

    What is counted is payload: the bytes of the tensors that this process passes in. The bytes on the wire depend on
    the algorithm that the backend chooses and on the number of processes (a ring all-reduce sends about twice the
    payload; an all-gather receives one payload from every other process).

    Args:
        group: the processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.bytes_sent = 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.group.size()

    def average(self, tensor: Tensor) -> Future[Tensor]:
        """Replace `tensor` by its mean over all processes; the future holds it."""
        self.bytes_sent += tensor.nbytes
        # Divided before it is summed: float16 would overflow.
        work = dist.all_reduce(tensor.div_(self.size), group=self.group, async_op=True)
        return work.get_future().then(lambda _: tensor)

    def gather(self, tensor: Tensor) -> Future[Tensor]:
        """The `tensor` (n,) of every process as rows (processes, n), in a future."""
        self.bytes_sent += tensor.nbytes
        rows = tensor.new_empty(self.size * tensor.numel())
        work = dist.all_gather_into_tensor(rows, tensor, group=self.group, async_op=True)
        assert work is not None  # this process is in the group
        return work.get_future().then(lambda _: rows.view(self.size, -1))


class Compressor(Protocol):
    """A way to bring the gradients of all processes together."""

    collectives: Collectives

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Put the gradient to use into the buffer of `bucket`; the future holds that buffer."""

    def state_dict(self) -> dict[str, Any]:
        """What this process must keep to go on with the next step as if never interrupted."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
