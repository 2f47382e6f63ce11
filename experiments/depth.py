"""Experiment 5: how deep each image goes through the resampler."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

import companions
from adaptive_resampler import AdaptivePerceiverResampler, CoarseToFineResampler
from experiments.lab import SEED, Lab, point, share
from mini_flamingo_evaluation import Exam
from perceiver_resampler import PerceiverResampler
from reporting import Column, format_bytes, format_count, format_percent, format_ratio, format_seconds, table

POINT_BUDGET = 0.005  # what the last lines speak of
TIMED = 64  # images


def run(lab: Lab) -> dict:
    coarse, heads = trained_parts(lab)
    known = companions.thresholds(lab.folder)
    bar = tqdm(total=2, desc="adaptive depth", leave=False)
    plain_right = right_by_depth(lab, lab.model.resampler, lab.seen_exam)
    bar.update()
    coarse_right = right_by_depth(lab, coarse, lab.seen_exam)
    bar.update()
    thresholds = {0.0: 0.0} | {budget: known["exits"]["64"][str(budget)] for budget in companions.BUDGETS}
    patches = lab.seen_exam.images[:TIMED]
    ways = {budget: AdaptivePerceiverResampler(coarse, heads, each) for budget, each in thresholds.items()}
    adaptive = [adaptive_row(lab, way, budget, coarse_right) for budget, way in ways.items()]
    fixed = time_all(lab, coarse, ways, patches, adaptive)
    bar.close()
    fixed_rows = [
        {
            "resampler": name,
            "depth": depth,
            "flops": resampler.flops(patches.shape[2], depth=depth),
            "seconds": fixed[name, depth].median / len(patches),
            "speedup": fixed[name, depth].speedup_over(fixed["plain", len(resampler.layers)]),
            "bytes": fixed[name, depth].peak_bytes,
            "right": share(of[:, depth - 1]),
        }
        for name, resampler, of in (
            ("plain", lab.model.resampler, plain_right),
            ("coarse to fine", coarse, coarse_right),
        )
        for depth in range(1, len(resampler.layers) + 1)
    ]
    return {
        "fixed": fixed_rows,
        "adaptive": adaptive,
        "scenes": len(coarse_right),
        "calibration scenes": known["scenes"],
        "grids": list(coarse.grids),
        "of": "the resampler",
        "points": [point(f"exit, may lose {row['budget']:.2%}", row["speedup"], row["right"]) for row in adaptive],
    }


def trained_parts(lab: Lab) -> tuple[CoarseToFineResampler, nn.ModuleList]:
    """The trained coarse-to-fine resampler and its heads."""
    config = lab.model.config
    coarse = companions.load(companions.coarse_to_fine(config), "coarse_to_fine", lab.folder)
    heads = companions.load(companions.exit_heads(config), "exit_heads", lab.folder)
    return coarse.to(lab.device, lab.dtype), heads.to(lab.device, lab.dtype)


@torch.inference_mode()
def right_by_depth(lab: Lab, resampler: PerceiverResampler, exam: Exam) -> Tensor:
    """bool[N, depth]: which answers are right after 1, 2 ... layers, for every image."""

    def stopped(depth: int) -> Callable[[Tensor], Tensor]:
        return lambda patches: resampler(patches, depth=depth)

    depths = range(1, len(resampler.layers) + 1)
    return torch.stack([lab.right(exam, stopped(depth)) for depth in depths], dim=1)


@torch.inference_mode()
def adaptive_row(lab: Lab, way: AdaptivePerceiverResampler, budget: float, right: Tensor) -> dict:
    """Each image's answer is the one after its exit. Random exits: the same depths, dealt out to other images."""
    exits = torch.cat([way.resample(each)[1] for each in lab.seen_exam.images.split(64)]).flatten().cpu()
    depth = len(way.resampler.layers)
    generator = torch.Generator().manual_seed(SEED)
    dealt = [exits[torch.randperm(len(exits), generator=generator)] for _ in range(20)]

    def right_at(exits: Tensor) -> float:
        return share(right.gather(1, exits[:, None] - 1))

    fixed = math.ceil(exits.double().mean().item())
    histogram = torch.bincount(exits, minlength=depth + 1)[1:].tolist()
    return {
        "budget": budget,
        "threshold": way.threshold,
        "depth": exits.double().mean().item(),
        "exits": " / ".join(f"{count / len(exits):.0%}" for count in histogram),
        "right": right_at(exits),
        "fixed": fixed,
        "fixed right": share(right[:, fixed - 1]),
        "random": sum(map(right_at, dealt)) / len(dealt),
        "full": share(right[:, -1]),
        "flops": sum(count * way.resampler.flops(lab.seen_exam.images.shape[2], depth=i) / len(exits)
                     for i, count in enumerate(histogram, 1)),
    }  # fmt: skip


