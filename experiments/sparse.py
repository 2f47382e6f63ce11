"""Experiment 3: text reads only some of the visual tokens.

(a) Exact: a token's scores against its own image alone, beside the dense form with a mask over all images.
(b) Lossy: the k most relevant keys of each query and head, or k visual tokens chosen once per image for all layers,
    each beside a random choice of the same size; what it costs in time, and in answers of the trained model.
"""

from collections.abc import Callable

import torch
from tqdm import tqdm

from experiments.lab import Lab, point
from experiments.sparse_quality import ALL, CONTROLS, PER_QUERY, quality_rows, trained_rows
from experiments.sparse_timing import (
    DIM_HEAD,
    HEADS,
    IMAGES,
    LATENTS,
    TOKENS,
    WIDTH,
    crossover_rows,
    per_image_rows,
    top_k_rows,
)
from reporting import Column, format_bytes, format_percent, format_ratio, format_seconds, table

POINT = 0.01  # of the answers


def run(lab: Lab) -> dict:
    quick = lab.arguments.quick
    bar = tqdm(total=5, desc="sparse cross-attention", leave=False)

    def done(part: Callable, *arguments: object):
        with torch.inference_mode():
            rows = part(lab, *arguments)
        bar.update()
        return rows

    exact = done(per_image_rows, (1, 16) if quick else (1, 4, 16, 32), 1)
    top_k = done(top_k_rows, (256, 64) if quick else (256, 128, 64, 48, 32, 16), 1 if quick else 8)
    crossover = done(crossover_rows, (64, 512) if quick else (64, 256, 1024, 4096, 16384))
    quality, scenes = done(quality_rows)
    trained = done(trained_rows)
    bar.close()
    name = next(iter(scenes))
    right = {(row["form"], row["k"]): row.get(name) for row in quality}
    return {
        "of": "cross-attention over a caption",
        "per image": exact,
        "top-k": top_k,
        "crossover": crossover,
        "quality": quality,
        "scenes": scenes,
        "trained": [row | {"right": right[row["form"], row["k"]]} for row in trained],
        # Over the plain model, which reads the own image alone already. The first k are no choice: optimization 2's.
        "points": [
            point(f"{row['k']} of {trained[0]['k']} tokens, {row['form']}", row["speedup"],
                  right[row["form"], row["k"]], row["kv bytes"])
            for row in trained[1:] if "speedup" in row and "first" not in row["form"]
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- tables

TIME = [Column("seconds", "time", format_seconds), Column("speedup", "", format_ratio)]
MEMORY = Column("bytes", "memory", format_bytes)
ERROR = Column("error", "", "{:.1e}".format)
FORM, KEPT = Column("form"), Column("k", "keys kept")


def show(result: dict) -> str:
    exact, top_k, crossover = result["per image"], result["top-k"], result["crossover"]
    quality, trained, scenes = result["quality"], result["trained"], result["scenes"]
    note = ["note"] if any("note" in row for row in quality) else []
    tables = [
        table(
            exact,
            ["images", "layout", "keys", Column("masked", "dense, masked", format_seconds), *TIME,
             Column("masked bytes", "memory, masked", format_bytes), MEMORY,
             Column("masked error", "error, masked", "{:.1e}".format), ERROR],
            f"(a) Exact: own image alone, against dense scores behind a mask (attention alone, batch "
            f"{exact[0]['batch']}, {TOKENS} text tokens, {LATENTS} keys an image)",
        ),
        table(
            top_k,
            [FORM, KEPT, *TIME, MEMORY, ERROR],
            f"(b) Top-k: one layer of width {WIDTH} with its K/V projection, batch {top_k[0]['batch']}, {TOKENS} text "
            f"tokens, {IMAGES} images x {LATENTS} visual tokens, all seen (untrained weights: timing only)",
        ),
        table(
            crossover,
            ["situation", "keys", KEPT, Column("fused", "", format_seconds), Column("top-k", "", format_seconds),
             Column("top-k speedup", "speedup", format_ratio), Column("no choice", "no choice to make", format_seconds),
             Column("no choice speedup", "speedup", format_ratio), ERROR],
            f"The crossover: attention alone, {HEADS} heads x {DIM_HEAD}; \"no choice\" reads equally spaced keys",
        ),
        table(
            quality,
            [FORM, KEPT, *(Column(name, f"{name} ({n})", format_percent) for name, n in scenes.items()), *note],
            "Captions of the trained model right word for word, by exam (scenes; random and oracle: of the first "
            f"{CONTROLS} at most)",
        ),
        table(
            trained,
            [FORM, KEPT, *TIME, MEMORY, Column("kv bytes", "K/V", format_bytes),
             Column("step", "decoding step", format_seconds), Column("step speedup", "speedup", format_ratio),
             Column("right", "right", format_percent), *note],
            f"The trained model, batch {trained[0]['batch']}: cross-attention of all layers over a caption, K/V "
            "projection and choosing included; one decoding step of the whole model",
        ),
    ]  # fmt: skip
    return "\n\n".join(["3. Sparse cross-attention", *tables, "\n".join(in_words(result))])


def in_words(result: dict) -> list[str]:
    return [per_image_in_words(result), top_k_in_words(result), crossover_in_words(result), quality_in_words(result)]


def per_image_in_words(result: dict) -> str:
    gains = {row["layout"]: format_ratio(row["speedup"]) for row in result["per image"] if row["images"] == 16}
    return (f"Own image alone, of 16: {gains['even']} as fast as the mask ({gains['random']} with images at random "
            "places), with the same result.")  # fmt: skip


def top_k_in_words(result: dict) -> str:
    rows = result["top-k"]

    def best(form: str) -> dict:
        lossy = [row for row in rows if row["form"] == form and row["k"] < rows[0]["k"]]
        return max(lossy, key=lambda row: row["speedup"])

    per_query, shared, choosing = best(PER_QUERY), best("shared"), rows[-1]
    verdict = "choosing costs more than it saves" if per_query["speedup"] < 1 else "it pays"
    return (
        f"Top-k at best: {format_ratio(per_query['speedup'])} per query and head (k = {per_query['k']}), so {verdict}; "
        f"{format_ratio(shared['speedup'])} shared (k = {shared['k']}), after {format_seconds(choosing['seconds'])} of "
        f"{choosing['form']}, once for all layers. A dense layer takes {format_seconds(rows[0]['seconds'])}."
    )


def crossover_in_words(result: dict) -> str:
    """Where top-k pays, there and at every larger number of keys that was tried."""
    parts = []
    for situation in dict.fromkeys(row["situation"] for row in result["crossover"]):
        rows = [row for row in result["crossover"] if row["situation"] == situation]
        losing = [i for i, row in enumerate(rows) if row["top-k speedup"] <= 1]
        first = losing[-1] + 1 if losing else 0
        if first < len(rows):
            parts.append(f"from {rows[first]['keys']} keys on ({situation})")
        else:
            last = rows[-1]
            parts.append(f"nowhere up to {last['keys']} keys ({situation}; {format_ratio(last['no choice speedup'])} "
                         "there with no choice to make)")  # fmt: skip
    return f"Top-{result['crossover'][0]['k']} beats fused attention " + ", ".join(parts) + "."


def quality_in_words(result: dict) -> str:
    name, plain = next(iter(result["scenes"])), result["quality"][0]
    near = [row for row in result["quality"] if row.get(name) is not None and row[name] >= plain[name] - POINT]
    per_query = min(row["k"] for row in near if row["form"] in (PER_QUERY, ALL))
    said = f"Within 1 point of all {plain['k']} keys: {per_query} per query and head; shared, "
    fast = [row for row in result["trained"][1:] if "speedup" in row and row["right"] >= plain[name] - POINT]
    if not fast:
        return said + "none of those timed."
    best = max(fast, key=lambda row: row["speedup"])
    return said + (
        f"{best['k']} ({best['form'].removeprefix('shared, ')}): cross-attention {format_ratio(best['speedup'])}, "
        f"decoding step {format_ratio(best['step speedup'])}, K/V {format_bytes(best['kv bytes'])} instead of "
        f"{format_bytes(result['trained'][0]['kv bytes'])}."
    )
