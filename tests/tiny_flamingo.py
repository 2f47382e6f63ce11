"""A Mini Flamingo of a few thousand parameters with opened gates: closed ones would hide every mistake about images."""

from dataclasses import replace

import torch
from torch import Tensor

from laws import randomized
from mini_flamingo import MiniFlamingo, preset

TINY = replace(
    preset("shapes"),
    image_size=16,
    vision_dim=80,
    vision_depth=1,
    vision_heads=2,
    num_latents=6,
    resampler_depth=2,
    resampler_heads=2,
    resampler_dim_head=8,
    vocabulary_size=20,
    dim=32,
    depth=3,
    heads=2,
    cross_heads=2,
    cross_dim_head=8,
)
PAD, IMAGE, EOC = TINY.pad_token_id, TINY.image_token_id, TINY.eoc_token_id


def set_gates(model: MiniFlamingo, value: float) -> MiniFlamingo:
    with torch.no_grad():
        for block in model.gated_layers.values():
            block.attn_gate.fill_(value)
            block.ff_gate.fill_(value)
    return model


def tiny_flamingo(gate: float = 0.5, **changes: object) -> MiniFlamingo:
    """Random weights everywhere (also in the norms), all gates at `gate`."""
    return set_gates(randomized(MiniFlamingo(replace(TINY, **changes))), gate).eval()


def random_images(*leading: int, size: int = TINY.image_size) -> Tensor:
    return torch.randint(0, 256, (*leading, 3, size, size), dtype=torch.uint8)
