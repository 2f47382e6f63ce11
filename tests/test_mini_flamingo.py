"""The Mini Flamingo: closed gates are its language model, and generating is the full forward repeated."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from interleaved_text import WordTokenizer
from laws import assert_same
from mini_flamingo import PRESETS, MiniFlamingo, parameter_table, preset
from shapes_texts import VOCABULARY
from shapes_world import IMAGE_SIZE
from tiny_flamingo import EOC, IMAGE, PAD, TINY, random_images, set_gates, tiny_flamingo
from token_sampling import choose_token

WORDS = range(3, TINY.vocabulary_size)
# Rotary angles are float32, so a prompt shifted by its padding agrees to about 2^-20 radians times the layers' gain.
ROTARY = {"rtol": 1e-4, "atol": 1e-4}
LAYOUTS = {
    "one image in front": ["i...", "i......", "i."],
    "text before the first image": ["..i...", ".i", "....i"],
    "several images": ["i..i.i..", "i...", "..i....i..i"],
    "no image in one row": ["....", "i..", "i.i.i"],
    "the image last": ["i..i", "..i", "i"],
}


def prompts(layout, seed=0):
    """i: an image, .: a random word -> ids int64[B, T] padded on the left, images for the row with most, plain rows."""
    rng = random.Random(seed)
    rows = [[IMAGE if mark == "i" else rng.choice(WORDS) for mark in row] for row in layout]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return ids, random_images(len(rows), max(row.count("i") for row in layout)), rows


def naive_greedy(model, row, images, count):
    """One row, unpadded, without a cache: everything is computed again for every token."""
    ids = torch.tensor([row])
    for _ in range(count):
        logits = model(ids, images=images[None])[0, -1].clone()
        logits[[PAD, IMAGE]] = float("-inf")
        ids = torch.cat((ids, logits.argmax().reshape(1, 1)), dim=1)
        if ids[0, -1] == EOC:
            break
    return ids[0, len(row) :].tolist()


def count_flops(function):
    """Of one call, matrix products inside the attention included: the counter does not know the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("layout", LAYOUTS)
def test_closed_gates_are_the_language_model(layout):
    """Exactly, bit for bit: training begins with the frozen model's own words."""
    model = tiny_flamingo(gate=0.0)
    ids, images, _ = prompts(LAYOUTS[layout])
    mask = ids != PAD
    assert torch.equal(model(ids, images, attention_mask=mask), model.language_model(ids, mask))
    assert torch.equal(model(ids, images), model.language_model(ids))
    opened = set_gates(model, 0.5)(ids, images, attention_mask=mask)
    assert (opened != model.language_model(ids, mask)).any(-1)[mask].all()


def test_new_models_have_closed_gates():
    model = MiniFlamingo(TINY)
    ids, images, _ = prompts(LAYOUTS["several images"])
    assert torch.equal(model(ids, images), model.language_model(ids))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_a_batch_is_the_row_alone(float64, layout):
    model = tiny_flamingo()
    ids, images, rows = prompts(LAYOUTS[layout])
    together = model(ids, images, attention_mask=ids != PAD)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row]), images[i : i + 1])[0]
        torch.testing.assert_close(together[i, -len(row) :], alone, **ROTARY)


def test_words_feel_their_own_image_and_those_before_it():
    """An image reaches the words from its <image> on (later ones by self-attention), and nothing in front of it."""
    model = tiny_flamingo()
    ids, images, rows = prompts([".i..i.."])
    before = model(ids, images)
    for number, place in enumerate(i for i, token in enumerate(rows[0]) if token == IMAGE):
        changed = images.clone()
        changed[0, number] = 255 - changed[0, number]
        differs = (model(ids, changed) != before).any(-1)[0]
        assert differs.tolist() == [t >= place for t in range(len(rows[0]))]


