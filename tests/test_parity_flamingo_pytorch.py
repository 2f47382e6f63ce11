"""flamingo-pytorch 0.1.2 with its weights loaded into ours: outputs and gradients, in float64.

Where it differs from ours:
* its resampler always adds media position embeddings, [4, 1, D] unless told otherwise, and calls them `media_pos_emb`
  (ours: `media_time_embs`, OpenFlamingo's name, left out unless asked for); it knows no frames; it answers one image a
  row, [B, P, D], with [B, 1, L, D] where ours gives [B, L, D];
* its gated block takes media of the text's own width only;
* without `media_locations` its text sees all images; ours demands to be told;
* a token that points behind the last image attends to all images alike (trap 2); ours is a ValueError;
* with `only_attend_immediate_media=False`, text before the first image attends to all images, later ones included; ours
  gets exactly zero from attention there.
The residual sums and the feed-forward block are the same; so are all other parameter names.
"""

import pytest
import torch

from gated_cross_attention import GatedCrossAttentionBlock
from laws import assert_same, randomized, value_and_gradients
from perceiver_resampler import PerceiverResampler

flamingo_pytorch = pytest.importorskip("flamingo_pytorch")
pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"dim_head": 4, "heads": 3, "ff_mult": 2}
LOCATIONS = torch.tensor([[False, True, False, True, False], [False, False, False, True, False]])


def test_their_resampler_is_ours():
    theirs = randomized(
        flamingo_pytorch.PerceiverResampler(dim=12, depth=3, num_latents=6, num_media_embeds=4, **SIZES)
    )
    ours = PerceiverResampler(12, depth=3, num_latents=6, max_num_media=4, **SIZES)
    weights = theirs.state_dict()
    weights["media_time_embs"] = weights.pop("media_pos_emb")
    ours.load_state_dict(weights)

    x = torch.randn(2, 3, 7, 12, requires_grad=True)
    result = value_and_gradients(lambda: ours(x), {"x": x, **dict(ours.named_parameters())})
    expected = value_and_gradients(lambda: theirs(x), {"x": x, **dict(theirs.named_parameters())})
    expected["media_time_embs"] = expected.pop("media_pos_emb")
    assert_same(result, expected)
    assert_same(ours(x[:, 0]), theirs(x[:, 0])[:, 0])


def gated_blocks(**options):
    theirs = randomized(flamingo_pytorch.GatedCrossAttentionBlock(dim=12, **SIZES, **options))
    ours = GatedCrossAttentionBlock(12, dim_visual=12, **SIZES, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("images", [2, 4])
def test_their_gated_block_is_ours(images):
    """Text before the first image, rows with different numbers of images, and images that no text refers to."""
    ours, theirs = gated_blocks()
    x = torch.randn(2, 5, 12, requires_grad=True)
    media = torch.randn(2, images, 4, 12, requires_grad=True)
    inputs = {"x": x, "media": media}
    assert_same(
        value_and_gradients(lambda: ours(x, media, media_locations=LOCATIONS), inputs | dict(ours.named_parameters())),
        value_and_gradients(lambda: theirs(x, media, LOCATIONS), inputs | dict(theirs.named_parameters())),
    )


def test_their_gated_block_is_ours_with_all_images_so_far():
    ours, theirs = gated_blocks(only_attend_immediate_media=False)
    x, media = torch.randn(2, 5, 12), torch.randn(2, 2, 4, 12)
    result, expected = ours(x, media, media_locations=LOCATIONS), theirs(x, media, LOCATIONS)
    sees = LOCATIONS.cumsum(1) > 0
    assert_same(result[sees], expected[sees])
    assert not torch.isclose(result[~sees], expected[~sees]).any(), "text before any image: theirs sees them all"
