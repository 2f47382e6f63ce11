"""Fewer visual tokens: attention in media space is the plain one, regrouped; and every image gets its own count."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_resampler import CoarseToFineResampler
from attention_layers import PerceiverAttention
from confidence_head import RiskHead, calibrated_threshold
from laws import assert_same, count_flops, randomized, value_and_gradients
from perceiver_resampler import PerceiverResampler
from reduced_tokens import AdaptiveTokenCount, MediaSpaceAttention, media_space

pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"dim": 12, "depth": 3, "dim_head": 4, "heads": 3}
COUNTS = (1, 3, 4)  # of 6


def resampler(num_latents=6, **options):
    return randomized(PerceiverResampler(**SIZES, num_latents=num_latents, **options)).eval()


def coarse_to_fine():
    return randomized(CoarseToFineResampler(12, grids=(1, 2, 3), dim_head=4, heads=3, num_latents=6)).eval()


def adaptive(threshold, model=None):
    head = randomized(RiskHead(12, ways=len(COUNTS), hidden=8))
    with torch.no_grad():
        head.risk.weight *= 30  # so that risks lie on both sides of any threshold
        head.risk.bias -= head.logits(images(100)).mean(dim=0)
    return AdaptiveTokenCount(model or resampler(), head, COUNTS, threshold).eval()


def images(*leading):
    """float[*leading, 7, 12] whose patches are alike within an image: so risks differ from image to image."""
    return 2 * torch.randn(*leading, 1, 12) + 0.3 * torch.randn(*leading, 7, 12)


def attention_by_loop(layer, media, latents):
    """Row by row, head by head, from keys and values of every patch and latent."""
    rows, width = [], layer.inner // layer.heads
    for row, own in zip(media, latents, strict=True):
        own = layer.norm_latents(own)
        context = torch.cat((layer.norm_media(row), own))
        keys, values = (context @ layer.to_kv.weight.T).chunk(2, dim=-1)
        queries = own @ layer.to_q.weight.T
        heads = []
        for h in range(layer.heads):
            q, k, v = (each[:, h * width : (h + 1) * width] for each in (queries, keys, values))
            weights = (q @ k.T / width**0.5).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ v)
        rows.append(torch.cat(heads, dim=-1) @ layer.to_out.weight.T)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------- media space


@pytest.mark.parametrize("seed", range(12))
def test_media_space_is_the_plain_attention(seed):
    rng = random.Random(seed)
    dim, width, heads = rng.choice([4, 8, 12]), rng.choice([2, 4, 8]), rng.randint(1, 4)
    batch, patches, count = rng.randint(1, 3), rng.choice([0, 1, 3, 20]), rng.choice([1, 2, 7])
    layer = randomized(PerceiverAttention(dim, width, heads))
    regrouped = MediaSpaceAttention(layer)
    media = torch.randn(batch, patches, dim, requires_grad=True)
    latents = torch.randn(batch, count, dim, requires_grad=True)
    tensors = {"media": media, "latents": latents, **dict(layer.named_parameters())}
    plain = value_and_gradients(lambda: attention_by_loop(layer, media, latents), tensors)
    assert_same(value_and_gradients(lambda: regrouped.in_media_space(media, latents), tensors), plain)
    assert_same(value_and_gradients(lambda: regrouped(media, latents), tensors), plain)


def always_in_media_space(monkeypatch):
    monkeypatch.setattr(MediaSpaceAttention, "prefers_media_space", lambda *_: True)


@pytest.mark.parametrize("regrouped", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 12), (2, 3, 9, 12), (2, 3, 2, 9, 12), (0, 9, 12), (2, 0, 9, 12)])
def test_a_resampler_in_media_space_gives_the_same(shape, regrouped, monkeypatch):
    if regrouped:
        always_in_media_space(monkeypatch)
    models = [resampler(max_num_media=3, max_num_frames=2)]
    if len(shape) < 5:
        models.append(coarse_to_fine())
    for model in models:
        x, fast = torch.randn(shape, requires_grad=True), media_space(model)
        tensors = {"x": x, **dict(model.named_parameters())}
        for m, d in ((None, None), (1, None), (4, 2)):
            ours = value_and_gradients(lambda: fast(x, m, d), tensors)  # noqa: B023 (called at once)
            assert_same(ours, value_and_gradients(lambda: model(x, m, d), tensors))  # noqa: B023


def test_media_space_shares_parameters_under_their_names():
    for model in (resampler(max_num_media=3), coarse_to_fine()):
        fast = media_space(model)
        assert type(fast) is type(model)
        ours, theirs = dict(fast.named_parameters()), dict(model.named_parameters())
        assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
        assert list(fast.state_dict()) == list(model.state_dict())
        assert not fast.training and media_space(model.train()).layers[0][0].training
        assert all(type(attention) is MediaSpaceAttention for attention, _ in fast.layers)


def test_media_space_leaves_the_plain_resampler_as_it_was():
    model = resampler()
    before = copy.deepcopy(model)
    media_space(model).layers[0] = nn.Identity()
    assert all(type(attention) is PerceiverAttention for attention, _ in model.layers)
    x = torch.randn(2, 7, 12)
    assert torch.equal(model(x), before(x))


def test_media_space_twice_and_copies_of_it_give_the_same():
    model, x = resampler(), torch.randn(2, 50, 12)
    fast = media_space(model)
    assert torch.equal(media_space(fast)(x, 1), fast(x, 1))
    separate = copy.deepcopy(fast)
    with torch.no_grad():
        separate.latents.zero_()
    assert_same(fast(x, 1), model(x, 1))


def test_media_space_of_something_else_is_an_error():
    with pytest.raises(ValueError, match="resampler must be a PerceiverResampler; got a Linear"):
        media_space(nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------------- operations


def test_operations_are_those_counted_by_hand():
    """D = 12, 3 heads of width 4, 50 patches, 2 latents."""
    layer = MediaSpaceAttention(PerceiverAttention(12, 4, 3))
    to_q = 2 * 2 * 12 * 12
    to_k = 3 * 2 * 2 * 4 * 12  # of each head's queries
    scores = 3 * 2 * 2 * 12 * 52
    assert layer.media_space_flops(50, 2) == to_q + to_k + scores + scores + to_k + to_q
    plain_keys = 2 * 52 * 12 * 12
    plain_scores = 3 * 2 * 2 * 4 * 52
    assert PerceiverAttention.flops(layer, 50, 2) == 2 * to_q + 2 * plain_keys + 2 * plain_scores


@pytest.mark.parametrize("seed", range(8))
def test_each_call_takes_the_form_of_fewer_operations(seed):
    rng = random.Random(seed)
    dim, width, heads = rng.choice([8, 24]), rng.choice([2, 4]), rng.randint(1, 3)
    patches, count = rng.choice([1, 5, 40]), rng.choice([1, 4, 16])
    plain = PerceiverAttention(dim, width, heads)
    layer, inputs = MediaSpaceAttention(plain), (torch.randn(1, patches, dim), torch.randn(1, count, dim))
    taken = count_flops(lambda: layer(*inputs))
    assert taken == layer.flops(patches, count)
    assert taken == min(count_flops(lambda: plain(*inputs)), count_flops(lambda: layer.in_media_space(*inputs)))


def test_few_latents_go_through_media_space_and_many_do_not():
    layer = media_space(PerceiverResampler(768, depth=1, heads=8, dim_head=64)).layers[0][0]
    forms = {m: layer.prefers_media_space(patches=576, latents=m) for m in (1, 4, 16, 32, 64, 256)}
    assert forms == {1: True, 4: True, 16: True, 32: True, 64: False, 256: False}


def test_a_resampler_counts_what_its_attentions_do():
    model = resampler()
    fast, x = media_space(model), torch.randn(2, 50, 12)
    for m in (1, 6):
        assert count_flops(lambda: fast(x, m)) == 2 * fast.flops(50, m)  # noqa: B023 (called at once)
    assert fast.flops(50, 1) < model.flops(50, 1)


class _Wrapped(torch.Tensor):
    """As quantized weights are: a subclass around plain tensors, which knows the layer's own product alone."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["inner"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].inner)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{function} of a quantized weight")