def test_images_and_their_visual_tokens_say_the_same():
    model = tiny_flamingo()
    ids, images, _ = prompts(LAYOUTS["several images"])
    media = model.encode_media(images)
    assert media.shape == (3, 3, TINY.num_latents, TINY.vision_dim)
    assert torch.equal(model(ids, images), model(ids, media=media))
    assert torch.equal(model.generate(ids, images), model.generate(ids, media=media))


def test_visual_tokens_are_the_resampled_patches_of_each_image():
    model, images = tiny_flamingo(), random_images(2, 3)
    media = model.encode_media(images, num_latents=4, depth=1)
    for row in range(2):
        for number in range(3):
            patches = model.vision_encoder(images[row, number : number + 1])
            expected = model.resampler(patches, 4, 1)[0]
            torch.testing.assert_close(media[row, number], expected, rtol=1e-4, atol=1e-5)


def test_a_video_s_visual_tokens_read_the_patches_of_all_its_frames():
    model, frames = tiny_flamingo(), random_images(2, 3, 4)
    media = model.encode_media(frames)
    assert media.shape == (2, 3, TINY.num_latents, TINY.vision_dim)
    patches = torch.cat([model.vision_encoder(frames[1, 2, f : f + 1]) for f in range(4)], dim=1)
    torch.testing.assert_close(media[1, 2], model.resampler(patches)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode_media(frames[:, :, :1]), model.encode_media(frames[:, :, 0]))
    ids, _, _ = prompts(["i..i.i", "i....."])
    assert torch.equal(model.generate(ids, frames), model.generate(ids, media=media))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_gated_blocks_stand_before_every_nth_layer(every):
    model = tiny_flamingo(cross_attn_every_n_layers=every)
    assert [int(name) for name in model.gated_layers] == [i for i in range(3) if (i + 1) % every == 0]
    ids, images, _ = prompts(LAYOUTS["several images"])
    media = model.encode_media(images)
    locations = ids == IMAGE

    def read(i, x):
        return model.gated_layers[str(i)](x, media, media_locations=locations) if str(i) in model.gated_layers else x

    expected = model.language_model(ids, before_layer=read)
    torch.testing.assert_close(model(ids, images), expected)
    assert [kv is not None for kv in model.project_media(media)] == [(i + 1) % every == 0 for i in range(3)]


# ---------------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generating_is_the_full_forward_repeated(float64, layout):
    """Against every row alone, unpadded and uncached; the tiny model ends some rows early."""
    model = tiny_flamingo()
    for seed in range(2):
        ids, images, rows = prompts(LAYOUTS[layout], seed)
        generated = model.generate(ids, images, max_new_tokens=12)
        naive = [naive_greedy(model, row, images[i], 12) for i, row in enumerate(rows)]
        longest = max(map(len, naive))
        assert generated.tolist() == [row + [PAD] * (longest - len(row)) for row in naive]


def test_a_row_generates_what_it_generates_alone(float64):
    model = tiny_flamingo()
    ids, images, rows = prompts(LAYOUTS["several images"])
    together = model.generate(ids, images, max_new_tokens=10)
    for i, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), images[i : i + 1], max_new_tokens=10)[0].tolist()
        assert together[i].tolist() == alone + [PAD] * (together.shape[1] - len(alone))


def test_what_is_generated_depends_on_the_image():
    model = tiny_flamingo(gate=3.0)  # random weights: wide open gates let them speak
    ids = torch.tensor([[IMAGE, 5, 6]]).expand(8, -1)
    assert len({tuple(row) for row in model.generate(ids, random_images(8, 1), max_new_tokens=8).tolist()}) > 1


def test_decoding_continues_the_prompt(float64):
    """prefill and decode, token by token and several at once, against the full forward over all of it."""
    model = tiny_flamingo()
    ids, images, _ = prompts(LAYOUTS["several images"])
    words = torch.randint(3, TINY.vocabulary_size, (3, 6))
    everything = torch.cat((ids, words), dim=1)
    full = model(everything, images, attention_mask=everything != PAD)
    for chunks in ([1] * 6, [6], [2, 1, 3]):
        logits, state = model.prefill(ids, model.encode_media(images), slots=ids.shape[1] + 6)
        assert_same(logits, full[:, ids.shape[1] - 1])
        start = 0
        for chunk in chunks:
            logits = model.decode(words[:, start : start + chunk], state)
            here = ids.shape[1] + start
            assert_same(logits, full[:, here : here + chunk])
            start += chunk


