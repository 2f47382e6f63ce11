"""A small vision transformer over patches: pixels in, one feature vector per patch out.

Stands in for the paper's frozen NFNet (Alayrac et al. 2022, section 2.1). Patches are embedded in two strides with
residual 3 x 3 convolutions between them, which learns far sooner than one strided projection (Xiao et al. 2021, arXiv
2106.14881). The last 64 of the D output features are the patch's fixed 2-D sine-cosine position: a resampler that reads
these features as an unordered set can then still tell where each one stands.

Legend: N images, P patches, D output width.
"""

import math

import torch
from torch import Tensor, nn

from attention_layers import SelfAttentionLayer
from feedforward import FeedForward

POSITION_DIM = 64


def sincos_positions(side: int) -> Tensor:
    """float[side * side, 64]: sines and cosines of column and row at 16 frequencies, from half a turn over the image to
    half a turn per patch."""
    frequencies = torch.pi * torch.logspace(0, math.log2(side), 16, base=2.0) / side
    angles = (torch.arange(side) + 0.5)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = waves[:, None].expand(-1, side, -1)
    columns = waves[None].expand(side, -1, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)


class ResidualConvolutions(nn.Sequential):
    """x + two 3 x 3 convolutions of x, float[N, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class VisionEncoder(nn.Module):
    """Images uint8[N, 3, h, w], or float in [0, 1], of `image_size` pixels a side -> float[N, P, dim]."""

    def __init__(self, image_size: int, patch_size: int, dim: int, depth: int, heads: int):
        super().__init__()
        if image_size % patch_size or patch_size % 2:
            raise ValueError(f"image_size {image_size} must be a multiple of an even patch_size; got {patch_size}")
        if dim <= POSITION_DIM:
            raise ValueError(f"dim must be above {POSITION_DIM}, the features that hold the position; got {dim}")
        width, side = dim - POSITION_DIM, image_size // patch_size
        self.image_size, self.num_patches = image_size, side * side
        self.patches = nn.Sequential(
            nn.Conv2d(3, width // 2, patch_size // 2, stride=patch_size // 2),
            ResidualConvolutions(width // 2),
            ResidualConvolutions(width // 2),
            nn.Conv2d(width // 2, width, 2, stride=2),
            nn.Flatten(2),
        )
        self.position = nn.Parameter(0.02 * torch.randn(self.num_patches, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([SelfAttentionLayer(width, width // heads, heads), FeedForward(width)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("sincos", sincos_positions(side), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for images of another rank, channel count or size."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images must be [N, 3, {self.image_size}, {self.image_size}]; got shape {list(images.shape)}"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images must be uint8, or float in [0, 1]; got {images.dtype}")
        dtype = self.position.dtype
        pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        x = self.patches(4 * pixels - 2).transpose(1, 2) + self.position
        for attention, feed_forward in self.layers:
            x = attention(x) + x
            x = feed_forward(x) + x
        x = self.norm(x)
        return torch.cat((x, self.sincos.to(x.dtype).expand(len(x), -1, -1)), dim=-1)
