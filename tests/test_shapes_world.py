"""The shapes world: its splits are apart, and it draws what its scenes say."""

import random
from itertools import product

import pytest
import torch

import shapes_world as world
from shapes_scenes import COLOURS, SHAPES, SIZES, SPLITS, many_scenes
from shapes_world import Thing

# ---------------------------------------------------------------------------------------------------- scenes and splits


def test_every_single_object_belongs_to_one_split():
    """All 1500 scenes of one object: the unseen pairs apart, one in eight held out."""
    splits = {}
    for things in product(range(25), range(len(SIZES)), range(len(COLOURS)), range(len(SHAPES))):
        splits.setdefault(world.scene_split((Thing(*things),)), []).append(things)
    assert len(splits["unseen"]) == 25 * len(SIZES) * len(world.UNSEEN_PAIRS)
    for _, _, colour, shape in splits["train"] + splits["held-out"]:
        assert (COLOURS[colour], SHAPES[shape]) not in world.UNSEEN_PAIRS
    assert 0.09 < len(splits["held-out"]) / (1500 - len(splits["unseen"])) < 0.16


@pytest.mark.parametrize("counts", [{"max_objects": 1}, {"max_objects": 3}, {}])
def test_splits_share_no_scene(counts):
    scenes = {split: set(many_scenes(split, 1500, seed=5, **counts)) for split in SPLITS}
    for split, members in scenes.items():
        assert {world.scene_split(scene) for scene in members} == {split}
    for one, other in (("train", "held-out"), ("train", "unseen"), ("held-out", "unseen")):
        assert not scenes[one] & scenes[other]


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_in_reading_order_with_one_thing_a_place(split):
    for scene in many_scenes(split, 1000):
        places = [thing.place for thing in scene]
        assert places == sorted(set(places))
        assert set(places) <= set(range(25))


def test_the_number_of_objects_is_uniform():
    for split in ("train", "held-out"):
        counts = [len(scene) for scene in many_scenes(split, 2000)]
        for number in range(1, 11):
            assert abs(counts.count(number) - 200) < 5 * (200 * 0.9) ** 0.5  # five standard deviations


def test_every_place_size_colour_and_shape_occurs_equally_often():
    things = [thing for scene in many_scenes("unseen", 3000, max_objects=1) for thing in scene]
    assert {(thing.place, thing.size) for thing in things} == set(product(range(25), range(2)))
    things = [thing for scene in many_scenes("train", 1500) for thing in scene]
    pairs = [(COLOURS[thing.colour], SHAPES[thing.shape]) for thing in things]
    expected = len(pairs) / 27
    for pair in product(COLOURS, SHAPES):
        seen = pairs.count(pair)
        assert seen == 0 if pair in world.UNSEEN_PAIRS else abs(seen - expected) < 5 * expected**0.5


def test_every_unseen_scene_holds_an_unseen_pair():
    for scene in many_scenes("unseen"):
        assert {(COLOURS[thing.colour], SHAPES[thing.shape]) for thing in scene} & world.UNSEEN_PAIRS


def test_sampling_names_what_is_wrong():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="split must be train, held-out or unseen; got 'test'"):
        world.sample_scene(rng, "test")
    for low, high in ((0, 3), (4, 3), (1, 26)):
        with pytest.raises(ValueError, match=f"got {low} and {high}"):
            world.sample_scene(rng, "train", low, high)


# ---------------------------------------------------------------------------------------------------- pictures


def draw(scenes, seed=0):
    """-> float[B, 80, 80, 3] in 0 to 1"""
    images = world.render(scenes, torch.Generator().manual_seed(seed))
    assert images.dtype == torch.uint8 and images.shape == (len(scenes), 3, 80, 80)
    return images.float().movedim(1, -1) / 255


def place_of(image, place):
    """float[16, 16, ...] of one place."""
    row, column = divmod(place, 5)
    return image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]


def footprints(scene, seed=0):
    """Of each thing: its place's pixels, and bool[16, 16] where they differ from the same picture without things."""
    image, empty = draw([scene], seed)[0], draw([()], seed)[0]
    changed = (image - empty).abs().amax(-1) > 0.1
    for thing in scene:
        yield thing, place_of(image, thing.place), place_of(changed, thing.place)


def test_a_thing_is_drawn_in_its_place_in_its_colour():
    """Around the footprint's centre of mass, where every shape is solid. Shades go down to 0.88, the noise is 0.02."""
    across = torch.arange(16.0)
    for seed, scene in enumerate(many_scenes(count=60)):
        for thing, pixels, footprint in footprints(scene, seed):
            y, x = (footprint * across[:, None]).sum() / footprint.sum(), (footprint * across).sum() / footprint.sum()
            assert (y - 7.5).abs() < 4 and (x - 7.5).abs() < 4
            core = pixels[(across[:, None] - y).square() + (across - x).square() < 0.8**2]
            colour = torch.tensor(world.COLOURS[COLOURS[thing.colour]])
            shade = (core @ colour).mean() / colour.square().sum()
            assert 0.8 < shade < 1.08  # of as few as one pixel
            assert (core - shade * colour).abs().max() < 0.1


