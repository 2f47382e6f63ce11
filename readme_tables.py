"""Rewrites the README's tables from the JSON of the runs behind them:  python readme_tables.py

data/mini_flamingo/training.json   how the shipped model was trained and what it scores
results/exploration.json           flamingo_paper_exploration.py --json
"""

import argparse
from pathlib import Path

from reporting import (
    Column,
    format_count,
    format_percent,
    format_ratio,
    format_seconds,
    markdown_table,
    read_json,
    update_readme,
)

ROOT = Path(__file__).parent


def accuracy_block(training: dict) -> str:
    report = training["report"]
    rows = [
        {"task": name, "right": right, "blank": report["blank"].get(name), "shuffled": report["shuffled"].get(name)}
        for name, right in report["right"].items()
    ]
    rows += [
        {"task": f"{name}: sizes, colours and shapes", "right": right} for name, right in report["attributes"].items()
    ]
    rows += [
        {"task": f"new word, {n} shots", "right": right} for n, right in report["new word by shots"].items() if n != "8"
    ]
    columns = [
        "task",
        Column("right", "right", format_percent),
        Column("blank", "images blanked", format_percent),
        Column("shuffled", "another row's images", format_percent),
    ]
    return markdown_table(rows, columns) + f"\n\n{report['scenes']} of each."


def latents_block(training: dict) -> str:
    rows = []
    for key in ("caption by latents", "caption by depth"):
        scores = training["report"][key]
        names = sorted(scores, key=lambda name: (not name.isdigit(), -int(name.split()[0])))
        what = "visual tokens" if "latents" in key else "resampler depth"
        rows += [{"what": what, "value": name, "right": scores[name]} for name in names]
    return markdown_table(rows, ["what", "value", Column("right", "caption exact match", format_percent)])


def resampler_block(exploration: dict) -> str:
    columns = [
        "form", "batch", "tokens",
        Column("flops", "FLOP/image", format_count), Column("seconds", "time", format_seconds),
        Column("of_ceiling", "of matmul ceiling", format_percent), Column("speedup", "speedup", format_ratio),
    ]  # fmt: skip
    environment = exploration["environment"]
    where = f"{environment['threads']} threads of {environment['cpu']}, torch {environment['torch']}, float32."
    return markdown_table(exploration["resampler"]["rows"], columns) + f"\n\n{where}"


def training_block(training: dict) -> str:
    rows = [{"stage": name, **stage} for name, stage in training["stages"].items()]
    rows.append({"stage": "together", "seconds": sum(stage["seconds"] for stage in training["stages"].values())})
    environment = training["environment"]
    where = f"On {environment['cpu']}, torch {environment['torch']}, {training['settings']['precision']}."
    return markdown_table(rows, ["stage", "steps", Column("seconds", "time", format_seconds)]) + f"\n\n{where}"


def blocks() -> dict[str, str]:
    """The README's generated blocks by name."""
    training = read_json(ROOT / "data/mini_flamingo/training.json")
    exploration = read_json(ROOT / "results/exploration.json")
    return {
        "accuracy": accuracy_block(training),
        "latents": latents_block(training),
        "resampler": resampler_block(exploration),
        "training": training_block(training),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    changed = update_readme(ROOT / "README.md", blocks())
    print(f"rewritten: {', '.join(changed)}" if changed else "the README is up to date")


if __name__ == "__main__":
    main()
