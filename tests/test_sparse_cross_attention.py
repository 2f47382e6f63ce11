"""Sparse cross-attention: against plain loops and masks in float64, and equal to dense wherever nothing is left out."""

import copy
import random

import pytest
import torch

from attention_layers import CrossAttention, MediaKV, attend
from gated_cross_attention import GatedCrossAttentionBlock
from laws import assert_same, count_flops, randomized, value_and_gradients
from media_masks import MediaLayout
from sparse_cross_attention import (
    SparseCrossAttention,
    attend_to_top_k,
    attention_by_key,
    attention_received,
    dense_masked_attention,
    select_visual_tokens,
)

pytestmark = pytest.mark.usefixtures("float64")

DIM, DIM_VISUAL, HEADS, DIM_HEAD = 12, 10, 3, 4


def cross_attention(**options):
    return randomized(CrossAttention(DIM, DIM_VISUAL, DIM_HEAD, HEADS, **options))


def random_problem(seed):
    """x, media and a ragged index: some rows see nothing at first, or never; some images are seen by no token."""
    rng = random.Random(seed)
    batch, tokens, images, latents = rng.randint(1, 3), rng.randint(1, 7), rng.randint(1, 4), rng.randint(2, 6)
    index = torch.tensor(
        [sorted(rng.randint(-1, rng.randint(-1, images - 1)) for _ in range(tokens)) for _ in range(batch)]
    )
    return (
        torch.randn(batch, tokens, DIM, requires_grad=True),
        torch.randn(batch, images, latents, DIM_VISUAL, requires_grad=True),
        index,
        rng.randint(1, latents),
    )


def by_loop(attention, x, media, index, top_k):
    """One token, one head at a time: sort all scores it may see, softmax over the highest; zero without an image."""
    out = torch.zeros(*x.shape[:2], HEADS, DIM_HEAD)
    for b, t in ((b, t) for b in range(x.shape[0]) for t in range(x.shape[1])):
        image = int(index[b, t])
        if image < 0:
            continue
        seen = media[b, image] if attention.only_attend_immediate_media else media[b, : image + 1].flatten(0, 1)
        queries = attention.to_q(attention.norm(x[b, t])).chunk(HEADS)
        keys, values = (each.chunk(HEADS, dim=-1) for each in attention.to_kv(seen).chunk(2, dim=-1))
        for h, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            scores = k @ q / DIM_HEAD**0.5
            kept = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:top_k]
            out[b, t, h] = scores[kept].softmax(0) @ v[kept]
    return attention.to_out(out.flatten(2))


def tensors_of(attention, x, media):
    return {"x": x, "media": media, **dict(attention.named_parameters())}


# ------------------------------------------------------------------------------------------------ per image, exact


