"""What is said about the shapes world: captions, questions with their answers, and few-shot episodes.

    list      a1 large red circle ; b3 small blue square ; .
    describe  in a1 a large red circle , in b3 a small blue square .
    questions what is at b3 ?   where is the red circle ?   how many objects ?   how many circles ?
              is there a red cross ?
    episodes  several images with one text each, among them words that only the episode's own shots define

Captions name the places in reading order, so that the text so far always says where to look next.

Legend: B batch, M images per sequence, T text tokens.
"""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interleaved_text import END_OF_CHUNK, IMAGE, PAD, Example, ExampleWriter, WordTokenizer, tokenize
from shapes_world import COLOURS, PLACES, SHAPES, SIZES, UNSEEN_PAIRS, Scene, Thing, render, sample_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NONCE_WORDS = ("dax", "wug", "blick", "fep", "zorp", "toma", "lish", "keb", "vim", "gorp", "modi", "pilk")
_FUNCTION_WORDS = (
    "; , . : ? in a an the what is at where how many objects there yes no nothing list describe output called"
)
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
LIST_PROMPT, DESCRIBE_PROMPT = "list :", "describe :"


def list_caption(scene: Iterable[Thing]) -> str:
    return " ".join(f"{thing.place_word} {thing.words} ;" for thing in scene) + " ."


def describe_caption(scene: Scene) -> str:
    return " , ".join(f"in {thing.place_word} a {thing.words}" for thing in scene) + " ."


QUESTION_KINDS = ("what is at", "where is", "how many", "how many of", "is there")


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str]:
    """A question about the scene and its answer. Raises ValueError for an unknown kind.

    "what is at" asks for an empty place one time in five. "where is" names a thing that stands once in the scene, with
    its size where colour and shape alone do not tell; where nothing does, "what is at" is asked. "how many of" mostly
    asks for what is there, "is there" half of the time.
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


def caption_example(scene: Scene, style: str = "list", see: str = IMAGE) -> Example:
    """`<image> list : a1 large red circle ; . <|endofchunk|>`; `see` may put a textual scene in the image's place."""
    if style not in ("list", "describe"):
        raise ValueError(f"style must be list or describe; got {style!r}")
    prompt, caption = (LIST_PROMPT, list_caption) if style == "list" else (DESCRIBE_PROMPT, describe_caption)
    return ExampleWriter().add(f"{see} {prompt}", f"{caption(scene)} {END_OF_CHUNK}").example(scene)


def question_example(scene: Scene, kinds: Sequence[str], rng: random.Random, see: str = IMAGE) -> Example:
    """`<image> where is the red circle ? b3 <|endofchunk|> how many objects ? two <|endofchunk|>`"""
    writer = ExampleWriter().add(see)
    for kind in kinds:
        question, answer = ask(scene, kind, rng)
        writer.add(question, f"{answer} {END_OF_CHUNK}")
    return writer.example(scene)


def word_example(
    rng: random.Random, shots: int, split: str = "train", text_shots: int = 0, meanings: int = 2
) -> Example:
    """Nonce words mean colours, or shapes, in this episode only:

        <image> called dax <|endofchunk|> <image> called wug <|endofchunk|> ... <image> called

    `shots` images with their word, then the image to be named. The first `text_shots` images are put in words instead.
    With two meanings, guessing between the two words is right half of the time. Raises ValueError for the split
    "unseen", in which most colours and shapes do not occur.
    """
    if split == "unseen":
        raise ValueError("word episodes are of the splits train and held-out")
    attribute, count = rng.choice((("colour", len(COLOURS)), ("shape", len(SHAPES))))
    words = dict(zip(rng.sample(range(count), meanings), rng.sample(NONCE_WORDS, meanings), strict=True))
    writer, scenes = ExampleWriter(), []
    for shot in range(shots + 1):
        (thing,) = scene = _scene_with(rng, split, attribute, words)
        if shot >= text_shots:
            scenes.append(scene)
        see = IMAGE if shot >= text_shots else thing.words
        writer.add(f"{see} called", f"{words[getattr(thing, attribute)]} {END_OF_CHUNK}")
    return writer.example(*scenes)


def _scene_with(rng: random.Random, split: str, attribute: str, values: Collection[int]) -> Scene:
    """One thing, whose attribute has one of these values."""
    while True:
        scene = sample_scene(rng, split, 1, 1)
        if getattr(scene[0], attribute) in values:
            return scene


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
    writer = ExampleWriter()
    scenes = [sample_scene(rng, split, 1, 1) for _ in range(shots + 1)]
    for scene in scenes:
        see = f"{scene[0].place_word} {scene[0].words}" if as_text else IMAGE
        writer.add(f"{see} output :", f"{read(scene[0])} {END_OF_CHUNK}")
    return writer.example(*scenes)


@dataclass(frozen=True)
class Batch:
    """input_ids int64[B, T] (padded on the right), labels int64[B, T] (-100 where nothing is to be predicted),
    images uint8[B, M, 3, 80, 80] (rows with fewer images end in black ones), scenes: per row."""

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    scenes: list[tuple[Scene, ...]]


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
