"""The feed-forward block against its formula."""

import pytest
import torch

from feedforward import FeedForward
from laws import assert_same, count_flops, randomized

pytestmark = pytest.mark.usefixtures("float64")


def test_feed_forward_is_its_formula():
    block, x = randomized(FeedForward(12, mult=3)), torch.randn(2, 5, 12)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = (normed * block[0].weight + block[0].bias) @ block[1].weight.T
    activated = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))  # the exact GELU, not its tanh approximation
    assert_same(block(x), activated @ block[3].weight.T)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parameters_carry_openflamingos_names(dropout):
    assert list(FeedForward(12, dropout=dropout).state_dict()) == ["0.weight", "0.bias", "1.weight", "3.weight"]


@pytest.mark.parametrize(("mult", "hidden"), [(4, 48), (2.5, 30)])
def test_hidden_width_is_a_multiple_of_the_width(mult, hidden):
    block = FeedForward(12, mult)
    assert block[1].weight.shape == (hidden, 12)
    assert block[3].weight.shape == (12, hidden)


def test_dropout_acts_in_training_only():
    block, x = FeedForward(64, dropout=0.5), torch.randn(4, 64)
    plain = FeedForward(64)
    plain.load_state_dict(block.state_dict())
    dropped = block.train()(x)
    share = (dropped == 0).double().mean()
    assert 0.3 < share < 0.7
    assert_same(dropped[dropped != 0], 2 * plain(x)[dropped != 0])
    assert torch.equal(block.eval()(x), plain(x))


def test_flops_are_those_of_the_matrix_products():
    block = FeedForward(12, mult=2.5)
    assert count_flops(lambda: block(torch.randn(7, 12))) == block.flops(tokens=7)
