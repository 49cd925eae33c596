"""Compressing the gradients of data-parallel training, and counting the bytes that they take.

Pufferfish (sections 1 and 4.3) sends less because its network is smaller; PowerSGD and Signum, its baselines, send
less because they compress the gradients of a large one. Both are counted here in the same way.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.training.collectives import Collectives, Compressor, GradBucket
from lrconvert.training.powersgd import PowerSGD
from lrconvert.training.signum import MajorityVote

Method = Literal["none", "powersgd", "signum"]


class Traffic:
    """The bytes that one process hands to collectives for its gradients, and the state of their compression.

    Bytes are payload (see `Collectives`). Only gradients are counted: neither buffers, as BatchNorm's, that
    DistributedDataParallel broadcasts, nor the statistics of SyncBatchNorm.

    Attributes:
        steps: backward passes that ended in communication; those under `no_sync` did not.
        bytes_dense: what plain all-reduce would have been handed in these steps.
    """

    def __init__(self, settings: dict[str, Any], compressor: Compressor) -> None:
        self.steps = 0
        self.bytes_dense = 0
        self._settings = settings
        self._compressor = compressor

    @property
    def bytes_sent(self) -> int:
        """What was handed to collectives."""
        return self._compressor.collectives.bytes_sent

    @property
    def bytes_per_step(self) -> float:
        """Mean of `bytes_sent` over all steps; 0 before the first."""
        return self.bytes_sent / max(self.steps, 1)

    def state_dict(self) -> dict[str, Any]:
        """Counts and the state of the compression: numbers, strings and tensors, as copies.

        Every process has its own error feedback or momentum, so every process must save its own. With it a run on
        CPUs goes on to the last bit, as far as the sums of all-reduce do: those of two processes do not depend on the
        order, and with more DistributedDataParallel's first step after a start may add in another order.
        """
        return {
            "settings": self._settings,
            "steps": self.steps,
            "bytes_sent": self.bytes_sent,
            "bytes_dense": self.bytes_dense,
            "compressor": self._compressor.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` of the same process gave, for a model of the same parameters.

        Raises:
            UsageError: the gradients were compressed in another way.
        """
        if state["settings"] != self._settings:
            raise UsageError(
                f"the checkpoint's gradients were compressed by {_describe(state['settings'])}, this run asks for "
                f"{_describe(self._settings)}: resume with the checkpoint's settings"
            )
        self.steps = state["steps"]
        self.bytes_dense = state["bytes_dense"]
        self._compressor.collectives.bytes_sent = state["bytes_sent"]
        self._compressor.load_state_dict(state["compressor"])


def compress(
    model: DistributedDataParallel, method: Method, *, rank: int = 2, start_step: int = 0, seed: int = 0
) -> Traffic:
    """Send the gradients of `model` by `method` from now on.

    It registers the model's communication hook, of which torch allows one: a model that is wrapped anew, as after
    the switch to low rank, takes another, with its own `Traffic`.

    Args:
        model: wrapped, its parameters on their device. Any backend that can all-reduce and all-gather will do.
        method: "none" averages gradients as they are. "powersgd" averages them at low rank (see `PowerSGD`). "signum"
            has the processes vote on the sign of every element (see `MajorityVote`, also for the optimizer it needs).
        rank: of PowerSGD's matrices. Pufferfish takes 2, and 4 beside its own low-rank networks.
        start_step: PowerSGD's steps of plain averaging before it compresses.
        seed: of PowerSGD's first guess; the same in all processes.

    Raises:
        UsageError: `method` is unknown, or a number is out of range.
    """
    if method not in get_args(Method):
        raise UnknownNameError("gradient compression", method, get_args(Method))
    if rank < 1:
        raise UsageError(f"PowerSGD's rank must be at least 1, not {rank}")
    if start_step < 0:
        raise UsageError(f"PowerSGD cannot start at step {start_step}: give 0 or more")
    collectives = Collectives(model.process_group)
    parameters = {name: each for name, each in model.module.named_parameters() if each.requires_grad}
    settings: dict[str, Any] = {"method": method}
    compressor: Compressor
    if method == "powersgd":
        settings |= {"rank": rank, "start_step": start_step}
        compressor = PowerSGD(parameters, collectives, rank, start_step, seed)
    elif method == "signum":
        compressor = MajorityVote(parameters, collectives)
    else:
        compressor = _Plain(collectives)
    traffic = Traffic(settings, compressor)
    model.register_comm_hook(traffic, _hook)
    return traffic


class _Plain:
    """Averages gradients as they are, as DistributedDataParallel does without a hook."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        return self.collectives.average(bucket.buffer())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


# DistributedDataParallel checks the names and annotations of a hook's arguments.
def _hook(traffic: Traffic, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    traffic.bytes_dense += bucket.buffer().nbytes
    traffic.steps += bucket.is_last()
    return traffic._compressor.reduce(bucket)


def _describe(settings: dict[str, Any]) -> str:
    """ "powersgd (rank 2, start_step 0)"."""
    details = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "method")
    return f"{settings['method']} ({details})" if details else settings["method"]
