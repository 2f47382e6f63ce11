"""A small world of captioned images, made on the fly: what the shipped Mini Flamingo is trained and tested on.

A scene is 1 to 10 coloured, sized shapes on a grid of 5 x 5 places, columns a-e and rows 1-5. Its image is 80 x 80 pixels
with a textured background, each shape jittered inside its place, the edges anti-aliased. Its texts are

    list      a1 large red circle ; b3 small blue square ; .
    describe  in a1 a large red circle , in b3 a small blue square .
    questions what is at b3 ?   where is the red circle ?   how many objects ?   how many red objects ?   is there a red circle ?
    episodes  several images with one text each, among them words that only the episode's own shots define

Captions name the places in reading order, so that the text so far always says where to look next.

Everything is decided by a seed. A scene belongs to the training or the held-out split by a hash of its content, so the two
share no scene whatever the seeds. `UNSEEN_PAIRS` of colour and shape appear in neither: only in the split "unseen".

Legend: B batch, M images per sequence, T text tokens.
"""

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
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
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NONCE_WORDS = ("dax", "wug", "blick", "fep", "zorp", "toma", "lish", "keb", "vim", "gorp", "modi", "pilk")
UNSEEN_PAIRS = frozenset({("purple", "triangle"), ("green", "cross"), ("blue", "diamond")})
MAX_OBJECTS = 10

PAD, IMAGE, END_OF_CHUNK = "<pad>", "<image>", "<|endofchunk|>"
_FUNCTION_WORDS = "; , . : ? in a an the what is at where how many objects there yes no nothing list describe output called"
VOCABULARY = (
    PAD,
    IMAGE,
    END_OF_CHUNK,
    *PLACES,
    *SIZES,
    *COLOURS,
    *SHAPES,
    *SHAPES.values(),
    *NUMBERS,
    *NONCE_WORDS,
    *_FUNCTION_WORDS.split(),
)


class WordTokenizer:
    """One id per word of `VOCABULARY`; words are separated by spaces."""

    def __init__(self, vocabulary: Sequence[str] = VOCABULARY):
        self.words = tuple(vocabulary)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad_id, self.image_id, self.eoc_id = (self.ids[word] for word in (PAD, IMAGE, END_OF_CHUNK))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError naming the first word that is not in the vocabulary."""
        for word in text.split():
            if word not in self.ids:
                raise ValueError(f"the word {word!r} is not in the vocabulary of {len(self)} words")
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids (a list or an int64[T]) -> text; padding is left out."""
        return " ".join(self.words[i] for i in map(int, ids) if i != self.pad_id)

    def pad_left(self, texts: Sequence[str]) -> Tensor:
        """Prompts to continue -> int64[B, T], padded on the left."""
        rows = [self.encode(text) for text in texts]
        length = max(map(len, rows))
        return torch.tensor([[self.pad_id] * (length - len(row)) + row for row in rows])


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
    """"train", "held-out" (one scene in eight, by a hash of its content) or "unseen" (holds one of UNSEEN_PAIRS)."""
    if any(thing.is_unseen_pair for thing in scene):
        return "unseen"
    content = ";".join(f"{t.place},{t.size},{t.colour},{t.shape}" for t in scene)
    return "held-out" if zlib.crc32(content.encode()) % 8 == 0 else "train"


def sample_scene(rng: random.Random, split: str = "train", min_objects: int = 1, max_objects: int = MAX_OBJECTS) -> Scene:
    """A random scene of that split, its object count uniform. Raises ValueError for an unknown split or bad counts."""
    if split not in ("train", "held-out", "unseen"):
        raise ValueError(f"split must be train, held-out or unseen; got {split!r}")
    if not 1 <= min_objects <= max_objects <= len(PLACES):
        raise ValueError(f"need 1 <= min_objects <= max_objects <= {len(PLACES)}; got {min_objects} and {max_objects}")
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


# ---------------------------------------------------------------------------------------------------- images


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
    """Distance in pixels to each place's shape, negative inside; shapes in the order of SHAPES, equal in visual weight."""
    horizontal, vertical = x.abs(), y.abs()
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(horizontal, vertical) - 0.86 * radius
    triangle = torch.maximum(y - 0.75 * radius, (1.8 * horizontal - y - radius) / 2.06)
    bar = torch.maximum(torch.minimum(horizontal, vertical) - 0.33 * radius, torch.maximum(horizontal, vertical) - radius)
    diamond = (horizontal + vertical - 1.12 * radius) / 2**0.5
    which = shape[..., None, None]
    return torch.where(
        which == 0,
        circle,
        torch.where(which == 1, square, torch.where(which == 2, triangle, torch.where(which == 3, bar, diamond))),
    )


