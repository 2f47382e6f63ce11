"""The tables of experiment 1, the visual token cache, and what they say in words."""

from reporting import Column, format_bytes, format_ratio, table

PLAIN = "no cache"
HIT_COST, MISS_COST = 0.02, 0.03  # targets: of a hit and of a miss, as shares of encoding


def show(result: dict) -> str:
    def outputs(row: dict) -> str:
        return "-" if "identical" not in row else "identical" if row["identical"] else f"differ by {row['error']:.1e}"

    rates = [row | {"outputs": outputs(row)} for row in result["rates"]]
    columns = [
        Column("model"),
        Column("setting", "hits"),
        Column("images", "batch"),
        Column("ms", "ms/image"),
        Column("speedup", "speedup", format_ratio),
        Column("own", "cache's own ms"),
        Column("share", "of encoding", lambda share: f"{share:.2%}"),
        Column("bytes", "held", format_bytes),
        Column("outputs"),
    ]
    kept_columns = [
        Column("model"),
        Column("kept", "kept, all hits"),
        Column("images", "batch"),
        Column("ms", "ms/image, up to K/V"),
        Column("speedup", "speedup", format_ratio),
        Column("bytes", "bytes/image", format_bytes),
        Column("identical"),
    ]
    parts = [
        table(rates, columns, "Images encoded by hit rate (cache's own: hash, look up, copy, keep)"),
        table(result["kept"], kept_columns, "What a hit gives: visual tokens, or each layer's keys and values as well"),
        "\n".join(conclusions(result)),
    ]
    return "\n\n".join(["1. Visual token cache", *parts])


def conclusions(result: dict) -> list[str]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in result["rates"]):
        rows = {row["setting"]: row for row in result["rates"] if row["model"] == model}
        hit, miss, plain = rows["100%"], rows["0%"], rows[PLAIN]
        lines.append(
            f"{model}: a hit costs {hit['share']:.2%} of encoding ({met(hit['share'], HIT_COST)}; hashing "
            f"{format_bytes(hit['image bytes'])} is {hit['keys']:.3f} of its {hit['own']:.3f} ms), an image "
            f"that misses {miss['share']:.2%} on top of it ({met(miss['share'], MISS_COST)}). At 0 % hits time differs "
            f"by {miss['ms'] / plain['ms'] - 1:+.1%}; runs of no cache alone spread over {plain['spread']:.1%}."
        )
    if all(row.get("identical", True) for row in result["rates"]):
        lines.append("All outputs are those of no cache, bit for bit: quality is the plain model's, by identity.")
    else:
        lines.append(
            "A hit is what was stored, bit for bit; where outputs differ, encoding itself rounds by batch size."
        )
    return lines


def met(share: float, target: float) -> str:
    return f"target {target:.0%}: {'met' if share <= target else 'missed'}"
