"""What training shows of the shapes world: training scenes alone, texts that fit, the labels of the right scenes."""

import random
from collections import Counter
from functools import partial

import pytest
import torch

import shapes_curriculum as curriculum
import shapes_texts as texts
import shapes_world as world
from interleaved_text import END_OF_CHUNK, IMAGE, UNASKED, WordTokenizer, join_examples
from mini_flamingo import preset
from shapes_curriculum import PAIRS, ShapesCurriculum, scene_targets
from shapes_scenes import COLOURS, SHAPES
from shapes_world import Thing
from training_loop import Step

MAKERS = {  # each kind of training text, and the length it must fit
    "text": (curriculum.text_example, curriculum.TEXT_LENGTH),
    "single image": (curriculum.single_image_example, curriculum.CHUNK_LENGTH),
    "several images": (curriculum.several_images_example, curriculum.TEXT_LENGTH),
    "words": (partial(texts.word_example, shots=8), curriculum.CHUNK_LENGTH),
    "tasks": (partial(texts.task_example, shots=8), curriculum.CHUNK_LENGTH),
    "counting": (curriculum.counting_example, curriculum.CHUNK_LENGTH),
    "bridged words": (curriculum.bridged_word_example, curriculum.CHUNK_LENGTH),
}
INTERLEAVED = {  # the stages on images and text, and their share of batches of each kind
    "align": {"single": 0.6, "several": 0.15, "word": 0.2, "task": 0.05},
    "few_shot": {"single": 0.45, "several": 0.05, "word": 0.45, "task": 0.05},
    "counting": {"counting": 0.75, "single": 0.1, "word": 0.15},
    "everything": {"single": 0.45, "counting": 0.25, "several": 0.1, "word": 0.15, "task": 0.05},
}


