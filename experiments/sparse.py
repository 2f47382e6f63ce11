"""Optimization 3: text reads only some of the visual tokens.

(a) Exact: a token's scores against its own image alone, beside the dense form with a mask over all images.
(b) Lossy: the k most relevant keys of each query and head, or k visual tokens chosen once per image for all layers,
    each beside a random choice of the same size; what it costs in time, and in answers of the trained model.

The choice by attention needs queries. Here they are those of the resampler's warm-up decoder (or of its first layer
alone, whose queries are parameters, so it is cheap), or the language model's own in a pass over the true answer: an
oracle, for it sees what is asked for.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention_layers import CrossAttention, MediaKV, attend
from experiments.lab import SEED, Lab, point, share
from interleaved_text import tokenize
from media_masks import MediaLayout
from mini_flamingo import MiniFlamingo
from mini_flamingo_checkpoint import SHIPPED, load_weights
from mini_flamingo_evaluation import Exam
from reporting import Column, format_bytes, format_percent, format_ratio, format_seconds, table
from shapes_curriculum import ShapesCurriculum
from sparse_cross_attention import (
    SparseCrossAttention,
    attend_to_top_k,
    attention_by_key,
    attention_received,
    dense_masked_attention,
    select_visual_tokens,
)
from token_reader import TokenReader

HEADS, DIM_HEAD, LATENTS = 8, 64, 64
WIDTH = HEADS * DIM_HEAD
TOKENS = 512
LAYERS = 12  # gated layers that one shared choice serves in the timing table: GPT-2's number
CONTROL_SCENES = 48  # of an exam, for the controls and for the exams behind the first: every setting costs a pass
READ = "warm-up decoder"
READ_FIRST = "warm-up decoder's first layer"


def run(lab: Lab) -> dict:
    quick = lab.arguments.quick
    bar = tqdm(total=5, desc="sparse cross-attention", leave=False)
    result: dict = {}
    parts: dict[str, Callable[[], object]] = {
        "per image": lambda: per_image_rows(lab, (1, 4, 16) if quick else (1, 4, 16, 32), batch=1 if quick else 4),
        "top-k": lambda: top_k_rows(lab, (256, 64, 16) if quick else (256, 128, 64, 48, 32, 16), 2 if quick else 16),
        "crossover": lambda: crossover_rows(lab, (64, 1024) if quick else (64, 256, 1024, 4096, 16384)),
        "quality": lambda: quality_rows(lab),
        "trained": lambda: trained_rows(lab),
    }
    for name, part in parts.items():
        with torch.inference_mode():
            result[name] = part()
        bar.update()
    bar.close()
    result["points"] = list(points(result))
    return result


# ------------------------------------------------------------------------------------------- (a) per image, exact


def attention_core(lab: Lab) -> CrossAttention:
    """A cross-attention whose projections do nothing: what is left is the attention itself."""
    core = CrossAttention(WIDTH, WIDTH, DIM_HEAD, HEADS)
    core.norm = core.to_q = core.to_out = nn.Identity()
    return core.to(lab.device, lab.dtype)


def evenly(batch: int, images: int) -> Tensor:
    """int64[B, T]: each image is followed by the same number of words, as in a few-shot prompt."""
    return (torch.arange(TOKENS) * images // TOKENS).expand(batch, -1)


def unevenly(batch: int, images: int) -> Tensor:
    """int64[B, T]: images stand at random places, as on a web page; text before the first sees none."""
    generator = torch.Generator().manual_seed(SEED)
    at = torch.rand(batch, TOKENS, generator=generator).argsort(dim=1)[:, :images]
    return torch.zeros(batch, TOKENS, dtype=torch.int64).scatter(1, at, 1).cumsum(1) - 1


def per_image_rows(lab: Lab, counts: tuple[int, ...], batch: int) -> list[dict]:
    core, rows = attention_core(lab), []
    cases = [(images, *case) for images in counts for case in layouts(batch, images)]
    lab = replace(lab, seconds=lab.seconds / len(cases))  # the whole table takes as long as one comparison
    for images, layout, index in cases:
        index = index.to(lab.device)  # the grouping and the mask are made from it inside the timed calls
        x = lab.random(batch, TOKENS, WIDTH)
        k, v = lab.random(2, batch, images, HEADS, LATENTS, DIM_HEAD)
        media_kv = MediaKV(k, v.flip(-1))
        functions = {
            "masked": lambda x=x, kv=media_kv, i=index: dense_masked_attention(core, x, kv, i),
            "per image": lambda x=x, kv=media_kv, i=index: core(x, kv, i),
        }
        exact = dense_masked_attention(core, x.double(), MediaKV(media_kv.k.double(), media_kv.v.double()), index)
        errors = {name: relative_error(f(), exact) for name, f in functions.items()}
        require(errors["per image"] <= 4 * errors["masked"] + 1e-12, f"per image differs from the mask: {errors}")
        timings = lab.compare(functions)
        masked, sparse = timings["masked"], timings["per image"]
        rows.append(
            {
                "images": images, "layout": layout, "keys": images * LATENTS,
                "masked": masked.median, "seconds": sparse.median, "speedup": sparse.speedup_over(masked),
                "masked bytes": masked.peak_bytes, "bytes": sparse.peak_bytes,
                "masked error": errors["masked"], "error": errors["per image"], "batch": batch,
            }
        )  # fmt: skip
    return rows


def layouts(batch: int, images: int) -> list[tuple[str, Tensor]]:
    both = [("even", evenly(batch, images)), ("random", unevenly(batch, images))]
    return both if images > 1 else both[:1]


# ------------------------------------------------------------------------------------------- (b) top-k: time


def top_k_rows(lab: Lab, keeps: tuple[int, ...], batch: int) -> list[dict]:
    """One layer, its K/V projection included, over 4 images x 64 visual tokens, all 256 seen by every text token."""
    images, keys = 4, 4 * LATENTS
    layer = lab.untrained(lambda: CrossAttention(WIDTH, WIDTH, DIM_HEAD, HEADS))
    reader = lab.untrained(lambda: TokenReader(WIDTH, ShapesCurriculum.reading))
    x, media = lab.random(batch, TOKENS, WIDTH), lab.random(batch, images, LATENTS, WIDTH)
    together = media.flatten(1, 2)[:, None]  # one image of 256: what all tokens see needs no mask
    index = torch.zeros(batch, TOKENS, dtype=torch.int64, device=lab.device)
    relevance = relevance_by(reader, media, first_layer=False)

    def dense(media: Tensor = together, index: Tensor = index, layer: CrossAttention = layer) -> Tensor:
        return layer(x, layer.project_media(media), index)

    functions = {"dense": dense, "own image": lambda: dense(media, evenly(batch, images).to(lab.device))}
    for k in keeps:
        sparse = SparseCrossAttention(layer, k)
        functions[f"per query {k}"] = lambda sparse=sparse: dense(layer=sparse)
        functions[f"shared {k}"] = lambda k=k: dense(
            select_visual_tokens(media, relevance, k // images).flatten(1, 2)[:, None]
        )
    functions["choose"] = lambda: relevance_by(reader, media, first_layer=False)
    functions["choose cheaply"] = lambda: relevance_by(reader, media, first_layer=True)
    timings = lab.compare(functions)
    plain = timings["dense"]

    def row(name: str, form: str, k: int, kv_keys: int, error: float | None) -> dict:
        t = timings[name]
        kv_bytes = 2 * batch * kv_keys * WIDTH * x.element_size()
        return {"form": form, "k": k, "seconds": t.median, "speedup": t.speedup_over(plain), "kv bytes": kv_bytes,
                "bytes": t.peak_bytes, "error": error, "batch": batch}  # fmt: skip

    rows = [row("dense", "dense", keys, keys, None)]
    for k in keeps:
        error = relative_error(functions[f"per query {k}"]()[:1], chosen_by_mask(layer, x[:1], together[:1], k))
        require(error < tolerance(lab.dtype), f"top {k} differs from the same choice by a mask: {error}")
        rows.append(row(f"per query {k}", "per query and head", k, keys, error))
    for k in keeps:
        error = relative_error(functions[f"shared {k}"](), functions["dense"]().double()) if k == keys else None
        require(error is None or error < tolerance(lab.dtype), f"all tokens shared differ from dense: {error}")
        shared = row(f"shared {k}", "shared", k, k, error)
        for n in (1, LAYERS):  # arithmetic on the times of this table: the choice is made once for n layers
            for name in ("choose", "choose cheaply"):
                total = timings[name].median + n * shared["seconds"]
                shared[f"{name} {n}"] = n * plain.median / total
        rows.append(shared)
    rows.append(row("own image", "own image alone (exact)", LATENTS, keys, None))
    rows += [{"form": form, "seconds": timings[name].median, "bytes": timings[name].peak_bytes} for name, form in
             (("choose", f"choosing, {READ}"), ("choose cheaply", f"choosing, {READ_FIRST}"))]  # fmt: skip
    return rows


def chosen_by_mask(layer: CrossAttention, x: Tensor, media: Tensor, k: int) -> Tensor:
    """What a top-k layer must return, in float64: the same keys, kept by a mask over all."""
    kept: list[Tensor] = []

    def keep(scores: Tensor, k: int) -> Tensor:
        chosen = scores.topk(k, sorted=False).indices
        kept.append(torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True).flatten(0, 1))
        return chosen

    media_kv = layer.project_media(media)
    q = layer.to_q(layer.norm(x)).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    attend_to_top_k(q, media_kv.k[:, 0], media_kv.v[:, 0], k, choose=keep, chunk_bytes=2**40)
    q, key, value = (each.double() for each in (q, media_kv.k[:, 0], media_kv.v[:, 0]))
    out = attend(q, key, value, mask=kept[0][None]).transpose(1, 2).flatten(2)
    return out @ layer.to_out.weight.double().T


def crossover_rows(lab: Lab, key_counts: tuple[int, ...], k: int = 32) -> list[dict]:
    """The attention alone, exact top-k against fused, while the number of keys grows; and top-k where the choice costs
    nothing (k keys at equal distances), which bounds any faster way to choose by these scores."""

    def for_free(scores: Tensor, k: int) -> Tensor:
        spread = torch.arange(k, device=scores.device) * (scores.shape[-1] // k)
        return spread.expand(*scores.shape[:3], k)

    rows = []
    lab = replace(lab, seconds=lab.seconds / len(key_counts) / 2)
    for situation, batch, tokens in (("prompt", 1, TOKENS), ("decoding", 4, 1)):
        for keys in key_counts:
            q, kept = lab.random(batch, HEADS, tokens, DIM_HEAD), min(k, keys)
            key, value = lab.random(2, batch, HEADS, keys, DIM_HEAD)
            every = attend_to_top_k(q[:1, :, :1], key[:1], value[:1], keys)
            error = relative_error(every, attend(*(each.double() for each in (q[:1, :, :1], key[:1], value[:1]))))
            require(error < tolerance(lab.dtype), f"top-k of all {keys} keys differs from fused attention: {error}")
            timings = lab.compare(
                {
                    "fused": partial(attend, q, key, value),
                    "top-k": partial(attend_to_top_k, q, key, value, kept),
                    "free": partial(attend_to_top_k, q, key, value, kept, choose=for_free),
                },
                memory=False,
            )
            fused, top_k, free = (timings[name] for name in ("fused", "top-k", "free"))
            rows.append(
                {
                    "situation": f"{situation}, {batch * tokens} queries", "keys": keys, "k": kept,
                    "fused": fused.median, "top-k": top_k.median, "speedup": top_k.speedup_over(fused),
                    "speedup if choosing were free": free.speedup_over(fused),
                    "choosing, seconds per score": (top_k.median - free.median) / (batch * HEADS * tokens * keys),
                    "fused, seconds per score": fused.median / (batch * HEADS * tokens * keys),
                }
            )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------- (b) top-k: quality


def warm_up_decoder(lab: Lab) -> TokenReader | None:
    """The trained one; None where the trained model is not the shapes', for it then has none beside it."""
    if lab.arguments.data != "shapes":
        return None
    reader = TokenReader(lab.model.resampler.dim, ShapesCurriculum.reading)
    load_weights(SHIPPED / "token_reader.safetensors", reader)
    return reader.to(lab.device, lab.dtype).eval()


