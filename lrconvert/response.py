"""What calibration knows of one weight, and the factors that follow: least error of the output, not of the weight.

With the covariance C = E[x xᵀ] of a weight's inputs and G = E[g gᵀ] of the gradients that reach its outputs, an error
E of the weight changes what the network returns by about tr(G E C Eᵀ) = ‖G^½ E C^½‖². The best weight of rank r is the
truncated SVD of G^½ W C^½ with both roots taken back. (DRONE, Chen et al. 2021, and SVD-LLM, Wang et al. 2024,
https://arxiv.org/abs/2403.07378, have C alone: G = I.)

Only the smaller side of W needs a root. Where that is the rows, the left singular vectors U of A = G^½ W C^½ are the
eigenvectors of A·Aᵀ = G^½ (W C Wᵀ) G^½, and the best weight is G^{-½} U Uᵀ G^½ W: of C it takes no more than W C Wᵀ,
the covariance of the outputs, so nothing is lost where C has no inverse. For columns G and C change places. Two
matrices of the smaller side's size therefore say all: its `metric`, and the `signal` that the other side sends to it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lrconvert.errors import WeightError
from lrconvert.spectrum import Spectrum, eigenvectors

Side = Literal["rows", "columns"]

# Smallest eigenvalue of a metric, as a share of their mean: what calibration never saw is not blown up by the inverse.
_CLAMP = 1e-5


@dataclass(frozen=True)
class Response:
    """Second moments on the smaller side of a weight's matrix view, s = full rank long; float64, on the CPU.

    Attributes:
        name: the layer, for messages.
        side: which side is the smaller one.
        metric: (groups, s, s), G for rows and C for columns; None for the identity.
        signal: (groups, s, s), W C Wᵀ for rows and Wᵀ G W for columns.
        mean: (groups, s), E[W x] for rows and E[x] for columns.
    """

    name: str
    side: Side
    metric: Tensor | None
    signal: Tensor
    mean: Tensor

    @cached_property
    def spectrum(self) -> Spectrum:
        """Singular values of G^½ W C^½; the square of each is what dropping it costs in the output.

        Raises:
            WeightError: a moment is not finite.
        """
        # What each eigenvector sees of the signal is its eigenvalue.
        values = (self._basis * (self._seen @ self._basis)).sum(dim=1).clamp(min=0).sqrt()
        values = values.sort(dim=1, descending=True).values
        return Spectrum(values, (values**2).sum(dim=1))

    def factors(self, matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The two factors of the best weight of `rank`, and what its error takes from the mean output.

        Args:
            matrices: (groups, rows, columns), any floating dtype.
            rank: kept in each group.

        Returns:
            u (groups, rank, columns) and v (groups, rows, rank), in the dtype of `matrices`: row i of u and column i
            of v have one norm, and at full rank v·u is the weight itself. E[(W − v·u) x] (groups, rows), float64:
            adding it to the bias leaves the mean output as it was.

        Raises:
            WeightError: a moment is not finite, or the factors overflow the dtype.
        """
        root, inverse = self._roots
        basis = self._basis[:, :, :rank]
        wide = matrices.cpu().double() if self.side == "rows" else matrices.cpu().double().mT
        mean = self.mean[:, :, None]
        short, long = inverse @ basis, (basis.mT @ root) @ wide
        if self.side == "rows":
            shift = mean - short @ (basis.mT @ (root @ mean))
        else:
            shift = wide.mT @ (mean - root @ (basis @ (short.mT @ mean)))
        norms = torch.linalg.vector_norm(short, dim=1), torch.linalg.vector_norm(long, dim=2)
        # A direction that the weight does not have may take any scale: never divide by zero.
        balance = torch.where(norms[1] > 0, norms[1] / norms[0], 1.0).sqrt()
        short, long = short * balance[:, None, :], long / balance[:, :, None]
        u, v = (long, short) if self.side == "rows" else (short.mT, long.mT)
        u, v = (factor.to(matrices.device, matrices.dtype).contiguous() for factor in (u, v))
        if not bool(torch.isfinite(u).all() & torch.isfinite(v).all()):
            raise WeightError(
                f"{self.name}: the factors overflow {matrices.dtype}; convert the checkpoint to float32 first"
            )
        return u, v, shift.squeeze(2)

    @cached_property
    def _seen(self) -> Tensor:
        """root·signal·root, symmetric to the last bit."""
        root, _ = self._roots
        product = root @ self.signal @ root
        return (product + product.mT) / 2

    @cached_property
    def _basis(self) -> Tensor:
        """The left (of columns: right) singular vectors of G^½ W C^½, (groups, s, s), the largest first."""
        return eigenvectors(self._seen).flip(2)

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """M^½ and M^{-½} of the metric, (groups, s, s) each."""
        for moment in (self.signal, self.metric):
            if moment is not None and not bool(torch.isfinite(moment).all()):
                raise WeightError(
                    f"{self.name}: calibration met values that are NaN or infinite; look for them in the examples, or "
                    f"leave the layer out with --exclude '{self.name}'"
                )
        if self.metric is None:
            identity = torch.eye(self.signal.shape[1], dtype=torch.float64).expand_as(self.signal)
            return identity, identity
        values, vectors = torch.linalg.eigh(self.metric)
        mean = values.mean(dim=1, keepdim=True)
        # Where nothing ever arrived all directions are alike.
        roots = torch.where(mean > 0, values.clamp(min=_CLAMP * mean), 1.0).sqrt()[:, None, :]
        return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
