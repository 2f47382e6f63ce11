"""What each training stage shows a Mini Flamingo of the shapes world.

    pictures     scenes and the labels that can be read off them (vision, warmup)
    texts        scenes written out in words, questions about them, episodes (language)
    interleaved  images and text: captions, questions, several images, few-shot episodes (align)
    few_shot     the same with the emphasis on new words and counting (few_shot)

Legend: B batch, M images per sequence, T text tokens, Q queries.
"""

import random
from dataclasses import dataclass
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
from training_loop import Stage, Step

TEXT_LENGTH = 128  # words of a text-only or interleaved example
CHUNK_LENGTH = 64  # words about one image, or of a few-shot episode
PAIRS = tuple(product(range(len(COLOURS)), range(len(SHAPES))))
QUESTION_WEIGHTS = {"what is at": 0.2, "where is": 0.25, "how many": 0.2, "how many of": 0.2, "is there": 0.15}
COUNTING_WEIGHTS = {"what is at": 0.05, "where is": 0.05, "how many": 0.3, "how many of": 0.45, "is there": 0.15}


@dataclass(frozen=True)
class Interleaved:
    """input_ids and labels int64[B, T], images uint8[B, M, 3, h, w], is_real bool[B * M] (false where a row has fewer
    than M images), and the labels that can be read off the real ones, int64[is_real.sum(), Q] by name."""

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    is_real: Tensor
    targets: dict[str, Tensor]


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

    def interleaved(self, step: Step, size: int) -> Interleaved:
        """Captions, questions and episodes. A batch is of one kind, so that few shapes occur; `size` is about the
        number of images in it."""
        rng = step.rng
        kind = rng.choices(("single", "several", "word", "task"), (0.6, 0.15, 0.2, 0.05))[0]
        if kind == "single":
            return self.collate(step, [single_image_example(rng) for _ in range(size)], CHUNK_LENGTH)
        if kind == "several":
            return self.collate(step, [several_images_example(rng) for _ in range(size // 4)], TEXT_LENGTH)
        make = texts.word_example if kind == "word" else texts.task_example
        return self.collate(step, [make(rng, shots=8) for _ in range(size // 6)], CHUNK_LENGTH)

    def few_shot(self, step: Step, size: int) -> Interleaved:
        """What is learned last: new words from shots, and counting; with a little of everything else."""
        rng = step.rng
        kind = rng.choices(("word", "single", "several", "task"), (0.45, 0.45, 0.05, 0.05))[0]
        if kind == "word":
            return self.collate(step, [bridged_word_example(rng) for _ in range(size // 6)], CHUNK_LENGTH)
        if kind == "single":
            return self.collate(step, [single_image_example(rng, COUNTING_WEIGHTS) for _ in range(size)], CHUNK_LENGTH)
        if kind == "several":
            return self.collate(step, [several_images_example(rng) for _ in range(size // 4)], TEXT_LENGTH)
        return self.collate(step, [texts.task_example(rng, shots=8) for _ in range(size // 6)], CHUNK_LENGTH)

    def collate(self, step: Step, examples: list[Example], length: int) -> Interleaved:
        batch = texts.collate(examples, self.tokenizer, step.generator, length)
        most = batch.images.shape[1]
        is_real = torch.tensor([m < len(row) for row in batch.scenes for m in range(most)])
        targets = scene_targets([scene for row in batch.scenes for scene in row])
        return Interleaved(batch.input_ids, batch.labels, batch.images, is_real, targets)

    def report(self, model: MiniFlamingo) -> dict:
        """What the trained model scores on held-out scenes."""
        return full_report(model)
