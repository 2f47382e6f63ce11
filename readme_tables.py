"""Rewrites the README's tables from the JSON of the runs behind them:  python readme_tables.py

data/mini_flamingo/training.json   how the shipped model was trained and what it scores
results/exploration.json           flamingo_paper_exploration.py --json
results/optimizations.json         flamingo_optimization.py --compile --json
results/flamingo_vlm_cpu.json      python -m flamingo_vlm.benchmark --threads 2 --compile --json
"""

import argparse
from pathlib import Path

from reporting import (
    Column,
    format_bytes,
    format_count,
    format_percent,
    format_ratio,
    format_seconds,
    markdown_table,
    read_json,
    update_readme,
)
from shapes_curriculum import ShapesCurriculum

ROOT = Path(__file__).parent


def accuracy_block(training: dict) -> str:
    report = training["report"]
    rows = [
        {"task": name, "right": right, "blank": report["blank"].get(name), "shuffled": report["shuffled"].get(name)}
        for name, right in report["right"].items()
    ]
    rows += [{"task": "caption, unseen pairs", "right": report["caption, unseen pairs"]}]
    rows += [
        {"task": f"{name}: sizes, colours and shapes", "right": right} for name, right in report["attributes"].items()
    ]
    shots = {number: right for number, right in report["new word by shots"].items() if number != "8"}
    rows += [{"task": f"new word, {number} shots", "right": right} for number, right in shots.items()]
    columns = [
        "task",
        Column("right", "right", format_percent),
        Column("blank", "images blanked", format_percent),
        Column("shuffled", "another row's images", format_percent),
    ]
    named = report["unseen pairs named"]
    unseen = (
        "Unseen pairs are scenes with a purple triangle, a green cross or a blue diamond, which no stage ever showed. "
        f"Of {named['things']} such things {named['right colour and shape']} were named rightly and "
        f"{named['another shape']} with another shape: the model does not generalise to them."
    )
    return f"{markdown_table(rows, columns)}\n\n{report['questions of each kind']} of each. {unseen}"


def latents_block(training: dict) -> str:
    report = training["report"]
    at_random = report["caption by random latents"]
    rows = [
        {"what": "visual tokens", "kept": int(count), "right": right}
        for count, right in sorted(report["caption by latents"].items(), key=lambda item: -int(item[0]))
    ]
    rows.append({"what": "visual tokens chosen at random", "kept": 32, "right": sum(at_random) / len(at_random)})
    rows += [
        {"what": "resampler layers", "kept": int(depth), "right": right}
        for depth, right in sorted(report["caption by depth"].items(), reverse=True)
    ]
    shown = markdown_table(rows, ["what", "kept", Column("right", "caption exact match", format_percent)])
    draws = ", ".join(format_percent(right) for right in at_random)
    return (
        f"{shown}\n\nThe random choices: {draws}. Differences below two points are within the noise of "
        f"{report['questions of each kind']} scenes: the knee lies between 16 and 32 tokens, and depth matters little."
    )


def resampler_block(exploration: dict) -> str:
    columns = [
        "form", "batch", "tokens",
        Column("flops", "FLOP/image", format_count), Column("seconds", "time", format_seconds),
        Column("of_ceiling", "of matmul ceiling", format_percent), Column("speedup", "speedup", format_ratio),
    ]  # fmt: skip
    environment = exploration["environment"]
    threads = f"{environment['threads']} threads of {environment['cpu']}"
    where = f"{_accelerator(environment)}{threads}, torch {environment['torch']}, float32."
    return markdown_table(exploration["resampler"]["rows"], columns) + f"\n\n{where}"


IDEAS = {  # of each optimization: what it does, and where
    "visual token cache": ("images seen before are not encoded again", "visual_token_cache"),
    "fewer visual tokens": ("any number from one checkpoint, also chosen per image", "reduced_tokens"),
    "sparse cross-attention": ("text reads its own image alone, or the most relevant tokens", "sparse_cross_attention"),
    "reduced precision": ("bf16, fp16, int8, fp8; gates and norms stay in float32", "reduced_precision"),
    "adaptive depth": ("each image leaves the resampler when more layers gain nothing", "adaptive_resampler"),
    "speculative decoding": ("a draft guesses several words, the model checks them at once", "speculative_decoding"),
    "combined": ("all together, from image to caption", "optimized_flamingo"),
}


