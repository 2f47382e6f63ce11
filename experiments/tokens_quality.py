"""Quality of experiment 2: by number of visual tokens, beside two controls, and with a number chosen for each image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import companions
from benchmarking import Timing
from companions import BUDGETS, CHEAP_COUNTS
from experiments.lab import SEED, Lab, share
from experiments.tokens_tables import BASE
from mini_flamingo_evaluation import Exam
from perceiver_resampler import PerceiverResampler
from reduced_tokens import AdaptiveTokenCount

CONTROLLED = (48, 32, 16, 8, 4)  # set beside random tokens and averages

Timings = Mapping[tuple, Timing]


def relative_error(ours: Tensor, plain: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def base_of(counts: Sequence[int]) -> int:
    return BASE if BASE in counts else max(counts)


def beginning(exam: Exam, count: int) -> Exam:
    return replace(exam, examples=exam.examples[:count], images=exam.images[:count])


def right_by_count(lab: Lab, exam: Exam, fast: PerceiverResampler, counts: Sequence[int]) -> dict[int, Tensor]:
    """bool[N] by count: the quality of any choice of counts can be looked up in it."""
    return {count: lab.right(exam, lambda x, count=count: fast(x, count)) for count in counts}


def controls_by_count(lab: Lab, exam: Exam) -> dict[int, dict[str, float]]:
    """As many of all the visual tokens, each image a random choice of its own; and all of them averaged in n groups."""
    with torch.inference_mode():
        exam = replace(exam, images=lab.model.resampler(exam.images))
    generator = torch.Generator().manual_seed(SEED)

    def random_tokens(x: Tensor, count: int) -> Tensor:
        kept = torch.rand(x.shape[:3], generator=generator).argsort(dim=-1)[..., :count].to(x.device)
        return x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1]))

    def averages(x: Tensor, count: int) -> Tensor:
        return F.adaptive_avg_pool1d(x.flatten(0, 1).mT, count).mT.unflatten(0, x.shape[:2])

    def quality(make: Callable[[Tensor, int], Tensor], count: int) -> float:
        return share(lab.right(exam, lambda x: make(x, count)))

    fewer = [count for count in CONTROLLED if count < exam.images.shape[2]]
    return {count: {"random": quality(random_tokens, count), "averages": quality(averages, count)} for count in fewer}


def choose_policies(lab: Lab, fast: PerceiverResampler) -> tuple[list[dict], str]:
    """For each budget the module whose threshold keeps it on calibration scenes; or none and the reason, where no head
    was trained for this model."""
    if lab.arguments.data != "shapes":
        return [], f"no head that chooses counts was trained for {lab.arguments.data}"
    head = companions.load(companions.count_head(lab.model.config), "count_head", lab.folder)
    head = head.to(lab.device, lab.dtype)
    thresholds = companions.thresholds(lab.folder)["counts"]
    return [
        {"budget": budget, "module": AdaptiveTokenCount(fast, head, CHEAP_COUNTS, thresholds[str(budget)])}
        for budget in BUDGETS
    ], ""


def judge(
    lab: Lab, policy: dict, right: Mapping[int, Tensor], x: Tensor, timings: Timings, speedups: Mapping[int, float]
) -> dict:
    """One row: quality of the chosen counts, of the same counts dealt out at random (the mean over every way to do so)
    and of the fixed count next above; and the measured time, choosing included."""
    budget, module = policy["budget"], policy["module"]
    with torch.inference_mode():
        counts = module.choose(lab.seen_exam.images)[:, 0].cpu()
        error = max(
            relative_error(tokens, lab.model.resampler(x[rows], tokens.shape[2])) for rows, tokens in module.groups(x)
        )
    shares = {count: share(counts == count) for count in module.counts}
    average = counts.double().mean().item()
    fixed = min(count for count in right if count >= average)
    return {
        "budget": budget,
        "threshold": module.threshold,
        "average": average,
        "histogram": {str(count): part for count, part in shares.items()},
        "quality": share(torch.stack([right[count][i] for i, count in enumerate(counts.tolist())])),
        "random_quality": sum(part * share(right[count]) for count, part in shares.items()),
        "fixed": fixed,
        "fixed_quality": share(right[fixed]),
        "fixed_speedup": speedups[fixed],
        "seconds": timings[budget].median,
        "speedup": timings[budget].speedup_over(timings["plain", base_of(list(speedups))]),
        "bytes": timings[budget].peak_bytes,
        "error": error,
    }
