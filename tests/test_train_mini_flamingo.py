"""The training script: its examples, its losses against loops, and that a killed run ends with the same weights."""

import json
import math
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import shapes_world as world
import train_mini_flamingo as train
from laws import randomized
from mini_flamingo import preset
from shapes_world import WordTokenizer
from tiny_flamingo import TINY, set_gates
from train_mini_flamingo import Stage, Step, Trainer

GOLDEN = Path(__file__).parent / "golden" / "mini_flamingo_losses.json"
STAGES = ("vision", "language", "warmup", "align")
TRAINABLE = replace(
    TINY, image_size=80, num_latents=64, resampler_depth=4, vocabulary_size=preset("shapes").vocabulary_size
)
MAKERS = {  # each kind of training text, and the length it must fit
    "text": (train.text_example, train.TEXT_LENGTH),
    "single image": (train.single_image_example, 64),
    "interleaved": (train.interleaved_example, train.TEXT_LENGTH),
    "words": (partial(world.word_example, shots=8), 64),
    "tasks": (partial(world.task_example, shots=8), 64),
}


def make_tiny(monkeypatch):
    """Trainers build the tiny model, and `main` takes a few small steps per stage, saved after every second."""
    monkeypatch.setattr(train, "preset", lambda name: TRAINABLE)
    monkeypatch.setattr(train, "STAGES", dict.fromkeys(STAGES, Stage(steps=5, learning_rate=2e-3, batch_size=8)))
    monkeypatch.setattr(train, "train_stage", partial(train.train_stage, save_every=2))


