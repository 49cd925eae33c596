"""Signum with majority vote: one bit for each element of the gradient.

Source: Bernstein et al. 2018, https://arxiv.org/abs/1802.04434, algorithm 2 (the signs of each worker's momentum, and
the majority of them), as Pufferfish's baseline runs it (section 4.3): all-gather, for bits cannot be summed.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.futures import Future

from lrconvert.training.collectives import Collectives, GradBucket

MOMENTUM = 0.9


class MajorityVote:
    """Puts the majority's sign, +1 or −1, or 0 at a tie, in the place of every element of the gradient.

    Each process keeps a momentum m ← 0.9·m + 0.1·g of its own gradient and votes with its signs; 0 votes +1, as one bit
    knows no third value. With `torch.optim.SGD` of momentum 0 on top, the step is the paper's
    p ← p − lr·(vote + weight_decay·p); a learning rate is the size of that step and so far smaller than SGD's. One
    process alone takes `lrconvert.training.optimizers.Signum`, which steps as this does there.

    Gradients have lost their size: neither clip them nor scale the loss (float16), which only divides them again.

    Args:
        parameters: what gets gradients, by name.
        collectives: of all processes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], collectives: Collectives) -> None:
        self.collectives = collectives
        # By name, not by bucket: buckets change after the first step of every start.
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._momenta = {name: parameter.new_zeros(parameter.shape) for name, parameter in parameters.items()}

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Vote on the gradients of `bucket`."""
        momenta = [self._momenta[self._names[parameter]] for parameter in bucket.parameters()]
        for momentum, gradient in zip(momenta, bucket.gradients(), strict=True):
            momentum.lerp_(gradient, 1 - MOMENTUM)
        buffer = bucket.buffer()
        ballots = self.collectives.gather(pack_signs(torch.cat([momentum.flatten() for momentum in momenta])))
        return ballots.then(lambda done: buffer.copy_(majority(done.value(), buffer.numel())))

    def state_dict(self) -> dict[str, Any]:
        """This process's momenta, by parameter name."""
        return {"momenta": {name: momentum.clone() for name, momentum in self._momenta.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, momentum in self._momenta.items():
            momentum.copy_(state["momenta"][name])


def signs(momentum: Tensor) -> Tensor:
    """+1 where `momentum` is at least 0, else −1, in its shape and dtype."""
    return (momentum >= 0).to(momentum.dtype).mul_(2).sub_(1)


def pack_signs(momentum: Tensor) -> Tensor:
    """The signs of `momentum` (n,) as bits, the first in the lowest bit of the first byte: (⌈n/8⌉,) uint8."""
    bits = F.pad((momentum >= 0).to(torch.uint8), (0, -len(momentum) % 8))
    return (bits.view(-1, 8) << _places(bits)).sum(1, dtype=torch.uint8)


def majority(ballots: Tensor, count: int) -> Tensor:
    """The sign, −1, 0 or +1, that most rows of packed signs give each element: (voters, ⌈n/8⌉) to (n,) int32.

    Args:
        ballots: a row of `pack_signs` from each process.
        count: n; the bits after it are padding.
    """
    # A row at a time: unpacked, all of them would take as much memory as many gradients.
    ayes = torch.zeros(ballots.shape[1] * 8, dtype=torch.int32, device=ballots.device)
    for row in ballots:
        ayes += (row.unsqueeze(1) >> _places(row)).bitwise_and_(1).flatten()
    return ayes[:count].mul_(2).sub_(len(ballots)).sign_()


def _places(like: Tensor) -> Tensor:
    """How far to shift for each of the eight bits of a byte."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)
