"""The Perceiver Resampler: any number of patch features in, L visual tokens out (Alayrac et al. 2022, section 2.1).

L learned latents read the patches through `depth` layers of attention and feed-forward. Scores cost L x (P + L) per
layer where self-attention over the patches would cost P x P, and everything behind it sees L tokens whatever the
resolution.

It is elastic: `num_latents=m` runs the first m latents and equals a resampler built with those m; `depth=d` stops after
d layers. (Both are exact as computations; a checkpoint is good at them only if it was trained for them.)

`DirectSelfAttention` is the uncompressed alternative it is compared with. Left out: learned position embeddings, which
belong to the vision encoder.

Legend: B batch, M images per sequence, F frames, P patches per frame, L latents, D width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from attention_layers import PerceiverAttention, SelfAttentionLayer, check_width
from feedforward import FeedForward


class PerceiverResampler(nn.Module):
    """float[B, P, D] -> float[B, L, D]; float[B, M, P, D] or float[B, M, F, P, D] -> float[B, M, L, D].

    `max_num_frames` and `max_num_media` add learned embeddings of the frame and of the image's place in the sequence.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: float = 4,
    ):
        super().__init__()
        self.dim = dim
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), FeedForward(dim, ff_mult)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def flatten_media(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What the layers read: x float[B, P, D], [B, M, P, D] or [B, M, F, P, D] -> float[N, F * P, D] with its time
        embeddings, frames and patches joined; and the leading axes, (B,) or (B, M), that N stands for."""
        if x.dim() not in (3, 4, 5):
            raise ValueError(f"x must be [B, P, D], [B, M, P, D] or [B, M, F, P, D]; got shape {list(x.shape)}")
        check_width("x", x, x.dim(), self.dim)
        leading = x.shape[:1] if x.dim() == 3 else x.shape[:2]
        if x.dim() < 5:
            x = rearrange(x, "b p d -> b 1 1 p d") if x.dim() == 3 else rearrange(x, "b m p d -> b m 1 p d")
        _, media, frames = x.shape[:3]
        if self.frame_embs is not None:
            _check_at_most("max_num_frames", frames, len(self.frame_embs))
            x = x + self.frame_embs[:frames, None]
        x = rearrange(x, "b m f p d -> b m (f p) d")
        if self.media_time_embs is not None:
            _check_at_most("max_num_media", media, len(self.media_time_embs))
            x = x + self.media_time_embs[:media]
        return x.flatten(0, 1), leading

    def forward(self, x: Tensor, num_latents: int | None = None, depth: int | None = None) -> Tensor:
        """Raises ValueError for another rank or width, too many frames or images, or a count outside what was built."""
        media, leading = self.flatten_media(x)
        latents = self.first_latents(len(media), num_latents)
        for layer in range(checked_count("depth", depth, len(self.layers))):
            latents = self.run_layer(layer, media, latents)
        return self.norm(latents).unflatten(0, leading)

    def first_latents(self, images: int, num_latents: int | None = None) -> Tensor:
        """What the first layer starts from, float[images, L, D]."""
        count = checked_count("num_latents", num_latents, len(self.latents))
        return self.latents[:count].expand(images, -1, -1)

    def run_layer(self, layer: int, media: Tensor, latents: Tensor) -> Tensor:
        """One layer: the latents float[N, L, D] read the patches float[N, P, D]."""
        attention, feed_forward = self.layers[layer]
        latents = attention(media, latents) + latents
        return feed_forward(latents) + latents

    def flops(self, patches: int, num_latents: int | None = None, depth: int | None = None) -> int:
        """Operations for one image (patches: over all frames)."""
        latents = num_latents or len(self.latents)
        attention, feed_forward = self.layers[0]
        return (depth or len(self.layers)) * (attention.flops(patches, latents) + feed_forward.flops(latents))


class DirectSelfAttention(nn.Module):
    """The baseline: `depth` layers of self-attention over the patches themselves, float[B, P, D] -> float[B, P, D]."""

    def __init__(self, dim: int, depth: int = 6, dim_head: int = 64, heads: int = 8, ff_mult: float = 4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([SelfAttentionLayer(dim, dim_head, heads), FeedForward(dim, ff_mult)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        return self.norm(x)

    def flops(self, patches: int) -> int:
        """Operations for one image."""
        attention, feed_forward = self.layers[0]
        return len(self.layers) * (attention.flops(patches) + feed_forward.flops(patches))


def checked_count(name: str, count: int | None, built: int) -> int:
    if count is None:
        return built
    if not 1 <= count <= built:
        raise ValueError(f"{name} must be between 1 and {built}, the number this resampler was built with; got {count}")
    return count


def _check_at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"x holds {count}, more than {name}={limit}")
