"""The three attentions against dense softmax attention written out here, and against nn.MultiheadAttention."""

import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention_layers import CrossAttention, KVCache, PerceiverAttention, SelfAttentionLayer, rotary_embedding, rotate
from laws import assert_same, count_flops, randomized, value_and_gradients
from media_masks import MediaLayout

pytestmark = pytest.mark.usefixtures("float64")

DIM, DIM_VISUAL, DIM_HEAD, HEADS = 12, 10, 4, 3


def cross_attention(only_attend_immediate_media=True):
    return randomized(CrossAttention(DIM, DIM_VISUAL, DIM_HEAD, HEADS, only_attend_immediate_media))


def dense_cross_attention(layer, x, media, media_index):
    """The textbook form: scores against the keys of all M images, masked, normalised; nothing where nothing is seen."""
    images, latents = media.shape[1:3]
    heads = (layer.heads, -1)
    q = layer.to_q(layer.norm(x)).unflatten(-1, heads).transpose(1, 2)
    k, v = (each.unflatten(-1, heads).transpose(1, 2) for each in layer.to_kv(media.flatten(1, 2)).chunk(2, dim=-1))
    image_of_key = torch.arange(images).repeat_interleave(latents)
    sees = image_of_key == media_index[..., None]
    if not layer.only_attend_immediate_media:
        sees = image_of_key <= media_index[..., None]
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * sees[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return layer.to_out((weights @ v).transpose(1, 2).flatten(2))


def random_problems(count=60):
    """x, media and index of random sizes: left padding, text before the first image, rows with fewer images than M."""
    rng = random.Random(0)
    for seed in range(count):
        batch, length, images, latents = rng.randint(1, 4), rng.randint(1, 12), rng.randint(1, 4), rng.randint(1, 5)
        rows = []
        for _ in range(batch):
            padding = rng.randint(0, length // 2)
            starts = rng.sample(range(padding, length), k=min(rng.randint(0, images), length - padding))
            rows.append([sum(start <= t for start in starts) - 1 for t in range(length)])
        if seed % 4 == 0:  # and in no order at all
            rows = [[rng.randint(-1, images - 1) for _ in range(length)] for _ in range(batch)]
        x = torch.randn(batch, length, DIM, requires_grad=True)
        yield x, torch.randn(batch, images, latents, DIM_VISUAL, requires_grad=True), torch.tensor(rows)


NAMED_PROBLEMS = {
    "one image": ([[0, 0, 0], [0, 0, 0]], 1),
    "text before the only image": ([[-1, -1, 0, 0], [-1, 0, 0, 0]], 1),
    "no image in one row": ([[-1, -1, -1], [0, 0, 1]], 2),
    "no image at all": ([[-1, -1], [-1, -1]], 3),
    "different numbers of images": ([[0, 0, 0, 0], [0, 1, 2, 3], [-1, 0, 0, 1]], 4),
    "left padding": ([[-1, -1, -1, 0, 1, 1], [0, 0, 0, 0, 1, 1]], 2),
    "images that nobody reads": ([[0, 0, 0], [0, 0, 1]], 5),
    "one token a row": ([[2], [0], [-1]], 3),
    "no order": ([[1, 0, -1, 2, 0, 1]], 3),
}


def assert_equals_dense(layer, x, media, media_index):
    tensors = {"x": x, "media": media, **dict(layer.named_parameters())}
    ours = value_and_gradients(lambda: layer(x, layer.project_media(media), media_index), tensors)
    dense = value_and_gradients(lambda: dense_cross_attention(layer, x, media, media_index), tensors)
    assert_same(ours, dense)


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("name", NAMED_PROBLEMS)
def test_cross_attention_is_dense_masked_attention(name, immediate):
    rows, images = NAMED_PROBLEMS[name]
    media_index = torch.tensor(rows)
    x = torch.randn(*media_index.shape, DIM, requires_grad=True)
    media = torch.randn(len(rows), images, 5, DIM_VISUAL, requires_grad=True)
    assert_equals_dense(cross_attention(immediate), x, media, media_index)


@pytest.mark.parametrize("immediate", [True, False])
def test_cross_attention_is_dense_masked_attention_at_random_shapes(immediate):
    layer = cross_attention(immediate)
    for x, media, media_index in random_problems():
        assert_equals_dense(layer, x, media, media_index)


@pytest.mark.parametrize("immediate", [True, False])
def test_text_without_an_image_gets_exactly_zero(immediate):
    layer = cross_attention(immediate)
    for x, media, media_index in random_problems():
        out = layer(x, layer.project_media(media), media_index)
        (gradient,) = torch.autograd.grad(out.sum(), x, materialize_grads=True)
        blind = media_index < 0
        assert (out[blind] == 0).all()
        assert (gradient[blind] == 0).all()
        assert (out[~blind] != 0).all()


def test_a_batch_without_images_gets_exactly_zero():
    for immediate in (True, False):
        layer = cross_attention(immediate)
        out = layer(
            torch.randn(2, 5, DIM), layer.project_media(torch.randn(2, 0, 4, DIM_VISUAL)), torch.full((2, 5), -1)
        )
        assert torch.equal(out, torch.zeros(2, 5, DIM))


def test_a_token_feels_its_own_image_and_no_other():
    """One image of one row changes: exactly the tokens that see it change."""
    layer = cross_attention()
    for x, media, media_index in random_problems():
        before = layer(x, layer.project_media(media), media_index)
        for row in range(media.shape[0]):
            for image in range(media.shape[1]):
                changed = media.detach().clone()
                changed[row, image] += 1 + torch.rand_like(changed[row, image])
                after = layer(x, layer.project_media(changed), media_index)
                reads = torch.zeros_like(media_index, dtype=torch.bool)
                reads[row] = media_index[row] == image
                assert torch.equal((after != before).any(-1), reads)


@pytest.mark.parametrize("immediate", [True, False])
def test_rows_are_independent(immediate):
    layer = cross_attention(immediate)
    for x, media, media_index in random_problems(20):
        out = layer(x, layer.project_media(media), media_index)
        for row in range(len(x)):
            alone = slice(row, row + 1)
            assert_same(layer(x[alone], layer.project_media(media[alone]), media_index[alone]), out[alone])


def test_one_token_at_a_time_is_the_full_pass():
    """Decoding: each row keeps the keys and values of the image it sees now, and M is 1."""
    layer = cross_attention()
    for x, media, media_index in random_problems(30):
        media_kv = layer.project_media(media)
        steps = []
        for t in range(x.shape[1]):
            current = media_index[:, t]
            selected = media_kv.select(current)
            assert selected.k.shape[1] == 1
            steps.append(layer(x[:, t : t + 1], selected, current.clamp(max=0)[:, None]))
        assert_same(torch.cat(steps, dim=1), layer(x, media_kv, media_index))


def test_repeated_rows_are_repeated_media():
    layer = cross_attention()
    for x, media, media_index in random_problems(20):
        x, media_index = x.repeat_interleave(3, dim=0), media_index.repeat_interleave(3, dim=0)
        repeated = layer(x, layer.project_media(media).repeat_rows(3), media_index)
        assert_same(repeated, layer(x, layer.project_media(media.repeat_interleave(3, dim=0)), media_index))


def test_a_shared_layout_is_the_index_itself():
    layer = cross_attention()
    for x, media, media_index in random_problems(20):
        media_kv, layout = layer.project_media(media), MediaLayout.from_index(media_index, media.shape[1])
        assert torch.equal(layer(x, media_kv, layout), layer(x, media_kv, media_index))


class Recorder(TorchDispatchMode):
    """Counts the operations that run, and notes the size of the largest tensor that one of them returns."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        self.calls[operation.overloadpacket.__name__] += 1
        return result


def test_no_scores_against_other_images_are_computed_or_stored():
    """Trap 12: the peers compute B x H x T x M x L scores, mask them, and keep them for the backward pass."""
    batch, length, images, latents = 2, 96, 8, 16
    layer = cross_attention()
    x = torch.randn(batch, length, DIM, requires_grad=True)
    media = torch.randn(batch, images, latents, DIM_VISUAL)
    media_index = torch.arange(images).repeat_interleave(length // images).expand(batch, -1)
    dense_scores = batch * HEADS * length * images * latents
    with Recorder() as dense:
        dense_cross_attention(layer, x, media, media_index).sum().backward()
    with Recorder() as ours:
        layer(x, layer.project_media(media), media_index).sum().backward()
    assert dense.largest >= dense_scores, "the recorder sees what it is meant to see"
    assert ours.largest < dense_scores / images
    assert not any("softmax" in name for name in ours.calls), "scores stay inside the fused kernel"


@pytest.mark.parametrize("images", [1, 4])
def test_cross_attention_flops_are_those_of_its_matrix_products(images):
    layer, x, media = cross_attention(), torch.randn(2, 12, DIM), torch.randn(2, images, 5, DIM_VISUAL)
    media_index = torch.arange(images).repeat_interleave(12 // images).expand(2, -1)
    counted = count_flops(lambda: layer(x, layer.project_media(media), media_index))
    assert counted == 2 * layer.flops(tokens=12, latents=5, images=images)
    media_kv = layer.project_media(media)
    assert count_flops(lambda: layer(x, media_kv, media_index)) == 2 * layer.flops(tokens=12, latents=5, images=0)


def test_decoding_costs_the_same_with_1_image_as_with_33():
    """Trap 11: OpenFlamingo projects all images again for every token."""
    layer, x = cross_attention(), torch.randn(2, 1, DIM)

    def one_step(images):
        media_kv = layer.project_media(torch.randn(2, images, 5, DIM_VISUAL)).select(torch.tensor([images - 1, 0]))
        return count_flops(lambda: layer(x, media_kv, torch.zeros(2, 1, dtype=torch.int64)))

    assert one_step(33) == one_step(1) == 2 * layer.flops(tokens=1, latents=5, images=0)


def test_reading_an_image_while_decoding_compiles_as_one_graph():
    """One image a row: nothing is read back from the device, no shape depends on the data."""
    layer = cross_attention()
    media_kv = layer.project_media(torch.randn(2, 1, 5, DIM_VISUAL))

    def step(x, media_index):
        return layer(x, media_kv, MediaLayout(media_index, num_media=1))

    x, media_index = torch.randn(2, 1, DIM), torch.tensor([[0], [-1]])
    assert_same(torch.compile(step, backend="eager", fullgraph=True)(x, media_index), step(x, media_index))


def test_cross_attention_names_what_does_not_fit():
    layer, x = cross_attention(), torch.randn(2, 6, DIM)
    media_kv, index = layer.project_media(torch.randn(2, 3, 5, DIM_VISUAL)), torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"x must have 3 axes, the last of width {DIM}"):
        layer(torch.randn(2, 6, DIM + 1), media_kv, index)
    with pytest.raises(ValueError, match="x must have 3 axes"):
        layer(x[0], media_kv, index)
    with pytest.raises(ValueError, match=f"media must have 4 axes, the last of width {DIM_VISUAL}"):
        layer.project_media(torch.randn(2, 5, DIM_VISUAL))
    with pytest.raises(ValueError, match="media must have 4 axes"):
        layer.project_media(torch.randn(2, 3, 5, DIM))
    with pytest.raises(ValueError, match="do not belong together"):
        layer(x, media_kv, index[:, :5])
    with pytest.raises(ValueError, match="do not belong together"):
        layer(x, layer.project_media(torch.randn(4, 3, 5, DIM_VISUAL)), index)
    with pytest.raises(ValueError, match="do not belong together"):
        layer(x, media_kv, MediaLayout.from_index(index, num_media=2))
    with pytest.raises(ValueError, match="image number 4, but only 3 images"):
        layer(x, media_kv, index + 3)


def multihead_attention(dim, heads, q_weight, kv_weight, out_weight):
    """torch's own layer around the same weights."""
    reference = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)
    reference.in_proj_weight = nn.Parameter(torch.cat((q_weight, kv_weight)).detach())
    reference.out_proj.weight = nn.Parameter(out_weight.detach().clone())
    return reference


def test_perceiver_attention_is_multihead_attention():
    layer = randomized(PerceiverAttention(DIM, DIM_HEAD, HEADS))
    reference = multihead_attention(DIM, HEADS, layer.to_q.weight, layer.to_kv.weight, layer.to_out.weight)
    media, latents = torch.randn(2, 9, DIM, requires_grad=True), torch.randn(2, 4, DIM, requires_grad=True)

    def dense():
        queries = layer.norm_latents(latents)
        context = torch.cat((layer.norm_media(media), queries), dim=1)
        return reference(queries, context, context)[0]

    norms = {name: parameter for name, parameter in layer.named_parameters() if "norm" in name}
    inputs = {"media": media, "latents": latents, **norms}
    ours = value_and_gradients(
        lambda: layer(media, latents),
        inputs | {"q": layer.to_q.weight, "kv": layer.to_kv.weight, "out": layer.to_out.weight},
    )
    theirs = value_and_gradients(dense, inputs | {"in": reference.in_proj_weight, "out": reference.out_proj.weight})
    ours["in"] = torch.cat((ours.pop("q"), ours.pop("kv")))
    assert_same(ours, theirs)


def test_perceiver_attention_reads_latents_beside_the_media():
    """Keys come from concat(media, latents): a latent feels the others even where there is no patch at all."""
    layer = randomized(PerceiverAttention(DIM, DIM_HEAD, HEADS))
    latents = torch.randn(1, 4, DIM)
    changed = latents.clone()
    changed[:, 3] += torch.randn(DIM)
    nothing = torch.randn(1, 0, DIM)
    assert not torch.isclose(layer(nothing, latents)[:, 0], layer(nothing, changed)[:, 0]).any()


def test_perceiver_attention_flops_are_those_of_its_matrix_products():
    layer = PerceiverAttention(DIM, DIM_HEAD, HEADS)
    counted = count_flops(lambda: layer(torch.randn(2, 9, DIM), torch.randn(2, 4, DIM)))
    assert counted == 2 * layer.flops(patches=9, latents=4)


def self_attention(causal=False):
    return randomized(SelfAttentionLayer(DIM, DIM_HEAD, HEADS, causal))


def forbidden_for_multihead_attention(name, length):
    """bool[T, T], true where nn.MultiheadAttention must not look."""
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return {"all": None, "causal": later, "window": later | ~torch.ones_like(later).triu(-2)}[name]


@pytest.mark.parametrize("sees", ["all", "causal", "window"])
def test_self_attention_is_multihead_attention(sees):
    layer = self_attention(causal=sees == "causal")
    forbidden = forbidden_for_multihead_attention(sees, 7)
    mask = ~forbidden[None, None].expand(2, -1, -1, -1) if sees == "window" else None
    q_weight, kv_weight = layer.to_qkv.weight.split((DIM, 2 * DIM))
    reference = multihead_attention(DIM, HEADS, q_weight, kv_weight, layer.to_out.weight)
    x = torch.randn(2, 7, DIM, requires_grad=True)

    def dense():
        normed = layer.norm(x)
        return reference(normed, normed, normed, attn_mask=forbidden)[0]

    shared = {"x": x, "norm": layer.norm.weight, "norm_bias": layer.norm.bias}
    ours = value_and_gradients(lambda: layer(x, mask), shared | {"in": layer.to_qkv.weight, "out": layer.to_out.weight})
    theirs = value_and_gradients(dense, shared | {"in": reference.in_proj_weight, "out": reference.out_proj.weight})
    assert_same(ours, theirs)


def test_a_mask_replaces_the_causal_one():
    layer, x = self_attention(causal=True), torch.randn(2, 5, DIM)
    everything = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    layer_without = self_attention(causal=False)
    layer_without.load_state_dict(layer.state_dict())
    assert_same(layer(x, everything), layer_without(x))


@pytest.mark.parametrize("chunks", [[1] * 8, [5, 1, 1, 1], [3, 4, 1], [8]])
def test_cached_steps_are_the_full_pass(chunks):
    """A prompt and then token by token, into a cache with room to spare that holds garbage at first."""
    length, slots = sum(chunks), 11
    layer, x = self_attention(causal=True), torch.randn(2, length, DIM)
    full = layer(x, rotary=rotary_embedding(torch.arange(length), DIM_HEAD))
    cache = KVCache.allocate(2, HEADS, slots, DIM_HEAD, like=x)
    cache.k.normal_(std=100)
    cache.v.normal_(std=100)
    steps, start = [], 0
    with torch.no_grad():
        for chunk in chunks:
            positions = torch.arange(start, start + chunk)
            mask = (torch.arange(slots) <= positions[:, None]).expand(2, 1, -1, -1)
            rotary = rotary_embedding(positions, DIM_HEAD)
            steps.append(layer(x[:, start : start + chunk], mask, rotary, cache, positions.expand(2, -1)))
            start += chunk
    assert cache.k.shape == (2, HEADS, slots, DIM_HEAD)
    assert_same(torch.cat(steps, dim=1), full.detach())


def test_a_cache_needs_a_mask_and_positions():
    """Without a mask the queries would see slots that are not filled yet."""
    layer, x = self_attention(causal=True), torch.randn(2, 3, DIM)
    cache, mask = KVCache.allocate(2, HEADS, 5, DIM_HEAD, like=x), torch.ones(2, 1, 3, 5, dtype=torch.bool)
    for arguments in ({"positions": torch.arange(3)}, {"mask": mask}, {}):
        with pytest.raises(AssertionError, match="slots that are not filled yet"):
            layer(x, cache=cache, **arguments)


def test_a_cached_step_compiles_as_one_graph():
    layer, x = self_attention(causal=True), torch.randn(2, 1, DIM)

    @torch.no_grad()
    def step(cache, positions):
        mask = (torch.arange(6) <= positions[:, None]).expand(2, 1, -1, -1)
        return layer(x, mask, rotary_embedding(positions, DIM_HEAD), cache, positions.expand(2, -1))

    caches = [KVCache.allocate(2, HEADS, 6, DIM_HEAD, like=x) for _ in range(2)]
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for position in (0, 1, 2):
        assert_same(compiled(caches[0], torch.tensor([position])), step(caches[1], torch.tensor([position])))
    assert_same(caches[0].k, caches[1].k)


def test_self_attention_names_what_does_not_fit():
    with pytest.raises(ValueError, match=f"x must have 3 axes, the last of width {DIM}"):
        self_attention()(torch.randn(2, 5, DIM + 1))


def test_self_attention_flops_are_those_of_its_matrix_products():
    layer, x = self_attention(), torch.randn(2, 7, DIM)
    assert count_flops(lambda: layer(x)) == 2 * layer.flops(tokens=7)
    cache = KVCache.allocate(2, HEADS, 11, DIM_HEAD, like=x)
    mask = torch.ones(2, 1, 7, 11, dtype=torch.bool)
    counted = count_flops(lambda: layer(x, mask, cache=cache, positions=torch.arange(7).expand(len(x), -1)))
    assert counted == 2 * layer.flops(tokens=7, keys=11)


def test_rotating_is_multiplying_by_complex_numbers():
    x = torch.randn(2, HEADS, 6, 8)
    angles = torch.arange(6)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    rotated = rotate(x, rotary_embedding(torch.arange(6), 8))
    # the angles are float32: at positions below 8 an angle, its sine and its cosine are off by 2^-21 at most
    tolerance = 2**-21 * x.abs().max().item()
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), dim=-1), rtol=0, atol=tolerance)


def test_rotary_scores_depend_on_distance_alone():
    """Shifting all positions leaves the scores as they are, so padding on the left shifts nothing."""
    q, k = torch.randn(2, HEADS, 9, 16), torch.randn(2, HEADS, 9, 16)
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()

    def scores(shift):
        rotary = rotary_embedding(torch.arange(9) + shift, 16)
        return rotate(q, rotary) @ rotate(k, rotary).mT

    for shift in (1, 17, 500):
        tolerance = (shift + 9) * 2**-22 * largest  # float32 angles: off by 2^-23 of the position, for q and for k
        torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=tolerance)
    apart = ~torch.eye(9, dtype=torch.bool)
    assert not torch.isclose(scores(0), q @ k.mT)[..., apart].any()


def test_shifting_all_positions_leaves_self_attention_the_same():
    layer, x = self_attention(causal=True), torch.randn(2, 9, DIM)
    at_zero = layer(x, rotary=rotary_embedding(torch.arange(9), DIM_HEAD))
    shifted = layer(x, rotary=rotary_embedding(torch.arange(9) + 40, DIM_HEAD))
    # not up to rounding in float64: the angles are float32
    torch.testing.assert_close(shifted, at_zero, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(at_zero, layer(x)).all()
