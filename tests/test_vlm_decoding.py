"""Generation and scoring: what a loop without any cache says, at the price of what is new."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LogitsProcessor

from flamingo_vlm.model import Flamingo
from laws import assert_same, randomized
from media_masks import MediaLayout, media_index_from_locations
from speculative_decoding import PromptLookup, Proposal, speculate
from tiny_vlm import (
    EOC,
    FAMILIES,
    MEDIA,
    PAD,
    VOCAB,
    exact_flamingo,
    pictures,
    prompts,
    tiny_flamingo,
    tiny_language_model,
)

IDS, MASK = prompts("i..i..", ".i...")
IMAGES = pictures(2, 2)
LENGTH, NEW = IDS.shape[1], 6
ENDLESS = {"eos_token_id": VOCAB, "max_new_tokens": NEW}  # a token that there is not


@pytest.fixture(scope="module", params=FAMILIES)
def of_each_family(request):
    return exact_flamingo(request.param)


@pytest.fixture(scope="module")
def shared():
    return exact_flamingo()


@pytest.fixture
def model(shared):
    """A copy, to be watched."""
    model = copy.deepcopy(shared)
    model.vision_encoder.images_seen = 0
    return model


class Wrong:
    """A draft whose guesses are refused."""

    def propose(self, text: Tensor, length: Tensor, count: int) -> Proposal:
        return Proposal(torch.full((len(text), count), MEDIA))


class Forced(LogitsProcessor):
    """Row r's new tokens are these, whatever the model says."""

    def __init__(self, *rows: list[int]):
        self.rows = torch.tensor(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.rows[:, input_ids.shape[1] - LENGTH, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0)


def read_whole(model, images, ids, mask):
    """Logits float[B, T, V] of the whole text, without a cache; an `<image>` without an image sees none."""
    index = media_index_from_locations(ids == MEDIA)
    with torch.no_grad():
        media = model.gated_cross_attn_layers.project(model.encode_media(images))
        layout = MediaLayout(index.masked_fill(index >= images.shape[1], -1), images.shape[1])
        return model(None, ids, mask, media=media, layout=layout).logits


def extended(ids, mask, token):
    """The text with one more token per row."""
    return torch.cat((ids, token[:, None]), dim=1), torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)


def naive_greedy(model, images, ids, mask, steps=NEW):
    """Texts and the logits of each step, reading the whole text each time."""
    steps_logits = []
    for _ in range(steps):
        last = read_whole(model, images, ids, mask)[:, -1].clone()
        steps_logits.append(last.clone())
        last[:, MEDIA] = -torch.inf
        ids, mask = extended(ids, mask, last.argmax(-1))
    return ids, torch.stack(steps_logits, dim=1)


def naive_beams(model, image, ids, beams, steps):
    """Of one prompt, the likeliest text that a beam search finds, without length penalty; no text ends early."""
    texts = [(0.0, ids)]
    for _ in range(steps):
        grown = []
        for score, text in texts:
            last = read_whole(model, image, text, torch.ones_like(text))[0, -1].log_softmax(-1)
            last[MEDIA] = -torch.inf
            grown += [(score + float(last[t]), torch.cat((text, torch.tensor([[t]])), dim=1)) for t in range(VOCAB)]
        texts = sorted(grown, key=lambda each: -each[0])[:beams]
    return [text for _, text in texts]


def near(steps, expected):
    """The logits of each step, which transformers rounds to float32."""
    torch.testing.assert_close(torch.stack(steps, dim=1), expected.float(), rtol=2e-5, atol=2e-5)


def watch(module, record):
    """Calls record(args, kwargs) before each call of the module."""
    module.register_forward_pre_hook(lambda module, args, kwargs: record(args, kwargs), with_kwargs=True)


# ---------------------------------------------------------------------------------------------------- what comes out


def test_greedy_text_is_that_of_a_loop_without_any_cache(of_each_family):
    """Left-padded, token by token, and every step's logits."""
    model = of_each_family
    expected, steps = naive_greedy(model, IMAGES, IDS, MASK)
    out = model.generate(IMAGES, IDS, MASK, **ENDLESS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, expected)
    near(out.logits, steps)


def test_trap_13_unpadded_text_needs_no_mask(of_each_family):
    ids, mask = prompts("i..i..", ".i....")
    expected, _ = naive_greedy(of_each_family, IMAGES, ids, mask)
    assert torch.equal(of_each_family.generate(IMAGES, ids, **ENDLESS), expected)


