"""The product of a few rows in blocks is the product, where it is taken, and it is taken where it should be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flamingo_vlm import few_rows
from flamingo_vlm.few_rows import few_rows_on_all_threads, linear_in_blocks

WIDTH, OUT = 300, 257  # enough weights, and no multiple of any number of blocks


@pytest.fixture
def products(monkeypatch):
    """The mode as on a machine of four threads; -> the shapes of the batches that were multiplied."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    shapes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: shapes.append(tuple(a.shape)) or bmm(a, b))
    return shapes


def near(ours, theirs):
    """Sums of WIDTH terms in another order differ by float32's rounding of them."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * WIDTH**0.5)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(WIDTH,), (1, WIDTH), (4, WIDTH), (1, 1, WIDTH), (2, 2, WIDTH), (3, 1, WIDTH)], ids=str
)
def test_few_rows_are_multiplied_in_blocks(products, shape, with_bias):
    x, layer = torch.randn(shape), nn.Linear(WIDTH, OUT, bias=with_bias)
    expected = layer(x)
    assert products == []
    with torch.no_grad(), few_rows_on_all_threads():
        near(layer(x), expected)
        near(F.linear(x, layer.weight, layer.bias), expected)
    assert products == [(4, OUT // 4, WIDTH)] * 2


@pytest.mark.parametrize("outputs", range(1, 10))
@pytest.mark.parametrize("blocks", [2, 3, 8])
def test_any_number_of_outputs_is_cut(blocks, outputs):
    """Also fewer than there are blocks."""
    x, weight, bias = torch.randn(2, WIDTH), torch.randn(outputs, WIDTH), torch.randn(outputs)
    near(linear_in_blocks(blocks, x, weight, bias), F.linear(x, weight, bias))
    near(linear_in_blocks(blocks, x, weight), F.linear(x, weight))


def test_a_transposed_input_and_a_slice_of_weights_are_read_as_they_are(products):
    x, weight = torch.randn(WIDTH, 3).t(), torch.randn(2 * OUT, 2 * WIDTH)[::2, :WIDTH]
    with few_rows_on_all_threads():
        near(F.linear(x, weight), x @ weight.t())
    assert len(products) == 1


def test_everything_else_is_left_alone(products):
    weight = torch.randn(OUT, WIDTH)
    rows = few_rows.MAX_ROWS
    small = torch.randn(8, WIDTH)
    assert small.numel() < few_rows.MIN_WEIGHTS <= weight.numel()
    with few_rows_on_all_threads():
        for x, w in (
            (torch.randn(rows + 1, WIDTH), weight),
            (torch.randn(rows + 1, 1, WIDTH), weight),
            (torch.randn(0, WIDTH), weight),
            (torch.randn(2, WIDTH), small),
            (torch.randn(2, WIDTH).double(), weight.double()),
            (torch.randn(2, WIDTH).bfloat16(), weight.bfloat16()),
            (torch.randn(2, 2**16), torch.randn(2**16)),  # a vector is a linear layer of one output without an axis
        ):
            assert F.linear(x, w).shape == (*x.shape[:-1], *w.shape[:-1])
        F.linear(torch.randn(2, WIDTH), weight=weight)
        F.linear(input=torch.randn(2, WIDTH), weight=weight)
        F.linear(torch.randn(2, WIDTH), weight, bias=torch.randn(OUT))
        torch.randn(2, WIDTH) @ weight.t()
    assert products == []


def test_one_thread_has_nothing_to_share(products, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with few_rows_on_all_threads():
        F.linear(torch.randn(2, WIDTH), torch.randn(OUT, WIDTH))
    assert products == []


def test_it_ends_with_its_block(products):
    x, weight = torch.randn(2, WIDTH), torch.randn(OUT, WIDTH)
    with few_rows_on_all_threads():
        pass
    F.linear(x, weight)
    with pytest.raises(RuntimeError, match="stop"), few_rows_on_all_threads():
        raise RuntimeError("stop")
    F.linear(x, weight)
    assert products == []
    with few_rows_on_all_threads():
        with few_rows_on_all_threads():
            F.linear(x, weight)
        F.linear(x, weight)
    assert len(products) == 2


def test_wrong_shapes_are_still_an_error(products):
    with few_rows_on_all_threads(), pytest.raises(RuntimeError):
        F.linear(torch.randn(2, WIDTH + 1), torch.randn(OUT, WIDTH))
    with few_rows_on_all_threads(), pytest.raises(RuntimeError):
        F.linear(torch.randn(2, WIDTH), torch.randn(OUT, WIDTH), torch.randn(OUT + 1))
