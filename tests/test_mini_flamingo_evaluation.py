"""Exams are fixed and held out, scores are plain counts, controls do what they say, answers are the model's words."""

import json
import random
from functools import partial

import pytest
import torch

import mini_flamingo_evaluation as evaluation
import shapes_texts as texts
from interleaved_text import END_OF_CHUNK, IMAGE, ExampleWriter, WordTokenizer, answer_of, prompt_of
from mini_flamingo_evaluation import Exam, answers, attribute_accuracy, exact_match, scores
from reporting import write_json
from shapes_scenes import many_scenes
from shapes_world import Thing, render, scene_split
from tiny_shapes import talkative_flamingo

TOKENIZER = WordTokenizer(texts.VOCABULARY)
EXAMS = {
    "captions": evaluation.caption_exam,
    "captions in words": partial(evaluation.caption_exam, style="describe"),
    "captions of ten": partial(evaluation.caption_exam, objects=(1, 10)),
    **{kind: partial(evaluation.question_exam, kind) for kind in texts.QUESTION_KINDS},
    "words": partial(evaluation.word_exam, 2),
}


@pytest.fixture
def model():
    return talkative_flamingo()


@pytest.fixture
def short(monkeypatch):
    """A model that has not learned to stop is cut off early; small batches, so that an exam has several."""
    monkeypatch.setattr(evaluation, "MAX_WORDS", 6)
    monkeypatch.setattr(evaluation, "BATCH", 4)


# ---------------------------------------------------------------------------------------------------- exams


@pytest.mark.parametrize("name", EXAMS)
def test_an_exam_follows_from_its_seed_alone(name):
    make = EXAMS[name]
    exam = make(count=6)
    random.seed(1)
    torch.manual_seed(1)
    again, other = make(count=6), make(count=6, seed=17)
    assert exam.examples == again.examples and torch.equal(exam.images, again.images)
    assert exam.examples != other.examples and not torch.equal(exam.images, other.images)


@pytest.mark.parametrize("name", EXAMS)
def test_no_exam_shows_what_was_trained_on(name):
    exam = EXAMS[name](count=40)
    assert {scene_split(scene) for example in exam.examples for scene in example.scenes} == {"held-out"}
    assert not any(" ".join(pair) in example.text for pair in texts.UNSEEN_PAIRS for example in exam.examples)


@pytest.mark.parametrize("name", EXAMS)
def test_an_exam_s_images_are_its_scenes(name):
    """Drawn in reading order, one for each <image>."""
    exam = EXAMS[name](count=5, seed=4)
    drawn = render([scene for each in exam.examples for scene in each.scenes], torch.Generator().manual_seed(4))
    assert torch.equal(exam.images.flatten(0, 1), drawn)
    for example in exam.examples:
        assert example.text.split().count(IMAGE) == len(example.scenes) == exam.images.shape[1]


def objects_in(exam):
    return {len(scene) for example in exam.examples for scene in example.scenes}


def test_scenes_have_as_many_objects_as_the_exam_says():
    assert objects_in(evaluation.caption_exam(300)) == set(range(1, 9))
    for fewest, most in ((1, 3), (8, 10), (5, 5)):
        exam = evaluation.caption_exam(300, objects=(fewest, most))
        assert objects_in(exam) == set(range(fewest, most + 1))
    exam = evaluation.caption_exam(20, "unseen")
    assert {scene_split(example.scenes[0]) for example in exam.examples} == {"unseen"}


@pytest.mark.parametrize(
    ("kind", "opening"),
    [
        ("what is at", "what is at "),
        ("where is", "where is the "),
        ("how many", "how many objects ?"),
        ("how many of", "how many "),
        ("is there", "is there a "),
    ],
)
def test_a_question_exam_asks_its_own_question(kind, opening):
    """Also where a scene has no such question to ask: it is passed over."""
    exam = evaluation.question_exam(kind, 300, max_objects=2)
    assert all(prompt_of(example).startswith(f"{IMAGE} {opening}") for example in exam.examples)
    assert len(exam.examples) == 300


