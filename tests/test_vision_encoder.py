"""The vision encoder against a plain PyTorch forward written here, and its fixed position features."""

import math

import pytest
import torch
import torch.nn.functional as F

from laws import assert_same, randomized
from vision_encoder import POSITION_DIM, VisionEncoder, sincos_positions


def encoder(size=16, patch=8, dim=80, depth=2, heads=2):
    return randomized(VisionEncoder(size, patch, dim, depth, heads))


def pixels(*leading, size=16):
    return torch.randint(0, 256, (*leading, 3, size, size), dtype=torch.uint8)


def plain_forward(model, images):
    """Step by step: two strides with residual convolutions between them, then pre-norm transformer layers."""
    first, *residual, second, _ = model.patches
    x = F.conv2d(images.double() / 255 * 4 - 2, first.weight, first.bias, stride=first.kernel_size)
    for norm, one, _, two in residual:
        normed = F.group_norm(x, 1, norm.weight, norm.bias)
        x = x + F.conv2d(F.gelu(F.conv2d(normed, one.weight, one.bias, padding=1)), two.weight, two.bias, padding=1)
    x = F.conv2d(x, second.weight, second.bias, stride=2)
    x = x.flatten(2).mT + model.position
    for attention, (norm, up, _, down) in model.layers:
        q, k, v = (attention.norm(x) @ attention.to_qkv.weight.T).chunk(3, dim=-1)
        q, k, v = (each.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in (q, k, v))
        read = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + read.transpose(1, 2).flatten(2) @ attention.to_out.weight.T
        x = x + F.gelu(norm(x) @ up.weight.T) @ down.weight.T
    return model.norm(x)


@pytest.mark.parametrize(("size", "patch"), [(16, 8), (24, 8), (16, 4), (8, 8)])
def test_features_are_a_plain_vision_transformer_s(float64, size, patch):
    model, images = encoder(size, patch), pixels(3, size=size)
    features = model(images)
    side = size // patch
    assert features.shape == (3, side * side, 80)
    assert model.num_patches == side * side
    assert_same(features[..., :-POSITION_DIM], plain_forward(model, images))
    assert_same(features[..., -POSITION_DIM:], sincos_positions(side).expand(3, -1, -1))


def test_positions_are_sines_and_cosines_of_column_and_row(float64):
    for side in (2, 5, 10):
        positions = sincos_positions(side)
        assert positions.shape == (side * side, POSITION_DIM)
        for row in range(side):
            for column in range(side):
                expected = []
                for place in (column, row):
                    angles = [math.pi * (place + 0.5) * side ** (k / 15) / side for k in range(16)]
                    expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
                here = positions[row * side + column]
                # the highest frequency is a float32 power: off by 2^-22 of up to pi * side
                torch.testing.assert_close(here, torch.tensor(expected), rtol=0, atol=math.pi * side * 2**-22)


def test_every_place_has_its_own_position():
    positions = sincos_positions(10)
    assert (torch.cdist(positions, positions) + 10 * torch.eye(100)).min() > 0.5


def test_integer_and_float_pixels_are_the_same_image():
    model, images = encoder(), pixels(2)
    assert torch.equal(model(images), model(images.float() / 255))


def test_images_are_independent():
    """An image's features do not depend on its batch, and do depend on its pixels."""
    model, images = encoder(), pixels(3)
    together = model(images)
    for i in range(3):
        torch.testing.assert_close(model(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
    images[1] = 255 - images[1]
    changed = (model(images) != together).any(-1)
    assert changed[1].all()
    assert not changed[[0, 2]].any()


def test_every_parameter_learns():
    model = encoder()
    model(pixels(2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_model_s_precision_is_the_features_precision():
    model = encoder().to(torch.bfloat16)
    assert model(pixels(1)).dtype == torch.bfloat16
    assert model(torch.rand(1, 3, 16, 16)).dtype == torch.bfloat16


def test_positions_are_not_stored():
    assert "sincos" not in encoder().state_dict()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 8), (1, 3, 32, 32), (1, 2, 3, 16, 16)])
def test_images_of_another_rank_channels_or_size_are_an_error(shape):
    with pytest.raises(ValueError, match=r"images must be \[N, 3, 16, 16\]; got shape"):
        encoder()(torch.zeros(shape))


@pytest.mark.parametrize(("size", "patch"), [(20, 8), (15, 5)])
def test_patches_that_do_not_fit_are_an_error(size, patch):
    with pytest.raises(ValueError, match=f"image_size {size} must be a multiple of an even patch_size; got {patch}"):
        VisionEncoder(size, patch, 80, 1, 2)


def test_images_of_other_numbers_are_an_error():
    """int64 pixels from 0 to 255 would be taken for floats from 0 to 1."""
    for dtype in (torch.int64, torch.int16, torch.bool):
        with pytest.raises(ValueError, match=f"images must be uint8, or float in \\[0, 1\\]; got {dtype}"):
            encoder()(torch.zeros(1, 3, 16, 16, dtype=dtype))


@pytest.mark.parametrize("dim", [0, 64])
def test_a_width_that_the_position_fills_is_an_error(dim):
    with pytest.raises(ValueError, match=f"dim must be above 64, the features that hold the position; got {dim}"):
        VisionEncoder(16, 8, dim, 1, 2)
