"""What sparse cross-attention costs in time and memory: three tables of larger shapes, with random inputs.

Every output is checked before its row is made: against float64, or against the same choice made by a mask in float64.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention_layers import CrossAttention, MediaKV, attend
from benchmarking import Timing
from experiments.lab import SEED, Lab
from shapes_curriculum import ShapesCurriculum
from sparse_cross_attention import (
    SparseCrossAttention,
    attend_to_top_k,
    attention_received,
    dense_masked_attention,
    highest_scores,
    select_visual_tokens,
)
from token_reader import TokenReader

HEADS, DIM_HEAD, LATENTS = 8, 64, 64
WIDTH = HEADS * DIM_HEAD
TOKENS = 512
IMAGES = 4  # of the top-k table
PROMPT_KEYS = 4096  # at most: time grows with queries x keys
CHECKED = 64  # text tokens whose top-k output is compared with float64
DECODER = "warm-up decoder"  # of the resampler: a TokenReader

Call = Callable[[], Tensor]


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).abs().max() / exact.abs().max()).item()


def assert_close(error: float, lab: Lab, what: str) -> None:
    """Rounding of sums over a few hundred products is allowed."""
    assert error < 64 * torch.finfo(lab.dtype).eps, f"{what} differs from float64 by {error}"


def relevance_by_decoder(decoder: TokenReader, media: Tensor) -> Tensor:
    """The attention that the decoder's queries pay to each visual token: media float[B, M, L, D] -> float[B, M, L]."""
    layers = [attention for attention, _ in decoder.layers]
    return attention_received(layers, lambda: decoder(media.flatten(0, 1))).view(media.shape[:3])


# ------------------------------------------------------------------------------------------- (a) per image, exact


