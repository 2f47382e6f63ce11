"""The language model against a plain forward written here, and its cache against the full pass."""

import math

import pytest
import torch
import torch.nn.functional as F

from language_model import CausalLanguageModel
from laws import assert_same, randomized

pytestmark = pytest.mark.usefixtures("float64")

WORDS, DIM, DEPTH, HEADS = 17, 24, 3, 3
# Rotary angles are float32: at positions below 32 they are off by up to 2^-20 radians. What depends on a position's
# absolute value (a shifted prompt, a reference in float64) is as exact as that times the random layers' gain.
ROTARY = {"rtol": 1e-4, "atol": 1e-4}


def language_model():
    return randomized(CausalLanguageModel(WORDS, DIM, DEPTH, HEADS)).requires_grad_(False)


def random_ids(batch=3, length=10):
    return torch.randint(1, WORDS, (batch, length))


def rotated(x, position):
    """One head's vector turned by its position, pair by pair: component i with component i + E / 2."""
    half = len(x) // 2
    turned = x.clone()
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return turned


def plain_forward(model, ids):
    """One row, token by token and head by head: mix with the 3 tokens before, attend to what was, feed forward."""
    x = model.embedding.weight[ids]
    for layer in model.layers:
        normed, taps = layer.mix.norm(x), layer.mix.convolution.weight[:, 0]
        x = torch.stack(
            [x[t] + sum(taps[:, 3 - back] * normed[t - back] for back in range(min(3, t) + 1)) for t in range(len(ids))]
        )
        attention = layer.attention
        qkv = attention.norm(x) @ attention.to_qkv.weight.T
        q, k, v = qkv.reshape(len(ids), 3, HEADS, DIM // HEADS).unbind(1)
        read = torch.zeros(len(ids), HEADS, DIM // HEADS)
        for head in range(HEADS):
            for t in range(len(ids)):
                query = rotated(q[t, head], t)
                scores = torch.stack([query @ rotated(k[s, head], s) for s in range(t + 1)]) / (DIM // HEADS) ** 0.5
                weights = scores.exp() / scores.exp().sum()
                read[t, head] = sum(weight * v[s, head] for s, weight in enumerate(weights))
        x = x + read.flatten(1) @ attention.to_out.weight.T
        norm, up, _, down = layer.feed_forward
        x = x + F.gelu(norm(x) @ up.weight.T) @ down.weight.T
    return model.norm(x) @ model.embedding.weight.T


def test_logits_are_those_of_a_plain_forward():
    model, ids = language_model(), random_ids(2, 7)
    expected = torch.stack([plain_forward(model, row) for row in ids])
    torch.testing.assert_close(model(ids), expected, **ROTARY)


def decoded(model, ids, chunks, slots, mask=None, cache=None):
    """Logits of all tokens, read in chunks into one cache (with room to spare, full of garbage)."""
    if cache is None:
        cache = model.allocate_cache(len(ids), slots)
        for kv in cache.kv:
            kv.k.normal_(std=50)
            kv.v.normal_(std=50)
        for mixed in cache.mixed:
            mixed[:, 3:].normal_(std=50)
        cache.is_token.fill_(True)
    logits, start = [], 0
    for chunk in chunks:
        here = slice(start, start + chunk)
        logits.append(model(ids[:, here], None if mask is None else mask[:, here], cache))
        start += chunk
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("chunks", [[1] * 10, [10], [6, 1, 1, 1, 1], [2, 5, 3], [1, 2, 1, 6]])
@pytest.mark.parametrize("slots", [10, 14])
def test_cached_logits_are_the_full_pass(chunks, slots):
    model, ids = language_model(), random_ids()
    logits, cache = decoded(model, ids, chunks, slots)
    assert_same(logits, model(ids))
    assert (cache.length == 10).all()


@pytest.mark.parametrize("chunks", [[10], [7, 1, 1, 1], [4, 6], [1] * 10])
def test_cached_logits_are_the_full_pass_with_padding(chunks):
    """Rows of 10, 7 and 2 tokens, padded on the left; padding may even fill a whole chunk."""
    model, ids = language_model(), random_ids()
    mask = torch.arange(10) >= torch.tensor([0, 3, 8])[:, None]
    full = model(ids, mask)
    logits, _ = decoded(model, ids, chunks, 12, mask)
    assert_same(logits[mask], full[mask])


def test_a_prompt_s_mask_holds_for_the_tokens_after_it():
    model, ids = language_model(), random_ids()
    mask = torch.arange(10) >= torch.tensor([0, 3, 5])[:, None]
    cache = model.allocate_cache(3, 12)
    model(ids[:, :6], mask[:, :6], cache)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(6, 10)], dim=1)
    assert_same(steps, model(ids, mask)[:, 6:])


def test_padding_on_the_left_changes_nothing():
    model = language_model()
    lengths = [9, 6, 1, 4]
    rows = [random_ids(1, length) for length in lengths]
    padded = torch.stack([F.pad(row[0], (9 - row.shape[1], 0)) for row in rows])
    mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    together = model(padded, mask)
    for row, logits, length in zip(rows, together, lengths, strict=True):
        torch.testing.assert_close(logits[9 - length :], model(row)[0], **ROTARY)
    padded[~mask] = torch.randint(1, WORDS, ((~mask).sum(),))
    assert_same(model(padded, mask)[mask], together[mask])


def test_padding_is_finite():
    """A softmax over nothing would be undefined, and its gradient would spoil the whole batch."""
    model, ids = language_model().requires_grad_(True), random_ids()
    mask = torch.arange(10) >= torch.tensor([0, 9, 10])[:, None]
    logits = model(ids, mask)
    assert logits.isfinite().all()
    logits[mask].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_mask_of_ones_is_no_mask():
    model, ids = language_model(), random_ids()
    assert_same(model(ids, torch.ones_like(ids, dtype=torch.bool)), model(ids))


def test_a_token_changes_nothing_before_it():
    model, ids = language_model(), random_ids(2, 8)
    before = model(ids)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = changed[0, t] % (WORDS - 1) + 1
        differs = (model(changed) - before).abs().amax(-1) > 1e-9
        assert differs[0].tolist() == [s >= t for s in range(8)]
        assert not differs[1].any(), "rows are independent"


@pytest.mark.parametrize("keep", [1, 4, 7])
@pytest.mark.parametrize("chunks", [[1, 1, 1], [3]])
def test_tokens_taken_back_were_never_there(keep, chunks):
    """Lower `cache.length`, decode something else: the same logits as if the first attempt had not happened."""
    model, ids, wrong = language_model(), random_ids(2, keep + 3), random_ids(2, 5)
    prefix = ids[:, :keep]
    clean_cache = decoded(model, prefix, [keep], 14)[1]
    clean, _ = decoded(model, ids[:, keep:], chunks, 14, cache=clean_cache)
    cache = decoded(model, torch.cat((prefix, wrong), dim=1), [keep, 2, 3], 14)[1]
    cache.length -= 5
    again, _ = decoded(model, ids[:, keep:], chunks, 14, cache=cache)
    assert torch.equal(again, clean)
    assert_same(again, model(ids)[:, keep:])


def test_a_cache_s_tensors_stay_where_they_are():
    """No tensor is replaced and no shape changes: what torch.compile and CUDA graphs need."""
    model, ids = language_model(), random_ids()
    cache = model.allocate_cache(3, 12)
    tensors = [cache.is_token, cache.length, *cache.mixed, *(each for kv in cache.kv for each in (kv.k, kv.v))]
    places = [tensor.data_ptr() for tensor in tensors]
    decoded(model, ids, [6, 1, 1, 2], 12, cache=cache)
    after = [cache.is_token, cache.length, *cache.mixed, *(each for kv in cache.kv for each in (kv.k, kv.v))]
    assert [tensor.data_ptr() for tensor in after] == places
    assert cache.kv[0].k.shape == (3, HEADS, 12, DIM // HEADS)
    assert cache.mixed[0].shape == (3, 15, DIM)


def test_the_last_logits_alone_are_the_last_of_all():
    model, ids = language_model(), random_ids()
    last = model(ids, last_only=True)
    assert last.shape == (3, 1, WORDS)
    assert_same(last, model(ids)[:, -1:])


def test_before_layer_sees_what_enters_each_layer():
    model, ids = language_model(), random_ids()
    seen = []

    def look(i, x):
        seen.append((i, x))
        return x

    assert_same(model(ids, before_layer=look), model(ids))
    assert [i for i, _ in seen] == [0, 1, 2]
    assert_same(seen[0][1], model.embedding(ids))
    replaced = torch.randn(3, 10, DIM)
    after_replacing = model(ids, before_layer=lambda i, x: replaced if i == 2 else x)
    assert_same(after_replacing, model(random_ids(), before_layer=lambda i, x: replaced if i == 2 else x))


def test_the_output_embedding_is_the_input_embedding():
    model = language_model()
    names = dict(model.named_parameters())
    assert [name for name, parameter in names.items() if WORDS in parameter.shape] == ["embedding.weight"]


@pytest.mark.parametrize("shape", [(3, 9), (2, 10), (3,)])
def test_a_mask_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"attention_mask \[.*\] does not fit input_ids \[3, 10\]"):
        language_model()(random_ids(), torch.ones(shape, dtype=torch.bool))
