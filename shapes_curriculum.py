"""What each training stage shows a Mini Flamingo of the shapes world.

    pictures     scenes and the labels that can be read off them (vision, warmup)
    texts        scenes written out in words, questions about them, episodes (language)
    mixture      images and text: captions, questions, several images, few-shot episodes (align and what follows it)

Legend: B batch, M images per sequence, T text tokens, Q queries.
"""

import random
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import shapes_texts as texts
import shapes_world as world
from interleaved_text import IMAGE, UNASKED, Example, WordTokenizer, join_examples, tokenize
from mini_flamingo import MiniFlamingo, preset
from mini_flamingo_evaluation import full_report
from shapes_world import COLOURS, MAX_OBJECTS, PLACES, SHAPES, SIZES, Scene
from token_reader import QueryGroup
from training_loop import Interleaved, Stage, Step

TEXT_LENGTH = 128  # words of a text-only or interleaved example
CHUNK_LENGTH = 64  # words about one image, or of a few-shot episode
PAIRS = tuple(product(range(len(COLOURS)), range(len(SHAPES))))
QUESTION_WEIGHTS = {"what is at": 0.2, "where is": 0.25, "how many": 0.2, "how many of": 0.2, "is there": 0.15}
COUNTING_WEIGHTS = {"what is at": 0.05, "where is": 0.05, "how many": 0.3, "how many of": 0.45, "is there": 0.15}


def scene_targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """int64[B, Q] labels: "colour" of each place (0: empty), its "shape" and "size"; "where" each colour-shape pair
    stands, if exactly once; "count" of each colour, each shape, and of all things."""
    colour, shape, size = world.scene_grid(scenes).unbind(-1)
    empty = colour == 0
    is_colour = F.one_hot(colour, len(COLOURS) + 1)[..., 1:]
    is_shape = F.one_hot(shape, len(SHAPES)) * ~empty[..., None]
    is_pair = torch.stack([is_colour[..., c] * is_shape[..., s] for c, s in PAIRS], dim=-1)
    return {
        "colour": colour,
        "shape": shape.masked_fill(empty, UNASKED),
        "size": size.masked_fill(empty, UNASKED),
        "where": is_pair.argmax(1).masked_fill(is_pair.sum(1) != 1, UNASKED),
        "count": torch.cat((is_colour.sum(1), is_shape.sum(1), (~empty).sum(1, keepdim=True)), dim=1),
    }


def in_words(scene: Scene, rng: random.Random) -> str:
    """The scene as text, in random order: what the language model reads where there will be an image."""
    return texts.list_caption(rng.sample(scene, len(scene)))


def questions(rng: random.Random, count: int, weights: dict[str, float] = QUESTION_WEIGHTS) -> list[str]:
    return rng.choices(list(weights), list(weights.values()), k=count)


def text_example(rng: random.Random) -> Example:
    """Text alone. One scene in seven is left out (an <image> without its image), so the answers' own odds are learned
    too."""
    kind = rng.choices(("questions", "list", "describe", "word", "task"), (0.4, 0.12, 0.08, 0.3, 0.1))[0]
    if kind == "word":  # more meanings than two make copying the right word worth learning much sooner
        return texts.word_example(rng, shots=15, text_shots=16, meanings=rng.randint(2, 4))
    if kind == "task":
        return texts.task_example(rng, shots=11, as_text=True)
    scene = world.sample_scene(rng)
    see = IMAGE if rng.random() < 0.15 else in_words(scene, rng)
    if kind == "questions":
        return texts.question_example(scene, questions(rng, 7), rng, see)
    return texts.caption_example(scene, kind, see)


def single_image_example(rng: random.Random, weights: dict[str, float] = QUESTION_WEIGHTS) -> Example:
    kind = rng.choices(("questions", "list", "describe"), (0.55, 0.3, 0.15))[0]
    if kind == "questions":
        return texts.question_example(world.sample_scene(rng), questions(rng, 6, weights), rng)
    return texts.caption_example(world.sample_scene(rng, max_objects=MAX_OBJECTS if kind == "list" else 8), kind)


def counting_example(rng: random.Random) -> Example:
    return texts.question_example(world.sample_scene(rng), questions(rng, 7, COUNTING_WEIGHTS), rng)


def bridged_word_example(rng: random.Random) -> Example:
    """An episode that defines new words, in half of the cases with its first shots in words instead of images: matching
    an image to a text is learned first, and is the way to matching an image to an image."""
    text_shots = rng.randint(0, 8) if rng.random() < 0.5 else 0
    return texts.word_example(rng, shots=8, text_shots=text_shots, meanings=rng.randint(2, 4))


