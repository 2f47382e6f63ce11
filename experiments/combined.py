"""Experiment 7: all together, from image to caption."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import companions
from adaptive_resampler import AdaptivePerceiverResampler
from confidence_head import calibrated_threshold
from experiments.depth import calibration
from experiments.lab import Lab, point, share
from interleaved_text import prompt_of
from optimized_flamingo import OptimizedFlamingo
from reduced_precision import weight_bytes
from reporting import Column, format_bytes, format_percent, format_ratio, format_seconds, table

NEW_TOKENS = 64
CACHE_BYTES = 64 * 2**20
BUDGET = 0.005  # share of the answers that leaving the resampler early may lose
HALF, TOKENS, DEPTH, DRAFT, COMPILED = "half precision", "32 tokens", "adaptive depth", "draft", "compiled decoding"
CACHE = "warm cache"
BASELINE = "plain"


class Workshop:
    """Builds the model with any set of parts."""

    def __init__(self, lab: Lab):
        self.lab = lab
        draft = companions.load(companions.draft(lab.model.config), "draft", lab.folder)
        self.draft = draft.to(lab.device, lab.dtype)
        coarse, heads, risk, loses = calibration(lab)
        threshold = calibrated_threshold(risk, loses, BUDGET)
        self.adaptive = AdaptivePerceiverResampler(coarse, heads, threshold)

    def build(self, parts: Iterable[str]) -> OptimizedFlamingo:
        parts = set(parts)
        return OptimizedFlamingo(
            self.lab.model,
            precision="bf16" if HALF in parts else "fp32",
            resampler=self.adaptive if DEPTH in parts else None,
            num_latents=32 if TOKENS in parts else None,
            draft=self.draft if DRAFT in parts else None,
            cache_bytes=CACHE_BYTES if CACHE in parts else None,
            compiled=COMPILED in parts,
        )


def configurations(parts: Sequence[str], leave_out: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> group and parts: each part alone, one more at a time, all but one, and two named ones."""
    rows: dict[str, tuple[str, tuple[str, ...]]] = {BASELINE: ("baseline", ())}
    rows |= {f"only {part}": ("one part", (part,)) for part in parts}
    for i in range(2, len(parts) + 1):
        rows[f"... + {parts[i - 1]}"] = ("one more", tuple(parts[:i]))
    if leave_out:
        rows |= {f"all but {part}": ("one less", tuple(p for p in parts if p != part)) for part in parts}
    named = (TOKENS, HALF, DEPTH, CACHE)
    rows["32 tokens, half precision, depth 4, adaptive, cached"] = ("cached", named)
    rows["all, warm cache"] = ("cached", (*parts, CACHE))
    return rows


def run(lab: Lab) -> dict:
    quick = lab.arguments.quick
    parts = [HALF, TOKENS, DEPTH, DRAFT] + [COMPILED] * lab.arguments.compile
    sizes = ((1, 2 if quick else 5, True), (16, 1, False))
    bar = tqdm(total=1 + len(sizes), desc="combined", leave=False)
    workshop = Workshop(lab)
    rows, qualities = [], {}
    for batch, batches, leave_out in sizes:
        rows += measured(lab, workshop, configurations(parts, leave_out), batch, batches, qualities)
        bar.update()
    bar.close()
    alone = [row["speedup"] for row in rows if row["batch"] == 1 and row["group"] == "one part"]
    product = torch.tensor(alone, dtype=torch.float64).prod().item()
    together = next(row for row in rows if row["batch"] == 1 and set(row["parts"]) == set(parts) and len(parts) > 1)
    return {
        "rows": rows,
        "product of the parts": product,
        "together": together["speedup"],
        "of": "image to caption, one at a time",
        "points": [
            point(row["name"], row["speedup"], row["right"], row["weight_bytes"])
            for row in rows
            if row["batch"] == 1 and row["name"] != BASELINE
        ],
    }


@torch.inference_mode()
def measured(
    lab: Lab, workshop: Workshop, wanted: dict, batch: int, batches: int, qualities: dict[tuple, float]
) -> list[dict]:
    exam = lab.exam
    groups = [slice(i * batch, (i + 1) * batch) for i in range(batches)]
    data = [
        (
            lab.tokenizer.pad_left([prompt_of(each) for each in exam.examples[group]]).to(lab.device),
            exam.images[group].to(lab.device),
        )
        for group in groups
    ]
    forms = {name: workshop.build(parts) for name, (_, parts) in wanted.items()}

    def work(name: str) -> Callable[[], list[Tensor]]:
        say = lab.model.generate if name == BASELINE else forms[name].generate
        return lambda: [say(prompts, images, max_new_tokens=NEW_TOKENS) for prompts, images in data]

    # Telling the memory of thousands of small calls takes far longer than making them: for the large batch alone.
    timings = lab.compare({name: work(name) for name in wanted}, memory=batch > 1)
    rows = []
    for name, (group, parts) in wanted.items():
        form, said, timing = forms[name], work(name)(), timings[name]
        words = sum(int((each != lab.model.config.pad_token_id).sum()) for each in said)
        own = [form.model.generate(p, media=form.encode_media(i), max_new_tokens=NEW_TOKENS) for p, i in data]
        rows.append(
            {
                "batch": batch,
                "name": name,
                "group": group,
                "parts": list(parts),
                "seconds": timing.median / (batch * batches),
                "images_per_second": batch * batches / timing.median,
                "words_per_second": words / timing.median,
                "speedup": timing.speedup_over(timings[BASELINE]),
                "weight_bytes": sum(map(weight_bytes, (form.model, *([form.draft] if form.draft else [])))),
                "peak_bytes": timing.peak_bytes,
                "own_words": sum(torch.equal(a, b) for a, b in zip(said, own, strict=True)) / len(said),
                "right": quality(lab, form, parts, qualities),
            }
        )
    return rows


def quality(lab: Lab, form: OptimizedFlamingo, parts: Sequence[str], known: dict[tuple, float]) -> float:
    """Share of the lab's exam that the form's own model answers rightly from its own visual tokens. A draft, compiling
    and a cache do not change which words come out; `own_words` is the check."""
    key = tuple(part for part in parts if part in (HALF, TOKENS, DEPTH))
    key = tuple(sorted(key))
    if key not in known:
        known[key] = share(lab.right(lab.exam, form._encode_media, form.model))
    return known[key]


def show(result: dict) -> str:
    columns = [
        "batch", Column("name", "configuration"), Column("seconds", "per image", format_seconds),
        Column("images_per_second", "images/s", "{:.1f}".format),
        Column("words_per_second", "words/s", "{:.0f}".format),
        Column("speedup", "speedup", format_ratio), Column("weight_bytes", "weights", format_bytes),
        Column("peak_bytes", "memory", format_bytes), Column("right", "right", format_percent),
        Column("own_words", "its own greedy words", format_percent),
    ]  # fmt: skip
    rows = [row for row in result["rows"] if row["batch"] == 1]
    best = max((row for row in rows if row["group"] == "one part"), key=lambda row: row["speedup"])
    warm = next(row for row in rows if row["name"] == "all, warm cache")
    share_of = result["together"] / result["product of the parts"]
    return "\n".join(
        [
            table(result["rows"], columns, "7. Combined: from an image to its caption (trained model)"),
            "",
            f"One image at a time, all parts together: {result['together']:.2f}x cold, {warm['speedup']:.2f}x with a "
            f"warm cache; the best single part: {best['speedup']:.2f}x ({best['name']}).",
            f"The parts alone multiply to {result['product of the parts']:.2f}x: together they reach {share_of:.0%}.",
        ]
    )
