"""Tiny full-size models: a random language model of every family, a random vision encoder, Flamingo around them."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo_vlm.model import Flamingo
from laws import randomized

VOCAB, EOC, MEDIA, PAD = 40, 37, 38, 39
PATCHES, VIS_DIM = 5, 12
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA_LIKE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
MPT_LIKE = {"vocab_size": VOCAB, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}

# model_type -> its config's arguments. No dropout anywhere, and no special tokens outside the tiny vocabulary.
FAMILIES = {
    "opt": SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": PAD},
    "gpt_neox": SIZES | {"intermediate_size": 48, "max_position_embeddings": 64},
    "llama": LLAMA_LIKE,
    "mpt": MPT_LIKE,
    "mosaic_gpt": MPT_LIKE,
    "gptj": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 2]],
    },
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | {"head_dim": 8},
    "gemma": LLAMA_LIKE | {"head_dim": 8},
    "phi": LLAMA_LIKE,
}


def tiny_language_model(family: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD}
    config = AutoConfig.for_model(family, **(special | FAMILIES[family] | changes))
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config).eval()


class TinyVision(nn.Module):
    """float[N, 3, 4, 5] -> patch features float[N, 5, VIS_DIM]: every column of pixels is a patch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, VIS_DIM)
        self._count = {"images": 0}  # as a number, it would be taken for a setting of the encoder, which keys a cache

    @property
    def images_seen(self) -> int:
        return self._count["images"]

    @images_seen.setter
    def images_seen(self, count: int) -> None:
        self._count["images"] = count

    def forward(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        return self.embed(images.permute(0, 3, 1, 2).flatten(2))


def tiny_flamingo(
    family: str = "llama", every: int = 2, language_model: nn.Module | None = None, **options
) -> Flamingo:
    """Gates open, weights large enough that every part matters."""
    lm = language_model if language_model is not None else tiny_language_model(family)
    torch.manual_seed(1)
    options = {"num_latents": 3, "resampler_depth": 1} | options
    model = Flamingo(TinyVision(), lm, EOC, MEDIA, VIS_DIM, every, **options)
    for part in (model.perceiver, model.gated_cross_attn_layers, model.vision_encoder):
        randomized(part)
    return model.eval()


def pictures(rows: int, images: int, seed: int = 0, frames: int = 1) -> Tensor:
    """float[rows, images, frames, 3, 4, 5]"""
    return torch.randn(rows, images, frames, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def exact_flamingo(family: str = "llama", every: int = 2, **options) -> Flamingo:
    """All weights drawn by the dice, the language model's too, so that its text is varied; in float64, or in the widest
    precision that the family itself computes in."""
    lm = randomized(tiny_language_model(family))
    return tiny_flamingo(family, every, lm, **options).to(torch.float32 if family == "mpt" else torch.float64)


def assert_close(ours: object, theirs: object) -> None:
    """Equal up to rounding. In float64 the loosest are GPT-J and GPT-Neo, which round their attention to float32."""
    example = next(iter(ours.values())) if isinstance(ours, dict) else ours
    slack = 1e-8 if example.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack)


def prompts(*rows: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One row for each picture of one, i an `<image>`, . a word -> ids int64[B, T] padded on the left, their mask."""
    words = torch.Generator().manual_seed(seed)
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for row, marks in enumerate(rows):
        for place, mark in enumerate(marks, start=length - len(marks)):
            ids[row, place] = MEDIA if mark == "i" else torch.randint(2, EOC, (), generator=words)
            mask[row, place] = 1
    return ids, mask
