"""A language model that reads visual tokens: everything of Flamingo behind the resampler (Alayrac et al. 2022, section
2.2).

Gated cross-attention stands before the layers of a `CausalLanguageModel`. Cross-attention keys and values are projected
once per image, and decoding reads only those of each row's current image, so a generated token costs the same with 1
image in the prompt as with 33.

Legend: B batch, T text tokens, M images per sequence, L visual tokens per image, D visual width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from attention_layers import MediaKV
from gated_cross_attention import GatedCrossAttentionBlock
from language_model import CausalLanguageModel, LanguageModelCache
from media_masks import MediaLayout
from token_sampling import choose_token


class TextConfig(Protocol):
    """The sizes that concern the text half; see `MiniFlamingoConfig`."""

    vision_dim: int
    vocabulary_size: int
    dim: int
    depth: int
    heads: int
    cross_attn_every_n_layers: int
    cross_heads: int
    cross_dim_head: int
    attention_gain: float
    pad_token_id: int
    image_token_id: int
    eoc_token_id: int


@dataclass
class DecodingState:
    """What decoding carries from token to token: the text cache, each gated layer's keys and values of the one image
    that each row now sees (M = 1), and the layout that says which rows see one at all."""

    cache: LanguageModelCache
    media_kv: list[MediaKV | None]
    layout: MediaLayout


class ConditionedLanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.language_model = CausalLanguageModel(config.vocabulary_size, config.dim, config.depth, config.heads)
        self.gated_layers = nn.ModuleDict(
            {
                str(i): GatedCrossAttentionBlock(
                    config.dim, config.vision_dim, config.cross_dim_head, config.cross_heads
                )
                for i in range(config.depth)
                if (i + 1) % config.cross_attn_every_n_layers == 0
            }
        )
        for block in self.gated_layers.values():
            sharpen(block.attn, config.attention_gain)

    def project_media(self, media: Tensor) -> list[MediaKV | None]:
        """Visual tokens float[B, M, L, D] -> per language-model layer, its gated block's keys and values or None."""
        blocks = (self._gated(i) for i in range(self.config.depth))
        return [block and block.project_media(media) for block in blocks]

    def layout(self, input_ids: Tensor, num_media: int) -> MediaLayout:
        """Raises ValueError where a row has more <image> tokens than there are images."""
        return MediaLayout.from_locations(input_ids == self.config.image_token_id, num_media)

    def forward(self, input_ids: Tensor, media: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids int64[B, T] with one <image> per image, and the images' visual tokens float[B, M, L, D] -> logits
        float[B, T, V]. attention_mask bool[B, T] is false at padding."""
        self._check(input_ids, media)
        read_images = self._reader(self.project_media(media), self.layout(input_ids, media.shape[1]))
        return self.language_model(input_ids, attention_mask, before_layer=read_images)

    def prefill(self, input_ids: Tensor, media: Tensor, slots: int) -> tuple[Tensor, DecodingState]:
        """Reads the prompt (padded on the left) -> the next token's logits float[B, V], and a state with room for
        `slots` tokens, the prompt's included."""
        self._check(input_ids, media)
        cache = self.language_model.allocate_cache(len(input_ids), slots)
        media_kv = self.project_media(media)
        layout = self.layout(input_ids, media.shape[1])
        logits = self.language_model(
            input_ids, input_ids != self.config.pad_token_id, cache, self._reader(media_kv, layout), last_only=True
        )
        current = layout.media_index[:, -1]
        state = DecodingState(
            cache,
            [kv and kv.select(current) for kv in media_kv],
            MediaLayout(current.clamp(max=0)[:, None], num_media=1),
        )
        return logits[:, 0], state

    def decode(self, tokens: Tensor, state: DecodingState, start: Tensor | None = None) -> Tensor:
        """Appends tokens int64[B, T] (no <image> among them) -> logits float[B, T, V]. start int64[B]: the slot of each
        row's first token, behind the last one or before it; whatever stood there and further on is forgotten."""
        if start is not None:
            state.cache.length.copy_(start)
        seen = state.layout.media_index.expand(-1, tokens.shape[1])
        read_images = self._reader(state.media_kv, MediaLayout(seen, num_media=1))
        return self.language_model(tokens, cache=state.cache, before_layer=read_images)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        media: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues prompts int64[B, T], padded on the left -> int64[B, at most max_new_tokens], the new tokens alone.

        A row ends at the end-of-chunk token, which it keeps, and is padded behind it. Neither padding nor <image> is
        ever chosen: a new image cannot come out of text. Raises ValueError as `forward` and `choose_token` do.
        """
        config = self.config
        check_prompts(input_ids, config.pad_token_id, max_new_tokens)
        logits, state = self.prefill(input_ids, media, input_ids.shape[1] + max_new_tokens)
        forbidden = torch.tensor([config.pad_token_id, config.image_token_id], device=input_ids.device)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens = []
        while True:
            logits = logits.index_fill(-1, forbidden, float("-inf"))
            token = choose_token(logits, temperature, top_k, top_p, generator).where(~ended, config.pad_token_id)
            tokens.append(token)
            ended |= token == config.eoc_token_id
            if len(tokens) == max_new_tokens or ended.all():
                return torch.stack(tokens, dim=1)
            logits = self.decode(token[:, None], state)[:, -1]

    def first_layers(self, depth: int) -> "ConditionedLanguageModel":
        """The model that ends after its first `depth` layers, sharing their weights. Raises ValueError for a depth that
        it does not have."""
        if not 1 <= depth <= self.config.depth:
            raise ValueError(f"depth must be between 1 and {self.config.depth}; got {depth}")
        shallow = ConditionedLanguageModel(replace(self.config, depth=depth)).requires_grad_(False)
        shallow.language_model.embedding, shallow.language_model.norm = (
            self.language_model.embedding,
            self.language_model.norm,
        )
        shallow.language_model.layers = self.language_model.layers[:depth]
        shallow.gated_layers = nn.ModuleDict({i: block for i, block in self.gated_layers.items() if int(i) < depth})
        return shallow.train(self.training)

    def _gated(self, layer: int) -> GatedCrossAttentionBlock | None:
        name = str(layer)
        return self.gated_layers[name] if name in self.gated_layers else None

    def _check(self, input_ids: Tensor, media: Tensor) -> None:
        if media.dim() != 4 or not media.shape[1]:
            raise ValueError(f"there must be media float[B, M, L, D] with M at least 1; got shape {list(media.shape)}")
        if input_ids.dim() != 2 or len(input_ids) != len(media):
            raise ValueError(f"input_ids must be [B, T] with one row for each of {len(media)} rows of images; "
                             f"got shape {list(input_ids.shape)}")  # fmt: skip

    def _reader(self, media_kv: list[MediaKV | None], layout: MediaLayout) -> Callable[[int, Tensor], Tensor]:
        def read_images(layer: int, x: Tensor) -> Tensor:
            block = self._gated(layer)
            return x if block is None else block(x, media_kv[layer], layout)

        return read_images


def check_prompts(input_ids: Tensor, pad_token_id: int, max_new_tokens: int) -> None:
    """Raises ValueError for prompts that end in padding, empty ones, and for no token to generate."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not input_ids.numel() or (input_ids[:, -1] == pad_token_id).any():
        raise ValueError("every prompt must end in a token to continue: pad prompts on the left")


def sharpen(attention: nn.Module, gain: float) -> None:
    """Scales the initial queries and keys of an attention that reads images: sharper, so sooner useful."""
    with torch.no_grad():
        attention.to_q.weight *= gain
        attention.to_kv.weight[: attention.inner] *= gain
