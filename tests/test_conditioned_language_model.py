"""The text half: rows go back to any slot and forward again, and its first layers are a model of their own."""

import random

import pytest
import torch

from conditioned_language_model import ConditionedLanguageModel, check_prompts, sharpen
from laws import assert_same
from tiny_flamingo import IMAGE, PAD, TINY, random_images, tiny_flamingo

LAYOUTS = {
    "one image each": ["i..", "..i....", "i...."],
    "several images, and none": ["i..i.", "....", ".i..i.i"],
    "one row": ["i...."],
}


def prompts(layout):
    """i: an image, .: a random word -> ids int64[B, T] padded on the left, and visual tokens."""
    rng, length = random.Random(0), max(map(len, layout))
    rows = [[IMAGE if mark == "i" else rng.randrange(3, TINY.vocabulary_size) for mark in row] for row in layout]
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    media = torch.randn(len(rows), max(row.count("i") for row in layout), TINY.num_latents, TINY.vision_dim)
    return ids, media


def words(*shape):
    return torch.randint(3, TINY.vocabulary_size, shape)


# ---------------------------------------------------------------------------------------------------- rolling back


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_rows_go_back_to_where_they_are_told(float64, layout, seed):
    """Each row at a place of its own, again and again: the logits are those of a full forward over what then stands
    there."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), tiny_flamingo()
    ids, media = prompts(LAYOUTS[layout])
    rows, width = ids.shape
    _, state = model.prefill(ids, media, slots=width + 24)
    text = [row.tolist() for row in ids]
    for _ in range(6):
        start = [rng.randint(width, len(row)) for row in text]
        new = words(rows, rng.randint(1, 4))
        logits = model.decode(new, state, torch.tensor(start))
        assert state.cache.length.tolist() == [place + new.shape[1] for place in start]
        text = [row[:place] + more.tolist() for row, place, more in zip(text, start, new, strict=True)]
        for i, row in enumerate(text):
            everything = torch.tensor([row])
            full = model(everything, media=media[i : i + 1], attention_mask=everything != PAD)
            assert_same(logits[i], full[0, -new.shape[1] :])


def test_without_a_start_rows_go_on_from_where_they_are(float64):
    model = tiny_flamingo()
    ids, media = prompts(LAYOUTS["one image each"])
    _, state = model.prefill(ids, media, slots=20)
    _, other = model.prefill(ids, media, slots=20)
    first, second = words(3, 2), words(3, 3)
    model.decode(first, state)
    model.decode(first, other, torch.full((3,), 7))
    places = torch.full((3,), 9)
    assert torch.equal(model.decode(second, state), model.decode(second, other, places))
    assert places.tolist() == [9] * 3, "the caller's tensor is left alone"


def test_what_was_taken_back_is_forgotten(float64):
    """Other words read before the same place leave no trace."""
    model = tiny_flamingo()
    ids, media = prompts(LAYOUTS["several images, and none"])
    start, new = torch.full((3,), ids.shape[1]), words(3, 3)
    states = [model.prefill(ids, media, slots=20)[1] for _ in range(2)]
    model.decode(words(3, 8), states[0])
    assert torch.equal(model.decode(new, states[0], start), model.decode(new, states[1], start))


def test_rolling_back_moves_no_tensor():
    """Static shapes and places: a captured graph stays right."""
    model = tiny_flamingo()
    ids, media = prompts(LAYOUTS["one image each"])
    _, state = model.prefill(ids, media, slots=20)
    place = state.cache.length.data_ptr()
    model.decode(words(3, 2), state, torch.tensor([7, 7, 7]))
    model.decode(words(3, 2), state, torch.tensor([8, 7, 9]))
    assert state.cache.length.data_ptr() == place


# ---------------------------------------------------------------------------------------------------- first layers


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_layers_are_the_model_built_with_them(float64, depth, every):
    model = tiny_flamingo(cross_attn_every_n_layers=every)
    shallow = model.first_layers(depth)
    built = tiny_flamingo(cross_attn_every_n_layers=every, depth=depth)
    tensors = model.state_dict()
    built.load_state_dict({name: tensors[name] for name in built.state_dict()})
    assert shallow.config == built.config
    for layout in LAYOUTS.values():
        ids, media = prompts(layout)
        mask = ids != PAD
        assert torch.equal(shallow(ids, media, mask), built(ids, media=media, attention_mask=mask))
        assert torch.equal(shallow.generate(ids, media, 6), built.generate(ids, media=media, max_new_tokens=6))


def test_all_layers_are_the_model(float64):
    model = tiny_flamingo()
    for layout in LAYOUTS.values():
        ids, media = prompts(layout)
        assert torch.equal(model.first_layers(3)(ids, media), model(ids, media=media))
        assert torch.equal(model.first_layers(3).generate(ids, media), model.generate(ids, media=media))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_layers_share_their_weights(depth):
    model = tiny_flamingo()
    ours, shared = dict(model.named_parameters()), dict(model.first_layers(depth).named_parameters())
    assert all(parameter is ours[name] for name, parameter in shared.items())
    text = [name for name in ours if name.startswith(("language_model", "gated_layers"))]
    deeper = tuple(f"{part}.{i}." for part in ("language_model.layers", "gated_layers") for i in range(depth, 3))
    assert set(shared) == {name for name in text if not name.startswith(deeper)}


def test_taking_the_first_layers_leaves_the_model_as_it_was():
    model = tiny_flamingo().freeze_pretrained().train()
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    shallow = model.first_layers(1)
    assert shallow.training and model.training and len(model.language_model.layers) == len(model.gated_layers) == 3
    for name, parameter in model.named_parameters():
        assert before[name][0] is parameter and before[name][1] == parameter.requires_grad
    assert not model.eval().first_layers(1).training and not model.training


def test_the_first_layers_of_a_half_precision_model_are_half_precision():
    model = tiny_flamingo().bfloat16()
    ids, media = prompts(LAYOUTS["one image each"])
    assert model.first_layers(2)(ids, media.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_layers_that_the_model_does_not_have_are_an_error(depth):
    with pytest.raises(ValueError, match=f"depth must be between 1 and 3; got {depth}"):
        tiny_flamingo().first_layers(depth)


# ---------------------------------------------------------------------------------------------------- alone


def test_it_works_without_a_vision_encoder(float64):
    """The text half of a Mini Flamingo, alone, says what the whole says of the same visual tokens."""
    whole = tiny_flamingo()
    alone = ConditionedLanguageModel(TINY).eval()
    tensors = whole.state_dict()
    alone.load_state_dict({name: tensors[name] for name in alone.state_dict()})
    media = whole.encode_media(random_images(3, 3))
    ids, _ = prompts(LAYOUTS["several images, and none"])
    assert torch.equal(alone(ids, media), whole(ids, media=media))
    assert torch.equal(alone.generate(ids, media), whole.generate(ids, media=media))
    drawn = [
        model.generate(ids, media=media, temperature=1.5, top_p=0.9, generator=torch.Generator().manual_seed(1))
        for model in (alone, whole)
    ]
    assert torch.equal(*drawn)


def test_sharper_attention_has_larger_queries_and_keys_and_the_same_values():
    attention = tiny_flamingo().gated_layers["0"].attn
    queries, (keys, values) = attention.to_q.weight.clone(), attention.to_kv.weight.clone().chunk(2)
    sharpen(attention, 3.0)
    torch.testing.assert_close(attention.to_q.weight, 3 * queries)
    torch.testing.assert_close(attention.to_kv.weight, torch.cat((3 * keys, values)))


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(1, 6, 80), (1, 0, 6, 80), (6, 80)])
def test_media_without_an_image_are_an_error(shape):
    model = ConditionedLanguageModel(TINY)
    ids, media = torch.tensor([[IMAGE, 5]]), torch.zeros(shape)
    for call in (model, model.generate, lambda *given: model.prefill(*given, slots=4)):
        with pytest.raises(ValueError, match=r"there must be media float\[B, M, L, D\] with M at least 1; got shape"):
            call(ids, media)


def test_rows_that_do_not_fit_are_an_error():
    model = ConditionedLanguageModel(TINY)
    for ids in (torch.tensor([IMAGE, 5]), torch.tensor([[IMAGE, 5]])):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] with one row for each of 2 rows of images"):
            model(ids, torch.zeros(2, 1, 6, 80))


def test_more_image_tokens_than_images_are_an_error():
    model = ConditionedLanguageModel(TINY)
    for call in (model, model.generate, lambda *given: model.prefill(*given, slots=4)):
        with pytest.raises(ValueError, match="image number 2, but only 1 images were given"):
            call(torch.tensor([[IMAGE, IMAGE, 5]]), torch.zeros(1, 1, 6, 80))


def test_prompts_that_cannot_be_continued_are_an_error():
    check_prompts(torch.tensor([[PAD, 5]]), PAD, 1)
    for ids in ([[5, PAD]], [[5, 6], [PAD, PAD]], [[]]):
        with pytest.raises(ValueError, match="every prompt must end in a token to continue: pad prompts on the left"):
            check_prompts(torch.tensor(ids), PAD, 1)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1; got 0"):
        check_prompts(torch.tensor([[5]]), PAD, 0)