def _background(batch: int, generator: torch.Generator) -> Tensor:
    """Dim grey, tinted clouds: float[B, 3, 80, 80], noise at two scales on a gradient."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    level = _uniform(generator, batch, 3, 1, 1, low=0.28, high=0.48)
    texture = torch.zeros(batch, 3, *size)
    for cells, strength in ((3, 0.08), (12, 0.05)):
        coarse = _uniform(generator, batch, 3, cells, cells, low=-1, high=1) * strength
        texture = texture + torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)
    return level + texture


def _to_places(image: Tensor) -> Tensor:
    """[B, 3, 80, 80] -> [B, 25, 3, 16, 16]"""
    cut = image.unflatten(3, (GRID, PLACE_PIXELS)).unflatten(2, (GRID, PLACE_PIXELS))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _from_places(places: Tensor) -> Tensor:
    """[B, 25, 3, 16, 16] -> [B, 3, 80, 80]"""
    return places.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------- texts

LIST_PROMPT, DESCRIBE_PROMPT = "list :", "describe :"


def list_caption(scene: Iterable[Thing]) -> str:
    return " ".join(f"{thing.place_word} {thing.words} ;" for thing in scene) + " ."


def describe_caption(scene: Scene) -> str:
    return " , ".join(f"in {thing.place_word} a {thing.words}" for thing in scene) + " ."


QUESTION_KINDS = ("what is at", "where is", "how many", "how many of", "is there")


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer. Raises ValueError for an unknown kind.

    "what is at" asks for an empty place one time in five; "where is" names a thing that stands once in the scene (with its
    size where colour and shape alone do not tell); half of the others ask for something that is there.
    """
    if kind == "what is at":
        return _ask_what(scene, rng)
    if kind == "where is":
        return _ask_where(scene, rng)
    if kind == "how many":
        return "how many objects ?", NUMBERS[len(scene)]
    if kind == "how many of":
        word = _attribute(rng.choice(scene), rng) if rng.random() < 0.7 else rng.choice([*COLOURS, *SHAPES])
        noun = SHAPES.get(word) or f"{word} objects"
        return f"how many {noun} ?", NUMBERS[sum(word in thing.words.split() for thing in scene)]
    if kind == "is there":
        return _ask_is_there(scene, rng)
    raise ValueError(f"question kind must be one of {', '.join(QUESTION_KINDS)}; got {kind!r}")


def _attribute(thing: Thing, rng: random.Random) -> str:
    return rng.choice((thing.colour_word, thing.shape_word))


def _ask_what(scene: Scene, rng: random.Random) -> tuple[str, str]:
    things = {thing.place: thing for thing in scene}
    empty = [place for place in range(len(PLACES)) if place not in things]
    if empty and rng.random() < 0.2:
        return f"what is at {PLACES[rng.choice(empty)]} ?", "nothing"
    thing = rng.choice(scene)
    return f"what is at {thing.place_word} ?", thing.words


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    order = rng.sample(scene, len(scene))
    for thing in order:
        name = f"{thing.colour_word} {thing.shape_word}"
        if sum(name in other.words for other in scene) == 1:
            return f"where is the {name} ?", thing.place_word
    for thing in order:
        if sum(thing.words == other.words for other in scene) == 1:
            return f"where is the {thing.words} ?", thing.place_word
    return _ask_what(scene, rng)  # a scene of nothing but twins: there is no such question to ask


def _ask_is_there(scene: Scene, rng: random.Random) -> tuple[str, str]:
    present = {(thing.colour_word, thing.shape_word) for thing in scene}
    absent = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if (colour, shape) not in present and (colour, shape) not in UNSEEN_PAIRS
    ]
    there = rng.random() < 0.5
    colour, shape = rng.choice(sorted(present) if there else absent)
    return f"is there a {colour} {shape} ?", "yes" if there else "no"


# ---------------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """Interleaved images and text. `text` holds one <image> per scene; `answers` marks its words that must be predicted."""

    scenes: tuple[Scene, ...]
    text: str
    answers: tuple[bool, ...]


class _Writer:
    """Joins chunks while it keeps track of which words are answers."""

    def __init__(self):
        self.words: list[str] = []
        self.answers: list[bool] = []

    def add(self, prompt: str, answer: str = "") -> "_Writer":
        for text, is_answer in ((prompt, False), (answer, True)):
            words = text.split()
            self.words += words
            self.answers += [is_answer] * len(words)
        return self

    def example(self, *scenes: Scene) -> Example:
        return Example(scenes, " ".join(self.words), tuple(self.answers))


def caption_example(scene: Scene, style: str = "list", see: str = IMAGE) -> Example:
    """`<image> list : a1 large red circle ; . <|endofchunk|>`; `see` may put a textual scene in the image's place."""
    if style not in ("list", "describe"):
        raise ValueError(f"style must be list or describe; got {style!r}")
    prompt, caption = (LIST_PROMPT, list_caption) if style == "list" else (DESCRIBE_PROMPT, describe_caption)
    return _Writer().add(f"{see} {prompt}", f"{caption(scene)} {END_OF_CHUNK}").example(scene)


