"""Experiment 2: fewer visual tokens. What 256 to 4 of them cost, what they know, and a count chosen for each image.

Legend: N images, P patches, L visual tokens, D width, C cheaper counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.lab import Lab, point, share
from experiments.tokens_quality import (
    Timings,
    base_of,
    beginning,
    choose_policies,
    controls_by_count,
    judge,
    relative_error,
    right_by_count,
)
from experiments.tokens_tables import BASE, WIDE_IMAGES, WIDE_PATCHES, WIDE_TEXT, show
from gated_cross_attention import GatedCrossAttentionBlock
from interleaved_text import prompt_of
from perceiver_resampler import PerceiverResampler
from reduced_tokens import media_space

COUNTS = (64, 48, 32, 24, 16, 8, 4)  # of the trained model


__all__ = ["run", "show"]


@dataclass(frozen=True)
class Sizes:
    """wide_counts: of the larger shape, one layer deep. batch: images whose visual tokens are timed. prompts: read
    and continued together. others, controls: how many images of the exams behind the first, and for the baselines."""

    wide_counts: tuple[int, ...] = (256, 128, 64, 48, 32, 16, 8, 4)
    batch: int = 32
    prompts: int = 16
    others: int = 96
    controls: int = 48


QUICK = Sizes(wide_counts=(64, 16), batch=4, prompts=4, others=8, controls=8)


def run(lab: Lab) -> dict:
    sizes, available = QUICK if lab.arguments.quick else Sizes(), len(lab.exam.examples)
    limited = ("batch", "prompts", "others", "controls")
    sizes = replace(sizes, **{name: min(available, getattr(sizes, name)) for name in limited})
    plain, fast = lab.model.resampler, media_space(lab.model.resampler)
    counts = [count for count in COUNTS if count <= len(plain.latents)]
    first = next(iter(lab.exams))
    with tqdm(total=4 + 2 * len(lab.exams), desc="fewer tokens", leave=False) as bar:

        def done(value):
            bar.update()
            return value

        wide = done(time_wide_resampler(lab, sizes))
        wide_reading = done(time_wide_reading(lab, sizes))
        exams = {name: exam if name == first else beginning(exam, sizes.others) for name, exam in lab.seen.items()}
        right = {name: done(right_by_count(lab, exam, fast, counts)) for name, exam in exams.items()}
        controls = {name: done(controls_by_count(lab, beginning(exams[name], sizes.controls))) for name in lab.exams}
        policies, reason = choose_policies(lab, fast)
        x = lab.seen_exam.images[: sizes.batch]
        others = {policy["budget"]: lambda choose=policy["module"]: choose.groups(x) for policy in policies}
        rows, timings = time_resampler(lab, plain, fast, x, counts, others)
        bar.update()
        reading = done(time_reading(lab, counts, sizes.prompts))
    quality = {count: share(answers) for count, answers in right[first].items()}
    trained = [row | words | {"quality": quality[row["tokens"]]} for row, words in zip(rows, reading, strict=True)]
    speedups = {row["tokens"]: row["speedup"] for row in rows}
    chosen = [judge(lab, policy, right[first], x, timings, speedups) for policy in policies]
    return {
        "width": lab.preset.vision_dim,
        "wide": wide,
        "wide reading": wide_reading,
        "sizes": asdict(sizes),
        "trained": trained,
        "images": {name: len(exams[name].examples) for name in lab.exams},
        "quality": [
            {"tokens": count}
            | {
                f"{name}: {kind}": value
                for name in lab.exams
                for kind, value in {"elastic": share(right[name][count]), **controls[name].get(count, {})}.items()
            }
            for count in counts
        ],
        "policies": chosen or [{"budget": None, "note": reason}],
        "of": "the resampler",
        "points": [point(f"{count} tokens", speedups[count], quality[count]) for count in counts if count < BASE]
        + [
            point(f"{row['average']:.0f} tokens on average, chosen per image", row["speedup"], row["quality"])
            for row in chosen
        ],
    }


# ---------------------------------------------------------------------------------------------------- time


def time_resampler(
    lab: Lab, plain: PerceiverResampler, fast: PerceiverResampler, x: Tensor, counts: Sequence[int], others: Mapping
) -> tuple[list[dict], Timings]:
    """A row for each count: the plain form and, where it is another one, the cheaper form. `others` are timed beside
    them."""
    functions: dict = dict(others)
    for count in counts:
        functions["plain", count] = lambda count=count: plain(x, count)
        if fast.layers[0][0].prefers_media_space(x.shape[-2], count):
            functions["media space", count] = lambda count=count: fast(x, count)
    timings, rows = lab.compare(functions), []
    base = timings["plain", base_of(counts)]
    for count in counts:
        regrouped = timings.get(("media space", count))
        cheaper = regrouped or timings["plain", count]
        with torch.inference_mode():
            error = relative_error(fast(x[:8], count), plain(x[:8], count))
        rows.append(
            {
                "tokens": count,
                "plain_seconds": timings["plain", count].median,
                "plain_speedup": timings["plain", count].speedup_over(base),
                "media_space_seconds": regrouped and regrouped.median,
                "speedup": cheaper.speedup_over(base),
                "bytes": cheaper.peak_bytes,
                "plain_flops": plain.flops(x.shape[-2], count),
                "flops": fast.flops(x.shape[-2], count),
                "error": error,
            }
        )
    return rows, timings


def time_wide_resampler(lab: Lab, sizes: Sizes) -> list[dict]:
    """One layer at the preset's width reads images of 576 patches."""
    config = lab.preset
    resampler = lab.untrained(
        lambda: PerceiverResampler(
            config.vision_dim,
            1,
            config.resampler_dim_head,
            config.resampler_heads,
            max(sizes.wide_counts),
        )
    )
    x = lab.random(WIDE_IMAGES, WIDE_PATCHES, config.vision_dim)
    return time_resampler(lab, resampler, media_space(resampler), x, sizes.wide_counts, {})[0]


