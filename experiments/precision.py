"""Optimization 4: fewer bits. What each precision does to time, bytes, error and the trained model's answers.

Three tables: layers of the preset's size (untrained weights: timing and rounding error only), one linear layer from
narrow to wide, and the trained model from image to the first word. Errors are relative to the same weights in float64.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarking import Timing, matmul_ceiling
from experiments.lab import Lab, point, share
from experiments.precision_tables import PLAIN, show
from gated_cross_attention import GatedCrossAttentionBlock
from interleaved_text import prompt_of
from media_masks import MediaLayout
from mini_flamingo import MiniFlamingo
from perceiver_resampler import PerceiverResampler
from reduced_precision import PRECISIONS, activation_dtype, reduced, relative_error, unavailable, weight_bytes

__all__ = ["run", "show"]

PATCHES = 576
WIDTHS = (256, 512, 1024, 2048, 4096)
ROWS = (1, 64, 512)
COMPILED = ("fp32", "bf16", "int8 dynamic", "int8 weight-only")
BATCH = 64

Call = Callable[[nn.Module], Tensor]  # of a module, or of its compiled form, on inputs of its precision


def run(lab: Lab) -> dict:
    if lab.dtype != torch.float32:
        raise ValueError("precisions are set beside float32, the plain model's: leave out --dtype")
    sizes = WIDTHS[:3] if lab.arguments.quick else WIDTHS
    steps = 3 + len(sizes) + len(PRECISIONS)
    with torch.inference_mode(), tqdm(total=steps, desc="precision", leave=False) as bar:
        ceilings = _ceilings(lab)
        bar.update()
        layers = _resampler_rows(lab)
        bar.update()
        layers += _gated_rows(lab)
        bar.update()
        result = {"ceilings": ceilings, "layers": layers}
        widths = [row for width in _ticking(bar, sizes) for row in _width_rows(lab, width)]
        result["widths"] = sorted(widths, key=lambda row: (row["rows"], row["width"]))
        result["trained"] = _trained_rows(lab, bar)
    result["of"] = f"image to first word, batch {result['trained'][0]['batch']}"
    result["points"] = [
        point(row["precision"], row["speedup"], row["quality"], row["weight bytes"])
        for row in result["trained"]
        if row["precision"] != PLAIN and row["note"] is None
    ]
    return result


def _ticking(bar: tqdm, items: tuple) -> Iterator:
    for item in items:
        yield item
        bar.update()


def _ceilings(lab: Lab) -> dict[str, float]:
    """FLOP/s of a matrix product. Where float16 is emulated, a small one will do."""
    small = 256 if unavailable("fp16", lab.device) else None
    return {
        "fp32": matmul_ceiling(lab.device, torch.float32),
        "bf16": matmul_ceiling(lab.device, torch.bfloat16),
        "fp16": matmul_ceiling(lab.device, torch.float16, small),
    }


# ---------------------------------------------------------------------------------------------------- layers


def _resampler_rows(lab: Lab) -> list[dict]:
    p, images = lab.preset, 1 if lab.arguments.quick else 2
    sizes = (p.vision_dim, p.resampler_depth, p.resampler_dim_head, p.resampler_heads, p.num_latents)
    resampler = lab.untrained(lambda: PerceiverResampler(*sizes))
    patches = lab.random(images, PATCHES, p.vision_dim)

    def prepare(module: nn.Module, dtype: torch.dtype) -> Call:
        x = patches.to(dtype)
        return lambda form: form(x)

    rows = _reduced_rows(lab, resampler, prepare, images * resampler.flops(PATCHES))
    return [{"layer": f"resampler of width {p.vision_dim}, {images} × {PATCHES} patches", **row} for row in rows]


def _gated_rows(lab: Lab) -> list[dict]:
    """Keys and values are projected beforehand, as they are once an image is known."""
    p, batch, tokens = lab.preset, 4, 128
    sizes = (p.dim, p.vision_dim, p.cross_dim_head, p.cross_heads)
    block = lab.untrained(lambda: GatedCrossAttentionBlock(*sizes, gate_init=0.5))
    text, media = lab.random(batch, tokens, p.dim), lab.random(batch, 1, p.num_latents, p.vision_dim)
    layout = MediaLayout(torch.zeros(batch, tokens, dtype=torch.int64, device=lab.device), num_media=1)

    def prepare(module: nn.Module, dtype: torch.dtype) -> Call:
        x, media_kv = text.to(dtype), module.project_media(media.to(dtype))
        return lambda form: form(x, media_kv, layout)

    flops = batch * block.flops(tokens, p.num_latents, images=0)
    rows = _reduced_rows(lab, block, prepare, flops, compiled=COMPILED if lab.arguments.compile else ())
    return [{"layer": f"gated layer of width {p.dim}, {batch} × {tokens} tokens", **row} for row in rows]


def _reduced_rows(
    lab: Lab,
    module: nn.Module,
    prepare: Callable[[nn.Module, torch.dtype], Call],
    flops: int,
    compiled: tuple[str, ...] = (),
) -> list[dict]:
    """One row per precision, eager and (of those named) compiled. `prepare` casts the inputs for a module and returns
    how it, or its compiled form, is called on them."""
    copies = _copies(lab, module)
    calls = {name: prepare(small, activation_dtype(name)) for name, small in copies.items()}
    forms = {(name, "eager"): partial(calls[name], small) for name, small in copies.items()}
    rows = {(name, "eager"): {"note": unavailable(name, lab.device)} for name in PRECISIONS}
    for name in [name for name in compiled if name in copies]:
        form = torch.compile(copies[name], dynamic=False)
        seconds, reason = _compile(partial(calls[name], form))
        rows[name, "compiled"] = {"note": reason, "compile seconds": seconds}
        if reason is None:
            forms[name, "compiled"] = partial(calls[name], form)
    double = copy.deepcopy(module).double()
    reference = prepare(double, torch.float64)(double)
    measured = _measured(lab, forms, reference, (PLAIN, "eager"))
    for (name, form), row in rows.items():
        row |= {"precision": name, "form": form} | measured.get((name, form), {})
        if "seconds" in row:
            row |= {"weight bytes": weight_bytes(copies[name]), "FLOP/s": flops / row["seconds"]}
    return [rows[key] for key in sorted(rows, key=lambda key: (PRECISIONS.index(key[0]), key[1] == "compiled"))]


def _copies(lab: Lab, module: nn.Module, min_width: int = 1) -> dict[str, nn.Module]:
    """In every precision that there is here; every linear layer in 8 bits where it is an 8-bit one."""
    names = [name for name in PRECISIONS if unavailable(name, lab.device) is None]
    return {name: reduced(module, name, min_width) for name in names}


def _measured(lab: Lab, forms: Mapping, reference: Tensor, plain: object, memory: bool = True) -> dict:
    """Error against the reference first; then time and memory."""
    errors = {key: relative_error(form(), reference) for key, form in forms.items()}
    if not max(errors.values()) < 0.1:
        raise RuntimeError(f"a reduced form computes something else: relative errors {errors}")
    timings = lab.compare(forms, memory=memory)
    return {key: {"error": errors[key], **_timed(timing, timings[plain])} for key, timing in timings.items()}


def _timed(timing: Timing, plain: Timing) -> dict:
    return {"seconds": timing.median, "speedup": timing.speedup_over(plain), "peak bytes": timing.peak_bytes}


def _compile(call: Callable[[], Tensor]) -> tuple[float | None, str | None]:
    """How long the first call takes (less if torch kept something of an earlier run on disk), or None and why there is
    no compiled form."""
    start = time.perf_counter()
    try:
        with _quiet():
            call()
    except Exception as error:  # the compiler is not ours: whatever stops it is the row's note
        return None, f"torch.compile fails: {str(error).splitlines()[0][:90]}"
    return time.perf_counter() - start, None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's remarks, which would tear the progress bar."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------- widths


def _width_rows(lab: Lab, width: int) -> list[dict]:
    """One linear layer, width -> width, at each number of rows."""
    linear = lab.untrained(lambda: nn.Linear(width, width, bias=False))
    copies, short = _copies(lab, linear), replace(lab, seconds=lab.seconds / 10)
    rows = []
    for count in ROWS[:2] if lab.arguments.quick else ROWS:
        x = lab.random(count, width)
        forms = {name: partial(small, x.to(activation_dtype(name))) for name, small in copies.items()}
        measured = _measured(short, forms, x.double() @ linear.weight.double().T, PLAIN, memory=False)
        speedups = {name: row["speedup"] for name, row in measured.items() if name != PLAIN}
        rows.append({"rows": count, "width": width, "seconds": measured[PLAIN]["seconds"], **speedups})
    return rows


# ---------------------------------------------------------------------------------------------------- the trained model


def _trained_rows(lab: Lab, bar: tqdm) -> list[dict]:
    """Images to visual tokens, prompts with those to the logits of the next word, and the exam."""
    copies = _copies(lab, lab.model)
    batch = min(len(lab.exam.examples), BATCH // 4 if lab.arguments.quick else BATCH)
    images = lab.exam.images[:batch].to(lab.device)
    prompts = [prompt_of(example) for example in lab.exam.examples[:batch]]
    ids = lab.tokenizer.pad_left(prompts).to(lab.device)

    def prefill(model: MiniFlamingo, media: Tensor) -> Tensor:
        return model.prefill(ids, media, slots=ids.shape[1] + 32)[0]

    double = copy.deepcopy(lab.model).double()
    media = double.encode_media(images)
    encode = {name: partial(model.encode_media, images) for name, model in copies.items()}
    encoding = _measured(lab, encode, media, PLAIN)
    own = {name: partial(prefill, model, encode[name]()) for name, model in copies.items()}
    prefilling = _measured(lab, own, prefill(double, media), PLAIN)
    rows, plain_right = [], lab.right(lab.exam, model=copies[PLAIN])
    for name in _ticking(bar, PRECISIONS):
        rows.append({"precision": name, "batch": batch, "note": unavailable(name, lab.device)})
        if name not in copies:
            continue
        seconds = encoding[name]["seconds"] + prefilling[name]["seconds"]
        right = plain_right if name == PLAIN else lab.right(lab.exam, model=copies[name])
        rows[-1] |= {
            "weight bytes": weight_bytes(copies[name]),
            "encode seconds": encoding[name]["seconds"],
            "prefill seconds": prefilling[name]["seconds"],
            "speedup": (encoding[PLAIN]["seconds"] + prefilling[PLAIN]["seconds"]) / seconds,
            "peak bytes": max(encoding[name]["peak bytes"], prefilling[name]["peak bytes"]),
            "error": prefilling[name]["error"],
            "quality": share(right),
            "changed": int((right != plain_right).sum()),
        }
    return rows
