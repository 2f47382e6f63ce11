"""Vision towers: which features they give, what they load, and how images are prepared for them."""

import io
import json
import logging
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
)

from flamingo_vlm.vision_towers import TOWERS, VisionTower, image_transform, tower_name
from laws import assert_same, randomized

SIZE, PATCH, WIDTH, PATCHES = 12, 4, 16, 9
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def clip(**vision):
    config = CLIPConfig(text_config=TEXT, vision_config=VISION | vision, projection_dim=8)
    return randomized(CLIPModel(config)).eval()


def siglip():
    return randomized(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))).eval()


def projected_vision(model):
    """The vision part as `CLIPVisionModelWithProjection` saves it: under the names of the full model."""
    part = CLIPVisionModelWithProjection(model.config.vision_config)
    part.vision_model.load_state_dict(model.vision_model.state_dict())
    return part


def layer_by_layer(vision, images):
    """The hidden states in front of the final norm: what the tower should take its patches from."""
    hidden = vision.embeddings(images)
    if hasattr(vision, "pre_layrnorm"):
        hidden = vision.pre_layrnorm(hidden)
    if hasattr(vision.encoder, "layer"):  # DINOv2's name for its layers, which take no mask
        for layer in vision.encoder.layer:
            hidden = layer(hidden)
    else:
        for layer in vision.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
    return hidden


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("saved", [lambda model: model, lambda model: model.vision_model, projected_vision])
def test_clip_features_are_its_last_layer_without_norm_and_class_token(saved, tmp_path):
    model = clip()
    saved(model).save_pretrained(tmp_path)
    tower = VisionTower.from_pretrained(tmp_path)
    images = torch.randn(2, 3, SIZE, SIZE)
    features = tower(images)
    assert features.shape == (2, PATCHES, WIDTH) and tower.width == WIDTH
    assert_same(features, layer_by_layer(model.vision_model, images)[:, 1:])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("saved", [lambda model: model, lambda model: model.vision_model])
def test_siglip_features_are_its_last_layer_without_norm(saved, tmp_path):
    model = siglip()
    saved(model).save_pretrained(tmp_path)
    images = torch.randn(2, 3, SIZE, SIZE)
    features = VisionTower.from_pretrained(tmp_path)(images)
    assert features.shape == (2, PATCHES, WIDTH)
    assert_same(features, layer_by_layer(model.vision_model, images))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("config", "tokens"), [(Dinov2Config, 1), (Dinov2WithRegistersConfig, 5)])
