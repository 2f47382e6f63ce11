"""`create_model_and_transforms` as OpenFlamingo's users call it, on small models that the tests save themselves."""

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from flamingo_vlm import Flamingo, create_model_and_transforms, load_openflamingo_checkpoint
from flamingo_vlm.checkpoints import save_openflamingo_checkpoint
from flamingo_vlm.tiny_model import byte_tokenizer
from laws import randomized

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A CLIP tower with its preprocessor, and two language models with their tokenizer."""
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    CLIPVisionModel(vision).save_pretrained(root / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(root / "clip")
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 0}
    # As published vocabularies often are, this one is longer than its tokenizer.
    padded = {"vocab_size": len(tokenizer) + 30, **SIZES, **special}
    models = {"llama": LlamaForCausalLM(LlamaConfig(**padded)), "neox": GPTNeoXForCausalLM(GPTNeoXConfig(**padded))}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def created(folders, lm="llama", **options):
    names = {
        "clip_vision_encoder_path": folders / "clip",
        "clip_vision_encoder_pretrained": "openai",
        "lang_encoder_path": folders / lm,
        "tokenizer_path": folders / lm,
        "cross_attn_every_n_layers": 2,
    }
    torch.manual_seed(options.pop("seed", 1))
    return create_model_and_transforms(**(names | options))


def open_gates(model):
    for block in model.gated_cross_attn_layers.values():
        randomized(block)
    return model


def picture(colour):
    return Image.new("RGB", (50, 40), colour)


def readme_inputs(image_processor, tokenizer):
    """The few-shot prompt of OpenFlamingo's README."""
    images = [image_processor(picture(colour)).unsqueeze(0) for colour in ("red", "green", "blue")]
    vision_x = torch.cat(images, dim=0).unsqueeze(1).unsqueeze(0)
    tokenizer.padding_side = "left"
    text = "<image>An image of two cats.<|endofchunk|><image>An image of a sink.<|endofchunk|><image>An image of"
    lang_x = tokenizer([text], return_tensors="pt")
    return {"vision_x": vision_x, "lang_x": lang_x["input_ids"], "attention_mask": lang_x["attention_mask"]}


@pytest.mark.parametrize("lm", ["llama", "neox"])
def test_the_readme_of_open_flamingo_runs(folders, tmp_path, lm):
    """With only the import changed, down to `load_state_dict(torch.load(checkpoint), strict=False)`."""
    trained, _, _ = created(folders, lm, seed=1)
    save_openflamingo_checkpoint(open_gates(trained), tmp_path / "checkpoint.pt")
    model, image_processor, tokenizer = created(folders, lm, seed=2)
    model.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=False)
    inputs = readme_inputs(image_processor, tokenizer)
    generated = model.generate(**inputs, max_new_tokens=20, num_beams=3)
    assert tokenizer.decode(generated[0]).startswith("<image>An image of two cats.<|endofchunk|>")
    torch.testing.assert_close(model(**inputs).logits, trained(**inputs).logits)


def test_what_is_trained_is_what_is_new(folders):
    model, _, _ = created(folders)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    new = {name for name, _ in model.named_parameters() if name.startswith(("perceiver.", "gated_cross_attn_layers."))}
    assert trainable == new | {"lang_encoder.model.embed_tokens.weight"}
    frozen, _, _ = created(folders, freeze_lm_embeddings=True)
    assert {name for name, parameter in frozen.named_parameters() if parameter.requires_grad} == new
    assert not model.training


