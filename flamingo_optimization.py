"""Seven optimizations of a Flamingo, each measured on a model that was really trained.

    1  visual token cache     images seen before are not encoded again
    2  fewer visual tokens    any number from one checkpoint, also chosen per image
    3  sparse cross-attention text reads its own image alone, or the most relevant visual tokens
    4  reduced precision      bf16, fp16, int8, fp8
    5  adaptive depth         each image leaves the resampler when more layers gain nothing
    6  speculative decoding   a draft guesses, the model checks: the same words, sooner
    7  combined               all together, from image to caption

Speeds stand beside what they cost in memory and in quality on held-out data. The baseline is always the plain model:
fused attention, KV cache, cross-attention keys and values projected once per image. Larger shapes (--preset) have
untrained weights and serve for timing only.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from adaptive_resampler import AdaptivePerceiverResampler, CoarseToFineResampler
from benchmarking import choose_device, environment
from command_line import positive_int, recorded, require_writable
from experiments import cache, combined, depth, precision, sparse, speculation, tokens
from experiments.lab import SEED, Lab, exams_of, share
from mini_flamingo import PRESETS, preset
from mini_flamingo_checkpoint import SHIPPED, load_mini_flamingo, load_tokenizer
from optimization_plots import plot_summary
from optimized_flamingo import OptimizedFlamingo
from reduced_precision import reduced
from reduced_tokens import AdaptiveTokenCount, media_space
from reporting import Column, format_bytes, format_percent, format_ratio, table, write_json
from sparse_cross_attention import SparseCrossAttention
from speculative_decoding import speculate
from visual_token_cache import VisualTokenCache

__all__ = [
    "AdaptivePerceiverResampler",
    "AdaptiveTokenCount",
    "CoarseToFineResampler",
    "OptimizedFlamingo",
    "SparseCrossAttention",
    "VisualTokenCache",
    "main",
    "media_space",
    "reduced",
    "speculate",
]

EXPERIMENTS = {
    "1": ("visual token cache", cache),
    "2": ("fewer visual tokens", tokens),
    "3": ("sparse cross-attention", sparse),
    "4": ("reduced precision", precision),
    "5": ("adaptive depth", depth),
    "6": ("speculative decoding", speculation),
    "7": ("combined", combined),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FOLDERS = {"shapes": SHIPPED, "cifar10": SHIPPED.with_name("mini_flamingo_cifar10")}
WITHIN = 0.01  # quality that the best speedup of the summary may cost


def prepare(arguments: argparse.Namespace) -> Lab:
    """Loads the model and makes the exams. Raises ValueError for what is missing or cannot be done here."""
    device, dtype = choose_device(arguments.device), DTYPES[arguments.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("--dtype float16: CPUs only emulate its matrix products; use bfloat16, or a GPU")
    if arguments.scenes and arguments.scenes < 20:
        raise ValueError(f"--scenes must be at least 20, what the experiments time; got {arguments.scenes}")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if arguments.compile and shutil.which(compiler) is None:
        raise ValueError(f"--compile needs a C++ compiler, and there is no {compiler}: install one or leave it out")
    folder = FOLDERS[arguments.data]
    if not folder.exists():
        raise ValueError(
            f"--data {arguments.data}: there is no trained model in {folder.name}/; "
            f"train it with python train_mini_flamingo.py --data {arguments.data}"
        )
    scenes = arguments.scenes or (48 if arguments.quick else 192)
    return Lab(
        load_mini_flamingo(folder, device).to(dtype),
        load_tokenizer(folder),
        folder,
        exams_of(arguments.data, arguments.cifar_root, scenes),
        arguments,
        preset(arguments.preset),
        device,
        dtype,
        seconds=0.3 if arguments.quick else 1.5,
    )


def summary(results: dict, baseline: float) -> list[dict]:
    """Per optimization its fastest setting within one point of the plain model's quality, or the one that loses least
    where none is."""
    rows = []
    for name, result in results.items():
        near = [p for p in result["points"] if p["quality"] is None or p["quality"] >= baseline - WITHIN]
        if near:
            best = max(near, key=lambda each: each["speedup"])
        else:
            best = max(result["points"], key=lambda each: each["quality"])
        rows.append({"optimization": name, "of": result.get("of", ""), **best, "within": bool(near)})
    return rows


def show_summary(rows: list[dict], baseline: float, exam: str) -> str:
    columns = [
        "optimization", "setting", Column("speedup", "speedup", format_ratio), Column("of", "of"),
        Column("quality", "right", lambda q: format_percent(q)), Column("within", "within 1 point"),
        Column("bytes", "memory", format_bytes),
    ]  # fmt: skip
    shown = [row | {"quality": baseline if row["quality"] is None else row["quality"]} for row in rows]
    return (
        table(shown, columns, "Summary: each optimization's fastest setting within one point of the plain model")
        + f"\n\nRight: captions word for word ({exam}); the plain model has {format_percent(baseline)}."
    )


def run(arguments: argparse.Namespace) -> dict:
    require_writable(arguments)
    lab = prepare(arguments)
    baseline = share(lab.right(lab.seen_exam))
    exam = f"{len(lab.exam.examples)} held-out, {next(iter(lab.exams))}"
    print(f"{exam}: the plain model captions {format_percent(baseline)} word for word.\n")
    results, not_run = {}, {}
    for number in dict.fromkeys(arguments.only):
        name, experiment = EXPERIMENTS[number]
        try:
            results[name] = experiment.run(lab)
            print(experiment.show(results[name]) + "\n")
        # Something it needs is missing, memory runs out, a check fails: what the others measured is not lost.
        except (ValueError, RuntimeError, AssertionError) as error:
            not_run[name] = f"experiment {number}, {name}, could not run: {error}"
    rows = summary(results, baseline)
    if rows:
        print(show_summary(rows, baseline, exam))
    if rows and arguments.plot:
        print(f"saved {plot_summary(results, baseline, arguments.plot / 'optimizations.png')}")
    return {
        "environment": environment(lab.device),
        "arguments": recorded(arguments),
        "seed": SEED,
        "exam": exam,
        "quality": baseline,
        "experiments": results,
        "not run": not_run,
        "summary": rows,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="N", help="these experiments, 1-7"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the plain model (default: float32)")
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="the larger shapes to time (default: gpt2)")
    parser.add_argument("--quick", action="store_true", help="shorter timings and 48 scenes, for a first look")
    parser.add_argument(
        "--scenes", type=positive_int, help="held-out images that quality is measured on, 20 or more (default: 192)"
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile'd forms: some minutes more")
    parser.add_argument("--data", choices=FOLDERS, default="shapes", help="which trained model and held-out images")
    parser.add_argument("--cifar-root", type=Path, help="folder or zip of CIFAR-10 images (default: download)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="save speed against quality as a picture")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        results = run(arguments)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if arguments.json:
        write_json(arguments.json, results)
        print(f"saved {arguments.json}")
    if results["not run"]:
        parser.exit(2, "".join(f"{parser.prog}: {reason}\n" for reason in results["not run"].values()))


if __name__ == "__main__":
    main()