def relevance_by(reader: TokenReader, media: Tensor, first_layer: bool) -> Tensor:
    """The attention of the decoder's queries, float[B, M, L]. Of its first layer alone, and of its first group of
    queries (what is at each place?), it needs nothing but that layer's scores."""
    images = media.flatten(0, 1)
    if not first_layer:
        received = attention_received([layer[0] for layer in reader.layers], lambda: reader(images))
        return received.view(media.shape[:3])
    attention, places = reader.layers[0][0], next(iter(reader.groups.values())).queries
    queries = reader.queries[:places].expand(len(images), -1, -1)
    seen = torch.zeros(queries.shape[:2], dtype=torch.int64, device=media.device)
    received = attention_by_key(
        attention, queries, attention.project_media(images[:, None]), MediaLayout(seen, num_media=1)
    )
    return received.view(media.shape[:3])


def relevance_by_answer(lab: Lab, exam: Exam, media: Tensor) -> Tensor:
    """The language model's own attention, in a pass over prompts and true answers."""
    ids = tokenize(exam.examples, lab.tokenizer)[0].to(media.device)
    layers = [block.attn for block in lab.model.gated_layers.values()]
    return attention_received(layers, lambda: lab.model(ids, media=media), ids != lab.tokenizer.pad_id)


def random_relevance(media: Tensor, seed: int) -> Tensor:
    return torch.rand(media.shape[:3], generator=torch.Generator().manual_seed(seed)).to(media.device)