def test_a_row_is_what_it_is_alone(of_each_family):
    together = of_each_family.generate(IMAGES, IDS, MASK, **ENDLESS)
    for row, mask in enumerate(MASK):
        ids = IDS[row : row + 1, mask.bool()]
        alone = of_each_family.generate(IMAGES[row : row + 1], ids, **ENDLESS)
        assert torch.equal(together[row : row + 1, LENGTH:], alone[:, ids.shape[1] :])


def test_a_preallocated_cache_changes_nothing(of_each_family):
    for beams in (1, 2):
        expected = of_each_family.generate(IMAGES, IDS, MASK, **ENDLESS, num_beams=beams)
        static = of_each_family.generate(
            IMAGES, IDS, MASK, **ENDLESS, num_beams=beams, cache_implementation="static", disable_compile=True
        )
        assert torch.equal(static, expected)


def test_beams_are_those_of_a_search_without_any_cache(of_each_family):
    model, steps = of_each_family, 3
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": steps}
    found = model.generate(IMAGES, IDS, MASK, eos_token_id=VOCAB, **options).view(2, 3, -1)
    for row, mask in enumerate(MASK):
        texts = naive_beams(model, IMAGES[row : row + 1], IDS[row : row + 1, mask.bool()], 3, steps)
        assert [text[0, -steps:].tolist() for text in texts] == found[row, :, LENGTH:].tolist()


def test_beams_that_read_their_prompt_once_are_beams_that_read_it_each(of_each_family, monkeypatch):
    options = ENDLESS | {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0}
    shared = of_each_family.generate(IMAGES, IDS, MASK, **options)
    monkeypatch.setattr(Flamingo, "_once_per_prompt", lambda self, inputs: inputs)
    assert torch.equal(shared, of_each_family.generate(IMAGES, IDS, MASK, **options))


def test_trap_7_several_samples_of_several_prompts(of_each_family):
    options = ENDLESS | {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(of_each_family.generate(IMAGES, IDS, MASK, **options))
    first, again, other = runs
    assert first.shape == (6, LENGTH + NEW) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, :LENGTH], IDS.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in first}) == 6, "each is a sample of its own"
    assert not (first[:, LENGTH:] == MEDIA).any()