def scenes_of_all_splits(count=60):
    rng = random.Random(0)
    return [world.sample_scene(rng, rng.choice(["train", "held-out", "unseen"])) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("kind", MAKERS)
def test_examples_come_from_the_training_split_and_fit(kind):
    make, length = MAKERS[kind]
    tokenizer, rng = WordTokenizer(texts.VOCABULARY), random.Random(kind)
    for _ in range(600):
        example = make(rng)
        assert all(world.scene_split(scene) == "train" for scene in example.scenes)
        assert not any(" ".join(pair) in example.text for pair in world.UNSEEN_PAIRS)
        ids = tokenizer.encode(example.text)
        assert len(ids) == len(example.answers) <= length
        assert ids[-1] == tokenizer.eoc_id


@pytest.mark.parametrize("kind", MAKERS)
def test_the_longest_examples_fit(kind, monkeypatch):
    """Every scene as full as it may be, every question the longest there is."""
    make, length = MAKERS[kind]
    sample, longest = world.sample_scene, ("where is the large red circle ?", "b3")
    rng = random.Random(kind)
    for question_kind in texts.QUESTION_KINDS:
        for _ in range(100):
            question, answer = texts.ask(sample(rng), question_kind, rng)
            assert len(f"{question} {answer}".split()) <= len(" ".join(longest).split())
    monkeypatch.setattr(texts, "ask", lambda *_: longest)

    def sample_full(rng, split="train", min_objects=1, max_objects=10):
        return sample(rng, split, max_objects, max_objects)

    monkeypatch.setattr(world, "sample_scene", sample_full)
    assert max(len(make(rng).text.split()) for _ in range(200)) <= length


def test_a_scene_in_words_is_the_scene_in_any_order():
    rng = random.Random(0)
    scene = world.sample_scene(rng, min_objects=4, max_objects=4)
    orders = {curriculum.in_words(scene, rng) for _ in range(200)}
    assert len(orders) == 24
    things = sorted(f"{thing.place_word} {thing.words}" for thing in scene)
    for words in orders:
        assert sorted(words.removesuffix(" ; .").split(" ; ")) == things


def test_text_alone_says_what_it_asks_about():
    """The scene stands in words where the image would be; one in seven is left out."""
    rng = random.Random(0)
    left_out = total = 0
    for _ in range(1500):
        example = curriculum.text_example(rng)
        if len(example.scenes) != 1:  # an episode
            assert IMAGE not in example.text
            continue
        total += 1
        if example.text.startswith(IMAGE):
            left_out += 1
            continue
        (scene,) = example.scenes
        seen = example.text[: example.text.index(" .")].split(" ;")
        assert sorted(part.strip() for part in seen if part) == sorted(f"{t.place_word} {t.words}" for t in scene)
        assert IMAGE not in example.text
    assert abs(left_out / total - 0.15) < 0.04


@pytest.mark.parametrize("weights", [curriculum.QUESTION_WEIGHTS, curriculum.COUNTING_WEIGHTS])
def test_questions_are_drawn_as_weighted(weights):
    assert set(weights) == set(texts.QUESTION_KINDS)
    assert sum(weights.values()) == pytest.approx(1)
    drawn = curriculum.questions(random.Random(0), 3000, weights)
    assert all(abs(drawn.count(kind) / 3000 - weight) < 0.04 for kind, weight in weights.items())


def test_some_episodes_begin_in_words_and_all_end_in_an_image():
    """Half of them may, by 0 to 8 of their 8 shots."""
    rng, in_words = random.Random(0), []
    for _ in range(900):
        *shots, query, end = curriculum.bridged_word_example(rng).text.split(END_OF_CHUNK)
        assert (len(shots), query.split()[0], end) == (8, IMAGE, "")
        in_words.append(sum(IMAGE not in shot for shot in shots))
        assert all(IMAGE not in shot for shot in shots[: in_words[-1]])
    assert abs(in_words.count(0) / 900 - (1 / 2 + 1 / 18)) < 0.06
    assert all(abs(in_words.count(number) / 900 - 1 / 18) < 0.03 for number in range(1, 9))


# ---------------------------------------------------------------------------------------------------- batches


def test_texts_are_padded_to_one_length():
    """New tensor shapes cost time."""
    shapes = ShapesCurriculum()
    ids, labels = shapes.texts(Step.seeded("test"), 8)
    assert ids.shape == labels.shape == (8, curriculum.TEXT_LENGTH)
    assert (labels != UNASKED).any(1).all()
    assert torch.equal(ids[labels != UNASKED], labels[labels != UNASKED])


@pytest.mark.parametrize("name", INTERLEAVED)
def test_interleaved_batches_come_in_few_shapes(name):
    shapes, seen = ShapesCurriculum(), set()
    for number in range(60):
        batch = getattr(shapes, name)(Step.seeded("test", number), 12)
        rows, images = batch.images.shape[:2]
        assert (batch.labels != UNASKED).any(1).all()
        seen.add((*batch.input_ids.shape, rows, images))
    expected = {(12, 64, 12, 1), (2, 64, 2, 9)} | ({(3, 128, 3, 4)} if "several" in INTERLEAVED[name] else set())
    if name == "align":
        assert seen == expected
    else:  # where the shots of both rows begin in words, there are fewer images
        assert expected <= seen <= expected | {(2, 64, 2, images) for images in range(1, 9)}


@pytest.mark.parametrize("name", INTERLEAVED)
def test_images_and_labels_are_those_of_the_text(name):
    """Each row's images come first, then black ones; there are labels of the real ones alone, in order."""
    shapes, padded = ShapesCurriculum(), 0
    for number in range(40):
        batch = getattr(shapes, name)(Step.seeded("test", number), 12)
        rows, images = batch.images.shape[:2]
        real = batch.is_real.view(rows, images)
        told = (batch.input_ids == shapes.tokenizer.image_id).sum(1)
        assert torch.equal(real, torch.arange(images) < told[:, None])
        assert torch.equal(batch.images.flatten(2).any(-1), real)
        assert all(len(labels) == real.sum() for labels in batch.targets.values())
        padded += not real.all()
    assert (padded > 0) == (name != "align"), "this must have met rows with fewer images"


def kind_of(question):
    """`<image> how many squares ? two` -> "how many of" """
    question = question.replace(IMAGE, "").strip()
    if question.startswith("how many"):
        return "how many" if question.startswith("how many objects ?") else "how many of"
    return next(kind for kind in texts.QUESTION_KINDS if question.startswith(kind))


@pytest.mark.parametrize("name", INTERLEAVED)
def test_a_stage_is_its_mixture_of_batches(name, monkeypatch):
    """As many of each kind as weighted, about as many images in each; after the alignment the questions are weighted
    towards how many, and the episodes bridged."""
    shapes, seen, asked = ShapesCurriculum(), Counter(), {"single": Counter(), "counting": Counter()}
    captions = rows_in_words = 0
    monkeypatch.setattr(shapes, "collate", lambda step, examples, length: (examples, length))
    for number in range(1000):
        examples, length = getattr(shapes, name)(Step.seeded("test", number), 12)
        chunks = [example.text.split(END_OF_CHUNK)[:-1] for example in examples]
        if length == curriculum.TEXT_LENGTH:
            kind, rows = "several", 3
            assert all(example.text.split().count(IMAGE) == 4 for example in examples)
        elif all(len(row) == 9 for row in chunks):
            kind, rows = "word" if "called" in examples[0].text.split() else "task", 2
            rows_in_words += sum(kind == "word" and IMAGE not in row[0] for row in chunks)
        else:
            kind, rows = "counting" if all(len(row) == 7 for row in chunks) else "single", 12
            assert kind == "counting" or {len(row) for row in chunks} <= {1, 6}
            captions += sum(len(row) == 1 for row in chunks)
            asked[kind].update(kind_of(question) for row in chunks if len(row) > 1 for question in row)
        assert len(examples) == rows
        assert length == (curriculum.TEXT_LENGTH if kind == "several" else curriculum.CHUNK_LENGTH)
        seen[kind] += 1
    assert seen.keys() == INTERLEAVED[name].keys()
    for kind, weight in INTERLEAVED[name].items():
        assert abs(seen[kind] / 1000 - weight) < 0.04, kind
    assert abs(captions / (12 * seen["single"]) - 0.45) < 0.05
    assert abs(rows_in_words / (2 * seen["word"]) - (0 if name == "align" else 4 / 9)) < 0.09
    plain = name in ("align", "counting")
    for kind, weights in (
        ("single", curriculum.QUESTION_WEIGHTS if plain else curriculum.COUNTING_WEIGHTS),
        ("counting", curriculum.COUNTING_WEIGHTS),
    ):
        total = asked[kind].total()
        assert bool(total) == (kind in seen)
        assert all(
            asked[kind][each] / (total or 1) == pytest.approx(weights[each], abs=0.03) for each in weights if total
        )


def test_labels_follow_the_images_of_rows_that_differ():
    """Two captions in one row, one in the other."""
    rng = random.Random(0)
    one, two, three = (texts.caption_example(world.sample_scene(rng, min_objects=2)) for _ in range(3))
    batch = ShapesCurriculum().collate(Step.seeded(0), [join_examples([one, two]), three], 128)
    assert batch.is_real.tolist() == [True, True, True, False]
    expected = scene_targets([example.scenes[0] for example in (one, two, three)])
    assert all(torch.equal(batch.targets[name], expected[name]) for name in expected)


def test_batches_follow_from_the_step_alone():
    shapes = ShapesCurriculum()
    interleaved = [lambda step, size, name=name: (getattr(shapes, name)(step, size).images,) for name in INTERLEAVED]
    for make in (shapes.pictures, shapes.texts, *interleaved):
        one, again, other = (make(Step.seeded(0, "stage", number), 8)[0] for number in (7, 7, 8))
        assert torch.equal(one, again)
        assert one.shape != other.shape or not torch.equal(one, other)


def test_pictures_and_labels_are_of_the_same_scenes():
    images, targets = ShapesCurriculum().pictures(Step.seeded("test"), 6)
    step = Step.seeded("test")
    scenes = [world.sample_scene(step.rng) for _ in range(6)]
    assert torch.equal(images, world.render(scenes, step.generator))
    assert all(torch.equal(targets[name], labels) for name, labels in scene_targets(scenes).items())


def test_the_curriculum_fits_the_model_it_trains():
    shapes, config = ShapesCurriculum(), preset("shapes")
    assert shapes.config == config
    assert list(shapes.stages) == ["vision", "language", "warmup", *INTERLEAVED]
    assert config.vocabulary_size == len(shapes.vocabulary) == len(shapes.tokenizer)
    targets = scene_targets(scenes_of_all_splits())
    heads = {name: (group.queries, n) for group in shapes.reading.values() for name, n in group.heads.items()}
    assert heads.keys() == targets.keys()
    for name, (queries, classes) in heads.items():
        assert targets[name].shape[1] == queries
        assert targets[name].max() < classes
        assert ((targets[name] >= 0) | (targets[name] == UNASKED)).all()


# ---------------------------------------------------------------------------------------------------- labels


def test_targets_are_those_of_loops_over_the_scene():
    scenes = scenes_of_all_splits()
    targets = scene_targets(scenes)
    for i, scene in enumerate(scenes):
        for place in range(25):
            here = [thing for thing in scene if thing.place == place]
            assert targets["colour"][i, place] == (here[0].colour + 1 if here else 0)
            assert targets["shape"][i, place] == (here[0].shape if here else UNASKED)
            assert targets["size"][i, place] == (here[0].size if here else UNASKED)
        for number, (colour, shape) in enumerate(PAIRS):
            there = [thing.place for thing in scene if (thing.colour, thing.shape) == (colour, shape)]
            assert targets["where"][i, number] == (there[0] if len(there) == 1 else UNASKED)
        counts = [sum(thing.colour == colour for thing in scene) for colour in range(len(COLOURS))]
        counts += [sum(thing.shape == shape for thing in scene) for shape in range(len(SHAPES))]
        assert targets["count"][i].tolist() == [*counts, len(scene)]


def test_twins_are_not_asked_for():
    scene = (Thing(3, 0, 2, 1), Thing(9, 1, 2, 1), Thing(20, 1, 0, 0))
    where = scene_targets([scene])["where"][0].tolist()
    assert [place for place in where if place != UNASKED] == [20]
    assert where[PAIRS.index((2, 1))] == UNASKED


def test_every_colour_and_shape_has_one_query():
    assert sorted(PAIRS) == [(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
