"""The loop every training stage runs: seeded step by step, resumable, saved atomically.

A step's randomness follows from the seed, the stage and the step's number alone, so a killed run that starts again sees
the batches it would have seen, and ends with the same weights as an uninterrupted one.
"""

import math
import random
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from interleaved_text import UNASKED

SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class Stage:
    """One stage's optimisation: AdamW, linear warm-up over 5 % of the steps, then cosine to a twentieth."""

    steps: int
    learning_rate: float
    batch_size: int

    def rate_at(self, step: int) -> float:
        """The share of the full learning rate at this step."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(progress * math.pi))


@dataclass(frozen=True)
class Step:
    """The randomness of one training step."""

    rng: random.Random
    generator: torch.Generator

    @staticmethod
    def seeded(*key: str | int) -> "Step":
        number = zlib.crc32(repr(key).encode())
        return Step(random.Random(number), torch.Generator().manual_seed(number))


@dataclass(frozen=True)
class Interleaved:
    """input_ids and labels int64[B, T], images uint8[B, M, 3, h, w], is_real bool[B * M] (false where a row has fewer
    than M images), and the labels that can be read off the real ones, int64[is_real.sum(), Q] by name."""

    input_ids: Tensor
    labels: Tensor
    images: Tensor
    is_real: Tensor
    targets: dict[str, Tensor]


class OtherRunError(ValueError):
    """The progress found on disk was made with another seed, precision or stage: going on would mix the two."""


LossOf = Callable[[Step], tuple[Tensor, Mapping[str, float]]]  # the loss, and what the progress bar shows beside it


def train_stage(
    name: str,
    stage: Stage,
    parts: Iterable[nn.Module],
    groups: list[dict],
    loss_of: LossOf,
    work: Path,
    seed: int,
    bf16: bool,
) -> float:
    """Trains `parts` (and freezes them again), or goes on where {work}/{name}.pt stands. Returns the seconds spent in
    all.

    groups: AdamW's parameter groups, each with its "lr". bf16: bfloat16 matrix products by autocast. Raises
    OtherRunError where the file is of another seed, precision or stage.
    """
    modules = nn.ModuleList(parts).requires_grad_(True).train()
    device = next(modules.parameters()).device
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    path, run = work / f"{name}.pt", {"seed": seed, "bf16": bf16, **asdict(stage)}
    first, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved.get("run") != run:
            raise OtherRunError(
                f"{path} is of another run, {saved.get('run')} and not {run}: remove it or name another --work"
            )
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
    # A CPU's fused attention is several times slower in its bfloat16 backward than plain matrix products.
    backends = (
        [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    )
    started = time.perf_counter() - seconds
    bar = tqdm(range(first, stage.steps), name, initial=first, total=stage.steps, mininterval=2, smoothing=0.02)
    for step in bar:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * stage.rate_at(step)
        with sdpa_kernel(backends), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, stats = loss_of(Step.seeded(seed, name, step))
            loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown = {"loss": loss.item(), **stats}
        bar.set_postfix_str(" ".join(f"{key} {value:.3f}" for key, value in shown.items()), refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            seconds = time.perf_counter() - started
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically({**state, "step": step + 1, "seconds": seconds, "run": run}, path)
    modules.requires_grad_(False).eval()
    return seconds


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the words to be predicted; logits float[B, T, V], labels int64[B, T]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=UNASKED)


def answer_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of those words that come out right, each given the right words before it."""
    wanted = labels[:, 1:] != UNASKED
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[wanted].float().mean().item()


def save_atomically(state: dict, path: Path) -> None:
    """Written beside its place, then moved into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
