"""A causal language model with rotary positions and a preallocated cache: the frozen half of the Mini Flamingo.

Pre-norm GPT layers. Before its attention each layer adds a causal depthwise convolution over the last 4 tokens (as in
H3, Fu et al. 2022, and the Canon layers of Allen-Zhu 2025): a token that knows its neighbours can be copied by a single
attention, which a small model needs to learn from examples in its context.

`before_layer` is where gated cross-attention enters: the language model itself knows nothing of images.

Legend: B batch, T new tokens, S slots of the cache, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_layers import KVCache, Rotary, SelfAttentionLayer, rotary_embedding
from feedforward import FeedForward

MIX_WIDTH = 4


@dataclass
class LanguageModelCache:
    """Everything a decoding step needs of the tokens before it, in tensors whose shapes never change.

    kv: per layer. mixed: per layer float[B, S + 3, D], what the token mixing saw, behind 3 zeros. is_token bool[B, S],
    false at padding. length int64[B], the slots that each row has filled so far; lower it to take tokens back (they are
    overwritten later).
    """

    kv: list[KVCache]
    mixed: list[Tensor]
    is_token: Tensor
    length: Tensor


@dataclass(frozen=True)
class _Context:
    """What all layers of one forward share: the tokens' slots int64[B, T] (int64[T] without a cache), their rotations,
    padding and the attention mask."""

    positions: Tensor
    rotary: Rotary
    is_token: Tensor | None
    mask: Tensor | None


class TokenMix(nn.Module):
    """x + a causal depthwise convolution over each token and its 3 predecessors, float[B, T, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.convolution = nn.Conv1d(dim, dim, MIX_WIDTH, groups=dim, bias=False)

    def forward(self, x: Tensor, context: _Context, history: Tensor | None = None) -> Tensor:
        mixed = self.norm(x)
        if context.is_token is not None:
            mixed = mixed * context.is_token[..., None]  # a prompt padded on the left must not feel its padding
        if history is None:
            window = F.pad(mixed, (0, 0, MIX_WIDTH - 1, 0))
        else:
            rows = torch.arange(len(x), device=x.device)[:, None]
            history[rows, context.positions + MIX_WIDTH - 1] = mixed
            reach = torch.arange(x.shape[1] + MIX_WIDTH - 1, device=x.device)
            window = history[rows, context.positions[:, :1] + reach]
        return x + self.convolution(window.transpose(1, 2)).transpose(1, 2)


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.mix = TokenMix(dim)
        self.attention = SelfAttentionLayer(dim, dim // heads, heads, causal=True)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor, context: _Context, kv: KVCache | None = None, mixed: Tensor | None = None) -> Tensor:
        x = self.mix(x, context, mixed)
        x = self.attention(x, context.mask, context.rotary, kv, context.positions) + x
        return self.feed_forward(x) + x


class CausalLanguageModel(nn.Module):
    """int64[B, T] -> logits float[B, T, V]; the output embedding is the input embedding."""

    def __init__(self, vocabulary_size: int, dim: int, depth: int, heads: int):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.embedding = nn.Embedding(vocabulary_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def allocate_cache(self, batch: int, slots: int) -> LanguageModelCache:
        like = self.embedding.weight
        return LanguageModelCache(
            kv=[KVCache.allocate(batch, self.heads, slots, self.dim // self.heads, like) for _ in self.layers],
            mixed=[like.new_zeros(batch, slots + MIX_WIDTH - 1, self.dim) for _ in self.layers],
            is_token=torch.zeros(batch, slots, dtype=torch.bool, device=like.device),
            length=torch.zeros(batch, dtype=torch.int64, device=like.device),
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: LanguageModelCache | None = None,
        before_layer: Callable[[int, Tensor], Tensor] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """attention_mask bool[B, T] is false at padding. With a cache the tokens are appended to it.
        `before_layer(i, x)` may change what enters layer i. `last_only` computes the last token's logits alone, T =
        1."""
        context = self._context(input_ids, attention_mask, cache)
        x = self.embedding(input_ids)
        for i, layer in enumerate(self.layers):
            if before_layer is not None:
                x = before_layer(i, x)
            x = layer(x, context) if cache is None else layer(x, context, cache.kv[i], cache.mixed[i])
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x[:, -1:] if last_only else x) @ self.embedding.weight.T

    def _context(self, input_ids: Tensor, is_token: Tensor | None, cache: LanguageModelCache | None) -> _Context:
        if is_token is not None and is_token.shape != input_ids.shape:
            raise ValueError(f"attention_mask {list(is_token.shape)} does not fit input_ids {list(input_ids.shape)}")
        device = input_ids.device
        positions = torch.arange(input_ids.shape[1], device=device)
        if cache is None:
            rotary, keys, is_key = self._rotary(positions), positions, is_token
        else:
            positions = positions + cache.length[:, None]
            rotary = self._rotary(positions[:, None])
            written = torch.ones_like(input_ids, dtype=torch.bool) if is_token is None else is_token
            cache.is_token.scatter_(1, positions, written)
            keys, is_key = torch.arange(cache.is_token.shape[1], device=device), cache.is_token
        if is_key is None:
            return _Context(positions, rotary, None, None)
        # Padding attends to itself: a softmax over nothing is undefined, and nobody reads its result.
        at = positions[..., None] if cache is None else positions[:, None, :, None]
        mask = ((keys <= at) & is_key[:, None, None, :]) | (keys == at)
        return _Context(positions, rotary, is_token, mask)

    def _rotary(self, positions: Tensor) -> Rotary:
        return rotary_embedding(positions, self.dim // self.heads)