def force(model, token, logit=1e4):
    """Makes one word the most likely one, whatever was read."""
    original = model.language_model.forward

    def forward(*arguments, **named):
        logits = original(*arguments, **named)
        return logits.index_fill(-1, torch.tensor([token]), logit)

    model.language_model.forward = forward
    return model


def test_generating_stops_at_the_end_of_the_chunk():
    """Each row keeps its end-of-chunk token and is padded behind it; when all have ended, no more tokens are made."""
    model = tiny_flamingo()
    ids, images, _ = prompts(["i..", "i....", "i."])
    free = model.generate(ids, images, max_new_tokens=10)
    first = [row.index(EOC) if EOC in row else 10 for row in free.tolist()]
    for row, end in zip(free.tolist(), first, strict=True):
        assert PAD not in row[:end]
        assert row[end + 1 :] == [PAD] * len(row[end + 1 :])
    stopped = force(tiny_flamingo(), EOC).generate(ids, images, max_new_tokens=10)
    assert stopped.tolist() == [[EOC]] * 3


def test_rows_end_one_by_one():
    """The word a row says third is declared the end of chunk: the others go on until they say it."""
    model = tiny_flamingo()
    ids, images, _ = prompts(["i..", "i....", "i.", ".i.."])
    model.config = replace(model.config, eoc_token_id=TINY.vocabulary_size)  # no word: rows run on
    free = model.generate(ids, images, max_new_tokens=12).tolist()
    assert all(len(row) == 12 and PAD not in row for row in free)
    for end in {row[2] for row in free}:
        model.config = replace(model.config, eoc_token_id=end)
        ended = [row[: row.index(end) + 1] if end in row else row for row in free]
        longest = max(map(len, ended))
        expected = [row + [PAD] * (longest - len(row)) for row in ended]
        assert model.generate(ids, images, max_new_tokens=12).tolist() == expected


@pytest.mark.parametrize("token", [PAD, IMAGE])
def test_padding_and_images_are_never_generated(token):
    """Not even where the model wants nothing else."""
    model = force(tiny_flamingo(), token)
    ids, images, _ = prompts(LAYOUTS["several images"])
    for settings in ({}, {"temperature": 3.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}):
        for row in model.generate(ids, images, max_new_tokens=20, **settings).tolist():
            spoken = row[: row.index(EOC) + 1] if EOC in row else row
            assert spoken and not {PAD, IMAGE} & set(spoken)


def test_sampling_is_the_full_forward_with_the_same_draws(float64):
    """A generator decides everything: the naive loop, which computes all again, draws the same words."""
    model = tiny_flamingo()
    model.config = replace(model.config, eoc_token_id=TINY.vocabulary_size)
    ids, images, _ = prompts(LAYOUTS["text before the first image"])
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}):
        generated = model.generate(ids, images, None, 8, generator=torch.Generator().manual_seed(3), **settings)
        generator, everything = torch.Generator().manual_seed(3), ids
        for _ in range(8):
            logits = model(everything, images, attention_mask=everything != PAD)[:, -1].clone()
            logits[:, [PAD, IMAGE]] = float("-inf")
            token = choose_token(logits, generator=generator, **settings)
            everything = torch.cat((everything, token[:, None]), dim=1)
        assert torch.equal(generated, everything[:, ids.shape[1] :])


