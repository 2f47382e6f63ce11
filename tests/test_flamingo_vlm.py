"""Flamingo as a model: images in once, text that counts them, and a Hugging Face model that is saved and loaded."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, DynamicCache

from flamingo_vlm.configuration import FlamingoConfig
from flamingo_vlm.model import Flamingo
from flamingo_vlm.vision_towers import VisionTower
from laws import assert_same, randomized
from media_masks import MediaLayout
from tiny_vlm import (
    EOC,
    FAMILIES,
    MEDIA,
    PAD,
    PATCHES,
    VIS_DIM,
    VOCAB,
    TinyVision,
    assert_close,
    exact_flamingo,
    pictures,
    prompts,
    tiny_flamingo,
    tiny_language_model,
)

IDS, MASK = prompts("i..i..", ".i...")
IMAGES = pictures(2, 2)
TOWER = CLIPVisionConfig(
    hidden_size=VIS_DIM, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)


@pytest.fixture(scope="module", params=FAMILIES)
def of_each_family(request):
    return exact_flamingo(request.param)


@pytest.fixture(scope="module")
def shared():
    return exact_flamingo()


@pytest.fixture
def model(shared):
    """A copy, to be changed."""
    model = copy.deepcopy(shared)
    model.vision_encoder.images_seen = 0
    return model


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def images_encoded(model, *args, **kwargs):
    """By one call without gradients."""
    before = model.vision_encoder.images_seen
    with torch.no_grad():
        model.encode_media(*args, **kwargs)
    return model.vision_encoder.images_seen - before


def patch_features(model, images):
    weight = model.perceiver.latents
    return model.vision_encoder(images.flatten(0, 2).to(weight.dtype)).unflatten(0, images.shape[:3]).detach()


# ---------------------------------------------------------------------------------------------------- encoding images


def test_visual_tokens_are_the_resampled_patches_of_each_image(model):
    images = pictures(2, 3, frames=2)
    found = model.encode_media(images)
    for row in range(2):
        for place in range(3):
            frames = model.vision_encoder(images[row, place].double())  # float[F, P, D]
            assert_same(found[row, place], model.perceiver(frames.flatten(0, 1)[None])[0])


def test_patch_features_stand_for_the_pixels(model):
    features = patch_features(model, IMAGES)
    model.vision_encoder.images_seen = 0
    found = logits(model, None, IDS, MASK, media_features=features)
    generated = model.generate(None, IDS, MASK, media_features=features, max_new_tokens=4)
    scores = model.score_sequences(None, IDS, [torch.tensor([3, 4])], MASK, media_features=features)
    model.cache_media(IDS, None, media_features=features)
    cached = logits(model, None, IDS, MASK)
    model.uncache_media()
    assert features.shape == (2, 2, 1, PATCHES, VIS_DIM) and model.vision_encoder.images_seen == 0
    assert_same(found, logits(model, IMAGES, IDS, MASK))
    assert_same(cached, found)
    assert torch.equal(generated, model.generate(IMAGES, IDS, MASK, max_new_tokens=4))
    assert_same(scores, model.score_sequences(IMAGES, IDS, [torch.tensor([3, 4])], MASK))


def test_only_images_that_text_sees_are_encoded(model):
    images = pictures(2, 3)
    for use in (model.forward, lambda *given: model.generate(*given, max_new_tokens=2)):
        model.vision_encoder.images_seen = 0
        use(images, IDS, MASK)
        assert model.vision_encoder.images_seen == 2 + 1
    model(images, IDS[:, 1:3], MASK[:, 1:3])  # .. and .i: the first row has none
    assert model.vision_encoder.images_seen == 3 + 1
    model(images, *prompts("..", "."))
    assert model.vision_encoder.images_seen == 3 + 1


def test_images_that_are_not_needed_are_zeros(model):
    needed = torch.tensor([[True, False], [False, True]])
    all_of_them, some = model.encode_media(IMAGES), model.encode_media(IMAGES, needed=needed)
    assert_same(some[needed], all_of_them[needed])
    assert not some[~needed].any()
    assert not model.encode_media(IMAGES, needed=torch.zeros(2, 2, dtype=torch.bool)).any()


def test_without_gradients_equal_images_are_encoded_once(model):
    images = pictures(2, 2)
    images[1, 0] = images[0, 1]
    assert images_encoded(model, images) == 3
    assert images_encoded(model, images) == 3, "there is no cache unless one is asked for"
    model.encode_media(images)
    assert model.vision_encoder.images_seen == 3 + 3 + 4
    with torch.no_grad():
        assert_same(model.encode_media(images), model.perceiver(patch_features(model, images)))


def test_the_cache_of_visual_tokens_lasts_until_something_changes(model):
    cache = model.use_visual_token_cache(2**20)
    assert images_encoded(model, IMAGES) == 4
    expected = logits(model, IMAGES, IDS, MASK)
    assert images_encoded(model, IMAGES[:, 1:]) == 0 and cache.statistics.hits > 0
    assert images_encoded(model, None, patch_features(model, IMAGES)) == 0, "features are keys of their own"
    model.num_latents = 2
    assert images_encoded(model, IMAGES) == 4
    assert model.encode_media(IMAGES).shape == (2, 2, 2, VIS_DIM)
    model.num_latents = None
    assert images_encoded(model, IMAGES) == 0
    for weight in (model.vision_encoder.embed.bias, model.perceiver.latents):
        with torch.no_grad():
            weight.mul_(2)
        assert images_encoded(model, IMAGES) == 4
        assert images_encoded(model, IMAGES) == 0
    changed = logits(model, IMAGES, IDS, MASK)
    model.visual_token_cache = None
    assert_same(changed, logits(model, IMAGES, IDS, MASK))
    assert not torch.isclose(changed, expected).all()


def test_fewer_latents_are_the_first_of_them(model):
    model.num_latents = 2
    expected = model.perceiver(patch_features(model, IMAGES), 2)
    assert_same(model.encode_media(IMAGES), expected)
    short = copy.deepcopy(model)
    short.perceiver.latents = nn.Parameter(short.perceiver.latents[:2])
    short.num_latents = None
    assert_same(logits(model, IMAGES, IDS, MASK), logits(short, IMAGES, IDS, MASK))


def test_frames_of_a_video_have_places():
    model = exact_flamingo(max_num_frames=3)
    video = pictures(2, 2, frames=3)
    assert_same(model.encode_media(video), model.perceiver(patch_features(model, video)))
    backwards = logits(model, video.flip(2), IDS, MASK)
    assert not torch.isclose(logits(model, video, IDS, MASK), backwards).all()
    with pytest.raises(ValueError, match="x holds 4, more than max_num_frames=3"):
        model(pictures(2, 2, frames=4), IDS, MASK)


# ---------------------------------------------------------------------------------------------------- wrong images


def test_images_given_twice_or_not_at_all_are_an_error(model):
    features = patch_features(model, IMAGES)
    for call in (
        lambda: model(IMAGES, IDS, MASK, media_features=features),
        lambda: model.generate(IMAGES, IDS, MASK, media_features=features),
        lambda: model.encode_media(),
    ):
        with pytest.raises(ValueError, match=r"give either vision_x .* or media_features"):
            call()


@pytest.mark.parametrize("shape", [(2, 2, PATCHES, VIS_DIM), (2, 2, 1, PATCHES, VIS_DIM + 1)], ids=str)
def test_features_of_another_rank_or_width_are_an_error(model, shape):
    with pytest.raises(ValueError, match=r"media_features must be float\[B, M, F, P, 12\]; got float32 of shape"):
        model(None, IDS, MASK, media_features=torch.zeros(shape))


def test_images_of_another_rank_are_an_error():
    model = Flamingo(VisionTower.from_config(TOWER), tiny_language_model("llama"), EOC, MEDIA, VIS_DIM, 2)
    assert model.encode_media(torch.zeros(2, 1, 1, 3, 8, 8)).shape == (2, 1, 64, VIS_DIM)
    for shape in ((2, 1, 3, 8, 8), (2, 1, 1, 1, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"vision_x must be float\[B, M, F, 3, h, w\]; got float32 of shape"):
            model(torch.zeros(shape), IDS[:, 3:], MASK[:, 3:])


def test_a_vision_encoder_that_returns_something_else_is_an_error(model):
    class Pooled(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :VIS_DIM]

    class Wide(nn.Module):
        def forward(self, images):
            return images.flatten(2)

    for wrong, shape in ((Pooled(), r"\[3, 12\]"), (Wide(), r"\[3, 3, 20\]")):
        model.vision_encoder = wrong
        with pytest.raises(ValueError, match=rf"patch features \[3, P, vis_dim=12\], .*; got float32 of shape {shape}"):
            model(IMAGES, IDS, MASK)


def test_trap_2_more_image_tokens_than_images_are_an_error(model):
    for call in (
        lambda: model(IMAGES[:, :1], IDS, MASK),
        lambda: model.generate(IMAGES[:, :1], IDS, MASK),
        lambda: model.cache_media(IDS, IMAGES[:, :1]),
        lambda: model.score_sequences(IMAGES[:, :1], IDS, [torch.tensor([3])], MASK),
    ):
        with pytest.raises(ValueError, match="image number 2, but only 1 images were given"):
            call()
    for none in (None, IMAGES[:, :0]):
        with pytest.raises(ValueError, match="but only 0 images were given"):
            model(none, IDS, MASK)


def test_rows_of_images_that_do_not_match_the_text_are_an_error(model):
    for call in (model, model.generate, model.prepare_media):
        given = (IDS, IMAGES[:1]) if call == model.prepare_media else (IMAGES[:1], IDS)
        with pytest.raises(ValueError, match="1 rows of images were given for 2 rows of text"):
            call(*given)


# ---------------------------------------------------------------------------------------------------- text and images


def test_left_padding_changes_nothing(of_each_family):
    together = logits(of_each_family, IMAGES, IDS, MASK)
    for row, mask in enumerate(MASK):
        length = int(mask.sum())
        alone = logits(of_each_family, IMAGES[row : row + 1], IDS[row : row + 1, -length:])
        assert_close(together[row : row + 1, -length:], alone)


def test_right_padding_changes_nothing(of_each_family):
    ids = torch.tensor([[MEDIA, 3, 4, MEDIA, 5], [6, MEDIA, 7, PAD, PAD]])
    together = logits(of_each_family, IMAGES, ids, (ids != PAD).long())
    assert_close(together[1:, :3], logits(of_each_family, IMAGES[1:], ids[1:, :3]))


def test_without_a_mask_every_token_counts(of_each_family):
    assert_close(logits(of_each_family, IMAGES, IDS), logits(of_each_family, IMAGES, IDS, torch.ones_like(IDS)))


def test_images_that_no_text_refers_to_change_nothing(model):
    expected = logits(model, IMAGES, IDS, MASK)
    padded = torch.cat((IMAGES, torch.zeros_like(IMAGES)), dim=1)
    assert_same(logits(model, padded, IDS, MASK), expected)
    garbage = torch.cat((IMAGES, torch.full_like(IMAGES, torch.nan)), dim=1)
    assert_same(logits(model, garbage, IDS, MASK), expected)


def test_a_token_sees_the_last_image_at_or_before_it_alone(model):
    """Which is why a change of an image shows in the text from its `<image>` on, and what an earlier one changed there
    comes through the text alone."""
    ids, mask = prompts("..i..i..")
    images = pictures(1, 2)
    before = logits(model, images, ids, mask)
    other_first = torch.cat((-images[:, :1], images[:, 1:]), dim=1)
    other_second = torch.cat((images[:, :1], -images[:, 1:]), dim=1)
    for changed, place in ((other_first, 2), (other_second, 5)):
        same = torch.isclose(logits(model, changed, ids, mask), before, atol=1e-12).all(-1)[0]
        assert same.tolist() == [i < place for i in range(8)]
    read = []  # by the last block's attention, of the same text
    attention = model.gated_cross_attn_layers["3"].attn
    attention.register_forward_hook(lambda module, args, out: read.append((args[0], args[1], out)))
    logits(model, images, ids, mask)
    logits(model, other_first, ids, mask)
    (x, _, first), (_, other_media, _) = read
    seen = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        same = torch.isclose(attention(x, other_media, seen), first, atol=1e-12).all(-1)[0]
    assert same.tolist() == [True, True, False, False, False, True, True, True]


@pytest.mark.parametrize("given", [None, 0, 2])
def test_text_without_images_gets_the_feed_forward_and_nothing_else(model, given):
    """None given, M = 0, and images that no text refers to."""
    ids, mask = prompts("....", "...")
    attended = []
    for block in model.gated_cross_attn_layers.values():
        block.attn.register_forward_hook(lambda module, args, out: attended.append(out))
    found = logits(model, None if given is None else pictures(2, given), ids, mask)
    assert len(attended) == 2 and not any(each.any() for each in attended)

    reference = copy.deepcopy(model)
    for i, layer in enumerate(reference.lang_encoder.model.layers):
        layer._forward_pre_hooks.clear()
        if i in (1, 3):
            block = reference.gated_cross_attn_layers[str(i)]
            layer.register_forward_pre_hook(
                lambda layer, args, block=block: (args[0] + block.ff_gate.tanh() * block.ff(args[0]),)
            )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference.lang_encoder(ids, attention_mask=mask, position_ids=positions).logits
    assert_same(found, expected)


def test_text_before_the_first_image_gets_exactly_nothing_from_attention(model):
    attended = []
    for block in model.gated_cross_attn_layers.values():
        block.attn.register_forward_hook(lambda module, args, out: attended.append(out))
    logits(model, IMAGES, *prompts("..i.i", "i...."))
    for out in attended:
        assert not out[0, :2].any() and out[0, 2:].all() and out[1].all()


@pytest.mark.parametrize("family", ["llama", "mosaic_gpt", "opt"])
def test_the_loss_is_the_cross_entropy_of_the_next_label(family):
    model = exact_flamingo(family)
    labels = IDS.masked_fill((MASK == 0) | (IDS == MEDIA), -100)
    out = model(IMAGES, IDS, MASK, labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    assert torch.equal(out.logits, model(IMAGES, IDS, MASK).logits)


def test_only_the_logits_asked_for_are_computed(of_each_family):
    all_of_them = logits(of_each_family, IMAGES, IDS, MASK)
    assert_close(logits(of_each_family, IMAGES, IDS, MASK, logits_to_keep=1), all_of_them[:, -1:])


# ---------------------------------------------------------------------------------------------------- continuations


@pytest.mark.parametrize("cuts", [(3,), (4,), (1, 2, 3, 4, 5)], ids=str)
def test_trap_3_a_continuation_goes_on_counting_images(of_each_family, cuts):
    """Also where an `<image>` stands in it; padded on the left, every piece sees what the whole text sees."""
    model, cache, pieces = of_each_family, None, []
    for start, end in zip((0, *cuts), (*cuts, 6), strict=True):
        with torch.no_grad():
            out = model(IMAGES, IDS[:, start:end], MASK[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, dim=1)[MASK.bool()], logits(model, IMAGES, IDS, MASK)[MASK.bool()])


def test_a_cache_is_counted_on_also_where_it_is_not_asked_back(of_each_family):
    """A cache is written to in place, so it may be passed on without use_cache and the next `<image>` still counts."""
    model = of_each_family
    with torch.no_grad():
        cache = model(IMAGES, IDS[:, :2], MASK[:, :2], use_cache=True).past_key_values
        model(IMAGES, IDS[:, 2:4], MASK[:, :4], past_key_values=cache)
        assert cache.get_seq_length() == 4
        rest = model(IMAGES, IDS[:, 4:], MASK, past_key_values=cache).logits
    assert_close(rest, logits(model, IMAGES, IDS, MASK)[:, 4:])


def test_an_empty_cache_is_a_beginning(model):
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        out = model(IMAGES, IDS, MASK, past_key_values=cache, use_cache=True)
    assert_same(out.logits, logits(model, IMAGES, IDS, MASK))


def test_a_cache_of_unknown_images_is_an_error(model):
    with torch.no_grad():
        plain = model.lang_encoder(IDS, use_cache=True).past_key_values
        ours = model(IMAGES, IDS, MASK, use_cache=True).past_key_values
    for cache, ids in ((plain, IDS[:, :1]), (ours, IDS[:1, :1])):
        with pytest.raises(ValueError, match="cannot tell how many images the text in past_key_values holds"):
            model(IMAGES[: len(ids)], ids, past_key_values=cache)


def test_a_cache_that_generate_returned_is_continued_right_or_not_at_all(model):
    """Decoding steps read one image of each row, which must not pass for the number of images in their text."""
    out = model.generate(IMAGES, IDS, MASK, max_new_tokens=3, return_dict_in_generate=True, eos_token_id=VOCAB)
    read = out.past_key_values.get_seq_length()
    ids = torch.cat((out.sequences[:, read:], torch.tensor([[5], [6]])), dim=1)
    mask = torch.cat((MASK, torch.ones(2, 4, dtype=torch.long)), dim=1)
    expected = logits(model, IMAGES, torch.cat((out.sequences[:, :read], ids), dim=1), mask)
    try:
        found = logits(model, IMAGES, ids, mask, past_key_values=out.past_key_values)
    except ValueError as error:
        assert "cannot tell how many images" in str(error)
    else:
        assert_same(found, expected[:, read:])


# ---------------------------------------------------------------------------------------------------- cached media


def test_cached_media_stand_for_the_images(model):
    expected = logits(model, IMAGES, IDS, MASK)
    generated = model.generate(IMAGES, IDS, MASK, max_new_tokens=3)
    model.cache_media(IDS, IMAGES)
    model.vision_encoder.images_seen = 0
    projected = []
    for block in model.gated_cross_attn_layers.values():
        block.attn.to_kv.register_forward_hook(lambda *_: projected.append(1))
    assert_same(logits(model, None, IDS, MASK), expected)
    assert torch.equal(model.generate(None, IDS, MASK, max_new_tokens=3), generated)
    assert model.vision_encoder.images_seen == 0 and not projected
    model.uncache_media()
    with pytest.raises(ValueError, match="but only 0 images were given"):
        model(None, IDS, MASK)


def test_text_behind_cached_media_sees_the_last_image_of_its_prompt(model):
    """The second row's prompt has one image, though there are two in the batch; a prompt without any leaves none."""
    ids, mask = prompts("i.i.", "i...", "....")
    images = pictures(3, 2)
    text, _ = prompts("...", "...", "...", seed=1)
    seen = torch.tensor([[1], [0], [-1]]).expand(3, 3)
    with torch.no_grad():
        media = model.gated_cross_attn_layers.project(model.perceiver(patch_features(model, images)))
    expected = logits(model, None, text, media=media, layout=MediaLayout(seen, 2))
    model.cache_media(ids, images)
    assert_same(logits(model, None, text), expected)
    assert_same(logits(model, None, ids, mask), logits(model, None, ids, mask, media=media, layout=layout_of(ids)))
    with torch.no_grad():
        beginning = model(None, ids, mask, use_cache=True).past_key_values
        behind = model(None, text, torch.cat((mask, torch.ones_like(text)), 1), past_key_values=beginning)
    model.uncache_media()
    whole = torch.cat((ids, text), dim=1)
    assert_same(behind.logits, logits(model, images, whole)[:, 4:])


