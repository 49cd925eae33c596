"""The processes of a run and their devices: what accelerate does for us, and the random numbers of each step."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from lrconvert.errors import UsageError
from lrconvert.recipe import Recipe
from lrconvert.training.schedules.agreement import alone, decided_by_first

Made = TypeVar("Made")


@contextlib.contextmanager
def accelerated(recipe: Recipe) -> Iterator[Accelerator]:
    """An accelerator as `recipe` wants it, while the context lasts.

    At the end a process group that it opened is closed, and the caller's random generators are as they were.

    Raises:
        UsageError: the device or the precision is not to be had here.
    """
    kind, colon, index = recipe.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not index.isdecimal())):
        raise UsageError(f"device: '{recipe.device}' is not auto, cpu, cuda or cuda:N")
    on_gpu = kind != "cpu" and torch.cuda.is_available()
    if kind == "cuda" and (not on_gpu or (index and int(index) >= torch.cuda.device_count())):
        raise UsageError(f"device: '{recipe.device}', but this machine has {torch.cuda.device_count()} CUDA device(s)")
    if recipe.amp == "fp16" and not on_gpu:
        raise UsageError("amp: fp16 needs a GPU; use amp=bf16 or amp=no here")
    if recipe.sync_bn and not on_gpu:
        raise UsageError("sync_bn: torch's SyncBatchNorm needs GPUs; leave it out here")
    if index:
        torch.cuda.set_device(int(index))
    opened_before = torch.distributed.is_available() and torch.distributed.is_initialized()
    # accelerate keeps its settings for the life of a process; a run has its own.
    AcceleratorState._reset_state(reset_partial_state=not opened_before)
    GradientState._reset_state()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        accelerator = Accelerator(cpu=not on_gpu, mixed_precision=recipe.amp)
        try:
            yield accelerator
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            accelerator.free_memory()
            if not opened_before:
                accelerator.end_training()  # else a process may abort at exit
            AcceleratorState._reset_state(reset_partial_state=not opened_before)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed every generator for one step.

    All that is random in a step (dropout, mixed images) then depends on nothing but these numbers, and a run that
    goes on in the middle of an epoch needs no saved generators to repeat what it would have done.
    """
    mixed = int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def gathered(mine: Any) -> list[Any]:
    """Every process's `mine`, in the first process; elsewhere a list of nothing."""
    if alone():
        return [mine]
    mine = _on_cpu(mine)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(mine, everyone if torch.distributed.get_rank() == 0 else None)
    return everyone


def _on_cpu(value: Any) -> Any:
    """`value` with its tensors on the CPU: what is sent to another process would land on this one's GPU there."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    return [_on_cpu(each) for each in value] if isinstance(value, list) else value


def first_then_others(make: Callable[[], Made]) -> Made:
    """What `make` returns here, after it has returned in the first process; if it fails there, it fails everywhere."""
    if alone():
        return make()
    mine: list[Made] = []
    decided_by_first(lambda: mine.append(make()))
    return mine[0] if mine else make()