@pytest.mark.parametrize("own_image_alone", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_per_image_attention_is_the_dense_masked_form(seed, own_image_alone):
    x, media, index, _ = random_problem(seed)
    attention = cross_attention(only_attend_immediate_media=own_image_alone)
    tensors = tensors_of(attention, x, media)
    sparse = value_and_gradients(lambda: attention(x, attention.project_media(media), index), tensors)
    masked = value_and_gradients(
        lambda: dense_masked_attention(attention, x, attention.project_media(media), index), tensors
    )
    assert_same(sparse, masked)
    assert_same(masked["value"], by_loop(attention, x, media, index, top_k=media.shape[1] * media.shape[2]))


# ------------------------------------------------------------------------------------------------ per query and head


@pytest.mark.parametrize("own_image_alone", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_top_k_is_a_loop_over_sorted_scores(seed, own_image_alone):
    x, media, index, top_k = random_problem(seed)
    attention = cross_attention(only_attend_immediate_media=own_image_alone)
    sparse, tensors = SparseCrossAttention(attention, top_k), tensors_of(attention, x, media)
    ours = value_and_gradients(lambda: sparse(x, sparse.project_media(media), index), tensors)
    assert_same(ours, value_and_gradients(lambda: by_loop(attention, x, media, index, top_k), tensors))
    blind = ours["value"][index < 0]
    assert torch.equal(blind, torch.zeros_like(blind))


@pytest.mark.parametrize("own_image_alone", [True, False])
def test_top_k_of_all_keys_is_dense(own_image_alone):
    for seed in range(4):
        x, media, index, _ = random_problem(seed)
        attention = cross_attention(only_attend_immediate_media=own_image_alone)
        keys = media.shape[2] * (1 if own_image_alone else media.shape[1])
        for top_k in (keys, keys + 5):
            sparse = SparseCrossAttention(attention, top_k)
            dense = attention(x, attention.project_media(media), index)
            assert torch.equal(sparse(x, sparse.project_media(media), index), dense)


@pytest.mark.parametrize("chunk_bytes", [1, 300, 2**24])
def test_gathering_all_keys_is_dense(chunk_bytes):
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    mask = torch.rand(2, 1, 5, 6) < 0.5
    mask[..., 0] = True
    assert_same(attend_to_top_k(q, k, v, 6, chunk_bytes=chunk_bytes), attend(q, k, v))
    assert_same(attend_to_top_k(q, k, v, 6, mask, chunk_bytes=chunk_bytes), attend(q, k, v, mask=mask))


def test_top_k_without_a_text_token_that_sees_an_image_is_zero():
    attention = cross_attention()
    x, media = torch.randn(2, 3, DIM), torch.randn(2, 2, 4, DIM_VISUAL)
    for tokens in (3, 0):
        out = SparseCrossAttention(attention, 2)(
            x[:, :tokens], attention.project_media(media), torch.full((2, tokens), -1)
        )
        assert torch.equal(out, torch.zeros(2, tokens, DIM))


@pytest.mark.parametrize("seed", range(8))
def test_chunking_changes_nothing(seed):
    rng = random.Random(seed)
    rows, heads, tokens, keys = (rng.randint(1, 5) for _ in range(4))
    q, (k, v) = torch.randn(rows, heads, tokens, 4), torch.randn(2, rows, keys, heads, 4).transpose(2, 3)
    mask = torch.rand(rows, 1, tokens, keys) < 0.7
    mask[..., -1] = True
    top_k = rng.randint(1, keys)
    for visible in (None, mask):
        whole = attend_to_top_k(q, k, v, top_k, visible)
        for chunk_bytes in (1, 100, 200, 400, 800, 1600, 3200, 6400):
            assert_same(attend_to_top_k(q, k, v, top_k, visible, chunk_bytes=chunk_bytes), whole)


def test_scores_stay_within_the_chunk():
    """What `choose` sees is all there ever is of the scores."""
    q, k = torch.randn(3, 4, 16, 4), torch.randn(3, 4, 32, 4)
    seen = []

    def choose(scores, top_k):
        seen.append(scores.shape)
        return scores.topk(top_k).indices

    attend_to_top_k(q, k, k, 2, choose=choose, chunk_bytes=4096)
    assert max(shape.numel() * 8 for shape in seen) <= 4096
    assert sum(shape.numel() for shape in seen) == 3 * 4 * 16 * 32  # and each score is computed once


def test_equal_keys_may_stand_for_each_other():
    """Ties: which of equal keys is taken is open, so equal values must make it irrelevant, and nothing may be lost."""
    attention = cross_attention()
    x, one = torch.randn(1, 4, DIM), torch.randn(1, 1, 1, DIM_VISUAL)
    index = torch.zeros(1, 4, dtype=torch.int64)
    kv = attention.project_media(one.expand(-1, -1, 6, -1))
    alone = attention(x, attention.project_media(one), index)
    for top_k in (1, 3, 6):
        assert_same(SparseCrossAttention(attention, top_k)(x, kv, index), alone)


def test_another_choice_is_taken_at_its_word():
    attention = cross_attention()
    x, media = torch.randn(2, 3, DIM), torch.randn(2, 2, 5, DIM_VISUAL)
    index = torch.tensor([[0, 0, 1], [-1, 0, 1]])
    sparse = SparseCrossAttention(
        attention, 2, choose=lambda scores, k: torch.tensor([1, 4]).expand(*scores.shape[:3], k)
    )
    kept = attention.project_media(media[:, :, [1, 4]])
    assert_same(sparse(x, attention.project_media(media), index), attention(x, kept, index))


def test_top_k_in_a_block_decodes_one_image_as_it_read_several():
    """The plain block's place, a shared layout, and the keys and values of the current image alone."""
    block = randomized(GatedCrossAttentionBlock(DIM, DIM_VISUAL, DIM_HEAD, HEADS))
    block.attn = SparseCrossAttention(block.attn, top_k=2)
    x, media = torch.randn(3, 1, DIM), torch.randn(3, 4, 5, DIM_VISUAL)
    index = torch.tensor([[2], [-1], [0]])
    kv = block.project_media(media)
    current = MediaLayout(index.clamp(max=0), num_media=1)
    assert_same(block(x, kv.select(index[:, 0]), current), block(x, media, MediaLayout(index, num_media=4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_in_lower_precision_errs_as_dense_does(dtype):
    q, k, v = torch.randn(3, 2, 2, 16, 8)
    low = [each.to(dtype) for each in (q, k, v)]
    exact = attend(*(each.double() for each in low))
    error = (attend_to_top_k(*low, 16).double() - exact).abs().max()
    assert error <= 4 * (attend(*low).double() - exact).abs().max()


def test_top_k_works_under_autocast():
    attention = cross_attention().float()
    x, media = torch.randn(1, 3, DIM).float(), torch.randn(1, 1, 4, DIM_VISUAL).float()
    sparse, index = SparseCrossAttention(attention, 2), torch.zeros(1, 3, dtype=torch.int64)
    exact = sparse(x, sparse.project_media(media), index)
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse(x, sparse.project_media(media), index)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


def test_wrapping_keeps_names_and_shares_parameters():
    attention = cross_attention(only_attend_immediate_media=False).eval()
    sparse = SparseCrossAttention(attention, 2)
    assert not sparse.training and not sparse.only_attend_immediate_media
    assert list(sparse.state_dict()) == list(attention.state_dict())
    mine, its = dict(sparse.named_parameters()), dict(attention.named_parameters())
    assert all(mine[name] is its[name] for name in its)
    alone = copy.deepcopy(sparse)
    alone.load_state_dict(cross_attention().state_dict())
    assert all(mine[name] is its[name] for name in its)


def test_flops_are_those_of_the_matrix_products():
    """All scores, and a weighted sum of the kept values, which torch's counter does not see."""
    attention, top_k = cross_attention(), 2
    sparse = SparseCrossAttention(attention, top_k)
    x, media = torch.randn(2, 6, DIM), torch.randn(2, 1, 5, DIM_VISUAL)
    index = torch.zeros(2, 6, dtype=torch.int64)
    counted = count_flops(lambda: sparse(x, sparse.project_media(media), index))
    assert counted + 2 * 2 * 6 * top_k * HEADS * DIM_HEAD == 2 * sparse.flops(tokens=6, latents=5)
    assert SparseCrossAttention(attention, 9).flops(6, 5) == attention.flops(6, 5)


# ------------------------------------------------------------------------------------------------ shared


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_a_loop_and_keeps_the_order(seed):
    rng = random.Random(seed)
    batch, images, latents = (rng.randint(1, 5) for _ in range(3))
    media, k = torch.randn(batch, images, latents, 3), rng.randint(1, latents)
    relevance = torch.randint(0, 4, (batch, images, latents)).double()  # with ties: the earlier token stays
    selected = select_visual_tokens(media, relevance, k)
    for b, m in ((b, m) for b in range(batch) for m in range(images)):
        kept = sorted(sorted(range(latents), key=lambda i: (-relevance[b, m, i].item(), i))[:k])
        assert torch.equal(selected[b, m], media[b, m, kept])


def test_selecting_all_changes_nothing():
    media = torch.randn(2, 3, 5, 4)
    assert torch.equal(select_visual_tokens(media, torch.rand(2, 3, 5), 5), media)


def test_compacted_media_are_the_unselected_latents_masked_out():
    block = randomized(GatedCrossAttentionBlock(DIM, DIM_VISUAL, DIM_HEAD, HEADS))
    x, media = torch.randn(2, 5, DIM), torch.randn(2, 3, 6, DIM_VISUAL, requires_grad=True)
    index, relevance = torch.tensor([[-1, 0, 1, 2, 2], [0, 0, 0, 1, 1]]), torch.rand(2, 3, 6)
    kept = torch.zeros(2, 3, 6, dtype=torch.bool).scatter(-1, relevance.topk(2).indices, True)

    def masked():
        kv = block.project_media(media)
        rows = []
        for b, t in ((b, t) for b in range(2) for t in range(5)):
            image = int(index[b, t])
            q = block.attn.to_q(block.attn.norm(x[b, t])).view(1, HEADS, 1, DIM_HEAD)
            k, v = kv.k[b, image][None], kv.v[b, image][None]
            read = attend(q, k, v, mask=kept[b, image].view(1, 1, 1, 6)) * (image >= 0)
            y = x[b, t] + block.attn_gate.tanh() * block.attn.to_out(read.flatten())
            rows.append(y + block.ff_gate.tanh() * block.ff(y))
        return torch.stack(rows).view(2, 5, DIM)

    tensors = {"media": media, **dict(block.named_parameters())}
    compacted = value_and_gradients(lambda: block(x, select_visual_tokens(media, relevance, 2), index), tensors)
    assert_same(compacted, value_and_gradients(masked, tensors))


def received_by_loop(attention, x, media, index, counts):
    received = torch.zeros(media.shape[:3])
    for b, t in ((b, t) for b in range(x.shape[0]) for t in range(x.shape[1])):
        image = int(index[b, t])
        if image < 0 or not counts[b, t]:
            continue
        images = [image] if attention.only_attend_immediate_media else list(range(image + 1))
        queries = attention.to_q(attention.norm(x[b, t])).chunk(HEADS)
        keys = attention.to_kv(media[b, images].flatten(0, 1)).chunk(2, dim=-1)[0].chunk(HEADS, dim=-1)
        for q, k in zip(queries, keys, strict=True):
            received[b, images] += (k @ q / DIM_HEAD**0.5).softmax(0).view(len(images), -1).detach()
    return received


@pytest.mark.parametrize("own_image_alone", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_attention_received_is_a_loop(seed, own_image_alone):
    x, media, index, _ = random_problem(seed)
    layers = [cross_attention(only_attend_immediate_media=own_image_alone) for _ in range(2)]
    counts = torch.rand(index.shape) < 0.7

    def run():
        layers[0](x, layers[0].project_media(media), index)
        layers[1](x, layers[1].project_media(media), media_index=MediaLayout.from_index(index, media.shape[1]))
        cross_attention()(x, layers[0].project_media(media), index)  # not among the layers: not counted

    for counted in (None, counts):
        received = attention_received(layers, run, counted)
        expected = sum(
            received_by_loop(layer, x, media, index, counts if counted is not None else counts | True)
            for layer in layers
        )
        assert received.dtype == torch.float32 and not received.requires_grad
        torch.testing.assert_close(received.double(), expected, rtol=1e-5, atol=1e-6)
    one = attention_by_key(layers[0], x, layers[0].project_media(media), index)
    expected = received_by_loop(layers[0], x, media, index, counts | True)
    torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6)


def test_listening_ends_with_the_run():
    attention = cross_attention()
    x, media, index, _ = random_problem(0)

    def fail():
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        attention_received([attention], fail)
    attention_received([attention], lambda: attention(x, attention.project_media(media), index))
    assert not attention._forward_pre_hooks


def test_attention_received_adds_up_to_one_per_head_and_token():
    attention, (x, media, index, _) = cross_attention(), random_problem(3)
    received = attention_received([attention], lambda: attention(x, attention.project_media(media), index))
    assert received.sum().item() == pytest.approx(HEADS * int((index >= 0).sum()), rel=1e-5)


# ------------------------------------------------------------------------------------------------ users' slips


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k must be at least 1; got"):
        SparseCrossAttention(cross_attention(), top_k)


@pytest.mark.parametrize("top_k", [0, 6])
def test_more_keys_than_there_are_cannot_be_kept(top_k):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"between 1 and the number of keys, 5; got {top_k}"):
        attend_to_top_k(q, torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), top_k)
    with pytest.raises(ValueError, match=f"between 1 and the number of visual tokens, 5; got {top_k}"):
        select_visual_tokens(torch.randn(1, 2, 5, 4), torch.rand(1, 2, 5), top_k)


def test_relevance_must_name_every_visual_token():
    for media, relevance in ((torch.randn(1, 2, 5, 4), torch.rand(1, 2, 4)), (torch.randn(2, 5, 4), torch.rand(2, 5))):
        with pytest.raises(ValueError, match=r"media must be float\[B, M, L, D\] and relevance float\[B, M, L\]"):
            select_visual_tokens(media, relevance, 1)


@pytest.mark.parametrize("top_k", [2, 99])
def test_sparse_attention_names_what_does_not_fit(top_k):
    attention = cross_attention()
    sparse, x = SparseCrossAttention(attention, top_k), torch.randn(2, 3, DIM)
    kv, index = attention.project_media(torch.randn(2, 2, 4, DIM_VISUAL)), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="image number 3, but only 2 images"):
        sparse(x, kv, index + 2)
    for wrong_x, wrong_kv, wrong_index in (
        (x[:, :2], kv, index),
        (x, MediaKV(kv.k[:1], kv.v[:1]), index),
        (x, kv, MediaLayout(index, num_media=3)),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            sparse(wrong_x, wrong_kv, wrong_index)
        with pytest.raises(ValueError, match="do not belong together"):
            dense_masked_attention(attention, wrong_x, wrong_kv, wrong_index)
    for wrong_x in (x[..., :5], x[0]):
        with pytest.raises(ValueError, match="x "):
            sparse(wrong_x, kv, index)
    with pytest.raises(ValueError, match="media must have 4 axes, the last of width 10"):
        sparse.project_media(torch.randn(2, 4, DIM_VISUAL))


def test_attention_received_needs_a_call_and_a_fitting_count():
    attention, (x, media, index, _) = cross_attention(), random_problem(1)
    with pytest.raises(ValueError, match="called none of the layers"):
        attention_received([attention], lambda: None)
    with pytest.raises(ValueError, match="counted must be bool"):
        attention_received(
            [attention], lambda: attention(x, attention.project_media(media), index), torch.ones(9, 9, dtype=torch.bool)
        )