def random_keys(scores: Tensor, k: int) -> Tensor:
    """k random keys of each query and head, among those it sees."""
    return torch.rand_like(scores).masked_fill(scores == float("-inf"), -1).topk(k, sorted=False).indices


def shared_counts(lab: Lab) -> tuple[int, ...]:
    return (32,) if lab.arguments.quick else (48, 32, 16)


def with_top_k(model: MiniFlamingo, k: int, **choice: object) -> MiniFlamingo:
    """The same weights behind top-k attention."""
    model = copy.deepcopy(model)
    for block in model.gated_layers.values():
        block.attn = SparseCrossAttention(block.attn, k, **choice)
    return model


def quality_rows(lab: Lab) -> list[dict]:
    """Answers right word for word. One row per form and k, one column per exam."""
    reader, rows = warm_up_decoder(lab), {}
    for name in lab.exams:
        whole = as_visual_tokens(lab, lab.seen[name])
        is_first = name == next(iter(lab.exams))
        scenes = 8 if lab.arguments.quick else CONTROL_SCENES
        few = Exam(whole.examples[:scenes], whole.images[:scenes])
        for row in exam_rows(lab, whole if is_first else few, few, reader):
            entry = rows.setdefault((row["form"], row["k"]), {"form": row["form"], "k": row["k"]})
            entry[name], entry[f"{name}, scenes"] = row["right"], row["scenes"]
            if "note" in row:
                entry["note"] = row["note"]
    return list(rows.values())


