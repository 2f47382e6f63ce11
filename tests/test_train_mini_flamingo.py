"""The training script: its losses against loops, which weights a stage moves, and that a killed run ends the same."""

import json
import math
import os
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import train_mini_flamingo as train
import training_loop
from interleaved_text import UNASKED
from laws import randomized
from mini_flamingo import preset
from mini_flamingo_checkpoint import load_mini_flamingo, load_tokenizer
from shapes_curriculum import ShapesCurriculum, scene_targets
from shapes_world import render, sample_scene
from tiny_flamingo import TINY, set_gates
from token_reader import reading_loss
from train_mini_flamingo import Trainer
from training_loop import Interleaved, Stage, Step, train_stage

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden" / "mini_flamingo_losses.json"
INTERLEAVED = ("align", "few_shot", "counting", "everything")
STAGES = ("vision", "language", "warmup", *INTERLEAVED)
FROZEN = {  # while each stage trains
    "vision": ("model.resampler", "model.language_model", "model.gated_layers", "reader"),
    "language": ("model.vision_encoder", "model.resampler", "model.gated_layers", "reader", "patch_labels"),
    "warmup": ("model.vision_encoder", "model.language_model", "model.gated_layers", "patch_labels"),
    **dict.fromkeys(INTERLEAVED, ("model.vision_encoder", "model.language_model", "patch_labels")),
}


class TinyCurriculum(ShapesCurriculum):
    """The shapes world for a tiny model, with a few small steps per stage."""

    config = replace(
        TINY, image_size=80, num_latents=64, resampler_depth=4, vocabulary_size=preset("shapes").vocabulary_size
    )
    stages: ClassVar = dict.fromkeys(STAGES, Stage(steps=5, learning_rate=2e-3, batch_size=8))

    def report(self, model):
        assert not model.training
        return {"right": {"caption": 0.5}}


@pytest.fixture(autouse=True)
def _save_often(monkeypatch):
    monkeypatch.setattr(training_loop, "SAVE_EVERY", 2)


def change_stage(trainer, name, **changes):
    """For this trainer alone. -> the stage."""
    stage = replace(trainer.curriculum.stages[name], **changes)
    trainer.curriculum.stages = trainer.curriculum.stages | {name: stage}
    return stage


def run_stage(trainer, name, work, loss=None, bf16=False, **changes):
    stage, parts, groups = change_stage(trainer, name, **changes), trainer.parts(name), trainer.parameter_groups(name)
    return train_stage(name, stage, parts, groups, partial(loss or trainer.loss, name), work, 0, bf16)


def tiny_trainer(seed=0):
    return Trainer(TinyCurriculum(), seed, CPU)


def all_parts(trainer):
    return nn.ModuleDict({"model": trainer.model, "reader": trainer.reader, "patch_labels": trainer.patch_labels})


# ---------------------------------------------------------------------------------------------------- the golden file


@pytest.mark.parametrize("name", STAGES)
def test_ten_steps_lose_what_they_always_lost(name, tmp_path):
    """The shipped recipe at its full size, small batches, float32. Moving all weights by 2e-7 moves a loss by 2e-6."""
    trainer, losses = Trainer(ShapesCurriculum(), 0, CPU), []

    def recorded(stage, step):
        loss, stats = trainer.loss(stage, step)
        losses.append(loss.item())
        return loss, stats

    run_stage(trainer, name, tmp_path, recorded, steps=10, batch_size=8 if name in INTERLEAVED else 4)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden | {name: [round(loss, 6) for loss in losses]}, indent=1) + "\n")
        return
    assert losses == pytest.approx(golden[name], rel=1e-3), (
        "the recipe changed; if it was meant to, run UPDATE_GOLDEN=1 python -m pytest tests/test_train_mini_flamingo.py"
    )


# ---------------------------------------------------------------------------------------------------- losses


