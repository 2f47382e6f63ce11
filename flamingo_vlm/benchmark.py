"""What a generated token costs, by the number of images in the prompt:

    python -m flamingo_vlm.benchmark

Ways to decode the same tokens with one model of OPT-125M's shape (random weights: they take the time of trained ones)
and visual tokens as wide as those of ViT-L/14:

* re-projecting: as OpenFlamingo does, the keys and values of all images are projected anew for each token, and its
  scores are computed against all of them behind a mask;
* projected once: `Flamingo.generate` with torch's own products on the CPU;
* here: `Flamingo.generate` as it is, on a CPU with products of few rows on all threads (`few_rows.py`);
* compiled: the same after `compile_decode()`.

Times are of single decoding steps, the three ways taking turns, with a table row printed only once they generated the
same tokens. Beside them stand the operations and bytes that a token needs. Left out: encoding the images, which is no
part of decoding, and what is generated.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LogitsProcessor, OPTConfig

from attention_layers import CrossAttention, MediaKV
from benchmarking import choose_device, copy_ceiling, environment, matmul_ceiling, synchronize
from command_line import positive_int, recorded
from flamingo_vlm import decoding
from flamingo_vlm.decoding import PromptMedia
from flamingo_vlm.generate import DTYPES
from flamingo_vlm.model import Flamingo
from media_masks import MediaLayout
from reporting import (
    Column,
    format_bytes,
    format_count,
    format_percent,
    format_ratio,
    format_seconds,
    table,
    write_json,
)
from sparse_cross_attention import dense_masked_attention

VOCABULARY, VIS_DIM, WORDS_PER_IMAGE = 50272, 1024, 10
EOC, MEDIA = VOCABULARY, VOCABULARY + 1


def opt_125m(device: torch.device, dtype: torch.dtype) -> Flamingo:
    """Of OPT-125M's shape, a gated block before each layer, gates half open, a resampler of one layer."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=VOCABULARY + 2, dropout=0.0))
    model = Flamingo(nn.Identity(), language_model, EOC, MEDIA, VIS_DIM, resampler_depth=1)
    with torch.no_grad():
        for block in model.gated_cross_attn_layers.values():
            block.attn_gate.fill_(0.5)
            block.ff_gate.fill_(0.5)
    return model.eval().requires_grad_(False).to(device, dtype)


class MaskedCrossAttention(CrossAttention):
    """Scores against the keys of all images, then a mask."""

    def forward(self, x: Tensor, media_kv: MediaKV, media_index: Tensor | MediaLayout) -> Tensor:
        return dense_masked_attention(self, x, media_kv, media_index)


@contextmanager
def plain_products() -> Iterator[None]:
    """Within it `generate` leaves products of few rows to torch."""
    ours, decoding.few_rows_on_all_threads = decoding.few_rows_on_all_threads, nullcontext
    try:
        yield
    finally:
        decoding.few_rows_on_all_threads = ours


@contextmanager
def re_projecting(model: Flamingo, media: Tensor) -> Iterator[None]:
    """Within it the model decodes as OpenFlamingo does. media: the prompt's visual tokens float[B, M, L, D]."""
    prepare, attentions = model.prepare_inputs_for_generation, [b.attn for b in model.gated_cross_attn_layers.values()]

    def prepare_anew(input_ids: Tensor, prompt_media: PromptMedia, **kwargs) -> dict:
        all_images = model.gated_cross_attn_layers.project(media)
        return prepare(input_ids, replace(prompt_media, all=all_images, last=None), **kwargs)

    model.prepare_inputs_for_generation = prepare_anew
    for attention in attentions:
        attention.__class__ = MaskedCrossAttention
    try:
        with plain_products():
            yield
    finally:
        del model.prepare_inputs_for_generation
        for attention in attentions:
            attention.__class__ = CrossAttention


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one decoding step; a multiply-add counts as 2."""

    flops: int
    bytes: int


def work_of_a_token(model: Flamingo, rows: int, text: int, images: int, re_projecting: bool) -> Work:
    """Behind `text` tokens with `images` images, for `rows` rows. Bytes: all weights once, and what is cached."""
    lm, gated = model.lang_encoder, model.gated_cross_attn_layers
    layers, dim, latents = lm.config.num_hidden_layers, lm.config.hidden_size, model.config.num_latents
    inner = sum(block.attn.inner for block in gated.values())
    others = images - 1 if re_projecting else 0  # scores against images that the token does not see
    # Positions are looked up, not multiplied; the head is tied to the embedding.
    lm_weights = sum(p.numel() for p in lm.parameters()) - lm.get_decoder().embed_positions.weight.numel()
    flops = 2 * lm_weights + layers * 4 * text * dim
    flops += (
        gated.flops(tokens=1, latents=latents, images=images if re_projecting else 0) + 4 * others * latents * inner
    )
    projection = sum(block.attn.to_kv.weight.numel() for block in gated.values())
    weights = lm_weights + sum(p.numel() for p in gated.parameters()) - (0 if re_projecting else projection)
    cached = 2 * layers * text * dim + 2 * (1 + others) * latents * inner
    media = images * latents * model.config.vis_dim if re_projecting else 0
    itemsize = next(gated.parameters()).element_size()
    return Work(rows * flops, itemsize * (weights + rows * (cached + media)))


class _Clock(LogitsProcessor):
    """Notes when each token's logits are there."""

    def __init__(self, device: torch.device):
        self.device, self.ticks = device, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        synchronize(self.device)
        self.ticks.append(time.perf_counter())
        return scores

    def steps(self) -> list[float]:
        """Seconds of each decoding step; the prompt's pass is before the first tick."""
        return [after - before for before, after in zip(self.ticks, self.ticks[1:], strict=False)]


