"""PowerSGD: averaging gradients at low rank.

Source: Vogels et al. 2019, https://arxiv.org/abs/1905.13727, algorithms 1 and 2, with error feedback and warm start.

Torch has a hook of the same name. It keeps its state by bucket, and buckets change after the first step of every
start, so that a resumed run could not go on where it stopped; on gloo, with several buckets, it was seen to wait for
ever (torch 2.15). Here state is kept by parameter. The gradients and the bytes are those of torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future

from lrconvert.training.collectives import Collectives, GradBucket

# A matrix is compressed when that saves more than this many times, as in torch: less would not pay for the products.
_LEAST_SAVING = 2


class PowerSGD:
    """A gradient G (n, m) travels as P = G·Q (n, r) and Q = Gᵀ·P (m, r); what P·Qᵀ misses is added to the next G.

    Kernels and embeddings are matrices of their first dimension by the rest. Vectors, and matrices that P and Q would
    not make twice as small, are averaged as they are, together with all P of the bucket.

    Args:
        parameters: what gets gradients, by name.
        collectives: of all processes.
        rank: r, at most n and m.
        start_step: this many steps average everything as it is.
        seed: of the first Q; the same in all processes.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], collectives: Collectives, rank: int, start_step: int, seed: int
    ) -> None:
        self.collectives = collectives
        self._start_step = start_step
        self._step = 0
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._errors: dict[str, Tensor] = {}
        self._qs: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in parameters.items():
            if parameter.dim() < 2:
                continue
            rows, columns = parameter.flatten(1).shape
            r = min(rows, columns, rank)
            if (rows + columns) * r * _LEAST_SAVING < rows * columns:
                self._errors[name] = parameter.new_zeros(rows, columns)
                self._qs[name] = torch.randn(columns, r, generator=generator).to(parameter)

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Average the gradients of `bucket`, those of large matrices at low rank."""
        compressing = self._step >= self._start_step
        self._step += bucket.is_last()
        buffer = bucket.buffer()
        if not compressing:
            return self.collectives.average(buffer)
        gradients = {self._names[p]: g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        matrices = {name: g.view_as(self._errors[name]) for name, g in gradients.items() if name in self._errors}
        others = [g for name, g in gradients.items() if name not in matrices]
        ps = []
        for name, matrix in matrices.items():
            self._errors[name] += matrix
            ps.append(self._errors[name] @ _orthonormal(self._qs[name]))
        first = _flat(ps + others)
        averaged = self.collectives.average(first)
        if first.device.type == "cpu":
            # One bucket at a time: the collective that `finish` starts must come in the same order everywhere, and
            # must not wait on the threads that gloo runs callbacks on. CUDA's futures run callbacks at once.
            averaged.wait()

        def finish(_: Future[Tensor]) -> Tensor:
            pieces = first.split([part.numel() for part in ps + others])
            for gradient, piece in zip(others, pieces[len(ps) :], strict=True):
                gradient.copy_(piece.view_as(gradient))
            lefts = [_orthonormal(piece.view_as(p)) for p, piece in zip(ps, pieces, strict=False)]
            self._finish(matrices, lefts)
            return buffer

        return averaged.then(finish)

    def _finish(self, matrices: Mapping[str, Tensor], lefts: Sequence[Tensor]) -> None:
        """Given the orthonormal P of each matrix, average Q, write P·Qᵀ into the matrix, and keep what it misses."""
        if not matrices:
            return
        # _errors hold the whole gradient here, with what was missed before.
        second = _flat([self._errors[name].T @ left for name, left in zip(matrices, lefts, strict=True)])
        self.collectives.average(second).wait()
        pieces = second.split([self._qs[name].numel() for name in matrices])
        for (name, matrix), left, piece in zip(matrices.items(), lefts, pieces, strict=True):
            self._qs[name].copy_(piece.view_as(self._qs[name]))
            torch.mm(left, self._qs[name].T, out=matrix)
            self._errors[name] -= matrix

    def state_dict(self) -> dict[str, Any]:
        """The step, and each matrix's error (of this process) and Q, by parameter name."""
        return {"step": self._step, "errors": _copies(self._errors), "qs": _copies(self._qs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._step = state["step"]
        for mine, saved in ((self._errors, state["errors"]), (self._qs, state["qs"])):
            for name, tensor in mine.items():
                tensor.copy_(saved[name])


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis (n, r) whose span holds the columns of `matrix` (n, r)."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # there is no QR in half precision
    return torch.linalg.qr(wide).Q.to(matrix.dtype)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one vector, which one collective takes."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