def test_dinov2_features_are_its_last_layer_without_norm_class_token_and_registers(config, tokens, tmp_path):
    model = randomized(AutoModel.from_config(config(**VISION, mlp_ratio=2))).eval()
    model.save_pretrained(tmp_path)
    tower = VisionTower.from_pretrained(tmp_path)
    for height, width in ((SIZE, SIZE), (8, 20)):
        images = torch.randn(2, 3, height, width)
        features = tower(images)
        assert features.shape == (2, height * width // PATCH**2, WIDTH)
        assert_same(features, layer_by_layer(model, images)[:, tokens:])
    with pytest.raises(ValueError, match="multiples of 4"):
        tower(torch.randn(1, 3, 8, 10))


def test_a_tower_holds_its_layers_and_nothing_else():
    for model in (clip(), siglip()):
        kept = {name for name, _ in VisionTower.from_config(model.config).model.named_parameters()}
        vision = {name for name, _ in model.vision_model.named_parameters()}
        assert kept == {name for name in vision if not name.startswith(("post_layernorm", "head"))}


def test_loading_leaves_the_text_half_without_a_word(tmp_path):
    clip().save_pretrained(tmp_path)
    logger, said = logging.getLogger("transformers"), io.StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        VisionTower.from_pretrained(tmp_path)
        assert "text_model" not in said.getvalue()
        type(clip().vision_model).from_pretrained(tmp_path)
        assert "text_model" in said.getvalue()  # the library is loud again
    finally:
        logger.removeHandler(handler)


def test_the_activation_of_the_weights_survives_loading(tmp_path):
    images = torch.randn(2, 3, SIZE, SIZE)
    model, features = clip(hidden_act="quick_gelu"), {}
    for activation in ("quick_gelu", "gelu"):
        model.save_pretrained(tmp_path / activation)
        config = json.loads((tmp_path / activation / "config.json").read_text())
        config["vision_config"]["hidden_act"] = activation
        (tmp_path / activation / "config.json").write_text(json.dumps(config))
        tower = VisionTower.from_pretrained(tmp_path / activation)
        assert tower.config.hidden_act == activation
        features[activation] = tower(images)
    torch.testing.assert_close(features["quick_gelu"], layer_by_layer(model.vision_model, images)[:, 1:])
    assert (features["quick_gelu"] - features["gelu"]).abs().max() > 1e-3


def test_weights_that_are_missing_or_of_another_shape_are_refused(tmp_path):
    clip().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    for changed in ({}, {name: torch.zeros(3, WIDTH)}):
        save_file({key: weights[key] for key in weights if key != name} | changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 of its weights are missing .*layers\.1\.mlp\.fc1\.weight"):
            VisionTower.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float32(dtype, tmp_path):
    clip().save_pretrained(tmp_path)
    images = torch.randn(2, 3, SIZE, SIZE)
    exact = VisionTower.from_pretrained(tmp_path)(images)
    tower = VisionTower.from_pretrained(tmp_path, dtype=dtype)
    features = tower(images)  # float32 images: the tower casts them
    assert features.dtype == dtype and exact.dtype == torch.float32
    error = (features.float() - exact).abs().max() / exact.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_eager_attention_gives_the_same_features(tmp_path):
    clip().save_pretrained(tmp_path)
    images = torch.randn(2, 3, SIZE, SIZE)
    eager = VisionTower.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(images), VisionTower.from_pretrained(tmp_path)(images))


def test_the_published_size_is_known_without_its_weights():
    """ViT-L/14: 24 layers of width 1024, 256 patches and a class token at 224 pixels; no final norm."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        tower = VisionTower.from_config(CLIPVisionConfig(**shape, patch_size=14))
        features = tower(torch.empty(2, 3, 224, 224))
    assert features.is_meta and features.shape == (2, 256, 1024)
    layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2 * 1024
    embeddings = 1024 * 3 * 14 * 14 + 257 * 1024 + 1024 + 2 * 1024
    assert sum(parameter.numel() for parameter in tower.parameters()) == 24 * layer + embeddings


def test_a_config_given_stays_as_it_was():
    for config in (CLIPVisionConfig(**VISION), SiglipVisionConfig(**VISION)):
        before = config.to_dict()
        VisionTower.from_config(config)
        assert config.to_dict() == before


@pytest.mark.parametrize("config", [CLIPVisionConfig, SiglipVisionConfig])
@pytest.mark.parametrize(
    "shape",
    [(0, 3, SIZE, SIZE), (3, SIZE, SIZE), (1, 1, 3, SIZE, SIZE), (1, 4, SIZE, SIZE), (1, 3, SIZE, 16), (1, 3, 8, SIZE)],
)
def test_images_of_another_shape_are_refused(config, shape):
    with pytest.raises(ValueError, match=r"images must be \[N >= 1, 3, 12, 12\]"):
        VisionTower.from_config(config(**VISION))(torch.zeros(shape))


@pytest.mark.parametrize("config", [ViTConfig(**VISION), CLIPTextConfig(**TEXT)])
def test_other_families_are_refused(config):
    with pytest.raises(ValueError, match="pass it as vision_encoder"):
        VisionTower.from_config(config)
    with pytest.raises(ValueError, match="pass it as vision_encoder"):
        VisionTower(AutoModel.from_config(config))


def test_open_clips_names_are_the_repositories_of_the_same_weights(tmp_path):
    assert tower_name("ViT-L-14", "openai") == "openai/clip-vit-large-patch14"
    assert tower_name("ViT-L/14", "openai") == "openai/clip-vit-large-patch14"
    assert tower_name("ViT-L-14-336", "openai") == "openai/clip-vit-large-patch14-336"
    assert tower_name("ViT-L-14", "laion2b_s32b_b82k") == "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
    for (model, weights), repository in TOWERS.items():
        patch = model.split("-")[2]
        assert tower_name(model, weights) == repository
        assert repository.endswith((f"patch{patch}", "patch14-336")) or f"-{patch}-" in repository


def test_folders_and_hub_ids_name_themselves(tmp_path):
    for name in (str(tmp_path), "google/siglip-base-patch16-224"):
        assert tower_name(name) == tower_name(name, "openai") == name
    assert tower_name(tmp_path) == str(tmp_path)


@pytest.mark.parametrize("pair", [("ViT-L-14", None), ("ViT-L/14", None), ("ViT-L-14", "no_such"), ("RN50", "openai")])
def test_unknown_names_are_refused_with_the_known_ones(pair):
    with pytest.raises(ValueError, match=r"\(ViT-bigG-14, laion2b_s39b_b160k\).* a local folder or a module"):
        tower_name(*pair)


def photo(width, height, mode="RGB"):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def by_hand(image, size, mean, std):
    """CLIP's preparation on PIL and NumPy alone, in float64: bicubic, shorter side to `size`, centre crop, RGB."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = (np.asarray(image, dtype=np.float64) / 255 - mean) / std
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize("shape", [(16, 16), (64, 47), (47, 64), (16, 19), (21, 16), (23, 16), (5, 9), (1, 40)])
def test_the_transform_is_clips_own(shape, mode):
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image = photo(*shape, mode)
    pixels = image_transform(processor)(image)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16)
    reference = by_hand(image, 16, processor.image_mean, processor.image_std)
    torch.testing.assert_close(pixels.double(), reference, rtol=0, atol=1e-6)