@pytest.mark.parametrize("shots", [0, 1, 8])
def test_a_word_exam_shows_its_shots_before_it_asks(shots):
    exam = evaluation.word_exam(shots, 5)
    assert exam.images.shape[:2] == (5, shots + 1)
    for example in exam.examples:
        assert prompt_of(example).split().count(END_OF_CHUNK) == shots
        assert answer_of(example) in texts.NONCE_WORDS


def test_the_standard_exams_are_all_kinds():
    exams = evaluation.held_out_exams(3)
    assert list(exams) == ["caption", "caption in words", *texts.QUESTION_KINDS, "new word, 8 shots"]
    assert {len(exam.examples) for exam in exams.values()} == {3}
    assert " list : " in exams["caption"].examples[0].text
    assert " describe : " in exams["caption in words"].examples[0].text


# ---------------------------------------------------------------------------------------------------- scores


def test_an_exact_match_is_right_word_for_word():
    exam = evaluation.caption_exam(8)
    truth = [answer_of(example) for example in exam.examples]
    assert exact_match(truth, exam) == 1
    for spoiled in (
        "",
        truth[0] + " .",
        truth[0].removesuffix(" ; ."),
        truth[0].replace("small", "large") if "small" in truth[0] else truth[0].replace("large", "small"),
        truth[1],
        f"{truth[0]} {END_OF_CHUNK}",
    ):
        assert exact_match([spoiled, *truth[1:]], exam) == 7 / 8
    assert exact_match(truth[1:] + truth[:1], exam) == 0
    with pytest.raises(ValueError, match="zip"):
        exact_match(truth[:-1], exam)


SCENE = (Thing(0, 1, 0, 0), Thing(6, 0, 2, 1))  # a1 large red circle ; b2 small blue square ; .


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a1 large red circle ; b2 small blue square ; .", 6),
        ("b2 small blue square ; a1 large red circle ; .", 6),
        ("a1 large red circle ; b2 small blue square ; c3 small white cross ; .", 6),
        ("a1 large red circle ; b2 large blue square ; .", 5),
        ("a1 large red square ; b2 small blue circle ; .", 4),
        ("a1 small blue square ; b2 large red circle ; .", 0),
        ("a1 large red circle ; .", 3),
        ("a1 large red circle ; c2 small blue square ; .", 3),
        ("a1 large red circle ; b2 small blue", 5),
        ("a1 large red circle ; b2 ; .", 3),
        ("a1 red large circle ; b2 small blue square ; .", 4),
        ("a1 red circle ; b2 small blue square ; .", 3),
        ("a1 large red circle large ; b2 small blue square square", 6),
        ("; ; a1 large red circle ;;; b2 small blue square", 6),
        ("a1 large red circle b2 small blue square", 3),
        ("a1 small red circle ; a1 large red circle ; .", 3),
        ("a1 large red circle ; a1 small white cross ; .", 0),
        ("nothing", 0),
        (" . ", 0),
        ("", 0),
    ],
)
def test_attributes_are_counted_at_their_places(caption, right):
    """Whatever a model says: garbled captions are no errors. Of a place named twice the last word counts."""
    assert attribute_accuracy([caption], [SCENE]) == pytest.approx(right / 6)


def test_attributes_are_counted_over_all_scenes():
    scenes = many_scenes("held-out", 30)
    captions = [texts.list_caption(scene) for scene in scenes]
    assert attribute_accuracy(captions, scenes) == 1
    blank = ["", *captions[1:]]
    total = sum(map(len, scenes))
    assert attribute_accuracy(blank, scenes) == pytest.approx(1 - len(scenes[0]) / total)


