"""OpenFlamingo 2.0.1 itself, around any language model of transformers: the reference for behaviour and for files.

`import open_flamingo` also imports its factory, and that needs open_clip. Its model needs neither, so the folders `src`
and `train` are loaded under package names of their own. The few lines of the factory that matter are written here:
its mixin, the list of decoder layers, and what is frozen.
"""

import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor, nn

from tiny_vlm import EOC, MEDIA, VIS_DIM


def open_flamingo_module(name: str) -> ModuleType:
    """One of its modules, such as "src.flamingo" or "train.train_utils". Skips the test where it is not installed."""
    package = importlib.util.find_spec("open_flamingo")
    if package is None:
        pytest.skip("open-flamingo is not installed")
    folder, _, module = name.partition(".")
    stand_in = f"open_flamingo_{folder}"
    if stand_in not in sys.modules:
        sys.modules[stand_in] = ModuleType(stand_in)
        sys.modules[stand_in].__path__ = [str(Path(package.submodule_search_locations[0]) / folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # imported there; nothing that is used here calls it
        return importlib.import_module(f"{stand_in}.{module}")


class _Visual(nn.Module):
    """Their vision encoder returns (pooled, patch features)."""

    def __init__(self, vision: nn.Module):
        super().__init__()
        self.vision = vision

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        return None, self.vision(images)


class _OpenClip(nn.Module):
    """Theirs is an open_clip model, of which `visual` is the image half."""

    def __init__(self, vision: nn.Module):
        super().__init__()
        self.visual = _Visual(vision)


def reference_flamingo(
    lang_encoder: nn.Module, vision: nn.Module, every: int, decoder_layers_attr_name: str, **options
) -> nn.Module:
    """Their Flamingo around copies of both models, frozen where their factory freezes it. vision maps
    float[N, 3, h, w] to float[N, P, VIS_DIM]; options are their Flamingo's. Their resampler always has 64 latents and 6
    layers. Skips the test where the package is not installed."""
    flamingo, mixin = open_flamingo_module("src.flamingo"), open_flamingo_module("src.flamingo_lm").FlamingoLMMixin
    lang_encoder = copy.deepcopy(lang_encoder)
    open_flamingo_module("src.utils").extend_instance(lang_encoder, mixin)
    lang_encoder.set_decoder_layers_attr_name(decoder_layers_attr_name)
    clip = _OpenClip(copy.deepcopy(vision))
    settings = {"eoc_token_id": EOC, "media_token_id": MEDIA, "vis_dim": VIS_DIM}
    model = flamingo.Flamingo(clip, lang_encoder, cross_attn_every_n_layers=every, **(settings | options))
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return model


def saved_by_open_flamingo(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that their training saves of their model."""
    return open_flamingo_module("train.train_utils").filter_state_dict_to_trainable(model, model.state_dict())
