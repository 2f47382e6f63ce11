"""The Perceiver Resampler: its shapes, its elasticity, frames, and what it costs."""

import pytest
import torch
from torch import nn

from laws import assert_same, count_flops, randomized, value_and_gradients
from perceiver_resampler import DirectSelfAttention, PerceiverResampler

pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"dim": 12, "depth": 3, "dim_head": 4, "heads": 3}


def resampler(num_latents=6, **options):
    return randomized(PerceiverResampler(**SIZES, num_latents=num_latents, **options))


def resample_by_loop(model, x):
    """x float[B, M, F, P, D]: image by image, frame by frame, with the time embeddings where the model has them."""
    rows = []
    for row in x:
        images = []
        for m, image in enumerate(row):
            patches = torch.cat(
                [f if model.frame_embs is None else f + model.frame_embs[i] for i, f in enumerate(image)]
            )
            if model.media_time_embs is not None:
                patches = patches + model.media_time_embs[m, 0]
            latents = model.latents[None]
            for attention, feed_forward in model.layers:
                latents = latents + attention(patches[None], latents)
                latents = latents + feed_forward(latents)
            images.append(model.norm(latents)[0])
        rows.append(torch.stack(images))
    return torch.stack(rows)


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize("media", [None, 3])
def test_resampler_is_a_loop_over_images_and_frames(media, frames):
    model = resampler(max_num_media=media, max_num_frames=frames)
    x = torch.randn(2, 3, 4, 5, 12, requires_grad=True)
    tensors = {"x": x, **dict(model.named_parameters())}
    ours = value_and_gradients(lambda: model(x), tensors)
    assert_same(ours, value_and_gradients(lambda: resample_by_loop(model, x), tensors))


@pytest.mark.parametrize("options", [{}, {"max_num_media": 3}, {"max_num_frames": 2}])
def test_one_image_a_row_is_the_first_of_several(options):
    model, x = resampler(**options), torch.randn(2, 3, 7, 12)
    several = model(x)
    assert several.shape == (2, 3, 6, 12)
    assert model(x[:, 0]).shape == (2, 6, 12)
    assert_same(model(x[:, 0]), several[:, 0])


def test_an_image_is_a_video_of_one_frame():
    for options in ({}, {"max_num_frames": 2}):
        model, x = resampler(**options), torch.randn(2, 3, 7, 12)
        assert torch.equal(model(x), model(x[:, :, None]))


def test_the_number_of_patches_does_not_matter_to_the_shape():
    model = resampler()
    for patches in (0, 1, 50):
        assert model(torch.randn(2, patches, 12)).shape == (2, 6, 12)


def test_empty_batches_stay_empty():
    model = resampler()
    assert model(torch.randn(0, 7, 12)).shape == (0, 6, 12)
    assert model(torch.randn(0, 3, 7, 12)).shape == (0, 3, 6, 12)
    assert model(torch.randn(2, 0, 7, 12)).shape == (2, 0, 6, 12)


def test_images_are_independent():
    model, x = resampler(), torch.randn(2, 3, 7, 12)
    changed = x.clone()
    changed[1, 2] += 1 + torch.rand(7, 12)
    same = (model(x) == model(changed)).all(dim=(-1, -2))
    assert same.tolist() == [[True, True, True], [True, True, False]]


def test_order_of_patches_does_not_matter():
    model, x = resampler(), torch.randn(2, 9, 12)
    assert_same(model(x[:, torch.randperm(9)]), model(x))


def test_order_of_frames_matters_with_frame_embeddings_alone():
    x = torch.randn(2, 1, 4, 5, 12)
    plain, timed = resampler(), resampler(max_num_frames=4)
    assert_same(plain(x.flip(2)), plain(x))
    assert not torch.isclose(timed(x.flip(2)), timed(x)).all()


