"""Adaptive depth: every image is the plain resampler stopped where it left, whoever else was in the batch."""

import random

import pytest
import torch
from torch import nn

from adaptive_resampler import AdaptivePerceiverResampler, CoarseToFineResampler, averaged, risks
from confidence_head import RiskHead
from laws import assert_same, count_flops, randomized, value_and_gradients
from perceiver_resampler import PerceiverResampler

pytestmark = pytest.mark.usefixtures("float64")

GRIDS = (1, 2, 3, 5)


def plain(depth=4, **options):
    return randomized(PerceiverResampler(12, depth, dim_head=4, heads=3, num_latents=6, **options)).eval()


def coarse_to_fine(grids=GRIDS):
    return randomized(CoarseToFineResampler(12, grids, dim_head=4, heads=3, num_latents=6)).eval()


MODELS = {"plain": plain, "coarse to fine": coarse_to_fine}


def heads_of(resampler, bias=0.0):
    """Random heads whose risks lie on both sides of a half."""
    heads = [randomized(RiskHead(resampler.dim, ways=1, hidden=8)).eval() for _ in resampler.layers[1:]]
    with torch.no_grad():
        x = torch.randn(64, 25, resampler.dim)
        media, latents = x, resampler.first_latents(64)
        for layer, head in enumerate(heads):
            latents = resampler.run_layer(layer, media, latents)
            logits = head.logits(resampler.norm(latents))
            head.risk.weight /= logits.std()
            head.risk.bias += bias - head.logits(resampler.norm(latents)).mean()
    return heads


class Script(nn.Module):
    """In place of a head: every image leaves where the script says, known by its first latent."""

    def __init__(self, resampler, x, exits, layer):
        super().__init__()
        self.layer, self.exits = layer, exits
        media, _ = resampler.flatten_media(x)
        latents = resampler.first_latents(len(media))
        for i in range(layer + 1):
            latents = resampler.run_layer(i, media, latents)
        self.known = resampler.norm(latents)[:, 0]

    def forward(self, features):
        who = torch.cdist(features[:, 0], self.known).argmin(1)
        return (self.exits[who] != self.layer + 1)[:, None].double()


def scripted(resampler, x, exits, threshold=0.5):
    """exits int64[N], 1 to depth."""
    scripts = [Script(resampler, x, exits, layer) for layer in range(len(resampler.layers) - 1)]
    return AdaptivePerceiverResampler(resampler, scripts, threshold)


def rows_of_each_layer(resampler, call):
    """How many images each layer read while `call` ran."""
    seen = [0] * len(resampler.layers)

    def count(number):
        def hook(_, arguments):
            seen[number] += len(arguments[0])

        return hook

    handles = [pair[0].register_forward_pre_hook(count(i)) for i, pair in enumerate(resampler.layers)]
    call()
    for handle in handles:
        handle.remove()
    return seen


# ---------------------------------------------------------------------------------------------------- adaptive


@pytest.mark.parametrize("shape", [(3, 25, 12), (2, 3, 25, 12), (0, 25, 12), (2, 0, 25, 12)])
@pytest.mark.parametrize("model", MODELS)
def test_threshold_0_is_the_full_resampler(model, shape):
    """Bit for bit, and without asking the heads."""
    resampler, x = MODELS[model](), torch.randn(shape)
    adaptive = AdaptivePerceiverResampler(resampler, heads_of(resampler, bias=-1e3), 0.0)  # sure that nothing is lost
    tokens, exits = adaptive.resample(x)
    assert torch.equal(tokens, resampler(x)) and torch.equal(adaptive(x), tokens)
    assert exits.shape == shape[:-2] and exits.dtype == torch.int64 and (exits == 4).all()
    adaptive.heads[0].forward = None
    images = x.shape[:-2].numel()
    assert rows_of_each_layer(resampler, lambda: adaptive(x)) == [images] * 4


