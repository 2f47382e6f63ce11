"""Mini Flamingo: the whole architecture at a size that trains on a CPU (Alayrac et al. 2022, figure 3).

    images --VisionEncoder--> patches --PerceiverResampler--> visual tokens --+
                                                                              | gated cross-attention before LM layers
    text ------------------------------------------------> CausalLanguageModel +--> logits

The vision encoder and the language model are frozen; the resampler and the gated blocks learn. The half behind the
visual tokens, from prompts to generated text, is `ConditionedLanguageModel`'s.

Left out: everything that makes it faster than this plain form. See the modules of the seven optimizations.

Legend: B batch, T text tokens, M images per sequence, F frames, L visual tokens per image, D visual width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conditioned_language_model import ConditionedLanguageModel, sharpen
from perceiver_resampler import PerceiverResampler
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


class MiniFlamingo(ConditionedLanguageModel):
    def __init__(self, config: MiniFlamingoConfig):
        # Drawn first, as an image comes first: the seed's random weights then stay what they always were.
        vision_encoder = VisionEncoder(
            config.image_size, config.patch_size, config.vision_dim, config.vision_depth, config.vision_heads
        )
        resampler = PerceiverResampler(
            config.vision_dim,
            config.resampler_depth,
            config.resampler_dim_head,
            config.resampler_heads,
            config.num_latents,
        )
        super().__init__(config)
        self.vision_encoder, self.resampler = vision_encoder, resampler
        for name in ("language_model", "gated_layers"):  # behind them, in the order of figure 3
            self._modules[name] = self._modules.pop(name)
        for attention, _ in self.resampler.layers:
            sharpen(attention, config.attention_gain)

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

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | None = None,
        media: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `ConditionedLanguageModel.forward`, from either images or their visual tokens (`encode_media`)."""
        return super().forward(input_ids, self._media(images, media), attention_mask)

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
        """As `ConditionedLanguageModel.generate`, from either images or their visual tokens."""
        media = self._media(images, media)
        return super().generate(input_ids, media, max_new_tokens, temperature, top_k, top_p, generator)

    def _media(self, images: Tensor | None, media: Tensor | None) -> Tensor:
        if (images is None) == (media is None):
            raise ValueError("give exactly one of images and media; for text alone call language_model")
        return self.encode_media(images) if media is None else media


def parameter_table(model: nn.Module) -> list[dict[str, str | int]]:
    """One row per part: total, frozen and trained parameters; the last row sums up."""
    rows = []
    for name, part in (*model.named_children(), ("total", model)):
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        rows.append({"part": name, "total": total, "frozen": total - trained, "trained": trained})
    return rows
