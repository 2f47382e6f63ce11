"""Generation: Hugging Face's loop, beams and samplers, with the images encoded and projected once for all of it.

What generated text reads is known before the first word: `<image>` is never generated (unless asked for), so each row's
last image is all that any later token sees. Its keys and values are taken out once, and a decoding step costs the same
after 1 image and after 32. Which image a token sees is counted anew from the whole text at each step, so beams may be
reordered freely and no row can take another's image away.

Beams and samples share their prompt: its forward pass runs once per prompt, and not once per beam.

Legend: B prompts, R = B * K rows of text (K beams or samples of each), T text tokens, M images, N continuations.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CompileConfig, DynamicCache, GenerationMixin, LogitsProcessor
from transformers.utils import ModelOutput

from flamingo_vlm.conditioning import ProjectedMedia
from flamingo_vlm.few_rows import few_rows_on_all_threads
from media_masks import MediaLayout, media_index_from_locations
from speculative_decoding import Scorer

UNSUPPORTED = {  # option of transformers' generate -> what to do
    "assistant_model": "use prompt_lookup_num_tokens, or speculative_target with a draft",
    "assistant_early_exit": "use prompt_lookup_num_tokens, or speculative_target with a draft",
    "guidance_scale": "it would read the text without its images",
    "prefill_chunk_size": "the images of a prompt are counted over the whole of it",
}
# What a caller may ask for that a compiled step with a preallocated cache cannot do, or that settles the cache itself.
NOT_COMPILED = {"cache_implementation", "past_key_values", "use_cache", "prompt_lookup_num_tokens", "generation_config"}


@dataclass
class PromptMedia:
    """What one generation reads: all images, for the prompt of `length` tokens; behind it each row's last image alone,
    unless `<image>` may be generated (None). All the others are let go then."""

    all: ProjectedMedia | None
    last: ProjectedMedia | None
    length: int
    ends: Tensor  # int64[B], the image that each prompt's last token sees, counting those cached in front of it


class Never(LogitsProcessor):
    """One token is never generated. (transformers' `suppress_tokens` compares the whole vocabulary at each step.)"""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token_id] = -torch.inf
        return scores


class FlamingoDecoding(GenerationMixin):
    """What `Flamingo` does beyond one forward pass."""

    def generate(
        self,
        vision_x: Tensor | None = None,
        lang_x: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        media_features: Tensor | None = None,
        allow_media_tokens: bool = False,
        **kwargs,
    ) -> Tensor | ModelOutput:
        """vision_x float[B, M, F, 3, h, w] (or media_features, see `encode_media`), lang_x int64[B, T], padded on the
        left, with its attention_mask -> int64[B * num_return_sequences, T + new]: the prompts and what follows them, up
        to `<|endofchunk|>`.

        kwargs: those of transformers' `generate` (max_new_tokens, num_beams, do_sample, cache_implementation ...) but
        the ones that UNSUPPORTED names. A prompt's hidden states are returned once, not once per beam.
        allow_media_tokens: the text may hold `<image>`; such a token sees the next of the images given, those that pad
        a row included, or none where they are used up.

        Raises ValueError as `forward` does, for padding on the right, and for text longer than the language model has
        positions for.
        """
        self._check_prompts(lang_x, attention_mask)
        for name, instead in UNSUPPORTED.items():
            if kwargs.get(name) is not None or getattr(kwargs.get("generation_config"), name, None) is not None:
                raise ValueError(f"{name} is not supported here: {instead}")
        if "generation_config" not in kwargs:
            new = kwargs.get("max_new_tokens") or self.generation_config.max_new_tokens or 0
            self.check_length(max(lang_x.shape[1] + new, kwargs.get("max_length") or 0))
        with torch.inference_mode(), few_rows_on_all_threads() if self.device.type == "cpu" else nullcontext():
            media, layout = self.prepare_media(lang_x, vision_x, media_features, for_later=allow_media_tokens)
            ends = layout.media_index[:, -1]
            last = None if allow_media_tokens else media.select(ends)
            kwargs["prompt_media"] = PromptMedia(media, last, lang_x.shape[1], ends)
            del media  # so that PromptMedia alone holds it
            if not allow_media_tokens:
                never = Never(self.config.media_token_id)
                kwargs["logits_processor"] = [never, *(kwargs.get("logits_processor") or ())]
            if not kwargs.keys() & NOT_COMPILED:
                kwargs |= self._compiled
            output = super().generate(lang_x, attention_mask=attention_mask, **kwargs)
        if isinstance(output, Tensor):
            return output.clone()  # outside of inference mode, so that training may read it
        output.sequences = output.sequences.clone()
        return output

    def _check_prompts(self, lang_x: Tensor | None, attention_mask: Tensor | None) -> None:
        """What is continued ends in its last token, and needs a cache."""
        check_text(lang_x, attention_mask)
        if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            raise ValueError('prompts must be padded on the left: set tokenizer.padding_side = "left"')
        if self.training and self.gated_cross_attn_layers.gradient_checkpointing:
            raise ValueError("gradient checkpointing leaves no cache in training mode: call model.eval() first")

    def check_length(self, tokens: int) -> None:
        """Raises ValueError for more tokens than the language model has learned positions for."""
        if self.position_limit is not None and tokens > self.position_limit:
            raise ValueError(
                f"the text would have {tokens} tokens, and this language model has positions for {self.position_limit}"
            )

    def prepare_inputs_for_generation(self, input_ids: Tensor, prompt_media: PromptMedia, **kwargs) -> dict:
        """What `forward` is given for the next pass. input_ids int64[R, T] is the whole text, of which the language
        model picks what is new."""
        inputs = self.lang_encoder.prepare_inputs_for_generation(input_ids, **kwargs)
        lang_x = inputs.pop("input_ids")
        new = lang_x.shape[1]
        ends = prompt_media.ends.repeat_interleave(len(input_ids) // len(prompt_media.ends))[:, None]
        if prompt_media.last is not None and input_ids.shape[1] - new >= prompt_media.length:
            prompt_media.all = None
            media, index = prompt_media.last, ends.clamp(max=0).repeat(1, new)
        else:
            media = prompt_media.all
            index = media_index_from_locations(input_ids == self.config.media_token_id)
            index = index + ends - index[:, prompt_media.length - 1 : prompt_media.length]
            index = index.masked_fill(index >= media.count, -1)  # generated, with no image left for it
            index = index[:, -new:].clone(memory_format=torch.contiguous_format)  # growing strides would compile anew
        inputs |= {"lang_x": lang_x, "media": media, "layout": MediaLayout(index, media.count)}
        return self._once_per_prompt(inputs)

    def _once_per_prompt(self, inputs: dict) -> dict:
        """Before the first new token the K rows of a prompt are equal: one of them is enough."""
        cache, layout = inputs.get("past_key_values"), inputs["layout"]
        copies = len(inputs["lang_x"]) // inputs["media"].rows
        if copies == 1 or type(cache) is not DynamicCache or cache.get_seq_length() > 0:
            return inputs
        if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):  # linear attention
            return inputs
        of_rows = {name: inputs.get(name) for name in ("lang_x", "attention_mask", "position_ids")}
        one = {name: each[::copies] for name, each in of_rows.items() if isinstance(each, Tensor)}
        one["layout"] = MediaLayout(layout.media_index[::copies], layout.num_media)
        return inputs | one | {"copies": copies}

    def compile_decode(self, backend: str = "inductor") -> None:
        """From now on `generate` keeps its cache in preallocated memory and runs compiled decoding steps: CUDA graphs
        on a GPU. The first call compiles, for a minute or so, as does one with more rows or a longer text than any
        before. Raises ValueError where transformers says that the language model cannot be compiled."""
        if not self.lang_encoder._can_compile_fullgraph:
            raise ValueError(f"{type(self.lang_encoder).__name__} cannot be compiled as one graph: generate without it")
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        config = CompileConfig(fullgraph=True, mode=mode, backend=backend)
        config._compile_all_devices = True  # transformers compiles on GPUs alone otherwise
        self._compiled = {"cache_implementation": "static", "compile_config": config}

    def score_sequences(
        self,
        vision_x: Tensor | None,
        lang_x: Tensor,
        continuations: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        media_features: Tensor | None = None,
        at_once: int = 16,
    ) -> Tensor:
        """Log-likelihoods float32[B, N] of N continuations (int64[n] each, n > 0) behind each of B prompts, summed over
        their tokens. The prompt is read once, `at_once` continuations together. Raises ValueError for an empty one.
        """
        self._check_prompts(lang_x, attention_mask)
        if not isinstance(continuations, list | tuple) or not continuations or not all(map(is_text, continuations)):
            raise ValueError("continuations must be a sequence of tensors int64[n], none of them empty")
        if at_once < 1:
            raise ValueError(f"at_once must be 1 or more; got {at_once}")
        with torch.inference_mode():
            mask = torch.ones_like(lang_x) if attention_mask is None else attention_mask
            show_more = any(bool((each == self.config.media_token_id).any()) for each in continuations)
            media, layout = self.prepare_media(lang_x, vision_x, media_features, for_later=show_more)
            prompt = {"lang_x": lang_x, "attention_mask": mask, "media": media, "layout": layout}
            output = self(**prompt, use_cache=True, logits_to_keep=1)
            scores = [
                self._score_behind(prompt, output, continuations[start : start + at_once])
                for start in range(0, len(continuations), at_once)
            ]
        return torch.cat(scores, dim=1)

    def _score_behind(self, prompt: dict, output: ModelOutput, continuations: Sequence[Tensor]) -> Tensor:
        """-> float32[B, K]. Reads a copy of the prompt's cache, so that none sees another, and no token for whose
        successor nobody asks."""
        mask, media, count = prompt["attention_mask"], prompt["media"], len(continuations)
        batch = len(mask)
        ids = pad_sequence(list(continuations), batch_first=True, padding_value=-1).to(mask.device).repeat(batch, 1)
        real, logits = ids >= 0, output.logits[:, -1:].repeat_interleave(count, 0)
        index = prompt["layout"].media_index[:, -1:].repeat_interleave(count, 0)
        index = index + (ids == self.config.media_token_id).cumsum(-1)
        layout = MediaLayout.from_index(index, media.count)
        if ids.shape[1] > 1:
            cache = copy.deepcopy(output.past_key_values)
            cache.batch_repeat_interleave(count)
            behind = self(
                lang_x=ids[:, :-1].clamp(min=0),
                attention_mask=torch.cat((mask.repeat_interleave(count, 0), real[:, :-1].to(mask.dtype)), dim=1),
                past_key_values=cache,
                use_cache=True,
                media=media,
                layout=MediaLayout(layout.media_index[:, :-1], media.count),
            )
            logits = torch.cat((logits, behind.logits), dim=1)
        chosen = logits.float().log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None]).squeeze(-1)
        return (chosen * real).sum(-1).view(batch, count)

    @torch.inference_mode()
    def speculative_target(
        self, vision_x: Tensor | None, lang_x: Tensor, *, media_features: Tensor | None = None
    ) -> tuple[Tensor, Scorer]:
        """Reads one prompt int64[1, T] -> the logits float[1, V] behind it, and the model as the target of
        `speculative_decoding.speculate`, with any of its drafts. Forbid it the `<image>` token, and its greedy words
        are those of `generate`. (`generate` itself takes transformers' prompt_lookup_num_tokens.)

        Raises ValueError for several prompts, whose rows would accept different numbers of guesses.
        """
        self._check_prompts(lang_x, None)
        if len(lang_x) != 1:
            raise ValueError(f"one prompt at a time: its cache is cut to what was accepted; got {len(lang_x)} rows")
        media, layout = self.prepare_media(lang_x, vision_x, media_features)
        last, index = media.select(layout.media_index[:, -1]), layout.media_index[:, -1:].clamp(max=0)
        prompt = self(lang_x=lang_x, media=media, layout=layout, use_cache=True, logits_to_keep=1)
        cache = prompt.past_key_values

        def target(tokens: Tensor, start: Tensor) -> Tensor:
            if (refused := cache.get_seq_length() - int(start)) > 0:
                cache.crop(-refused)
            seen = MediaLayout(index.expand_as(tokens), 1)
            return self(lang_x=tokens, media=last, layout=seen, past_key_values=cache, use_cache=True).logits

        return prompt.logits[:, -1], target

    def _adopt_generation_config(self) -> None:
        """The language model's own defaults, ending at `<|endofchunk|>`, and with a cache whatever its config says."""
        config = copy.deepcopy(self.lang_encoder.generation_config)
        config.eos_token_id, config.use_cache = self.config.eoc_token_id, True
        if config.pad_token_id is None:
            config.pad_token_id = self.config.eoc_token_id
        self.generation_config = config


def check_text(lang_x: Tensor | None, attention_mask: object | None, before: int = 0) -> None:
    """Raises ValueError unless lang_x is int64[B, T], neither of them 0, and a mask of two axes covers it and the
    `before` tokens in front of it."""
    fits = isinstance(lang_x, Tensor) and lang_x.dim() == 2 and lang_x.numel() > 0
    if not fits or lang_x.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lang_x must be int64[B, T], T > 0; got {described(lang_x)}")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        expected = [len(lang_x), before + lang_x.shape[1]]
        if list(attention_mask.shape) != expected:
            raise ValueError(f"attention_mask must be {expected} here; got shape {list(attention_mask.shape)}")


def is_text(tokens: object) -> bool:
    return isinstance(tokens, Tensor) and tokens.dim() == 1 and tokens.numel() > 0 and tokens.dtype == torch.int64


def described(value: object) -> str:
    if not isinstance(value, Tensor):
        return "None" if value is None else f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
