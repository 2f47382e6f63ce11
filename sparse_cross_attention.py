"""Sparse cross-attention: text reads only the visual tokens that matter to it.

Three forms, from free to lossy:

* Per image, exact. A text token may see one image (Alayrac et al. 2022, section 2.3). `CrossAttention` computes scores
  against that image's L keys alone, so its sparsity needs no wrapper. `dense_masked_attention` is the form that
  OpenFlamingo and others use, for comparison: all M * L scores, of which a mask throws M - 1 of M away.
* Per query and head, lossy. Each query keeps its k highest scores:

      block.attn = SparseCrossAttention(block.attn, top_k=16)

  The choice needs every score, so half of the products of full attention stay, and a selection comes on top. What is
  saved is reading the values: V's chosen rows are gathered and summed in one pass (`embedding_bag`), K's need not be
  gathered at all, for their products are the scores. It pays where memory is the limit: few queries, many keys.
* Shared, lossy. One set of k visual tokens is chosen once per image, for all layers, heads and text tokens, and the
  rest is dropped in front of every `project_media`, so all that follows is plain attention over k keys:

      relevance = attention_received(layers, lambda: model(ids, media=media))
      media = select_visual_tokens(media, relevance, k=32)

Left out: masks over full scores, which cost what full attention costs, and block-sparse kernels, which need one choice
for many neighbouring queries.

Legend: B batch, T text tokens, M images per sequence, L visual tokens per image, D width, H heads, E width per head, N
rows and S keys of any attention.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attention_layers import CrossAttention, MediaKV, attend, attention_flops
from media_masks import MediaLayout

CHUNK_BYTES = 2**24  # of scores and choices at a time: they are read several times, best while in a cache

Choice = Callable[[Tensor, int], Tensor]  # scores float[N, H, T, S], -inf where hidden, and k -> keys int64[N, H, T, k]


def highest_scores(scores: Tensor, k: int) -> Tensor:
    """The k largest, in no order. Among equal scores any may be taken."""
    return scores.topk(k, sorted=False).indices


def attend_to_top_k(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    mask: Tensor | None = None,
    choose: Choice = highest_scores,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`attend` in which each query keeps `top_k` of its S keys: q float[N, H, T, E], k and v float[N, H, S, E], mask
    bool[N, 1, T, S] (true: attend, at least one key per query) -> float[N, H, T, E].

    Scores and choices exist for at most `chunk_bytes` at a time (one query's, where these are more). Raises ValueError
    unless 1 <= top_k <= S.
    """
    if not 1 <= top_k <= k.shape[2]:
        raise ValueError(f"top_k must be between 1 and the number of keys, {k.shape[2]}; got {top_k}")
    size = q.element_size()
    at_once = max(1, chunk_bytes // (k.shape[2] * size + 2 * top_k * (size + 8)))  # queries
    tokens = max(1, min(q.shape[2], at_once))
    heads = max(1, min(q.shape[1], at_once // tokens))
    rows = max(1, at_once // (tokens * heads))
    v = v.contiguous()

    def part(n: slice, h: slice, t: slice) -> Tensor:
        visible = None if mask is None else mask[n, :, t]
        return _attend_to_top_k(q[n, h, t], k[n, h], v[n, h], top_k, visible, choose)

    n_slices, h_slices, t_slices = (
        [slice(start, start + step) for start in range(0, max(1, total), step)]
        for total, step in zip(q.shape[:3], (rows, heads, tokens), strict=True)
    )
    return _join([_join([_join([part(n, h, t) for t in t_slices], 2) for h in h_slices], 1) for n in n_slices], 0)


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _attend_to_top_k(q: Tensor, k: Tensor, v: Tensor, top_k: int, mask: Tensor | None, choose: Choice) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    chosen = choose(scores.detach(), top_k)
    weights = scores.gather(-1, chosen).softmax(-1).to(v.dtype)  # float32 under autocast
    first = torch.arange(0, v.shape[0] * v.shape[1] * v.shape[2], v.shape[2], device=v.device)
    chosen = chosen + first.view(*v.shape[:2], 1, 1)  # as rows of V with rows, heads and keys in one axis
    out = F.embedding_bag(chosen.flatten(0, 2), v.flatten(0, 2), mode="sum", per_sample_weights=weights.flatten(0, 2))
    return out.view(q.shape)


class SparseCrossAttention(CrossAttention):
    """A `CrossAttention` in which each text token and head attends to its `top_k` highest scores alone.

    It shares the parameters of the one it is made from, under the same names, and takes its place: same calls, same
    `state_dict`. With `top_k` at or above the number of keys it is that attention, exactly. `choose` replaces the
    choice by score. Raises ValueError for a `top_k` below 1.
    """

    def __init__(self, attention: CrossAttention, top_k: int, choose: Choice = highest_scores):
        nn.Module.__init__(self)  # not CrossAttention's, which would make parameters anew
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        self.top_k, self.choose = top_k, choose
        self.heads, self.dim, self.inner = attention.heads, attention.dim, attention.inner
        self.dim_visual = attention.dim_visual
        self.only_attend_immediate_media = attention.only_attend_immediate_media
        self.norm, self.to_q, self.to_kv, self.to_out = (
            attention.norm, attention.to_q, attention.to_kv, attention.to_out
        )  # fmt: skip
        self.train(attention.training)

    def project_media(self, media: Tensor) -> MediaKV:
        """As `CrossAttention.project_media`, stored so that one key's E numbers and its neighbours' lie together: every
        later call gathers from there."""
        media_kv = super().project_media(media)
        return MediaKV(media_kv.k.contiguous(), media_kv.v.contiguous())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.top_k >= k.shape[2]:
            return super().attend(q, k, v, mask)
        return attend_to_top_k(q, k, v, self.top_k, mask, self.choose)

    def flops(self, tokens: int, latents: int, images: int = 1) -> int:
        """As `CrossAttention.flops`: all scores, but a sum over the chosen keys alone."""
        unread = max(0, latents - self.top_k)
        return super().flops(tokens, latents, images) - attention_flops(tokens, unread, self.inner) // 2


def dense_masked_attention(
    attention: CrossAttention, x: Tensor, media_kv: MediaKV, media_index: Tensor | MediaLayout
) -> Tensor:
    """The same output as `attention(x, media_kv, media_index)`, computed as OpenFlamingo and others do: the scores of
    all images, behind a mask. For comparison only. Raises ValueError as `CrossAttention.forward` does."""
    layout = attention.checked_layout(x, media_kv, media_index)
    mask = _visible_keys(layout, media_kv.k.shape[3], attention.only_attend_immediate_media)
    q = rearrange(attention.to_q(attention.norm(x)), "b t (h e) -> b h t e", h=attention.heads)
    out = rearrange(attend(q, *media_kv.in_one_axis(), mask=mask), "b h t e -> b t (h e)")
    return attention.to_out(out.masked_fill(~layout.sees_an_image[..., None], 0))


def select_visual_tokens(media: Tensor, relevance: Tensor, k: int) -> Tensor:
    """The k most relevant visual tokens of each image, in their old order: media float[B, M, L, D], relevance
    float[B, M, L] -> float[B, M, k, D]. Of equally relevant ones the earlier is kept. Raises ValueError for shapes that
    do not fit and unless 1 <= k <= L."""
    if media.dim() != 4 or relevance.shape != media.shape[:3]:
        raise ValueError(
            "media must be float[B, M, L, D] and relevance float[B, M, L]; "
            f"got shapes {list(media.shape)} and {list(relevance.shape)}"
        )
    if not 1 <= k <= media.shape[2]:
        raise ValueError(f"k must be between 1 and the number of visual tokens, {media.shape[2]}; got {k}")
    kept = relevance.argsort(dim=-1, descending=True, stable=True)[..., :k].sort(dim=-1).values
    return media.gather(2, kept[..., None].expand(-1, -1, -1, media.shape[3]))


def attention_by_key(
    layer: CrossAttention,
    x: Tensor,
    media_kv: MediaKV,
    media_index: Tensor | MediaLayout,
    counted: Tensor | None = None,
) -> Tensor:
    """The attention that each visual token would get if `layer` were called so, summed over heads and text tokens:
    float32[B, M, L]. `counted` and errors as in `attention_received`; gradients flow."""
    layout = layer.checked_layout(x, media_kv, media_index)
    counts = layout.sees_an_image
    if counted is not None:
        if counted.shape != counts.shape:
            raise ValueError(f"counted must be bool{list(counts.shape)}, as the text; got shape {list(counted.shape)}")
        counts = counts & counted
    images, latents = media_kv.k.shape[1], media_kv.k.shape[3]
    q = rearrange(layer.to_q(layer.norm(x)), "b t (h e) -> b h t e", h=layer.heads)
    k, _ = media_kv.in_one_axis()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if images > 1:
        mask = _visible_keys(layout, latents, layer.only_attend_immediate_media)
        scores = scores.masked_fill(~mask, float("-inf"))
    attention = scores.softmax(-1, dtype=torch.float32) * counts[:, None, :, None]
    return attention.sum((1, 2)).unflatten(-1, (images, latents))


@torch.no_grad()
def attention_received(
    layers: Iterable[CrossAttention], run: Callable[[], object], counted: Tensor | None = None
) -> Tensor:
    """How much attention each visual token gets in `layers` while `run()` calls them: summed over layers, heads and
    text tokens, float32[B, M, L]. A relevance for `select_visual_tokens` that needs no training.

    counted bool[B, T]: the text tokens whose attention counts (default: all that see an image). Raises ValueError where
    `run` calls none of the layers, and for a `counted` of another shape than the text.
    """
    received = []

    def listen(layer: CrossAttention, args: tuple, kwargs: dict) -> None:
        received.append(attention_by_key(layer, *args, counted=counted, **kwargs))

    handles = [layer.register_forward_pre_hook(listen, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not received:
        raise ValueError("run() called none of the layers, so no attention could be counted")
    return sum(received)


def _visible_keys(layout: MediaLayout, latents: int, own_image_alone: bool) -> Tensor:
    """bool[B, 1, T, M * L]. A text token without an image sees all, for a softmax over nothing is undefined: the caller
    drops it."""
    images = torch.arange(layout.num_media, device=layout.media_index.device)
    visible = images == layout.media_index[..., None] if own_image_alone else layout.visible_media
    return (visible | ~layout.sees_an_image[..., None]).repeat_interleave(latents, dim=-1)[:, None]