@pytest.mark.parametrize("model", MODELS)
def test_threshold_1_stops_after_the_first_layer(model):
    resampler, x = MODELS[model](), torch.randn(2, 3, 25, 12)
    adaptive = AdaptivePerceiverResampler(resampler, heads_of(resampler), 1.0)
    tokens, exits = adaptive.resample(x)
    assert (exits == 1).all()
    assert_same(tokens, resampler(x, depth=1))
    assert rows_of_each_layer(resampler, lambda: adaptive(x)) == [6, 0, 0, 0]
    resampler.layers[1][0].forward = None  # with nobody left, no further layer is called at all
    assert torch.equal(adaptive(x), tokens)


def test_a_sure_risk_never_leaves():
    resampler, x = plain(), torch.randn(5, 7, 12)
    adaptive = AdaptivePerceiverResampler(resampler, heads_of(resampler, bias=1e3), 1.0)
    tokens, exits = adaptive.resample(x)
    assert (exits == 4).all()
    assert_same(tokens, resampler(x))


@pytest.mark.parametrize("seed", range(16))
def test_each_image_is_the_resampler_stopped_at_its_exit(seed):
    """In its own place, for any pattern of exits; each layer reads those alone that have not left."""
    rng = random.Random(seed)
    resampler = MODELS[rng.choice(list(MODELS))]()
    leading = (rng.randint(1, 9),) if rng.random() < 0.5 else (rng.randint(1, 4), rng.randint(1, 4))
    x = torch.randn(*leading, 25, 12)
    wanted = torch.tensor([rng.randint(1, 4) for _ in range(x[..., 0, 0].numel())])
    adaptive = scripted(resampler, x, wanted)
    tokens, exits = adaptive.resample(x)
    assert exits.tolist() == wanted.view(leading).tolist()
    by_depth = torch.stack([resampler(x, depth=d) for d in (1, 2, 3, 4)]).flatten(1, -3)
    expected = by_depth[wanted - 1, torch.arange(len(wanted))]
    assert_same(tokens, expected.view(*leading, 6, 12))
    read = rows_of_each_layer(resampler, lambda: adaptive(x))
    assert read == [int((wanted > layer).sum()) for layer in range(4)]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("model", MODELS)
def test_an_image_leaves_behind_the_first_layer_with_less_risk_than_the_threshold(model, threshold):
    resampler, x = MODELS[model](), torch.randn(6, 5, 25, 12)
    heads = heads_of(resampler)
    tokens, exits = AdaptivePerceiverResampler(resampler, heads, threshold).resample(x)
    assert len(exits.unique()) > 1
    for row in range(6):
        for number in range(5):
            image, expected = x[row, number][None], 4
            for depth in (3, 2, 1):
                if heads[depth - 1](resampler(image, depth=depth)) < threshold:
                    expected = depth
            assert exits[row, number] == expected
            assert_same(tokens[row, number], resampler(image, depth=expected)[0])


def test_images_leave_whoever_else_is_in_the_batch():
    resampler, x = coarse_to_fine(), torch.randn(12, 25, 12)
    adaptive = AdaptivePerceiverResampler(resampler, heads_of(resampler), 0.5)
    tokens, exits = adaptive.resample(x)
    order = torch.randperm(12)
    shuffled_tokens, shuffled_exits = adaptive.resample(x[order])
    assert torch.equal(shuffled_exits, exits[order])
    assert_same(shuffled_tokens, tokens[order])
    for i in range(12):
        alone, exit_ = adaptive.resample(x[i : i + 1])
        assert exit_ == exits[i]
        assert_same(alone[0], tokens[i])


@pytest.mark.parametrize("model", MODELS)
def test_fewer_latents_leave_too(model):
    resampler, x = MODELS[model](), torch.randn(9, 25, 12)
    tokens, exits = AdaptivePerceiverResampler(resampler, heads_of(resampler), 0.5).resample(x, num_latents=2)
    assert tokens.shape == (9, 2, 12)
    for i, depth in enumerate(exits.tolist()):
        assert_same(tokens[i], resampler(x[i : i + 1], num_latents=2, depth=depth)[0])


