"""What each training stage shows a Mini Flamingo of real photographs: 2 x 2 mosaics of CIFAR-10 images.

The counterpart of shapes_curriculum.py, with the same methods. Training pictures are flipped and shifted at random; the
test images never come up in training.

Legend: B batch, M images per sequence, T text tokens, Q queries.
"""

import random
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_utils import (
    CLASSES,
    MOSAIC_KINDS,
    MOSAIC_VOCABULARY,
    TILE,
    CIFAR10Images,
    load_cifar10,
    make_mosaics,
    mosaic_caption,
    mosaic_example,
    sample_batch,
)
from interleaved_text import IMAGE, UNASKED, Example, WordTokenizer, answer_of, join_examples, tokenize
from mini_flamingo import MiniFlamingo, MiniFlamingoConfig
from mini_flamingo_evaluation import Exam, answers, blanked, scores, shuffled
from token_reader import QueryGroup
from training_loop import Interleaved, Stage, Step

GRID = 2
PLACES = GRID * GRID
TEXT_LENGTH = 68  # four captions
SHIFT = 4  # pixels a training photograph may be moved by


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8[N, 3, 32, 32], each flipped left to right half of the time and shifted by up to 4 pixels, edges
    mirrored."""
    count = len(images)
    flipped = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images.float(), (SHIFT,) * 4, mode="reflect").to(torch.uint8)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator) + torch.arange(TILE)
    rows = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


def mosaic_targets(labels: Tensor) -> dict[str, Tensor]:
    """labels int64[B, 4] -> int64[B, Q]: the "class" at each place; how often each class is there ("count"), and
    "where" if exactly once."""
    is_class = F.one_hot(labels, len(CLASSES))
    count = is_class.sum(1)
    return {"class": labels, "count": count, "where": is_class.argmax(1).masked_fill(count != 1, UNASKED)}


def in_words(labels: tuple[int, ...], rng: random.Random) -> str:
    """The mosaic as text, in random order."""
    parts = mosaic_caption(labels, GRID).split(" ; ")[:-1]
    return " ; ".join([*rng.sample(parts, len(parts)), "."])


def _named(caption: str) -> dict[str, str]:
    """ "a1 cat ; b1 ship ; ." -> {"a1": "cat", "b1": "ship"}"""
    return dict(part.split(maxsplit=1) for part in caption.split(" ; ") if len(part.split()) == 2)


class MosaicCurriculum:
    """Mosaics of CIFAR-10 photographs as the training script sees a data set; `root` as in `load_cifar10`."""

    config = MiniFlamingoConfig(
        image_size=GRID * TILE, patch_size=4, vision_depth=4, vocabulary_size=len(MOSAIC_VOCABULARY)
    )
    vocabulary = MOSAIC_VOCABULARY
    reading: ClassVar = {
        "place": QueryGroup(PLACES, {"class": len(CLASSES)}),
        "class": QueryGroup(len(CLASSES), {"count": PLACES + 1, "where": PLACES}),
    }
    stages: ClassVar = {
        "vision": Stage(steps=1800, learning_rate=1.5e-3, batch_size=32),
        "language": Stage(steps=600, learning_rate=2e-3, batch_size=64),
        "warmup": Stage(steps=400, learning_rate=1.5e-3, batch_size=32),
        "align": Stage(steps=700, learning_rate=1.5e-3, batch_size=32),
    }

    def __init__(self, root: Path | None):
        self.tokenizer = WordTokenizer(self.vocabulary)
        self.root = root
        self.train = load_cifar10(root, "train")

    def mosaics(self, step: Step, size: int) -> tuple[Tensor, Tensor]:
        """uint8[B, 3, 64, 64] and labels int64[B, 4]."""
        images, labels = sample_batch(self.train, size * PLACES, step.generator)
        return make_mosaics(CIFAR10Images(augment(images, step.generator), labels), size, GRID, step.generator)

    def pictures(self, step: Step, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = self.mosaics(step, size)
        return images, mosaic_targets(labels)

    def texts(self, step: Step, size: int) -> tuple[Tensor, Tensor]:
        return tokenize([self.text_example(step.rng) for _ in range(size)], self.tokenizer, TEXT_LENGTH)

    def text_example(self, rng: random.Random) -> Example:
        labels = tuple(rng.choices(range(len(CLASSES)), k=PLACES))
        see = IMAGE if rng.random() < 0.15 else in_words(labels, rng)
        return mosaic_example(labels, self.kinds(rng, 4), rng, see)

    def kinds(self, rng: random.Random, count: int) -> list[str]:
        """A caption, or questions: a caption would tell their answers."""
        return ["list"] if rng.random() < 0.35 else rng.choices(MOSAIC_KINDS[1:], k=count)

    def align(self, step: Step, size: int) -> Interleaved:
        """A batch has one mosaic a row, or four, at random."""
        rng = step.rng
        per_row = rng.choice((1, 4))
        images, labels = self.mosaics(step, size)
        chunks = [mosaic_example(row, self.kinds(rng, 4 if per_row == 1 else 1), rng) for row in labels]
        rows = [join_examples(chunks[i : i + per_row]) for i in range(0, size, per_row)]
        ids, wanted = tokenize(rows, self.tokenizer, TEXT_LENGTH)
        is_real = torch.ones(size, dtype=torch.bool)
        return Interleaved(ids, wanted, images.unflatten(0, (-1, per_row)), is_real, mosaic_targets(labels))

    def report(self, model: MiniFlamingo, count: int = 512) -> dict:
        """What the trained model scores on mosaics of test photographs. A caption is right if all four photographs are;
        "photograph" is the share of single photographs named rightly in it."""
        test = load_cifar10(self.root, "test")
        exams = {kind: mosaic_exam(test, kind, count) for kind in MOSAIC_KINDS}
        said = answers(model, self.tokenizer, exams["list"])
        named = sum(
            _named(caption).get(place) == label
            for caption, example in zip(said, exams["list"].examples, strict=True)
            for place, label in _named(answer_of(example)).items()
        )
        return {
            "mosaics": count,
            "right": {"photograph": named / (count * PLACES)} | scores(model, self.tokenizer, exams),
            "blank": scores(model, self.tokenizer, {kind: blanked(exam) for kind, exam in exams.items()}),
            "shuffled": scores(model, self.tokenizer, {kind: shuffled(exam) for kind, exam in exams.items()}),
        }


def mosaic_exam(test: CIFAR10Images, kind: str, count: int) -> Exam:
    """Questions of one kind about mosaics of test photographs."""
    images, labels = make_mosaics(test, count, GRID, torch.Generator().manual_seed(count))
    rng = random.Random(kind)
    return Exam([mosaic_example(row, kind, rng) for row in labels], images[:, None])
