"""Which text token sees which image, against loops over tokens."""

import random

import pytest
import torch

from media_masks import MediaLayout, draw, media_index_from_locations


def index_by_loop(locations):
    index = []
    for row in locations:
        seen, current = [], -1
        for is_image in row:
            current += is_image
            seen.append(current)
        index.append(seen)
    return index


def random_layouts():
    """Indices of all kinds: in reading order (as text has them) and in any order; rows and images left out."""
    rng = random.Random(0)
    for seed in range(100):
        batch, length, images = rng.randint(1, 4), rng.randint(1, 12), rng.randint(1, 4)
        index = [[rng.randint(-1, images - 1) for _ in range(length)] for _ in range(batch)]
        if seed % 2:
            index = [sorted(row) for row in index]
        yield MediaLayout.from_index(torch.tensor(index), images)


def test_index_counts_the_images_so_far():
    rng = random.Random(0)
    for _ in range(50):
        locations = [[rng.random() < 0.3 for _ in range(9)] for _ in range(3)]
        index = media_index_from_locations(torch.tensor(locations))
        assert index.dtype == torch.int64
        assert index.tolist() == index_by_loop(locations)


def test_an_image_token_already_sees_its_own_image():
    locations = torch.tensor([[False, True, False, True, False]])
    assert media_index_from_locations(locations).tolist() == [[-1, 0, 0, 1, 1]]


def test_left_padding_sees_no_image():
    locations = torch.tensor([[False, False, False, True, False], [True, False, True, False, False]])
    assert media_index_from_locations(locations).tolist() == [[-1, -1, -1, 0, 0], [0, 0, 1, 1, 1]]


def test_layout_from_locations_is_layout_from_index():
    locations = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    layout = MediaLayout.from_locations(locations, 8)
    assert layout.media_index.tolist() == index_by_loop(locations.tolist())
    assert layout.num_media == 8


def test_segments_hold_every_token_with_an_image_once():
    for layout in random_layouts():
        segments = layout.segments
        index = layout.media_index
        length = index.shape[1]
        groups, slots = segments.token.shape
        filled = []
        for token, slot in enumerate(segments.slot.tolist()):
            row, image = token // length, index.flatten()[token].item()
            if image < 0:
                assert slot == groups * slots
                continue
            filled.append(slot)
            assert segments.token[slot // slots, slot % slots] == token
            assert segments.image[slot // slots] == row * layout.num_media + image
        assert len(set(filled)) == len(filled)


def test_padding_of_a_segment_repeats_its_last_token():
    for layout in random_layouts():
        length = layout.media_index.shape[1]
        for tokens, image in zip(layout.segments.token.tolist(), layout.segments.image.tolist(), strict=True):
            row, number = divmod(image, layout.num_media)
            own = [row * length + t for t, m in enumerate(layout.media_index[row].tolist()) if m == number]
            assert tokens == own + [own[-1]] * (len(tokens) - len(own))


def test_images_that_no_token_sees_are_left_out():
    for layout in random_layouts():
        rows = enumerate(layout.media_index.tolist())
        seen = {row * layout.num_media + image for row, index in rows for image in index if image >= 0}
        assert layout.segments.image.tolist() == sorted(seen)


def test_segments_never_hold_more_score_pairs_than_the_dense_form():
    for layout in random_layouts():
        assert layout.segments.token.numel() <= layout.media_index.numel() * layout.num_media


def test_segments_of_equal_length_hold_no_padding():
    index = torch.arange(4).repeat_interleave(6).expand(3, -1)
    layout = MediaLayout.from_index(index, num_media=4)
    assert layout.segments.token.numel() == index.numel()


def test_text_without_images_makes_no_segments():
    for num_media in (0, 1, 3):
        segments = MediaLayout.from_index(torch.full((2, 5), -1), num_media).segments
        assert segments.token.shape == (0, 0)
        assert segments.image.tolist() == []
        assert segments.slot.tolist() == [0] * 10


def test_visible_media_are_those_so_far():
    for layout in random_layouts():
        for row, visible in zip(layout.media_index.tolist(), layout.visible_media.tolist(), strict=True):
            assert visible == [[m <= index for m in range(layout.num_media)] for index in row]


def test_more_image_tokens_than_images_is_an_error():
    """Trap 2: OpenFlamingo lets such a token attend to all images alike, without a word."""
    locations = torch.tensor([[True, False, False], [True, True, True]])
    with pytest.raises(ValueError, match="image number 3, but only 2 images were given"):
        MediaLayout.from_locations(locations, num_media=2)
    with pytest.raises(ValueError, match="image number 1, but only 0 images"):
        MediaLayout.from_index(torch.tensor([[-1, 0]]), num_media=0)
    MediaLayout.from_locations(locations, num_media=3)


@pytest.mark.parametrize(
    "index", [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)]
)
def test_index_of_another_type_or_rank_is_an_error(index):
    with pytest.raises(ValueError, match=r"media_index must be int64\[B, T\]"):
        MediaLayout.from_index(index, num_media=2)


@pytest.mark.parametrize("locations", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)])
def test_locations_of_another_type_or_rank_are_an_error(locations):
    with pytest.raises(ValueError, match=r"media_locations must be bool\[B, T\]"):
        MediaLayout.from_locations(locations, num_media=2)


def test_drawing_shows_who_sees_what():
    words = ["a", "<image>", "cat", "<eoc>", "<image>", "dog"]
    assert draw(torch.tensor([-1, 0, 0, 0, 1, 1]), words, num_media=2).split("\n") == [
        "         0 1",
        "a        . .",
        "<image>  # .",
        "cat      # .",
        "<eoc>    # .",
        "<image>  . #",
        "dog      . #",
    ]


def test_drawing_of_many_images_stays_aligned():
    lines = draw(torch.tensor([3, 10]), ["x", "y"], num_media=11).split("\n")
    assert lines[0].index("10") + 1 == lines[2].index("#")
    assert len({len(line) for line in lines}) == 1
