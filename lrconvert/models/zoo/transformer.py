"""The translation Transformer of Pufferfish: six encoder and six decoder layers, one embedding for everything.

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, with the details of Pufferfish's tables 15 and 16: no
bias in query, key, value and output projections, ε = 1e-6 in LayerNorm, padding index 1. Its count, 48,978,432 with a
vocabulary of 9,521, has one LayerNorm more in each stack than the sublayers have, over the embedded tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-6


class Transformer(nn.Module):
    """Source tokens (batch, source) and target tokens (batch, target) to scores (batch, target, vocab_size).

    Source embedding, target embedding and output weight are one parameter.

    Args:
        vocab_size: words, of both languages together.
        dim: width of the stream.
        num_heads: heads of every attention.
        hidden: width inside the feed-forward networks.
        num_layers: layers of the encoder, and of the decoder.
        dropout: probability on embeddings, attention weights and every sublayer's output.
        padding: the token that is no word, which nothing attends to.

    Raises:
        ValueError: `dim` is odd or does not divide into `num_heads` heads.
    """

    def __init__(
        self,
        vocab_size: int = 9521,
        dim: int = 512,
        num_heads: int = 8,
        hidden: int = 2048,
        num_layers: int = 6,
        dropout: float = 0.1,
        padding: int = 1,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 2:
            raise ValueError(f"dim must be even and divide into {num_heads} heads; {dim} is not or does not")
        self.padding = padding
        self.encoder = Encoder(vocab_size, dim, num_heads, hidden, num_layers, dropout, padding)
        self.decoder = Decoder(vocab_size, dim, num_heads, hidden, num_layers, dropout, padding)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.decoder.embedding.weight = self.output.weight = self.encoder.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the token that follows each target token; no position sees a later one.

        Args:
            source: integers (batch, source), padded on the right.
            target: integers (batch, target), starting with the beginning-of-sentence token, padded on the right.
        """
        source_mask = (source != self.padding)[:, None, None, :]
        length = target.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=target.device).tril()
        target_mask = (target != self.padding)[:, None, None, :] & earlier
        memory = self.encoder(source, source_mask)
        out: Tensor = self.output(self.decoder(target, target_mask, memory, source_mask))
        return out


class Embedded(nn.Module):
    """Tokens (batch, length) to the stream that the layers work on (batch, length, dim): words, positions, norm."""

    def __init__(self, vocab_size: int, dim: int, dropout: float, padding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=padding)
        # Times √dim this gives words the size of the positions, and as output weight scores of size one.
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        with torch.no_grad():
            self.embedding.weight[padding].zero_()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def embed(self, tokens: Tensor) -> Tensor:
        """The stream at the bottom of the stack."""
        words: Tensor = self.embedding(tokens)
        dim = words.shape[2]
        words = words * math.sqrt(dim) + positions(words.shape[1], dim, words.device).to(words.dtype)
        out: Tensor = self.norm(self.dropout(words))
        return out


class Encoder(Embedded):
    """Source tokens (batch, source) to memory (batch, source, dim)."""

    def __init__(
        self, vocab_size: int, dim: int, num_heads: int, hidden: int, num_layers: int, dropout: float, padding: int
    ) -> None:
        super().__init__(vocab_size, dim, dropout, padding)
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, hidden, dropout) for _ in range(num_layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`mask` (batch, 1, 1, source) is True where a token may be attended to."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Decoder(Embedded):
    """Target tokens (batch, target) and memory (batch, source, dim) to (batch, target, dim)."""

    def __init__(
        self, vocab_size: int, dim: int, num_heads: int, hidden: int, num_layers: int, dropout: float, padding: int
    ) -> None:
        super().__init__(vocab_size, dim, dropout, padding)
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, hidden, dropout) for _ in range(num_layers))

    def forward(self, tokens: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Masks (batch, 1, target, target) and (batch, 1, 1, source) are True where attention may look."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask, memory, memory_mask)
        return x


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each added to the stream and normalised: (batch, length, dim)."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.ffn = FeedForward(dim, hidden, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The stream after this layer."""
        x = self.norm1(x + self.attention(x, x, mask))
        out: Tensor = self.norm2(x + self.ffn(x))
        return out


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory, and feed-forward network: (batch, length, dim)."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.cross_attention = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.ffn = FeedForward(dim, hidden, dropout)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """The stream after this layer."""
        x = self.norm1(x + self.attention(x, x, mask))
        x = self.norm2(x + self.cross_attention(x, memory, memory_mask))
        out: Tensor = self.norm3(x + self.ffn(x))
        return out


class Attention(nn.Module):
    """Queries (batch, length, dim) look at keys and values (batch, other, dim); returns (batch, length, dim).

    Four plain linear layers of all heads together, so that each is one matrix to factorize.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        """`mask` is True where attention may look, and broadcasts to (batch, heads, length, other)."""
        q, k, v = (
            y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(other), self.v(other))
        )
        dropout = self.dropout.p if self.training else 0.0
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.dropout(self.o(heads.transpose(1, 2).flatten(2)))
        return out


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between: (batch, length, dim) to the same shape."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the stream."""
        out: Tensor = self.dropout(self.fc2(self.fc1(x).relu()))
        return out


def positions(length: int, dim: int, device: torch.device) -> Tensor:
    """Sinusoidal positions (length, dim) in float32: sine in the even columns, cosine in the odd ones.

    Computed at every call, which costs next to nothing: no longest sentence, and no buffer that a file lacks.
    """
    place = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
    return torch.stack(((place * frequency).sin(), (place * frequency).cos()), dim=2).flatten(1)
