"""Trains a Mini Flamingo: the paper's recipe in miniature, in stages.

    vision    the vision encoder, from a label for every patch
    language  the language model, on text alone: scenes written out in words, questions about them, episodes
    warmup    vision frozen; the resampler, read by a small decoder (token_reader.py says why this decides everything)
    align     vision and language frozen; the resampler and the gated blocks, on interleaved images and text
    few_shot  the same, with the emphasis on new words from a few examples and on counting
    counting  more of how many there are of what, which comes last
    everything all of it together, so that the last lesson does not displace the first

(CIFAR-10 ends with align.) (Alayrac et al. 2022, section 2 and appendix B.1.) The number of visual tokens and the
resampler's depth are drawn anew each step from the warm-up on, so one checkpoint works at any of them. At the end the
model is tested on held-out data and saved.

Without options this makes data/mini_flamingo, the shipped model, from generated scenes. `--data cifar10` makes
data/mini_flamingo_cifar10 from mosaics of real photographs. Stages keep their progress in --work: a killed run started
again goes on where it stopped, and ends with the same weights.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarking import choose_device, environment
from command_line import positive_int
from mini_flamingo import MiniFlamingo
from mini_flamingo_checkpoint import SHIPPED, save_mini_flamingo, save_weights
from mosaic_curriculum import GRID, MosaicCurriculum
from reporting import Column, format_percent, table, write_json
from shapes_curriculum import ShapesCurriculum
from token_reader import TokenReader, reading_accuracy, reading_loss
from training_loop import Interleaved, OtherRunError, Step, answer_accuracy, answer_loss, train_stage

LATENT_COUNTS, LATENT_WEIGHTS = (4, 8, 16, 32, 64), (0.1, 0.12, 0.18, 0.25, 0.35)
DEPTHS, DEPTH_WEIGHTS = (1, 2, 3, 4), (0.15, 0.2, 0.25, 0.4)


class PatchLabels(nn.Module):
    """The vision stage's throw-away head: reads the labels of its place off every patch."""

    def __init__(self, dim: int, heads: dict[str, int]):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(dim, classes) for name, classes in heads.items()})

    def forward(self, patches: Tensor, targets: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """patches float[B, P, D], targets int64[B, places] by name -> logits float[B, P, C] and targets int64[B, P]."""
        places = targets[next(iter(self.heads))].shape[1]
        side, grid = (round(count**0.5) for count in (patches.shape[1], places))
        cell = torch.arange(side, device=patches.device) * grid // side
        place = (cell[:, None] * grid + cell).flatten()
        return {n: head(patches) for n, head in self.heads.items()}, {n: targets[n][:, place] for n in self.heads}


class Trainer:
    """The parts of the model and, per stage, which of them learn and from what loss."""

    def __init__(self, curriculum: ShapesCurriculum | MosaicCurriculum, seed: int, device: torch.device):
        torch.manual_seed(seed)
        self.curriculum, self.device = curriculum, device
        config = curriculum.config
        self.model = MiniFlamingo(config).requires_grad_(False).to(device)
        self.reader = TokenReader(config.vision_dim, curriculum.reading).requires_grad_(False).to(device)
        self.patch_labels = PatchLabels(config.vision_dim, curriculum.reading["place"].heads).to(device)

    def parts(self, stage: str) -> list[nn.Module]:
        """What a stage trains."""
        model = self.model
        return {
            "vision": [model.vision_encoder, self.patch_labels],
            "language": [model.language_model],
            "warmup": [model.resampler, self.reader],
        }.get(stage, [model.resampler, self.reader, model.gated_layers])

    def parameter_groups(self, stage: str) -> list[dict]:
        """Beside the gated blocks the warmed-up parts learn at 0.3 of the rate; the gates, which start at 0, at 5 times
        it."""
        groups = []
        for module in self.parts(stage):
            factor = 0.3 if stage != "warmup" and module in (self.model.resampler, self.reader) else 1.0
            for name, parameter in module.named_parameters():
                rate = self.curriculum.stages[stage].learning_rate * (5.0 if name.endswith("gate") else factor)
                groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.05 if parameter.dim() > 1 else 0.0})
        return groups

    def loss(self, stage: str, step: Step) -> tuple[Tensor, dict[str, float]]:
        """A stage's loss at one step, and what its progress bar shows."""
        size = self.curriculum.stages[stage].batch_size
        if stage in ("vision", "language", "warmup"):
            return getattr(self, stage)(step, size)
        return self.align(getattr(self.curriculum, stage)(step, size), step)

    def elastic(self, step: Step) -> dict[str, int]:
        """A random number of visual tokens and resampler depth."""
        return {
            "num_latents": step.rng.choices(LATENT_COUNTS, LATENT_WEIGHTS)[0],
            "depth": step.rng.choices(DEPTHS, DEPTH_WEIGHTS)[0],
        }

    def pictures(self, step: Step, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = self.curriculum.pictures(step, size)
        return images.to(self.device), {name: labels.to(self.device) for name, labels in targets.items()}

    def vision(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        images, targets = self.pictures(step, size)
        logits, targets = self.patch_labels(self.model.vision_encoder(images), targets)
        return reading_loss(logits, targets), reading_accuracy(logits, targets)

    def language(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        input_ids, labels = (each.to(self.device) for each in self.curriculum.texts(step, size))
        logits = self.model.language_model(input_ids)
        return answer_loss(logits, labels), {"answers": answer_accuracy(logits, labels)}

    def warmup(self, step: Step, size: int) -> tuple[Tensor, dict[str, float]]:
        images, targets = self.pictures(step, size)
        logits = self.reader(self.model.encode_media(images[:, None], **self.elastic(step))[:, 0])
        return reading_loss(logits, targets), reading_accuracy(logits, targets)

    def align(self, batch: Interleaved, step: Step) -> tuple[Tensor, dict[str, float]]:
        """The language model's loss, with the warm-up's kept at 0.3 so that the latents stay readable."""
        labels = batch.labels.to(self.device)
        media = self.model.encode_media(batch.images.to(self.device), **self.elastic(step))
        logits = self.model(batch.input_ids.to(self.device), media=media)
        targets = {name: each.to(self.device) for name, each in batch.targets.items()}
        reading = reading_loss(self.reader(media.flatten(0, 1)[batch.is_real.to(self.device)]), targets)
        gate = max(block.attn_gate.tanh().abs().item() for block in self.model.gated_layers.values())
        stats = {"answers": answer_accuracy(logits, labels), "reading": reading.item(), "gate": gate}
        return answer_loss(logits, labels) + 0.3 * reading, stats


def train(trainer: Trainer, work: Path, seed: int, bf16: bool) -> dict[str, dict[str, float]]:
    """Runs the stages, each from where `work` left it, and returns their steps and seconds."""
    record = {}
    for name, stage in trainer.curriculum.stages.items():
        parts, groups = trainer.parts(name), trainer.parameter_groups(name)
        seconds = train_stage(name, stage, parts, groups, partial(trainer.loss, name), work, seed, bf16)
        record[name] = {"steps": stage.steps, "seconds": round(seconds, 1)}
    return record


OUTPUTS = {"shapes": SHIPPED, "cifar10": SHIPPED.with_name("mini_flamingo_cifar10")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=OUTPUTS, default="shapes", help="what to train on")
    parser.add_argument("--cifar-root", type=Path, help="folder or zip of CIFAR-10 images (default: download)")
    parser.add_argument("--out", type=Path, help="where the trained model goes (default: data/mini_flamingo...)")
    parser.add_argument("--work", type=Path, help="where a run keeps its progress (default: runs/...)")
    parser.add_argument("--seed", type=int, default=0, help="decides every batch and every initial weight")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="cpu, cuda ... (default: a GPU where there is one)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the matrix products")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or OUTPUTS[arguments.data]
    work = arguments.work or Path(__file__).parent / "runs" / out.name
    try:
        device = choose_device(arguments.device)
        curriculum = ShapesCurriculum() if arguments.data == "shapes" else MosaicCurriculum(arguments.cifar_root)
        out.mkdir(parents=True, exist_ok=True)  # before the hours of training, not after
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    trainer = Trainer(curriculum, arguments.seed, device)
    try:
        record = train(trainer, work, arguments.seed, arguments.precision == "bf16")
    except OtherRunError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    finish(trainer, record, out, arguments)


def finish(trainer: Trainer, record: dict, out: Path, arguments: argparse.Namespace) -> None:
    """Saves the trained model, tests it on held-out data and records both."""
    save_mini_flamingo(out, trainer.model, trainer.curriculum.vocabulary)
    save_weights(out / "token_reader.safetensors", trainer.reader)
    if arguments.data == "cifar10":  # for CIFAR10VisionEncoder
        save_weights(out / f"encoder-grid{GRID}.safetensors", trainer.model.vision_encoder)
    report = trainer.curriculum.report(trainer.model.eval())
    settings = {"seed": arguments.seed, "precision": arguments.precision, "data": arguments.data}
    training = {"settings": settings, "environment": environment(trainer.device), "stages": record, "report": report}
    write_json(out / "training.json", training)
    rows = [{"held out": name, "right": score} for name, score in report["right"].items()]
    print(table(rows, ["held out", Column("right", "right", format_percent)], f"saved in {out}"))


if __name__ == "__main__":
    main()