@pytest.fixture
def tiny(monkeypatch):
    make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run of the script."""
    work = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_tiny(monkeypatch)
        train.main(["--precision", "fp32", "--work", str(work)])
    return work


def run_stage(trainer, name, work, steps=5, loss_of=None, batch_size=8):
    stage = replace(train.STAGES[name], steps=steps, batch_size=batch_size)
    groups = trainer.parameter_groups(name, stage.learning_rate)
    loss_of = loss_of or getattr(trainer, name)
    return train.train_stage(name, stage, trainer.modules(name), groups, loss_of, work, seed=0, bf16=False)


def all_parts(trainer):
    return nn.ModuleDict({"model": trainer.model, "reader": trainer.reader, "patch_labels": trainer.patch_labels})


# ---------------------------------------------------------------------------------------------------- the golden file


@pytest.mark.parametrize("name", STAGES)
def test_ten_steps_lose_what_they_always_lost(name, tmp_path):
    """The shipped recipe at its full size, small batches, float32. Moving all weights by 2e-7 moves a loss by 2e-6."""
    trainer, losses = Trainer(seed=0, device="cpu"), []

    def recorded(step, size):
        loss, stats = getattr(trainer, name)(step, size)
        losses.append(loss.item())
        return loss, stats

    run_stage(trainer, name, tmp_path, steps=10, loss_of=recorded, batch_size=8 if name == "align" else 4)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden | {name: [round(loss, 6) for loss in losses]}, indent=1) + "\n")
        return
    assert losses == pytest.approx(golden[name], rel=1e-3), (
        "the recipe changed; if it was meant to, run UPDATE_GOLDEN=1 python -m pytest tests/test_train_mini_flamingo.py"
    )


# ---------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("kind", MAKERS)
def test_examples_come_from_the_training_split_and_fit(kind):
    make, length = MAKERS[kind]
    tokenizer, rng = WordTokenizer(), random.Random(kind)
    for _ in range(1000):
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
    for question_kind in world.QUESTION_KINDS:
        for _ in range(300):
            question, answer = world.ask(sample(rng), question_kind, rng)
            assert len(f"{question} {answer}".split()) <= len(" ".join(longest).split())
    monkeypatch.setattr(world, "ask", lambda *_: longest)

    def sample_full(rng, split="train", min_objects=1, max_objects=10):
        return sample(rng, split, max_objects, max_objects)

    monkeypatch.setattr(world, "sample_scene", sample_full)
    assert max(len(make(rng).text.split()) for _ in range(300)) <= length


def test_a_scene_in_words_is_the_scene_in_any_order():
    rng = random.Random(0)
    scene = world.sample_scene(rng, min_objects=4, max_objects=4)
    orders = {train.in_words(scene, rng) for _ in range(200)}
    assert len(orders) == 24
    things = sorted(f"{thing.place_word} {thing.words}" for thing in scene)
    for words in orders:
        assert sorted(words.removesuffix(" ; .").split(" ; ")) == things


def test_text_alone_says_what_it_asks_about():
    """The scene stands in words where the image would be; one in seven is left out."""
    rng = random.Random(0)
    left_out = total = 0
    for _ in range(1500):
        example = train.text_example(rng)
        if len(example.scenes) > 1:
            assert world.IMAGE not in example.text
            continue
        total += 1
        if example.text.startswith(world.IMAGE):
            left_out += 1
            continue
        (scene,) = example.scenes
        seen = example.text[: example.text.index(" .")].split(" ;")
        assert sorted(part.strip() for part in seen if part) == sorted(f"{t.place_word} {t.words}" for t in scene)
        assert world.IMAGE not in example.text
    assert abs(left_out / total - 0.15) < 0.04


def test_aligned_batches_come_in_few_shapes():
    """`size` is about the number of images; what does not repeat costs time for each new shape."""
    tokenizer, shapes = WordTokenizer(), set()
    for number in range(60):
        batch = train.aligned_batch(Step.seeded("test", number), 12, tokenizer)
        assert batch.images.shape[:2].numel() == sum(map(len, batch.scenes)), "no row has fewer images than another"
        assert ((batch.input_ids == tokenizer.image_id).sum(1) == batch.images.shape[1]).all()
        assert (batch.labels != -100).any(1).all()
        shapes.add((*batch.input_ids.shape, *batch.images.shape[:2]))
    assert shapes == {(12, 64, 12, 1), (3, 128, 3, 4), (2, 64, 2, 9)}


def test_a_step_s_randomness_follows_from_its_key():
    one, again = (Step.seeded(0, "align", 7) for _ in range(2))
    others = [Step.seeded(*key) for key in ((1, "align", 7), (0, "warmup", 7), (0, "align", 8))]
    drawn = [(step.rng.random(), torch.rand(1, generator=step.generator).item()) for step in (one, again, *others)]
    assert drawn[0] == drawn[1]
    assert len({number for numbers in drawn[1:] for number in numbers}) == 8


def test_latent_counts_and_depths_are_drawn_as_weighted():
    drawn = [Step.seeded("test", number).elastic() for number in range(1500)]
    for name, values, weights in (
        ("num_latents", train.LATENT_COUNTS, train.LATENT_WEIGHTS),
        ("depth", train.DEPTHS, train.DEPTH_WEIGHTS),
    ):
        assert sum(weights) == pytest.approx(1)
        for value, weight in zip(values, weights, strict=True):
            assert abs(sum(each[name] == value for each in drawn) / 1500 - weight) < 0.06
    assert max(train.LATENT_COUNTS) == preset("shapes").num_latents
    assert max(train.DEPTHS) == preset("shapes").resampler_depth
    assert sum(train.QUESTION_WEIGHTS.values()) == pytest.approx(1)
    assert set(train.QUESTION_WEIGHTS) == set(world.QUESTION_KINDS)


# ---------------------------------------------------------------------------------------------------- losses


def test_the_answer_loss_predicts_each_answer_from_the_words_before_it():
    logits, labels = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    labels[torch.rand(3, 6) < 0.5] = -100
    losses, right = [], []
    for row in range(3):
        for t in range(1, 6):
            label = labels[row, t].item()
            if label != -100:
                scores = logits[row, t - 1].tolist()
                losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
                right.append(max(range(9), key=scores.__getitem__) == label)
    assert train.answer_loss(logits, labels).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert train.answer_accuracy(logits, labels) == pytest.approx(sum(right) / len(right))


def test_patch_labels_are_those_of_the_place_a_patch_lies_in():
    """10 x 10 patches on 5 x 5 places: each place has 2 x 2 of them."""
    head = train.PatchLabels(16)
    rng = random.Random(0)
    scenes = [world.sample_scene(rng) for _ in range(3)]
    patches = torch.randn(3, 100, 16)
    loss, stats = head.loss(patches, scenes)
    expected = 0.0
    for name, read in (
        ("colour", lambda thing: thing.colour + 1 if thing else 0),
        ("shape", lambda thing: thing.shape if thing else None),
        ("size", lambda thing: thing.size if thing else None),
    ):
        losses, right = [], []
        for features, scene in zip(patches, scenes, strict=True):
            at = {thing.place: thing for thing in scene}
            for number, patch in enumerate(features):
                row, column = divmod(number, 10)
                label = read(at.get(row // 2 * 5 + column // 2))
                if label is not None:
                    scores = getattr(head, name)(patch).tolist()
                    losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
                    right.append(max(range(len(scores)), key=scores.__getitem__) == label)
        expected += sum(losses) / len(losses)
        assert stats[name] == pytest.approx(sum(right) / len(right))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_alignment_loss_is_answers_plus_a_little_reading(tiny):
    """Of the same images, latents and depth, by the model's own forward."""
    trainer = Trainer(0, "cpu")
    randomized(trainer.model)
    set_gates(trainer.model, 0.5)
    for number in range(4):
        loss, stats = trainer.align(Step.seeded(number), 8)
        step = Step.seeded(number)
        batch = train.aligned_batch(step, 8, trainer.tokenizer)
        elastic = step.elastic()
        media = trainer.model.encode_media(batch.images, **elastic)
        assert media.shape[2] == elastic["num_latents"]
        answers = train.answer_loss(trainer.model(batch.input_ids, media=media), batch.labels)
        scenes = [scene for row in batch.scenes for scene in row]
        reading = train.reading_loss(trainer.reader(media.flatten(0, 1)), train.scene_targets(scenes))
        assert loss.item() == pytest.approx((answers + 0.3 * reading).item(), rel=1e-5)
        assert stats["reading"] == pytest.approx(reading.item(), rel=1e-5)
        assert stats["gate"] == pytest.approx(math.tanh(0.5))