def time_wide_reading(lab: Lab, sizes: Sizes) -> list[dict]:
    """One gated layer of the preset reads one image: a prompt of 64 words (the visual tokens' keys and values are made
    on the way), and then one word more."""
    config = lab.preset
    shape = (config.dim, config.vision_dim, config.cross_dim_head, config.cross_heads)
    block = lab.untrained(lambda: GatedCrossAttentionBlock(*shape, gate_init=0.5))
    text, index = lab.random(1, WIDE_TEXT, config.dim), torch.zeros(1, WIDE_TEXT, dtype=torch.int64, device=lab.device)
    functions, kv_bytes = {}, {}
    for count in sizes.wide_counts:
        media = lab.random(1, 1, count, config.vision_dim)
        kv = block.project_media(media)
        kv_bytes[count] = kv.k.nbytes + kv.v.nbytes
        functions["prefill", count] = lambda media=media: block(text, block.project_media(media), index)
        functions["decode", count] = lambda kv=kv: block(text[:, :1], kv, index[:, :1])
    return reading_rows(lab.compare(functions), kv_bytes)


def time_reading(lab: Lab, counts: Sequence[int], prompts: int) -> list[dict]:
    """The language model reads prompts of the exam with the trained resampler's visual tokens, and says one word."""
    model, exam = lab.model, lab.seen_exam
    ids = lab.tokenizer.pad_left([prompt_of(example) for example in exam.examples[:prompts]]).to(lab.device)
    slots = ids.shape[1] + 1
    functions, kv_bytes = {}, {}
    with torch.inference_mode():
        for count in counts:
            media = model.resampler(exam.images[:prompts], count)
            _, state = model.prefill(ids, media, slots)
            kv_bytes[count] = sum(kv.k.nbytes + kv.v.nbytes for kv in state.media_kv if kv)

            def decode(state=state):
                state.cache.length.fill_(slots - 1)  # always the same word again
                return model.decode(ids[:, -1:], state)

            functions["prefill", count] = lambda media=media: model.prefill(ids, media, slots)
            functions["decode", count] = decode
    return reading_rows(lab.compare(functions), kv_bytes)


def reading_rows(timings: Timings, kv_bytes: Mapping[int, int]) -> list[dict]:
    base, rows = base_of(list(kv_bytes)), []
    for count, num_bytes in kv_bytes.items():
        row = {"tokens": count, "kv_bytes": num_bytes}
        for part in ("prefill", "decode"):
            timing = timings[part, count]
            row[f"{part}_seconds"] = timing.median
            row[f"{part}_speedup"] = timing.speedup_over(timings[part, base])
            row[f"{part}_bytes"] = timing.peak_bytes
        rows.append(row)
    return rows