def test_frames_and_places_of_images_are_told_apart():
    resampler = plain(max_num_media=3, max_num_frames=2)
    x = torch.randn(4, 3, 2, 9, 12)
    wanted = torch.tensor([1, 2, 3, 4] * 3)
    tokens, exits = scripted(resampler, x, wanted).resample(x)
    assert tokens.shape == (4, 3, 6, 12) and exits.shape == (4, 3)
    for place, depth in enumerate(wanted.tolist()):
        assert_same(tokens.flatten(0, 1)[place], resampler(x, depth=depth).flatten(0, 1)[place])


def test_a_resampler_of_one_layer_needs_no_head():
    resampler, x = plain(depth=1), torch.randn(3, 7, 12)
    tokens, exits = AdaptivePerceiverResampler(resampler, [], 0.5).resample(x)
    assert torch.equal(tokens, resampler(x)) and exits.tolist() == [1, 1, 1]


def test_gradients_reach_every_image_that_left():
    """As through the plain resampler: whoever wants to train through the exits can."""
    resampler = plain()
    x = torch.randn(5, 7, 12, requires_grad=True)
    wanted = torch.tensor([3, 1, 4, 2, 1])
    adaptive = scripted(resampler, x.detach(), wanted)
    tensors = {"x": x, **dict(resampler.named_parameters())}

    def one_by_one():
        return torch.stack([resampler(x[i : i + 1], depth=d)[0] for i, d in enumerate(wanted.tolist())])

    assert_same(value_and_gradients(lambda: adaptive(x), tensors), value_and_gradients(one_by_one, tensors))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_heads_is_an_error(count):
    with pytest.raises(ValueError, match=f"4 layers need one head less; got {count}"):
        AdaptivePerceiverResampler(plain(), [RiskHead(12, 1) for _ in range(count)], 0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_probability_is_an_error(threshold):
    with pytest.raises(ValueError, match=f"threshold must be a probability; got {threshold}"):
        AdaptivePerceiverResampler(plain(depth=1), [], threshold)


@pytest.mark.parametrize("shape", [(25, 12), (2, 25, 11)])
def test_what_the_resampler_refuses_is_refused(shape):
    resampler = plain()
    with pytest.raises(ValueError, match="x must"):
        AdaptivePerceiverResampler(resampler, heads_of(resampler), 0.5)(torch.randn(shape))


# ---------------------------------------------------------------------------------------------------- risks


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
@pytest.mark.parametrize("model", MODELS)
def test_risks_are_the_heads_step_by_step(model, leading):
    resampler, x = MODELS[model](), torch.randn(*leading, 25, 12)
    heads = heads_of(resampler)
    risk, tokens = risks(resampler, heads, x)
    assert risk.shape == (x[..., 0, 0].numel(), 3) and tokens.shape == (4, *leading, 6, 12)
    for depth in (1, 2, 3, 4):
        assert_same(tokens[depth - 1], resampler(x, depth=depth))
        if depth < 4:
            assert_same(risk[:, depth - 1], heads[depth - 1](tokens[depth - 1].reshape(-1, 6, 12))[:, 0])


def test_risks_tell_where_images_leave():
    resampler, x = coarse_to_fine(), torch.randn(20, 25, 12)
    heads = heads_of(resampler)
    risk, _ = risks(resampler, heads, x)
    for threshold in (0.2, 0.5, 0.7):
        exits = AdaptivePerceiverResampler(resampler, heads, threshold).resample(x)[1]
        for row, exit_ in zip(risk.tolist(), exits.tolist(), strict=True):
            assert exit_ == next((d for d, each in enumerate(row, 1) if each < threshold), 4)


# ---------------------------------------------------------------------------------------------------- coarse to fine


@pytest.mark.parametrize(("side", "grid"), [(1, 1), (4, 1), (4, 2), (4, 4), (5, 2), (5, 3), (10, 3), (7, 5), (10, 9)])
def test_averaged_is_the_mean_over_each_cell(side, grid):
    """Cell i spans the patches from floor(i side / grid) to ceil((i + 1) side / grid): neighbours share a border patch
    where the grid does not divide the side."""
    media, expected = torch.randn(3, side * side, 4), torch.zeros(3, grid * grid, 4)
    for row in range(grid):
        for column in range(grid):
            cell = [
                media[:, y * side + x]
                for y in range(row * side // grid, -(-(row + 1) * side // grid))
                for x in range(column * side // grid, -(-(column + 1) * side // grid))
            ]
            expected[:, row * grid + column] = sum(cell) / len(cell)
    assert_same(averaged(media, grid), expected)


def test_a_grid_as_fine_as_the_patches_leaves_them():
    media = torch.randn(2, 9, 4)
    assert averaged(media, 3) is media


@pytest.mark.parametrize(("patches", "grid"), [(8, 2), (9, 4), (2, 1), (0, 1)])
def test_patches_in_no_square_or_coarser_than_the_grid_are_an_error(patches, grid):
    sentence = f"a grid of {grid} x {grid} needs at least as many patches in a square; got {patches}"
    with pytest.raises(ValueError, match=sentence):
        averaged(torch.randn(2, patches, 4), grid)
    resampler = coarse_to_fine((grid,))
    with pytest.raises(ValueError, match=sentence):
        resampler(torch.randn(2, patches, 12))


@pytest.mark.parametrize("depth", [None, 1, 2, 3, 4])
def test_each_layer_reads_its_own_grid(depth):
    resampler, x = coarse_to_fine(), torch.randn(2, 3, 25, 12)
    latents = resampler.latents.expand(6, -1, -1)
    for (attention, feed_forward), grid in list(zip(resampler.layers, GRIDS, strict=True))[:depth]:
        latents = latents + attention(averaged(x.flatten(0, 1), grid), latents)
        latents = latents + feed_forward(latents)
    assert_same(resampler(x, depth=depth), resampler.norm(latents).unflatten(0, (2, 3)))


def test_fine_grids_alone_are_the_plain_resampler():
    """The same names of weights, too."""
    model, x = plain(), torch.randn(2, 3, 9, 12)
    fine = coarse_to_fine((3, 3, 3, 3))
    fine.load_state_dict(model.state_dict())
    assert torch.equal(fine(x), model(x)) and torch.equal(fine(x, 2, 3), model(x, 2, 3))
    coarse = coarse_to_fine((2, 3, 3, 3))
    coarse.load_state_dict(model.state_dict())
    assert (coarse(x) - model(x)).abs().max() > 1e-3


@pytest.mark.parametrize("num_latents", [None, 2])
@pytest.mark.parametrize("depth", [None, 1, 3])
def test_operations_are_as_torch_counts_them(num_latents, depth):
    resampler = coarse_to_fine()
    counted = count_flops(lambda: resampler(torch.randn(1, 25, 12), num_latents, depth))
    assert resampler.flops(25, num_latents, depth) == counted


def test_an_early_exit_saves_the_layers_behind_it():
    """Counted by torch; only the heads are added."""
    resampler, x = coarse_to_fine(), torch.randn(4, 25, 12)
    wanted = torch.tensor([1, 4, 2, 1])
    adaptive = scripted(resampler, x, wanted)
    expected = sum(resampler.flops(25, depth=depth) for depth in wanted.tolist())
    assert count_flops(lambda: adaptive(x)) == expected
    assert resampler.flops(25, depth=1) < resampler.flops(25) / 5


@pytest.mark.parametrize("grids", [(), (3, 2), (0, 1), (1, 3, 2)])
def test_grids_that_do_not_go_from_coarse_to_fine_are_an_error(grids):
    with pytest.raises(ValueError, match="grids must go from coarse to fine, each 1 or more; got"):
        CoarseToFineResampler(12, grids)


def test_a_coarse_to_fine_resampler_reads_single_frames_alone():
    resampler = CoarseToFineResampler(16, (2, 4), 8, 2, 4)
    assert resampler(torch.randn(1, 1, 1, 16, 16)).shape == (1, 1, 4, 16)
    with pytest.raises(ValueError, match="reads single frames; got 4 of them"):
        resampler(torch.randn(1, 1, 4, 16, 16))