def time_all(lab: Lab, coarse: CoarseToFineResampler, ways: dict, patches: Tensor, rows: list[dict]) -> dict:
    """Times every fixed depth of both resamplers, which it returns, and every adaptive way, whose seconds per image it
    adds to the rows; and checks that every image's visual tokens are those of its exit."""
    forms = {"plain": lab.model.resampler, "coarse to fine": coarse}
    fixed = {
        (name, depth): partial(form, patches, depth=depth)
        for name, form in forms.items()
        for depth in range(1, len(form.layers) + 1)
    }
    timings = lab.compare(fixed | {budget: partial(way, patches) for budget, way in ways.items()})
    plain, full = (timings[name, len(form.layers)] for name, form in forms.items())
    for row in rows:
        with torch.inference_mode():
            tokens, exits = ways[row["budget"]].resample(patches)
            worst = max(
                (tokens[exits == depth] - coarse(patches, depth=depth)[exits == depth]).abs().max().item()
                for depth in exits.unique().tolist()
            )
        timing = timings[row["budget"]]
        row |= {
            "seconds": timing.median / len(patches),
            "saved": 1 - timing.median / full.median,
            "speedup": timing.speedup_over(plain),
            "error": worst,
            "bytes": timing.peak_bytes,
        }
    return {name: timings[name] for name in fixed}


def show(result: dict) -> str:
    plain = [row["right"] for row in result["fixed"] if row["resampler"] == "plain"]
    coarse = [row["right"] for row in result["fixed"] if row["resampler"] != "plain"]
    chosen = next(row for row in result["adaptive"] if row["budget"] == POINT_BUDGET)
    fixed = [
        "resampler", "depth", Column("flops", "FLOP/image", format_count),
        Column("seconds", "per image", format_seconds),
        Column("speedup", "over plain", format_ratio), Column("bytes", "memory", format_bytes),
        Column("right", "right", format_percent),
    ]  # fmt: skip
    adaptive = [
        Column("budget", "may lose", format_percent), Column("threshold", "", "{:.4f}".format),
        Column("depth", "average depth"), Column("exits", "leave after 1 / 2 / 3 / 4"),
        Column("flops", "FLOP/image", format_count), Column("seconds", "per image", format_seconds),
        Column("saved", "time saved", format_percent), Column("speedup", "over plain", format_ratio),
        Column("bytes", "memory", format_bytes), Column("right", "right", format_percent),
        Column("random", "random exits", format_percent), Column("fixed", "next fixed depth"),
        Column("fixed right", "right", format_percent), Column("error", "error", "{:.0e}".format),
    ]  # fmt: skip
    lines = [
        table(result["fixed"], fixed, "5. Adaptive depth: what each layer of the resampler buys (trained model)"),
        "",
        f"The plain resampler has {plain[0]:.1%} after one layer and {plain[-1]:.1%} after all"
        + (": flat, so that an early exit has little to choose." if plain[-1] - plain[0] < 0.05 else "."),
        f"Coarse to fine, its layers see the patches averaged over grids of {result['grids']} cells a side: "
        f"{' / '.join(f'{each:.1%}' for each in coarse)}.",
        "",
        table(result["adaptive"], adaptive, "   each image leaves when a head says that going on gains nothing"),
        "",
        f"{result['scenes']} held-out scenes; thresholds set on {result['calibration scenes']} others. Time saved is "
        "against all layers of the same resampler, heads included.",
    ]
    saved = f"{chosen['saved']:.1%} of the time saved, at {chosen['depth']:.2f} layers on average"
    lines.append(
        f"Where {POINT_BUDGET:.1%} may be lost: {saved}; {chosen['right']:.1%} right where all layers have "
        f"{chosen['full']:.1%}, and the same exits dealt out at random {chosen['random']:.1%}. (One scene is "
        f"{1 / result['scenes']:.2%}.)"
    )
    return "\n".join(lines)