def question_example(scene: Scene, kinds: Sequence[str], rng: random.Random, see: str = IMAGE) -> Example:
    """`<image> where is the red circle ? b3 <|endofchunk|> how many objects ? two <|endofchunk|>`"""
    writer = _Writer().add(see)
    for kind in kinds:
        question, answer = ask(scene, kind, rng)
        writer.add(question, f"{answer} {END_OF_CHUNK}")
    return writer.example(scene)


def _shot_scenes(rng: random.Random, split: str, count: int) -> list[Scene]:
    return [sample_scene(rng, split, 1, 1) for _ in range(count)]


def word_example(
    rng: random.Random, shots: int, split: str = "train", as_text: bool = False, meanings: int = 2
) -> Example:
    """Nonce words mean colours, or shapes, in this episode only:

        <image> called dax <|endofchunk|> <image> called wug <|endofchunk|> ... <image> called

    `shots` images with their word, then the image to be named. With two meanings, guessing between the two words is right
    half of the time.
    """
    attribute, count = rng.choice((("colour", len(COLOURS)), ("shape", len(SHAPES))))
    words = dict(zip(rng.sample(range(count), meanings), rng.sample(NONCE_WORDS, meanings), strict=True))
    writer, scenes = _Writer(), []
    while len(scenes) <= shots:
        (scene,) = _shot_scenes(rng, split, 1)
        word = words.get(getattr(scene[0], attribute))
        if word is not None:
            scenes.append(scene)
            writer.add(f"{scene[0].words if as_text else IMAGE} called", f"{word} {END_OF_CHUNK}")
    return writer.example(*scenes)


def task_example(rng: random.Random, shots: int, split: str = "train", as_text: bool = False) -> Example:
    """The shots show which attribute is wanted: `<image> output : red <|endofchunk|> <image> output : blue ...`"""
    read = rng.choice(
        (
            lambda thing: thing.place_word,
            lambda thing: thing.words.split()[0],
            lambda thing: thing.colour_word,
            lambda thing: thing.shape_word,
        )
    )
    writer = _Writer()
    scenes = _shot_scenes(rng, split, shots + 1)
    for scene in scenes:
        see = f"{scene[0].place_word} {scene[0].words}" if as_text else IMAGE
        writer.add(f"{see} output :", f"{read(scene[0])} {END_OF_CHUNK}")
    return writer.example(*scenes)


def prompt_of(example: Example) -> str:
    """The words in front of the last answer: what a model is given to continue."""
    words = example.text.split()
    return " ".join(words[: _last_answer_start(example)])


def answer_of(example: Example) -> str:
    """The last answer, without its end-of-chunk token."""
    return " ".join(example.text.split()[_last_answer_start(example) :]).removesuffix(END_OF_CHUNK).strip()


def _last_answer_start(example: Example) -> int:
    start = len(example.answers)
    while start and example.answers[start - 1]:
        start -= 1
    return start


@dataclass(frozen=True)
class Batch:
    """input_ids int64[B, T] (padded on the right), labels int64[B, T] (-100 where nothing is to be predicted),
    images uint8[B, M, 3, 80, 80] (rows with fewer images end in black ones), scenes: per row."""

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    scenes: list[tuple[Scene, ...]]


def join_examples(examples: Sequence[Example]) -> Example:
    """Several examples one after the other, as one interleaved sequence."""
    return Example(
        sum((example.scenes for example in examples), ()),
        " ".join(example.text for example in examples),
        sum((example.answers for example in examples), ()),
    )


def tokenize(examples: Sequence[Example], tokenizer: WordTokenizer, length: int | None = None) -> tuple[Tensor, Tensor]:
    """-> input_ids and labels int64[B, T], padded on the right to `length` (default: the longest text); labels are -100
    where nothing is to be predicted. Raises ValueError where a text is longer than `length`."""
    rows = [tokenizer.encode(example.text) for example in examples]
    longest = max(map(len, rows))
    length = length or longest
    if longest > length:
        raise ValueError(f"a text has {longest} words, more than length={length}")
    input_ids = torch.full((len(rows), length), tokenizer.pad_id)
    labels = torch.full((len(rows), length), -100)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids = torch.tensor(row)
        input_ids[i, : len(row)] = ids
        labels[i, : len(row)] = torch.where(torch.tensor(example.answers), ids, -100)
    return input_ids, labels


def collate(
    examples: Sequence[Example], tokenizer: WordTokenizer, generator: torch.Generator, length: int | None = None
) -> Batch:
    """Tokenizes and renders."""
    input_ids, labels = tokenize(examples, tokenizer, length)
    counts = [len(example.scenes) for example in examples]
    rendered = render([scene for example in examples for scene in example.scenes], generator).split(counts)
    images = torch.stack([_pad_images(each, max(counts)) for each in rendered])
    return Batch(input_ids, labels, images, [example.scenes for example in examples])


def _pad_images(images: Tensor, count: int) -> Tensor:
    return torch.cat((images, images.new_zeros(count - len(images), *images.shape[1:])))
