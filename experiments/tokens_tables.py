"""The tables of experiment 2, fewer visual tokens, and what they say in words."""

from reporting import Column, format_bytes, format_count, format_percent, format_ratio, format_seconds, table

BASE = 64  # visual tokens: what fewer are set beside
WIDE_IMAGES, WIDE_PATCHES, WIDE_TEXT = 2, 576, 64
POINT_BUDGET = 0.01

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