def test_scores_are_the_exact_match_of_each_exam(model, short):
    exams = {"one": evaluation.caption_exam(5), "other": evaluation.question_exam("how many", 5)}
    said = {name: answers(model, TOKENIZER, exam) for name, exam in exams.items()}
    assert scores(model, TOKENIZER, exams) == {name: exact_match(said[name], exams[name]) for name in exams}
    heard = {name: Exam([example_saying(said[name][i]) for i in range(5)], exams[name].images) for name in exams}
    assert all(exact_match(said[name], heard[name]) == 1 for name in exams)


def example_saying(words):
    return ExampleWriter().add(IMAGE, f"{words} {END_OF_CHUNK}").example(SCENE)


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["captions", "where is", "words"])
def test_answers_are_what_each_row_generates_alone(name, short):
    """In batches, padded: with prompts of different lengths, and a last batch of one. Rows that stop early included."""
    model = talkative_flamingo()
    exam = EXAMS[name](count=9)
    if name == "captions":
        exam = Exam(exam.examples + evaluation.question_exam("where is", 4).examples, torch.cat([exam.images] * 2)[:13])
    said = answers(model, TOKENIZER, exam)
    assert len(said) == len(exam.examples)
    for words, example, images in zip(said, exam.examples, exam.images, strict=True):
        ids = torch.tensor([TOKENIZER.encode(prompt_of(example))])
        row = model.generate(ids, images[None], max_new_tokens=6)[0].tolist()
        row = row[: row.index(TOKENIZER.eoc_id)] if TOKENIZER.eoc_id in row else row
        assert words == " ".join(TOKENIZER.words[i] for i in row)
    assert len(set(said)) > 2, "the model must say various things for this to mean something"


def test_answers_end_at_the_end_of_the_chunk(model, short, monkeypatch):
    """Which is not among the words, and neither is what stands behind it."""
    exam = evaluation.caption_exam(2)
    spoken = torch.tensor([[8, 9, TOKENIZER.eoc_id, TOKENIZER.pad_id], [TOKENIZER.eoc_id] + [TOKENIZER.pad_id] * 3])
    monkeypatch.setattr(model, "generate", lambda *_, **__: spoken)
    assert answers(model, TOKENIZER, exam) == [f"{TOKENIZER.words[8]} {TOKENIZER.words[9]}", ""]


def test_every_answer_goes_through_encode(model, short):
    """On the exam's images, in order, and what comes out of it is all that the model sees of them."""
    exam, seen = evaluation.caption_exam(6), []

    def encode(images):
        seen.append(images)
        return model.encode_media(images.flip(0))

    said = answers(model, TOKENIZER, exam, encode)
    assert torch.equal(torch.cat(seen), exam.images)
    flipped = torch.cat([batch.flip(0) for batch in exam.images.split(4)])
    assert said == answers(model, TOKENIZER, Exam(exam.examples, flipped)) != answers(model, TOKENIZER, exam)


# ---------------------------------------------------------------------------------------------------- controls


@torch.no_grad()
def test_blanked_images_say_nothing(model):
    """All of one grey; the questions stay, and so does the exam itself."""
    one, other = (evaluation.word_exam(2, 3, seed=seed) for seed in (1, 2))
    before, blank = one.images.clone(), evaluation.blanked(one)
    assert blank.examples == one.examples and torch.equal(one.images, before)
    assert (blank.images == 96).all()
    assert (blank.images.shape, blank.images.dtype) == (one.images.shape, torch.uint8)
    assert torch.equal(blank.images, evaluation.blanked(other).images)
    assert not torch.allclose(model.encode_media(blank.images), model.encode_media(one.images), atol=0.01)


def test_shuffled_images_are_another_prompt_s(short):
    """Nobody keeps their own, none is lost, over the whole exam and not its batches; several images of one prompt stay
    together in order."""
    exam = evaluation.word_exam(2, 9)
    before, moved = exam.images.clone(), evaluation.shuffled(exam)
    assert moved.examples == exam.examples and torch.equal(exam.images, before)
    owner = [[torch.equal(row, other) for other in exam.images].index(True) for row in moved.images]
    assert owner == [8, 0, 1, 2, 3, 4, 5, 6, 7]


