"""What users do to a model between its calls, and what it cannot do: right, or an error that says what to do."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor

from adaptive_resampler import AdaptivePerceiverResampler
from confidence_head import RiskHead
from flamingo_vlm.checkpoints import save_openflamingo_checkpoint
from flamingo_vlm.configuration import FlamingoConfig
from flamingo_vlm.model import Flamingo
from laws import assert_same, randomized
from perceiver_resampler import PerceiverResampler
from tiny_vlm import (
    EOC,
    MEDIA,
    PAD,
    VIS_DIM,
    VOCAB,
    TinyVision,
    exact_flamingo,
    pictures,
    prompts,
    tiny_flamingo,
    tiny_language_model,
)

IDS, MASK = prompts("i..i..", ".i...")
IMAGES = pictures(2, 2)
ENDLESS = {"eos_token_id": VOCAB, "max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def model():
    return exact_flamingo()


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


# ---------------------------------------------------------------------------------------------------- caches


def test_generation_behind_cached_media_sees_the_last_image(model):
    model.cache_media(IDS, IMAGES)
    text = torch.tensor([[5, 6], [7, 8]])
    expected = text
    for _ in range(ENDLESS["max_new_tokens"]):
        following = logits(model, None, expected)[:, -1].index_fill(1, torch.tensor(MEDIA), -torch.inf).argmax(-1)
        expected = torch.cat((expected, following[:, None]), dim=1)
    generated = model.generate(None, text, **ENDLESS)
    model.uncache_media()
    assert torch.equal(generated, expected)
    assert not torch.equal(generated, model.generate(None, text, **ENDLESS)), "the images make a difference"


@pytest.mark.parametrize("change", ["resampler", "vision encoder", "autocast"])
def test_visual_tokens_of_another_model_are_not_served(model, change):
    model = model.float()
    model.use_visual_token_cache(2**20)
    with torch.no_grad():
        model.encode_media(IMAGES)
        if change == "resampler":
            model.perceiver = randomized(PerceiverResampler(VIS_DIM, 1, num_latents=3))
        elif change == "vision encoder":
            model.vision_encoder = randomized(TinyVision())
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            found = model.encode_media(IMAGES)
            model.visual_token_cache = None
            torch.testing.assert_close(found, model.encode_media(IMAGES))


def test_copies_start_without_caches(model):
    model.use_visual_token_cache(2**20)
    model.cache_media(IDS, IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.visual_token_cache is None
        assert_same(logits(other, IMAGES, IDS, MASK), logits(model, None, IDS, MASK))


def test_a_cache_that_was_cut_is_no_longer_counted_on(model):
    with torch.no_grad():
        cache = model(IMAGES, IDS, MASK, use_cache=True).past_key_values
        cache.crop(-2)
        with pytest.raises(ValueError, match="cannot tell how many images"):
            model(IMAGES, IDS[:, -2:], MASK, past_key_values=cache)


def test_generated_ids_may_be_trained_on(model):
    """They leave inference mode."""
    generated = model.generate(IMAGES, IDS, MASK, **ENDLESS)
    full = model.generate(IMAGES, IDS, MASK, **ENDLESS, return_dict_in_generate=True).sequences
    scores = model.score_sequences(IMAGES, IDS, [torch.tensor([3])], MASK)
    assert not any(each.is_inference() for each in (generated, full, scores))
    mask = torch.ones_like(generated)
    mask[:, : IDS.shape[1]] = MASK
    model(IMAGES, generated, mask, labels=generated).loss.backward()


@pytest.mark.parametrize("beams", [1, 3])
def test_images_that_nobody_reads_again_are_let_go(model, monkeypatch, beams):
    """Behind the prompt its last image is all that is read: the others do not stay in memory."""
    project, alive = type(model.gated_cross_attn_layers).project, []

    def watched(self, media):
        projected = project(self, media)
        alive.append(weakref.ref(projected))
        return projected

    monkeypatch.setattr(type(model.gated_cross_attn_layers), "project", watched)
    there = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            there.append(alive[0]() is not None)
            return scores

    model.generate(IMAGES, IDS, MASK, **ENDLESS, num_beams=beams, logits_processor=[Look()])
    assert len(alive) == 1 and there == [True] + [False] * 4


# ---------------------------------------------------------------------------------------------------- wrapped


def test_adapters_around_the_whole_model(model):
    peft = pytest.importorskip("peft")
    expected = model.generate(IMAGES, IDS, MASK, **ENDLESS), logits(model, IMAGES, IDS, MASK)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    wrapped = peft.get_peft_model(model, settings)  # they change nothing before they are trained
    given = {"vision_x": IMAGES, "lang_x": IDS, "attention_mask": MASK}
    assert torch.equal(wrapped.generate(**given, **ENDLESS), expected[0])
    assert_same(logits(wrapped, **given), expected[1])


def test_the_trainer_s_way_to_checkpoint_gradients(model):
    model.train()
    model(IMAGES, IDS, MASK, labels=IDS).loss.backward()
    expected = model.perceiver.latents.grad.clone()
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model(IMAGES, IDS, MASK, labels=IDS).loss.backward()
    assert_same(model.perceiver.latents.grad, expected)
    with pytest.raises(ValueError, match="use_reentrant=True would lose the gradients"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    for call in (model.generate, lambda *given: model.score_sequences(*given[:2], [torch.tensor([3])], given[2])):
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            call(IMAGES, IDS, MASK)


def test_autocast_trains_and_generates():
    model = tiny_flamingo()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IMAGES, IDS, MASK, labels=IDS).loss
        generated = model.generate(IMAGES, IDS, MASK, **ENDLESS)
    loss.backward()
    assert generated.shape == (2, IDS.shape[1] + 5)
    assert model.perceiver.latents.grad.norm() > 0
    torch.testing.assert_close(loss.float(), model(IMAGES, IDS, MASK, labels=IDS).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "mosaic_gpt"])
def test_the_vocabulary_may_grow(family):
    model = tiny_flamingo(family)
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert logits(model, IMAGES, IDS, MASK).shape[-1] == model.lang_encoder.config.vocab_size == VOCAB + 5


def test_an_adaptive_resampler_takes_the_place_of_the_plain_one(tmp_path):
    """Until the model is saved: its weights have names that nothing else reads."""
    model = tiny_flamingo(resampler_depth=2)
    expected, plain = logits(model, IMAGES, IDS, MASK), model.perceiver
    model.perceiver = AdaptivePerceiverResampler(plain, [RiskHead(VIS_DIM, ways=1)], threshold=0.0)
    torch.testing.assert_close(logits(model, IMAGES, IDS, MASK), expected)
    assert model.generate(IMAGES, IDS, MASK, **ENDLESS).shape[0] == 2
    for save in (model.save_pretrained, lambda path: save_openflamingo_checkpoint(model, path)):
        with pytest.raises(ValueError, match=r"model.perceiver is a AdaptivePerceiverResampler: save with"):
            save(tmp_path / "model")
    model.perceiver = plain
    model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox", "gpt2"])
def test_adapters_are_saved_by_themselves(family, tmp_path):
    peft = pytest.importorskip("peft")
    target = {"gpt_neox": "query_key_value", "gpt2": "c_attn"}.get(family, "q_proj")
    lm = peft.get_peft_model(tiny_language_model(family), peft.LoraConfig(target_modules=[target]))
    model = tiny_flamingo(language_model=lm)
    save_openflamingo_checkpoint(model, tmp_path / "checkpoint.pt")
    names = torch.load(tmp_path / "checkpoint.pt").keys()
    assert any(f"{model.decoder_layers_attr_name}.1.gated_cross_attn_layer.attn_gate" in name for name in names)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) them first"):
        model.save_pretrained(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "option", [{"prefill_chunk_size": 2}, {"assistant_model": nn.Identity()}, {"guidance_scale": 2.0}], ids=str
)
def test_options_that_would_generate_something_else_are_refused(model, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is not supported here: "):
        model.generate(IMAGES, IDS, MASK, **ENDLESS, **option)


def test_padding_behind_a_prompt_is_refused(model):
    ids, mask = IDS.roll(-2, 1), MASK.flip(1)
    for call in (model.generate, lambda *given: model.score_sequences(*given[:2], [torch.tensor([3])], given[2])):
        with pytest.raises(ValueError, match=r'set tokenizer\.padding_side = "left"'):
            call(IMAGES, ids, mask)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neo"])
def test_text_longer_than_the_learned_positions_is_refused(family):
    model = tiny_flamingo(family)
    assert model.position_limit == 64
    text = torch.full((1, 60), 5)
    model.generate(None, text, **ENDLESS | {"max_new_tokens": 4})
    for call in (lambda: model.generate(None, text, **ENDLESS), lambda: model(None, torch.full((1, 65), 5))):
        with pytest.raises(
            ValueError, match="the text would have 65 tokens, and this language model has positions for 64"
        ):
            call()


@pytest.mark.parametrize("family", ["llama", "mpt", "mosaic_gpt", "gpt_neox", "gptj"])
def test_positions_without_a_table_have_no_end(family):
    assert tiny_flamingo(family).position_limit is None


@pytest.mark.parametrize(
    "option",
    [{"input_ids": IDS}, {"inputs_embeds": IMAGES}, {"clear_conditioned_layers": False}],
    ids=lambda o: next(iter(o)),
)
def test_arguments_of_other_models_are_refused(model, option):
    with pytest.raises(ValueError, match=f"forward does not take {next(iter(option))}: "):
        model(IMAGES, IDS, MASK, **option)


@pytest.mark.parametrize(
    ("images", "ids", "message"),
    [
        (IMAGES, IDS.float(), r"lang_x must be int64\[B, T\], T > 0; got float32"),
        (IMAGES, IDS.tolist(), r"lang_x must be int64\[B, T\], T > 0; got a list"),
        (IMAGES[:0], IDS[:0], r"lang_x must be int64\[B, T\], T > 0; got int64 of shape \[0, 6\]"),
        ([IMAGES], IDS, "images must be one tensor .*; got a list"),
    ],
    ids=["floats", "a list", "no rows", "a list of images"],
)
def test_what_is_no_tensor_of_ids_is_refused(model, images, ids, message):
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(images, ids)


def test_a_tower_of_transformers_must_be_wrapped(model):
    class Tower(nn.Module):
        def forward(self, images):
            return (images.flatten(2),)

    model.vision_encoder = Tower()
    with pytest.raises(ValueError, match=r"VisionTower\(model\); got a tuple"):
        model(IMAGES, IDS, MASK)


def test_parts_left_out_are_named():
    with pytest.raises(ValueError, match="needs media_token_id, vis_dim too"):
        Flamingo(TinyVision(), tiny_language_model("opt"), EOC)
    with pytest.raises(ValueError, match=r"no Flamingo: its config\.json has no text_config"):
        Flamingo(FlamingoConfig())


def test_a_prompt_s_cache_may_be_given(model):
    """An empty one of the caller's own, also behind `compile_decode`."""
    expected = model.generate(IMAGES, IDS, MASK, **ENDLESS)
    model.compile_decode(backend="eager")
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(IMAGES, IDS, MASK, **ENDLESS, past_key_values=cache), expected)
    one = {"vision_x": IMAGES[:1], "lang_x": IDS[:1], "attention_mask": MASK[:1]}
    guessed = model.generate(**one, **ENDLESS, prompt_lookup_num_tokens=2, pad_token_id=PAD)
    assert torch.equal(guessed, expected[:1])


@pytest.mark.gpu
def test_captured_decoding_on_a_gpu_says_what_eager_decoding_says():
    model = tiny_flamingo().to("cuda")
    given = [each.to("cuda") for each in (IMAGES, IDS, MASK)]
    expected = model.generate(*given, **ENDLESS)
    model.compile_decode()
    for _ in range(3):
        assert torch.equal(model.generate(*given, **ENDLESS), expected)