def test_samples_are_drawn_from_what_the_model_says(model):
    """Rows that share their prompt's forward pass each go on with a text of their own."""
    out = model.generate(
        IMAGES,
        IDS,
        MASK,
        **ENDLESS,
        do_sample=True,
        num_return_sequences=3,
        temperature=2.0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids, mask = out.sequences, torch.cat((MASK.repeat_interleave(3, 0), torch.ones(6, NEW, dtype=torch.long)), dim=1)
    whole = read_whole(model, IMAGES.repeat_interleave(3, 0), ids, mask)[:, LENGTH - 1 : -1]
    near(out.logits, whole)


def test_text_without_images_is_generated(of_each_family):
    ids, mask = prompts("....", "..")
    expected, _ = naive_greedy(of_each_family, IMAGES, ids, mask)
    assert torch.equal(of_each_family.generate(None, ids, mask, **ENDLESS), expected)


def test_a_row_without_images_beside_one_with_them_sees_none(of_each_family):
    ids, mask = prompts("....", ".i.")
    expected, steps = naive_greedy(of_each_family, IMAGES, ids, mask)
    out = of_each_family.generate(IMAGES, ids, mask, **ENDLESS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, expected)
    near(out.logits, steps)


def test_a_row_without_images_sees_none_of_those_that_are_cached(model):
    """Which are encoded, every one: what hides them is the count alone."""
    ids, mask = prompts("....", ".i.")
    expected, steps = naive_greedy(model, IMAGES, ids, mask)
    model.cache_media(ids, IMAGES)
    out = model.generate(None, ids, mask, **ENDLESS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, expected)
    near(out.logits, steps)


# ---------------------------------------------------------------------------------------------------- when it ends


def always(token, preference=1e4):
    """A model whose head prefers that token to all others, or to most."""
    model = exact_flamingo("phi")
    with torch.no_grad():
        model.lang_encoder.lm_head.bias[token] = preference
    return model


def test_text_ends_at_the_end_of_the_chunk():
    model = always(EOC)
    assert model.generate(IMAGES, IDS, MASK, max_new_tokens=4)[:, LENGTH:].tolist() == [[EOC]] * 2
    longer = model.generate(IMAGES, IDS, MASK, max_new_tokens=4, eos_token_id=5)
    assert longer[:, LENGTH:].tolist() == [[EOC] * 4] * 2
    shorter = always(7).generate(IMAGES, IDS, MASK, max_new_tokens=4, eos_token_id=[5, 7])
    assert shorter[:, LENGTH:].tolist() == [[7]] * 2


def test_a_row_that_has_ended_is_padded():
    script = Forced([3, EOC, 4, 4], [3, 4, EOC, 4])
    out = tiny_flamingo().generate(IMAGES, IDS, MASK, max_new_tokens=4, logits_processor=[script])
    assert out[:, LENGTH:].tolist() == [[3, EOC, PAD], [3, 4, EOC]]


def test_the_language_models_own_settings_stay():
    lm = tiny_language_model("llama")
    lm.generation_config.repetition_penalty = 1.5
    lm.generation_config.pad_token_id = None
    lm.generation_config.use_cache = False
    settings = tiny_flamingo(language_model=lm).generation_config
    assert (settings.repetition_penalty, settings.use_cache) == (1.5, True)
    assert settings.eos_token_id == settings.pad_token_id == EOC
    assert lm.generation_config.eos_token_id == 1 and lm.generation_config.use_cache is False, "and its own are its own"


def test_the_callers_processors_are_kept_and_their_list_is_theirs():
    processors = [Forced([3, 4], [5, 6])]
    out = tiny_flamingo().generate(IMAGES, IDS, MASK, max_new_tokens=2, logits_processor=processors)
    assert out[:, LENGTH:].tolist() == [[3, 4], [5, 6]] and len(processors) == 1


# ---------------------------------------------------------------------------------------------------- generated images


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_an_image_token_is_never_generated_unless_asked_for(options):
    model = always(MEDIA)
    out = model.generate(IMAGES, IDS, MASK, max_new_tokens=4, **options)
    assert not (out[:, LENGTH:] == MEDIA).any()
    asked = model.generate(IMAGES, IDS, MASK, max_new_tokens=4, allow_media_tokens=True, **options)
    assert (asked[:, LENGTH:] == MEDIA).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_trap_3_a_generated_image_token_moves_its_own_row_alone(of_each_family, cache):
    """The first row goes on to its third image, the second to its second and third and then has none left."""
    images = pictures(2, 3)
    script = Forced([3, 4, MEDIA, 5, 6, 7], [MEDIA, 3, MEDIA, MEDIA, 4, 5])
    out = of_each_family.generate(
        images,
        IDS,
        MASK,
        **ENDLESS,
        allow_media_tokens=True,
        logits_processor=[script],
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences[:, LENGTH:], script.rows)
    mask = torch.cat((MASK, torch.ones(2, NEW, dtype=torch.long)), dim=1)
    expected = read_whole(of_each_family, images, out.sequences, mask)[:, LENGTH - 1 : -1]
    near(out.logits, expected)


def test_beams_with_image_tokens_are_those_of_beams_that_own_their_images():
    """Three beams of two prompts, free to write `<image>`: what they read is counted from their own text."""
    options = ENDLESS | {"num_beams": 3, "num_return_sequences": 3, "allow_media_tokens": True, "max_new_tokens": 4}
    model, images = always(MEDIA, 7.0), pictures(2, 3)
    out = model.generate(images, IDS, MASK, **options, return_dict_in_generate=True, output_scores=True)
    ids = out.sequences
    written = (ids[:, LENGTH:] == MEDIA).sum(1)
    assert written.unique().numel() > 1, "beams of one prompt that stand at different images"
    mask = torch.cat((MASK.repeat_interleave(3, 0), torch.ones(6, 4, dtype=torch.long)), dim=1)
    scores = read_whole(model, images.repeat_interleave(3, 0), ids, mask)[:, LENGTH - 1 : -1].log_softmax(-1)
    total = scores.gather(-1, ids[:, LENGTH:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores.double(), total / 4, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}], ids=str)
def test_beams_and_samples_encode_each_image_and_read_each_prompt_once(model, options):
    shapes = []
    watch(model.lang_encoder.model.layers[0], lambda args, kwargs: shapes.append(tuple(args[0].shape[:2])))
    model.generate(IMAGES, IDS, MASK, **ENDLESS, **options)
    assert model.vision_encoder.images_seen == 3, "of four images text sees three"
    assert shapes == [(2, LENGTH)] + [(8, 1)] * (NEW - 1)


