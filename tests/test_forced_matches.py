"""Which answers are right, found in one pass over the true words, against greedy decoding word by word."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import mini_flamingo_evaluation as evaluation
from interleaved_text import END_OF_CHUNK, Example, WordTokenizer, answer_of, prompt_of
from mini_flamingo_checkpoint import load_mini_flamingo, load_tokenizer
from mini_flamingo_evaluation import answers, forced_matches
from shapes_texts import VOCABULARY

EXAMS = {
    "captions": partial(evaluation.caption_exam, objects=(1, 4)),
    "captions in words": partial(evaluation.caption_exam, style="describe", objects=(1, 2)),
    "what is at": partial(evaluation.question_exam, "what is at"),
    "how many": partial(evaluation.question_exam, "how many"),
    "several images": partial(evaluation.word_exam, 2),
}
TOKENIZER = WordTokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def shipped():
    return load_mini_flamingo()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 4)


def by_decoding(model, exam, encode=None):
    said = answers(model, TOKENIZER, exam, encode)
    return [words == answer_of(example) for words, example in zip(said, exam.examples, strict=True)]


@pytest.mark.parametrize("latents", [64, 8])
@pytest.mark.parametrize("name", EXAMS)
def test_forced_matches_are_the_exact_matches_of_decoding(shipped, name, latents):
    """Row by row over several batches, the last one short; also where few random latents make the model err."""
    exam = EXAMS[name](count=11)
    encode = evaluation.random_latents(shipped, latents)
    matches = forced_matches(shipped, load_tokenizer(), exam, encode)
    assert matches.dtype == torch.bool and matches.shape == (11,)
    assert matches.tolist() == by_decoding(shipped, exam, encode)
    if latents == 8:
        assert 0 < matches.sum() < 11, "neither all right nor all wrong"


def test_the_model_s_own_encoding_is_the_default(shipped):
    exam = EXAMS["captions"](6)
    assert forced_matches(shipped, TOKENIZER, exam).tolist() == by_decoding(shipped, exam)
    blank = evaluation.blanked(exam)
    assert forced_matches(shipped, TOKENIZER, blank).tolist() == by_decoding(shipped, blank)


def reworded(example, words):
    """The same prompt with these words as its true answer."""
    prompt = prompt_of(example).split()
    answers = (*example.answers[: len(prompt)], *[True] * len(words))
    return Example(example.scenes, " ".join([*prompt, *words]), answers)


def test_what_a_model_says_is_right_and_one_other_word_is_wrong(shipped):
    """A model that sees badly, examined in its own words; then with one of them changed, and cut short."""
    encode = evaluation.random_latents(shipped, 3)
    exam = EXAMS["captions"](8)
    own = [
        reworded(example, [*words.split(), END_OF_CHUNK])
        for example, words in zip(exam.examples, answers(shipped, TOKENIZER, exam, encode), strict=True)
    ]
    assert not forced_matches(shipped, TOKENIZER, exam, encode).all()
    assert forced_matches(shipped, TOKENIZER, replace(exam, examples=own), encode).all()
    for place in (0, 2, -2, -1):
        changed = []
        for example in own:
            words = [*answer_of(example).split(), END_OF_CHUNK]
            words[place] = "square" if words[place] != "square" else "circle"
            changed.append(reworded(example, words))
        assert not forced_matches(shipped, TOKENIZER, replace(exam, examples=changed), encode).any()
    too_soon = [reworded(example, [*answer_of(example).split()[:-1], END_OF_CHUNK]) for example in own]
    assert not forced_matches(shipped, TOKENIZER, replace(exam, examples=too_soon), encode).any()
