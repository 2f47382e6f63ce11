"""Mini Flamingo: the whole architecture at a size that trains on a CPU (Alayrac et al. 2022, figure 3).

    images --VisionEncoder--> patches --PerceiverResampler--> visual tokens --+
                                                                              | gated cross-attention before LM layers
    text ------------------------------------------------> CausalLanguageModel +--> logits

The vision encoder and the language model are frozen; the resampler and the gated blocks learn. Cross-attention keys and
values are projected once per image, and decoding reads only those of each row's current image, so a generated token
costs the same with 1 image in the prompt as with 33.

Left out: everything that makes it faster than this plain form. See the modules of the seven optimizations.

Legend: B batch, T text tokens, M images per sequence, F frames, L visual tokens per image, D visual width, V
vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_layers import MediaKV
from gated_cross_attention import GatedCrossAttentionBlock
from language_model import CausalLanguageModel, LanguageModelCache
from media_masks import MediaLayout
from perceiver_resampler import PerceiverResampler
from token_sampling import choose_token
from vision_encoder import VisionEncoder


@dataclass(frozen=True)
class MiniFlamingoConfig:
    """All sizes of a Mini Flamingo. The defaults are the trained one's (preset "shapes")."""

    image_size: int = 80  # pixels a side
    patch_size: int = 8
    vision_dim: int = 192  # width of patch features and visual tokens, 64 of them the patch's position
    vision_depth: int = 3
    vision_heads: int = 4
    num_latents: int = 64  # visual tokens per image
    resampler_depth: int = 4
    resampler_heads: int = 8
    resampler_dim_head: int = 32
    vocabulary_size: int = 93
    dim: int = 192  # language model width
    depth: int = 4
    heads: int = 6
    cross_attn_every_n_layers: int = 1  # a gated block before layer i where (i + 1) % n == 0
    cross_heads: int = 8
    cross_dim_head: int = 32
    attention_gain: float = 2.0  # initial scale of the queries and keys that read images: sharper, so sooner useful
    pad_token_id: int = 0
    image_token_id: int = 1
    eoc_token_id: int = 2  # end of chunk


PRESETS = {
    # trained and shipped: 6.5 million parameters
    "shapes": MiniFlamingoConfig(),
    # the dimensions of the paper exploration: 512 wide, 576 patches, 3 gated layers. For timing.
    "paper": MiniFlamingoConfig(
        image_size=384, patch_size=16, vision_dim=512, vision_depth=4, vision_heads=7, resampler_dim_head=64,
        vocabulary_size=1000, dim=512, depth=6, heads=8, cross_attn_every_n_layers=2, cross_dim_head=64,
    ),
    # a language model of GPT-2's size behind a vision tower of ViT-B's. For timing.
    "gpt2": MiniFlamingoConfig(
        image_size=224, patch_size=16, vision_dim=768, vision_depth=12, vision_heads=11, resampler_depth=6,
        resampler_dim_head=64, vocabulary_size=50257, dim=768, depth=12, heads=12, cross_dim_head=64,
    ),
}  # fmt: skip