def as_visual_tokens(lab: Lab, exam: Exam) -> Exam:
    """The exam with all visual tokens in place of the patches: every setting then starts from the same ones."""
    return replace(exam, images=torch.cat([lab.model.resampler(each) for each in exam.images.split(64)]))


def exam_rows(lab: Lab, exam: Exam, few: Exam, reader: TokenReader | None) -> Iterator[dict]:
    """`few` are the scenes for the controls."""
    latents = exam.images.shape[2]

    def right(exam: Exam, model: MiniFlamingo | None = None) -> float:
        return share(lab.right(exam, lambda media: media, model))

    def kept(exam: Exam, relevance: Tensor, k: int) -> Exam:
        return replace(exam, images=select_visual_tokens(exam.images, relevance, k))

    def row(form: str, k: int, scenes: Exam, right: float | None, **more: str) -> dict:
        return {"form": form, "k": k, "right": right, "scenes": len(scenes.examples), **more}

    yield row("all", latents, exam, right(exam))
    for k in (16, 1) if lab.arguments.quick else (32, 16, 8, 4, 2, 1):
        yield row("per query and head", k, exam, right(exam, with_top_k(lab.model, k)))
        random_model = with_top_k(lab.model, k, choose=random_keys)
        yield row("per query and head, random", k, few, right(few, random_model))
    ways: dict[str, tuple[Exam, Callable[[], list[Tensor]]]] = {
        "shared, first k": (exam, lambda: [-torch.arange(latents, device=lab.device).expand(exam.images.shape[:3])]),
        "shared, oracle": (few, lambda: [relevance_by_answer(lab, few, few.images)]),
        "shared, random (mean of 3)": (few, lambda: [random_relevance(few.images, seed) for seed in range(3)]),
    }
    for form, first_layer in ((f"shared, {READ}", False), (f"shared, {READ_FIRST}", True)):
        if reader is None:
            yield row(form, 32, exam, None, note="this model has no trained warm-up decoder beside it")
        else:
            ways[form] = (exam, lambda first=first_layer: [relevance_by(reader, exam.images, first)])
    for form, (scenes, relevances) in ways.items():
        draws = relevances()
        for k in shared_counts(lab):
            shares = [right(kept(scenes, relevance, k)) for relevance in draws]
            yield row(form, k, scenes, sum(shares) / len(shares))


