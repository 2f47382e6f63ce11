"""The architecture of Flamingo in three demonstrations, on a model that was really trained.

    resampler   64 latents that read 576 patches, against self-attention over all of them: cost and what comes out
    gates       tanh gates at 0 leave the language model untouched; what it says as they open; where training put them
    model       Mini Flamingo end to end: parameters, times, its words for the sample images, held-out accuracy

(Alayrac et al. 2022, sections 2.1, 2.2 and figure 3.) Timings are measured here and now; accuracies are of the shipped
checkpoint on scenes that it never saw in training.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import mini_flamingo_evaluation as evaluation
from benchmarking import choose_device, compare, environment, matmul_ceiling, seed_everything
from command_line import positive_int, recorded, require_writable
from exploration_plots import plot_captions, plot_gates, plot_latents
from gated_cross_attention import GatedCrossAttentionBlock
from interleaved_text import END_OF_CHUNK, WordTokenizer
from mini_flamingo import MiniFlamingo, parameter_table, preset
from mini_flamingo_checkpoint import SHIPPED, load_mini_flamingo, load_tokenizer
from perceiver_resampler import DirectSelfAttention, PerceiverResampler
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
from sample_images import FOLDER, load_samples

__all__ = ["GatedCrossAttentionBlock", "MiniFlamingo", "PerceiverResampler", "main"]

SEED = 0  # of the first demonstration's random weights and features
PATCHES = 576  # a 384-pixel image in 16-pixel patches


def demonstrate_resampler(device: torch.device, quick: bool) -> dict:
    """Times both forms on the same patch features and states their work."""
    config = preset("paper")
    generator = seed_everything(SEED)
    sizes = (config.vision_dim, config.resampler_depth, config.resampler_dim_head, config.resampler_heads)
    resampler, direct = PerceiverResampler(*sizes, config.num_latents), DirectSelfAttention(*sizes)
    forms = {"self-attention": direct.to(device).eval(), "resampler": resampler.to(device).eval()}
    rows, ceilings = [], [matmul_ceiling(device)]
    for batch in (1,) if quick else (1, 8):
        patches = torch.randn(batch, PATCHES, config.vision_dim, generator=generator).to(device)
        with torch.inference_mode():
            tokens = {name: form(patches).shape[1] for name, form in forms.items()}
            timings = compare(
                {name: lambda form=form, x=patches: form(x) for name, form in forms.items()},
                device=device,
                min_seconds=1 if quick else 3,
            )
        for name, form in forms.items():
            timing, flops = timings[name], form.flops(PATCHES)
            queries, keys = (
                (tokens[name], PATCHES) if name == "self-attention" else (tokens[name], PATCHES + tokens[name])
            )
            rows.append(
                {
                    "form": name,
                    "batch": batch,
                    "tokens": tokens[name],
                    "compression": PATCHES / tokens[name],
                    "scores": f"{queries} x {keys}",
                    "flops": flops,
                    "seconds": timing.median,
                    "images_per_second": batch / timing.median,
                    "flops_per_second": batch * flops / timing.median,
                    "peak_bytes": timing.peak_bytes,
                    "speedup": timing.speedup_over(timings["self-attention"]),
                }
            )
        ceilings.append(matmul_ceiling(device))  # between the timings: the machine's speed drifts
    ceiling = max(ceilings)
    for row in rows:
        row["of_ceiling"] = row["flops_per_second"] / ceiling
    return {"rows": rows, "matmul_flops_per_second": ceiling, "dim": config.vision_dim, "depth": config.resampler_depth}


def print_resampler(result: dict) -> None:
    columns = [
        "form", "batch", "tokens",
        Column("compression", "compression", format_ratio), Column("scores", "scores a head"),
        Column("flops", "FLOP/image", format_count), Column("seconds", "time", format_seconds),
        Column("images_per_second", "images/s"), Column("of_ceiling", "of ceiling", format_percent),
        Column("peak_bytes", "memory", format_bytes), Column("speedup", "speedup", format_ratio),
    ]  # fmt: skip
    size = f"{PATCHES} patches, {result['dim']} wide, {result['depth']} layers"
    print(table(result["rows"], columns, f"1. Perceiver Resampler against self-attention: {size}"))
    print(
        f"\nEach layer scores 64 latents against 576 patches + 64 latents: {64 * 640:,} pairs where self-attention has "
        f"{576 * 576:,}.\nEverything behind reads 64 visual tokens, whatever the resolution. Matrix products reach "
        f"{format_count(result['matmul_flops_per_second'], 'FLOP/s')} here, the ceiling.\n"
    )


def with_gates_scaled(model: MiniFlamingo, factor: float) -> MiniFlamingo:
    """A copy whose tanh(gate)s are `factor` times the trained ones; 0 closes them."""
    model = deepcopy(model)
    with torch.no_grad():
        for block in model.gated_layers.values():
            for gate in (block.attn_gate, block.ff_gate):
                gate.copy_((gate.tanh() * factor).atanh())
    return model


@torch.inference_mode()
def demonstrate_gates(model: MiniFlamingo, tokenizer: WordTokenizer, count: int) -> dict:
    """Closes and opens the trained gates: distance of the logits from the frozen language model's, and what it
    answers."""
    device = model.resampler.latents.device
    exam = evaluation.question_exam("what is at", count)
    ids = tokenizer.pad_left([example.text for example in exam.examples[:32]]).to(device)
    images, words = exam.images[:32].to(device), ids != tokenizer.pad_id
    text_only = model.language_model(ids, words)
    rows = []
    for factor in tqdm((0.0, 0.25, 0.5, 0.75, 1.0), "gates", leave=False):
        scaled = with_gates_scaled(model, factor)
        logits = scaled(ids, images, attention_mask=words)
        change = ((logits - text_only).norm(dim=-1) / text_only.norm(dim=-1))[words].mean().item()
        right = evaluation.exact_match(evaluation.answers(scaled, tokenizer, exam), exam)
        rows.append({"factor": factor, "identical": torch.equal(logits, text_only), "change": change, "right": right})
    trained = [
        {"layer": int(i), "attention": block.attn_gate.tanh().item(), "feed_forward": block.ff_gate.tanh().item()}
        for i, block in model.gated_layers.items()
    ]
    return {"opening": rows, "trained": trained}


def print_gates(result: dict) -> None:
    columns = [
        Column("factor", "gates at", format_percent), Column("identical", "same logits as the language model"),
        Column("change", "change of the logits", format_percent), Column("right", "`what is at` right", format_percent),
    ]  # fmt: skip
    print(table(result["opening"], columns, "2. Gates: closed, the language model itself; opened, it reads the image"))
    columns = [
        "layer",
        Column("attention", "tanh(attn_gate)", "{:+.3f}".format),
        Column("feed_forward", "tanh(ff_gate)", "{:+.3f}".format),
    ]
    print("\n" + table(result["trained"], columns, "   where training put them (they start at 0)") + "\n")


@torch.inference_mode()
def latent_attention(model: MiniFlamingo, image: Tensor) -> Tensor:
    """What each latent reads in the resampler's first layer, over its heads: uint8[3, h, w] -> float[L, side, side]."""
    patches = model.vision_encoder(image[None])
    attention = model.resampler.layers[0][0]
    q, k, _ = attention.queries_keys_values(patches, model.resampler.latents[None])
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[0, ..., : patches.shape[1]].mean(0)
    return weights.unflatten(-1, (int(patches.shape[1] ** 0.5), -1)).cpu()


