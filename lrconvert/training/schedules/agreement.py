"""One decision for all processes of a distributed run: made on rank 0, and sent to the others."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lrconvert.errors import LrconvertError

Answer = TypeVar("Answer")


def alone() -> bool:
    """Whether this is the only process of the run."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def is_first() -> bool:
    """Whether this process is the one that decides."""
    return alone() or distributed.get_rank() == 0


def decided_by_first(decide: Callable[[], Answer]) -> Answer:
    """What `decide` returns on rank 0, on every rank; it must be picklable, and is called nowhere else.

    An error on rank 0 is raised on all ranks, so that none waits for an answer that never comes.
    """
    if alone():
        return decide()
    message: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            message[0] = decide()
        except Exception as error:
            failure, message[1] = error, str(error)
    distributed.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise LrconvertError(f"rank 0: {message[1]}")
    answer: Answer = message[0]
    return answer


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give each of `tensors` the value that it has on rank 0, to the last bit."""
    if alone():
        return
    for tensor in tensors:
        # Backends send contiguous memory, which a channels_last weight is not.
        sent = tensor.detach().contiguous()
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)