# ------------------------------------------------------------------------------------- (b) shared: what it brings


def trained_rows(lab: Lab) -> list[dict]:
    """The trained model's cross-attention over a batch of the exam's captions, all layers, choosing included; and one
    decoding step of the whole model. The choice in front of decoding is over, so it is not part of a step."""
    model, reader = lab.model, warm_up_decoder(lab)
    exam = replace(lab.seen_exam, examples=lab.seen_exam.examples[:64], images=lab.seen_exam.images[:64])
    media = as_visual_tokens(lab, exam).images
    ids = tokenize(exam.examples, lab.tokenizer)[0].to(lab.device)
    layout = model.layout(ids, media.shape[1])
    blocks = list(model.gated_layers.values())
    x = lab.random(*ids.shape, model.config.dim)
    latents = media.shape[2]

    def read(select: Callable[[], Tensor]) -> Tensor:
        media = select()
        return sum(block.attn(x, block.attn.project_media(media), layout) for block in blocks)

    def first(k: int) -> Tensor:
        return media[:, :, :k]

    def by_reader(k: int, first_layer: bool) -> Tensor:
        return select_visual_tokens(media, relevance_by(reader, media, first_layer), k)

    selections: dict[tuple[str, int], Callable[[], Tensor]] = {("all", latents): lambda: media}
    for k in shared_counts(lab):
        selections["shared, first k", k] = partial(first, k)
        if reader is not None:
            selections[f"shared, {READ_FIRST}", k] = partial(by_reader, k, True)
            selections[f"shared, {READ}", k] = partial(by_reader, k, False)
    timings = lab.compare({name: partial(read, select) for name, select in selections.items()})
    steps = lab.compare({k: one_step(model, ids, first(k)) for k in (latents, *shared_counts(lab))}, memory=False)
    plain, rows = timings["all", latents], []
    for name, timing in timings.items():
        form, k = name
        kept, again = selections[name](), selections[name]()
        require(kept.shape[2] == k and torch.equal(kept, again), f"{form} chose {list(kept.shape)}, or anew each time")
        kv_bytes = len(blocks) * 2 * media.shape[0] * media.shape[1] * k * blocks[0].attn.inner * media.element_size()
        rows.append(
            {
                "form": form, "k": k, "seconds": timing.median, "speedup": timing.speedup_over(plain),
                "bytes": timing.peak_bytes, "kv bytes": kv_bytes,
                "step": steps[k].median, "step speedup": steps[k].speedup_over(steps[latents]), "batch": len(ids),
            }
        )  # fmt: skip
    return rows


