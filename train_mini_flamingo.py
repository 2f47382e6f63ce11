"""Trains the Mini Flamingo that ships in data/mini_flamingo: the paper's recipe in miniature, in four stages.

    vision    the vision encoder, from a label for every patch
    language  the language model, on text alone: scenes written out in words, questions about them, episodes
    warmup    vision frozen; the resampler, read by a small decoder (scene_reader.py says why this decides everything)
    align     vision and language frozen; the resampler and the gated blocks, on interleaved images and text

(Alayrac et al. 2022, section 2 and appendix B.1.) The number of visual tokens and the resampler's depth are drawn anew each
step of the last two stages, so one checkpoint works at any of them.

Every batch follows from the seed, the stage and the step alone. Each stage saves itself to --work as it goes: a killed run
started again goes on where it stopped, and ends with the same weights.
"""

import argparse
import json
import random
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import shapes_world as world
from mini_flamingo import MiniFlamingo, preset
from scene_reader import SceneReader, reading_accuracy, reading_loss, scene_targets
from shapes_world import Batch, Example, WordTokenizer, collate

TEXT_LENGTH = 128  # words in a language-only example
LATENT_COUNTS, LATENT_WEIGHTS = (4, 8, 16, 32, 64), (0.1, 0.12, 0.18, 0.25, 0.35)
DEPTHS, DEPTH_WEIGHTS = (1, 2, 3, 4), (0.15, 0.2, 0.25, 0.4)
QUESTION_WEIGHTS = {"what is at": 0.2, "where is": 0.25, "how many": 0.2, "how many of": 0.2, "is there": 0.15}


@dataclass(frozen=True)
class Stage:
    """One stage's optimisation: AdamW, linear warm-up over 5 % of the steps, then cosine to a twentieth."""

    steps: int
    learning_rate: float
    batch_size: int


STAGES = {
    "vision": Stage(steps=600, learning_rate=2e-3, batch_size=64),
    "language": Stage(steps=2200, learning_rate=2e-3, batch_size=64),
    "warmup": Stage(steps=800, learning_rate=1.5e-3, batch_size=64),
    "align": Stage(steps=1600, learning_rate=1.5e-3, batch_size=64),
}


@dataclass(frozen=True)
class Step:
    """The randomness of one training step, a function of (seed, stage, step)."""

    rng: random.Random
    generator: torch.Generator

    @staticmethod
    def seeded(*key: str | int) -> "Step":
        number = zlib.crc32(repr(key).encode())
        return Step(random.Random(number), torch.Generator().manual_seed(number))

    def elastic(self) -> dict[str, int]:
        """A random number of visual tokens and resampler depth."""
        return {
            "num_latents": self.rng.choices(LATENT_COUNTS, LATENT_WEIGHTS)[0],
            "depth": self.rng.choices(DEPTHS, DEPTH_WEIGHTS)[0],
        }


# ---------------------------------------------------------------------------------------------------- examples


def in_words(scene: world.Scene, rng: random.Random) -> str:
    """The scene as text, in random order: what the language model reads where there will be an image."""
    return world.list_caption(rng.sample(scene, len(scene)))


def questions(rng: random.Random, count: int) -> list[str]:
    return rng.choices(list(QUESTION_WEIGHTS), list(QUESTION_WEIGHTS.values()), k=count)


def text_example(rng: random.Random) -> Example:
    """Text alone. One scene in seven is left out (an <image> without its image), so the questions' own odds are learned."""
    kind = rng.choices(("questions", "list", "describe", "word", "task"), (0.4, 0.12, 0.08, 0.3, 0.1))[0]
    if kind == "word":
        return world.word_example(rng, shots=15, as_text=True, meanings=rng.randint(2, 4))
    if kind == "task":
        return world.task_example(rng, shots=11, as_text=True)
    scene = world.sample_scene(rng)
    see = world.IMAGE if rng.random() < 0.15 else in_words(scene, rng)
    if kind == "questions":
        return world.question_example(scene, questions(rng, 7), rng, see)
    return world.caption_example(scene, kind, see)


