"""What is trained and shipped beside a Mini Flamingo, for the optimizations that need learned parts.

    coarse_to_fine.safetensors  a resampler in which depth buys quality; it takes the place of the plain one
    exit_heads.safetensors      for it: the risk of leaving after each layer
    count_head.safetensors      from an image's patches: the risk of computing only 4, 8, 16, 24 or 32 visual tokens
    draft.safetensors           a language model of two layers that reads the same visual tokens and drafts in parallel
    text_draft.safetensors      the same without images
    thresholds.json             for both kinds of head: the thresholds that keep a budget, by budget
    token_reader.safetensors    the resampler's warm-up decoder (made by train_mini_flamingo.py)

`python train_companions.py` makes them. All but the last are kept in bfloat16, for the bytes, and used in float32.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from adaptive_resampler import CoarseToFineResampler
from conditioned_language_model import ConditionedLanguageModel, sharpen
from confidence_head import RiskHead
from mini_flamingo import MiniFlamingoConfig
from mini_flamingo_checkpoint import SHIPPED, load_weights
from reporting import read_json
from token_reader import QueryGroup, TokenReader

GRIDS = (3, 4, 5, 10)  # what each layer of the coarse-to-fine resampler sees; the patches are 10 x 10
CHEAP_COUNTS = (4, 8, 16, 24, 32)  # visual tokens, instead of all 64
DRAFT_DEPTH = 2
BUDGETS = (0.0025, 0.005, 0.01, 0.02)  # shares of the answers that a choice of the heads may lose


def coarse_to_fine(config: MiniFlamingoConfig) -> CoarseToFineResampler:
    resampler = CoarseToFineResampler(
        config.vision_dim, GRIDS, config.resampler_dim_head, config.resampler_heads, config.num_latents
    )
    for attention, _ in resampler.layers:
        sharpen(attention, config.attention_gain)
    return resampler


def exit_heads(config: MiniFlamingoConfig) -> nn.ModuleList:
    return nn.ModuleList(RiskHead(config.vision_dim, ways=1) for _ in GRIDS[1:])


def count_head(config: MiniFlamingoConfig) -> RiskHead:
    return RiskHead(config.vision_dim, ways=len(CHEAP_COUNTS))


def draft(config: MiniFlamingoConfig) -> ConditionedLanguageModel:
    return ConditionedLanguageModel(replace(config, depth=DRAFT_DEPTH))


def text_draft(config: MiniFlamingoConfig) -> ConditionedLanguageModel:
    """Without gated layers: it never sees an image."""
    return ConditionedLanguageModel(replace(config, depth=DRAFT_DEPTH, cross_attn_every_n_layers=DRAFT_DEPTH + 1))


def token_reader(config: MiniFlamingoConfig, reading: Mapping[str, QueryGroup]) -> TokenReader:
    return TokenReader(config.vision_dim, reading)


def thresholds(folder: Path = SHIPPED) -> dict:
    """{"scenes": how many they were set on, "exits": {number of latents: {budget: threshold}}, "counts": {budget:
    threshold}}, numbers as text. Raises ValueError where the file is missing or damaged."""
    path = folder / "thresholds.json"
    if not path.exists():
        raise ValueError(f"{folder.name}/{path.name} is missing: python train_companions.py makes it")
    return read_json(path)


def load(module: nn.Module, name: str, folder: Path = SHIPPED) -> nn.Module:
    """Fills a module made by the functions above with the weights of {folder}/{name}.safetensors; frozen, in eval
    mode. Raises ValueError where they are missing, damaged or another module's."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        script = "train_mini_flamingo.py" if name == "token_reader" else "train_companions.py"
        raise ValueError(
            f"{path.parent.name}/{path.name} is missing: python {script} makes it, for the shapes model"
        )
    load_weights(path, module)
    return module.requires_grad_(False).eval()