@pytest.mark.parametrize("m", [1, 3, 6])
def test_fewer_latents_are_a_resampler_built_with_the_first_ones(m):
    model, x = resampler(), torch.randn(2, 3, 7, 12)
    weights = model.state_dict()
    smaller = PerceiverResampler(**SIZES, num_latents=m)
    smaller.load_state_dict(weights | {"latents": weights["latents"][:m]})
    assert torch.equal(model(x, num_latents=m), smaller(x))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_less_depth_is_a_resampler_built_with_the_first_layers(d):
    model, x = resampler(), torch.randn(2, 3, 7, 12)
    weights = model.state_dict()
    shallower = PerceiverResampler(**SIZES | {"depth": d}, num_latents=6)
    shallower.load_state_dict({name: weights[name] for name in shallower.state_dict()})
    assert torch.equal(model(x, depth=d), shallower(x))


def test_latents_and_layers_that_are_not_used_get_no_gradient():
    model = resampler()
    model(torch.randn(2, 7, 12), num_latents=4, depth=2).sum().backward()
    assert (model.latents.grad[4:] == 0).all()
    assert (model.latents.grad[:4] != 0).all()
    assert all(parameter.grad is None for parameter in model.layers[2].parameters())


@pytest.mark.parametrize("count", [0, -1, 7])
def test_a_count_outside_what_was_built_is_an_error(count):
    model, x = resampler(), torch.randn(2, 7, 12)
    with pytest.raises(ValueError, match=f"num_latents must be between 1 and 6.*got {count}"):
        model(x, num_latents=count)
    with pytest.raises(ValueError, match=f"depth must be between 1 and 3.*got {count}"):
        model(x, depth=count)


@pytest.mark.parametrize("shape", [(7, 12), (1, 1, 1, 1, 7, 12)])
def test_another_rank_is_an_error(shape):
    with pytest.raises(ValueError, match=r"x must be \[B, P, D\], \[B, M, P, D\] or \[B, M, F, P, D\]"):
        resampler()(torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 7, 11), (2, 3, 7, 11), (2, 3, 2, 7, 11)])
def test_another_width_is_an_error(shape):
    with pytest.raises(ValueError, match="the last of width 12"):
        resampler()(torch.randn(shape))


def test_more_images_or_frames_than_embeddings_is_an_error():
    model = resampler(max_num_media=3, max_num_frames=2)
    with pytest.raises(ValueError, match="x holds 4, more than max_num_media=3"):
        model(torch.randn(2, 4, 2, 7, 12))
    with pytest.raises(ValueError, match="x holds 3, more than max_num_frames=2"):
        model(torch.randn(2, 3, 3, 7, 12))
    assert model(torch.randn(2, 3, 2, 7, 12)).shape == (2, 3, 6, 12)


def test_flops_are_those_of_the_matrix_products():
    model, x = resampler(), torch.randn(2, 3, 7, 12)
    assert count_flops(lambda: model(x)) == 6 * model.flops(patches=7)
    assert count_flops(lambda: model(x, num_latents=2, depth=1)) == 6 * model.flops(patches=7, num_latents=2, depth=1)
    assert count_flops(lambda: model(x[:, :, None].expand(-1, -1, 4, -1, -1))) == 6 * model.flops(patches=4 * 7)


def test_direct_self_attention_is_a_transformer_encoder():
    """torch's own pre-norm encoder layers around the same weights (its norms have no bias here, ours have 0)."""
    model, x = DirectSelfAttention(**SIZES), torch.randn(2, 7, 12)
    for attention, feed_forward in model.layers:
        for norm in (attention.norm, feed_forward[0]):
            nn.init.normal_(norm.weight)
    expected = x
    for attention, feed_forward in model.layers:
        layer = nn.TransformerEncoderLayer(
            12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False
        )
        weights = {
            "self_attn.in_proj_weight": attention.to_qkv.weight,
            "self_attn.out_proj.weight": attention.to_out.weight,
            "norm1.weight": attention.norm.weight,
            "linear1.weight": feed_forward[1].weight,
            "linear2.weight": feed_forward[3].weight,
            "norm2.weight": feed_forward[0].weight,
        }
        layer.load_state_dict(weights)
        expected = layer(expected)
    assert_same(model(x), model.norm(expected))


def test_direct_self_attention_flops_are_those_of_the_matrix_products():
    model = DirectSelfAttention(**SIZES)
    assert count_flops(lambda: model(torch.randn(2, 7, 12))) == 2 * model.flops(patches=7)
