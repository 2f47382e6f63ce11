"""Optimization 2: fewer visual tokens per image, from one elastic resampler.

`resampler(x, num_latents=m)` computes the first m of L visual tokens. Two things make that pay:

* **Attention in media space** (`media_space`). The plain form turns every patch into keys and values, so its cost
  hardly falls with m. Scores can as well be had by carrying the few queries back through `to_k` and comparing them with
  the normed patches themselves, and outputs by summing normed patches and carrying the few sums through `to_v`:
      q (x K)^T = (q K^T) x^T        A (x V) = (A x) V
  The same numbers, regrouped (as DeepSeek-V2 absorbs its projections, arXiv 2405.04434, section 2.1.2), at a cost that
  follows m. For many latents the plain form is cheaper: each call counts the operations of both and takes the cheaper.
* **A count for each image** (`AdaptiveTokenCount`). A `RiskHead` looks at the patches and says how probable it is that
  so few tokens lose the answer; each image gets the smallest count whose risk is below a calibrated threshold.

    fast = media_space(resampler)                  # shares all parameters; state_dict has the same names
    visual_tokens = fast(patches, num_latents=16)

    adaptive = AdaptiveTokenCount(fast, head, counts=(4, 8, 16, 24, 32), threshold=0.02)
    for rows, visual_tokens in adaptive.groups(patches):  # one batch for each count that occurs, nothing padded
        captions = model.generate(prompts[rows], media=visual_tokens)

Left out: different counts for the images of one prompt (cross-attention reads equally many of each, so all of them get
what the most demanding one needs), and tokens merged or dropped after they were computed.

Legend: B batch, M images per sequence, N = B * M, P patches, L latents computed, C cheaper counts, D width, H heads, E
width per head.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attention_layers import PerceiverAttention
from confidence_head import RiskHead, cheapest_way
from perceiver_resampler import PerceiverResampler


class MediaSpaceAttention(PerceiverAttention):
    """Shares the parts of a `PerceiverAttention`, and computes the same in media space where that is cheaper."""

    def __init__(self, attention: PerceiverAttention):
        nn.Module.__init__(self)  # not the parent's: it would draw weights of its own
        self.heads, self.dim, self.inner = attention.heads, attention.dim, attention.inner
        self.norm_media, self.norm_latents = attention.norm_media, attention.norm_latents
        self.to_q, self.to_kv, self.to_out = attention.to_q, attention.to_kv, attention.to_out
        self.train(attention.training)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """media float[B, P, D], latents float[B, L, D] -> float[B, L, D]"""
        if self.prefers_media_space(media.shape[1], latents.shape[1]):
            return self.in_media_space(media, latents)
        return super().forward(media, latents)

    def in_media_space(self, media: Tensor, latents: Tensor) -> Tensor:
        """As `forward`. All heads' queries are rows of one matrix: [H * L, D] against the context [P + L, D] that they
        share, as its keys and as its values. (Norms' gains stay in the context: folded into the queries, one bare
        normalisation would serve all layers, but that saved a twentieth at 16 tokens, too little for its code.)"""
        count, heads = latents.shape[1], self.heads
        latents = self.norm_latents(latents)
        context = torch.cat((self.norm_media(media), latents), dim=1)
        to_k, to_v = rearrange(self.to_kv.weight, "(two h e) d -> two h e d", two=2, h=heads)
        q = rearrange(self.to_q(latents), "b l (h e) -> h (b l) e", h=heads)
        q = rearrange(q @ to_k, "h (b l) d -> b 1 (h l) d", l=count)
        context = context[:, None]
        seen = F.scaled_dot_product_attention(q, context, context, scale=(self.inner // heads) ** -0.5)
        out = rearrange(seen, "b 1 (h l) d -> h (b l) d", h=heads) @ to_v.transpose(1, 2)
        return self.to_out(rearrange(out, "h (b l) e -> b l (h e)", l=count))

    def prefers_media_space(self, patches: int, latents: int) -> bool:
        """Whether that form takes fewer operations. Never for weights in 8 bits: they know the layer's own product
        alone."""
        if is_traceable_wrapper_subclass(self.to_kv.weight):
            return False
        return self.media_space_flops(patches, latents) < super().flops(patches, latents)

    def media_space_flops(self, patches: int, latents: int) -> int:
        """Operations for one image: four projections of the latents, scores and weighted sums of width D per head."""
        projections = 4 * 2 * latents * self.dim * self.inner
        return projections + 2 * 2 * self.heads * latents * (patches + latents) * self.dim

    def flops(self, patches: int, latents: int) -> int:
        """Operations for one image, of the form that `forward` takes."""
        if self.prefers_media_space(patches, latents):
            return self.media_space_flops(patches, latents)
        return super().flops(patches, latents)


def media_space(resampler: PerceiverResampler) -> PerceiverResampler:
    """A copy of any PerceiverResampler, of its own class, whose attentions take the cheaper form. Parameters are shared
    and keep their names: training or loading one changes both. Raises ValueError for anything else."""
    if not isinstance(resampler, PerceiverResampler):
        raise ValueError(f"resampler must be a PerceiverResampler; got a {type(resampler).__name__}")
    shared = {id(each): each for each in (*resampler.parameters(), *resampler.buffers())}
    twin = copy.deepcopy(resampler, shared)  # what the memo knows already is not copied
    for layer in twin.layers:
        layer[0] = MediaSpaceAttention(layer[0])
    return twin


class AdaptiveTokenCount(nn.Module):
    """Each image gets the smallest of `counts` whose risk is below `threshold`, else all of the resampler's tokens.

    head: a RiskHead(dim, ways=C) on the patches, its ways in the order of `counts`; `calibrated_threshold` turns its
    risks on held-out images into a threshold. 0 gives every image all tokens. Raises ValueError for counts that do not
    rise or reach the resampler's own, a head with another number of ways, and a threshold outside [0, 1].
    """

    def __init__(self, resampler: PerceiverResampler, head: RiskHead, counts: Sequence[int], threshold: float):
        super().__init__()
        every = [*counts, len(resampler.latents)]
        if len(every) < 2 or every[0] < 1 or any(few >= more for few, more in pairwise(every)):
            raise ValueError(f"counts must rise from 1 or more to below {every[-1]}, all there are; got {list(counts)}")
        if head.risk.out_features != len(counts):
            raise ValueError(f"head judges {head.risk.out_features} ways; counts names {len(counts)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be a probability; got {threshold}")
        self.resampler, self.head, self.threshold = resampler, head, threshold
        self.counts = tuple(every)  # the last: all

    def risks(self, x: Tensor) -> Tensor:
        """x as in `PerceiverResampler.forward` -> float[B, C] or float[B, M, C], the risk of each cheaper count."""
        media, leading = self.resampler.flatten_media(x)
        return self.head(media).unflatten(0, leading)

    def choose(self, x: Tensor) -> Tensor:
        """-> the count for each image, int64[B] or int64[B, M]."""
        return torch.tensor(self.counts, device=x.device)[self._ways(x)]

    def groups(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """x float[B, P, D] or float[B, M, (F,) P, D] -> (rows int64[n], their visual tokens float[n, (M,) count, D])
        for each count that occurs, the smallest first. Every row is in one group, in order within it; all M images of a
        row get the largest count that one of them needs. Waits for the device once, to know the groups' sizes."""
        ways = self._ways(x)
        ways = ways.flatten(1).amax(dim=1) if ways.dim() > 1 else ways
        rows = ways.argsort(stable=True)
        sizes = (ways[:, None] == torch.arange(len(self.counts), device=ways.device)).sum(dim=0).tolist()
        groups = zip(rows.split(sizes), self.counts, strict=True)
        return [(each, self.resampler(x[each], num_latents=count)) for each, count in groups if len(each)]

    def _ways(self, x: Tensor) -> Tensor:
        """int64[B] or int64[B, M]: the place in `counts`."""
        risk = self.risks(x)
        return cheapest_way(risk.flatten(0, -2), self.threshold).unflatten(0, risk.shape[:-1])
