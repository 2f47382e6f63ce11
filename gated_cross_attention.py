"""The gated cross-attention block that lets a frozen language model read images (Alayrac et al. 2022, figure 4).

    x = x + tanh(attn_gate) * cross_attention(x, image)
    x = x + tanh(ff_gate)   * feed_forward(x)

Both gates start at 0, so training begins with exactly the language model; the gates open as reading images pays.
Parameter names are OpenFlamingo's.

Legend: B batch, T text tokens, M images per sequence, L visual tokens per image, D width.
"""

import torch
from torch import Tensor, nn

from attention_layers import CrossAttention, MediaKV
from feedforward import FeedForward
from media_masks import MediaLayout


class GatedCrossAttentionBlock(nn.Module):
    """x float[B, T, D] reads media float[B, M, L, dim_visual] -> float[B, T, D]."""

    def __init__(
        self,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        only_attend_immediate_media: bool = True,
        gate_init: float = 0.0,
    ):
        super().__init__()
        self.attn = CrossAttention(dim, dim_visual, dim_head, heads, only_attend_immediate_media)
        self.attn_gate = nn.Parameter(torch.full((1,), float(gate_init)))
        self.ff = FeedForward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.full((1,), float(gate_init)))

    def project_media(self, media: Tensor) -> MediaKV:
        """media float[B, M, L, dim_visual] -> this layer's keys and values, to be reused for every later token."""
        return self.attn.project_media(media)

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaKV,
        media_index: Tensor | MediaLayout | None = None,
        media_locations: Tensor | None = None,
    ) -> Tensor:
        """Give either media_index int64[B, T] (-1: no image; or a shared `MediaLayout`), or media_locations bool[B, T],
        true at `<image>` tokens. Raises ValueError for both or neither, wrong shapes, and more `<image>` than
        images."""
        if (media_index is None) == (media_locations is None):
            raise ValueError("give exactly one of media_index and media_locations")
        media_kv = media if isinstance(media, MediaKV) else self.project_media(media)
        if media_locations is not None:
            media_index = MediaLayout.from_locations(media_locations, media_kv.k.shape[1])
        # A gate may be kept in a higher precision than x; it must not lift x to it.
        x = x + self.attn_gate.tanh().to(x.dtype) * self.attn(x, media_kv, media_index)
        return x + self.ff_gate.tanh().to(x.dtype) * self.ff(x)

    def flops(self, tokens: int, latents: int, images: int = 1) -> int:
        """Operations for one row of `tokens` text tokens; images=0 once the media are projected."""
        return self.attn.flops(tokens, latents, images) + self.ff.flops(tokens)