def optimizations_block(results: dict) -> str:
    rows = []
    for row in results["summary"]:
        name, (idea, module) = row["optimization"], IDEAS[row["optimization"]]
        right = results["quality"] if row["quality"] is None else row["quality"]
        rows.append({**row, "optimization": f"**{name}**: {idea}", "file": f"`{module}.py`", "right": right})
    columns = [
        "optimization", "file", Column("setting", "fastest setting"),
        Column("speedup", "speedup", format_ratio), Column("of", "of what"),
        Column("right", "right", format_percent), Column("within", "within 1 point"),
        Column("bytes", "memory", format_bytes),
    ]  # fmt: skip
    environment = results["environment"]
    machine = f"{_accelerator(environment)}{environment['threads']} threads of {environment['cpu']}"
    exact = results["experiments"]["sparse cross-attention"]["per image"]
    over_mask = {row["layout"]: format_ratio(row["speedup"]) for row in exact if row["images"] == 16}
    return (
        f"{markdown_table(rows, columns)}\n\nRight: {results['exam']}, word for word; the plain model has "
        f"{format_percent(results['quality'])}. {machine}, torch {environment['torch']}, "
        f"{results['arguments']['dtype']}. Reading its own image alone is in the plain model already: over "
        f"scores of all 16 images behind a mask, {over_mask['even']} (text spread evenly) and {over_mask['random']} "
        "(images at random places)."
    )


def training_block(training: dict) -> str:
    rows = [{"stage": name, **training["stages"][name]} for name in ShapesCurriculum.stages]  # JSON sorts its keys
    rows.append({"stage": "together", "seconds": sum(stage["seconds"] for stage in training["stages"].values())})
    environment = training["environment"]
    machine = f"{_accelerator(environment)}{environment['cpu']}"
    where = f"On {machine}, torch {environment['torch']}, {training['settings']['precision']}."
    return markdown_table(rows, ["stage", "steps", Column("seconds", "time", format_seconds)]) + f"\n\n{where}"


def vlm_block(results: dict) -> str:
    rows = []
    for row in results["rows"]:
        plain = row["seconds"]["re-projecting"]
        rows.append(
            {"images": row["images"], "text": row["text"]}
            | {f"{way} time": seconds for way, seconds in row["seconds"].items()}
            | {f"{way} speedup": plain / seconds for way, seconds in row["seconds"].items()}
            | {f"{way} flops": flops for way, flops in row["flops"].items()}
            | {f"{way} bytes": size for way, size in row["bytes"].items()}
        )
    columns = [
        "images", Column("text", "text tokens"),
        Column("re-projecting time", "re-projecting", format_seconds),
        Column("re-projecting flops", "FLOP", format_count),
        Column("projected once time", "projected once", format_seconds),
        Column("projected once speedup", "speedup", format_ratio),
        Column("here time", "here", format_seconds), Column("here speedup", "speedup", format_ratio),
        Column("here flops", "FLOP", format_count), Column("here bytes", "bytes", format_bytes),
        Column("compiled time", "compiled", format_seconds), Column("compiled speedup", "speedup", format_ratio),
    ]  # fmt: skip
    environment = results["environment"]
    machine = f"{_accelerator(environment)}{environment['threads']} threads of {environment['cpu']}"
    pair, arguments = results["same_text"], results["arguments"]
    one, many = map(format_seconds, pair["seconds"])
    least = format_seconds(rows[0]["here bytes"] / results["ceilings"]["copy_bytes"])
    return (
        f"{markdown_table(rows, columns)}\n\n{machine}, torch {environment['torch']}, {arguments['dtype']}, batch "
        f"{arguments['batch']}. Behind the same {pair['text']} tokens of text, in {pair['turns']} turns: {one} with 1 "
        f"image and {many} with {pair['images'][1]}, the median ratio of neighbouring turns "
        f"{format_ratio(pair['ratio'])}. Reading the bytes of the first row takes {least} at this machine's copy speed."
    )


def _accelerator(environment: dict) -> str:
    """The device's name and a comma, or nothing where the CPU did the work: that is named anyway."""
    return "" if environment["device"] == "cpu" else f"{environment['device']}, "


SOURCES = {
    "data/mini_flamingo/training.json": (
        "python train_mini_flamingo.py",
        {"accuracy": accuracy_block, "latents": latents_block, "training": training_block},
    ),
    "results/exploration.json": (
        "python flamingo_paper_exploration.py --json results/exploration.json",
        {"resampler": resampler_block},
    ),
    "results/optimizations.json": (
        "python flamingo_optimization.py --compile --json results/optimizations.json",
        {"optimizations": optimizations_block},
    ),
    "results/flamingo_vlm_cpu.json": (
        "python -m flamingo_vlm.benchmark --threads 2 --compile --json results/flamingo_vlm_cpu.json",
        {"vlm": vlm_block},
    ),
}


def blocks() -> dict[str, str]:
    """The README's generated blocks by name. Raises ValueError for a missing or damaged JSON, or one of another
    version."""
    made = {}
    for place, (command, makers) in SOURCES.items():
        if not (ROOT / place).exists():
            raise ValueError(f"{place} is missing: make it with {command}")
        results = read_json(ROOT / place)
        try:
            made |= {name: make(results) for name, make in makers.items()}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{place} does not hold what the tables show ({reason}): make it with {command}"
            ) from error
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    try:
        changed = update_readme(ROOT / "README.md", blocks())
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"rewritten: {', '.join(changed)}" if changed else "the README is up to date")


if __name__ == "__main__":
    main()