def test_sampling_is_decided_by_the_generator():
    model = tiny_flamingo()
    ids, images, _ = prompts(LAYOUTS["several images"])

    def sampled(seed):
        return model.generate(ids, images, temperature=2.0, generator=torch.Generator().manual_seed(seed)).tolist()

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def decoding_flops(images):
    model = tiny_flamingo()
    ids = torch.tensor([[IMAGE, 5] * images + [6] * (16 - 2 * images)])
    _, state = model.prefill(ids, model.encode_media(random_images(1, images)), slots=18)
    return count_flops(lambda: model.decode(torch.tensor([[7]]), state))


def test_a_generated_token_costs_the_same_whatever_the_number_of_images():
    assert decoding_flops(1) == decoding_flops(8) > 0


def test_decoding_never_projects_an_image():
    """Keys and values were made once, in the prompt."""
    model = tiny_flamingo()
    ids, images, _ = prompts(["i..i.", "i...."])
    _, state = model.prefill(ids, model.encode_media(images), slots=8)
    for block in model.gated_layers.values():
        block.attn.to_kv.weight.data.fill_(float("nan"))
        block.attn.project_media = None
    assert model.decode(torch.tensor([[5], [6]]), state).isfinite().all()


def test_decoding_leaves_shapes_alone():
    model = tiny_flamingo()
    ids, images, _ = prompts(["i..i.", "i...."])
    _, state = model.prefill(ids, model.encode_media(images), slots=9)
    tensors = [*state.cache.mixed, *(each for kv in state.cache.kv for each in (kv.k, kv.v))]
    tensors += [each for kv in state.media_kv for each in (kv.k, kv.v)] + [state.cache.is_token, state.cache.length]
    before = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
    for _ in range(4):
        model.decode(torch.tensor([[5], [6]]), state)
    assert [(tensor.data_ptr(), tensor.shape) for tensor in tensors] == before
    assert all(kv.k.shape[1] == 1 for kv in state.media_kv), "the row's current image alone"


# ---------------------------------------------------------------------------------------------------- parameters


def test_the_parameter_table_adds_up():
    model = tiny_flamingo().freeze_pretrained()
    *parts, total = parameter_table(model)
    assert {row["part"]: row["trained"] for row in parts if not row["frozen"]}.keys() == {"resampler", "gated_layers"}
    assert {row["part"] for row in parts if not row["trained"]} == {"vision_encoder", "language_model"}
    assert total["part"] == "total"
    assert total["total"] == sum(parameter.numel() for parameter in model.parameters())
    for column in ("total", "frozen", "trained"):
        assert total[column] == sum(row[column] for row in parts)
    for row in parts:
        assert row["total"] == row["frozen"] + row["trained"] > 0


def test_only_the_resampler_and_the_gated_blocks_learn():
    """Their gradients come back through the frozen language model, which keeps none."""
    model = tiny_flamingo().freeze_pretrained()
    ids, images, _ = prompts(LAYOUTS["several images"])
    logits = model(ids, images, attention_mask=ids != PAD)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD).backward()
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("resampler", "gated_layers"):
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_closed_gates_learn_first():
    """With both gates of a block at 0 only the gates themselves get a gradient."""
    model = tiny_flamingo(gate=0.0).freeze_pretrained()
    ids, images, _ = prompts(LAYOUTS["several images"])
    model(ids, images).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad.abs().sum() > 0) == name.endswith("gate"), name


@pytest.mark.parametrize(("name", "gated", "patches"), [("shapes", 4, 100), ("paper", 3, 576), ("gpt2", 12, 196)])
def test_every_preset_can_be_built(name, gated, patches):
    with torch.device("meta"):
        model = MiniFlamingo(preset(name))
    assert len(model.gated_layers) == gated
    assert model.vision_encoder.num_patches == patches
    assert len(model.resampler.latents) == 64


def test_the_shapes_preset_fits_the_shapes_world():
    config, tokenizer = preset("shapes"), WordTokenizer(VOCABULARY)
    assert config.vocabulary_size == len(tokenizer)
    assert config.image_size == IMAGE_SIZE
    assert (config.pad_token_id, config.image_token_id, config.eoc_token_id) == (
        tokenizer.pad_id, tokenizer.image_id, tokenizer.eoc_id,
    )  # fmt: skip


