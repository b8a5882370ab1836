"""A small causal transformer over characters, from scratch: what language models are, small enough for tests.

Its linear layers are named as those of Llama, so that adapters' settings carry over.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

CHARACTERS = "\n !\"&'()*,-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_abcdefghijklmnopqrstuvwxyz"
_NUMBERS = {character: number for number, character in enumerate(CHARACTERS)}


def character_ids(text: str) -> list[int]:
    """Return the numbers of the characters of ``text``; unknown ones are left out."""
    return [_NUMBERS[character] for character in text if character in _NUMBERS]


class CharTransformer(nn.Module):
    """Character numbers (batch, length) to logits of the next one (batch, length, characters).

    ``layers`` blocks of width ``width`` with pre-normalisation, learned positions up to ``length``, and
    no dropout.
    """

    def __init__(self, *, length: int, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(len(CHARACTERS), width)
        self.embed_positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, len(CHARACTERS))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        hidden = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[-1]]
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


class _Block(nn.Module):
    """Causal self-attention, then a gated linear unit, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, 2 * width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.input_layernorm(hidden)
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2)
        hidden = hidden + self.o_proj(mixed)
        x = self.post_attention_layernorm(hidden)
        added: Tensor = hidden + self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return added