# ---------------------------------------------------------------------------------------------------- optimisation


def test_the_schedule_warms_up_and_falls_to_a_twentieth():
    rates = [train.schedule(step, 200) for step in range(200)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[105] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert train.schedule(0, 1) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_each_parameter_of_a_stage_has_its_rate(tiny, stage):
    trainer = Trainer(0, "cpu")
    groups = trainer.parameter_groups(stage, 1.0)
    modules = trainer.modules(stage)
    by_identity = {id(group["params"][0]): group for group in groups}
    parameters = [(name, parameter, module) for module in modules for name, parameter in module.named_parameters()]
    assert len(groups) == len(by_identity) == len(parameters)
    for name, parameter, module in parameters:
        group = by_identity[id(parameter)]
        rate = 0.3 if stage == "align" and module is not trainer.model.gated_layers else 1.0
        rate = 5.0 if name.endswith(("attn_gate", "ff_gate")) else rate
        assert (group["lr"], group["weight_decay"]) == (rate, 0.05 if parameter.dim() > 1 else 0.0), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_moves_its_own_weights_and_no_others(tiny, tmp_path, stage):
    trainer = Trainer(0, "cpu")
    parts = all_parts(trainer)
    before = {name: parameter.detach().clone() for name, parameter in parts.named_parameters()}
    own = {id(parameter) for module in trainer.modules(stage) for parameter in module.parameters()}
    frozen = {name for name, parameter in parts.named_parameters() if id(parameter) not in own}
    frozen_parts = {
        "vision": ("model.resampler", "model.language_model", "model.gated_layers", "reader"),
        "language": ("model.vision_encoder", "model.resampler", "model.gated_layers", "reader", "patch_labels"),
        "warmup": ("model.vision_encoder", "model.language_model", "model.gated_layers", "patch_labels"),
        "align": ("model.vision_encoder", "model.language_model", "patch_labels"),
    }[stage]
    assert frozen == {name for name in before if name.startswith(frozen_parts)}

    def watched(step, size):
        assert all(parameter.requires_grad for module in trainer.modules(stage) for parameter in module.parameters())
        assert all(module.training for module in trainer.modules(stage))
        return getattr(trainer, stage)(step, size)

    run_stage(trainer, stage, tmp_path, steps=8, loss_of=watched)
    for name, parameter in parts.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    assert not any(parameter.requires_grad for module in trainer.modules(stage) for parameter in module.parameters())


def test_the_language_model_is_frozen_while_images_are_aligned(tiny, tmp_path):
    """Also after its own stage made it learn: alignment reaches the resampler through it, and leaves it no gradient."""
    trainer = Trainer(0, "cpu")
    for stage in STAGES[:3]:
        run_stage(trainer, stage, tmp_path, steps=1)

    def watched(step, size):
        for frozen in (trainer.model.vision_encoder, trainer.model.language_model, trainer.patch_labels):
            assert not any(parameter.requires_grad for parameter in frozen.parameters())
        return trainer.align(step, size)

    run_stage(trainer, "align", tmp_path, steps=2, loss_of=watched)
    assert all(parameter.grad is None for parameter in trainer.model.language_model.parameters())


def test_bfloat16_trains(tiny, tmp_path):
    trainer = Trainer(0, "cpu")
    stage = Stage(steps=2, learning_rate=1e-3, batch_size=8)
    for name in STAGES:
        groups = trainer.parameter_groups(name, 1e-3)
        train.train_stage(name, stage, trainer.modules(name), groups, getattr(trainer, name), tmp_path, 0, bf16=True)
    assert all(parameter.isfinite().all() for parameter in all_parts(trainer).parameters())
    assert all(parameter.dtype == torch.float32 for parameter in all_parts(trainer).parameters())


# ---------------------------------------------------------------------------------------------------- going on


def same(one, other):
    """Nested states, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(work, name):
    state = torch.load(work / f"{name}.pt", weights_only=True)
    assert state.pop("seconds") > 0
    return state


def kill_at(monkeypatch, stage, number):
    """The process dies as that step begins."""
    seeded = Step.seeded

    def killed(*key):
        if key[-2:] == (stage, number):
            raise KeyboardInterrupt
        return seeded(*key)

    monkeypatch.setattr(Step, "seeded", staticmethod(killed))
    return lambda: monkeypatch.setattr(Step, "seeded", staticmethod(seeded))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_goes_on_to_the_same_weights(tiny, tmp_path, monkeypatch, stage):
    """Killed in its fourth step, two after its last save, and gone on with by a new trainer: weights and optimizer."""
    torch.manual_seed(0)
    run_stage(Trainer(0, "cpu"), stage, tmp_path / "whole")
    revive = kill_at(monkeypatch, stage, 3)
    with pytest.raises(KeyboardInterrupt):
        run_stage(Trainer(0, "cpu"), stage, tmp_path / "killed")
    assert saved(tmp_path / "killed", stage)["step"] == 2
    revive()
    trainer = Trainer(0, "cpu")
    torch.rand(17)  # the global generator has no say
    run_stage(trainer, stage, tmp_path / "killed")
    whole, killed = (saved(tmp_path / run, stage) for run in ("whole", "killed"))
    assert whole["step"] == 5
    assert same(whole, killed)
    assert same(nn.ModuleList(trainer.modules(stage)).state_dict(), killed["modules"])


@pytest.mark.parametrize(("stage", "step"), [("language", 1), ("align", 3)])
def test_a_killed_run_started_again_ends_with_the_same_weights(
    tiny, whole_run, tmp_path, monkeypatch, capsys, stage, step
):
    """The whole script, by its command line."""
    arguments = ["--precision", "fp32", "--work", str(tmp_path)]
    revive = kill_at(monkeypatch, stage, step)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    revive()
    train.main(arguments)
    for name in STAGES:
        assert same(saved(whole_run, name), saved(tmp_path, name)), name
    seconds = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(seconds) == list(STAGES)


def test_stages_one_by_one_are_the_whole_run(tiny, whole_run, tmp_path):
    for name in STAGES:
        train.main(["--precision", "fp32", "--work", str(tmp_path), "--stages", name])
        assert same(saved(whole_run, name), saved(tmp_path, name)), name


def test_a_finished_stage_is_not_trained_again(tiny, tmp_path, monkeypatch):
    trainer = Trainer(0, "cpu")
    run_stage(trainer, "language", tmp_path)
    before = saved(tmp_path, "language")
    kill_at(monkeypatch, "language", 0)
    run_stage(Trainer(0, "cpu"), "language", tmp_path)
    assert same(saved(tmp_path, "language"), before)


def test_another_seed_trains_other_weights(tiny, tmp_path):
    for seed in ("0", "1"):
        train.main(["--stages", "language", "--seed", seed, "--work", str(tmp_path / seed)])
    one, other = (saved(tmp_path / seed, "language")["modules"] for seed in ("0", "1"))
    assert not any(same(one[name], other[name]) for name in one if "weight" in name)


def test_a_kill_while_saving_leaves_the_last_save(tmp_path, monkeypatch):
    path = tmp_path / "work" / "stage.pt"
    train.save_atomically({"step": 1}, path)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train.save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.xfail(reason="bug: a left-out stage without a checkpoint is skipped: its weights stay random", strict=True)
def test_a_stage_does_not_start_from_untrained_parts(tiny, tmp_path):
    with pytest.raises((ValueError, SystemExit)):
        train.main(["--stages", "align", "--work", str(tmp_path)])


@pytest.mark.xfail(reason="bug: --work of another seed is taken over without a word", strict=True)
def test_a_work_folder_belongs_to_one_seed(tiny, tmp_path):
    train.main(["--stages", "language", "--work", str(tmp_path)])
    with pytest.raises((ValueError, SystemExit)):
        train.main(["--stages", "language", "--seed", "1", "--work", str(tmp_path)])
