"""What the tests of the shapes world share: scenes of every split, and their words from the indices alone."""

import random

import shapes_world as world

SPLITS = ("train", "held-out", "unseen")
COLOURS, SHAPES, SIZES = tuple(world.COLOURS), tuple(world.SHAPES), tuple(world.SIZES)


def many_scenes(split="train", count=400, seed=0, **counts):
    rng = random.Random(seed)
    return [world.sample_scene(rng, split, **counts) for _ in range(count)]


def words_of(thing):
    """size, colour, shape from the indices alone."""
    return [SIZES[thing.size], COLOURS[thing.colour], SHAPES[thing.shape]]
