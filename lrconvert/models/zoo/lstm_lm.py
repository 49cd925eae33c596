"""The LSTM language model of Pufferfish's WikiText-2 experiment: two layers of 1500, embedding and decoder tied.

Source: Pufferfish, table 11; Press & Wolf 2017, https://arxiv.org/abs/1608.05859, for the tied weight. Its count,
85,962,278 with a vocabulary of 33,278, has one bias a gate, where nn.LSTM keeps two whose sum is all that matters.
"""

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class LSTMLanguageModel(nn.Module):
    """Tokens (time, batch) to scores of the next token (time, batch, vocab_size).

    Args:
        vocab_size: words.
        width: of the embedding and of every layer: tying needs them equal.
        num_layers: layers of the LSTM.
        dropout: probability on the embedding, between the layers and on the LSTM's output.
    """

    def __init__(self, vocab_size: int = 33_278, width: int = 1500, num_layers: int = 2, dropout: float = 0.65) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocab_size, width)
        # Between layers only: nn.LSTM warns where there is nothing between.
        self.lstm = SingleBiasLSTM(width, width, num_layers, dropout=dropout if num_layers > 1 else 0.0)
        self.decoder = nn.Linear(width, vocab_size)
        self.decoder.weight = self.encoder.weight
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores (time, batch, vocab_size), and the state (h, c) after the last token, each (layers, batch, width).

        Args:
            tokens: integers (time, batch).
            state: what the tokens before these returned, detached by the caller; zeros when None.
        """
        out, state = self.lstm(self.dropout(self.encoder(tokens)), state)
        return self.decoder(self.dropout(out)), state


class SingleBiasLSTM(nn.LSTM):
    """nn.LSTM with one bias a gate; arguments, forward and fused kernels are nn.LSTM's own.

    The kernels take two biases, so `bias_hh_*` stay, as zero buffers that neither train nor are saved: the state dict
    holds `bias_ih_*` alone. To load a plain nn.LSTM's weights, add its two biases up.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, batch_first=batch_first, dropout=dropout, bidirectional=bidirectional
        )
        for name in [name for name in self._parameters if name.startswith("bias_hh_")]:
            zeros = torch.zeros_like(getattr(self, name), requires_grad=False)
            delattr(self, name)
            self.register_buffer(name, zeros, persistent=False)
        # nn.LSTM hands its kernels a list of its own, which still holds the parameters.
        self._init_flat_weights()