def test_cached_media_hold_images_for_text_to_come(model):
    """More images than the prompt has `<image>` tokens: the text behind it brings those."""
    images = pictures(2, 3)
    ids, mask = extended_by_an_image()
    model.cache_media(IDS, images)
    with torch.no_grad():
        cache = model(None, IDS, MASK, use_cache=True).past_key_values
        behind = model(None, ids[:, 6:], mask, past_key_values=cache).logits
    model.uncache_media()
    assert_same(behind, logits(model, images, ids, mask)[:, 6:])


def extended_by_an_image():
    more = torch.tensor([[3, MEDIA, 4]] * 2)
    return torch.cat((IDS, more), dim=1), torch.cat((MASK, torch.ones_like(more)), dim=1)


def layout_of(ids):
    return MediaLayout.from_locations(ids == MEDIA, 2)


def test_images_beside_cached_media_are_an_error(model):
    model.cache_media(IDS, IMAGES)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="media are cached, and images were given"):
            call(IMAGES, IDS, MASK)
    model.cache_media(IDS, -IMAGES)  # replaces them
    replaced = logits(model, None, IDS, MASK)
    model.uncache_media()
    assert_same(replaced, logits(model, -IMAGES, IDS, MASK))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_cached_media_serve_the_rows_they_were_cached_for(model, rows):
    """Of other numbers of rows nobody knows which prompt they stand behind."""
    model.cache_media(IDS, IMAGES)
    text = torch.randint(2, EOC, (rows, 3))
    for call in (model, lambda *given: model.generate(*given, max_new_tokens=2)):
        with pytest.raises(ValueError, match=f"2 rows.*{rows} rows|{rows} rows.* 2 rows"):
            call(None, text)