def timed(
    model: Flamingo, prompt: dict, new_tokens: int, device: torch.device, **options
) -> tuple[Tensor, list[float]]:
    clock = _Clock(device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    output = model.generate(**prompt, **length, do_sample=False, logits_processor=[clock], **options)
    return output[:, prompt["lang_x"].shape[1] :], clock.steps()


def prompt_of(rows: int, images: int, text_images: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Words for `text_images` images, of which the last `images` are there: the same text with fewer images."""
    generator = torch.Generator().manual_seed(images)
    words = torch.randint(5, 1000, (rows, text_images, WORDS_PER_IMAGE), generator=generator)
    first, last = torch.full((rows, text_images, 1), MEDIA), torch.full((rows, text_images, 1), EOC)
    first[:, : text_images - images] = 5
    lang_x = torch.cat((first, words, last), dim=-1).flatten(1)[:, :-1]
    features = torch.randn(rows, images, 1, 8, VIS_DIM, generator=generator)
    return {"lang_x": lang_x.to(device), "media_features": features.to(device, dtype)}


def measured(model: Flamingo, arguments: argparse.Namespace, images: int, device: torch.device) -> dict:
    """One row of the table. Raises AssertionError where the ways do not generate the same tokens."""
    prompt = prompt_of(arguments.batch, images, images, device, DTYPES[arguments.dtype])
    with torch.inference_mode():
        media = model.encode_media(media_features=prompt["media_features"])
    ways = {
        "re-projecting": (lambda: re_projecting(model, media), {"cache_implementation": "dynamic"}),
        "projected once": (plain_products, {"cache_implementation": "dynamic"}),
        "here": (nullcontext, {"cache_implementation": "dynamic"}),
    }
    if device.type != "cpu":
        del ways["projected once"]  # which is what happens there
    if arguments.compile:
        ways["compiled"] = (nullcontext, {})
    seconds, tokens = {name: [] for name in ways}, {}
    for turn in range(arguments.rounds + 1):
        for name, (way, options) in ways.items():
            with way():
                tokens[name], steps = timed(model, prompt, arguments.new_tokens, device, **options)
            if turn:  # the first round warms up, and compiles
                seconds[name] += steps
    row = {"images": images, "text": prompt["lang_x"].shape[1], "seconds": {k: median(v) for k, v in seconds.items()}}
    # In half precision two near words may swap; in float32 every token must be the same.
    same = {name: float((each == tokens["re-projecting"]).float().mean()) for name, each in tokens.items()}
    if arguments.dtype == "float32":
        assert min(same.values()) == 1, f"the ways generate different tokens: {same}"
    work = {
        "re-projecting": work_of_a_token(model, arguments.batch, row["text"], images, True),
        "here": work_of_a_token(model, arguments.batch, row["text"], images, False),
    }
    return row | {
        "same_tokens": min(same.values()),
        "flops": {name: each.flops for name, each in work.items()},
        "bytes": {name: each.bytes for name, each in work.items()},
    }


def same_text(model: Flamingo, arguments: argparse.Namespace, images: int, device: torch.device) -> dict:
    """What `images` images cost behind the same text as one of them: its other `<image>` tokens are words. The ratio is
    that of neighbouring turns, of which there are many: the difference is smaller than what a machine drifts by."""
    prompts = {n: prompt_of(arguments.batch, n, images, device, DTYPES[arguments.dtype]) for n in (1, images)}
    turns: dict[int, list[float]] = {n: [] for n in prompts}
    for turn in range(4 * arguments.rounds + 1):
        for n in sorted(prompts, reverse=turn % 2 == 1):
            _, steps = timed(model, prompts[n], arguments.new_tokens, device, cache_implementation="dynamic")
            if turn:  # the first one warms up
                turns[n].append(median(steps))
    return {
        "text": prompts[1]["lang_x"].shape[1],
        "images": list(turns),
        "seconds": [median(each) for each in turns.values()],
        "ratio": median(many / one for one, many in zip(turns[1], turns[images], strict=True)),
        "turns": 4 * arguments.rounds,
    }


def arguments_of(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_vlm.benchmark",
        description="Times a generated token by the number of images in the prompt, beside a loop that projects all of "
        "them again for each token, as OpenFlamingo does.",
    )
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4, 16, 32], help="images before the last one")
    parser.add_argument("--batch", type=positive_int, default=1, help="prompts at once (default 1)")
    parser.add_argument("--new-tokens", type=positive_int, default=12, help="generated in each turn (default 12)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns that count (default 3)")
    parser.add_argument("--threads", type=positive_int, help="of a CPU (default: torch's)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument("--compile", action="store_true", help="also compiled decoding (a minute for each row)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, arguments = arguments_of(argv)
    if min(arguments.shots) < 0:
        parser.error(f"--shots must be 0 or more; got {min(arguments.shots)}")
    if arguments.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more: the first one comes with the prompt")
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = recorded(arguments)
    model = opt_125m(device, DTYPES[arguments.dtype])
    model.compile_decode()
    shots = sorted(set(arguments.shots))
    rows = [measured(model, arguments, n + 1, device) for n in tqdm(shots, desc="prompts", leave=False)]
    pair = same_text(model, arguments, shots[-1] + 1, device) if shots[-1] else None
    print(report(rows, pair))
    ceilings = {"matmul_flops": matmul_ceiling(device, DTYPES[arguments.dtype]), "copy_bytes": copy_ceiling(device)}
    least = rows[0]["bytes"]["here"] / ceilings["copy_bytes"]
    print(
        f"\nThis machine copies {format_bytes(ceilings['copy_bytes'])}/s: reading what a token needs at 1 image takes "
        f"{format_seconds(least)} at least, {format_percent(least / rows[0]['seconds']['here'])} of what it took here."
    )
    if arguments.json:
        payload = {
            "environment": environment(device),
            "arguments": record,
            "ceilings": ceilings,
            "rows": rows,
            "same_text": pair,
        }
        print(f"Written: {write_json(arguments.json, payload)}")


def report(rows: Sequence[dict], pair: dict | None) -> str:
    """The table, and what more images cost."""
    shown = []
    for row in rows:
        theirs = row["seconds"]["re-projecting"]
        for way, seconds in row["seconds"].items():
            kind = "re-projecting" if way == "re-projecting" else "here"
            shown.append(
                {"images": row["images"], "text": row["text"], "way": way, "seconds": seconds}
                | {"speedup": theirs / seconds, "flops": row["flops"][kind], "bytes": row["bytes"][kind]}
            )
    columns = [
        "images",
        Column("text", "text tokens"),
        "way",
        Column("seconds", "a token", format_seconds),
        Column("speedup", "speedup", format_ratio),
        Column("flops", "FLOP", format_count),
        Column("bytes", "bytes", format_bytes),
    ]
    text = table(shown, columns)
    if pair:
        (_, images), (one, many) = pair["images"], pair["seconds"]
        text += (
            f"\n\nBehind the same {pair['text']} tokens of text, in {pair['turns']} turns, a token takes "
            f"{format_seconds(one)} with one image and {format_seconds(many)} with {images}; of neighbouring turns the "
            f"median ratio is {format_ratio(pair['ratio'])}."
        )
    return text


if __name__ == "__main__":
    main()