@torch.no_grad()
def test_random_latents_are_a_fixed_choice_of_the_visual_tokens(model):
    images = evaluation.caption_exam(3).images
    every = model.encode_media(images)
    some = evaluation.random_latents(model, 32)(images)
    assert some.shape == (3, 1, 32, every.shape[-1])
    chosen = [(every[0, 0] == token).all(-1).nonzero().item() for token in some[0, 0]]
    assert len(set(chosen)) == 32 and sorted(chosen) != list(range(32))
    assert torch.equal(some, every[:, :, chosen]), "the same of every image"
    again, other = (evaluation.random_latents(model, 32, seed)(images) for seed in (0, 1))
    assert torch.equal(some, again) and not torch.equal(some, other)
    complete = evaluation.random_latents(model, 64)(images)
    torch.testing.assert_close(complete.sum(2), every.sum(2))


def test_controls_change_what_is_said(model, short):
    """Of a model that looks at its images; one with closed gates does not notice."""
    exam = evaluation.question_exam("what is at", 8)
    for each, sees in ((model, True), (talkative_flamingo(gate=0.0), False)):
        said = answers(each, TOKENIZER, exam)
        for control in (evaluation.blanked, evaluation.shuffled):
            assert (answers(each, TOKENIZER, control(exam)) != said) == sees
        assert (answers(each, TOKENIZER, exam, evaluation.random_latents(each, 4)) != said) == sees


# ---------------------------------------------------------------------------------------------------- the report


def test_unseen_pairs_are_judged_by_colour_and_shape(model, monkeypatch):
    unseen, seen = Thing(0, 0, 4, 2), Thing(3, 1, 0, 0)  # small purple triangle at a1, large red circle at d1
    assert unseen.is_unseen_pair and not seen.is_unseen_pair
    exam = evaluation.exam_of([texts.caption_example((unseen, seen))] * 5, seed=0)
    said = ["a1 large purple triangle ; .", "a1 small purple square ; .", "a1 small red triangle ; .", "b1 red ; .", ""]
    monkeypatch.setattr(evaluation, "answers", lambda *_: said)
    outcomes = evaluation.unseen_pairs_named(model, exam)
    assert outcomes == {"things": 5, "right colour and shape": 1, "another shape": 1, "another colour": 1}


def test_the_report_is_complete(model, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "MAX_WORDS", 1)
    report = evaluation.full_report(model, count=2)
    keys = {
        "right": list(evaluation.held_out_exams(1)),
        "blank": list(evaluation.held_out_exams(1)),
        "shuffled": list(evaluation.held_out_exams(1)),
        "attributes": ["caption", "caption, unseen pairs"],
        "unseen pairs named": ["things", "right colour and shape", "another shape", "another colour"],
        "new word by shots": ["0", "1", "2", "4", "8"],
        "caption by latents": ["64", "48", "32", "16", "8", "4"],
        "caption by depth": ["1", "2", "3", "4"],
    }
    assert {name: list(part) for name, part in report.items() if isinstance(part, dict)} == keys
    assert report.keys() - keys == {"questions of each kind", "caption, unseen pairs", "caption by random latents"}
    assert report["questions of each kind"] == 2
    assert len(report["caption by random latents"]) == 3
    things, *outcomes = report["unseen pairs named"].values()
    assert things >= 2 and sum(outcomes) <= things, "every such scene holds one at least"
    shares = [share for name in keys if name != "unseen pairs named" for share in report[name].values()]
    shares += [report["caption, unseen pairs"], *report["caption by random latents"]]
    assert all(0 <= share <= 1 for share in shares)
    assert json.loads(write_json(tmp_path / "report.json", report).read_text()) == report


