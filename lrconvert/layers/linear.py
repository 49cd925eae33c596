"""nn.Linear: `u` is rank×in, `v` is out×rank with the bias."""

from typing import Self

from torch import nn
from torch.nn.utils import skip_init

from lrconvert.layers.lowrank import LowRank


class LowRankLinear(LowRank):
    """Takes the place of an nn.Linear; (…, in_features) to (…, out_features)."""

    shown = ("in_features", "out_features", "rank")

    @classmethod
    def like(cls, dense: nn.Module, rank: int) -> Self:
        """Uninitialised factors of the nn.Linear `dense`."""
        assert isinstance(dense, nn.Linear)
        where = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        u = skip_init(nn.Linear, dense.in_features, rank, bias=False, **where)
        v = skip_init(nn.Linear, rank, dense.out_features, bias=dense.bias is not None, **where)
        return cls(u, v, tuple(dense.weight.shape))

    def dense(self) -> nn.Linear:
        """An uninitialised nn.Linear of the same shape."""
        where = {"device": self.u.weight.device, "dtype": self.u.weight.dtype}
        return skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **where)

    @property
    def kind(self) -> str:
        """Always "linear"."""
        return "linear"

    @property
    def in_features(self) -> int:
        """Input features, as nn.Linear names them."""
        return self.dense_shape[1]

    @property
    def out_features(self) -> int:
        """Output features, as nn.Linear names them."""
        return self.dense_shape[0]

    @property
    def rank(self) -> int:
        """Width between the factors."""
        return int(self.u.out_features)  # type: ignore[arg-type]
