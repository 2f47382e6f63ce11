"""Experiment 7: all together, from image to caption."""

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import companions
from adaptive_resampler import AdaptivePerceiverResampler
from benchmarking import peak_memory
from experiments.depth import trained_parts
from experiments.lab import Lab, point, share
from interleaved_text import END_OF_CHUNK
from mini_flamingo_evaluation import exact_match
from optimized_flamingo import OptimizedFlamingo
from reduced_precision import weight_bytes
from reporting import Column, format_bytes, format_percent, format_ratio, format_seconds, table

NEW_TOKENS = 64
CACHE_BYTES = 64 * 2**20
BUDGET = 0.005  # share of the answers that leaving the resampler early may lose
PARTS = HALF, TOKENS, DEPTH, DRAFT = "half precision", "32 tokens", "adaptive depth", "draft"
COMPILED, CACHE, COLD = "compiled decoding", "warm cache", "cold cache"
BASELINE, ALL = "plain", " + ".join(PARTS)


class Workshop:
    """Builds the model with any set of parts."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.built: dict[frozenset[str], OptimizedFlamingo] = {}
        draft = companions.load(companions.draft(lab.model.config), "draft", lab.folder)
        self.draft = draft.to(lab.device, lab.dtype)
        self.coarse, self.heads = trained_parts(lab)
        self.thresholds = companions.thresholds(lab.folder)["exits"]  # set apart for 32 tokens and for 64

    def build(self, parts: frozenset[str]) -> OptimizedFlamingo:
        """Every form once: what is compiled stays compiled."""
        if parts not in self.built:
            self.built[parts] = self._build(parts)
        return self.built[parts]

    def _build(self, parts: frozenset[str]) -> OptimizedFlamingo:
        return OptimizedFlamingo(
            self.lab.model,
            precision="bf16" if HALF in parts else "fp32",
            resampler=self.adaptive(32 if TOKENS in parts else 64) if DEPTH in parts else None,
            num_latents=32 if TOKENS in parts else None,
            draft=self.draft if DRAFT in parts else None,
            cache_bytes=CACHE_BYTES if {CACHE, COLD} & parts else None,
            compiled=COMPILED in parts,
        )

    def adaptive(self, tokens: int) -> AdaptivePerceiverResampler:
        return AdaptivePerceiverResampler(self.coarse, self.heads, self.thresholds[str(tokens)][str(BUDGET)])


def configurations(leave_out: bool, compiled: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> group and parts: each part alone, one more at a time, all but one, and named ones."""
    rows: dict[str, tuple[str, tuple[str, ...]]] = {BASELINE: ("baseline", ())}
    rows |= {f"only {part}": ("one part", (part,)) for part in PARTS}
    rows |= {" + ".join(PARTS[:i]): ("one more", PARTS[:i]) for i in range(2, len(PARTS) + 1)}
    if leave_out:
        rows |= {f"all but {part}": ("one less", tuple(p for p in PARTS if p != part)) for part in PARTS}
    rows["32 tokens, half precision, depth 4, adaptive, cached"] = ("warm", (TOKENS, HALF, DEPTH, CACHE))
    rows["all four, cold cache"] = ("cold", (*PARTS, COLD))
    rows["all four, warm cache"] = ("warm", (*PARTS, CACHE))
    if compiled:
        rows["all four, compiled decoding"] = ("compiled", (*PARTS, COMPILED))
        rows["all four, compiled decoding, warm cache"] = ("compiled", (*PARTS, COMPILED, CACHE))
    return rows


def run(lab: Lab) -> dict:
    if lab.dtype != torch.float32:
        raise ValueError("half precision is one of its parts, so the plain model must be float32: leave out --dtype")
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
    data = lab.batches(batch, batches)
    forms = {name: workshop.build(frozenset(parts)) for name, (_, parts) in wanted.items()}

    def say(name: str) -> list[Tensor]:
        form, said = forms[name], []
        for prompts, images in data:
            if COLD in wanted[name][1]:
                form.cache.clear()  # every image is then hashed, missed, encoded and kept
            generate = lab.model.generate if name == BASELINE else form.generate
            said.append(generate(prompts, images, max_new_tokens=NEW_TOKENS))
        return said

    def read(name: str) -> object:
        """Up to the first word, with room for all: what comes behind needs no more at a time."""
        form, (prompts, images) = forms[name], data[0]
        media, slots = form.encode_media(images), prompts.shape[1] + NEW_TOKENS + 2 * form.guesses
        readers = [form.model, *([form.draft] if form.draft else [])]
        return [reader.prefill(prompts, media, slots) for reader in readers]

    def texts(said: list[Tensor]) -> list[str]:
        return [lab.tokenizer.decode(row) for batch in said for row in batch]

    compiling = {}
    for name, (_, parts) in wanted.items():
        if COMPILED in parts:
            start = time.perf_counter()
            say(name)
            compiling[name] = time.perf_counter() - start
    runs = 3 if lab.arguments.quick else 7
    timings = lab.compare({name: partial(say, name) for name in wanted}, memory=False, runs=runs)
    rows = []
    for name, (group, parts) in wanted.items():
        form, said, timing = forms[name], say(name), timings[name]
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
                "peak_bytes": peak_memory(partial(read, name), lab.device),
                "compile_seconds": compiling.get(name),
                "own_words": sum(a == b for a, b in zip(texts(said), texts(own), strict=True)) / (batch * batches),
                "right": quality(lab, form, parts, qualities),
            }
        )
    return rows


def weights_of(form: OptimizedFlamingo) -> int:
    """Bytes of what is used: the model with its resampler or the one in its place, and the draft."""
    parts = [form.model, form.resampler, *([form.draft] if form.draft else [])]
    return sum(map(weight_bytes, parts)) - weight_bytes(form.model.resampler)


def quality(lab: Lab, form: OptimizedFlamingo, parts: Sequence[str], known: dict[tuple, float]) -> float:
    """Share of the lab's exam that comes out right: generated with the draft where there is one, else in one pass. (A
    cache and compiling are left out of it: `own_words` tells of them.)"""
    key = tuple(part for part in PARTS if part in parts)
    if key not in known and DRAFT not in key:
        known[key] = share(lab.right(lab.exam, form.encode_anew, form.model))
    if key not in known:
        rows = [row for batch in lab.batches(64) for row in form.generate(*batch, max_new_tokens=NEW_TOKENS)]
        said = [lab.tokenizer.decode(row).removesuffix(END_OF_CHUNK).strip() for row in rows]
        known[key] = exact_match(said, lab.exam)
    return known[key]


def show(result: dict) -> str:
    columns = [
        "batch", Column("name", "configuration"), Column("seconds", "per image", format_seconds),
        Column("images_per_second", "images/s", "{:.1f}".format),
        Column("words_per_second", "words/s", "{:.0f}".format),
        Column("speedup", "speedup", format_ratio), Column("weight_bytes", "weights", format_bytes),
        Column("peak_bytes", "memory*", format_bytes), Column("right", "right", format_percent),
        Column("own_words", "its own greedy words", format_percent),
        Column("compile_seconds", "compiling", format_seconds),
    ]  # fmt: skip
    title = "7. Combined: from an image to its caption (trained model)"
    lines = [in_words(result["rows"], batch) for batch in dict.fromkeys(row["batch"] for row in result["rows"])]
    lines.append("* of images and prompts up to the first word, weights not counted.")
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