def test_the_transform_is_torchvisions_to_the_bit():
    from torchvision import transforms

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(224, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    theirs = transforms.Compose([*steps, transforms.Normalize(mean, std)])
    for shape in ((640, 427), (301, 1000), (100, 77), (224, 227)):
        image = photo(*shape)
        assert torch.equal(image_transform(CLIPImageProcessor())(image), theirs(image))


def test_a_square_resize_without_crop_keeps_the_whole_image():
    transform = image_transform(SiglipImageProcessor(size={"height": 8, "width": 12}))
    image = photo(50, 30)
    pixels = np.asarray(image.resize((12, 8), Image.Resampling.BICUBIC), dtype=np.float64) / 127.5 - 1
    torch.testing.assert_close(transform(image).double(), torch.from_numpy(pixels).permute(2, 0, 1), rtol=0, atol=1e-6)


def test_the_settings_in_the_folder_are_used_and_survive_saving(tmp_path):
    """Written as in OpenAI's oldest repositories."""
    old = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 20,
        "crop_size": 16,
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(old))
    transform = image_transform(tmp_path / "old")
    transform.save_pretrained(tmp_path / "new")
    image = photo(60, 40)
    resized = image.resize((30, 20), Image.Resampling.BICUBIC).crop((7, 2, 23, 18))
    pixels = (np.asarray(resized, dtype=np.float64) / 255 - old["image_mean"]) / old["image_std"]
    torch.testing.assert_close(transform(image).double(), torch.from_numpy(pixels).permute(2, 0, 1), rtol=0, atol=1e-6)
    assert torch.equal(image_transform(str(tmp_path / "new"))(image), transform(image))


def test_a_folder_without_settings_gets_none_made_up(tmp_path):
    clip().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        image_transform(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 8, "longest_edge": 16}},
        {"crop_size": {"longest_edge": 8}},
    ],
)
def test_settings_that_would_be_passed_over_are_refused(setting):
    with pytest.raises(ValueError, match="use a callable of your own"):
        image_transform(CLIPImageProcessor(**setting))


def test_a_local_folder_never_touches_the_network(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a local folder was looked up in the network")

    clip().save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    VisionTower.from_pretrained(tower_name(tmp_path))
    image_transform(tmp_path)
