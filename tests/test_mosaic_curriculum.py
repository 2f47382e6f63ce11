"""What training shows of mosaics: photographs and labels that belong together, true answers, no test image.

Here every photograph has one colour, which tells its class, its split and its number; flips and shifts change nothing.
"""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import mini_flamingo_evaluation as evaluation
import mosaic_curriculum as curriculum
import train_mini_flamingo as train
from cifar_utils import CLASSES, MOSAIC_KINDS, MOSAIC_VOCABULARY
from interleaved_text import END_OF_CHUNK, IMAGE, UNASKED, WordTokenizer, answer_of, prompt_of
from mini_flamingo import MiniFlamingo
from mini_flamingo_checkpoint import load_mini_flamingo, load_tokenizer
from mosaic_curriculum import TEXT_LENGTH, MosaicCurriculum, augment, mosaic_exam, mosaic_targets
from reporting import write_json
from tiny_flamingo import TINY, tiny_flamingo
from training_loop import Stage, Step, train_stage

STAGES = ("vision", "language", "warmup", "align")
TINY_MOSAICS = replace(TINY, image_size=64, num_latents=64, resampler_depth=4, vocabulary_size=len(MOSAIC_VOCABULARY))
TOKENIZER = WordTokenizer(MOSAIC_VOCABULARY)


