"""nn.MultiheadAttention: the packed projection's queries, keys and values, and the output projection.

The dense module reads its own weights instead of calling layers, so it is replaced as a whole. With one input width the
three projections are one packed weight (3·embed, embed), of which each third is factorized on its own; with other
widths for keys and values there are three weights.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.layers.composite import LowRankComposite
from lrconvert.layers.layer import factor_name
from lrconvert.layers.linear import LowRankLinear
from lrconvert.layers.lowrank import Factored, where
from lrconvert.layers.pivoted import PivotedLinear

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class LowRankAttention(LowRankComposite):
    """Takes the place of an nn.MultiheadAttention, with its forward signature and results.

    Torch's fused encoder path does not run: it needs the weights multiplied out. Scaled dot-product attention does.
    """

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        assert isinstance(dense, nn.MultiheadAttention)
        out_proj, place = dense.out_proj, where(dense.out_proj.weight)
        if "out_proj.weight" in wanted:
            self.out_proj: nn.Module = LowRankLinear(out_proj, {"weight": wanted["out_proj.weight"]})
        else:
            bias = out_proj.bias is not None
            self.out_proj = nn.utils.skip_init(nn.Linear, out_proj.in_features, out_proj.out_features, bias, **place)
        self.embed_dim, self.num_heads, self.head_dim = dense.embed_dim, dense.num_heads, dense.head_dim
        self.batch_first, self.dropout, self.add_zero_attn = dense.batch_first, dense.dropout, dense.add_zero_attn

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What nn.MultiheadAttention returns: the output, and the attention weights if they are needed.

        Shapes are those of torch.nn.MultiheadAttention, with or without a batch.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given as well")
        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        elif not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        if self.bias_k is not None:
            k, v = (torch.cat([x, extra.expand(len(x), 1, -1)], 1) for x, extra in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:
            mask = functional.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        # In memory time comes first, as the dense module leaves it: a dropout that follows then draws the same mask.
        out: Tensor = self.out_proj(heads.permute(2, 0, 1, 3).flatten(2))
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, length, embed)."""
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        if not self._qkv_same_embed_dim:
            projected = []
            for name, x, bias in zip(SEPARATE, inputs, biases, strict=True):
                if name not in self.factored:
                    projected.append(functional.linear(x, getattr(self, name), bias))
                    continue
                factors = getattr(self, factor_name(name))
                projected.append(functional.linear(factors.u(x), factors.v.weight, bias))
            return projected[0], projected[1], projected[2]
        if "in_proj_weight" not in self.factored:
            weights = self.in_proj_weight.chunk(3)
            q, k, v = (functional.linear(*each) for each in zip(inputs, weights, biases, strict=True))
            return q, k, v
        u, v_weight = self.in_proj.u, self.in_proj.v.weight
        own = self.factored["in_proj_weight"].groups == 3
        if isinstance(u, PivotedLinear):
            narrow = [u.part(x, part if own else 0) for part, x in enumerate(inputs)]
        else:
            first = u.weight.chunk(3) if own else (u.weight,) * 3
            narrow = [functional.linear(*each) for each in zip(inputs, first, strict=True)]
        q, k, v = (functional.linear(*each) for each in zip(narrow, v_weight.chunk(3), biases, strict=True))
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores (batch or 1, heads or 1, query or 1, key), or None."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q)
            # Two dimensions: one mask for all; three: (batch·heads, query, key).
            total = total.expand(1, 1, -1, -1) if total.dim() == 2 else total.unflatten(0, (len(q), self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None, :]
            total = padding if total is None else total + padding
        return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: a True in a boolean mask forbids, as in nn.MultiheadAttention."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
    return mask.to(like.dtype)
