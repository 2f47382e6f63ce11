"""Reads a scene off the visual tokens: the auxiliary decoder of the resampler's warm-up.

When only the language model's loss teaches a resampler, it collapses to a bag of features: every latent a copy of one global
code, two objects in one image no longer told apart. So before the language model is attached, this small decoder asks the
latents directly, through two layers of cross-attention: one query per place (what is here?), one per colour-shape pair
(where is it?), one per colour, shape and "any" (how many?). The queries by content matter as much as those by place: they
make the latents addressable by what they hold.

Its answers' probabilities also say how sure the latents are of what they hold.

Legend: B images, L visual tokens, D their width.
"""

from dataclasses import dataclass, fields
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_layers import CrossAttention, MediaKV
from feedforward import FeedForward
from shapes_world import COLOURS, MAX_OBJECTS, PLACES, SHAPES, SIZES, Scene, scene_grid

PAIRS = tuple(product(range(len(COLOURS)), range(len(SHAPES))))
_QUERIES = (len(PLACES), len(PAIRS), len(COLOURS) + len(SHAPES) + 1)


@dataclass(frozen=True)
class SceneTargets:
    """What there is to read: colour int64[B, 25] (0: empty), shape and size (-100 where empty), where int64[B, 30] (the place
    of a pair that stands exactly once, else -100), count int64[B, 12] of each colour, each shape, and of all things."""

    colour: Tensor
    shape: Tensor
    size: Tensor
    where: Tensor
    count: Tensor

    def to(self, device: str) -> "SceneTargets":
        return SceneTargets(*(getattr(self, field.name).to(device) for field in fields(self)))


def scene_targets(scenes: list[Scene]) -> SceneTargets:
    colour, shape, size = scene_grid(scenes).unbind(-1)
    empty = colour == 0
    is_colour = F.one_hot(colour, len(COLOURS) + 1)[..., 1:]
    is_shape = F.one_hot(shape, len(SHAPES)) * ~empty[..., None]
    is_pair = torch.stack([is_colour[..., c] * is_shape[..., s] for c, s in PAIRS], dim=-1)
    count = torch.cat((is_colour.sum(1), is_shape.sum(1), (~empty).sum(1, keepdim=True)), dim=1)
    where = is_pair.argmax(1).masked_fill(is_pair.sum(1) != 1, -100)
    return SceneTargets(colour, shape.masked_fill(empty, -100), size.masked_fill(empty, -100), where, count)


class SceneReader(nn.Module):
    """Visual tokens float[B, L, D] -> logits for each field of `SceneTargets`."""

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 32, depth: int = 2):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(sum(_QUERIES), dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(dim, dim, dim_head, heads), FeedForward(dim, mult=2)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.colour = nn.Linear(dim, len(COLOURS) + 1)
        self.shape = nn.Linear(dim, len(SHAPES))
        self.size = nn.Linear(dim, len(SIZES))
        self.where = nn.Linear(dim, len(PLACES))
        self.count = nn.Linear(dim, MAX_OBJECTS + 1)

    def forward(self, visual_tokens: Tensor) -> SceneTargets:
        """The logits, in the fields of `SceneTargets` with a last axis of classes."""
        media = visual_tokens[:, None]
        x = self.queries.expand(len(media), -1, -1)
        index = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        for attention, feed_forward in self.layers:
            media_kv: MediaKV = attention.project_media(media)
            x = attention(x, media_kv, index) + x
            x = feed_forward(x) + x
        places, pairs, kinds = self.norm(x).split(_QUERIES, dim=1)
        return SceneTargets(
            self.colour(places), self.shape(places), self.size(places), self.where(pairs), self.count(kinds)
        )


def reading_loss(logits: SceneTargets, targets: SceneTargets) -> Tensor:
    """The sum of the five mean cross-entropies."""
    names = ("colour", "shape", "size", "where", "count")
    return sum(
        F.cross_entropy(getattr(logits, name).flatten(0, 1).float(), getattr(targets, name).flatten()) for name in names
    )


def reading_accuracy(logits: SceneTargets, targets: SceneTargets) -> dict[str, float]:
    """Share of right answers per field, and of scenes read without any mistake in their places ("scene")."""
    right = {
        name: (getattr(logits, name).argmax(-1) == getattr(targets, name)) | (getattr(targets, name) == -100)
        for name in ("colour", "shape", "size", "where", "count")
    }
    asked = {name: getattr(targets, name) != -100 for name in right}
    scores = {name: right[name][asked[name]].float().mean().item() for name in right}
    scores["scene"] = (right["colour"] & right["shape"] & right["size"]).all(1).float().mean().item()
    return scores
