"""The picture of the seven optimizations: speed against quality."""

from collections.abc import Mapping
from pathlib import Path

from reporting import PALETTE, new_figure, save_figure

MARKERS = "osD^vP*"
COLOURS = (*PALETTE, "#c9a227")
TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def plot_summary(results: Mapping[str, dict], baseline: float, path: Path) -> Path:
    """One mark per setting: how much faster than the plain model it is, and the share of answers that are right.
    Settings whose words are the plain model's own stand on its line."""
    figure, axes = new_figure(1, 1, size=(8.4, 5.2))
    ax = axes[0, 0]
    ax.axhline(100 * baseline, color="#6b7280", linewidth=0.8, linestyle="--", zorder=1)
    ax.axvline(1, color="#6b7280", linewidth=0.8, linestyle="--", zorder=1)
    for i, (name, result) in enumerate(results.items()):
        points = result["points"]
        quality = [100 * (baseline if each["quality"] is None else each["quality"]) for each in points]
        ax.scatter(
            [each["speedup"] for each in points], quality, s=42, alpha=0.85, zorder=3, edgecolors="white",
            linewidths=0.5, marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], label=name,
        )  # fmt: skip
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    shown = [tick for tick in TICKS if low <= tick <= high]
    ax.set_xticks(shown, [f"{tick:g}×" for tick in shown])
    ax.set_xticks([], minor=True)
    ax.set_ylim(top=101)
    ax.set_xlabel("speedup of the part that is optimized, over the plain model")
    ax.set_ylabel("held-out captions right word for word, %")
    ax.set_title("Seven optimizations: speed and what it costs (dashed: the plain model)", fontsize=11)
    ax.legend(fontsize=8, loc="lower right")
    return save_figure(figure, path)
