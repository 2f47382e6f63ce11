"""The gated cross-attention block: what its gates do, and the two ways to say which image a token sees."""

import pytest
import torch

from gated_cross_attention import GatedCrossAttentionBlock
from laws import assert_same, count_flops, randomized, value_and_gradients
from media_masks import MediaLayout

pytestmark = pytest.mark.usefixtures("float64")

DIM, DIM_VISUAL = 12, 10
LOCATIONS = torch.tensor([[False, True, False, True, False], [False, False, False, True, False]])
INDEX = torch.tensor([[-1, 0, 0, 1, 1], [-1, -1, -1, 0, 0]])


def gated_block(**options):
    return GatedCrossAttentionBlock(DIM, DIM_VISUAL, dim_head=4, heads=3, **options)


def text_and_media():
    return torch.randn(2, 5, DIM, requires_grad=True), torch.randn(2, 2, 4, DIM_VISUAL, requires_grad=True)


def attend_by_loop(attention, x, media, index):
    """One token, one head at a time: softmax over the tokens of its own image; zero without an image."""
    rows = []
    for b, row in enumerate(index.tolist()):
        tokens = []
        for t, image in enumerate(row):
            if image < 0:
                tokens.append(torch.zeros(DIM))
                continue
            queries = attention.to_q(attention.norm(x[b, t])).chunk(3)
            keys, values = (each.chunk(3, dim=-1) for each in attention.to_kv(media[b, image]).chunk(2, dim=-1))
            heads = [(k @ q / 4**0.5).softmax(0) @ v for q, k, v in zip(queries, keys, values, strict=True)]
            tokens.append(attention.to_out(torch.cat(heads)))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_closed_gate_is_identity(dtype):
    block = gated_block().to(dtype)
    x, media = (each.to(dtype) for each in text_and_media())
    assert torch.equal(block(x, media, INDEX), x)


def test_closed_gates_can_still_learn_to_open():
    """At 0 nothing behind a gate learns yet, but the gates do."""
    block = gated_block()
    block(*text_and_media(), INDEX).square().sum().backward()
    moving = {name for name, parameter in block.named_parameters() if (parameter.grad != 0).any()}
    assert moving == {"attn_gate", "ff_gate"}


def test_block_is_its_formula():
    block = randomized(gated_block())
    x, media = text_and_media()

    def formula():
        y = x + torch.tanh(block.attn_gate) * attend_by_loop(block.attn, x, media, INDEX)
        return y + torch.tanh(block.ff_gate) * block.ff(y)

    tensors = {"x": x, "media": media, **dict(block.named_parameters())}
    ours = value_and_gradients(lambda: block(x, media, INDEX), tensors)
    assert_same(ours, value_and_gradients(formula, tensors))


def test_gates_scale_one_branch_each():
    block, (x, media) = randomized(gated_block()), text_and_media()
    torch.nn.init.zeros_(block.attn_gate)
    assert torch.equal(block(x, media, INDEX), x + block.ff_gate.tanh() * block.ff(x))
    torch.nn.init.constant_(block.attn_gate, 100.0)
    torch.nn.init.zeros_(block.ff_gate)
    assert_same(block(x, media, INDEX), x + attend_by_loop(block.attn, x, media, INDEX))


def test_text_before_the_first_image_feels_the_feed_forward_alone():
    block, (x, media) = randomized(gated_block()), text_and_media()
    out, blind = block(x, media, INDEX), INDEX < 0
    assert_same(out[blind], (x + block.ff_gate.tanh() * block.ff(x))[blind])


def test_locations_are_the_index_they_stand_for():
    block, (x, media) = randomized(gated_block()), text_and_media()
    by_index = block(x, media, INDEX)
    assert torch.equal(block(x, media, media_locations=LOCATIONS), by_index)
    assert torch.equal(block(x, media, MediaLayout.from_index(INDEX, num_media=2)), by_index)


def test_projected_media_are_the_media():
    block, (x, media) = randomized(gated_block()), text_and_media()
    media_kv = block.project_media(media)
    assert torch.equal(block(x, media_kv, INDEX), block(x, media, INDEX))
    assert torch.equal(block(x, media_kv, media_locations=LOCATIONS), block(x, media, INDEX))


def test_attending_to_all_images_so_far_differs_where_there_are_several():
    block, (x, media) = randomized(gated_block(only_attend_immediate_media=False)), text_and_media()
    own = gated_block()
    own.load_state_dict(block.state_dict())
    same = torch.isclose(block(x, media, INDEX), own(x, media, INDEX)).all(-1)
    assert torch.equal(same, INDEX < 1)


def test_index_or_locations_but_not_both():
    block, (x, media) = gated_block(), text_and_media()
    with pytest.raises(ValueError, match="exactly one of media_index and media_locations"):
        block(x, media)
    with pytest.raises(ValueError, match="exactly one of media_index and media_locations"):
        block(x, media, INDEX, LOCATIONS)


def test_block_names_what_does_not_fit():
    block, (x, media) = gated_block(), text_and_media()
    with pytest.raises(ValueError, match="image number 2, but only 1 images"):
        block(x, media[:, :1], media_locations=LOCATIONS)
    with pytest.raises(ValueError, match="do not belong together"):
        block(x[:, :4], media, INDEX)
    with pytest.raises(ValueError, match="x must have 3 axes, the last of width 12"):
        block(x[..., :11], media, INDEX)
    with pytest.raises(ValueError, match="media must have 4 axes, the last of width 10"):
        block(x, media[..., :9], INDEX)


def test_parameters_carry_openflamingos_names():
    shapes = {name: list(tensor.shape) for name, tensor in gated_block(ff_mult=2).state_dict().items()}
    assert shapes == {
        "attn_gate": [1],
        "ff_gate": [1],
        "attn.norm.weight": [DIM],
        "attn.norm.bias": [DIM],
        "attn.to_q.weight": [12, DIM],
        "attn.to_kv.weight": [24, DIM_VISUAL],
        "attn.to_out.weight": [DIM, 12],
        "ff.0.weight": [DIM],
        "ff.0.bias": [DIM],
        "ff.1.weight": [24, DIM],
        "ff.3.weight": [DIM, 24],
    }


@pytest.mark.parametrize("gate_init", [0, 1, 0.5])
def test_gates_start_where_they_are_told(gate_init):
    block = gated_block(gate_init=gate_init)
    assert block.attn_gate.tolist() == block.ff_gate.tolist() == [gate_init]
    assert block.attn_gate.dtype == torch.float64


def test_flops_are_those_of_the_matrix_products():
    block, x, media = gated_block(), torch.randn(2, 6, DIM), torch.randn(2, 2, 4, DIM_VISUAL)
    index = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, -1)
    assert count_flops(lambda: block(x, media, index)) == 2 * block.flops(tokens=6, latents=4, images=2)
