"""Interleaved images and text: words, their ids, and which of them are to be predicted.

An `Example` is a text with one `<image>` per image and a mark on each word that a model must say. Chunks about one
image end in `<|endofchunk|>` (Alayrac et al. 2022, section 2.4 and appendix A.2). What the images are is the data set's
business.

Legend: B examples, T words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD, IMAGE, END_OF_CHUNK = "<pad>", "<image>", "<|endofchunk|>"
UNASKED = -100  # the label of what is not to be predicted: cross_entropy's ignore_index


class WordTokenizer:
    """One id per word of the vocabulary; words are separated by spaces."""

    def __init__(self, vocabulary: Sequence[str]):
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
        return torch.tensor([[self.pad_id] * (length - len(row)) + row for row in rows], dtype=torch.int64)


@dataclass(frozen=True)
class Example:
    """`text` holds one <image> per scene, unless it puts the scene in words; `answers` marks the words that must be
    predicted."""

    scenes: tuple[Any, ...]  # whatever the images are made from
    text: str
    answers: tuple[bool, ...]


class ExampleWriter:
    """Joins chunks while it keeps track of which words are answers."""

    def __init__(self):
        self.words: list[str] = []
        self.answers: list[bool] = []

    def add(self, prompt: str, answer: str = "") -> "ExampleWriter":
        for text, is_answer in ((prompt, False), (answer, True)):
            words = text.split()
            self.words += words
            self.answers += [is_answer] * len(words)
        return self

    def example(self, *scenes: Any) -> Example:
        return Example(scenes, " ".join(self.words), tuple(self.answers))


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


def join_examples(examples: Sequence[Example]) -> Example:
    """Several examples one after the other, as one interleaved sequence."""
    return Example(
        sum((example.scenes for example in examples), ()),
        " ".join(example.text for example in examples),
        sum((example.answers for example in examples), ()),
    )


def tokenize(examples: Sequence[Example], tokenizer: WordTokenizer, length: int | None = None) -> tuple[Tensor, Tensor]:
    """-> input_ids and labels int64[B, T], padded on the right to `length` (default: the longest text); labels are
    UNASKED where nothing is to be predicted. Raises ValueError where a text is longer than `length`."""
    rows = [tokenizer.encode(example.text) for example in examples]
    longest = max(map(len, rows))
    length = length or longest
    if longest > length:
        raise ValueError(f"a text has {longest} words, more than length={length}")
    input_ids = torch.full((len(rows), length), tokenizer.pad_id)
    labels = torch.full((len(rows), length), UNASKED)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids = torch.tensor(row)
        input_ids[i, : len(row)] = ids
        labels[i, : len(row)] = torch.where(torch.tensor(example.answers), ids, UNASKED)
    return input_ids, labels
