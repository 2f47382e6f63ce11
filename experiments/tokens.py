"""Experiment 2: fewer visual tokens. What 256 to 4 of them cost, what they know, and a count chosen for each image.

Legend: N images, P patches, L visual tokens, D width, C cheaper counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import companions
from benchmarking import Timing
from companions import CHEAP_COUNTS
from confidence_head import calibrated_threshold
from experiments.lab import SEED, Lab, point, share
from gated_cross_attention import GatedCrossAttentionBlock
from interleaved_text import prompt_of
from mini_flamingo_evaluation import Exam
from perceiver_resampler import PerceiverResampler
from reduced_tokens import AdaptiveTokenCount, media_space
from reporting import Column, format_bytes, format_count, format_percent, format_ratio, format_seconds, table

COUNTS = (64, 48, 32, 24, 16, 8, 4)  # of the trained model
BASE = 64
CONTROLLED = (48, 32, 16, 8, 4)  # set beside random tokens and averages
WIDE_IMAGES, WIDE_PATCHES, WIDE_TEXT = 2, 576, 64
BUDGETS = (0.0, 0.005, 0.01, 0.02)  # share of answers that the choice may lose on the calibration set
POINT_BUDGET = 0.01

Timings = Mapping[tuple, Timing]


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
    sizes = QUICK if lab.arguments.quick else Sizes()
    plain, fast = lab.model.resampler, media_space(lab.model.resampler)
    counts = [count for count in COUNTS if count <= len(plain.latents)]
    first = next(iter(lab.exams))
    with tqdm(total=5 + 2 * len(lab.exams), desc="fewer tokens", leave=False) as bar:

        def done(value):
            bar.update()
            return value

        wide = done(time_wide_resampler(lab, sizes))
        wide_reading = done(time_wide_reading(lab, sizes))
        exams = {
            name: exam if name in (first, "calibration") else beginning(exam, sizes.others)
            for name, exam in lab.seen.items()
        }
        right = {name: done(right_by_count(lab, exam, fast, counts)) for name, exam in exams.items()}
        controls = {name: done(controls_by_count(lab, beginning(exams[name], sizes.controls))) for name in lab.exams}
        policies, reason = choose_policies(lab, fast, right["calibration"])
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
        "policies": chosen or [{"budget": budget, "note": reason} for budget in BUDGETS],
        "of": "the resampler",
        "points": [point(f"{count} tokens", speedups[count], quality[count]) for count in (32, 16) if count in speedups]
        + [
            point(f"{row['average']:.0f} tokens on average, chosen per image", row["speedup"], row["quality"])
            for row in chosen
        ],
    }


# ---------------------------------------------------------------------------------------------------- time


def relative_error(ours: Tensor, plain: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours - plain).abs().max() / plain.abs().max()).item()


def base_of(counts: Sequence[int]) -> int:
    return BASE if BASE in counts else max(counts)


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


# ---------------------------------------------------------------------------------------------------- quality


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


# ---------------------------------------------------------------------------------------------------- a count per image


def choose_policies(lab: Lab, fast: PerceiverResampler, right: Mapping[int, Tensor]) -> tuple[list[dict], str]:
    """For each budget the module whose threshold keeps it on the calibration set (right: its bool[N] by count); or none
    and the reason, where no head was trained for this model."""
    if lab.arguments.data != "shapes":
        return [], f"no head that chooses counts was trained for {lab.arguments.data}"
    try:
        head = companions.load(companions.count_head(lab.model.config), "count_head", lab.folder)
    except ValueError as error:
        return [], str(error)
    head = head.to(lab.device, lab.dtype)
    every = AdaptiveTokenCount(fast, head, CHEAP_COUNTS, threshold=0)
    with torch.inference_mode():
        risk = every.risks(lab.seen["calibration"].images).flatten(0, 1).cpu()
    loses = right[every.counts[-1]][:, None] & ~torch.stack([right[count] for count in CHEAP_COUNTS], dim=1)
    thresholds = {budget: calibrated_threshold(risk, loses, budget) for budget in BUDGETS}
    return [
        {"budget": budget, "module": AdaptiveTokenCount(fast, head, CHEAP_COUNTS, threshold)}
        for budget, threshold in thresholds.items()
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


# ---------------------------------------------------------------------------------------------------- text

TOKENS = Column("tokens")
RIGHT = Column("quality", "right", format_percent)
RESAMPLING = [
    Column("plain_seconds", "plain", format_seconds),
    Column("plain_speedup", f"over {BASE}", format_ratio),
    Column("media_space_seconds", "media space", format_seconds),
    Column("speedup", "cheaper of both", format_ratio),
    Column("flops", "FLOP/image", format_count),
    Column("bytes", "memory", format_bytes),
    Column("error", "error", "{:.0e}".format),
]
READING = [
    Column("prefill_seconds", "prefill", format_seconds),
    Column("prefill_speedup", f"over {BASE}", format_ratio),
    Column("prefill_bytes", "memory", format_bytes),
    Column("decode_seconds", "a word", format_seconds),
    Column("decode_speedup", f"over {BASE}", format_ratio),
    Column("kv_bytes", "K/V kept", format_bytes),
]
POLICY = [
    Column("average", "tokens", "{:.1f}".format),
    Column(
        "histogram",
        "% of images by count",
        lambda shares: " ".join(f"{count}:{100 * part:.0f}" for count, part in shares.items()),
    ),
    RIGHT,
    Column("random_quality", "at random", format_percent),
    Column("seconds", "time", format_seconds),
    Column("speedup", f"over {BASE}", format_ratio),
    Column("error", "error", "{:.0e}".format),
    Column("fixed", "fixed count"),
    Column("fixed_quality", "right", format_percent),
    Column("fixed_speedup", f"over {BASE}", format_ratio),
]


def show(result: dict) -> str:
    sizes = result["sizes"]
    asked = " and ".join(f"{count} ({name})" for name, count in result["images"].items())
    quality = [Column(key, key, format_percent) for key in result["quality"][-1] if key != "tokens"]
    policy = POLICY if "quality" in result["policies"][0] else [Column("note")]
    tables = [
        (
            result["wide"],
            [TOKENS, *RESAMPLING],
            f"One resampler layer, width {result['width']}, {WIDE_IMAGES} images of {WIDE_PATCHES} patches "
            f"(untrained weights: timing only). Baseline: the plain form at {BASE} tokens",
        ),
        (
            result["wide reading"],
            [TOKENS, *READING],
            f"One gated layer of that size reads the image: a prompt of {WIDE_TEXT} words, then one word (untrained "
            "weights: timing only)",
        ),
        (result["trained"], [TOKENS, *RESAMPLING], f"The trained resampler, {sizes['batch']} images"),
        (
            result["trained"],
            [TOKENS, *READING, RIGHT],
            f"The trained language model, all layers: {sizes['prompts']} prompts for a caption, then one word",
        ),
        (
            result["quality"],
            [TOKENS, *quality],
            f"Captions right word for word, of {asked}; random tokens, averages of all tokens: of {sizes['controls']}",
        ),
        (
            result["policies"],
            [Column("budget", "budget", format_percent), *policy],
            f"A count for each image ({sizes['batch']} are timed, choosing included); the next fixed count above it",
        ),
    ]
    parts = [table(rows, columns, title) for rows, columns, title in tables]
    return "\n\n".join(["2. Fewer visual tokens", *parts, "\n".join(conclusions(result))])


def conclusions(result: dict) -> list[str]:
    wide = next(row for row in result["wide"] if row["tokens"] == 16)
    rows = {row["tokens"]: row for row in result["trained"]}
    best = rows[max(rows)]["quality"]
    lines = [
        f"16 tokens from {WIDE_PATCHES} patches: {format_ratio(wide['plain_speedup'])} over {BASE} in the plain form, "
        f"{format_ratio(wide['speedup'])} in media space, for {format_percent(wide['flops'] / wide['plain_flops'])} of "
        "its operations."
    ]
    if 16 in rows:
        lines.append(
            f"The trained resampler at 16: {format_ratio(rows[16]['speedup'])}, and "
            f"{100 * (best - rows[16]['quality']):.1f} points fewer right. The language model reads "
            f"the prompt at {format_ratio(rows[16]['prefill_speedup'])} and says a word at "
            f"{format_ratio(rows[16]['decode_speedup'])}: only the first of the two makes keys and values of them."
        )
    for row in result["policies"]:
        if row["budget"] == POINT_BUDGET and "quality" in row:
            lines.append(
                f"A count for each image (budget {format_percent(POINT_BUDGET)}): {row['average']:.1f} tokens on "
                f"average, {format_ratio(row['speedup'])}, {100 * (best - row['quality']):.1f} points fewer right than "
                f"with all; {100 * (best - row['random_quality']):.1f} if the same counts are dealt out at random."
            )
    return lines
