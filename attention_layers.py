"""The three attentions of Flamingo, all on one fused kernel.

* `PerceiverAttention`: a few latents read many patches (Alayrac et al. 2022, section 2.1 and figure 5).
* `CrossAttention`: text reads the visual tokens of its own image (section 2.2; gating is the caller's). Keys and values
  are projected once per image by `project_media` and reused by every later call: decoding never touches the media
  again.
* `SelfAttentionLayer`: for the vision encoder and the language model, with an optional preallocated KV cache.

Parameter names of the first two are OpenFlamingo's. Left out: dropout inside attention, which no Flamingo uses.

Legend: B batch, T text tokens, M images per sequence, P patches, L latents per image, D width, H heads, E width per
head, S slots of a KV cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from media_masks import MediaLayout


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(E)) v. q float[B, H, T, E], k and v float[B, H, S, E], mask bool[B, 1, T, S] (true:
    attend)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def attention_flops(queries: int, keys: int, inner: int) -> int:
    """Operations of scores and weighted sum for one row: 2 products of queries x keys x inner, 2 per multiply-add."""
    return 4 * queries * keys * inner


def check_width(name: str, x: Tensor, rank: int, width: int) -> None:
    """Raises ValueError unless x has that many axes and that last one."""
    if x.dim() != rank or x.shape[-1] != width:
        raise ValueError(f"{name} must have {rank} axes, the last of width {width}; got shape {list(x.shape)}")


class PerceiverAttention(nn.Module):
    """Latents attend to concat(media, latents), both layer-normed: media float[B, P, D], latents float[B, L, D]."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim, self.inner = heads, dim, inner
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def queries_keys_values(self, media: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q float[B, H, L, E]; k, v float[B, H, P + L, E]."""
        latents = self.norm_latents(latents)
        context = torch.cat((self.norm_media(media), latents), dim=1)
        q = rearrange(self.to_q(latents), "b l (h e) -> b h l e", h=self.heads)
        k, v = rearrange(self.to_kv(context), "b s (two h e) -> two b h s e", two=2, h=self.heads)
        return q, k, v

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """-> float[B, L, D]"""
        out = attend(*self.queries_keys_values(media, latents))
        return self.to_out(rearrange(out, "b h l e -> b l (h e)"))

    def flops(self, patches: int, latents: int) -> int:
        """Operations for one image."""
        projections = 2 * self.dim * self.inner * (2 * latents + 2 * (patches + latents))
        return projections + attention_flops(latents, patches + latents, self.inner)


@dataclass(frozen=True)
class MediaKV:
    """Cross-attention keys and values of one layer, k and v float[B, M, H, L, E], projected once per image."""

    k: Tensor
    v: Tensor

    def select(self, image: Tensor) -> "MediaKV":
        """One image of each row, int64[B] -> M = 1. What decoding needs; rows without an image (-1) may name any."""
        rows = torch.arange(self.k.shape[0], device=self.k.device)
        image = image.clamp(min=0)
        return MediaKV(self.k[rows, image][:, None], self.v[rows, image][:, None])

    def in_one_axis(self) -> tuple[Tensor, Tensor]:
        """k and v float[B, H, M * L, E]: all images' keys, for a mask to choose from."""
        k, v = (rearrange(each, "b m h l e -> b h (m l) e") for each in (self.k, self.v))
        return k, v

    def repeat_rows(self, times: int) -> "MediaKV":
        """Each row `times` times in a row, for beams and several samples of one prompt."""
        return MediaKV(self.k.repeat_interleave(times, dim=0), self.v.repeat_interleave(times, dim=0))


class CrossAttention(nn.Module):
    """Text reads images: x float[B, T, D] attends to the visual tokens float[B, M, L, dim_visual] it may see.

    With `only_attend_immediate_media` (the paper's choice) a token sees its own image's L tokens; without, those of
    every image so far. A token that sees no image gets exactly zero.
    """

    def __init__(
        self,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
    ):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim, self.dim_visual, self.inner = heads, dim, dim_visual, inner
        self.only_attend_immediate_media = only_attend_immediate_media
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def project_media(self, media: Tensor) -> MediaKV:
        """media float[B, M, L, dim_visual] -> its keys and values. Raises ValueError for another rank or width."""
        check_width("media", media, 4, self.dim_visual)
        k, v = rearrange(self.to_kv(media), "b m l (two h e) -> two b m h l e", two=2, h=self.heads)
        return MediaKV(k, v)

    def forward(self, x: Tensor, media_kv: MediaKV, media_index: Tensor | MediaLayout) -> Tensor:
        """x float[B, T, D], media_index int64[B, T] (or a `MediaLayout` shared between layers) -> float[B, T, D].

        Raises ValueError for another rank or width, for mismatched batches, and where the index names a missing image.
        """
        layout = self.checked_layout(x, media_kv, media_index)
        q = rearrange(self.to_q(self.norm(x)), "b t (h e) -> b t h e", h=self.heads)
        if layout.num_media == 1:
            out = self._attend_to_single_image(q, media_kv, layout)
        elif self.only_attend_immediate_media:
            out = self._attend_by_segment(q, media_kv, layout)
        else:
            out = self._attend_to_all_so_far(q, media_kv, layout)
        return self.to_out(out.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention itself, as the function `attend`; a subclass may do it otherwise."""
        return attend(q, k, v, mask)

    def checked_layout(self, x: Tensor, media_kv: MediaKV, media_index: Tensor | MediaLayout) -> MediaLayout:
        """Raises ValueError where these three cannot be `forward`'s arguments."""
        check_width("x", x, 3, self.dim)
        layout = media_index
        if not isinstance(layout, MediaLayout):
            layout = MediaLayout.from_index(media_index, media_kv.k.shape[1])
        rows, images = media_kv.k.shape[:2]
        if x.shape[:2] != layout.media_index.shape or (rows, images) != (len(x), layout.num_media):
            raise ValueError(
                f"x {list(x.shape)}, media_index {list(layout.media_index.shape)} for {layout.num_media} images, and "
                f"the media of {rows} rows with {images} images do not belong together"
            )
        return layout

    def _attend_to_single_image(self, q: Tensor, kv: MediaKV, layout: MediaLayout) -> Tensor:
        out = self.attend(q.transpose(1, 2), kv.k[:, 0], kv.v[:, 0]).transpose(1, 2)
        return out.masked_fill(~layout.sees_an_image[..., None, None], 0)

    def _attend_by_segment(self, q: Tensor, kv: MediaKV, layout: MediaLayout) -> Tensor:
        """Tokens are gathered by image, attend to that image alone, and are put back; the spare slot stays zero."""
        segments = layout.segments
        grouped = q.flatten(0, 1).index_select(0, segments.token.flatten())  # its backward is faster than indexing's
        grouped = grouped.unflatten(0, segments.token.shape).transpose(1, 2)
        k, v = kv.k.flatten(0, 1), kv.v.flatten(0, 1)
        if len(segments.image) < k.shape[0]:  # some images are seen by no token: leave them out
            k, v = k.index_select(0, segments.image), v.index_select(0, segments.image)
        out = self.attend(grouped, k, v).transpose(1, 2).flatten(0, 1)
        return F.pad(out, (0, 0, 0, 0, 0, 1)).index_select(0, segments.slot).unflatten(0, q.shape[:2])

    def _attend_to_all_so_far(self, q: Tensor, kv: MediaKV, layout: MediaLayout) -> Tensor:
        sees = layout.sees_an_image[..., None]
        visible = layout.visible_media | ~sees  # a row with nothing to attend to would be undefined: zeroed below
        mask = visible.repeat_interleave(kv.k.shape[3], dim=-1)[:, None]
        out = self.attend(q.transpose(1, 2), *kv.in_one_axis(), mask).transpose(1, 2)
        return out.masked_fill(~sees[..., None], 0)

    def flops(self, tokens: int, latents: int, images: int = 1) -> int:
        """Operations for one row: the projection of `images` images (0 once they are cached) and `tokens` text tokens
        that each read one image."""
        project = 4 * images * latents * self.dim_visual * self.inner
        return project + 4 * tokens * self.dim * self.inner + attention_flops(tokens, latents, self.inner)


Rotary = tuple[Tensor, Tensor]  # cosines and sines float32[T, E/2], or float32[B, 1, T, E/2]


def rotary_embedding(positions: Tensor, dim_head: int, base: float = 10_000.0) -> Rotary:
    """positions int64[T], or int64[B, 1, T] where rows differ -> the angles of rotary position embeddings (Su et al.
    2021), as cosines and sines."""
    frequencies = base ** (-torch.arange(0, dim_head, 2, device=positions.device, dtype=torch.float32) / dim_head)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns the two halves of each head, x float[B, H, T, E], as the coordinates of E/2 points in the plane."""
    cos, sin = (each.to(x.dtype) for each in rotary)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of one layer, k and v float[B, H, S, E]. Written in place; shapes never change, so a
    decoding step compiles once and captures into a CUDA graph."""

    k: Tensor
    v: Tensor

    @staticmethod
    def allocate(batch: int, heads: int, slots: int, dim_head: int, like: Tensor) -> "KVCache":
        shape = (batch, heads, slots, dim_head)
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))

    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v float[B, H, T, E] at each row's slots int64[B, T]."""
        slots = positions[:, None, :, None].expand_as(k)
        self.k.scatter_(2, slots, k)
        self.v.scatter_(2, slots, v)


class SelfAttentionLayer(nn.Module):
    """Pre-normed multi-head self-attention, x float[B, T, D] -> float[B, T, D]; the residual sum is the caller's."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, causal: bool = False):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim, self.inner, self.causal = heads, dim, inner, causal
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """mask bool[B, 1, T, S] replaces the causal mask (a cache needs one); rotary (`rotary_embedding`) turns q and
        k.

        With a cache, new keys and values go to each row's slots `positions` int64[B, T] and the queries see all S slots
        the mask allows.
        """
        assert cache is None or (mask is not None and positions is not None), (
            "a cache has slots that are not filled yet"
        )
        check_width("x", x, 3, self.dim)
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b t (three h e) -> three b h t e", three=3, h=self.heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            cache.write(positions, k, v)
            k, v = cache.k, cache.v
        out = attend(q, k, v, mask, causal=self.causal and mask is None)
        return self.to_out(rearrange(out, "b h t e -> b t (h e)"))

    def flops(self, tokens: int, keys: int | None = None) -> int:
        """Operations for one row of `tokens` new tokens against `keys` keys (default: themselves, no causal saving)."""
        return 8 * tokens * self.dim * self.inner + attention_flops(tokens, keys or tokens, self.inner)
