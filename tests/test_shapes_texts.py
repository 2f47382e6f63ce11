"""What is said about the shapes world: true of its scenes, in known words, the answers marked, nothing leaked."""

import random
import re

import pytest
import torch

import shapes_texts as texts
import shapes_world as world
from interleaved_text import (
    END_OF_CHUNK,
    IMAGE,
    PAD,
    WordTokenizer,
    answer_of,
    join_examples,
    prompt_of,
    tokenize,
)
from shapes_scenes import COLOURS, SHAPES, SIZES, SPLITS, many_scenes, words_of
from shapes_world import Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMING = "called"  # stands between what is seen and its nonce word
MAKERS = {
    "list": lambda rng, split: texts.caption_example(world.sample_scene(rng, split), "list"),
    "describe": lambda rng, split: texts.caption_example(world.sample_scene(rng, split), "describe"),
    "questions": lambda rng, split: texts.question_example(
        world.sample_scene(rng, split), rng.choices(texts.QUESTION_KINDS, k=5), rng
    ),
    "words": lambda rng, split: texts.word_example(rng, 4, split),
    "tasks": lambda rng, split: texts.task_example(rng, 4, split),
    "words as text": lambda rng, split: texts.word_example(rng, 4, split, text_shots=5),
    "words begun as text": lambda rng, split: texts.word_example(rng, 4, split, text_shots=2),
    "tasks as text": lambda rng, split: texts.task_example(rng, 4, split, as_text=True),
}


def many_examples(split="train", count=80):
    for name, make in MAKERS.items():
        rng = random.Random(f"{name} {split}")
        for _ in range(count):
            yield name, make(rng, split)


# ---------------------------------------------------------------------------------------------------- seeds and splits


@pytest.mark.parametrize("split", SPLITS)
def test_examples_keep_to_their_split(split):
    for name, make in MAKERS.items():
        if split == "unseen" and name.startswith("words"):
            continue  # see below
        rng = random.Random(f"{name} {split}")
        for _ in range(20):
            assert {world.scene_split(scene) for scene in make(rng, split).scenes} <= {split}, name


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_unseen_pairs_are_nowhere(split):
    """Neither in a scene nor in words, `is there a purple triangle ?` included."""
    forbidden = [" ".join(pair) for pair in world.UNSEEN_PAIRS]
    assert len(forbidden) == 3
    for _, example in many_examples(split, 150):
        assert not any(thing.is_unseen_pair for scene in example.scenes for thing in scene)
        assert not any(pair in example.text for pair in forbidden)
    rng = random.Random(0)
    for scene in many_scenes(split, 1500):
        question, _ = texts.ask(scene, "is there", rng)
        assert not any(pair in question for pair in forbidden)


def test_words_cannot_be_defined_by_unseen_pairs():
    """Most colours and shapes are in none of them."""
    with pytest.raises(ValueError, match="word episodes are of the splits train and held-out"):
        texts.word_example(random.Random(0), 2, "unseen")


