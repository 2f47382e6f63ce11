"""Optimization 7: all of them together, each still switched on or off by one argument.

    fast = OptimizedFlamingo(model, precision="bf16", num_latents=32, draft=draft, cache_bytes=2**26)
    words = fast.generate(prompts, images)

Each part is a transform of the plain model, which stays as it is: a copy in `precision` (norms and gates stay float32),
another resampler, fewer visual tokens, a cache in front of the encoder, a draft that speculates, compiled decoding.
`None` or the default leaves a part out, and with all of them out the words are the plain model's.

Works on anything that has a vision encoder, a resampler, `prefill` and `decode` (see `Flamingo` below).

Legend: B batch, T text tokens, M images per sequence, L visual tokens per image, D their width.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from conditioned_language_model import check_prompts
from reduced_precision import reduced
from speculative_decoding import Draft, NoDraft, ParallelDraft, Speculation, speculate
from token_sampling import next_token_probabilities
from visual_token_cache import LiveFingerprint, VisualTokenCache


class Reader(Protocol):
    """A language model that reads visual tokens; see `ConditionedLanguageModel`."""

    config: Any  # pad_token_id, image_token_id, eoc_token_id

    def prefill(self, input_ids: Tensor, media: Tensor, slots: int) -> tuple[Tensor, Any]: ...

    def decode(self, tokens: Tensor, state: Any, start: Tensor | None = None) -> Tensor: ...


class Flamingo(Reader, Protocol):
    vision_encoder: nn.Module
    resampler: nn.Module


class OptimizedFlamingo:
    """model: a Flamingo in eval mode, of which a copy is made where `precision` is not "fp32".

    resampler: takes the place of the model's own, called as resampler(patches, num_latents). draft: a `Reader` of the
    same visual tokens that was trained to guess `guesses` words in one pass (padding is its mask). cache_bytes: keep
    that many bytes of visual tokens (`cache`). compiled: torch.compile for decoding; the first call then pays for the
    compilation, and so does every new batch size or length of prompt. Raises ValueError as the parts do.
    """

    def __init__(
        self,
        model: Flamingo,
        *,
        precision: str = "fp32",
        resampler: nn.Module | None = None,
        num_latents: int | None = None,
        draft: Reader | None = None,
        guesses: int = 8,
        cache_bytes: int | None = None,
        compiled: bool = False,
    ):
        if guesses < 1:
            raise ValueError(f"guesses must be at least 1; got {guesses}")
        in_precision = (lambda module: module) if precision == "fp32" else partial(reduced, precision=precision)
        self.model = in_precision(model)
        self.resampler = self.model.resampler if resampler is None else in_precision(resampler)
        self.draft = draft and in_precision(draft)
        self.num_latents, self.guesses = num_latents, guesses
        compile_ = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self.decode = compile_(self.model.decode)
        self.draft_decode = self.draft and compile_(self.draft.decode)
        self.cache, self.encode_media = None, self.encode_anew
        if cache_bytes is not None:
            settings = {"num_latents": num_latents, "precision": precision}
            # Live: without a precision of its own this is the caller's model, which may be trained further.
            weights = LiveFingerprint(self.model.vision_encoder, self.resampler, **settings)
            self.cache = VisualTokenCache(cache_bytes, weights)
            self.encode_media = self.cache.wrap(self.encode_anew)

    def encode_anew(self, images: Tensor) -> Tensor:
        """Images uint8[B, M, 3, h, w], or [B, M, F, 3, h, w], to visual tokens float[B, M, L, D], past the cache."""
        patches = self.model.vision_encoder(images.flatten(0, -4)).unflatten(0, images.shape[:-3])
        return self.resampler(patches, self.num_latents)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompts int64[B, T], padded on the left, and images uint8[B, M, 3, h, w] -> the new tokens int64[B, N]."""
        return self.speculate(input_ids, images, max_new_tokens, temperature, top_k, top_p, generator).tokens

    @torch.inference_mode()
    def speculate(
        self,
        input_ids: Tensor,
        images: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Speculation:
        """As `generate`, with what the draft was worth."""
        config, width = self.model.config, input_ids.shape[1]
        check_prompts(input_ids, config.pad_token_id, max_new_tokens)
        media = self.encode_media(images)
        slots = width + max_new_tokens + 2 * self.guesses
        logits, state = self.model.prefill(input_ids, media, slots)
        forbidden = (config.pad_token_id, config.image_token_id)
        draft: Draft = NoDraft()
        if self.draft is not None:
            _, own = self.draft.prefill(input_ids, media, slots)
            draft = ParallelDraft(
                lambda tokens, start: self.draft_decode(tokens, own, start), width, config.pad_token_id, forbidden
            )
        sampled = partial(next_token_probabilities, temperature=temperature, top_k=top_k, top_p=top_p)
        return speculate(
            lambda tokens, start: self.decode(tokens, state, start),
            draft,
            input_ids,
            logits,
            count=self.guesses if self.draft is not None else 0,
            max_new_tokens=max_new_tokens,
            end_id=config.eoc_token_id,
            pad_id=config.pad_token_id,
            forbidden=forbidden,
            probabilities=sampled if temperature else None,
            generator=generator,
        )
