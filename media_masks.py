"""Which text token may see which image.

Flamingo interleaves text and images, and each text token cross-attends to one image: the last one whose `<image>` token
stands at or before it (Alayrac et al. 2022, section 2.3, "Multi-visual input support"). `media_index` says it in one
integer per token, -1 before the first image:

    tokens       a  <image>  cat  <eoc>  <image>  dog
    media_index -1     0      0     0       1      1

`MediaLayout` turns the index into what attention needs. Its `segments` group the tokens by image, so that scores are
computed against the L keys of a token's own image only; a mask over all M * L keys would compute them all and throw
M - 1 of M away. Left out: OpenFlamingo's "use the next image" variant, which its released models do not use.

Legend: B batch, T text tokens, M images per sequence.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def media_index_from_locations(media_locations: Tensor) -> Tensor:
    """bool[B, T], true at `<image>` tokens -> int64[B, T]: the image each token sees, -1 before the first."""
    return media_locations.long().cumsum(dim=-1) - 1


@dataclass(frozen=True)
class Segments:
    """Tokens grouped by the image they see: N groups, padded to the longest group's S tokens.

    token int64[N, S]   flat position (b * T + t) of each slot's token; padding repeats the group's last token
    slot  int64[B * T]  flat slot (n * S + s) of each token; N * S for a token without an image
    image int64[N]      flat image (b * M + m) of each group
    """

    token: Tensor
    slot: Tensor
    image: Tensor


@dataclass(frozen=True)
class MediaLayout:
    """A checked `media_index` together with the number of images. Build one per forward and share it between layers.

    media_index int64[B, T], num_media M.
    """

    media_index: Tensor
    num_media: int

    @staticmethod
    def from_index(media_index: Tensor, num_media: int) -> "MediaLayout":
        """Raises ValueError where a token points at an image that is not there (OpenFlamingo attends to all
        instead)."""
        if media_index.dim() != 2 or media_index.is_floating_point() or media_index.dtype == torch.bool:
            raise ValueError(
                f"media_index must be int64[B, T]; got {media_index.dtype} of shape {list(media_index.shape)}"
            )
        highest = int(media_index.max()) if media_index.numel() else -1
        if highest >= num_media:
            raise ValueError(
                f"the text refers to image number {highest + 1}, but only {num_media} images were given: "
                "give one image for each <image> token"
            )
        return MediaLayout(media_index, num_media)

    @staticmethod
    def from_locations(media_locations: Tensor, num_media: int) -> "MediaLayout":
        """media_locations bool[B, T], true at `<image>` tokens."""
        if media_locations.dim() != 2 or media_locations.dtype != torch.bool:
            raise ValueError(
                f"media_locations must be bool[B, T]; got {media_locations.dtype} {list(media_locations.shape)}"
            )
        return MediaLayout.from_index(media_index_from_locations(media_locations), num_media)

    @property
    def sees_an_image(self) -> Tensor:
        """bool[B, T]"""
        return self.media_index >= 0

    @property
    def visible_media(self) -> Tensor:
        """bool[B, T, M]: every image at or before a token, for `only_attend_immediate_media=False`."""
        return torch.arange(self.num_media, device=self.media_index.device) <= self.media_index[..., None]

    @cached_property
    def segments(self) -> Segments:
        """The grouping by image. Reads two sizes back from the device, hence once per forward and never in decoding."""
        batch, length = self.media_index.shape
        groups = batch * self.num_media
        device = self.media_index.device
        first_image = torch.arange(batch, device=device)[:, None] * self.num_media
        image = torch.where(self.sees_an_image, first_image + self.media_index, groups).flatten()

        order = image.argsort(stable=True)
        counts = torch.bincount(image, minlength=groups + 1)
        starts = counts.cumsum(0) - counts
        present = counts[:groups].nonzero().squeeze(1)
        longest = int(counts[present].max()) if len(present) else 0

        offset = torch.arange(longest, device=device).minimum(counts[present, None] - 1)
        token = order[starts[present, None] + offset]

        compact = torch.full_like(counts, len(present))  # the tokens without an image share one slot behind the last
        compact[present] = torch.arange(len(present), device=device)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(batch * length, device=device) - starts[image[order]]
        slot = torch.where(image < groups, compact[image] * longest + rank, len(present) * longest)
        return Segments(token, slot, present)


def draw(media_index: Tensor, words: list[str], num_media: int) -> str:
    """An ASCII picture of one row's int64[T] index: `#` where the token (row) sees the image (column), `.`
    elsewhere."""
    width = max(len(word) for word in words)
    column = len(str(num_media - 1))
    header = " " * width + "  " + " ".join(f"{m:>{column}}" for m in range(num_media))
    lines = [
        f"{word:<{width}}  " + " ".join(f"{'#' if m == index else '.':>{column}}" for m in range(num_media))
        for word, index in zip(words, media_index.tolist(), strict=True)
    ]
    return "\n".join([header, *lines])
