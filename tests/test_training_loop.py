"""The loop of every training stage, on a toy: killed or not, it ends with the same weights."""

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import training_loop
from training_loop import OtherRunError, Stage, Step, save_atomically, train_stage

STAGE = Stage(steps=7, learning_rate=0.05, batch_size=4)


class Killed(BaseException):
    """Like KeyboardInterrupt: no `except Exception` may catch it."""


@pytest.fixture(autouse=True)
def _save_often(monkeypatch):
    monkeypatch.setattr(training_loop, "SAVE_EVERY", 3)


def toy():
    """Fresh weights, each time the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))


def run(model, work, seed=0, killed_at=None, stage=STAGE, bf16=False, rate=1.0, watch=lambda step: None):
    """Learns the sum of three random numbers; `killed_at` steps it dies. -> the losses."""
    losses = []

    def loss_of(step):
        if len(losses) == killed_at:
            raise Killed
        watch(step)
        x = torch.randn(16, 3, generator=step.generator)
        loss = (model(x).float() - x.sum(-1, keepdim=True)).square().mean()
        losses.append(loss.item())
        return loss, {"error": loss.item()}

    groups = [{"params": [p], "lr": rate * stage.learning_rate, "weight_decay": 0.1} for p in model.parameters()]
    assert train_stage("toy", stage, [model], groups, loss_of, work, seed, bf16) > 0
    return losses


def same(one, other):
    """Nested states, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def saved(work):
    state = torch.load(work / "toy.pt", weights_only=True)
    assert state.pop("seconds") > 0
    return state


@pytest.mark.parametrize(("killed_at", "kept"), [(0, None), (2, None), (3, 3), (5, 3), (6, 6)])
def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path, killed_at, kept):
    """Weights, optimizer and losses, bit for bit, wherever it was killed."""
    model = toy()
    losses = run(model, tmp_path / "whole")
    with pytest.raises(Killed):
        run(toy(), tmp_path / "killed", killed_at=killed_at)
    assert (saved(tmp_path / "killed")["step"] if (tmp_path / "killed").exists() else None) == kept
    torch.manual_seed(99)  # the global generator has no say
    again = toy()
    assert run(again, tmp_path / "killed") == losses[kept or 0 :]
    assert same(again.state_dict(), model.state_dict())
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "killed"))


def test_a_finished_stage_is_not_trained_again(tmp_path):
    model, again = toy(), toy()
    assert len(run(model, tmp_path)) == 7
    before = saved(tmp_path)
    assert run(again, tmp_path) == []
    assert same(saved(tmp_path), before)
    assert same(again.state_dict(), model.state_dict()), "but its weights are taken over"


def test_what_is_trained_learns_and_is_frozen_again(tmp_path):
    model, before = toy().requires_grad_(False).eval(), toy()

    def watch(step):
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())

    losses = run(model, tmp_path, stage=Stage(150, 0.05, 4), watch=watch)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert not model.training
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        assert not parameter.requires_grad and parameter.grad is None
        assert not torch.equal(parameter, old)


def test_a_stage_is_adamw_with_clipped_gradients(tmp_path):
    """Against the loop written out."""
    model, reference = toy(), toy()
    run(model, tmp_path, rate=0.5)
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    for number in range(7):
        x = torch.randn(16, 3, generator=Step.seeded(0, "toy", number).generator)
        optimizer.zero_grad()
        (reference(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        norm = torch.stack([parameter.grad.norm() for parameter in reference.parameters()]).norm()
        for parameter in reference.parameters():
            parameter.grad *= min(1.0, 1.0 / norm)
        optimizer.param_groups[0]["lr"] = 0.5 * 0.05 * STAGE.rate_at(number)
        optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_float32_weights(tmp_path):
    model = toy()
    losses = run(model, tmp_path / "bf16", bf16=True)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    exact = run(toy(), tmp_path / "fp32")
    assert losses == pytest.approx(exact, rel=0.05)
    assert losses != exact


@pytest.mark.parametrize("killed_at", [None, 5])
@pytest.mark.parametrize(
    ("other", "was", "is_now"),
    [
        ({"seed": 1}, "'seed': 0", "'seed': 1"),
        ({"bf16": True}, "'bf16': False", "'bf16': True"),
        ({"stage": replace(STAGE, steps=9)}, "'steps': 7", "'steps': 9"),
        ({"stage": replace(STAGE, steps=5)}, "'steps': 7", "'steps': 5"),
        ({"stage": replace(STAGE, learning_rate=0.1)}, "'learning_rate': 0.05", "'learning_rate': 0.1"),
        ({"stage": replace(STAGE, batch_size=5)}, "'batch_size': 4", "'batch_size': 5"),
    ],
)
def test_a_work_folder_belongs_to_one_seed_precision_and_stage(tmp_path, killed_at, other, was, is_now):
    """Finished or not. The progress stays as it was, and no weight is taken over from it."""
    with pytest.raises(Killed) if killed_at else nullcontext():
        run(toy(), tmp_path, killed_at=killed_at)
    model, before = toy(), saved(tmp_path)
    message = rf"toy\.pt is of another run, .*{was}.* and not .*{is_now}.*: remove it or name another --work"
    with pytest.raises(OtherRunError, match=message) as raised:
        run(model, tmp_path, **other)
    assert isinstance(raised.value, ValueError)
    assert same(saved(tmp_path), before)
    assert same(model.state_dict(), toy().state_dict())
    run(model, tmp_path)


def test_the_schedule_warms_up_and_falls_to_a_twentieth():
    stage = Stage(steps=200, learning_rate=1.0, batch_size=1)
    rates = [stage.rate_at(step) for step in range(200)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[105] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
    assert Stage(steps=1, learning_rate=1.0, batch_size=1).rate_at(0) == 1


def test_a_step_s_randomness_follows_from_its_key():
    one, again = (Step.seeded(0, "align", 7) for _ in range(2))
    others = [Step.seeded(*key) for key in ((1, "align", 7), (0, "warmup", 7), (0, "align", 8))]
    drawn = [(step.rng.random(), torch.rand(1, generator=step.generator).item()) for step in (one, again, *others)]
    assert drawn[0] == drawn[1]
    assert len({number for numbers in drawn[1:] for number in numbers}) == 8
    random.seed(0)
    assert Step.seeded(0, "align", 7).rng.random() == drawn[0][0]


def test_a_kill_while_saving_leaves_the_last_save(tmp_path, monkeypatch):
    path = tmp_path / "work" / "stage.pt"
    save_atomically({"step": 1}, path)

    def killed(self, target):
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