def test_weights_in_8_bits_keep_the_plain_form():
    model, x = resampler(), torch.randn(2, 50, 12)
    fast, expected = media_space(copy.deepcopy(model)), model(x, 1)
    for attention, _ in fast.layers:
        attention.to_kv.weight = nn.Parameter(_Wrapped(attention.to_kv.weight.detach()), requires_grad=False)
    assert fast.flops(50, 1) == model.flops(50, 1)
    assert torch.equal(fast(x, 1), expected)


def test_media_space_compiles_whole():
    model, x = resampler(), torch.randn(2, 50, 12)
    compiled = torch.compile(media_space(model), fullgraph=True, backend="eager")
    assert_same(compiled(x, num_latents=1), model(x, num_latents=1))


# ---------------------------------------------------------------------------------------------------- a count per image


def chosen_by_loop(module, x):
    """x float[N, P, D]: the first count whose risk is below the threshold, else all."""
    counts = []
    for image in x:
        risks = module.head(image[None])[0].tolist()
        counts.append(next((c for c, risk in zip(module.counts, risks, strict=False) if risk < module.threshold), 6))
    return counts


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_each_image_gets_the_smallest_count_of_low_risk(threshold):
    module, x = adaptive(threshold), images(40)
    counts = module.choose(x)
    assert counts.tolist() == chosen_by_loop(module, x)
    assert len(set(counts.tolist())) > 2
    assert torch.equal(module.choose(x.unflatten(0, (8, 5))), counts.unflatten(0, (8, 5)))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("leading", [(30,), (15, 1), (10, 3)])
