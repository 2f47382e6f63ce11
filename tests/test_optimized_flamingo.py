"""The composition: with every part left out it is the plain model, and each part does what it does alone."""

from dataclasses import replace

import pytest
import torch

from adaptive_resampler import AdaptivePerceiverResampler
from conditioned_language_model import ConditionedLanguageModel
from confidence_head import RiskHead
from laws import randomized
from optimized_flamingo import OptimizedFlamingo
from perceiver_resampler import PerceiverResampler
from test_mini_flamingo import LAYOUTS, prompts
from tiny_flamingo import TINY, random_images, set_gates, tiny_flamingo

CACHE = {"cache_bytes": 2**20}


def tiny_draft():
    """Random: it guesses wrongly nearly always, which must not show in any word."""
    return set_gates(randomized(ConditionedLanguageModel(replace(TINY, depth=2))), 0.5).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [{}, CACHE, {"draft": True}, {"draft": True, "guesses": 3, **CACHE}], ids=str)
def test_what_loses_nothing_says_the_plain_models_words(float64, layout, parts):
    model = tiny_flamingo()
    ids, images, _ = prompts(LAYOUTS[layout])
    parts = parts | ({"draft": tiny_draft()} if "draft" in parts else {})
    fast = OptimizedFlamingo(model, **parts)
    for _ in range(2):  # the second time a cache is warm
        said = fast.generate(ids, images, max_new_tokens=12)
        assert torch.equal(said, model.generate(ids, images, max_new_tokens=12))


def test_a_draft_that_knows_the_words_saves_passes(float64):
    model = tiny_flamingo()
    ids, images = torch.tensor([[1, 5, 6]]), random_images(1, 1)
    words = model.generate(ids, images, max_new_tokens=12)

    class Oracle:
        """Says the plain model's words at the masks."""

        config = model.config

        def prefill(self, input_ids, media, slots):
            return None, None

        def decode(self, tokens, state, start):
            text = torch.cat((ids, words, words.new_zeros(1, 32)), dim=1)
            follows = text.gather(1, start[:, None] + 1 + torch.arange(tokens.shape[1]))
            return torch.nn.functional.one_hot(follows, TINY.vocabulary_size).double()

    said = OptimizedFlamingo(model, draft=Oracle(), guesses=4).speculate(ids, images, max_new_tokens=12)
    assert torch.equal(said.tokens, words)
    assert words.shape[1] == 12
    assert said.passes == 3  # one word from the prompt, then four guesses and one of its own a pass: 5, 5 and 1
    assert said.accepted == 4 + 4 + 1


def test_fewer_tokens_and_another_resampler_are_theirs():
    model = tiny_flamingo()
    ids, images, _ = prompts(LAYOUTS["several images"])
    few = OptimizedFlamingo(model, num_latents=2)
    assert torch.equal(few.encode_media(images), model.encode_media(images, num_latents=2))
    other = randomized(PerceiverResampler(TINY.vision_dim, 1, 8, 2, 6)).eval()
    patches = model.vision_encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    swapped = OptimizedFlamingo(model, resampler=other, num_latents=3)
    assert torch.equal(swapped.encode_media(images), other(patches, 3))
    media = other(patches, 3)
    assert torch.equal(swapped.generate(ids, images), model.generate(ids, media=media))


def test_half_precision_is_a_copy_of_everything():
    model, draft = tiny_flamingo(), tiny_draft()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = OptimizedFlamingo(model, precision="bf16", resampler=model.resampler, draft=draft)
    for part in (fast.model.language_model, fast.resampler.layers[0][0].to_q, fast.draft.language_model):
        assert next(part.parameters()).dtype == torch.bfloat16
    ids, images, _ = prompts(LAYOUTS["one image in front"])
    assert fast.encode_media(images).dtype == torch.bfloat16
    plain = fast.model.generate(ids, media=fast.encode_media(images), max_new_tokens=8)
    # bfloat16 rounds a pass over several words otherwise than one by one: most words are the same, not surely all
    assert fast.generate(ids, images, max_new_tokens=8).shape[0] == plain.shape[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_frames_of_a_video_are_read_as_the_plain_model_does():
    model = tiny_flamingo()
    ids, frames = torch.tensor([[1, 5, 6]]), random_images(1, 1, 3)
    assert torch.equal(OptimizedFlamingo(model).generate(ids, frames), model.generate(ids, frames))


@pytest.mark.parametrize("change", ["weight", "threshold"])
def test_a_cache_never_serves_what_another_model_made(change):
    """Without a precision of its own the model is the caller's, who may go on training it."""
    model = tiny_flamingo()
    resampler = AdaptivePerceiverResampler(model.resampler, [RiskHead(TINY.vision_dim, 1)], threshold=0)
    fast, images = OptimizedFlamingo(model, resampler=resampler, **CACHE), random_images(2, 1)
    before = fast.encode_media(images)
    if change == "weight":
        with torch.no_grad():
            model.resampler.latents.mul_(2)
    else:
        resampler.threshold = 1.0
    after = fast.encode_media(images)
    assert not torch.equal(after, before)
    assert torch.equal(after, fast.encode_anew(images))


def test_a_warm_cache_encodes_nothing():
    model = tiny_flamingo()
    ids, images, _ = prompts(LAYOUTS["several images"])
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    fast = OptimizedFlamingo(model, **CACHE)
    cold = fast.generate(ids, images)
    assert calls == [1]
    assert torch.equal(fast.generate(ids, images), cold)
    assert calls == [1]
    assert fast.cache.statistics.hits >= images.shape[0] * images.shape[1]


def test_sampling_draws_the_models_distribution():
    """One token after one prompt, thousands of rows: frequencies against the softmax of the plain model's logits."""
    model = tiny_flamingo()
    rows = 4000
    ids = torch.tensor([[1, 5]]).expand(rows, -1)
    images = random_images(1, 1).expand(rows, -1, -1, -1, -1)
    fast = OptimizedFlamingo(model, draft=tiny_draft(), guesses=2)
    said = fast.generate(ids, images, 2, temperature=1.5, generator=torch.Generator().manual_seed(0))
    logits = model(ids[:1], images[:1])[0, -1] / 1.5
    logits[[0, 1]] = float("-inf")
    expected = logits.softmax(-1) * rows
    counts = torch.bincount(said[:, 0], minlength=len(expected)).double()
    kept = expected > 5
    assert counts[~kept & (expected == 0)].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[kept].sum()
    assert chi_square < 3 * kept.sum()


def test_bad_arguments_are_refused():
    model = tiny_flamingo()
    with pytest.raises(ValueError, match="guesses must be at least 1"):
        OptimizedFlamingo(model, guesses=0)
    with pytest.raises(ValueError, match="unknown precision"):
        OptimizedFlamingo(model, precision="int3")
    with pytest.raises(ValueError, match="max_bytes"):
        OptimizedFlamingo(model, cache_bytes=0)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        OptimizedFlamingo(model).generate(torch.tensor([[1, 5, 0]]), random_images(1, 1))
