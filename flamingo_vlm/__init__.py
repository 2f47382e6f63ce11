"""The full-size model: a pretrained CLIP tower and a pretrained causal language model, joined as in Flamingo.

What OpenFlamingo does, on today's torch and transformers:

    from flamingo_vlm import create_model_and_transforms, load_openflamingo_checkpoint
"""

from flamingo_vlm import mosaic_gpt  # noqa: F401 (makes the model type `mosaic_gpt` known to transformers)
from flamingo_vlm.configuration import FlamingoConfig
from flamingo_vlm.model import Flamingo

__all__ = ["Flamingo", "FlamingoConfig"]
