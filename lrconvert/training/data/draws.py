"""Random draws that depend on nothing but seed, epoch and sample.

So workers, processes and the step at which a run was resumed cannot change them, and the caller's own generator is
neither read nor advanced.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The draws of one epoch.

    Attributes:
        seed: of the run.
        epoch: from 0.
    """

    seed: int
    epoch: int

    def permutation(self, n: int) -> Tensor:
        """The order (n,) in which this epoch visits `n` samples."""
        return torch.randperm(n, generator=self.generator("order"))

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh generator for values that are drawn for all samples of the epoch at once."""
        return torch.Generator().manual_seed(self._hash(purpose))

    def sample_seed(self, index: int) -> int:
        """A seed for everything that happens to sample `index` in this epoch."""
        return self._hash(index)

    def _hash(self, what: str | int) -> int:
        # Four bytes, since torch's generator on the CPU uses no more of its seed; hashed, since sums such as
        # seed + epoch would let run 1 repeat in epoch 0 what run 0 does in epoch 1.
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}/{what}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")