def preset(name: str) -> MiniFlamingoConfig:
    """Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass
class DecodingState:
    """What decoding carries from token to token: the text cache, each gated layer's keys and values of the one image
    that each row now sees (M = 1), and the layout that says which rows see one at all."""

    cache: LanguageModelCache
    media_kv: list[MediaKV | None]
    layout: MediaLayout


class MiniFlamingo(nn.Module):
    def __init__(self, config: MiniFlamingoConfig):
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(
            config.image_size, config.patch_size, config.vision_dim, config.vision_depth, config.vision_heads
        )
        self.resampler = PerceiverResampler(
            config.vision_dim,
            config.resampler_depth,
            config.resampler_dim_head,
            config.resampler_heads,
            config.num_latents,
        )
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
        for attention in (
            *(layer[0] for layer in self.resampler.layers),
            *(g.attn for g in self.gated_layers.values()),
        ):
            _sharpen(attention, config.attention_gain)

    def freeze_pretrained(self) -> "MiniFlamingo":
        """The paper's recipe: vision encoder and language model keep their weights; the rest learns."""
        self.vision_encoder.requires_grad_(False)
        self.language_model.requires_grad_(False)
        return self

    def encode_media(self, images: Tensor, num_latents: int | None = None, depth: int | None = None) -> Tensor:
        """Images uint8 (or float in [0, 1]) [B, M, 3, h, w], or [B, M, F, 3, h, w] -> visual tokens float[B, M, L,
        D]."""
        if images.dim() not in (5, 6):
            raise ValueError(f"images must be [B, M, 3, h, w] or [B, M, F, 3, h, w]; got shape {list(images.shape)}")
        leading = images.shape[:-3]
        patches = self.vision_encoder(images.flatten(0, -4)).unflatten(0, leading)
        return self.resampler(patches, num_latents, depth)

    def project_media(self, media: Tensor) -> list[MediaKV | None]:
        """Visual tokens float[B, M, L, D] -> per language-model layer, its gated block's keys and values or None."""
        blocks = (self._gated(i) for i in range(self.config.depth))
        return [block and block.project_media(media) for block in blocks]

    def layout(self, input_ids: Tensor, num_media: int) -> MediaLayout:
        """Raises ValueError where a row has more <image> tokens than there are images."""
        return MediaLayout.from_locations(input_ids == self.config.image_token_id, num_media)

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        media: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """input_ids int64[B, T] with one <image> per image, and either images or their visual tokens (`encode_media`)
        -> logits float[B, T, V]. attention_mask bool[B, T] is false at padding."""
        media = self._media(images, media, input_ids)
        read_images = self._reader(self.project_media(media), self.layout(input_ids, media.shape[1]))
        return self.language_model(input_ids, attention_mask, before_layer=read_images)

    def prefill(self, input_ids: Tensor, media: Tensor, slots: int) -> tuple[Tensor, DecodingState]:
        """Reads the prompt (padded on the left) -> the next token's logits float[B, V], and a state with room for
        `slots` tokens, the prompt's included."""
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

    def decode(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Appends tokens int64[B, T] (no <image> among them) -> logits float[B, T, V]."""
        seen = state.layout.media_index.expand(-1, tokens.shape[1])
        read_images = self._reader(state.media_kv, MediaLayout(seen, num_media=1))
        return self.language_model(tokens, cache=state.cache, before_layer=read_images)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        media: Tensor | None = None,
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
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        if not input_ids.numel() or (input_ids[:, -1] == self.config.pad_token_id).any():
            raise ValueError("every prompt must end in a token to continue: pad prompts on the left")
        config = self.config
        media = self._media(images, media, input_ids)
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

    def _gated(self, layer: int) -> GatedCrossAttentionBlock | None:
        name = str(layer)
        return self.gated_layers[name] if name in self.gated_layers else None

    def _media(self, images: Tensor | None, media: Tensor | None, input_ids: Tensor) -> Tensor:
        if (images is None) == (media is None):
            raise ValueError("give exactly one of images and media; for text alone call language_model")
        media = self.encode_media(images) if media is None else media
        if media.dim() != 4 or not media.shape[1]:
            raise ValueError(f"there must be media float[B, M, L, D] with M at least 1; got shape {list(media.shape)}")
        if input_ids.dim() != 2 or len(input_ids) != len(media):
            raise ValueError(f"input_ids must be [B, T] with one row for each of {len(media)} rows of images; "
                             f"got shape {list(input_ids.shape)}")  # fmt: skip
        return media

    def _reader(self, media_kv: list[MediaKV | None], layout: MediaLayout) -> Callable[[int, Tensor], Tensor]:
        def read_images(layer: int, x: Tensor) -> Tensor:
            block = self._gated(layer)
            return x if block is None else block(x, media_kv[layer], layout)

        return read_images


def _sharpen(attention: nn.Module, gain: float) -> None:
    with torch.no_grad():
        attention.to_q.weight *= gain
        attention.to_kv.weight[: attention.inner] *= gain


def parameter_table(model: nn.Module) -> list[dict[str, str | int]]:
    """One row per part: total, frozen and trained parameters; the last row sums up."""
    rows = []
    for name, part in (*model.named_children(), ("total", model)):
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        rows.append({"part": name, "total": total, "frozen": total - trained, "trained": trained})
    return rows
