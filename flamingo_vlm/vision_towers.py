"""Pretrained vision towers: images in, patch features out; and the image transform that belongs to each.

Flamingo's resampler reads the patch features of a frozen vision encoder (Alayrac et al. 2022, section 2.1).
OpenFlamingo's weights expect CLIP's features as they leave its last layer: in front of the final layer norm, without
the class token. A tower therefore keeps nothing that stands behind its layers, and nothing of a text half.

OpenFlamingo names a tower by open_clip's pair of names; `tower_name` gives the Hugging Face repository that holds the
same weights. The activation (QuickGELU for OpenAI's weights) is part of that repository's config. Left out: training
transforms, which augment. A tower of another family needs no class from here: any module that maps
float[N, 3, h, w] to float[N, P, D] can be the vision encoder.

Legend: N images, h and w pixels, P patches, D width of the tower.
"""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

# (model, weights) as open_clip names them -> the repository with the same weights for transformers
TOWERS = {
    ("ViT-B-32", "openai"): "openai/clip-vit-base-patch32",
    ("ViT-B-16", "openai"): "openai/clip-vit-base-patch16",
    ("ViT-L-14", "openai"): "openai/clip-vit-large-patch14",
    ("ViT-L-14-336", "openai"): "openai/clip-vit-large-patch14-336",
    ("ViT-B-32", "laion2b_s34b_b79k"): "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ("ViT-B-16", "laion2b_s34b_b88k"): "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    ("ViT-L-14", "laion2b_s32b_b82k"): "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    ("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("ViT-g-14", "laion2b_s12b_b42k"): "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    ("ViT-bigG-14", "laion2b_s39b_b160k"): "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}


def tower_name(path: str | Path, pretrained: str | None = None) -> str:
    """The repository or folder of a tower: an open_clip pair such as ("ViT-L-14", "openai") is looked up; a local
    folder and a hub id ("owner/name") name their weights themselves and come back as they are, `pretrained` unread.

    Raises ValueError for any other name.
    """
    name = str(path)
    model = name.replace("/", "-")  # open_clip takes "ViT-L/14" for "ViT-L-14"
    if (model, pretrained) in TOWERS:
        return TOWERS[model, pretrained]
    if Path(name).is_dir() or (name.count("/") == 1 and model not in {known for known, _ in TOWERS}):
        return name
    known = ", ".join(f"({model}, {weights})" for model, weights in TOWERS)
    raise ValueError(
        f"no vision tower is known for ({path}, {pretrained}); known are {known}. "
        "A Hugging Face id (owner/name), a local folder or a module of your own works too"
    )


@dataclass(frozen=True)
class _Family:
    """What tells one family of vision transformers from another, behind the same `AutoModel`."""

    final_norm: str  # attribute of the layer norm behind the last layer
    class_token: bool
    any_size: bool = False  # position embeddings are interpolated to the image's size


_FAMILIES = {
    "clip_vision_model": _Family("post_layernorm", class_token=True),
    "siglip_vision_model": _Family("post_layernorm", class_token=False),
    "dinov2": _Family("layernorm", class_token=True, any_size=True),
    "dinov2_with_registers": _Family("layernorm", class_token=True, any_size=True),
}


class VisionTower(nn.Module):
    """float[N, 3, h, w] -> float[N, P, D]: the patch features of a CLIP, SigLIP or DINOv2 model, in front of its final
    layer norm, without class and register tokens.

    Made by `from_pretrained` or `from_config`. Has no final norm and no pooling head: nobody reads what they give.
    Its position embeddings fix the size of CLIP's and SigLIP's images; DINOv2 takes any multiple of its patches.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        family = _family(model.config)
        setattr(model, family.final_norm, nn.Identity())
        self.model = model
        self._no_split_modules = model._no_split_modules  # where a device_map may not cut
        self._any_size = family.any_size
        self._other_tokens = family.class_token + getattr(model.config, "num_register_tokens", 0)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
    ) -> "VisionTower":
        """The tower in a local folder or of a hub id, which may hold a vision model or a vision-language one, whose
        other half is not loaded. `dtype` None: as the weights were saved.

        Raises ValueError for a family that is not supported and for weights that are missing or of another shape,
        OSError where there is nothing to load.
        """
        hub = {"local_files_only": local_files_only, "cache_dir": cache_dir}
        config = _vision_config(AutoConfig.from_pretrained(path, **hub))
        with _without_load_report():
            model, report = AutoModel.from_pretrained(
                path,
                config=config,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, with their names
                **hub,
            )
        wrong = [*sorted(report["missing_keys"]), *sorted(key for key, *_ in report["mismatched_keys"])]
        unread = _family(config).final_norm  # a tower that was saved from here has none
        wrong = [key for key in wrong if key.split(".")[-2] != unread]
        if wrong:
            raise ValueError(
                f"{path} is no complete {config.model_type}: {len(wrong)} of its weights are missing or of another "
                f"shape than its config says: {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}"
            )
        return cls(model)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "VisionTower":
        """A tower with random weights, of the config of a vision model or of a vision-language one."""
        return cls(AutoModel.from_config(_vision_config(config)))

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def width(self) -> int:
        """D"""
        return self.config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for no images, and for another rank, number of channels or size than the tower reads."""
        self._check(images)
        return self.model(pixel_values=images).last_hidden_state[:, self._other_tokens :]

    def _check(self, images: Tensor) -> None:
        channels, size, patch = self.config.num_channels, self.config.image_size, self.config.patch_size
        fits = images.dim() == 4 and len(images) > 0 and images.shape[1] == channels
        if self._any_size:
            expected = f"[N >= 1, {channels}, h, w] with h and w multiples of {patch}"
            fits = fits and all(length > 0 and length % patch == 0 for length in images.shape[2:])
        else:
            expected = f"[N >= 1, {channels}, {size}, {size}]"
            fits = fits and images.shape[2:] == (size, size)
        if not fits:
            raise ValueError(
                f"images must be {expected}, as this tower's image transform makes them; got shape {list(images.shape)}"
            )