def single_image_example(rng: random.Random) -> Example:
    kind = rng.choices(("questions", "list", "describe"), (0.55, 0.3, 0.15))[0]
    if kind == "questions":
        return world.question_example(world.sample_scene(rng), questions(rng, 6), rng)
    return world.caption_example(world.sample_scene(rng, max_objects=10 if kind == "list" else 8), kind)


def interleaved_example(rng: random.Random) -> Example:
    """Four images, each with its caption or its questions."""
    chunks = []
    for _ in range(4):
        scene = world.sample_scene(rng, max_objects=4)
        kind = rng.choice(("questions", "list", "describe"))
        is_question = kind == "questions"
        chunks.append(
            world.question_example(scene, questions(rng, 2), rng) if is_question else world.caption_example(scene, kind)
        )
    return world.join_examples(chunks)


def aligned_batch(step: Step, size: int, tokenizer: WordTokenizer) -> Batch:
    """A batch of one kind, so that few shapes occur; `size` is about the number of images in it."""
    rng = step.rng
    kind = rng.choices(("single", "interleaved", "word", "task"), (0.6, 0.15, 0.2, 0.05))[0]
    if kind == "single":
        examples, length = [single_image_example(rng) for _ in range(size)], 64
    elif kind == "interleaved":
        examples, length = [interleaved_example(rng) for _ in range(size // 4)], TEXT_LENGTH
    else:
        make = world.word_example if kind == "word" else world.task_example
        examples, length = [make(rng, shots=8) for _ in range(size // 6)], 64
    return collate(examples, tokenizer, step.generator, length)


# ---------------------------------------------------------------------------------------------------- losses


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def answer_accuracy(logits: Tensor, labels: Tensor) -> float:
    wanted = labels[:, 1:] != -100
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[wanted].float().mean().item()


class PatchLabels(nn.Module):
    """Reads colour (or empty), shape and size of its place off every patch: the vision stage's throw-away head."""

    def __init__(self, dim: int):
        super().__init__()
        self.colour = nn.Linear(dim, len(world.COLOURS) + 1)
        self.shape = nn.Linear(dim, len(world.SHAPES))
        self.size = nn.Linear(dim, len(world.SIZES))

    def loss(self, patches: Tensor, scenes: list[world.Scene]) -> tuple[Tensor, dict[str, float]]:
        """patches float[B, P, D] -> the summed cross-entropies, and the accuracies."""
        targets = scene_targets(scenes)
        side = int(patches.shape[1] ** 0.5)
        cell = torch.arange(side) * world.GRID // side
        place = (cell[:, None] * world.GRID + cell).flatten()
        loss, stats = 0, {}
        for name in ("colour", "shape", "size"):
            logits = getattr(self, name)(patches).flatten(0, 1).float()
            labels = getattr(targets, name)[:, place].flatten().to(logits.device)
            loss = loss + F.cross_entropy(logits, labels)
            stats[name] = (logits.argmax(-1) == labels)[labels != -100].float().mean().item()
        return loss, stats


class Trainer:
    """The parts being trained, and each stage's parameters and loss."""

    def __init__(self, seed: int, device: str):
        torch.manual_seed(seed)
        config = preset("shapes")
        self.device = device
        self.tokenizer = WordTokenizer()
        self.model = MiniFlamingo(config).freeze_pretrained().to(device)
        self.reader = SceneReader(config.vision_dim).to(device)
        self.patch_labels = PatchLabels(config.vision_dim).to(device)

    def modules(self, stage: str) -> list[nn.Module]:
        """What a stage trains."""
        model = self.model
        return {
            "vision": [model.vision_encoder, self.patch_labels],
            "language": [model.language_model],
            "warmup": [model.resampler, self.reader],
            "align": [model.resampler, self.reader, model.gated_layers],
        }[stage]

    def parameter_groups(self, stage: str, learning_rate: float) -> list[dict]:
        """In `align` the warmed-up parts learn at 0.3 of the rate and the gates, which start at 0, at 5 times it."""
        groups = []
        for module in self.modules(stage):
            warm = 0.3 if stage == "align" and module is not self.model.gated_layers else 1.0
            for name, parameter in module.named_parameters():
                rate = learning_rate * (5.0 if name.endswith("gate") else warm)
                decay = 0.05 if parameter.dim() > 1 else 0.0
                groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
        return groups

    def vision(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        scenes = [world.sample_scene(step.rng) for _ in range(size)]
        images = world.render(scenes, step.generator).to(self.device)
        return self.patch_labels.loss(self.model.vision_encoder(images), scenes)

    def language(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        examples = [text_example(step.rng) for _ in range(size)]
        ids, labels = (t.to(self.device) for t in world.tokenize(examples, self.tokenizer, TEXT_LENGTH))
        logits = self.model.language_model(ids)
        return answer_loss(logits, labels), {"answers": answer_accuracy(logits, labels)}

    def warmup(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        scenes = [world.sample_scene(step.rng) for _ in range(size)]
        images = world.render(scenes, step.generator).to(self.device)
        tokens = self.model.encode_media(images[:, None], **step.elastic())[:, 0]
        logits, targets = self.reader(tokens), scene_targets(scenes).to(self.device)
        return reading_loss(logits, targets), reading_accuracy(logits, targets)

    def align(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        batch = aligned_batch(step, size, self.tokenizer)
        media = self.model.encode_media(batch.images.to(self.device), **step.elastic())
        labels = batch.labels.to(self.device)
        logits = self.model(batch.input_ids.to(self.device), media=media)
        scenes = [scene for row in batch.scenes for scene in row]
        targets = scene_targets(scenes).to(self.device)
        real = torch.tensor([m < len(row) for row in batch.scenes for m in range(media.shape[1])])
        reading = reading_loss(self.reader(media.flatten(0, 1)[real]), targets)
        loss = answer_loss(logits, labels)
        gates = [g.attn_gate.tanh().item() for g in self.model.gated_layers.values()]
        stats = {"answers": answer_accuracy(logits, labels), "reading": reading.item(), "gate": max(map(abs, gates))}
        return loss + 0.3 * reading, stats


# ---------------------------------------------------------------------------------------------------- loop


def schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())


def train_stage(
    name: str,
    stage: Stage,
    modules: Iterable[nn.Module],
    groups: list[dict],
    loss_of: Callable[[Step, int], tuple[Tensor, dict[str, float]]],
    work: Path,
    seed: int,
    bf16: bool,
    save_every: int = 100,
) -> float:
    """Trains one stage, or goes on with it, and returns the seconds it took in all."""
    modules = nn.ModuleList(modules).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    path = work / f"{name}.pt"
    first, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
    device = next(modules.parameters()).device.type
    started = time.perf_counter() - seconds
    bar = tqdm(range(first, stage.steps), name, initial=first, total=stage.steps, mininterval=2, smoothing=0.02)
    for step in bar:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, stage.steps)
        # The fused kernels' bfloat16 backward is several times slower on a CPU than plain matrix products.
        backend = SDPBackend.MATH if device == "cpu" else SDPBackend.EFFICIENT_ATTENTION
        with sdpa_kernel(backend), torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, stats = loss_of(Step.seeded(seed, name, step), stage.batch_size)
            loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", **{k: f"{v:.3f}" for k, v in stats.items()}, refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == stage.steps:
            seconds = time.perf_counter() - started
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically({**state, "step": step + 1, "seconds": seconds}, path)
    modules.requires_grad_(False).eval()
    return seconds


def save_atomically(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/mini_flamingo"), help="where a run keeps its progress")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the matrix products")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trainer = Trainer(arguments.seed, arguments.device)
    seconds = {}
    for name, stage in STAGES.items():
        modules = trainer.modules(name)
        if name not in arguments.stages:
            path = arguments.work / f"{name}.pt"
            if path.exists():
                nn.ModuleList(modules).load_state_dict(torch.load(path, weights_only=True)["modules"])
            continue
        groups = trainer.parameter_groups(name, stage.learning_rate)
        loss_of = getattr(trainer, name)
        bf16 = arguments.precision == "bf16"
        seconds[name] = train_stage(name, stage, modules, groups, loss_of, arguments.work, arguments.seed, bf16)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