def test_trap_11_images_are_projected_once_and_a_step_reads_one_of_them(model):
    projected, read = [], []
    for block in model.gated_cross_attn_layers.values():
        watch(block.attn.to_kv, lambda args, kwargs: projected.append(len(args[0])))
        watch(block, lambda args, kwargs: read.append((args[1].k.shape[:2], args[2].num_media)))
    model.generate(IMAGES, IDS, MASK, **ENDLESS)
    assert projected == [2, 2], "one call for each of two blocks"
    assert read == [((2, 2), 2)] * 2 + [((2, 1), 1)] * 2 * (NEW - 1)


def test_trap_12_the_prompt_is_scored_at_its_last_token_alone(model):
    shapes = []
    watch(model.get_output_embeddings(), lambda args, kwargs: shapes.append(args[0].shape[1]))
    model.generate(IMAGES, IDS, MASK, **ENDLESS)
    model.generate(IMAGES, IDS, MASK, **ENDLESS, num_beams=2)
    assert shapes == [1] * 2 * NEW


def test_trap_12_generation_keeps_no_graph(model):
    recorded = []
    for module in (model.vision_encoder, model.perceiver, model.lang_encoder):
        module.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    out = model.generate(IMAGES, IDS, MASK, **ENDLESS, return_dict_in_generate=True, output_logits=True)
    scores = model.score_sequences(IMAGES, IDS, [torch.tensor([3])], MASK)
    assert not any(recorded) and len(recorded) > NEW
    assert not any(each.requires_grad for each in (*out.logits, scores))


def test_trap_7_an_exception_while_generating_leaves_nothing_behind(model):
    expected = model.generate(IMAGES, IDS, MASK, **ENDLESS)
    with torch.no_grad():
        plain = model.lang_encoder(IDS).logits

    def fail(input_ids, scores):
        if input_ids.shape[1] > LENGTH + 2:
            raise RuntimeError("stop")
        return scores

    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(-IMAGES, IDS, MASK, **ENDLESS, logits_processor=[fail], **options)
        with torch.no_grad():
            assert torch.equal(model.lang_encoder(IDS).logits, plain)
        assert torch.equal(model.generate(IMAGES, IDS, MASK, **ENDLESS), expected)


# ---------------------------------------------------------------------------------------------------- other ways


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def test_a_compiled_step_is_compiled_once(compiler):
    """For all steps, and for other images and texts of the same shape."""
    images, (ids, mask) = pictures(2, 2, seed=5), prompts(".i...i", "..i", seed=5)
    plain = tiny_flamingo()
    compiled = copy.deepcopy(plain)
    compiled.compile_decode(backend="eager")
    options = ENDLESS | {"max_new_tokens": 14}
    for given in ((IMAGES, IDS, MASK), (images, ids, mask)):
        assert torch.equal(compiled.generate(*given, **options), plain.generate(*given, **options))
        assert compiler["unique_graphs"] == 1


@pytest.mark.parametrize("family", ["mosaic_gpt", "opt"])
def test_the_language_models_of_openflamingo_compile(compiler, family):
    plain = tiny_flamingo(family)
    compiled = copy.deepcopy(plain)
    compiled.compile_decode(backend="eager")
    assert torch.equal(compiled.generate(IMAGES, IDS, MASK, **ENDLESS), plain.generate(IMAGES, IDS, MASK, **ENDLESS))
    assert compiler["unique_graphs"] == 1


def test_a_longer_text_and_another_cache_than_the_compiled_one(compiler, tmp_path):
    """What was asked of `compile_decode` is neither forced on a call that asks for something else, nor saved."""
    plain = tiny_flamingo()
    compiled = copy.deepcopy(plain)
    compiled.compile_decode(backend="eager")
    for new in (3, 9, 6):
        options = ENDLESS | {"max_new_tokens": new}
        assert torch.equal(
            compiled.generate(IMAGES, IDS, MASK, **options), plain.generate(IMAGES, IDS, MASK, **options)
        )
    before = compiler["unique_graphs"]
    compiled.generate(IMAGES, IDS, MASK, **ENDLESS, cache_implementation="dynamic")
    assert compiler["unique_graphs"] == before
    compiled.generation_config.save_pretrained(tmp_path)
    assert "static" not in (tmp_path / "generation_config.json").read_text()