def evenly(batch: int, images: int) -> Tensor:
    """int64[B, T]: each image is followed by the same number of words, as in a few-shot prompt."""
    return (torch.arange(TOKENS) * images // TOKENS).expand(batch, -1)


def unevenly(batch: int, images: int) -> Tensor:
    """int64[B, T]: images stand at random places, as on a web page; text before the first sees none."""
    generator = torch.Generator().manual_seed(SEED)
    at = torch.rand(batch, TOKENS, generator=generator).argsort(dim=1)[:, :images]
    return torch.zeros(batch, TOKENS, dtype=torch.int64).scatter(1, at, 1).cumsum(1) - 1


def per_image_rows(lab: Lab, counts: tuple[int, ...], batch: int) -> list[dict]:
    """Attention to the own image alone, against a mask over the scores of all images."""
    layouts = {"even": evenly, "random": unevenly}
    cases = [(images, name) for images in counts for name in layouts if images > 1 or name == "even"]
    lab = replace(lab, seconds=lab.seconds / len(cases))  # the whole table takes as long as one comparison
    cases = tqdm(cases, desc="own image alone", leave=False)
    return [per_image_row(lab, images, name, layouts[name](batch, images)) for images, name in cases]


def per_image_row(lab: Lab, images: int, layout: str, index: Tensor) -> dict:
    core = CrossAttention(WIDTH, WIDTH, DIM_HEAD, HEADS)
    core.norm = core.to_q = core.to_out = nn.Identity()  # what is left is the attention itself
    index = index.to(lab.device)  # the grouping and the mask are made from it inside the timed calls
    x = lab.random(len(index), TOKENS, WIDTH)
    k, v = lab.random(2, len(index), images, HEADS, LATENTS, DIM_HEAD)
    functions = {
        "masked": lambda: dense_masked_attention(core, x, MediaKV(k, v), index),
        "per image": lambda: core(x, MediaKV(k, v), index),
    }
    exact = dense_masked_attention(core, x.double(), MediaKV(k.double(), v.double()), index)
    masked_error, error = (relative_error(function(), exact) for function in functions.values())
    assert error <= 4 * masked_error + 1e-12, f"per image is {error} from float64, the mask {masked_error}"
    masked, sparse = lab.compare(functions).values()
    return {
        "images": images, "layout": layout, "keys": images * LATENTS, "batch": len(index),
        "masked": masked.median, "seconds": sparse.median, "speedup": sparse.speedup_over(masked),
        "masked bytes": masked.peak_bytes, "bytes": sparse.peak_bytes, "masked error": masked_error, "error": error,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- (b) top-k


def top_k_rows(lab: Lab, keeps: tuple[int, ...], batch: int) -> list[dict]:
    """One layer, its K/V projection included, over 4 images x 64 visual tokens, all 256 seen by every text token."""
    layer = lab.untrained(lambda: CrossAttention(WIDTH, WIDTH, DIM_HEAD, HEADS))
    decoder = lab.untrained(lambda: TokenReader(WIDTH, ShapesCurriculum.reading))
    x, media = lab.random(batch, TOKENS, WIDTH), lab.random(batch, IMAGES, LATENTS, WIDTH)
    together = media.flatten(1, 2)[:, None]  # one image of 256: what all tokens see needs no mask
    own, seen = evenly(batch, IMAGES).to(lab.device), torch.zeros_like(x[..., 0], dtype=torch.int64)
    relevance = relevance_by_decoder(decoder, media)
    precise = copy.deepcopy(layer).double()

    def read(media: Tensor = together, index: Tensor = seen, layer: CrossAttention = layer) -> Tensor:
        return layer(x, layer.project_media(media), index)

    def selected(k: int) -> Tensor:
        return select_visual_tokens(media, relevance, k // IMAGES).flatten(1, 2)[:, None]

    def error(name: str, media: Tensor = together, index: Tensor = seen) -> float:
        kv = precise.project_media(media[:1].double())
        return relative_error(functions[name]()[:1], dense_masked_attention(precise, x[:1].double(), kv, index[:1]))

    functions: dict[str, Call] = {"dense": read, "own": partial(read, media, own)}
    functions |= {f"per query {k}": partial(read, layer=SparseCrossAttention(layer, k)) for k in keeps}
    functions |= {f"shared {k}": lambda k=k: read(selected(k)) for k in keeps}
    forms: list[tuple[str, str, int, float]] = [("dense", "dense", IMAGES * LATENTS, error("dense"))]
    forms += [(f"per query {k}", "per query and head", k, top_k_error(layer, precise, x, together, k)) for k in keeps]
    forms += [(f"shared {k}", "shared", k, error(f"shared {k}", selected(k))) for k in keeps]
    forms += [("own", "own image alone", LATENTS, error("own", media, own))]
    for _, form, k, wrong in forms:
        assert_close(wrong, lab, f"{form}, {k} keys,")
    timings = lab.compare(functions | {"choose": lambda: relevance_by_decoder(decoder, media)})
    rows = [top_k_row(timings, name, form, k, wrong) for name, form, k, wrong in forms]
    rows.append({"form": f"choosing by {DECODER}", "seconds": timings["choose"].median,
                 "bytes": timings["choose"].peak_bytes})  # fmt: skip
    return [row | {"batch": batch} for row in rows]


def top_k_row(timings: Mapping[str, Timing], name: str, form: str, k: int, error: float) -> dict:
    timing = timings[name]
    speedup = timing.speedup_over(timings["dense"])
    return {"form": form, "k": k, "seconds": timing.median, "speedup": speedup, "bytes": timing.peak_bytes,
            "error": error}  # fmt: skip


def top_k_error(layer: CrossAttention, precise: CrossAttention, x: Tensor, media: Tensor, k: int) -> float:
    """Against float64, in which a mask keeps the same keys: those of equal scores may be chosen either way."""
    mask = None
    x, media = x[:1, :CHECKED], media[:1]
    seen = torch.zeros_like(x[..., 0], dtype=torch.int64)

    def choose(scores: Tensor, k: int) -> Tensor:
        nonlocal mask
        assert mask is None, "more than one part: check fewer text tokens"
        chosen = highest_scores(scores, k)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        return chosen

    out = SparseCrossAttention(layer, k, choose)(x, layer.project_media(media), seen)
    kv = precise.project_media(media.double())
    q = precise.to_q(precise.norm(x.double())).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    return relative_error(out, precise.to_out(attend(q, kv.k[:, 0], kv.v[:, 0], mask).transpose(1, 2).flatten(2)))


# ------------------------------------------------------------------------------------------- the crossover


def equally_spaced(scores: Tensor, k: int) -> Tensor:
    """k keys without a look at the scores: the time that any faster way to choose could reach."""
    keys = torch.arange(k, device=scores.device) * (scores.shape[-1] // k)
    return keys.expand(*scores.shape[:3], k)


def crossover_rows(lab: Lab, key_counts: tuple[int, ...], top_k: int = 32) -> list[dict]:
    """The attention alone, top-k against fused, while the number of keys grows; and the same with no choice to make."""
    cases = [("prompt", 1, TOKENS, keys) for keys in key_counts if keys <= PROMPT_KEYS]
    cases += [("decoding", 4, 1, keys) for keys in key_counts]
    lab = replace(lab, seconds=lab.seconds / len(cases))
    rows = []
    for situation, batch, tokens, keys in tqdm(cases, desc="crossover", leave=False):
        q = lab.random(batch, HEADS, tokens, DIM_HEAD)
        k, v = lab.random(2, batch, HEADS, keys, DIM_HEAD)
        one = (q[:1, :, :1], k[:1], v[:1])
        error = relative_error(attend_to_top_k(*one, keys), attend(*(each.double() for each in one)))
        assert_close(error, lab, f"top-k of all {keys} keys")
        timings = lab.compare(
            {
                "fused": partial(attend, q, k, v),
                "top-k": partial(attend_to_top_k, q, k, v, top_k),
                "no choice": partial(attend_to_top_k, q, k, v, top_k, choose=equally_spaced),
            },
            memory=False,
        )
        fused = timings["fused"]
        row = {"situation": f"{situation}, {batch * tokens} queries", "keys": keys, "k": top_k, "error": error}
        row |= {name: timing.median for name, timing in timings.items()}
        rows.append(row | {f"{name} speedup": timing.speedup_over(fused) for name, timing in timings.items()})
    return rows
