"""Trains what the optimizations need beside the shipped Mini Flamingo, which itself stays as it is.

    coarse       the coarse-to-fine resampler, to give the plain one's visual tokens after every depth
    coarse_align the same, through the language model's loss
    exits        for it: a head behind each layer that tells the risk of stopping there
    counts       a head on the patches that tells the risk of computing few visual tokens
    draft        a language model of two layers that drafts several words in one pass, from the same visual tokens
    text_draft   the same without images

Stages keep their progress in --work: a killed run started again goes on where it stopped. `companions.py` says what
becomes of them.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import companions
from adaptive_resampler import risks
from benchmarking import choose_device, environment
from command_line import positive_int
from companions import BUDGETS, CHEAP_COUNTS
from conditioned_language_model import ConditionedLanguageModel
from confidence_head import calibrated_threshold
from interleaved_text import UNASKED, tokenize
from mini_flamingo_checkpoint import SHIPPED, load_mini_flamingo, save_weights
from mini_flamingo_evaluation import caption_exam, forced_matches
from reporting import read_json, write_json
from shapes_curriculum import ShapesCurriculum, scene_targets, single_image_example
from shapes_texts import caption_example
from shapes_world import MAX_OBJECTS, render, sample_scene
from token_reader import reading_loss
from training_loop import OtherRunError, Stage, Step, answer_loss, train_stage

LEARNERS = ("coarse_to_fine", "exit_heads", "count_head")  # that thresholds are set for
STAGES = {
    "coarse": Stage(steps=1000, learning_rate=1e-3, batch_size=48),
    "coarse_align": Stage(steps=300, learning_rate=4e-4, batch_size=48),
    "exits": Stage(steps=400, learning_rate=2e-3, batch_size=64),
    "counts": Stage(steps=250, learning_rate=2e-3, batch_size=64),
    "draft": Stage(steps=2000, learning_rate=2e-3, batch_size=48),
    "text_draft": Stage(steps=600, learning_rate=2e-3, batch_size=48),
}
# What goes with a stage; finished ones take no time.
COARSE = ("coarse", "coarse_align", "exits")
NEEDS = dict.fromkeys(COARSE, COARSE)
CALIBRATION_SCENES, CALIBRATION_SEED = 1024, 5  # held out, and drawn apart from every exam
WORDS_AHEAD = 8  # how many words a draft learns to say in one pass
LATENTS, LATENT_WEIGHTS = (16, 32, 64), (0.15, 0.35, 0.5)


class CompanionTrainer:
    """The shipped model, frozen, and per stage the companion that learns from it."""

    def __init__(self, folder: Path, seed: int, device: torch.device):
        torch.manual_seed(seed)
        self.curriculum, self.folder, self.device = ShapesCurriculum(), folder, device
        self.model = load_mini_flamingo(folder, device).requires_grad_(False)
        config = self.model.config
        reader = companions.token_reader(config, self.curriculum.reading)
        self.reader = companions.load(reader, "token_reader", folder).to(device)
        self.modules = {
            "coarse_to_fine": companions.coarse_to_fine(config),
            "exit_heads": companions.exit_heads(config),
            "count_head": companions.count_head(config),
            "draft": companions.draft(config),
            "text_draft": companions.text_draft(config),
        }
        self.modules["coarse_to_fine"].load_state_dict(self.model.resampler.state_dict())
        for name in ("draft", "text_draft"):  # both start from the target's first layers
            self.modules[name].load_state_dict(first_of(self.modules[name], self.model))
        for module in self.modules.values():
            module.to(device).requires_grad_(False)

    def learner(self, stage: str) -> str:
        """The name of the module that a stage trains."""
        names = {"coarse": "coarse_to_fine", "coarse_align": "coarse_to_fine", "exits": "exit_heads"}
        return {**names, "counts": "count_head"}.get(stage, stage)

    def loss(self, stage: str, step: Step) -> tuple[Tensor, dict[str, float]]:
        return getattr(self, stage)(step, STAGES[stage].batch_size)

    def scenes(self, step: Step, size: int) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Patches float[B, P, D] of fresh scenes, the labels that can be read off them, and their list captions as
        input_ids and labels int64[B, T]."""
        scenes = [sample_scene(step.rng, max_objects=MAX_OBJECTS) for _ in range(size)]
        images, targets = render(scenes, step.generator), scene_targets(scenes)
        texts = tokenize([caption_example(scene) for scene in scenes], self.curriculum.tokenizer)
        with torch.no_grad():
            patches = self.model.vision_encoder(images.to(self.device))
        return patches, {k: v.to(self.device) for k, v in targets.items()}, tuple(t.to(self.device) for t in texts)

    def after_each_depth(self, patches: Tensor, num_latents: int | None = None) -> list[Tensor]:
        """The coarse-to-fine resampler's visual tokens float[B, L, D] after 1, 2 ... layers."""
        resampler, found = self.modules["coarse_to_fine"], []
        latents = resampler.first_latents(len(patches), num_latents)
        for layer in range(len(resampler.layers)):
            latents = resampler.run_layer(layer, patches, latents)
            found.append(resampler.norm(latents))
        return found

    def coarse(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        """Distance to the plain resampler's visual tokens, and what the warm-up decoder reads, after every depth."""
        patches, targets, _ = self.scenes(step, size)
        count = step.rng.choices(LATENTS, LATENT_WEIGHTS)[0]
        with torch.no_grad():
            wanted = self.model.resampler(patches, count)
        found = self.after_each_depth(patches, count)
        distance = [(each - wanted).pow(2).mean() / wanted.pow(2).mean() for each in found]
        reading = [reading_loss(self.reader(each), targets) for each in found]
        stats = {f"d{i}": loss.item() for i, loss in enumerate(distance, 1)}
        stats |= {f"r{i}": loss.item() for i, loss in enumerate(reading, 1)}
        return sum(distance) + 0.1 * sum(reading), stats

    def coarse_align(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        """The language model's loss at one random depth from the second on, beside the distance at every depth."""
        rng = step.rng
        scenes = [sample_scene(rng, max_objects=MAX_OBJECTS) for _ in range(size)]
        ask = rng.random() < 0.35
        batch = (
            self.curriculum.collate(step, [single_image_example(rng) for _ in range(size)], 64)
            if ask
            else self.curriculum.collate(step, [caption_example(scene) for scene in scenes], 64)
        )
        with torch.no_grad():
            patches = self.model.vision_encoder(batch.images[:, 0].to(self.device))
            count = rng.choices(LATENTS, LATENT_WEIGHTS)[0]
            wanted = self.model.resampler(patches, count)
        found = self.after_each_depth(patches, count)
        distance = sum((each - wanted).pow(2).mean() / wanted.pow(2).mean() for each in found)
        depth = rng.choices((2, 3, 4), (0.2, 0.35, 0.45))[0]
        logits = self.model(batch.input_ids.to(self.device), media=found[depth - 1][:, None])
        words = answer_loss(logits, batch.labels.to(self.device))
        return words + 0.3 * distance, {"words": words.item(), "distance": distance.item()}

    @torch.no_grad()
    def says_it(self, visual_tokens: Tensor, texts: tuple[Tensor, Tensor]) -> Tensor:
        """bool[B]: whether the language model, reading these visual tokens float[B, L, D], captions word for word."""
        ids, labels = texts
        likeliest = self.model(ids, media=visual_tokens[:, None]).argmax(-1)
        return ((likeliest[:, :-1] == labels[:, 1:]) | (labels[:, 1:] == UNASKED)).all(1)

    def exits(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        """Stopping loses an image if it is right after all layers and not after so many."""
        patches, _, texts = self.scenes(step, size)
        with torch.no_grad():
            found = self.after_each_depth(patches, step.rng.choice((32, 64)))
        right = torch.stack([self.says_it(each, texts) for each in found], dim=1)
        heads = self.modules["exit_heads"]
        logits = torch.cat([head.logits(each) for head, each in zip(heads, found, strict=False)], dim=1)
        return risk_loss(logits, right)

    def counts(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        """Few visual tokens lose an image if it is right with all of them and not with so few."""
        patches, _, texts = self.scenes(step, size)
        with torch.no_grad():
            found = [self.model.resampler(patches, count) for count in (*CHEAP_COUNTS, None)]
        right = torch.stack([self.says_it(each, texts) for each in found], dim=1)
        return risk_loss(self.modules["count_head"].logits(patches), right)

    def draft(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        """Words about fresh images, from the target's own visual tokens."""
        batch = self.curriculum.collate(step, [single_image_example(step.rng) for _ in range(size)], 64)
        count = step.rng.choices(LATENTS, LATENT_WEIGHTS)[0]
        with torch.no_grad():
            media = self.model.encode_media(batch.images.to(self.device), num_latents=count)
        return self.drafting(self.modules["draft"], batch.input_ids, batch.labels, media, step)

    def text_draft(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        ids, labels = tokenize([single_image_example(step.rng) for _ in range(size)], self.curriculum.tokenizer, 64)
        blind = torch.zeros(size, 1, 1, self.model.config.vision_dim, device=self.device)
        return self.drafting(self.modules["text_draft"], ids, labels, blind, step)

    def drafting(
        self, draft: ConditionedLanguageModel, ids: Tensor, labels: Tensor, media: Tensor, step: Step, cuts: int = 2
    ) -> tuple[Tensor, dict[str, float]]:
        """Each text twice, cut behind a random word: the draft knows the words up to there, sees padding from there on,
        and must say the next WORDS_AHEAD words all at once. (What it learns at the words before is free.)"""
        ids, labels, media = (each.repeat(cuts, *[1] * (each.dim() - 1)) for each in (ids, labels, media))
        asked = (labels != UNASKED).float()
        asked[:, 0] = 0
        cut = torch.multinomial(asked, 1, generator=step.generator)  # the first word to be guessed
        position = torch.arange(ids.shape[1])
        known = ids.where(position < cut, self.model.config.pad_token_id).to(self.device)
        wanted = labels.where(position < cut + WORDS_AHEAD, UNASKED).to(self.device)
        logits = draft(known, media)
        loss = answer_loss(logits, wanted)
        right = logits[:, :-1].argmax(-1) == wanted[:, 1:]
        ahead = (position[1:] - cut).to(self.device)
        hits = {f"+{k}": right[(ahead == k - 1) & (wanted[:, 1:] != UNASKED)] for k in (1, 2, 4, 8)}
        return loss, {name: hit.float().mean().item() if hit.numel() else 0.0 for name, hit in hits.items()}


def first_of(module: nn.Module, source: nn.Module) -> dict[str, Tensor]:
    """The source's tensors of the names that the module has."""
    tensors = source.state_dict()
    return {name: tensors[name] for name in module.state_dict()}


def risk_loss(logits: Tensor, right: Tensor) -> tuple[Tensor, dict[str, float]]:
    """logits float[B, C] of the risk of C cheaper ways; right bool[B, C + 1], the last column the dear way's."""
    loses = right[:, -1:] & ~right[:, :-1]
    loss = F.binary_cross_entropy_with_logits(logits.float(), loses.float())
    agrees = (logits > 0) == loses
    stats = {f"loses{i}": share.item() for i, share in enumerate(loses.float().mean(0))}
    return loss, stats | {"agrees": agrees.float().mean().item()}


@torch.inference_mode()
def calibrate(trainer: CompanionTrainer) -> dict:
    """`companions.thresholds`: on held-out captions, for each budget the highest threshold that keeps it."""
    exam = caption_exam(CALIBRATION_SCENES, seed=CALIBRATION_SEED)
    model, tokenizer = trainer.model, trainer.curriculum.tokenizer
    heads = {name: companions.load(trainer.modules[name], name, trainer.folder) for name in LEARNERS}
    patches = [model.vision_encoder(images.flatten(0, 1).to(trainer.device)) for images in exam.images.split(64)]
    exam = replace(exam, images=torch.cat(patches)[:, None])

    def by_budget(risk: Tensor, encodings: list[Callable[[Tensor], Tensor]]) -> dict[str, float]:
        """Of cheaper ways in their order, the dear one last."""
        right = torch.stack([forced_matches(model, tokenizer, exam, encode) for encode in encodings], dim=1)
        loses = right[:, -1:] & ~right[:, :-1]
        return {str(budget): calibrated_threshold(risk.cpu(), loses, budget) for budget in BUDGETS}

    coarse, found = heads["coarse_to_fine"], {}
    for count in (32, 64):
        risk = torch.cat([risks(coarse, heads["exit_heads"], each[:, None], count)[0] for each in patches])
        depths = range(1, len(coarse.layers) + 1)
        found[str(count)] = by_budget(risk, [partial(coarse, num_latents=count, depth=depth) for depth in depths])
    risk = torch.cat([heads["count_head"](each) for each in patches])
    ways = [partial(model.resampler, num_latents=count) for count in (*CHEAP_COUNTS, None)]
    return {"scenes": len(exam.examples), "exits": found, "counts": by_budget(risk, ways)}


def train(trainer: CompanionTrainer, stages: list[str], work: Path, seed: int, bf16: bool) -> None:
    """Runs these stages and saves what they trained as soon as the last one that trains it is done."""
    record_file = trainer.folder / "companions.json"
    for i, name in enumerate(stages):
        learner = trainer.learner(name)
        module = trainer.modules[learner]
        rate = STAGES[name].learning_rate
        groups = [
            {"params": [p], "lr": rate, "weight_decay": 0.05 if p.dim() > 1 else 0.0} for p in module.parameters()
        ]
        seconds = train_stage(name, STAGES[name], [module], groups, partial(trainer.loss, name), work, seed, bf16)
        if learner not in map(trainer.learner, stages[i + 1 :]):
            save_weights(trainer.folder / f"{learner}.safetensors", copy.deepcopy(module).bfloat16())  # half the bytes
        record = read_json(record_file) if record_file.exists() else {}
        spent = {"steps": STAGES[name].steps, "seconds": round(seconds, 1)}
        if record.get(name, {}).items() >= spent.items():  # done by an earlier run: its record stands
            continue
        record[name] = spent | environment(trainer.device)
        write_json(record_file, record)
    if all((trainer.folder / f"{name}.safetensors").exists() for name in LEARNERS):
        write_json(trainer.folder / "thresholds.json", calibrate(trainer))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="these stages (default: all)")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the trained Mini Flamingo")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "runs" / "companions", help="progress")
    parser.add_argument("--seed", type=int, default=0, help="decides every batch and every initial weight")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="cpu, cuda ... (default: a GPU where there is one)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the matrix products")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    wanted = set(arguments.only).union(*(NEEDS.get(name, ()) for name in arguments.only))
    stages = [name for name in STAGES if name in wanted]
    try:
        trainer = CompanionTrainer(arguments.model, arguments.seed, choose_device(arguments.device))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    try:
        train(trainer, stages, arguments.work, arguments.seed, arguments.precision == "bf16")
    except OtherRunError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
