"""Whole models timed beside each other, in inference, on the user's device, input size and batch.

They take turns, and the fastest turn of each counts: whatever else a machine does only ever adds to a time.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lrconvert import rewrite
from lrconvert.inputs import Inputs, examples
from lrconvert.plan import Plan
from lrconvert.surgery import reshape
from lrconvert.timer import times_in_turns

MOST_TURNS, FEWEST_TURNS = 20, 3


@dataclass(frozen=True)
class Bench:
    """What latency is measured on.

    Attributes:
        inputs: what the model is called with.
        batch_size: examples in a call.
        device: where it runs.
        channels_last: whether images and convolutions are channels_last.
    """

    inputs: Inputs
    batch_size: int = 1
    device: torch.device = rewrite.CPU
    channels_last: bool = False

    def __str__(self) -> str:
        on_cpu = self.device.type == "cpu"
        where = f"CPU, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(self.device)
        return f"{where}, batch {self.batch_size}" + (", channels_last" if self.channels_last else "")

    def place(self, model: nn.Module) -> nn.Module:
        """A copy of `model` that is ready to be timed; `model` is left as it is."""
        placed = copy.deepcopy(model).eval().requires_grad_(False).to(self.device)
        return placed.to(memory_format=torch.channels_last) if self.channels_last else placed

    def measure(self, models: Sequence[nn.Module], seconds: float = 10.0) -> list[float]:
        """Milliseconds of one call of each of `models`, the fastest of those they made in turns.

        Args:
            models: placed, see `place` and `factorized`.
            seconds: no further turn is begun after these, if there were three.
        """
        dtype = next(models[0].parameters()).dtype
        arguments, named = examples(self.inputs, self.batch_size, dtype, str(self.device))
        if self.channels_last:
            arguments = tuple(
                tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
                for tensor in arguments
            )
        with torch.inference_mode():
            calls = [lambda model=model: model(*arguments, **named) for model in models]
            times = times_in_turns(calls, MOST_TURNS, self.device, seconds, FEWEST_TURNS)
        return [min(taken) for taken in times]


def factorized(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` at the ranks of `plan`, for timing: its factors are random, all else is shared with `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    low_rank = reshape(copy.deepcopy(model, memo=dict(shared)), plan).eval()
    random = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in (parameter for parameter in low_rank.parameters() if id(parameter) not in shared):
        # Outputs of the size of the inputs: a CPU is slow with numbers that are too small to be normal.
        nn.init.normal_(parameter, std=max(parameter[0].numel(), 1) ** -0.5, generator=random)
    return low_rank.requires_grad_(False)
