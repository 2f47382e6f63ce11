"""Choosing the next token from its logits: greedy, or sampled with temperature, top-k and top-p (Holtzman et al.
2019)."""

import torch
from torch import Tensor


def next_token_probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """float[B, V] logits -> the distribution that `choose_token` draws from, float32[B, V].

    Raises ValueError for a temperature not above 0, a top_k below 1 and a top_p outside (0, 1].
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to sample; got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1; got {top_p}")
    logits = logits.float() / temperature
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth_best, float("-inf"))
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass in front of a token: the first one is always kept
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits.softmax(-1)


def choose_token(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """float[B, V] -> int64[B]; temperature 0 takes the most likely token."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
