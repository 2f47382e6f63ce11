"""Experiment 7: all together, from image to caption."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import companions
from adaptive_resampler import AdaptivePerceiverResampler
from benchmarking import peak_memory
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
PARTS = HALF, TOKENS, DEPTH, DRAFT = "half precision", "32 tokens", "adaptive depth", "draft"
COMPILED, CACHE = "compiled decoding", "warm cache"
BASELINE, ALL = "plain", " + ".join(PARTS)


class Workshop:
    """Builds the model with any set of parts."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.built: dict[frozenset[str], OptimizedFlamingo] = {}
        draft = companions.load(companions.draft(lab.model.config), "draft", lab.folder)
        self.draft = draft.to(lab.device, lab.dtype)
        coarse, heads, risk, loses = calibration(lab)
        threshold = calibrated_threshold(risk, loses, BUDGET)
        self.adaptive = AdaptivePerceiverResampler(coarse, heads, threshold)

    def build(self, parts: frozenset[str]) -> OptimizedFlamingo:
        """Every form once: what is compiled stays compiled."""
        if parts not in self.built:
            self.built[parts] = self._build(parts)
        return self.built[parts]

    def _build(self, parts: frozenset[str]) -> OptimizedFlamingo:
        return OptimizedFlamingo(
            self.lab.model,
            precision="bf16" if HALF in parts else "fp32",
            resampler=self.adaptive if DEPTH in parts else None,
            num_latents=32 if TOKENS in parts else None,
            draft=self.draft if DRAFT in parts else None,
            cache_bytes=CACHE_BYTES if CACHE in parts else None,
            compiled=COMPILED in parts,
        )


def configurations(leave_out: bool, compiled: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> group and parts: each part alone, one more at a time, all but one, and named ones."""
    rows: dict[str, tuple[str, tuple[str, ...]]] = {BASELINE: ("baseline", ())}
    rows |= {f"only {part}": ("one part", (part,)) for part in PARTS}
    rows |= {" + ".join(PARTS[:i]): ("one more", PARTS[:i]) for i in range(2, len(PARTS) + 1)}
    if leave_out:
        rows |= {f"all but {part}": ("one less", tuple(p for p in PARTS if p != part)) for part in PARTS}
    rows["32 tokens, half precision, depth 4, adaptive, cached"] = ("warm", (TOKENS, HALF, DEPTH, CACHE))
    rows["all four, warm cache"] = ("warm", (*PARTS, CACHE))
    if compiled:
        rows["all four, compiled decoding"] = ("compiled", (*PARTS, COMPILED))
        rows["all four, compiled decoding, warm cache"] = ("compiled", (*PARTS, COMPILED, CACHE))
    return rows


def run(lab: Lab) -> dict:
    quick, compiled = lab.arguments.quick, lab.arguments.compile
    sizes = ((1, 2 if quick else 3, True), (16, 1, False))
    bar = tqdm(total=1 + len(sizes), desc="combined", leave=False)
    workshop = Workshop(lab)
    bar.update()
    rows, qualities = [], {}
    for batch, batches, leave_out in sizes:
        rows += measured(lab, workshop, configurations(leave_out, compiled), batch, batches, qualities)
        bar.update()
    bar.close()
    return {
        "rows": rows,
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
    forms = {name: workshop.build(frozenset(parts)) for name, (_, parts) in wanted.items()}

    def say(name: str, count: int, new_tokens: int = NEW_TOKENS) -> list[Tensor]:
        generate = lab.model.generate if name == BASELINE else forms[name].generate
        return [generate(prompts, images, max_new_tokens=new_tokens) for prompts, images in data[:count]]

    runs = 3 if lab.arguments.quick else 7
    timings = lab.compare({name: partial(say, name, batches) for name in wanted}, memory=False, runs=runs)
    rows = []
    for name, (group, parts) in wanted.items():
        form, said, timing = forms[name], say(name, batches), timings[name]
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
                "weight_bytes": weights_of(form),
                # Of image, prompt and two words: counting a whole caption's thousands of small calls takes minutes.
                "peak_bytes": peak_memory(partial(say, name, 1, 2), lab.device),
                "own_words": sum(torch.equal(a, b) for a, b in zip(said, own, strict=True)) / len(said),
                "right": quality(lab, form, parts, qualities),
            }
        )
    return rows


def weights_of(form: OptimizedFlamingo) -> int:
    """Bytes of what is used: the model with its resampler or the one in its place, and the draft."""
    parts = [form.model, form.resampler, *([form.draft] if form.draft else [])]
    return sum(map(weight_bytes, parts)) - weight_bytes(form.model.resampler)


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
    title = "7. Combined: from an image to its caption (trained model)"
    lines = [in_words(result["rows"], batch) for batch in dict.fromkeys(row["batch"] for row in result["rows"])]
    return "\n".join([table(result["rows"], columns, title), "", *lines])


def in_words(rows: list[dict], batch: int) -> str:
    """What the composition reaches, beside its best part and the product of its parts."""
    rows = [row for row in rows if row["batch"] == batch]
    alone = [row for row in rows if row["group"] == "one part"]
    together = next(row for row in rows if row["name"] == ALL)
    cold = max((row for row in rows if CACHE not in row["parts"]), key=lambda row: row["speedup"])
    warm = max((row for row in rows if CACHE in row["parts"]), key=lambda row: row["speedup"])
    best = max(alone, key=lambda row: row["speedup"])
    product = math.prod(row["speedup"] for row in alone)
    return (
        f"Batch {batch}: cold {cold['speedup']:.2f}x ({cold['name']}), warm {warm['speedup']:.2f}x; the best single "
        f"part {best['speedup']:.2f}x ({best['name']}). The four alone multiply to {product:.2f}x; together, "
        f"uncompiled, they reach {together['speedup']:.2f}x, {together['speedup'] / product:.0%} of it."
    )
