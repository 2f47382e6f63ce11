"""The shipped Mini Flamingo really sees: its accuracy on held-out scenes, and that its visual tokens carry objects.

The bounds are those the project promises; the figures themselves are in data/mini_flamingo/training.json.
"""

from functools import partial

import pytest
import torch

import mini_flamingo_evaluation as evaluation
from mini_flamingo_checkpoint import SHIPPED, load_mini_flamingo, load_tokenizer, load_weights
from reporting import read_json
from sample_images import FOLDER, load_samples
from shapes_curriculum import ShapesCurriculum, scene_targets
from shapes_texts import QUESTION_KINDS, VOCABULARY
from token_reader import TokenReader, reading_accuracy

COUNT = 256


@pytest.fixture(scope="module")
def model():
    return load_mini_flamingo()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def captions():
    return evaluation.caption_exam(COUNT)


@pytest.fixture(scope="module")
def said(model, tokenizer, captions):
    """The model's captions of these scenes."""
    return evaluation.answers(model, tokenizer, captions)


def test_the_shipped_vocabulary_is_the_world_s(tokenizer):
    assert tokenizer.words == VOCABULARY


def test_the_shipped_files_stay_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 40e6


def test_captions_are_exact_and_their_attributes_right(captions, said):
    assert evaluation.exact_match(said, captions) >= 0.95
    assert evaluation.attribute_accuracy(said, [example.scenes[0] for example in captions.examples]) >= 0.99


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("what is at", 0.97), ("where is", 0.90), ("how many", 0.95), ("how many of", 0.95), ("is there", 0.95)],
)
def test_questions_are_answered(model, tokenizer, kind, bound):
    exam = evaluation.question_exam(kind, 2 * COUNT)
    assert evaluation.exact_match(evaluation.answers(model, tokenizer, exam), exam) >= bound


def test_new_words_are_learned_from_shots(model, tokenizer):
    exams = {shots: evaluation.word_exam(shots, COUNT) for shots in (0, 8)}
    right = evaluation.scores(model, tokenizer, exams)
    assert right[8] >= 0.85
    assert right[0] <= 0.25, "without shots there is nothing to know the word from"


def test_without_the_images_everything_is_guessed(model, tokenizer):
    exams = {kind: evaluation.question_exam(kind, COUNT // 2) for kind in QUESTION_KINDS}
    exams["caption"], exams["word"] = evaluation.caption_exam(COUNT // 4), evaluation.word_exam(8, COUNT // 4)
    # the most that guessing by the answers' own frequencies can reach, and some room for chance
    guess = {"is there": 0.62, "what is at": 0.3, "how many of": 0.4, "word": 0.7}
    for control in (evaluation.blanked, evaluation.shuffled):
        right = evaluation.scores(model, tokenizer, {name: control(exam) for name, exam in exams.items()})
        assert not [(name, score) for name, score in right.items() if score > guess.get(name, 0.25)]


def test_quality_rises_with_the_visual_tokens(model, tokenizer):
    """On full scenes, where every token is needed: 64 tokens above 32 above 16 above 8."""
    crowded = evaluation.caption_exam(COUNT, objects=(8, 10))
    right = []
    for count in (8, 16, 32, 64):
        first = partial(model.encode_media, num_latents=count)
        right.append(evaluation.exact_match(evaluation.answers(model, tokenizer, crowded, first), crowded))
    assert right == sorted(right) and len(set(right)) == 4, right


def test_a_random_half_of_the_visual_tokens_is_not_enough(model, tokenizer, captions, said):
    some = evaluation.Exam(captions.examples[: COUNT // 2], captions.images[: COUNT // 2])
    halves = [
        evaluation.exact_match(
            evaluation.answers(model, tokenizer, some, evaluation.random_latents(model, 32, seed)), some
        )
        for seed in range(3)
    ]
    assert sum(halves) / len(halves) <= evaluation.exact_match(said, captions) - 0.30, halves


def test_the_reader_s_warm_up_head_still_reads_the_tokens(model):
    reader = TokenReader(model.config.vision_dim, ShapesCurriculum.reading)
    load_weights(SHIPPED / "token_reader.safetensors", reader)
    exam = evaluation.caption_exam(64, seed=11)
    with torch.inference_mode():
        logits = reader(model.encode_media(exam.images)[:, 0])
    accuracy = reading_accuracy(logits, scene_targets([example.scenes[0] for example in exam.examples]))
    assert min(accuracy[name] for name in ("colour", "shape", "size")) >= 0.98


def test_sample_images_are_described_as_they_are(model, tokenizer):
    samples = load_samples(FOLDER, model.config.image_size)
    right = 0
    for sample in samples:
        ids = model.generate(tokenizer.pad_left([sample["prompt"]]), sample["pixels"][None])
        right += tokenizer.decode(ids[0]).removesuffix("<|endofchunk|>").strip() == sample["truth"]
    assert right >= len(samples) - 1


def test_the_record_says_what_the_weights_score(captions, said):
    recorded = read_json(SHIPPED / "training.json")["report"]["right"]["caption"]
    assert abs(evaluation.exact_match(said, captions) - recorded) <= 0.03
