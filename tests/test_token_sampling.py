"""Choosing tokens: distributions against loops over the vocabulary, draws against the distribution."""

import math

import pytest
import torch

from token_sampling import choose_token, next_token_probabilities


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def random_logits(rows=6, words=12, scale=3.0):
    return scale * torch.randn(rows, words)


def by_loop(logits, temperature, top_k=None, top_p=None):
    """One row, in Python floats: keep the best k words, of them the fewest that hold top_p, and share out again."""
    weights = [math.exp(value / temperature) for value in logits]
    ranked = sorted(range(len(weights)), key=lambda word: -weights[word])
    kept = ranked[: top_k or len(ranked)]
    if top_p is not None:
        total, mass, nucleus = sum(weights[word] for word in kept), 0.0, []
        for word in kept:
            if mass >= top_p:
                break
            nucleus.append(word)
            mass += weights[word] / total
        kept = nucleus
    total = sum(weights[word] for word in kept)
    return [weights[word] / total if word in kept else 0.0 for word in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 12, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
def test_probabilities_are_those_of_a_loop_over_the_words(temperature, top_k, top_p):
    logits = random_logits()
    ours = next_token_probabilities(logits, temperature, top_k, top_p)
    assert ours.dtype == torch.float32
    for row, probabilities in zip(logits.tolist(), ours, strict=True):
        expected = torch.tensor(by_loop(row, temperature, top_k, top_p))
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-7)
        certain = (expected == 0) | (expected > 1e-6)  # rarer words are lost in float32's sum, even with top_p 1
        assert torch.equal((probabilities > 0)[certain], (expected > 0)[certain])


def test_greedy_takes_the_most_likely_token():
    logits = random_logits(rows=50)
    assert choose_token(logits).tolist() == [max(range(12), key=row.__getitem__) for row in logits.tolist()]


def test_one_word_is_what_greedy_takes():
    logits = random_logits(rows=50)
    for limits in ({"top_k": 1}, {"top_p": 1e-9}):
        assert torch.equal(choose_token(logits, temperature=1.0, **limits), choose_token(logits))


def test_the_smallest_top_p_keeps_one_word():
    for logits in (random_logits(), torch.zeros(3, 7), logits_of([-1e4, 0, 1e4])):
        probabilities = next_token_probabilities(logits, 1.0, top_p=1e-12)
        assert ((probabilities > 0).sum(-1) == 1).all()
        assert torch.equal(probabilities.sum(-1), torch.ones(len(logits)))


def test_top_p_keeps_the_word_that_crosses_it():
    logits = logits_of([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, kept in ((0.45, 1), (0.55, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert (next_token_probabilities(logits, 1.0, top_p=top_p) > 0).sum() == kept


def test_top_p_is_reached_by_words_that_just_hold_it():
    halves, quarters = torch.zeros(1, 2), torch.zeros(1, 4)
    assert (next_token_probabilities(halves, 1.0, top_p=0.5) > 0).sum() == 1
    assert (next_token_probabilities(quarters, 1.0, top_p=0.5) > 0).sum() == 2


def test_words_ruled_out_stay_ruled_out():
    """Minus infinity is how `generate` forbids padding and <image>."""
    logits = random_logits()
    logits[:, 3] = float("-inf")
    for limits in ({}, {"top_k": 12}, {"top_p": 1.0}, {"top_k": 5, "top_p": 0.9}):
        probabilities = next_token_probabilities(logits, 5.0, **limits)
        assert (probabilities[:, 3] == 0).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(6))
    assert (choose_token(logits.fill_(float("-inf")).index_fill(1, torch.tensor([7]), 0.0)) == 7).all()


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.7}])
def test_draws_follow_the_distribution(limits):
    """Pearson's chi-square of 20 000 draws, against its quantile at one in a million (Wilson and Hilferty)."""
    row, draws = random_logits(rows=1, words=8, scale=1.0), 20_000
    generator = torch.Generator().manual_seed(0)
    tokens = choose_token(row.expand(draws, -1), temperature=1.3, generator=generator, **limits)
    counts = torch.bincount(tokens, minlength=8).double()
    expected = draws * torch.tensor(by_loop(row[0].tolist(), 1.3, **limits))
    assert counts[expected == 0].sum() == 0
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = len(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((counts - expected).square() / expected).sum() < quantile


def test_a_generator_decides_the_draws():
    logits = random_logits(rows=100, scale=0.5)

    def drawn(seed):
        return choose_token(logits, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_low_precision_logits_are_sampled_in_float32():
    logits = random_logits().bfloat16()
    assert torch.equal(next_token_probabilities(logits, 0.7), (logits.float() / 0.7).softmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be above 0 to sample; got -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1; got 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
    ],
)
def test_settings_out_of_range_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        choose_token(random_logits(), **settings)
    with pytest.raises(ValueError, match="temperature must be above 0 to sample; got 0"):
        next_token_probabilities(random_logits(), 0)