def test_empty_places_hold_background_alone():
    """Dim grey clouds: no palette colour comes near, and they are the picture of the empty scene, bit for bit."""
    palette = torch.tensor(list(world.COLOURS.values()))
    for seed, scene in enumerate(many_scenes(count=30)):
        image, empty = draw([scene], seed)[0], draw([()], seed)[0]
        occupied = {thing.place for thing in scene}
        for place in set(range(25)) - occupied:
            pixels = place_of(image, place)
            assert torch.equal(pixels, place_of(empty, place))
            assert 0.05 < pixels.mean() < 0.65
            assert (pixels[:, :, None] - palette).abs().amax(-1).min() > 0.1


def test_backgrounds_go_on_across_places():
    """Clouds are wider than a place: its borders are steps no larger than those between any two pixels."""
    image = draw([()] * 20).mean(-1)
    for axis in (1, 2):
        steps = image.diff(dim=axis).abs().mean([0, 3 - axis])
        at_borders = torch.arange(1, 80) % 16 == 0
        assert steps[at_borders].mean() < 1.1 * steps[~at_borders].mean()


def test_a_picture_changes_only_where_its_scene_does():
    rng = random.Random(0)
    for seed, scene in enumerate(many_scenes(count=30)):
        thing = rng.choice(scene)
        other_colour = Thing(thing.place, thing.size, (thing.colour + 1) % 6, thing.shape)
        for replacement in ([], [other_colour]):
            rest = [other for other in scene if other != thing]
            changed = draw([scene], seed)[0] != draw([tuple(sorted(rest + replacement))], seed)[0]
            assert place_of(changed, thing.place).any()
            place_of(changed, thing.place).fill_(False)
            assert not changed.any()


def test_no_two_pictures_of_a_scene_are_alike():
    """Jitter, shade and background differ, within one batch and between seeds."""
    scene = (Thing(12, 0, 0, 0),)
    images = [*draw([scene, scene], 0), *draw([scene, scene], 1)]
    for i, one in enumerate(images):
        for other in images[:i]:
            assert (one - other).abs().mean() > 0.01
    centres = [footprint.nonzero().float().mean(0) for seed in range(20) for *_, footprint in footprints(scene, seed)]
    assert (torch.stack(centres).std(0) > 0.7).all()


def outline(footprint):
    """Which of six points are covered: three inwards from the bounding box's top left corner, three from the bottom."""
    filled = footprint.nonzero()
    top, left = filled.amin(0).tolist()
    height, width = (filled.amax(0) + 1 - filled.amin(0)).tolist()
    points = [(0.09, 0.09), (0.2, 0.2), (0.3, 0.3), (0.91, 0.09), (0.8, 0.2), (0.7, 0.3)]
    return [bool(footprint[int(top + y * height), int(left + x * width)]) for y, x in points]


def test_shapes_are_told_by_their_outline():
    expected = {
        "circle": [False, True, True, False, True, True],
        "square": [True] * 6,
        "triangle": [False, False, False, True, True, True],
        "cross": [False, False, False, False, False, False],
        "diamond": [False, False, True, False, False, True],
    }
    for number, shape in enumerate(SHAPES):
        scene = tuple(Thing(place, 1, 5, number) for place in range(25))
        agree = []
        for *_, footprint in footprints(scene):
            agree.append(outline(footprint) == expected[shape])
        assert sum(agree) >= 23, shape


def test_large_things_are_larger_and_none_is_cut_off():
    """White things: at a place's border they are at most half covered, far from white."""
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    for shape in range(len(SHAPES)):
        areas = []
        for size in range(2):
            scene = tuple(Thing(place, size, 5, shape) for place in range(25))
            marks = list(footprints(scene))
            areas.append([footprint.sum().item() for *_, footprint in marks])
            if SHAPES[shape] != "diamond":  # a large one reaches 1.12 radii: its tips may lose a pixel
                assert all(pixels.mean(-1)[border].max() < 0.8 < pixels.mean(-1).max() for _, pixels, _ in marks)
        assert min(areas[1]) > 1.5 * max(areas[0])


def test_the_grid_says_what_stands_where():
    scenes = many_scenes(count=20)
    grid = world.scene_grid(scenes)
    assert grid.shape == (20, 25, 3)
    for row, scene in zip(grid.tolist(), scenes, strict=True):
        here = {thing.place: [1 + thing.colour, thing.shape, thing.size] for thing in scene}
        assert row == [here.get(place, [0, 0, 0]) for place in range(25)]
