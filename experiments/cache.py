"""Optimization 1, the visual token cache: time per image by hit rate, what the cache itself costs, and what it keeps.

Every timed batch holds the wanted share of images that were never seen: they are stamped with a number that counts on.
The cache's own work (hash, look up, copy, keep) is timed apart, with an encoder that costs nothing. Quality needs no
second look: outputs are compared with those of no cache bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention_layers import CrossAttention, MediaKV
from experiments.cache_tables import PLAIN, show
from experiments.lab import SEED, Lab, point
from mini_flamingo import MiniFlamingoConfig
from perceiver_resampler import PerceiverResampler
from vision_encoder import VisionEncoder
from visual_token_cache import LiveFingerprint, VisualTokenCache, pixels_keys

__all__ = ["run", "show"]


@dataclass(frozen=True)
class Subject:
    """A model to put the cache in front of. batches: hit rate -> images per batch. images uint8[N, 1, 3, h, w]."""

    name: str
    modules: tuple[nn.Module, ...]
    encode: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], list[MediaKV | None]]
    images: Tensor
    batches: dict[float, int]


def trained(lab: Lab) -> Subject:
    model = lab.model
    images = lab.exam.images.flatten(0, 1)[:20, None].cpu()

    def encode(images: Tensor) -> Tensor:
        return model.encode_media(images.to(lab.device))

    modules = (model.vision_encoder, model.resampler, model.gated_layers)
    return Subject("trained", modules, encode, model.project_media, images, dict.fromkeys((0.0, 0.5, 0.9, 1.0), 20))


def larger(lab: Lab) -> Subject:
    """The preset's way from images to keys and values, and no language model."""
    config: MiniFlamingoConfig = lab.preset
    vision = lab.untrained(
        lambda: VisionEncoder(
            config.image_size, config.patch_size, config.vision_dim, config.vision_depth, config.vision_heads
        )
    )
    resampler = lab.untrained(
        lambda: PerceiverResampler(
            config.vision_dim,
            config.resampler_depth,
            config.resampler_dim_head,
            config.resampler_heads,
            config.num_latents,
        )
    )
    gated = config.depth // config.cross_attn_every_n_layers
    readers = lab.untrained(
        lambda: nn.ModuleList(
            CrossAttention(config.dim, config.vision_dim, config.cross_dim_head, config.cross_heads)
            for _ in range(gated)
        )
    )

    def encode(images: Tensor) -> Tensor:
        patches = vision(images.to(lab.device).flatten(0, 1))
        return resampler(patches.unflatten(0, images.shape[:2]))

    def project(media: Tensor) -> list[MediaKV | None]:
        return [reader.project_media(media) for reader in readers]

    # Encoding one image takes a CPU a quarter of a second: no more of them than the hit rate needs.
    few = 10 if lab.device.type == "cuda" else 2
    batches = {0.0: few, 0.5: few, 0.9: 10, 1.0: 10}
    if lab.arguments.quick:
        batches = {0.0: 1, 0.5: 2, 1.0: 2}
    shape = (max(batches.values()), 1, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    name = f"{config.dim} wide, untrained"
    return Subject(name, (vision, resampler, readers), encode, project, images, batches)


NUMBERS = count(1)


def stamped(images: Tensor, fresh: int) -> Tensor:
    """A copy in which the first `fresh` images are ones that were never seen."""
    images = images.clone()
    for image in images[:fresh]:
        image[0, 0, 0, :4] = torch.tensor(list(next(NUMBERS).to_bytes(4, "little")), dtype=torch.uint8)
    return images


def measure_rates(lab: Lab, subject: Subject) -> list[dict]:
    """One row per hit rate behind the row of no cache. Raises RuntimeError if a hit is not what was stored."""
    known, encode = subject.images, subject.encode
    with torch.inference_mode():
        tokens = encode(known)
    entry_bytes = tokens[0].nbytes

    def free(images: Tensor) -> Tensor:
        return tokens[: len(images)]

    def filled(one_by_one: bool = False) -> VisualTokenCache:
        cache = VisualTokenCache(8 * len(known) * entry_bytes, fingerprint, one_by_one)
        cache.wrap(free)(known)
        return cache

    fingerprint = LiveFingerprint(*subject.modules)
    settings = [(rate, False) for rate in subject.batches]
    if subject.batches[0.0] > 2:  # else there is next to no batching to lose
        settings.insert(1, (0.0, True))
    images = subject.batches[0.0]
    candidates: dict[str, Callable[[], object]] = {PLAIN: lambda: encode(stamped(known[:images], images))}
    rows, caches = [], {}
    for rate, one_by_one in settings:
        batch, name = subject.batches[rate], f"{rate:.0%} one by one" if one_by_one else f"{rate:.0%}"
        fresh = round(batch * (1 - rate))
        cache, idle = filled(one_by_one), filled(one_by_one)
        asked = stamped(known[:batch], fresh)
        with torch.inference_mode():
            expected = encode(asked) if fresh else tokens[:batch]
        identical, error = check(encode, cache, asked, expected)
        rows.append({"setting": name, "hit rate": rate, "images": batch, "identical": identical, "error": error})
        candidates[name] = lambda b=batch, f=fresh, c=cache: c.wrap(encode)(stamped(known[:b], f))
        candidates[f"{name} own"] = lambda b=batch, f=fresh, c=idle: c.wrap(free)(stamped(known[:b], f))
        caches[name] = (cache, cache.statistics)
    candidates["keys"] = lambda: pixels_keys(known[:, 0])
    timings = lab.compare(candidates, memory=False)
    plain = timings[PLAIN].ms / images
    first = {
        "setting": PLAIN,
        "images": images,
        "ms": plain,
        "speedup": 1.0,
        "bytes": 0,
        "spread": spread(timings[PLAIN]),
    }
    for row in rows:
        timing, batch = timings[row["setting"]], row["images"]
        cache, before = caches[row["setting"]]
        after = cache.statistics
        hits, misses = after.hits - before.hits, after.misses - before.misses
        if abs(hits / (hits + misses) - row["hit rate"]) > 1e-9:
            raise RuntimeError(f"the timed hit rate was {hits / (hits + misses)}, not {row['hit rate']}")
        # of a batch of hits the whole time is the cache's
        own = timings[row["setting"] if row["hit rate"] == 1 else f"{row['setting']} own"].ms / batch
        row |= {"ms": timing.ms / batch, "speedup": plain * batch / timing.ms, "own": own, "share": own / plain}
        row |= {"bytes": batch * entry_bytes, "evictions": after.evictions, "spread": spread(timing)}
    shared = {"model": subject.name, "keys": timings["keys"].ms / len(known), "image bytes": known[0].nbytes}
    return [shared | row for row in (first, *rows)]


def check(encode: Callable, cache: VisualTokenCache, images: Tensor, expected: Tensor) -> tuple[bool, float]:
    """Whether the cache gives what no cache gave, bit for bit, and the largest difference."""
    with torch.inference_mode():
        first = cache.wrap(encode)(images)
        if not torch.equal(cache.wrap(encode)(images), first):
            raise RuntimeError("a hit is not what was stored")
    return torch.equal(first, expected), (first.double() - expected.double()).abs().max().item()


def spread(timing) -> float:
    """How far the middle four fifths of the runs lie apart, as a share of their median."""
    return (timing.p90 - timing.p10) / timing.median


def measure_kv(lab: Lab, subject: Subject) -> list[dict]:
    """What a hit gives: nothing, the tokens, or the tokens and each layer's keys and values."""
    images = subject.images[: max(1, subject.batches[0.0] // 2)]
    fingerprint = LiveFingerprint(*subject.modules)
    tokens_of = VisualTokenCache(2**32, fingerprint).wrap(subject.encode)
    all_cache = VisualTokenCache(2**32, fingerprint)
    all_of = all_cache.wrap_with_kv(subject.encode, subject.project)

    def plain() -> tuple[Tensor, list[MediaKV | None]]:
        tokens = subject.encode(images)
        return tokens, subject.project(tokens)

    def projecting() -> tuple[Tensor, list[MediaKV | None]]:
        tokens = tokens_of(images)
        return tokens, subject.project(tokens)

    functions = {PLAIN: plain, "tokens": projecting, "tokens, K/V": lambda: all_of(images)}
    with torch.inference_mode():
        expected = flat(plain())
        same = {PLAIN: True}
        for name in ("tokens", "tokens, K/V", "tokens", "tokens, K/V"):  # a miss, then a hit
            same[name] = same.get(name, True) and all(map(torch.equal, flat(functions[name]()), expected))
    timings = lab.compare(functions, memory=False)
    sizes = {PLAIN: 0, "tokens": expected[0][0].nbytes, "tokens, K/V": all_cache.statistics.bytes // len(images)}
    return [
        {
            "model": subject.name,
            "kept": name,
            "images": len(images),
            "ms": timing.ms / len(images),
            "speedup": timing.speedup_over(timings[PLAIN]),
            "bytes": sizes[name],
            "identical": same[name],
        }
        for name, timing in timings.items()
    ]


def flat(output: tuple[Tensor, list[MediaKV | None]]) -> list[Tensor]:
    tokens, layers = output
    return [tokens, *(part for kv in layers if kv for part in (kv.k, kv.v))]


def run(lab: Lab) -> dict:
    bar = tqdm(total=4, desc="visual token cache", leave=False)
    rates, kept = [], []
    for make in (trained, larger):
        subject = make(lab)
        rates += measure_rates(lab, subject)
        bar.update()
        kept += measure_kv(lab, subject)
        bar.update()
    bar.close()
    points = [
        point(f"{row['hit rate']:.0%} hits", row["speedup"], num_bytes=row["bytes"])
        for row in rates
        if row["model"] == "trained" and row.get("hit rate") and row["identical"]
    ]
    return {"rates": rates, "kept": kept, "points": points, "of": "encoding an image"}