@pytest.mark.parametrize(
    ("family", "changes"), [("mpt", {}), ("mistral", {"sliding_window": 32})], ids=["mpt", "a sliding window"]
)
def test_a_language_model_that_cannot_compile_says_so_at_once(compiler, family, changes):
    """Or generates: never a failure of the compiler, after a while, in the middle of a text."""
    plain = tiny_flamingo(language_model=tiny_language_model(family, **changes))
    compiled = copy.deepcopy(plain)
    options = ENDLESS | {"max_new_tokens": 14}
    try:
        compiled.compile_decode(backend="eager")
    except ValueError:
        return
    assert torch.equal(compiled.generate(IMAGES, IDS, MASK, **options), plain.generate(IMAGES, IDS, MASK, **options))


@pytest.mark.parametrize("family", ["opt", "llama", "mosaic_gpt"])
@pytest.mark.parametrize("draft", [PromptLookup(), Wrong()], ids=["prompt lookup", "a useless draft"])
def test_the_study_s_speculation_says_what_generate_says(family, draft):
    """Guesses are refused and accepted; what the cache held of refused ones is gone."""
    model, images, ids = tiny_flamingo(family), pictures(1, 2), torch.tensor([[MEDIA, 3, 4, MEDIA, 5, 6, 3, 4]])
    expected = model.generate(images, ids, **ENDLESS | {"max_new_tokens": 16})[:, ids.shape[1] :]
    logits, target = model.speculative_target(images, ids)
    options = {"count": 3, "max_new_tokens": 16, "end_id": VOCAB, "pad_id": PAD, "forbidden": (MEDIA,)}
    said = speculate(target, draft, ids, logits, **options)
    assert torch.equal(said.tokens, expected)
    with pytest.raises(ValueError, match=r"one prompt at a time.*got 2 rows"):
        model.speculative_target(IMAGES, IDS)


@pytest.mark.parametrize("guesses", [1, 3])
def test_guessing_words_from_the_prompt_changes_nothing(model, guesses):
    """Guesses hold the prompt's `<image>`, which is no guess that could come true."""
    options = ENDLESS | {"max_new_tokens": 16}
    for ids in prompts("i..i..", seed=3)[0], torch.tensor([[MEDIA, 3, 4, MEDIA, 3, 4, MEDIA, 3]]):
        images = pictures(1, 3)
        expected = model.generate(images, ids, **options)
        assert torch.equal(model.generate(images, ids, **options, prompt_lookup_num_tokens=guesses), expected)


def test_adapters_in_the_language_model_are_conditioned_too():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    plain = exact_flamingo()
    for wrapped_first in (False, True):
        lm = copy.deepcopy(plain).lang_encoder
        for layer in lm.model.layers:
            layer._forward_pre_hooks.clear()
        lm = peft.get_peft_model(lm, settings)  # starts as the identity
        if wrapped_first:
            model = copy.deepcopy(plain)
            model.lang_encoder = peft.get_peft_model(model.lang_encoder, settings)
        else:
            model = tiny_flamingo(language_model=lm).double()
            names = ("perceiver", "gated_cross_attn_layers", "vision_encoder")
            model.load_state_dict({k: v for k, v in plain.state_dict().items() if k.startswith(names)}, strict=False)
        with torch.no_grad():
            assert_same(model(IMAGES, IDS, MASK).logits, plain(IMAGES, IDS, MASK).logits)
        for options in ({}, {"num_beams": 3}):
            found = model.generate(IMAGES, IDS, MASK, **ENDLESS, **options)
            assert torch.equal(found, plain.generate(IMAGES, IDS, MASK, **ENDLESS, **options))
        with torch.no_grad():
            randomized(model.lang_encoder.base_model.model.model.layers[0].self_attn.q_proj)
        expected, _ = naive_greedy(model, IMAGES, IDS, MASK)
        assert torch.equal(model.generate(IMAGES, IDS, MASK, **ENDLESS), expected)


# ---------------------------------------------------------------------------------------------------- scores


CONTINUATIONS = [torch.tensor(ids) for ids in ([3], [4, 5, 6, 7], [8, 9], [EOC, 3, 3], [4, 5, 6])]


