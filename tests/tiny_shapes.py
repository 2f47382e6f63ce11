"""A tiny random Mini Flamingo in the words and images of the shapes world. It knows nothing, but what it says depends
on the prompt and on the image, so a mistake about either shows."""

import torch

from mini_flamingo import MiniFlamingo
from shapes_texts import VOCABULARY
from shapes_world import IMAGE_SIZE
from tiny_flamingo import tiny_flamingo


def talkative_flamingo(gate: float = 2.0) -> MiniFlamingo:
    """With the shipped model's latents and resampler depth. Always the same weights, in the default dtype."""
    torch.manual_seed(1)
    sizes = {"image_size": IMAGE_SIZE, "num_latents": 64, "resampler_depth": 4, "vocabulary_size": len(VOCABULARY)}
    model = tiny_flamingo(gate, **sizes)
    with torch.no_grad():
        model.language_model.embedding.weight *= 0.1  # embeddings that say themselves would repeat the last word
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # and these would say the same whatever stands in front
                parameter.zero_()
            if "to_q." in name or "to_kv." in name:  # sharper attention: one image is no longer like another
                parameter *= 2
    return model