def test_groups_hold_every_row_once_with_the_tokens_of_its_count(leading, fast):
    model = resampler(max_num_media=3)
    module = adaptive(0.5, media_space(model) if fast else model)
    x = images(*leading)
    needed = module.choose(x).reshape(leading[0], -1).amax(dim=1).tolist()
    seen, counts = [], []
    for rows, tokens in module.groups(x):
        assert rows.tolist() == sorted(rows.tolist())
        counts.append(tokens.shape[-2])
        assert len(rows) == len(tokens)
        for row, own in zip(rows.tolist(), tokens, strict=True):
            assert needed[row] == counts[-1]
            assert_same(own, model(x[row : row + 1], num_latents=counts[-1])[0])
        seen += rows.tolist()
    assert sorted(seen) == list(range(leading[0]))
    assert counts == sorted(set(needed)) and len(counts) > 1


def test_videos_are_grouped_too():
    model = resampler(max_num_frames=2)
    module, x = adaptive(0.5, model), images(20, 1, 2)
    groups = module.groups(x)
    assert len(groups) > 1
    for rows, tokens in groups:
        assert_same(tokens, model(x[rows], num_latents=tokens.shape[2]))


def test_threshold_0_gives_everybody_all_tokens():
    model, x = resampler(), torch.randn(5, 2, 7, 12)
    module = adaptive(0, model)
    assert (module.choose(x) == 6).all()
    ((rows, tokens),) = module.groups(x)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(tokens, model(x))


def test_threshold_1_gives_everybody_the_fewest():
    module, x = adaptive(1), torch.randn(5, 7, 12)
    ((rows, tokens),) = module.groups(x)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(tokens, module.resampler(x, num_latents=1))


def test_no_rows_make_no_groups():
    assert adaptive(0.5).groups(torch.randn(0, 7, 12)) == []


def test_a_calibrated_threshold_loses_no_more_than_its_budget():
    module, x = adaptive(0.5), images(200)
    risk = module.risks(x)
    loses = torch.rand(risk.shape) < risk * torch.linspace(0.9, 0.3, 3)
    for budget in (0.0, 0.02, 0.1):
        module.threshold = calibrated_threshold(risk, loses, budget)
        ways = [module.counts.index(count) for count in module.choose(x).tolist()]
        cheap = [(image, way) for image, way in enumerate(ways) if way < len(COUNTS)]
        assert sum(loses[image, way].item() for image, way in cheap) <= budget * 200
        assert budget == 0 or cheap


class _Waits(TorchDispatchMode):
    """Notes the operations that make the host wait for a device: a value read, a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal"):
            self.names.append(name)
        return function(*args, **kwargs or {})


def test_grouping_waits_for_the_device_once(monkeypatch):
    module, x = adaptive(0.5), images(20)
    read = torch.Tensor.tolist
    with _Waits() as waits:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.names.append("tolist") or read(self))
        groups = module.groups(x)
    assert len(groups) > 1
    assert waits.names == ["tolist"]


def test_slips_are_errors():
    model, head = resampler(), RiskHead(12, ways=2)
    for counts in ((), (3, 3), (4, 2), (0, 2), (2, 6), (2, 7)):
        with pytest.raises(ValueError, match="counts must rise from 1 or more to below 6, all there are; got"):
            AdaptiveTokenCount(model, head, counts, 0.1)
    with pytest.raises(ValueError, match="head judges 2 ways; counts names 3"):
        AdaptiveTokenCount(model, head, COUNTS, 0.1)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be a probability"):
            AdaptiveTokenCount(model, head, (2, 3), threshold)
    with pytest.raises(ValueError, match="the last of width 12"):
        adaptive(0.5).choose(torch.randn(2, 7, 11))
    with pytest.raises(ValueError, match=r"x must be \[B, P, D\]"):
        adaptive(0.5).groups(torch.randn(7, 12))