def test_the_paper_preset_has_the_paper_s_dimensions():
    config = preset("paper")
    assert (config.dim, config.vision_dim, config.num_latents, config.resampler_depth) == (512, 512, 64, 4)
    assert (config.image_size // config.patch_size) ** 2 == 576


def test_an_unknown_preset_is_an_error():
    with pytest.raises(ValueError, match="unknown preset 'large'; there are shapes, paper, gpt2"):
        preset("large")
    assert set(PRESETS) == {"shapes", "paper", "gpt2"}


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 3, 16, 16), (1, 1, 1, 1, 3, 16, 16)])
def test_images_of_another_rank_are_an_error(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, M, 3, h, w\] or \[B, M, F, 3, h, w\]; got shape"):
        tiny_flamingo().encode_media(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1, 3, 16, 24), (1, 1, 3, 32, 32), (1, 1, 4, 16, 16), (1, 1, 2, 1, 16, 16)])
def test_images_of_another_size_are_an_error(shape):
    with pytest.raises(ValueError, match=r"images must be \[N, 3, 16, 16\]; got shape"):
        tiny_flamingo().encode_media(torch.zeros(shape))


def test_more_image_tokens_than_images_are_an_error():
    model, ids = tiny_flamingo(), torch.tensor([[IMAGE, 5, 6, 7], [IMAGE, 5, IMAGE, 6]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="image number 2, but only 1 images were given"):
            call(ids, random_images(2, 1))


def test_images_and_media_exclude_each_other():
    model, ids, images = tiny_flamingo(), torch.tensor([[IMAGE, 5]]), random_images(1, 1)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="give exactly one of images and media"):
            call(ids)
        with pytest.raises(ValueError, match="give exactly one of images and media"):
            call(ids, images, model.encode_media(images))


@pytest.mark.parametrize("ids", [[IMAGE, 5], [[IMAGE, 5]], [[[IMAGE], [5]]]])
def test_text_without_a_row_for_each_row_of_images_is_an_error(ids):
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] with one row for each of 2 rows of images"):
        tiny_flamingo()(torch.tensor(ids), random_images(2, 1))


def test_media_of_another_rank_or_width_are_an_error():
    ids = torch.tensor([[IMAGE, 5]])
    with pytest.raises(ValueError, match=f"media must have 4 axes, the last of width {TINY.vision_dim}"):
        tiny_flamingo()(ids, media=torch.zeros(1, 1, 6, TINY.vision_dim + 1))
    with pytest.raises(ValueError, match=r"there must be media float\[B, M, L, D\] .*; got shape \[1, 6, 80\]"):
        tiny_flamingo()(ids, media=torch.zeros(1, 6, TINY.vision_dim))


@pytest.mark.parametrize("count", [0, -1])
def test_no_tokens_to_generate_is_an_error(count):
    with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1; got {count}"):
        tiny_flamingo().generate(torch.tensor([[IMAGE]]), random_images(1, 1), max_new_tokens=count)


def test_generate_names_bad_sampling_settings():
    with pytest.raises(ValueError, match="top_p must be above 0"):
        tiny_flamingo().generate(torch.tensor([[IMAGE]]), random_images(1, 1), temperature=1.0, top_p=0.0)


@pytest.mark.parametrize("ids", [[[IMAGE, 5, 6], [IMAGE, 5, PAD]], [[PAD, PAD]], [[]]])
def test_a_prompt_without_a_last_token_is_an_error(ids):
    """Padded on the right, or nothing at all."""
    ids = torch.tensor(ids, dtype=torch.int64)
    with pytest.raises(ValueError, match="every prompt must end in a token to continue: pad prompts on the left"):
        tiny_flamingo().generate(ids, random_images(len(ids), 1))


def test_no_image_at_all_is_an_error():
    model, ids = tiny_flamingo(), torch.tensor([[5, 6, 7]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="with M at least 1; got shape"):
            call(ids, random_images(1, 0))
