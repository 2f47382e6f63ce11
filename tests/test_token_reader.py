"""The warm-up decoder: every query answered from the visual tokens; its loss and accuracy against plain sums."""

import math

import pytest
import torch
import torch.nn.functional as F

from token_reader import UNASKED, QueryGroup, TokenReader, reading_accuracy, reading_loss

GROUPS = {"place": QueryGroup(6, {"colour": 4, "shape": 3}), "kind": QueryGroup(2, {"count": 5})}
QUERIES, CLASSES = {"colour": 6, "shape": 6, "count": 2}, {"colour": 4, "shape": 3, "count": 5}


def tiny_reader():
    return TokenReader(16, GROUPS, heads=2, dim_head=8)


def random_logits(images=4):
    return {name: torch.randn(images, QUERIES[name], CLASSES[name]) for name in QUERIES}


def random_targets(images=4):
    targets = {name: torch.randint(0, CLASSES[name], (images, QUERIES[name])) for name in QUERIES}
    targets["shape"][torch.rand(images, 6) < 0.5] = UNASKED
    return targets


def asked(logits, targets):
    """(scores, answer) of everything that is asked for, in plain numbers."""
    pairs = zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    return [(scores, answer) for scores, answer in pairs if answer != -100]


def test_loss_is_the_sum_of_each_head_s_mean_cross_entropy():
    logits, targets = random_logits(), random_targets()
    expected = 0.0
    for name in QUERIES:
        pairs = asked(logits[name], targets[name])
        expected += sum(math.log(sum(map(math.exp, s))) - s[answer] for s, answer in pairs) / len(pairs)
    assert reading_loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_the_share_of_what_was_asked():
    logits, targets = random_logits(), random_targets()
    accuracy = reading_accuracy(logits, targets)
    assert accuracy.keys() == QUERIES.keys()
    for name in QUERIES:
        pairs = asked(logits[name], targets[name])
        right = [max(range(len(scores)), key=scores.__getitem__) == answer for scores, answer in pairs]
        assert accuracy[name] == pytest.approx(sum(right) / len(right))


def test_perfect_logits_score_1_and_cost_nothing():
    targets = random_targets()
    perfect = {name: 20.0 * F.one_hot(targets[name].clamp(min=0), CLASSES[name]) for name in QUERIES}
    assert reading_accuracy(perfect, targets) == dict.fromkeys(QUERIES, 1.0)
    assert reading_loss(perfect, targets) < 1e-5


def test_heads_that_are_not_read_cost_nothing():
    """The vision stage reads some of the labels alone."""
    logits, targets = random_logits(), random_targets()
    one = {"colour": logits["colour"]}
    assert reading_accuracy(one, targets).keys() == {"colour"}
    assert reading_loss(one, targets) == reading_loss(one, {"colour": targets["colour"]})
    assert reading_loss(one, targets) < reading_loss(logits, targets)


def test_a_head_that_is_asked_nothing_costs_nothing():
    logits, targets = random_logits(), random_targets()
    targets["shape"].fill_(UNASKED)
    others = {name: logits[name] for name in ("colour", "count")}
    torch.testing.assert_close(reading_loss(logits, targets), reading_loss(others, targets))


def test_reader_answers_every_query_of_every_image():
    logits = tiny_reader()(torch.randn(3, 5, 16))
    assert {name: tuple(each.shape) for name, each in logits.items()} == {
        name: (3, QUERIES[name], CLASSES[name]) for name in QUERIES
    }


def test_heads_of_one_group_read_the_same_queries():
    """Only `place` queries move what is read at places, only `kind` queries the counts."""
    reader, tokens = tiny_reader(), torch.randn(2, 5, 16)
    before = reader(tokens)
    with torch.no_grad():
        reader.queries[2] += 1.0
    after = reader(tokens)
    for name in ("colour", "shape"):
        assert (before[name] != after[name]).any(-1).tolist() == [[q == 2 for q in range(6)]] * 2
    assert torch.equal(before["count"], after["count"])


def test_reader_sees_the_visual_tokens_as_a_set_and_each_image_alone():
    reader, tokens = tiny_reader(), torch.randn(3, 5, 16)
    logits, again, alone = reader(tokens), reader(tokens[:, torch.randperm(5)]), reader(tokens[1:2])
    for name in QUERIES:
        torch.testing.assert_close(again[name], logits[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[name][0], logits[name][1], rtol=1e-4, atol=1e-5)
    tokens[1] += torch.randn(16)
    changed = (reader(tokens)["colour"] - logits["colour"]).abs().flatten(1).amax(1) > 1e-3
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_reader_takes_any_number_of_visual_tokens(tokens):
    assert tiny_reader()(torch.randn(2, tokens, 16))["count"].isfinite().all()


def test_every_parameter_of_the_reader_learns():
    reader = tiny_reader()
    reading_loss(reader(torch.randn(4, 5, 16)), random_targets()).backward()
    for name, parameter in reader.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