def several_images_example(rng: random.Random) -> Example:
    """Four images, each with its caption or its questions."""
    chunks = []
    for _ in range(4):
        scene, kind = world.sample_scene(rng, max_objects=4), rng.choice(("questions", "list", "describe"))
        asked = kind == "questions"
        chunks.append(
            texts.question_example(scene, questions(rng, 2), rng) if asked else texts.caption_example(scene, kind)
        )
    return join_examples(chunks)


class ShapesCurriculum:
    """The shapes world as the training script sees a data set."""

    config = preset("shapes")
    vocabulary = texts.VOCABULARY
    reading: ClassVar = {
        "place": QueryGroup(len(PLACES), {"colour": len(COLOURS) + 1, "shape": len(SHAPES), "size": len(SIZES)}),
        "pair": QueryGroup(len(PAIRS), {"where": len(PLACES)}),
        "kind": QueryGroup(len(COLOURS) + len(SHAPES) + 1, {"count": MAX_OBJECTS + 1}),
    }
    stages: ClassVar = {
        "vision": Stage(steps=500, learning_rate=2e-3, batch_size=64),
        "language": Stage(steps=2200, learning_rate=2e-3, batch_size=64),
        "warmup": Stage(steps=800, learning_rate=1.5e-3, batch_size=64),
        "align": Stage(steps=1600, learning_rate=1.5e-3, batch_size=64),
        "few_shot": Stage(steps=1200, learning_rate=1.2e-3, batch_size=64),
        "counting": Stage(steps=800, learning_rate=1.2e-3, batch_size=64),
        "everything": Stage(steps=600, learning_rate=1e-3, batch_size=64),
    }

    def __init__(self):
        self.tokenizer = WordTokenizer(self.vocabulary)

    def pictures(self, step: Step, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8[B, 3, h, w] and their `scene_targets`."""
        scenes = [world.sample_scene(step.rng) for _ in range(size)]
        return world.render(scenes, step.generator), scene_targets(scenes)

    def texts(self, step: Step, size: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels int64[B, T]."""
        return tokenize([text_example(step.rng) for _ in range(size)], self.tokenizer, TEXT_LENGTH)

    def align(self, step: Step, size: int) -> Interleaved:
        """Captions, questions and episodes."""
        return self.mixture(step, size, {"single": 0.6, "several": 0.15, "word": 0.2, "task": 0.05})

    def few_shot(self, step: Step, size: int) -> Interleaved:
        """New words from shots, and counting, half each."""
        kinds = {"bridged word": 0.45, "single, counting": 0.45, "several": 0.05, "task": 0.05}
        return self.mixture(step, size, kinds)

    def counting(self, step: Step, size: int) -> Interleaved:
        """Counting above all: reading how many off the visual tokens takes the most practice."""
        return self.mixture(step, size, {"counting": 0.75, "single": 0.1, "bridged word": 0.15})

    def everything(self, step: Step, size: int) -> Interleaved:
        """All of it together, so that what was learned last does not displace what was learned first."""
        kinds = {"single, counting": 0.45, "counting": 0.25, "bridged word": 0.15, "several": 0.1, "task": 0.05}
        return self.mixture(step, size, kinds)

    def mixture(self, step: Step, size: int, kinds: dict[str, float]) -> Interleaved:
        """A batch of one kind, drawn by its weight, so that few shapes occur; `size` is about the images in it."""
        rng = step.rng
        rows, length, make = {
            "counting": (size, CHUNK_LENGTH, lambda: counting_example(rng)),
            "single": (size, CHUNK_LENGTH, lambda: single_image_example(rng)),
            "single, counting": (size, CHUNK_LENGTH, lambda: single_image_example(rng, COUNTING_WEIGHTS)),
            "several": (size // 4, TEXT_LENGTH, lambda: several_images_example(rng)),
            "word": (size // 6, CHUNK_LENGTH, lambda: texts.word_example(rng, shots=8)),
            "bridged word": (size // 6, CHUNK_LENGTH, lambda: bridged_word_example(rng)),
            "task": (size // 6, CHUNK_LENGTH, lambda: texts.task_example(rng, shots=8)),
        }[rng.choices(list(kinds), list(kinds.values()))[0]]
        return self.collate(step, [make() for _ in range(rows)], length)

    def collate(self, step: Step, examples: list[Example], length: int) -> Interleaved:
        batch = texts.collate(examples, self.tokenizer, step.generator, length)
        most = batch.images.shape[1]
        is_real = torch.tensor([m < len(row) for row in batch.scenes for m in range(most)])
        targets = scene_targets([scene for row in batch.scenes for scene in row])
        return Interleaved(batch.input_ids, batch.labels, batch.images, is_real, targets)

    def report(self, model: MiniFlamingo) -> dict:
        """What the trained model scores on held-out scenes."""
        return full_report(model)