def test_the_answer_loss_predicts_each_answer_from_the_words_before_it():
    logits, labels = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    labels[torch.rand(3, 6) < 0.5] = UNASKED
    losses, right = [], []
    for row in range(3):
        for t in range(1, 6):
            label = labels[row, t].item()
            if label != UNASKED:
                scores = logits[row, t - 1].tolist()
                losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
                right.append(max(range(9), key=scores.__getitem__) == label)
    assert train.answer_loss(logits, labels).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert train.answer_accuracy(logits, labels) == pytest.approx(sum(right) / len(right))


def test_patch_labels_are_those_of_the_place_a_patch_lies_in():
    """10 x 10 patches on 5 x 5 places: each place has 2 x 2 of them."""
    head = train.PatchLabels(16, {"colour": 7, "size": 2})
    rng = random.Random(0)
    targets = scene_targets([sample_scene(rng) for _ in range(3)])
    patches = torch.randn(3, 100, 16)
    logits, labels = head(patches, targets)
    assert logits.keys() == labels.keys() == {"colour", "size"}
    assert logits["colour"].shape == (3, 100, 7)
    for image in range(3):
        for number in range(100):
            row, column = divmod(number, 10)
            for name in labels:
                assert labels[name][image, number] == targets[name][image, row // 2 * 5 + column // 2]
    torch.testing.assert_close(logits["size"], head.heads["size"](patches))


@pytest.mark.parametrize("stage", ["vision", "warmup"])
def test_the_reading_losses_are_of_the_labels_of_the_pictures(stage):
    """Read off the patches, or off the visual tokens."""
    trainer = tiny_trainer()
    change_stage(trainer, stage, batch_size=3)
    loss, _ = trainer.loss(stage, Step.seeded("test"))
    step = Step.seeded("test")
    images, targets = trainer.curriculum.pictures(step, 3)
    if stage == "vision":
        logits, targets = trainer.patch_labels(trainer.model.vision_encoder(images), targets)
    else:
        logits = trainer.reader(trainer.model.encode_media(images[:, None], **trainer.elastic(step))[:, 0])
    assert loss.item() == pytest.approx(reading_loss(logits, targets).item(), rel=1e-5)


def test_the_language_loss_is_of_answers_to_text_alone():
    trainer = tiny_trainer()
    change_stage(trainer, "language", batch_size=3)
    loss, _ = trainer.loss("language", Step.seeded("test"))
    ids, labels = trainer.curriculum.texts(Step.seeded("test"), 3)
    expected = train.answer_loss(trainer.model.language_model(ids), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stage", INTERLEAVED)
def test_the_alignment_loss_is_answers_plus_a_little_reading(stage):
    """Of the same images, latents and depth, by the model's own forward. Black images, of short rows, are not read."""
    trainer, short_rows = tiny_trainer(), 0
    randomized(trainer.model)
    set_gates(trainer.model, 0.5)
    change_stage(trainer, stage, batch_size=18)
    for number in range(8):
        loss, stats = trainer.loss(stage, Step.seeded(number))
        step = Step.seeded(number)
        batch = getattr(trainer.curriculum, stage)(step, 18)
        elastic = trainer.elastic(step)
        media = trainer.model.encode_media(batch.images, **elastic)
        assert media.shape[2] == elastic["num_latents"]
        answers = train.answer_loss(trainer.model(batch.input_ids, media=media), batch.labels)
        short_rows += not batch.is_real.all()
        reading = reading_loss(trainer.reader(media.flatten(0, 1)[batch.is_real]), batch.targets)
        assert loss.item() == pytest.approx((answers + 0.3 * reading).item(), rel=1e-5)
        assert stats["reading"] == pytest.approx(reading.item(), rel=1e-5)
        assert stats["gate"] == pytest.approx(math.tanh(0.5))
    assert short_rows or stage == "align"


def test_images_that_a_row_lacks_are_not_read():
    """A row with fewer images than another ends in black ones: they have no labels."""
    trainer = tiny_trainer()
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(3)]
    images = torch.stack((*render(scenes, torch.Generator().manual_seed(0)), torch.zeros(3, 80, 80, dtype=torch.uint8)))
    ids = torch.tensor([[1, 5, 2, 1, 6, 2], [1, 7, 8, 9, 10, 2]])
    is_real = torch.tensor([True, True, True, False])
    batch = Interleaved(ids, ids, images.unflatten(0, (2, 2)), is_real, scene_targets(scenes))
    _, stats = trainer.align(batch, Step.seeded("test"))
    media = trainer.model.encode_media(images[:3, None], **trainer.elastic(Step.seeded("test")))
    expected = reading_loss(trainer.reader(media[:, 0]), batch.targets)
    assert stats["reading"] == pytest.approx(expected.item(), rel=1e-5)


def test_latent_counts_and_depths_are_drawn_as_weighted():
    trainer = tiny_trainer()
    drawn = [trainer.elastic(Step.seeded("test", number)) for number in range(1500)]
    for name, values, weights in (
        ("num_latents", train.LATENT_COUNTS, train.LATENT_WEIGHTS),
        ("depth", train.DEPTHS, train.DEPTH_WEIGHTS),
    ):
        assert sum(weights) == pytest.approx(1)
        for value, weight in zip(values, weights, strict=True):
            assert abs(sum(each[name] == value for each in drawn) / 1500 - weight) < 0.06
    assert max(train.LATENT_COUNTS) == preset("shapes").num_latents
    assert max(train.DEPTHS) == preset("shapes").resampler_depth


# ---------------------------------------------------------------------------------------------------- what learns


@pytest.mark.parametrize("stage", STAGES)
def test_each_parameter_of_a_stage_has_its_rate(stage):
    trainer = tiny_trainer()
    full = trainer.curriculum.stages[stage].learning_rate
    by_identity = {id(group["params"][0]): group for group in trainer.parameter_groups(stage)}
    parameters = [(name, p, part) for part in trainer.parts(stage) for name, p in part.named_parameters()]
    assert len(trainer.parameter_groups(stage)) == len(by_identity) == len(parameters)
    for name, parameter, part in parameters:
        group = by_identity[id(parameter)]
        warmed_up = stage in INTERLEAVED and part is not trainer.model.gated_layers
        rate = 0.3 if warmed_up else 1.0
        rate = 5.0 if name.endswith(("attn_gate", "ff_gate")) else rate
        assert group["lr"] == pytest.approx(rate * full), name
        assert group["weight_decay"] == (0.05 if parameter.dim() > 1 else 0.0), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_moves_its_own_weights_and_no_others(tmp_path, stage):
    trainer = tiny_trainer()
    parts = all_parts(trainer)
    before = {name: parameter.detach().clone() for name, parameter in parts.named_parameters()}
    run_stage(trainer, stage, tmp_path, steps=8)
    for name, parameter in parts.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(FROZEN[stage]), name


@pytest.mark.parametrize("stage", ["warmup", "few_shot", "everything"])
def test_frozen_parts_stay_frozen_after_their_own_stages(tmp_path, stage):
    """Alignment reaches the resampler through the language model and leaves it no gradient."""
    trainer = tiny_trainer()
    for name in STAGES[: STAGES.index(stage)]:
        run_stage(trainer, name, tmp_path, steps=1)

    def watched(stage, step):
        for name, parameter in all_parts(trainer).named_parameters():
            assert parameter.requires_grad == (not name.startswith(FROZEN[stage])), name
        return trainer.loss(stage, step)

    run_stage(trainer, stage, tmp_path, watched, steps=2)
    assert all(parameter.grad is None for parameter in trainer.model.language_model.parameters())


def test_every_stage_trains_in_bfloat16(tmp_path):
    trainer = tiny_trainer()
    for name in STAGES:
        run_stage(trainer, name, tmp_path, steps=2, bf16=True)
    assert all(parameter.isfinite().all() for parameter in all_parts(trainer).parameters())
    assert all(parameter.dtype == torch.float32 for parameter in all_parts(trainer).parameters())


# ---------------------------------------------------------------------------------------------------- the whole run


def run_script(folder, *arguments):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "ShapesCurriculum", TinyCurriculum)
        work, out = str(folder / "work"), str(folder / "out")
        train.main(["--work", work, "--out", out, "--precision", "fp32", "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run of the script."""
    folder = tmp_path_factory.mktemp("whole")
    run_script(folder)
    return folder


def kill_at(monkeypatch, stage, number):
    """The process dies as that step begins."""
    seeded = Step.seeded

    def killed(*key):
        if key[-2:] == (stage, number):
            raise KeyboardInterrupt
        return seeded(*key)

    monkeypatch.setattr(Step, "seeded", staticmethod(killed))


@pytest.mark.parametrize(("stage", "number"), [("language", 1), ("warmup", 3), ("align", 4), ("counting", 2)])
def test_a_killed_run_started_again_ends_with_the_same_model(whole_run, tmp_path, stage, number):
    """Bit for bit, by the script's command line: between the saves of a stage and in its last step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, stage, number)
        with pytest.raises(KeyboardInterrupt):
            run_script(tmp_path)
    assert not list(tmp_path.glob("out/*")), "nothing is shipped that is not trained to the end"
    run_script(tmp_path)
    for name in ("model.safetensors", "token_reader.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (whole_run / "out" / name).read_bytes(), name


def test_the_run_ships_a_model_its_words_and_its_record(whole_run):
    model, fresh = load_mini_flamingo(whole_run / "out"), tiny_trainer().model
    assert model.config == TinyCurriculum.config
    assert load_tokenizer(whole_run / "out").words == TinyCurriculum.vocabulary
    for (name, trained), initial in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert not torch.equal(trained, initial), name
    record = json.loads((whole_run / "out" / "training.json").read_text())
    assert record["settings"] == {"seed": 0, "precision": "fp32", "data": "shapes"}
    assert record["stages"].keys() == set(STAGES) == set(ShapesCurriculum.stages)
    assert all(stage["steps"] == 5 and stage["seconds"] > 0 for stage in record["stages"].values())
    assert record["report"] == {"right": {"caption": 0.5}}
    assert record["environment"]


def test_another_seed_trains_another_model(whole_run, tmp_path):
    run_script(tmp_path, "--seed", "1")
    one, other = (load_mini_flamingo(folder / "out").state_dict() for folder in (whole_run, tmp_path))
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("to_q.weight"))


@pytest.mark.parametrize(
    ("option", "value", "was", "is_now"),
    [("--seed", "1", "'seed': 0", "'seed': 1"), ("--precision", "bf16", "'bf16': False", "'bf16': True")],
)
def test_a_work_folder_of_another_run_ends_with_a_sentence(whole_run, capsys, option, value, was, is_now):
    check_refused(whole_run, capsys, was, is_now, option, value)


def test_a_work_folder_of_other_stages_ends_with_a_sentence(whole_run, capsys, monkeypatch):
    longer = TinyCurriculum.stages | {"counting": replace(TinyCurriculum.stages["counting"], steps=6)}
    monkeypatch.setattr(TinyCurriculum, "stages", longer)
    check_refused(whole_run, capsys, "'steps': 5", "'steps': 6")


def check_refused(folder, capsys, was, is_now, *arguments):
    """What was shipped before stays."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_:
        run_script(folder, *arguments)
    assert exit_.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"\.pt is of another run, .*{was}.* and not .*{is_now}.*: remove it or name another", sentence)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_a_mistake_in_training_is_not_taken_for_a_wrong_option(tmp_path, monkeypatch):
    """It comes with its traceback."""

    def mistaken(self, stage, step):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(Trainer, "loss", mistaken)
    with pytest.raises(ValueError, match="shapes do not fit"):
        run_script(tmp_path)
