"""OpenFlamingo 2.0.1 with its weights loaded into ours, name by name: outputs and gradients, in float64.

Its layers lie in `open_flamingo/src/helpers.py`, which needs torch, einops and einops-exts alone. The file is loaded by
its path, because `import open_flamingo` also imports its factory, and that needs open_clip.

Where it differs from ours:
* its resampler takes [B, M, F, P, D] only;
* a token that points behind the last image attends to all images alike (trap 2); ours is a ValueError;
* with `only_attend_immediate_media=False`, text before the first image attends to all images, later ones included; ours
  gets exactly zero from attention there;
* `use_cached_media` is our `media_index` of the last image.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from gated_cross_attention import GatedCrossAttentionBlock
from laws import assert_same, randomized, value_and_gradients
from perceiver_resampler import PerceiverResampler

pytestmark = pytest.mark.usefixtures("float64")

SIZES = {"dim_head": 4, "heads": 3, "ff_mult": 2}
LOCATIONS = torch.tensor([[False, True, False, True, False], [False, False, False, True, False]])


@pytest.fixture(scope="module")
def helpers():
    package = importlib.util.find_spec("open_flamingo")
    if package is None:
        pytest.skip("open-flamingo is not installed")
    path = Path(package.submodule_search_locations[0]) / "src" / "helpers.py"
    spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("frames_given", [1, 4])
@pytest.mark.parametrize("frames", [None, 5])
@pytest.mark.parametrize("media", [None, 4])
def test_their_resampler_is_ours(helpers, media, frames, frames_given):
    """Images and videos, with embeddings of the frame and of the image's place, or without."""
    options = {"depth": 3, "num_latents": 6, "max_num_media": media, "max_num_frames": frames, **SIZES}
    theirs = randomized(helpers.PerceiverResampler(dim=12, **options))
    ours = PerceiverResampler(12, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    x = torch.randn(2, 3, frames_given, 7, 12, requires_grad=True)
    result = value_and_gradients(lambda: ours(x), {"x": x, **dict(ours.named_parameters())})
    expected = value_and_gradients(lambda: theirs(x), {"x": x, **dict(theirs.named_parameters())})
    assert_same(result, expected)
    assert_same(ours(x[:, :, 0]), theirs(x[:, :, :1]))


def gated_blocks(helpers, **options):
    theirs = randomized(helpers.GatedCrossAttentionBlock(dim=12, dim_visual=10, **SIZES, **options))
    ours = GatedCrossAttentionBlock(12, 10, **SIZES, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("images", [2, 4])
def test_their_gated_block_is_ours(helpers, images):
    """Text before the first image, rows with different numbers of images, and images that no text refers to."""
    ours, theirs = gated_blocks(helpers)
    x = torch.randn(2, 5, 12, requires_grad=True)
    media = torch.randn(2, images, 4, 10, requires_grad=True)
    inputs = {"x": x, "media": media}
    assert_same(
        value_and_gradients(lambda: ours(x, media, media_locations=LOCATIONS), inputs | dict(ours.named_parameters())),
        value_and_gradients(lambda: theirs(x, media, LOCATIONS), inputs | dict(theirs.named_parameters())),
    )


def test_their_gated_block_is_ours_with_all_images_so_far(helpers):
    ours, theirs = gated_blocks(helpers, only_attend_immediate_media=False)
    x, media = torch.randn(2, 5, 12), torch.randn(2, 2, 4, 10)
    result, expected = ours(x, media, media_locations=LOCATIONS), theirs(x, media, LOCATIONS)
    sees = LOCATIONS.cumsum(1) > 0
    assert_same(result[sees], expected[sees])
    assert not torch.isclose(result[~sees], expected[~sees]).any(), "text before any image: theirs sees them all"


def test_their_cached_media_is_our_index_of_the_last_image(helpers):
    """Decoding: new text sees the last image of its prompt, or none."""
    ours, theirs = gated_blocks(helpers)
    prompt = torch.cat((LOCATIONS, torch.zeros(1, 5, dtype=torch.bool)))
    x, media = torch.randn(3, 2, 12), torch.randn(3, 2, 4, 10)
    current = prompt.sum(1) - 1
    expected = theirs(x, media, prompt, use_cached_media=True)
    media_kv = ours.project_media(media)
    assert_same(ours(x, media_kv, current[:, None].expand(-1, 2)), expected)
    assert_same(ours(x, media_kv.select(current), current.clamp(max=0)[:, None].expand(-1, 2)), expected)


def test_trap_2_their_silence_is_our_error(helpers):
    """Two `<image>` tokens, one image: theirs gives the second one's text the mean of all values there are."""
    ours, theirs = gated_blocks(helpers)
    x, media, two_images = torch.randn(1, 3, 12), torch.randn(1, 1, 4, 10), torch.tensor([[True, True, False]])
    mean_value = theirs.attn.to_kv(media).chunk(2, dim=-1)[1].mean(dim=(1, 2))
    assert_same(theirs.attn(x, media, two_images)[:, 2], theirs.attn.to_out(mean_value))
    with pytest.raises(ValueError, match="image number 2, but only 1 images were given"):
        ours(x, media, media_locations=two_images)
