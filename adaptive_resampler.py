"""Optimization 5: each image leaves the resampler as soon as further layers would not help it.

After every layer a small head (`RiskHead`) says how probable it is that stopping here loses the answer. Images below
the threshold leave; the rest of the batch is compacted and goes on, so that saved layers are saved time. (Adaptive
computation after Graves 2016; early exit after BranchyNet, Teerapittayanon et al. 2016. How much the latents still
change is no criterion: it was worse than leaving at random.)

A plain resampler that reads all patches in every layer has found nearly everything after its first layer, and there is
little to choose. `CoarseToFineResampler` makes depth buy quality: its first layers see the patches averaged over a
coarse grid, which also makes them cheaper, and only its last ones see every patch.

    adaptive = AdaptivePerceiverResampler(resampler, heads, threshold=0.01)
    visual_tokens = adaptive(patches)                   # as resampler(patches)
    visual_tokens, exits = adaptive.resample(patches)   # and after how many layers each image left

Left out: a different exit for each latent of one image, which would not compact into dense products.

Legend: B batch, M images per sequence, N = B * M, P patches, L latents, D width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from confidence_head import RiskHead
from perceiver_resampler import PerceiverResampler


class CoarseToFineResampler(PerceiverResampler):
    """A PerceiverResampler whose layer i sees the patches averaged over a grid of grids[i] x grids[i] cells.

    A grid as fine as the patches' own leaves them as they are. The patches must form a square.
    """

    def __init__(self, dim: int, grids: Sequence[int], dim_head: int = 64, heads: int = 8, num_latents: int = 64):
        super().__init__(dim, len(grids), dim_head, heads, num_latents)
        if not grids or grids[0] < 1 or any(fine < coarse for coarse, fine in pairwise(grids)):
            raise ValueError(f"grids must go from coarse to fine, each 1 or more; got {list(grids)}")
        self.grids = tuple(grids)

    def flatten_media(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """As the plain resampler's, for single frames: several are no one square. Raises ValueError for more."""
        if x.dim() == 5 and x.shape[2] > 1:
            raise ValueError(f"a coarse-to-fine resampler reads single frames; got {x.shape[2]} of them")
        return super().flatten_media(x)

    def run_layer(self, layer: int, media: Tensor, latents: Tensor) -> Tensor:
        """Raises ValueError for patches that form no square, or one coarser than this layer's grid."""
        return super().run_layer(layer, averaged(media, self.grids[layer]), latents)

    def flops(self, patches: int, num_latents: int | None = None, depth: int | None = None) -> int:
        """Operations for one image."""
        latents = num_latents or len(self.latents)
        return sum(
            attention.flops(min(patches, grid**2), latents) + feed_forward.flops(latents)
            for (attention, feed_forward), grid in list(zip(self.layers, self.grids, strict=True))[:depth]
        )


def averaged(media: Tensor, grid: int) -> Tensor:
    """float[N, P, D], P a square -> float[N, grid * grid, D]: the means over the cells of a grid."""
    side = round(media.shape[1] ** 0.5)
    if side * side != media.shape[1] or side < grid:
        raise ValueError(f"a grid of {grid} x {grid} needs at least as many patches in a square; got {media.shape[1]}")
    if side == grid:
        return media
    square = rearrange(media, "n (h w) d -> n d h w", h=side)
    return rearrange(F.adaptive_avg_pool2d(square, grid), "n d h w -> n (h w) d")


class AdaptivePerceiverResampler(nn.Module):
    """Wraps any PerceiverResampler; heads: one RiskHead(dim, ways=1) behind each layer but the last.

    An image leaves behind the first layer whose head gives a risk below `threshold`; 0 is the full resampler exactly.
    Raises ValueError for another number of heads and a threshold outside [0, 1].
    """

    def __init__(self, resampler: PerceiverResampler, heads: Sequence[RiskHead], threshold: float):
        super().__init__()
        if len(heads) != len(resampler.layers) - 1:
            raise ValueError(f"{len(resampler.layers)} layers need one head less; got {len(heads)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a probability; got {threshold}")
        self.resampler, self.heads, self.threshold = resampler, nn.ModuleList(heads), threshold

    def forward(self, x: Tensor, num_latents: int | None = None) -> Tensor:
        """As `PerceiverResampler.forward`."""
        return self.resample(x, num_latents)[0]

    def resample(self, x: Tensor, num_latents: int | None = None) -> tuple[Tensor, Tensor]:
        """-> the visual tokens, and int64[B] or int64[B, M] the number of layers each image went through. Waits for the
        device once per layer: only it knows how many images go on."""
        media, leading = self.resampler.flatten_media(x)
        latents = self.resampler.first_latents(len(media), num_latents)
        depth = len(self.resampler.layers)
        done, exits = torch.empty_like(latents), torch.full((len(media),), depth, device=media.device)
        here = torch.arange(len(media), device=media.device)  # whose latents these are
        for layer in range(depth):
            latents = self.resampler.run_layer(layer, media, latents)
            if layer == depth - 1 or self.threshold == 0:
                continue
            normed = self.resampler.norm(latents)
            stays = self.heads[layer](normed)[:, 0] >= self.threshold
            order, leave = stays.int().argsort(stable=True), len(here) - int(stays.sum())  # the one wait for the device
            if leave:
                leaving, staying = order[:leave], order[leave:]
                done[here[leaving]], exits[here[leaving]] = normed[leaving], layer + 1
                media, latents, here = media[staying], latents[staying], here[staying]
            if not len(here):
                break
        done[here] = self.resampler.norm(latents)
        return done.unflatten(0, leading), exits.unflatten(0, leading)


def risks(
    resampler: PerceiverResampler, heads: Sequence[RiskHead], x: Tensor, num_latents: int | None = None
) -> tuple[Tensor, Tensor]:
    """What calibration needs: the risk behind every layer but the last, float[N, depth - 1], and the visual tokens
    after each depth, float[depth, B, M, L, D]."""
    media, leading = resampler.flatten_media(x)
    latents = resampler.first_latents(len(media), num_latents)
    tokens = []
    for layer in range(len(resampler.layers)):
        latents = resampler.run_layer(layer, media, latents)
        tokens.append(resampler.norm(latents))
    risk = torch.cat([head(each) for head, each in zip(heads, tokens, strict=False)], dim=1)
    return risk, torch.stack(tokens).unflatten(1, leading)