def _family(config: PreTrainedConfig) -> _Family:
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"model_type {config.model_type} is no vision tower known here ({', '.join(_FAMILIES)}); a module of your "
            "own that maps float[N, 3, h, w] to patch features float[N, P, D] works: pass it as vision_encoder"
        )
    return _FAMILIES[config.model_type]


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(getattr(config, "vision_config", config))
    _family(config)  # refused before anything is loaded
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    return config


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of every tensor that it leaves in a file: here the whole text half, which is no mistake."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.disabled = True  # a higher level would make transformers verify plans for tensor parallelism
    try:
        yield
    finally:
        logger.disabled = False


class ImageTransform:
    """PIL.Image -> float32[3, h, w], as CLIP and open_clip prepare images: resize (bicubic, the shorter side), centre
    crop, RGB, and each channel normalised. Made by `image_transform`.

    The sizes and statistics are those of a Hugging Face image processor, and are saved in its format. The steps are
    torchvision's on PIL images, which CLIP was trained and evaluated with: that image processor itself resizes tensors
    and rounds the crop's corner differently.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        """Raises ValueError for an image processor that does something else."""
        self.image_processor = image_processor
        settings = image_processor.to_dict()
        steps = [settings.get(step) for step in ("do_resize", "do_rescale", "do_normalize")]
        sizes = [settings.get("size"), *([settings.get("crop_size")] if settings.get("do_center_crop") else [])]
        sizes = [_lengths(size or {}) for size in sizes]
        if not all(steps + sizes) or not math.isclose(settings["rescale_factor"], 1 / 255):
            raise ValueError(
                "an image transform resizes (to a shortest edge, or to a height and width), may crop, divides by 255 "
                f"and normalises; this {type(image_processor).__name__} is set to {settings}: use a callable of your "
                "own, PIL.Image -> float[3, h, w]"
            )
        resize, *crop = sizes
        self._resize_and_crop = transforms.Compose(
            [transforms.Resize(resize, interpolation=settings["resample"]), *map(transforms.CenterCrop, crop)]
        )
        self._to_tensor = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(settings["image_mean"], settings["image_std"])]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        # RGB behind the resize, as in CLIP: it makes a difference to a palette and to transparency.
        return self._to_tensor(self._resize_and_crop(image).convert("RGB"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `preprocessor_config.json`, which `image_transform(folder)` reads."""
        self.image_processor.save_pretrained(folder)


def image_transform(
    source: str | Path | BaseImageProcessor,
    *,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
) -> ImageTransform:
    """The transform that a tower's weights expect, from the `preprocessor_config.json` of its folder or hub id, or from
    an image processor of transformers such as `CLIPImageProcessor()`.

    Raises ValueError where the folder has none, for towers of one family differ in their statistics.
    """
    if isinstance(source, BaseImageProcessor):
        return ImageTransform(source)
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{source} holds no preprocessor_config.json, which says how images are prepared. Write one there, for "
            f"OpenAI's CLIP by transformers.CLIPImageProcessor().save_pretrained({str(source)!r}), or give the image "
            "processor in place of the folder"
        )
    processor = AutoImageProcessor.from_pretrained(source, local_files_only=local_files_only, cache_dir=cache_dir)
    return ImageTransform(processor)


def _lengths(size: dict[str, int]) -> list[int] | None:
    """What torchvision takes for a size of transformers: [shorter side], [height, width], or None for another kind."""
    if set(size) == {"shortest_edge"}:
        return [size["shortest_edge"]]
    if set(size) == {"height", "width"}:
        return [size["height"], size["width"]]
    return None