# ---------------------------------------------------------------------------------------------------- training


def test_gradients_reach_what_is_trained_and_nothing_that_is_frozen(model):
    model.vision_encoder.requires_grad_(False)
    model.lang_encoder.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    model(IMAGES, IDS, MASK, labels=IDS).loss.backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    expected = {name for name, _ in model.named_parameters() if name.startswith(("perceiver", "gated_cross_attn"))}
    assert trained == expected | {"lang_encoder.model.embed_tokens.weight"}


def test_gradients_are_those_of_finite_differences():
    """Through the text, the block, the resampler and the encoder, at one weight of each."""
    model = exact_flamingo("opt")  # computes in float64 throughout
    labels = IDS.masked_fill(MASK == 0, -100)
    weights = [
        model.vision_encoder.embed.weight,
        model.perceiver.latents,
        model.gated_cross_attn_layers["1"].attn.to_kv.weight,
    ]

    def loss():
        scores = model(IMAGES, IDS, MASK).logits[:, :-1].log_softmax(-1)
        chosen = scores.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
        return -chosen[labels[:, 1:] >= 0].mean()

    for gradient, weight in zip(torch.autograd.grad(loss(), weights), weights, strict=True):
        place = divmod(int(gradient.abs().argmax()), weight.shape[1])
        step, around = 1e-5, []
        with torch.no_grad():
            for sign in (1, -2):
                weight[place] += sign * step
                around.append(loss())
            weight[place] += step
        torch.testing.assert_close(gradient[place], (around[0] - around[1]) / (2 * step), rtol=1e-5, atol=1e-9)