class TinyCurriculum(MosaicCurriculum):
    """Mosaics for a tiny model, with a few small steps per stage."""

    config = TINY_MOSAICS
    stages: ClassVar = dict.fromkeys(STAGES, Stage(steps=3, learning_rate=2e-3, batch_size=8))

    def report(self, model):
        return super().report(model, count=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for split, number_of_split in (("train", 0), ("test", 200)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                colour = (20 * label + 10, number_of_split, 80 * i)
                Image.new("RGB", (32, 32), colour).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def mosaics(folder):
    return TinyCurriculum(folder)


def classes_of(images):
    """uint8[..., 3, 64, 64] -> the class of each tile in reading order, int64[..., 4], read off its colour."""
    red = torch.stack([images[..., 0, y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)], dim=-3)
    assert (red == red[..., :1, :1]).all(), "each tile shows one photograph"
    return (red[..., 0, 0].long() - 10) // 20


# ---------------------------------------------------------------------------------------------------- augmentation


def test_augmented_photographs_are_flipped_and_shifted():
    """Each one is one of the 2 x 9 x 9 pictures that a mirrored border allows, and all of these occur."""
    photographs = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    which = torch.randint(0, 4, (3000,))
    augmented = augment(photographs[which], torch.Generator().manual_seed(0))
    assert augmented.shape == (3000, 3, 32, 32) and augmented.dtype == torch.uint8
    seen = Counter()
    candidates = {}
    for number, photograph in enumerate(photographs.numpy()):
        for flipped in (False, True):
            framed = np.pad(photograph[..., ::-1] if flipped else photograph, ((0, 0), (4, 4), (4, 4)), "reflect")
            for y in range(9):
                for x in range(9):
                    candidates[framed[:, y : y + 32, x : x + 32].tobytes()] = (number, flipped, y, x)
    for number, image in zip(which.tolist(), augmented.numpy(), strict=True):
        original, *change = candidates[image.tobytes()]
        assert original == number
        seen[tuple(change)] += 1
    assert len(seen) == 2 * 9 * 9
    assert abs(sum(seen[change] for change in seen if change[0]) / 3000 - 0.5) < 0.05
    for axis in (1, 2):
        for shift in range(9):
            assert abs(sum(seen[change] for change in seen if change[axis] == shift) / 3000 - 1 / 9) < 0.03


def test_augmentation_follows_from_the_generator():
    photographs = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    before = photographs.clone()
    one, again, other = (augment(photographs, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(photographs, before)


# ---------------------------------------------------------------------------------------------------- labels and texts


def test_targets_are_those_of_loops_over_the_labels():
    labels = torch.randint(0, 10, (80, 4))
    labels[0] = 3  # nothing stands once
    targets = mosaic_targets(labels)
    assert {name: tuple(target.shape) for name, target in targets.items()} == {
        "class": (80, 4), "count": (80, 10), "where": (80, 10),
    }  # fmt: skip
    for i, row in enumerate(labels.tolist()):
        assert targets["class"][i].tolist() == row
        for label in range(10):
            assert targets["count"][i, label] == row.count(label)
            assert targets["where"][i, label] == (row.index(label) if row.count(label) == 1 else UNASKED)


def test_the_curriculum_fits_the_model_it_trains():
    config = MosaicCurriculum.config
    assert config.vocabulary_size == len(MosaicCurriculum.vocabulary) == len(TOKENIZER)
    assert config.image_size == 64
    assert (config.pad_token_id, config.image_token_id, config.eoc_token_id) == (
        TOKENIZER.pad_id, TOKENIZER.image_id, TOKENIZER.eoc_id,
    )  # fmt: skip
    assert config.num_latents == max(train.LATENT_COUNTS)
    assert config.resampler_depth == max(train.DEPTHS)
    MiniFlamingo(config)
    targets = mosaic_targets(torch.randint(0, 10, (300, 4)))
    heads = {name: (g.queries, n) for g in MosaicCurriculum.reading.values() for name, n in g.heads.items()}
    assert heads.keys() == targets.keys()
    for name, (queries, classes) in heads.items():
        assert targets[name].shape[1] == queries
        assert targets[name].max() < classes
    assert mosaic_targets(torch.full((1, 4), 3))["count"].max() < heads["count"][1]
    assert set(MosaicCurriculum.stages) == set(STAGES)
    assert MosaicCurriculum.stages["align"].batch_size % 4 == 0, "a row may hold four mosaics"


def true_answer(question, labels):
    """Read off the labels by place, word by word."""
    names = {place: CLASSES[label] for place, label in zip(("a1", "b1", "a2", "b2"), labels, strict=True)}
    if question == "list :":
        return " ".join(f"{place} {name} ;" for place, name in names.items()) + " ."
    if found := re.fullmatch(r"what is at (\w\d) \?", question):
        return names[found[1]]
    if found := re.fullmatch(r"where is the (\w+) \?", question):
        (place,) = (place for place, name in names.items() if name == found[1])
        return place
    count = list(names.values()).count
    if found := re.fullmatch(r"how many (\w+) \?", question):
        return ("zero", "one", "two", "three", "four")[count(found[1] if found[1] == "deer" else found[1][:-1])]
    found = re.fullmatch(r"is there an? (\w+) \?", question)
    return "yes" if count(found[1]) else "no"


def check_chunk(chunk, labels):
    """`<image> what is at a1 ? cat` -> the question, after its answer was found true."""
    found = re.fullmatch(r"(list :|.* \?) (.+)", chunk)
    assert found[2] == true_answer(found[1], labels), chunk
    return found[1]


def chunks_of(text):
    *chunks, end = text.split(END_OF_CHUNK)
    assert end == ""
    return [chunk.strip() for chunk in chunks]


def test_texts_say_what_they_ask_about(mosaics):
    """The mosaic stands in words, in any order, where the image would be; one in seven is left out."""
    rng, left_out, orders, asked = random.Random(0), 0, set(), Counter()
    for _ in range(1000):
        example = mosaics.text_example(rng)
        (labels,) = example.scenes
        first, *others = chunks_of(example.text)
        if first.startswith(IMAGE):
            left_out += 1
            first = first.removeprefix(f"{IMAGE} ")
        else:
            said, first = first.split(" ; . ")
            parts = dict(part.split() for part in said.split(" ; "))
            assert parts == dict(zip(("a1", "b1", "a2", "b2"), (CLASSES[label] for label in labels), strict=True))
            orders.add(tuple(parts))
        assert IMAGE not in " ".join([first, *others])
        asked.update(check_chunk(chunk, labels).split()[0] for chunk in (first, *others))
        assert len(others) == (0 if first.startswith("list") else 3)
    assert abs(left_out / 1000 - 0.15) < 0.04
    assert len(orders) == 24
    assert abs(asked["list"] / 1000 - 0.35) < 0.05
    assert all(asked[word] > 300 for word in ("what", "where", "how", "is"))


def test_texts_are_padded_to_one_length(mosaics):
    ids, labels = mosaics.texts(Step.seeded("test"), 8)
    assert ids.shape == labels.shape == (8, TEXT_LENGTH)
    assert (labels != UNASKED).any(1).all()


@pytest.mark.parametrize("kinds", [["list"], ["where is"] * 4, ["is there"] * 4, ["how many"] * 4])
def test_the_longest_texts_fit(mosaics, monkeypatch, kinds):
    """Whatever is asked of four mosaics in one row, or of one in words."""
    monkeypatch.setattr(MosaicCurriculum, "kinds", lambda self, rng, count: kinds[:count])
    rng = random.Random(0)
    assert max(len(mosaics.text_example(rng).text.split()) for _ in range(200)) <= TEXT_LENGTH
    for number in range(4):
        mosaics.align(Step.seeded("test", number), 16)


# ---------------------------------------------------------------------------------------------------- batches


def test_pictures_are_labelled_as_they_are(mosaics):
    images, targets = mosaics.pictures(Step.seeded("test"), 12)
    assert images.shape == (12, 3, 64, 64) and images.dtype == torch.uint8
    expected = mosaic_targets(classes_of(images))
    assert all(torch.equal(targets[name], expected[name]) for name in targets)
    assert len(set(expected["class"].flatten().tolist())) == 10


def test_training_sees_no_test_image(mosaics):
    """Green tells the split."""
    for number in range(5):
        assert not mosaics.pictures(Step.seeded("test", number), 8)[0][:, 1].any()
        assert not mosaics.align(Step.seeded("test", number), 8).images[:, :, 1].any()


def test_interleaved_answers_are_true_of_their_images(mosaics):
    """One mosaic a row, or four."""
    shapes = set()
    for number in range(30):
        batch = mosaics.align(Step.seeded("test", number), 8)
        rows, per_row = batch.images.shape[:2]
        shapes.add((rows, per_row, *batch.input_ids.shape))
        classes = classes_of(batch.images)
        assert batch.is_real.tolist() == [True] * 8
        expected = mosaic_targets(classes.flatten(0, 1))
        assert batch.targets.keys() == expected.keys()
        assert all(torch.equal(batch.targets[name], expected[name]) for name in expected)
        for ids, marks, labels in zip(batch.input_ids, batch.labels, classes.tolist(), strict=True):
            text, image = TOKENIZER.decode(ids), -1
            for chunk in chunks_of(text):
                image += chunk.startswith(IMAGE)
                check_chunk(chunk.removeprefix(f"{IMAGE} "), labels[image])
            assert image == per_row - 1
            said = marks != UNASKED
            assert torch.equal(marks[said], ids[said])
            learned = chunks_of(TOKENIZER.decode(ids[said]))
            assert all(chunk.endswith(f" {answer}") for chunk, answer in zip(chunks_of(text), learned, strict=True))
    assert shapes == {(8, 1, 8, TEXT_LENGTH), (2, 4, 2, TEXT_LENGTH)}


def test_batches_follow_from_the_step_alone(mosaics):
    for make in (mosaics.pictures, mosaics.texts, lambda step, size: (mosaics.align(step, size).images,)):
        one, again, other = (make(Step.seeded(0, "stage", number), 8)[0] for number in (7, 7, 8))
        assert torch.equal(one, again)
        assert one.shape != other.shape or not torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------- training


def all_parts(trainer):
    return nn.ModuleDict({"model": trainer.model, "reader": trainer.reader, "patch_labels": trainer.patch_labels})


@pytest.mark.parametrize(
    ("stage", "moved"),
    [
        ("vision", ("model.vision_encoder", "patch_labels")),
        ("language", ("model.language_model",)),
        ("warmup", ("model.resampler", "reader")),
        ("align", ("model.resampler", "model.gated_layers", "reader")),
    ],
)
def test_a_stage_moves_its_own_weights_and_no_others(mosaics, tmp_path, stage, moved):
    trainer = train.Trainer(mosaics, 0, torch.device("cpu"))
    parts = all_parts(trainer)
    before = {name: parameter.clone() for name, parameter in parts.named_parameters()}
    steps = replace(mosaics.stages[stage], steps=6)
    parameters, loss_of = trainer.parameter_groups(stage), partial(trainer.loss, stage)
    train_stage(stage, steps, trainer.parts(stage), parameters, loss_of, tmp_path, 0, bf16=False)
    for name, parameter in parts.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, before[name]) != name.startswith(moved), name


def test_patches_are_labelled_by_the_photograph_they_lie_in(mosaics):
    """8 x 8 patches on 2 x 2 photographs."""
    trainer = train.Trainer(mosaics, 0, torch.device("cpu"))
    images, targets = mosaics.pictures(Step.seeded("test"), 3)
    logits, labels = trainer.patch_labels(trainer.model.vision_encoder(images), targets)
    assert logits.keys() == labels.keys() == {"class"}
    for image in range(3):
        for patch in range(64):
            row, column = divmod(patch, 8)
            assert labels["class"][image, patch] == targets["class"][image, row // 4 * 2 + column // 4]


def test_the_script_trains_on_photographs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "MosaicCurriculum", TinyCurriculum)
    monkeypatch.setattr(evaluation, "MAX_WORDS", 2)
    out = tmp_path / "out"
    arguments = ["--data", "cifar10", "--cifar-root", str(folder), "--device", "cpu"]
    train.main([*arguments, "--work", str(tmp_path / "work"), "--out", str(out)])
    assert load_mini_flamingo(out).config == TINY_MOSAICS
    assert load_tokenizer(out).words == MOSAIC_VOCABULARY
    encoder, trained = load_file(out / "encoder-grid2.safetensors"), load_mini_flamingo(out).vision_encoder.state_dict()
    assert encoder.keys() == trained.keys() and all(torch.equal(encoder[name], trained[name]) for name in trained)
    record = json.loads((out / "training.json").read_text())
    assert record["settings"]["data"] == "cifar10" and record["report"]["mosaics"] == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("photograph", *MOSAIC_KINDS))


def test_photographs_that_cannot_be_read_are_one_sentence(tmp_path, capsys):
    (tmp_path / "photographs.zip").write_text("no zip")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", "cifar10", "--cifar-root", str(tmp_path / "photographs.zip"), "--device", "cpu"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "photographs.zip cannot be read as a zip" in line


# ---------------------------------------------------------------------------------------------------- the report


def mosaics_model():
    return tiny_flamingo(**{field: getattr(TINY_MOSAICS, field) for field in ("image_size", "vocabulary_size")})


def test_the_report_is_complete(mosaics, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "MAX_WORDS", 4)
    report = MosaicCurriculum.report(mosaics, mosaics_model(), count=3)
    assert report["mosaics"] == 3
    assert list(report["right"]) == ["photograph", *MOSAIC_KINDS]
    assert list(report["blank"]) == list(report["shuffled"]) == list(MOSAIC_KINDS)
    assert all(0 <= score <= 1 for part in ("right", "blank", "shuffled") for score in report[part].values())
    assert json.loads(write_json(tmp_path / "report.json", report).read_text()) == report


def test_an_exam_asks_about_test_photographs(mosaics):
    test = curriculum.load_cifar10(mosaics.root, "test")
    for kind in MOSAIC_KINDS:
        exam, again = (mosaic_exam(test, kind, 20) for _ in range(2))
        assert exam.examples == again.examples and torch.equal(exam.images, again.images)
        assert (exam.images[:, :, 1] == 200).all(), "green tells the split"
        for example, labels in zip(exam.examples, classes_of(exam.images[:, 0]).tolist(), strict=True):
            assert example.scenes == (tuple(labels),)
            question = prompt_of(example).removeprefix(f"{IMAGE} ")
            assert true_answer(question, labels) == answer_of(example)
            assert question.startswith("list :" if kind == "list" else kind) or kind == "where is"


def test_the_report_is_of_test_photographs_and_its_controls_of_none(mosaics, monkeypatch):
    """Green tells the split. Blank images are all of one grey, shuffled ones the exam's own, each at another prompt."""
    asked = []

    def listen(model, tokenizer, exam, encode=None):
        assert encode is None, "the exam's images are all that the model sees"
        labels = torch.tensor([example.scenes[0] for example in exam.examples])
        if len(exam.images.unique()) == 1:
            asked.append("blank")
            return ["blank"] * len(exam.examples)
        assert (exam.images[:, :, 1] == 200).all()
        owners = [(labels == shown).all(1).nonzero().item() for shown in classes_of(exam.images[:, 0])]
        assert sorted(owners) == [0, 1, 2]
        moved = [owner != number for number, owner in enumerate(owners)]
        asked.append("shuffled" if all(moved) else "?" if any(moved) else "right")
        return [asked[-1]] * len(exam.examples)

    for module in (curriculum, evaluation):
        monkeypatch.setattr(module, "answers", listen)
    MosaicCurriculum.report(mosaics, mosaics_model(), count=3)
    kinds = len(MOSAIC_KINDS)
    assert asked == ["right"] * (1 + kinds) + ["blank"] * kinds + ["shuffled"] * kinds


def test_photographs_are_counted_one_by_one(mosaics, monkeypatch):
    """A wrong name, a wrong place and a missing one cost a photograph each, another order costs nothing. Of a place
    named twice the last name counts."""

    def spoiled(example, number):
        first, second, third, fourth, _ = answer_of(example).split(" ; ")
        name = "cat" if first.split()[1] != "cat" else "dog"
        return (
            f"{first} ; {second} ; {third} ; {fourth} ; .",
            f"a1 {name} ; {second} ; {third} ; {fourth} ; .",
            f"{first} ; {second} ; {third} ; c3 {fourth.split()[1]} ; .",
            f"{first} ; {second} ; .",
            f"{fourth} ; {third} ; {second} ; {first} ; .",
            "a a a",
            "",
            f"{first} ; {first} ; {first} ; {first} ; .",
            f"{first} ; {second} ; {third} ; {fourth} ; a1 {name} ; .",
            f"a1 {name} ; {second} ; {third} ; {fourth} ; {first} ; .",
            f"{first} {name} ; {second} ; {third} ; {fourth} ; .",
            f"{first} ; {second} ; {third} ; {fourth}",
            f"{name} ; a1 ; {second} {third} ; {fourth} ; .",
            f"{first} ; b1 {name} {name} ; ; . {first}",
        )[number]

    def say(model, tokenizer, exam, encode=None):
        return [spoiled(example, number) for number, example in enumerate(exam.examples)]

    monkeypatch.setattr(curriculum, "answers", say)
    monkeypatch.setattr(curriculum, "scores", lambda *_: {})
    report = MosaicCurriculum.report(mosaics, tiny_flamingo(), count=14)
    right = 4 + 3 + 3 + 2 + 4 + 0 + 0 + 1 + 3 + 4 + 3 + 4 + 1 + 1
    assert report["right"] == {"photograph": pytest.approx(right / (14 * 4))}
