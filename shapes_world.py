"""A small world of generated pictures: what the shipped Mini Flamingo is trained and tested on.

A scene is 1 to 10 coloured, sized shapes on a grid of 5 x 5 places, columns a-e and rows 1-5. Its image is 80 x 80
pixels with a textured background, each shape jittered inside its place, the edges anti-aliased. shapes_texts.py says
what is said about scenes.

Everything is decided by a seed. A scene belongs to the training or the held-out split by a hash of its content, so the
two share no scene whatever the seeds. `UNSEEN_PAIRS` of colour and shape appear in neither: only in the split "unseen".

Legend: B batch.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 5
PLACE_PIXELS = 16
IMAGE_SIZE = GRID * PLACE_PIXELS
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.60, 0.20, 0.75),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "diamond": "diamonds"}
SIZES = {"small": 3.9, "large": 6.2}  # radius in pixels
PLACES = tuple(column + row for row in "12345" for column in "abcde")  # reading order
UNSEEN_PAIRS = frozenset({("purple", "triangle"), ("green", "cross"), ("blue", "diamond")})
MAX_OBJECTS = 10


@dataclass(frozen=True, order=True)
class Thing:
    """One object: indices into PLACES, SIZES, COLOURS and SHAPES."""

    place: int
    size: int
    colour: int
    shape: int

    @property
    def place_word(self) -> str:
        return PLACES[self.place]

    @property
    def words(self) -> str:
        return f"{tuple(SIZES)[self.size]} {self.colour_word} {self.shape_word}"

    @property
    def colour_word(self) -> str:
        return tuple(COLOURS)[self.colour]

    @property
    def shape_word(self) -> str:
        return tuple(SHAPES)[self.shape]

    @property
    def is_unseen_pair(self) -> bool:
        return (self.colour_word, self.shape_word) in UNSEEN_PAIRS


Scene = tuple[Thing, ...]  # in reading order, at most one thing a place


def scene_split(scene: Scene) -> str:
    """ "train", "held-out" (one scene in eight, by a hash of its content) or "unseen" (holds one of UNSEEN_PAIRS)."""
    if any(thing.is_unseen_pair for thing in scene):
        return "unseen"
    content = ";".join(f"{t.place},{t.size},{t.colour},{t.shape}" for t in scene)
    return "held-out" if zlib.crc32(content.encode()) % 8 == 0 else "train"


def sample_scene(
    rng: random.Random, split: str = "train", min_objects: int = 1, max_objects: int = MAX_OBJECTS
) -> Scene:
    """A random scene of that split, its object count uniform. Raises ValueError for an unknown split or bad counts."""
    if split not in ("train", "held-out", "unseen"):
        raise ValueError(f"split must be train, held-out or unseen; got {split!r}")
    if not 1 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"need 1 <= min_objects <= max_objects <= {MAX_OBJECTS}; got {min_objects} and {max_objects}")
    count = rng.randint(min_objects, max_objects)
    while True:
        things = []
        for place in sorted(rng.sample(range(len(PLACES)), count)):
            thing = _sample_thing(rng, place)
            while split != "unseen" and thing.is_unseen_pair:
                thing = _sample_thing(rng, place)
            things.append(thing)
        scene = tuple(things)
        if scene_split(scene) == split:
            return scene


def _sample_thing(rng: random.Random, place: int) -> Thing:
    return Thing(place, rng.randrange(len(SIZES)), rng.randrange(len(COLOURS)), rng.randrange(len(SHAPES)))


def scene_grid(scenes: Sequence[Scene]) -> Tensor:
    """int64[B, 25, 3]: colour (0: empty, else 1 + index), shape and size of every place."""
    grid = torch.zeros(len(scenes), len(PLACES), 3, dtype=torch.int64)
    for row, scene in zip(grid, scenes, strict=True):
        for thing in scene:
            row[thing.place] = torch.tensor([1 + thing.colour, thing.shape, thing.size])
    return grid


def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Scenes -> uint8[B, 3, 80, 80]. The generator decides backgrounds, jitter, shades and noise."""
    grid = scene_grid(scenes)
    batch, places = grid.shape[:2]
    occupied = (grid[..., 0] > 0)[..., None, None]
    radius = torch.tensor(list(SIZES.values()))[grid[..., 2]] * _uniform(generator, batch, places, low=0.94, high=1.06)
    slack = (PLACE_PIXELS / 2 - radius - 0.6).clamp(min=0)[..., None]
    centre = (PLACE_PIXELS - 1) / 2 + slack * _uniform(generator, batch, places, 2, low=-1, high=1)
    pixels = torch.arange(PLACE_PIXELS, dtype=torch.float32)
    x = (pixels - centre[..., :1])[:, :, None, :]
    y = (pixels - centre[..., 1:])[:, :, :, None]
    distance = _signed_distance(x, y, radius[..., None, None], grid[..., 1])
    coverage = ((0.5 - distance).clamp(0, 1) * occupied)[:, :, None]  # anti-aliased over one pixel

    palette = torch.tensor([(0.0, 0.0, 0.0), *COLOURS.values()])
    shade = palette[grid[..., 0]] * _uniform(generator, batch, places, 1, low=0.88, high=1.0)
    background = _to_places(_background(batch, generator))
    image = _from_places(background * (1 - coverage) + shade[..., None, None] * coverage)
    image = image + 0.02 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _uniform(generator: torch.Generator, *shape: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _signed_distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Distance in pixels to each place's shape, negative inside; shapes in the order of SHAPES, equal in visual
    weight."""
    horizontal, vertical = x.abs(), y.abs()
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(horizontal, vertical) - 0.86 * radius
    triangle = torch.maximum(y - 0.75 * radius, (1.8 * horizontal - y - radius) / 2.06)
    bar = torch.maximum(
        torch.minimum(horizontal, vertical) - 0.33 * radius, torch.maximum(horizontal, vertical) - radius
    )
    diamond = (horizontal + vertical - 1.12 * radius) / 2**0.5
    distances = torch.stack((circle, square, triangle, bar, diamond))
    return distances.gather(0, shape[None, ..., None, None].expand_as(distances[:1])).squeeze(0)


def _background(batch: int, generator: torch.Generator) -> Tensor:
    """Dim grey, tinted clouds: float[B, 3, 80, 80], noise at two scales on a gradient."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    level = _uniform(generator, batch, 3, 1, 1, low=0.28, high=0.48)
    texture = torch.zeros(batch, 3, *size)
    for cells, strength in ((3, 0.08), (12, 0.05)):
        coarse = _uniform(generator, batch, 3, cells, cells, low=-1, high=1) * strength
        texture = texture + F.interpolate(coarse, size, mode="bilinear", align_corners=True)
    return level + texture


def _to_places(image: Tensor) -> Tensor:
    """[B, 3, 80, 80] -> [B, 25, 3, 16, 16]"""
    cut = image.unflatten(3, (GRID, PLACE_PIXELS)).unflatten(2, (GRID, PLACE_PIXELS))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _from_places(places: Tensor) -> Tensor:
    """[B, 25, 3, 16, 16] -> [B, 3, 80, 80]"""
    return places.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
