"""What a dense network computes for each of a list of calls, computed once as far as memory allows."""

from collections.abc import Sequence

import torch

from lrconvert.inputs import Call
from lrconvert.training.matching import Seen, Watched


class Teacher:
    """The dense network's answers.

    Args:
        network: the dense network, in eval mode.
        calls: what it is asked.
        device: where it is.
        memory: bytes of answers to keep, on the CPU; what does not fit is computed whenever it is asked for.
    """

    def __init__(self, network: Watched, calls: Sequence[Call], device: torch.device, memory: int) -> None:
        self.network, self.calls, self.device = network, calls, device
        self._left = memory
        self._kept: dict[int, Seen] = {}

    def __call__(self, number: int) -> Seen:
        """What the network computes for the call of this number, on its device and without gradients."""
        if number in self._kept:
            return self._kept[number].to(self.device)
        with torch.no_grad():
            seen = self.network(self.calls[number])
        nbytes = sum(tensor.nbytes for tensor in seen.tensors)
        if nbytes <= self._left:
            self._left -= nbytes
            self._kept[number] = seen.to(torch.device("cpu"))
        return seen