def demonstrate_model(model: MiniFlamingo, tokenizer: WordTokenizer, samples: list[dict], quick: bool) -> dict:
    """Parameters, times, words for the sample images, accuracy on held-out scenes and its control. Raises
    ValueError where no sample has exactly one image."""
    device, shown, timed = model.resampler.latents.device, [], first_of_one_image(samples)
    for sample in samples:
        prompt = tokenizer.pad_left([sample["prompt"]]).to(device)
        said = tokenizer.decode(model.generate(prompt, sample["pixels"][None].to(device))[0])
        said = said.removesuffix(END_OF_CHUNK).strip()
        shown.append(
            {key: sample[key] for key in ("images", "prompt", "truth")}
            | {"said": said, "right": said == sample["truth"]}
        )
    return {
        "parameters": parameter_table(model),
        "times": time_model(model, tokenizer, timed),
        "samples": shown,
        "accuracy": held_out_accuracy(model, tokenizer, 32 if quick else 80),
    }


def first_of_one_image(samples: list[dict]) -> dict:
    for sample in samples:
        if len(sample["pixels"]) == 1:
            return sample
    raise ValueError("no sample has exactly one image, and the times are those of one image: add one to samples.json")


@torch.inference_mode()
def time_model(model: MiniFlamingo, tokenizer: WordTokenizer, sample: dict) -> list[dict]:
    """Seconds of each part of what the model says of a sample of one image, batch 1."""
    device = model.resampler.latents.device
    prompt = tokenizer.pad_left([sample["prompt"]]).to(device)
    image = sample["pixels"][None].to(device)
    slots = prompt.shape[1] + 1
    patches = model.vision_encoder(image[0])
    media = model.encode_media(image)
    _, state = model.prefill(prompt, media, slots)
    length, token = state.cache.length.clone(), prompt[:, -1:]

    def decode_one() -> Tensor:
        state.cache.length.copy_(length)  # the same step each time
        return model.decode(token, state)

    parts = {
        "vision encoder": lambda: model.vision_encoder(image[0]),
        "resampler": lambda: model.resampler(patches),
        f"prompt of {prompt.shape[1]} words": lambda: model.prefill(prompt, media, slots),
        "one more word": decode_one,
        "image to caption": lambda: model.generate(prompt, image),
    }
    timings = compare(parts, device=device, min_seconds=2, memory=False)
    return [{"part": name, "seconds": timing.median, "runs": timing.runs} for name, timing in timings.items()]


