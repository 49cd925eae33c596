"""nn.Embedding: `u` is a narrow table entries×rank, `v` a linear layer features×rank without bias."""

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import skip_init

from lrconvert.layers.lowrank import Factored, LowRankLayer, where


class LowRankEmbedding(LowRankLayer):
    """Takes the place of an nn.Embedding; indices (…) to (…, embedding_dim)."""

    shown = ("num_embeddings", "embedding_dim", "padding_idx", "rank")

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        assert isinstance(dense, nn.Embedding)
        rank, place = wanted["weight"].rank, where(dense.weight)
        # Where the padding entry is zero in the dense table it is zero in `u`, and stays so when trained.
        gradient = {"scale_grad_by_freq": dense.scale_grad_by_freq, "sparse": dense.sparse}
        self.u = skip_init(nn.Embedding, dense.num_embeddings, rank, dense.padding_idx, **gradient, **place)
        self.v = skip_init(nn.Linear, rank, dense.embedding_dim, bias=False, **place)
