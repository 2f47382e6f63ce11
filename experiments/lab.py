"""What every experiment is given: the trained model, held-out questions, larger shapes to time, how long to measure.

Quality is always the trained model's, on held-out data. Larger shapes have untrained weights and serve for timing only:
no figure that depends on content may come from them.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import mini_flamingo_evaluation as evaluation
from benchmarking import Timing, compare, seed_everything
from cifar_utils import load_cifar10
from interleaved_text import WordTokenizer, prompt_of
from mini_flamingo import MiniFlamingo, MiniFlamingoConfig
from mini_flamingo_evaluation import Encode, Exam
from mosaic_curriculum import mosaic_exam
from shapes_world import MAX_OBJECTS

SEED = 0  # of random weights, inputs and choices


@dataclass(frozen=True, eq=False)
class Lab:
    """model: the trained one, in `dtype` on `device`, eval mode; folder: where it and its companions are. exams: by
    name, the first is the one that "quality" means. preset: the larger shapes. seconds: how long one comparison
    measures."""

    model: MiniFlamingo
    tokenizer: WordTokenizer
    folder: Path
    exams: Mapping[str, Exam]
    arguments: argparse.Namespace  # the command line: data, quick, compile
    preset: MiniFlamingoConfig
    device: torch.device
    dtype: torch.dtype
    seconds: float

    @property
    def exam(self) -> Exam:
        return next(iter(self.exams.values()))

    @cached_property
    def seen(self) -> dict[str, Exam]:
        """The exams with the vision encoder's patches float[N, M, P, D] in place of the images: its
        work is done once, and `encode` then goes from patches to visual tokens."""
        return {name: self.see(exam) for name, exam in self.exams.items()}

    @property
    def seen_exam(self) -> Exam:
        return self.seen[next(iter(self.exams))]

    @torch.inference_mode()
    def see(self, exam: Exam) -> Exam:
        images = exam.images.to(self.device)
        patches = [self.model.vision_encoder(each.flatten(0, 1)) for each in images.split(64)]
        return replace(exam, images=torch.cat(patches).unflatten(0, images.shape[:2]))

    def right(self, exam: Exam, encode: Encode | None = None, model: MiniFlamingo | None = None) -> Tensor:
        """bool[N]: which answers are right word for word; `encode` as in `Exam` (default: the model's resampler for an
        exam out of `seen`, else its way from images)."""
        model = model or self.model
        if encode is None:
            encode = model.resampler if exam.images.is_floating_point() else model.encode_media
        return evaluation.forced_matches(model, self.tokenizer, exam, encode)

    def batches(self, size: int, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """The exam in batches, the first `count` or all: prompts int64[B, T], images uint8[B, M, 3, h, w]."""
        starts = range(0, len(self.exam.examples), size)[:count]
        return [
            (
                self.tokenizer.pad_left([prompt_of(each) for each in self.exam.examples[i : i + size]]).to(self.device),
                self.exam.images[i : i + size].to(self.device),
            )
            for i in starts
        ]

    def compare(
        self, functions: Mapping[str, Callable[[], object]], memory: bool = True, runs: int = 3
    ) -> dict[str, Timing]:
        """Times the functions in turns, for `seconds` altogether and at least so many runs each."""
        with torch.inference_mode():
            return compare(
                functions, device=self.device, warmup=1, min_runs=runs, min_seconds=self.seconds, memory=memory
            )

    def untrained(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module with random weights from the seed, on the device, in the dtype, in eval mode."""
        seed_everything(SEED)
        return make().to(self.device, self.dtype).eval().requires_grad_(False)

    def random(self, *shape: int) -> Tensor:
        """Random inputs from the seed."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        return values.to(self.device, self.dtype)


def exams_of(data: str, cifar_root: Path | None, count: int) -> dict[str, Exam]:
    """The exams of a data set, by name: captions of held-out images."""
    if data == "cifar10":
        return {"mosaics": mosaic_exam(load_cifar10(cifar_root, "test"), "list", count)}
    return {
        "scenes of 1-8 objects": evaluation.caption_exam(count, seed=1),
        "scenes of 8-10 objects": evaluation.caption_exam(count, objects=(8, MAX_OBJECTS), seed=4),
    }


def point(setting: str, speedup: float, quality: float | None = None, num_bytes: int | None = None) -> dict:
    """One setting of an optimization. speedup: over the plain model, measured; quality: share right on the lab's exam,
    None where the outputs were checked to be the same; num_bytes: the memory it needs, where that is the point."""
    return {"setting": setting, "speedup": speedup, "quality": quality, "bytes": num_bytes}


def share(right: Tensor) -> float:
    """bool[N] -> the share that is true."""
    return right.double().mean().item()