def held_out_accuracy(model: MiniFlamingo, tokenizer: WordTokenizer, count: int) -> list[dict]:
    """The standard exams with their images, with blank ones and with another prompt's."""
    exams = evaluation.held_out_exams(count)
    ways = {"images": lambda exam: exam, "blank": evaluation.blanked, "shuffled": evaluation.shuffled}
    rows = [{"exam": name} for name in exams]
    for way, changed in tqdm(ways.items(), "held-out accuracy", leave=False):
        for row, exam in zip(rows, exams.values(), strict=True):
            exam = changed(exam)
            row[way] = evaluation.exact_match(evaluation.answers(model, tokenizer, exam), exam)
    return rows


def print_model(result: dict) -> None:
    columns = ["part", *(Column(c, c, format_count) for c in ("total", "frozen", "trained"))]
    print(table(result["parameters"], columns, "3. Mini Flamingo: parameters") + "\n")
    print(table(result["times"], ["part", Column("seconds", "time", format_seconds)], "   one image, batch 1") + "\n")
    for sample in result["samples"]:
        print(f"   {', '.join(sample['images'])}")
        print(f"     prompt  {sample['prompt']}")
        print(f"     model   {sample['said']}")
        print(f"     truth   {sample['truth'] if not sample['right'] else 'the same'}")
    columns = ["exam", *(Column(way, way, format_percent) for way in ("images", "blank", "shuffled"))]
    print(
        "\n" + table(result["accuracy"], columns, "   right word for word, on held-out scenes of 1 to 8 objects") + "\n"
    )


def run(arguments: argparse.Namespace) -> dict:
    device = choose_device(arguments.device)
    require_writable(arguments)
    results: dict = {"environment": environment(device), "arguments": recorded(arguments), "seed": SEED}
    if "resampler" in arguments.only:
        results["resampler"] = demonstrate_resampler(device, arguments.quick)
        print_resampler(results["resampler"])
    if {"gates", "model"} & set(arguments.only):
        model, tokenizer = load_mini_flamingo(arguments.model, device), load_tokenizer(arguments.model)
    if "gates" in arguments.only:
        results["gates"] = demonstrate_gates(model, tokenizer, 32 if arguments.quick else 128)
        print_gates(results["gates"])
        if arguments.plot:
            print(f"saved {plot_gates(results['gates'], arguments.plot / 'gates.png')}")
    if "model" in arguments.only:
        samples = load_samples(arguments.images, model.config.image_size)
        results["model"] = demonstrate_model(model, tokenizer, samples, arguments.quick)
        print_model(results["model"])
        if arguments.plot:
            image = max(samples, key=lambda sample: len(sample["truth"]))["pixels"][0]  # the fullest scene
            maps = latent_attention(model, image.to(device))
            print(f"saved {plot_latents(image, maps, arguments.plot / 'latents.png')}")
            pixels = [sample["pixels"] for sample in samples]
            print(f"saved {plot_captions(pixels, results['model']['samples'], arguments.plot / 'captions.png')}")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="fewer runs and scenes, for a first look")
    names = ("resampler", "gates", "model")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), help="which demonstrations")
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of a trained Mini Flamingo")
    parser.add_argument("--images", type=Path, default=FOLDER, help="folder with images and samples.json")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="save what the latents look at, the gates, a caption sheet"
    )
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


if __name__ == "__main__":
    main()
