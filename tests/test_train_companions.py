"""Training the companions: each stage moves its own learner and no more, and a killed run ends the same."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import companions
import train_companions as train
import training_loop
from interleaved_text import UNASKED, tokenize
from mini_flamingo_checkpoint import SHIPPED
from reporting import read_json
from shapes_curriculum import single_image_example
from train_companions import CompanionTrainer
from training_loop import Step

CPU = torch.device("cpu")
LEARNER = {
    "coarse": "coarse_to_fine",
    "coarse_align": "coarse_to_fine",
    "exits": "exit_heads",
    "counts": "count_head",
    "draft": "draft",
    "text_draft": "text_draft",
}


@pytest.fixture(autouse=True)
def _short_stages(monkeypatch):
    short = {name: replace(stage, steps=2, batch_size=4) for name, stage in train.STAGES.items()}
    monkeypatch.setattr(train, "STAGES", short)
    monkeypatch.setattr(train, "CALIBRATION_SCENES", 8)
    monkeypatch.setattr(training_loop, "SAVE_EVERY", 1)


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path)


def model_folder(path):
    """A folder of the trained model alone."""
    (path / "model").mkdir()
    for name in ("model", "token_reader"):
        shutil.copy(SHIPPED / f"{name}.safetensors", path / "model")
    return path / "model"


def run_script(path, *arguments):
    train.main(["--model", str(path / "model"), "--work", str(path / "work"), "--precision", "fp32", "--device", "cpu",
                *arguments])  # fmt: skip


def everything(trainer):
    parts = {"model": trainer.model, "reader": trainer.reader, **trainer.modules}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


# ---------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("stage", LEARNER)
def test_a_stage_moves_its_own_learner_and_nothing_else(folder, tmp_path, stage):
    trainer = CompanionTrainer(folder, 0, CPU)
    before = {name: parameter.detach().clone() for name, parameter in everything(trainer).items()}
    train.train(trainer, [stage], tmp_path / "work", 0, bf16=False)
    assert trainer.learner(stage) == LEARNER[stage]
    for name, parameter in everything(trainer).items():
        assert torch.equal(parameter, before[name]) != name.startswith(f"{LEARNER[stage]}."), name
        assert not parameter.requires_grad and parameter.grad is None
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "token_reader.safetensors", f"{LEARNER[stage]}.safetensors", "companions.json",
    }  # fmt: skip


def test_drafts_and_the_coarse_resampler_start_from_the_target(folder):
    trainer = CompanionTrainer(folder, 0, CPU)
    target = trainer.model.state_dict()
    for name in ("draft", "text_draft"):
        for key, tensor in trainer.modules[name].state_dict().items():
            assert torch.equal(tensor, target[key])
            assert tensor.data_ptr() != target[key].data_ptr(), "a copy: the target stays as it is"
    for key, tensor in trainer.modules["coarse_to_fine"].state_dict().items():
        assert torch.equal(tensor, target[f"resampler.{key}"])


@pytest.mark.parametrize("num_latents", [None, 16])
def test_after_each_depth_is_the_resampler_stopped_there(folder, num_latents):
    trainer = CompanionTrainer(folder, 0, CPU)
    patches = torch.randn(2, 100, trainer.model.config.vision_dim)
    found = trainer.after_each_depth(patches, num_latents)
    resampler = trainer.modules["coarse_to_fine"]
    assert len(found) == 4
    for depth, each in enumerate(found, 1):
        assert torch.equal(each, resampler(patches, num_latents, depth))


def test_says_it_is_word_for_word(folder):
    """Against the argmax of every labelled word, one by one."""
    trainer = CompanionTrainer(folder, 0, CPU)
    patches, _, (ids, labels) = trainer.scenes(Step.seeded("test"), 12)
    for count in (64, 4):
        media = trainer.model.resampler(patches, count)
        right = []
        for row in range(12):
            likeliest = trainer.model(ids[row : row + 1], media=media[row : row + 1, None])[0].argmax(-1).tolist()
            asked = [t for t in range(1, ids.shape[1]) if labels[row, t] != UNASKED]
            right.append(bool(asked) and all(likeliest[t - 1] == labels[row, t].item() for t in asked))
        assert trainer.says_it(media, (ids, labels)).tolist() == right
        assert any(right) if count == 64 else not all(right)


def test_the_risk_loss_is_of_what_only_the_dear_way_gets_right():
    right = torch.tensor([[True, False, True], [False, False, True], [False, True, False], [True, True, True]])
    lost = [[0, 1], [1, 1], [0, 0], [0, 0]]
    logits = torch.randn(4, 2)
    loss, stats = train.risk_loss(logits, right)
    by_hand = [
        F.binary_cross_entropy_with_logits(logits[i, c], torch.tensor(float(lost[i][c]))).item()
        for i in range(4)
        for c in range(2)
    ]
    assert loss.item() == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    assert stats["loses0"] == 0.25 and stats["loses1"] == 0.5
    agrees = [(logits[i, c] > 0).item() == bool(lost[i][c]) for i in range(4) for c in range(2)]
    assert stats["agrees"] == pytest.approx(sum(agrees) / 8)


def test_a_draft_sees_nothing_behind_its_cut(folder):
    """It is asked for the known words and the next 8 alone, from padding: the loss is a loop's."""
    trainer = CompanionTrainer(folder, 0, CPU)
    rng = random.Random(1)
    ids, labels = tokenize([single_image_example(rng) for _ in range(3)], trainer.curriculum.tokenizer, 64)
    media = torch.randn(3, 1, 16, trainer.model.config.vision_dim)
    seen = []

    def draft(known, images):
        seen.append((known, images))
        return trainer.modules["draft"](known, images)

    loss, _ = trainer.drafting(draft, ids, labels, media, Step.seeded("test"))
    ((known, images),) = seen
    assert len(known) == 6 and torch.equal(images, torch.cat((media, media)))
    logits, terms = trainer.modules["draft"](known, images), []
    for row in range(6):
        text, asked = ids[row % 3], labels[row % 3]
        cut = next(t for t in range(64, 0, -1) if known[row, t - 1] != 0)  # the first word it may not see
        assert asked[cut] != UNASKED
        assert torch.equal(known[row, :cut], text[:cut]) and (known[row, cut:] == 0).all()
        terms += [
            F.cross_entropy(logits[row, t - 1], asked[t]).item()
            for t in range(1, 64)
            if asked[t] != UNASKED and t < cut + train.WORDS_AHEAD
        ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of an uninterrupted run of two dependent stages, by the script."""
    path = tmp_path_factory.mktemp("whole")
    model_folder(path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        short = {name: replace(stage, steps=2, batch_size=4) for name, stage in train.STAGES.items()}
        monkeypatch.setattr(train, "STAGES", short)
        monkeypatch.setattr(train, "CALIBRATION_SCENES", 8)
        monkeypatch.setattr(training_loop, "SAVE_EVERY", 1)
        run_script(path, "--only", "coarse_align", "counts")
    return path


@pytest.mark.parametrize(("stage", "number"), [("coarse", 1), ("coarse_align", 0), ("counts", 1)])
def test_a_killed_run_started_again_ends_the_same(whole_run, tmp_path, stage, number):
    """Bit for bit: within a stage and between two of them."""
    model_folder(tmp_path)
    seeded = Step.seeded

    def killed(*key):
        if key[-2:] == (stage, number):
            raise KeyboardInterrupt
        return seeded(*key)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Step, "seeded", staticmethod(killed))
        with pytest.raises(KeyboardInterrupt):
            run_script(tmp_path, "--only", "coarse_align", "counts")
    run_script(tmp_path, "--only", "coarse_align", "counts")
    for name in ("coarse_to_fine", "count_head"):
        ours, theirs = (path / "model" / f"{name}.safetensors" for path in (tmp_path, whole_run))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_run_trains_what_its_stages_need_and_writes_where_it_is_told(whole_run):
    files = {path.relative_to(whole_run).as_posix() for path in whole_run.rglob("*") if path.is_file()}
    assert files == {
        "model/model.safetensors", "model/token_reader.safetensors", "model/coarse_to_fine.safetensors",
        "model/exit_heads.safetensors", "model/count_head.safetensors", "model/companions.json",
        "model/thresholds.json", "work/coarse.pt", "work/coarse_align.pt", "work/exits.pt", "work/counts.pt",
    }  # fmt: skip
    record = read_json(whole_run / "model" / "companions.json")
    assert record.keys() == {"coarse", "coarse_align", "exits", "counts"}
    assert all(stage["steps"] == 2 and stage["seconds"] > 0 for stage in record.values())
    for name in ("model", "token_reader"):
        before, now = (path / f"{name}.safetensors" for path in (SHIPPED, whole_run / "model"))
        assert before.read_bytes() == now.read_bytes()
    trainer = CompanionTrainer(whole_run / "model", 0, CPU)
    for name in ("coarse_to_fine", "count_head"):
        companions.load(trainer.modules[name], name, whole_run / "model")


def test_training_an_early_stage_again_keeps_what_later_ones_made_of_it(whole_run, tmp_path):
    """`--only coarse` on a finished work folder must not ship the resampler as it was before `coarse_align`."""
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    run_script(tmp_path, "--only", "coarse")
    ours, theirs = (path / "model" / "coarse_to_fine.safetensors" for path in (tmp_path, whole_run))
    assert ours.read_bytes() == theirs.read_bytes()


def check_refused(capsys, sentence, path, *arguments):
    with pytest.raises(SystemExit) as exit_:
        run_script(path, *arguments)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and sentence in lines[0], lines


def test_a_folder_without_a_model_ends_with_a_sentence(tmp_path, capsys):
    check_refused(capsys, "no trained Mini Flamingo in", tmp_path, "--only", "counts")
    model_folder(tmp_path)
    (tmp_path / "model" / "token_reader.safetensors").unlink()
    check_refused(capsys, "token_reader.safetensors is missing: python train_mini_flamingo.py makes it", tmp_path)
    assert not (tmp_path / "work").exists()


def test_a_work_folder_of_another_run_ends_with_a_sentence(whole_run, capsys):
    files = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    check_refused(capsys, "is of another run", whole_run, "--only", "counts", "--seed", "1")
    assert {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()} == files


def test_a_mistake_in_training_is_not_taken_for_a_wrong_option(folder, tmp_path, monkeypatch):
    """It comes with its traceback."""

    def mistaken(self, stage, step):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(CompanionTrainer, "loss", mistaken)
    with pytest.raises(ValueError, match="shapes do not fit"):
        run_script(tmp_path, "--only", "counts")


def test_every_stage_trains_in_bfloat16(folder, tmp_path):
    trainer = CompanionTrainer(folder, 0, CPU)
    train.train(trainer, list(train.STAGES), tmp_path / "work", 0, bf16=True)
    assert all(parameter.isfinite().all() for parameter in everything(trainer).values())