def test_special_tokens_stand_behind_the_tokenizer_s_own(folders):
    """In OpenFlamingo's order, and the vocabulary shrinks to them where it was padded."""
    model, _, tokenizer = created(folders)
    own = len(byte_tokenizer())
    assert tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"]) == [own, own + 1, own + 2]
    assert (model.config.eoc_token_id, model.config.media_token_id) == (own, own + 1)
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == own + 3
    assert model.generation_config.pad_token_id == own + 2 and model.generation_config.eos_token_id == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_precision_for_all_weights(folders, dtype):
    model, image_processor, tokenizer = created(folders, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.generate(**readme_inputs(image_processor, tokenizer), max_new_tokens=3).shape[0] == 1


def test_the_attention_asked_for_is_that_of_both_models(folders):
    model, _, _ = created(folders, attn_implementation="eager")
    assert model.lang_encoder.config._attn_implementation == "eager"
    assert model.vision_encoder.config._attn_implementation == "eager"


def test_eight_bits_hold_the_layers_and_not_the_embeddings(folders, tmp_path):
    """So that a checkpoint, new tokens' rows included, loads into a quantized model as into any."""
    trained, image_processor, tokenizer = created(folders)
    save_openflamingo_checkpoint(open_gates(trained), tmp_path / "checkpoint.pt")
    model, _, _ = created(folders, quantization="int8", seed=2)
    load_openflamingo_checkpoint(model, tmp_path / "checkpoint.pt")
    layers = model.lang_encoder.model.layers
    assert all(is_traceable_wrapper_subclass(part.weight) for part in layers.modules() if isinstance(part, nn.Linear))
    plain = [model.get_input_embeddings().weight, model.get_output_embeddings().weight, *model.perceiver.parameters()]
    assert not any(is_traceable_wrapper_subclass(weight) for weight in plain)
    inputs = readme_inputs(image_processor, tokenizer)
    logits, exact = model(**inputs).logits, trained(**inputs).logits
    assert 0 < (logits - exact).norm() < 0.02 * exact.norm()
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    with pytest.raises(ValueError, match="a quantized model cannot be saved"):
        model.save_pretrained(tmp_path / "model")


def test_a_vision_encoder_of_one_s_own(folders):
    """Another domain's: here patches of sound, 6 numbers wide."""
    encoder = nn.Linear(6, 20)
    model, image_processor, _ = created(
        folders, clip_vision_encoder_path=encoder, vis_dim=20, image_processor=torch.tensor
    )
    assert model.vision_encoder is encoder and image_processor is torch.tensor
    lang_x = torch.tensor([[model.config.media_token_id, 5, 6]])
    assert model(torch.randn(1, 1, 1, 9, 6), lang_x).logits.shape[:2] == (1, 3)
    with pytest.raises(ValueError, match="needs its vis_dim and its image_processor"):
        created(folders, clip_vision_encoder_path=encoder)


def test_layers_offloaded_to_disk_compute_the_same(folders, tmp_path):
    """`device_map`: weights lie on the disk until they are used."""
    model, image_processor, tokenizer = created(folders)
    open_gates(model).save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    inputs = readme_inputs(image_processor, tokenizer)
    disk = {"perceiver": "disk", "gated_cross_attn_layers": "disk", "lang_encoder.model.layers": "disk"}
    rest = ["vision_encoder", "lang_encoder.model.embed_tokens", "lang_encoder.model.norm"]
    rest += ["lang_encoder.model.rotary_emb", "lang_encoder.lm_head"]
    for device_map in ("auto", disk | dict.fromkeys(rest, "cpu")):
        offloaded = Flamingo.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)
        assert torch.equal(offloaded.generate(**inputs, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clip_vision_encoder_path": "ViT-Z-99"}, "no vision tower is known"),
        ({"quantization": "int3"}, 'quantization must be "int8"'),
        ({"decoder_layers_attr_name": "model.blocks"}, "has no nn.ModuleList at decoder_layers_attr_name"),
        ({"cross_attn_every_n_layers": 5}, "must be between 1 and 4"),
    ],
)
def test_wrong_names_are_errors(folders, options, message):
    with pytest.raises(ValueError, match=message):
        created(folders, **options)


def test_a_missing_language_model_is_an_error(folders):
    with pytest.raises(OSError, match="no-such-folder"):
        created(folders, lang_encoder_path=folders / "no-such-folder", use_local_files=True)