def test_a_model_in_half_precision_says_about_the_same():
    model = exact_flamingo()
    exact = logits(model, IMAGES, IDS, MASK)
    half = model.bfloat16()
    found = logits(half, IMAGES, IDS, MASK)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert half.generate(IMAGES, IDS, MASK, max_new_tokens=3).dtype == torch.int64
    assert half.score_sequences(IMAGES, IDS, [torch.tensor([3])], MASK).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- saved and loaded


def settings(config):
    """What a config says, apart from where and by whom it was saved."""
    said = config if isinstance(config, dict) else config.to_dict()
    unlike = ("_name_or_path", "dtype", "architectures", "transformers_version")
    return {k: settings(v) if isinstance(v, dict) else v for k, v in said.items() if k not in unlike}


def reloaded(model, folder, **options):
    model.save_pretrained(folder, max_shard_size="40KB")
    return Flamingo.from_pretrained(folder, own_vision_encoder=TinyVision(), **options)


def test_a_saved_model_loads_again(of_each_family, tmp_path):
    model = copy.deepcopy(of_each_family).float()
    again = reloaded(model, tmp_path)
    files = sorted(os.listdir(tmp_path))
    assert sum(name.endswith(".safetensors") for name in files) > 2, "sharded"
    assert all(name.endswith((".safetensors", ".json")) for name in files)
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert_close(logits(again, IMAGES, IDS, MASK), logits(model, IMAGES, IDS, MASK))
    assert torch.equal(
        again.generate(IMAGES, IDS, MASK, max_new_tokens=4), model.generate(IMAGES, IDS, MASK, max_new_tokens=4)
    )
    ids = (again.generation_config.eos_token_id, again.generation_config.pad_token_id)
    assert ids == (EOC, PAD) and again.generation_config.use_cache
    assert settings(again.config) == settings(model.config)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied_and_others_apart(tied, tmp_path):
    lm = randomized(tiny_language_model("llama", tie_word_embeddings=tied))
    again = reloaded(tiny_flamingo(language_model=lm), tmp_path).lang_encoder
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again.lm_head.weight, lm.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, lm.model.embed_tokens.weight)