def test_everything_is_decided_by_the_seed():
    tokenizer = WordTokenizer(texts.VOCABULARY)
    for name, make in MAKERS.items():
        one, again, other = (make(random.Random(seed), "held-out") for seed in (7, 7, 8))
        assert one == again, name
        assert one != other, name
    batch, again, other = (
        texts.collate([MAKERS["words"](random.Random(0), "train")], tokenizer, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.input_ids, again.input_ids)
    assert not torch.equal(batch.images, other.images)


# ---------------------------------------------------------------------------------------------------- words


def thing_from_words(place, words):
    size, colour, shape = words
    column, row = place
    index = (int(row) - 1) * 5 + "abcde".index(column)
    return Thing(index, SIZES.index(size), COLOURS.index(colour), SHAPES.index(shape))


def parse_list(text):
    *parts, end = text.split(" ;")
    assert end == " ."
    return tuple(thing_from_words(place, words) for place, *words in map(str.split, parts))


def parse_description(text):
    assert text.endswith(" .")
    scene = []
    for part in text.removesuffix(" .").split(" , "):
        place, words = re.fullmatch(r"in (\w\d) a (\w+ \w+ \w+)", part).groups()
        scene.append(thing_from_words(place, words.split()))
    return tuple(scene)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_say_the_whole_scene(split):
    for scene in many_scenes(split):
        assert parse_list(texts.list_caption(scene)) == scene
        assert parse_description(texts.describe_caption(scene)) == scene
        listed = re.fullmatch(r"<image> list : (.*) <\|endofchunk\|>", texts.caption_example(scene).text)
        described = re.fullmatch(
            r"<image> describe : (.*) <\|endofchunk\|>", texts.caption_example(scene, "describe").text
        )
        assert parse_list(listed[1]) == parse_description(described[1]) == scene


def test_a_scene_in_words_takes_the_image_s_place():
    (scene,) = many_scenes(count=1)
    example = texts.caption_example(scene, "list", see="b3 small red circle ;")
    assert example.text.startswith("b3 small red circle ; list : ")
    assert IMAGE not in example.text


def test_an_unknown_caption_style_is_an_error():
    with pytest.raises(ValueError, match="style must be list or describe; got 'poem'"):
        texts.caption_example(many_scenes(count=1)[0], "poem")


def brute_force_answer(question, scene):
    """The answer from nothing but the question's words and the scene."""
    words = question.removesuffix(" ?").split()
    match words:
        case ["what", "is", "at", place]:
            here = [thing for thing in scene if "abcde"[thing.place % 5] + str(thing.place // 5 + 1) == place]
            return " ".join(words_of(here[0])) if here else "nothing"
        case ["where", "is", "the", *name]:
            there = [thing for thing in scene if words_of(thing)[-len(name) :] == name]
            assert len(there) == 1, "the question must have one answer"
            return "abcde"[there[0].place % 5] + str(there[0].place // 5 + 1)
        case ["how", "many", "objects"]:
            return NUMBERS[len(scene)]
        case ["how", "many", attribute] | ["how", "many", attribute, "objects"]:
            assert (attribute in COLOURS) == (len(words) == 4), "colours are of objects, shapes are objects"
            singular = {"crosses": "cross"}.get(attribute, attribute.removesuffix("s"))
            return NUMBERS[len([thing for thing in scene if singular in words_of(thing)])]
        case ["is", "there", "a", colour, shape]:
            return "yes" if [colour, shape] in [words_of(thing)[1:] for thing in scene] else "no"
    raise AssertionError(f"not a question: {question}")


@pytest.mark.parametrize("kind", texts.QUESTION_KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(kind, split):
    rng = random.Random(f"{kind} {split}")
    for scene in many_scenes(split, 600):
        question, answer = texts.ask(scene, kind, rng)
        assert question.endswith(" ?")
        assert brute_force_answer(question, scene) == answer


def test_each_kind_asks_its_own_question():
    openings = {"what is at": "what is at", "where is": "where is the", "how many": "how many objects"}
    openings |= {"how many of": "how many", "is there": "is there a"}
    rng = random.Random(0)
    for scene in many_scenes(count=300, max_objects=4):
        if all(sum(words_of(one) == words_of(other) for other in scene) > 1 for one in scene):
            continue  # nothing but twins: see below
        for kind, opening in openings.items():
            question, _ = texts.ask(scene, kind, rng)
            assert question.startswith(f"{opening} ")
        assert texts.ask(scene, "how many of", rng)[0] != "how many objects ?"


def test_size_is_named_only_where_colour_and_shape_do_not_tell():
    rng = random.Random(0)
    sized = 0
    for scene in many_scenes(count=3000):
        question, _ = texts.ask(scene, "where is", rng)
        name = question.removeprefix("where is the ").removesuffix(" ?").split()
        if question.startswith("where") and len(name) == 3:
            sized += 1
            assert [words_of(thing)[1:] for thing in scene].count(name[1:]) > 1
    rng = random.Random(1)
    two_sizes = (Thing(3, 0, 1, 1), Thing(7, 1, 1, 1))
    questions = {texts.ask(two_sizes, "where is", rng) for _ in range(50)}
    assert questions == {("where is the small green square ?", "d1"), ("where is the large green square ?", "c2")}
    assert sized < 100, "in most scenes something stands once"


def test_where_falls_back_on_what_for_a_scene_of_twins():
    twins = (Thing(3, 0, 1, 1), Thing(7, 0, 1, 1))
    rng = random.Random(0)
    for _ in range(20):
        question, answer = texts.ask(twins, "where is", rng)
        assert question.startswith("what is at")
        assert brute_force_answer(question, twins) == answer


def test_answers_cannot_be_guessed_from_the_question_alone():
    """Half of `is there` is yes, one place in five is empty, and counts take all their values."""
    rng = random.Random(0)
    scenes = many_scenes(count=2000)
    answers = {kind: [texts.ask(scene, kind, rng)[1] for scene in scenes] for kind in texts.QUESTION_KINDS}
    assert abs(answers["is there"].count("yes") / 2000 - 0.5) < 0.06
    assert abs(answers["what is at"].count("nothing") / 2000 - 0.2) < 0.05
    assert set(answers["how many"]) == set(NUMBERS[1:])
    assert {"zero", "one", "two", "three"} <= set(answers["how many of"])
    assert {answer for answer in answers["where is"] if len(answer) == 2} == set(world.PLACES)


def test_an_unknown_question_is_an_error():
    with pytest.raises(ValueError, match=r"question kind must be one of .*; got 'why'"):
        texts.ask(many_scenes(count=1)[0], "why", random.Random(0))


@pytest.mark.parametrize("meanings", [2, 3, 4])
@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("text_shots", [0, 5, 13])
def test_words_mean_the_same_all_through_an_episode(split, text_shots, meanings):
    """Each word is one value of the episode's attribute, and the other way round; what else the things have is free.
    The first things are in words, if so wanted, and the others are images."""
    rng = random.Random(f"{split} {text_shots}")
    attributes, complete = [], 0
    for _ in range(80):
        example = texts.word_example(rng, 12, split, text_shots, meanings)
        shown = re.findall(rf"(\S+(?: \S+)*?) {NAMING} (\w+) <\|endofchunk\|>", example.text)
        assert len(shown) == 13
        assert [see == IMAGE for see, _ in shown] == [i >= text_shots for i in range(13)]
        assert all(len(scene) == 1 and world.scene_split(scene) == split for scene in example.scenes)
        in_images = [words_of(scene[0]) for scene in example.scenes]
        things = [see.split() for see, _ in shown[:text_shots]] + in_images
        assert len(things) == 13
        words = [word for _, word in shown]
        assert set(words) <= set(texts.NONCE_WORDS)
        assert len(set(words)) <= meanings
        complete += len(set(words)) == meanings
        explained_by = []
        for attribute, index in (("colour", 1), ("shape", 2)):
            values = [thing[index] for thing in things]
            if len(set(values)) == len(set(words)) == len(set(zip(values, words, strict=True))):
                explained_by.append(attribute)
        assert explained_by
        attributes += explained_by
    assert complete > 60, "one in ten episodes of four words is too short to show them all"
    assert min(attributes.count("colour"), attributes.count("shape")) > 20


def test_the_two_words_of_an_episode_are_equally_likely():
    rng = random.Random(0)
    same = 0
    for _ in range(1000):
        words = texts.word_example(rng, 1).text.split()
        same += words[words.index(NAMING) + 1] == words[-2]
    assert abs(same / 1000 - 0.5) < 0.08


@pytest.mark.parametrize("as_text", [False, True])
def test_the_shots_of_a_task_show_one_attribute(as_text):
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        example = texts.task_example(rng, 6, "held-out", as_text)
        shown = re.findall(r"(\S+(?: \S+)*?) output : (\w+) <\|endofchunk\|>", example.text)
        assert len(shown) == len(example.scenes) == 7
        full = [[world.PLACES[scene[0].place], *words_of(scene[0])] for scene in example.scenes]
        assert [see for see, _ in shown] == ([" ".join(words) for words in full] if as_text else [IMAGE] * 7)
        fitting = [i for i in range(4) if all(words[i] == said for words, (_, said) in zip(full, shown, strict=True))]
        assert fitting
        seen |= set(fitting)
    assert seen == {0, 1, 2, 3}


def test_there_is_one_image_token_for_each_scene():
    for name, example in many_examples("held-out"):
        images = example.text.split().count(IMAGE)
        assert images == (0 if name == "tasks as text" else len(example.scenes))


# ---------------------------------------------------------------------------------------------------- tokens


def test_the_vocabulary_has_no_word_twice():
    assert len(set(texts.VOCABULARY)) == len(texts.VOCABULARY)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_every_text_round_trips(split):
    tokenizer = WordTokenizer(texts.VOCABULARY)
    for _, example in many_examples(split):
        ids = tokenizer.encode(example.text)
        assert len(ids) == len(example.answers)
        assert tokenizer.decode(ids) == example.text
        assert tokenizer.decode(torch.tensor([tokenizer.pad_id, *ids, tokenizer.pad_id])) == example.text


def test_every_word_of_the_vocabulary_is_its_own_token():
    tokenizer = WordTokenizer(texts.VOCABULARY)
    assert tokenizer.encode(" ".join(texts.VOCABULARY)) == list(range(len(tokenizer)))
    assert [tokenizer.words[i] for i in (tokenizer.pad_id, tokenizer.image_id, tokenizer.eoc_id)] == [
        PAD, IMAGE, END_OF_CHUNK,
    ]  # fmt: skip


def answers_by_reading(words):
    """Which words are answers: those behind `?`, `:` and `called`, up to the end of their chunk."""
    marks, answering = [], False
    for word in words:
        marks.append(answering)
        if word == END_OF_CHUNK:
            answering = False
        elif word in ("?", ":", NAMING):
            answering = True
    return marks


def test_labels_mark_answers_and_nothing_else():
    tokenizer = WordTokenizer(texts.VOCABULARY)
    examples = [example for _, example in many_examples(count=40)]
    examples.append(join_examples(examples[:2]))
    ids, labels = tokenize(examples, tokenizer, length=128)
    assert ids.shape == labels.shape == (len(examples), 128)
    for row, marked, example in zip(ids.tolist(), labels.tolist(), examples, strict=True):
        words = example.text.split()
        expected = [
            token if is_answer else -100 for token, is_answer in zip(row, answers_by_reading(words), strict=False)
        ]
        assert row == tokenizer.encode(example.text) + [tokenizer.pad_id] * (128 - len(words))
        assert marked == expected + [-100] * (128 - len(words))
        assert any(label == tokenizer.eoc_id for label in marked), "where to stop is learned too"


def test_prompt_and_answer_are_the_whole_text():
    for name, example in many_examples("held-out"):
        prompt, answer = prompt_of(example), answer_of(example)
        assert f"{prompt} {answer} {END_OF_CHUNK}" == example.text, name
        assert END_OF_CHUNK not in answer
        assert prompt.split()[-1] in ("?", ":", NAMING)
    scene = (Thing(7, 1, 0, 0),)
    listed = texts.caption_example(scene)
    assert (prompt_of(listed), answer_of(listed)) == ("<image> list :", "c2 large red circle ; .")


def test_a_batch_holds_each_row_s_images_in_order_then_black_ones():
    """Rendering all scenes of the batch in reading order is what puts them there."""
    tokenizer = WordTokenizer(texts.VOCABULARY)
    examples = [MAKERS[name](random.Random(0), "train") for name in ("list", "words", "questions")]
    batch = texts.collate(examples, tokenizer, torch.Generator().manual_seed(3), length=64)
    flat = world.render([scene for example in examples for scene in example.scenes], torch.Generator().manual_seed(3))
    assert batch.images.shape == (3, 5, 3, 80, 80)
    assert torch.equal(batch.images[0, 0], flat[0])
    assert torch.equal(batch.images[1], flat[1:6])
    assert torch.equal(batch.images[2, 0], flat[6])
    assert not batch.images[0, 1:].any() and not batch.images[2, 1:].any()
    assert batch.scenes == [example.scenes for example in examples]
    ids, labels = tokenize(examples, tokenizer, 64)
    assert torch.equal(batch.input_ids, ids) and torch.equal(batch.labels, labels)
