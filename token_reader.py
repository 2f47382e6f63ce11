"""Reads labels off the visual tokens: the auxiliary decoder of the resampler's warm-up.

When only the language model's loss teaches a resampler, it collapses to a bag of features: every latent a copy of one
global code, two objects in one image no longer told apart. So before the language model is attached, this small decoder
asks the latents directly, through two layers of cross-attention: one learned query per place (what is here?), one per
content (where is it?), one per kind (how many?). The queries by content matter as much as those by place: they make the
latents addressable by what they hold.

Its answers' probabilities also say how sure the latents are of what they hold.

Legend: B images, L visual tokens, D their width, Q queries of a group, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_layers import CrossAttention
from feedforward import FeedForward
from interleaved_text import UNASKED
from media_masks import MediaLayout


@dataclass(frozen=True)
class QueryGroup:
    """`queries` learned queries, each read by every head; heads: number of classes by name."""

    queries: int
    heads: Mapping[str, int]


class TokenReader(nn.Module):
    """Visual tokens float[B, L, D] -> logits float[B, Q, C] by head name."""

    def __init__(self, dim: int, groups: Mapping[str, QueryGroup], heads: int = 8, dim_head: int = 32, depth: int = 2):
        super().__init__()
        self.groups = dict(groups)
        self.queries = nn.Parameter(torch.randn(sum(group.queries for group in groups.values()), dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(dim, dim, dim_head, heads), FeedForward(dim, mult=2)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dim, classes) for group in groups.values() for name, classes in group.heads.items()}
        )

    def forward(self, visual_tokens: Tensor) -> dict[str, Tensor]:
        media = visual_tokens[:, None]
        x = self.queries.expand(len(media), -1, -1)
        layout = MediaLayout(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device), num_media=1)
        for attention, feed_forward in self.layers:
            x = attention(x, attention.project_media(media), layout) + x
            x = feed_forward(x) + x
        parts = self.norm(x).split([group.queries for group in self.groups.values()], dim=1)
        return {
            name: self.heads[name](part)
            for part, group in zip(parts, self.groups.values(), strict=True)
            for name in group.heads
        }


def reading_loss(logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """The sum over heads of the mean cross-entropy, 0 for a head that is asked nothing. targets int64[B, Q] by head
    name, UNASKED where there is no answer."""
    loss = 0
    for name, head in logits.items():
        target = targets[name].flatten()
        total = F.cross_entropy(head.flatten(0, 1).float(), target, ignore_index=UNASKED, reduction="sum")
        loss = loss + total / (target != UNASKED).sum().clamp(min=1)
    return loss


def reading_accuracy(logits: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of right answers by head name, among those asked for."""
    return {
        name: (head.argmax(-1) == targets[name])[targets[name] != UNASKED].float().mean().item()
        for name, head in logits.items()
    }