def one_step(model: MiniFlamingo, ids: Tensor, media: Tensor) -> Callable[[], Tensor]:
    """One token for every row, always at the same place: the cache is set back before."""
    _, state = model.prefill(ids, media, slots=ids.shape[1] + 1)
    length, token = state.cache.length.clone(), ids[:, -1:]

    def step() -> Tensor:
        state.cache.length.copy_(length)
        return model.decode(token, state)

    return step


def points(result: dict) -> Iterator[dict]:
    exact = next(row for row in result["per image"] if row["images"] == 16 and row["layout"] == "even")
    yield point("16 images, own image alone (attention, over a mask)", exact["speedup"], None, exact["bytes"])
    right = {(row["form"], row["k"]): row for row in result["quality"]}
    name = next(key for key in result["quality"][0] if key not in ("form", "k") and not key.endswith(", scenes"))
    for row in result["trained"][1:]:
        quality = right[row["form"], row["k"]][name]
        setting = f"{row['k']} of {result['trained'][0]['k']}, {row['form']} (cross-attention)"
        yield point(setting, row["speedup"], quality, row["kv bytes"])


# ------------------------------------------------------------------------------------------- checks


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).abs().max() / exact.abs().max()).item()


def tolerance(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps  # rounding of sums over a few hundred products


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(f"sparse cross-attention: {otherwise}")


# ------------------------------------------------------------------------------------------- tables


def show(result: dict) -> str:
    seconds, ratio, size, percent, error = format_seconds, format_ratio, format_bytes, format_percent, "{:.1e}".format
    exact, top_k, crossover = result["per image"], result["top-k"], result["crossover"]
    exams = [key.removesuffix(", scenes") for key in result["quality"][0] if key.endswith(", scenes")]
    parts = [
        "3. Sparse cross-attention",
        table(
            exact,
            ["images", "layout", "keys", Column("masked", "dense, masked", seconds),
             Column("seconds", "own image alone", seconds), Column("speedup", "", ratio),
             Column("masked bytes", "memory, masked", size), Column("bytes", "memory", size),
             Column("masked error", "error, masked", error), Column("error", "", error)],
            f"(a) Exact: the attention alone, batch {exact[0]['batch']}, {TOKENS} tokens, {LATENTS} keys an image; "
            "grouping and mask included; error against float64",
        ),
        exact_in_words(exact),
        table(
            top_k,
            ["form", Column("k", "keys kept"), Column("seconds", "time", seconds), Column("speedup", "", ratio),
             Column("choose 1", "with choosing", ratio), Column(f"choose {LAYERS}", f"for {LAYERS} layers", ratio),
             Column(f"choose cheaply {LAYERS}", "chosen cheaply", ratio), Column("bytes", "memory", size),
             Column("kv bytes", "K/V", size), Column("error", "error", error)],
            f"(b) Top-k: one layer of width {WIDTH} with its K/V projection, batch {top_k[0]['batch']}, {TOKENS} "
            "tokens, 4 images x 64 visual tokens, all seen (untrained weights: timing only)",
        ),
        top_k_in_words(top_k),
        table(
            crossover,
            ["situation", "keys", "k", Column("fused", "", seconds), Column("top-k", "", seconds),
             Column("speedup", "", ratio), Column("speedup if choosing were free", "if choosing were free", ratio)],
            f"    The crossover: attention alone, {HEADS} heads x {DIM_HEAD}",
        ),
        *crossover_in_words(crossover),
        table(
            result["quality"],
            ["form", Column("k", "keys kept"),
             *(column for name in exams for column in (Column(name, name, percent), Column(f"{name}, scenes", "of"))),
             *(["note"] if any("note" in row for row in result["quality"]) else [])],
            "    Quality: captions of the trained model right word for word",
        ),
        table(
            result["trained"],
            ["form", Column("k", "keys kept"), Column("seconds", "cross-attention", seconds),
             Column("speedup", "", ratio), Column("bytes", "memory", size), Column("kv bytes", "K/V", size),
             Column("step", "decoding step", seconds), Column("step speedup", "speedup", ratio)],
            f"    The trained model, batch {result['trained'][0]['batch']}: cross-attention of all layers over the "
            "captions, K/V projection and choosing included; one decoding step of the whole model",
        ),
        *trained_in_words(result),
    ]  # fmt: skip
    return "\n\n".join(parts)


def exact_in_words(rows: list[dict]) -> str:
    at = {(row["images"], row["layout"]): row["speedup"] for row in rows}
    return (f"At 16 images, attending to the own image alone is {format_ratio(at[16, 'even'])} as fast as the mask "
            f"({format_ratio(at[16, 'random'])} with images at random places), with the same result.")  # fmt: skip


def top_k_in_words(rows: list[dict]) -> str:
    sparse = [row for row in rows if row["form"] == "per query and head" and row["k"] < rows[0]["k"]]
    best, own = max(sparse, key=lambda row: row["speedup"]), next(row for row in rows if "exact" in row["form"])
    paying = [row for row in rows if row["form"] == "shared" and row[f"choose cheaply {LAYERS}"] > 1]
    shared = max(paying, key=lambda row: row[f"choose cheaply {LAYERS}"], default=None)
    said = f"Per query and head, the best is {format_ratio(best['speedup'])} of dense, at k = {best['k']}: "
    said += "choosing costs more than it saves. " if best["speedup"] < 1 else "it pays here. "
    if shared is None:
        said += f"Shared, choosing eats the gain even when {LAYERS} layers share it. "
    else:
        gain = format_ratio(shared[f"choose cheaply {LAYERS}"])
        said += f"Shared by {LAYERS} layers, k = {shared['k']} gains {gain}, choosing included. "
    return said + f"Reading the own image alone gains {format_ratio(own['speedup'])} and loses nothing."


def crossover_in_words(rows: list[dict]) -> list[str]:
    lines = []
    for situation in dict.fromkeys(row["situation"] for row in rows):
        here = [row for row in rows if row["situation"] == situation]
        losing = [i for i, row in enumerate(here) if row["speedup"] <= 1]
        first = losing[-1] + 1 if losing else 0  # pays there and at every larger number tried
        if first < len(here):
            lines.append(f"{situation}: top-{here[-1]['k']} pays from {here[first]['keys']} keys on.")
        else:
            row = here[-1]
            lines.append(
                f"{situation}: top-{row['k']} never pays, up to {row['keys']} keys. The choice needs every score, half "
                f"of the products ({format_ratio(row['speedup if choosing were free'])} if choosing were free), and "
                f"choosing costs {format_seconds(row['choosing, seconds per score'])} a score where all of fused "
                f"attention costs {format_seconds(row['fused, seconds per score'])}; both grow with the keys."
            )
    return ["\n".join(lines)]


def trained_in_words(result: dict) -> list[str]:
    plain = result["quality"][0]
    name = next(key for key in plain if key not in ("form", "k") and not key.endswith(", scenes"))
    near = [row for row in result["quality"] if row.get(name) is not None and row[name] >= plain[name] - 0.01]
    per_query = min(row["k"] for row in near if row["form"] in ("per query and head", "all"))
    lines = [f"Within 1 point of all {plain['k']} keys: {per_query} per query and head (a limit of this model's "
             "attention, not a gain in time)."]  # fmt: skip
    kept = {(row["form"], row["k"]): row[name] for row in near}
    for row in result["trained"][1:]:
        if (row["form"], row["k"]) in kept:
            lines.append(
                f"{row['k']} {row['form']}: {format_percent(kept[row['form'], row['k']])} right, cross-attention "
                f"{format_ratio(row['speedup'])}, decoding step {format_ratio(row['step speedup'])}, K/V "
                f"{format_bytes(row['kv bytes'])} instead of {format_bytes(result['trained'][0]['kv bytes'])}."
            )
    return ["\n".join(lines)]