def by_hand(model, images, ids, mask, continuation):
    """float[B]: each row's log-likelihood from the whole text, without a cache."""
    for token in continuation:
        ids, mask = extended(ids, mask, token.expand(len(ids)))
    scores = read_whole(model, images, ids, mask).log_softmax(-1)[:, -len(continuation) - 1 : -1]
    return scores.gather(-1, continuation.expand(len(ids), -1)[..., None]).sum((1, 2))


def test_scores_are_the_log_likelihoods(of_each_family):
    """Left-padded prompts, continuations of different lengths."""
    found = of_each_family.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK)
    expected = [by_hand(of_each_family, IMAGES, IDS, MASK, each) for each in CONTINUATIONS]
    assert found.dtype == torch.float32 and found.shape == (2, 5)
    torch.testing.assert_close(found, torch.stack(expected, dim=1).float(), rtol=1e-5, atol=2e-5)


def test_trap_4_scores_do_not_depend_on_what_is_scored_beside_or_before(model):
    expected = model.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK)
    for at_once in (1, 2, 5, 100):
        found = model.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK, at_once=at_once)
        torch.testing.assert_close(found, expected)
    backwards = model.score_sequences(IMAGES, IDS, CONTINUATIONS[::-1], MASK, at_once=2)
    torch.testing.assert_close(backwards.flip(1), expected)
    assert torch.equal(model.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK), expected)


def test_an_image_in_a_continuation_is_the_next(model):
    images, continuation = pictures(2, 3), torch.tensor([3, MEDIA, 4, 5])
    found = model.score_sequences(images, IDS, [continuation, torch.tensor([6])], MASK)
    expected = by_hand(model, images, IDS, MASK, continuation)
    torch.testing.assert_close(found[:, 0], expected.float())
    with pytest.raises(ValueError, match="image number 3, but only 2 images were given"):
        model.score_sequences(IMAGES, IDS, [continuation], MASK)


def test_scoring_reads_each_prompt_and_its_images_once(model):
    shapes = []
    watch(model.lang_encoder.model.layers[0], lambda args, kwargs: shapes.append(tuple(args[0].shape[:2])))
    model.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK, at_once=3)
    assert shapes == [(2, LENGTH), (2 * 3, 3), (2 * 2, 2)], "nobody asks what follows the last token"
    assert model.vision_encoder.images_seen == 3


def test_scores_of_cached_media_and_of_text_alone(model):
    expected = model.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK)
    model.cache_media(IDS, IMAGES)
    torch.testing.assert_close(model.score_sequences(None, IDS, CONTINUATIONS, MASK), expected)
    model.uncache_media()
    ids, _ = prompts("...", "...")
    text = model.score_sequences(None, ids, CONTINUATIONS)
    torch.testing.assert_close(text[:, 0], by_hand(model, IMAGES, ids, torch.ones_like(ids), CONTINUATIONS[0]).float())


@pytest.mark.parametrize(
    "continuations", [[], [torch.tensor([3]), torch.tensor([], dtype=torch.long)], [torch.tensor([[3]])]]
)
def test_nothing_to_score_is_an_error(model, continuations):
    with pytest.raises(ValueError, match=r"continuations must be a sequence of tensors int64\[n\], none of them empty"):
        model.score_sequences(IMAGES, IDS, continuations, MASK)


@pytest.mark.parametrize("at_once", [0, -1])
def test_scoring_nothing_at_once_is_an_error(model, at_once):
    with pytest.raises(ValueError, match=f"at_once.*{at_once}"):
        model.score_sequences(IMAGES, IDS, CONTINUATIONS, MASK, at_once=at_once)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS[0], MASK[0], rf"lang_x must be int64\[B, T\], T > 0; got int64 of shape \[{LENGTH}\]"),
        (IDS[:, :0], MASK[:, :0], r"lang_x must be int64\[B, T\], T > 0; got int64 of shape \[2, 0\]"),
        (None, None, r"lang_x must be int64\[B, T\], T > 0; got None"),
        (IDS, MASK[:, 1:], rf"attention_mask must be \[2, {LENGTH}\] here; got shape \[2, {LENGTH - 1}\]"),
        (IDS, MASK[:1], rf"attention_mask must be \[2, {LENGTH}\] here; got shape \[1, {LENGTH}\]"),
    ],
)
def test_text_that_cannot_be_read_is_an_error(model, ids, mask, message):
    for call in (model, model.generate, lambda *given: model.score_sequences(*given[:2], CONTINUATIONS, given[2])):
        with pytest.raises(ValueError, match=message):
            call(IMAGES, ids, mask)