def test_a_resized_vocabulary_is_saved_and_loaded(tmp_path):
    lm = tiny_language_model("llama")
    lm.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    model = tiny_flamingo(language_model=lm)
    again = reloaded(model, tmp_path)
    assert again.config.text_config.vocab_size == VOCAB + 3
    assert_close(logits(again, IMAGES, IDS, MASK), logits(model, IMAGES, IDS, MASK))


def test_a_vision_tower_is_saved_with_the_model(tmp_path):
    torch.manual_seed(0)
    tower = randomized(VisionTower.from_config(TOWER)).eval()
    lm = tiny_language_model("opt")
    model = randomized(Flamingo(tower, lm, EOC, MEDIA, VIS_DIM, 2, num_latents=3, resampler_depth=1)).eval()
    images = torch.randn(2, 2, 1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    again = Flamingo.from_pretrained(tmp_path)
    assert_close(logits(again, images, IDS, MASK), logits(model, images, IDS, MASK))
    with pytest.raises(ValueError, match="own_vision_encoder was given, but this model has a vision tower"):
        Flamingo.from_pretrained(tmp_path, own_vision_encoder=TinyVision())


def test_an_own_vision_encoder_must_be_given_again(tmp_path):
    tiny_flamingo().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass the module as own_vision_encoder"):
        Flamingo.from_pretrained(tmp_path)


def test_missing_weights_are_an_error(tmp_path):
    model = tiny_flamingo()
    weights = {name: each for name, each in model.state_dict().items() if "perceiver.latents" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, perceiver\.latents"):
        Flamingo.from_pretrained(tmp_path, own_vision_encoder=TinyVision())


def test_a_load_report_is_given_to_whoever_asks(tmp_path):
    model, report = reloaded(tiny_flamingo(), tmp_path, output_loading_info=True)
    assert isinstance(model, Flamingo) and not report["missing_keys"] and not report["unexpected_keys"]


def test_a_model_is_loaded_in_the_precision_asked_for(tmp_path):
    again = reloaded(tiny_flamingo(), tmp_path, dtype=torch.bfloat16)
    kinds = {each.dtype for name, each in again.named_parameters() if not name.startswith("vision_encoder")}
    assert kinds == {torch.bfloat16}
    assert logits(again, IMAGES, IDS, MASK).isfinite().all()


def test_the_attention_of_the_language_model_survives_wrapping_and_loading(tmp_path):
    for kind in ("eager", "sdpa"):
        lm = tiny_language_model("llama")
        lm.set_attn_implementation(kind)
        model = tiny_flamingo(language_model=lm)
        assert model.lang_encoder.config._attn_implementation == kind
        again = reloaded(model, tmp_path, attn_implementation=kind)
        attention = again.lang_encoder.model.layers[0].self_attn
        assert again.lang_encoder.config._attn_implementation == attention.config._attn_implementation == kind


def test_a_model_that_compiles_its_decoding_is_saved(tmp_path):
    model = tiny_flamingo()
    expected = model.generate(IMAGES, IDS, MASK, max_new_tokens=4)
    model.compile_decode()
    again = reloaded(model, tmp_path)
    assert torch.equal(again.generate(IMAGES, IDS, MASK, max_new_tokens=4), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_the_same_after_json(family, tmp_path):
    text = tiny_language_model(family).config
    config = FlamingoConfig(text, TOWER, EOC, MEDIA, VIS_DIM, 3, "a.path", 5, 2, 7)
    config.save_pretrained(tmp_path)
    for again in (FlamingoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is FlamingoConfig and type(again.text_config) is type(text)
        assert type(again.vision_config) is CLIPVisionConfig
        assert settings(again) == settings(config)
        assert (again.eoc_token_id, again.media_token_id, again.vis_dim) == (EOC, MEDIA, VIS_DIM)
        assert (again.cross_attn_every_n_layers, again.decoder_layers_attr_name) == (3, "a.path")
        assert (again.num_latents, again.resampler_depth, again.max_num_frames) == (5, 2, 7)
        assert again.tie_word_embeddings == text.tie_word_embeddings
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "flamingo"


def test_a_model_is_built_from_its_config():
    text = tiny_language_model("opt").config
    config = FlamingoConfig(text, TOWER, EOC, MEDIA, VIS_DIM, 2, num_latents=3, resampler_depth=2, max_num_frames=4)
    model = Flamingo(config)
    assert list(model.gated_cross_attn_layers) == ["1", "3"] and len(model.perceiver.layers) == 2
    assert model.perceiver.latents.shape == (3, VIS_DIM) and model.perceiver.frame_embs.shape == (4, VIS_DIM)
    assert logits(model, torch.randn(2, 2, 1, 3, 8, 8), IDS, MASK).shape == (2, 6, VOCAB)


def test_embeddings_are_those_of_the_language_model(model):
    lm = model.lang_encoder
    assert model.get_input_embeddings() is lm.model.embed_tokens and model.get_output_embeddings() is lm.lm_head
    new = nn.Embedding(VOCAB, 32).double()
    model.set_input_embeddings(new)
    assert lm.model.embed_tokens is new