@pytest.fixture
def report_where(monkeypatch):
    """-> a function: the report of a model that is right in those exams where a condition holds of what it sees (the
    visual tokens), of the tokens of the exam's own images, and of the scenes asked about."""

    @torch.no_grad()
    def report(condition):
        drawn, exam_of = [], evaluation.exam_of

        def remembered(examples, seed):
            drawn.append(exam_of(examples, seed))
            return drawn[-1]

        def say(model, tokenizer, exam, encode=None):
            (own,) = (model.encode_media(each.images) for each in drawn if each.examples is exam.examples)
            media = (encode or model.encode_media)(exam.images)
            right = condition(media, own, [scene for example in exam.examples for scene in example.scenes])
            return [answer_of(example) if right else "?" for example in exam.examples]

        monkeypatch.setattr(evaluation, "exam_of", remembered)
        monkeypatch.setattr(evaluation, "answers", say)
        return evaluation.full_report(talkative_flamingo(), count=2)

    return report


def is_own(media, own, scenes):
    return media.shape == own.shape and torch.equal(media, own)


def is_blank(media, own, scenes):
    return torch.allclose(media[0], media[1])


def is_shuffled(media, own, scenes):
    return media.shape == own.shape and torch.allclose(media, own.flip(0), atol=1e-5) and not is_own(media, own, scenes)


def test_the_report_is_of_what_the_model_sees(report_where):
    report = report_where(is_own)
    assert set(report["right"].values()) == set(report["attributes"].values()) == {1}
    assert set(report["new word by shots"].values()) == {report["caption, unseen pairs"]} == {1}
    assert set(report["shuffled"].values()) == set(report["blank"].values()) == {0}
    assert report["caption by latents"] == {"64": 1, "48": 0, "32": 0, "16": 0, "8": 0, "4": 0}
    assert report["caption by random latents"] == [0, 0, 0]
    assert report["caption by depth"] == {"1": 0, "2": 0, "3": 0, "4": 1}


@pytest.mark.parametrize(("name", "condition"), [("blank", is_blank), ("shuffled", is_shuffled)])
def test_the_report_s_controls_are_those_they_are_called(report_where, name, condition):
    """Two prompts, so each has the other's images."""
    report = report_where(condition)
    for other in ("right", "blank", "shuffled"):
        assert set(report[other].values()) == {int(other == name)}


def test_fewer_visual_tokens_and_layers_are_tried_on_full_scenes(monkeypatch):
    """Of 8 to 10 objects. What stands beside it is of 1 to 8."""

    def say(model, tokenizer, exam, encode=None):
        return [answer_of(example) if objects_in(exam) == {8, 9, 10} else "?" for example in exam.examples]

    monkeypatch.setattr(evaluation, "answers", say)
    report = evaluation.full_report(talkative_flamingo(), count=12)
    parts = ("caption by latents", "caption by depth")
    assert {share for part in parts for share in report[part].values()} == {1}
    assert report["caption by random latents"] == [1, 1, 1]
    assert set(report["right"].values()) == set(report["attributes"].values()) == {0}


def test_unseen_pairs_are_tried_on_scenes_that_have_them(report_where):
    report = report_where(lambda media, own, scenes: {scene_split(scene) for scene in scenes} == {"unseen"})
    assert report["caption, unseen pairs"] == 1
    assert report["attributes"] == {"caption": 0, "caption, unseen pairs": 1}
    others = ("right", "blank", "shuffled", "new word by shots", "caption by latents", "caption by depth")
    assert {share for part in others for share in report[part].values()} == {0}


def test_the_report_s_latents_are_first_ones_and_three_random_choices(report_where):
    chosen = []

    def watched(media, own, scenes):
        if media.shape[2] < own.shape[2]:
            chosen.append((media, own))
        return True

    report_where(watched)
    assert [media.shape[2] for media, _ in chosen] == [48, 32, 16, 8, 4, 32, 32, 32]
    halves = [media for media, _ in chosen[5:]]
    for number, half in enumerate(halves):
        own = chosen[5 + number][1]
        which = [(own[0, 0] == token).all(-1).nonzero().item() for token in half[0, 0]]
        assert len(set(which)) == 32 and sorted(which) != list(range(32))
        assert not any(torch.equal(half, other) for other in halves[:number])
