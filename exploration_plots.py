"""The pictures of the paper exploration: what the latents look at, the gates, and a sheet of captions."""

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reporting import PALETTE, new_figure, save_figure


def plot_latents(image: Tensor, maps: Tensor, path: Path, count: int = 15) -> Path:
    """image uint8[3, h, w] and each latent's attention over it, float[L, side, side]: the `count` most focused
    latents."""
    focus = maps.flatten(1).amax(1) / maps.flatten(1).sum(1)
    chosen = focus.argsort(descending=True)[:count].sort().values.tolist()
    columns = 8
    rows = (len(chosen) + 1 + columns - 1) // columns
    figure, axes = new_figure(rows, columns, size=(1.6 * columns, 1.75 * rows), grid=False)
    pixels = image.permute(1, 2, 0).float() / 255
    for ax in axes.flat:
        ax.set_axis_off()
    axes.flat[0].imshow(pixels.numpy())
    axes.flat[0].set_title("image", fontsize=9)
    for ax, latent in zip(axes.flat[1:], chosen, strict=False):
        light = F.interpolate(maps[None, None, latent] / maps[latent].amax(), image.shape[1:], mode="nearest")
        ax.imshow((pixels * (0.15 + 0.85 * light[0, 0, :, :, None])).numpy())  # bright where it looks
        ax.set_title(f"latent {latent}", fontsize=9)
    figure.suptitle("Bright: where latents look in the first resampler layer (mean over heads)", fontsize=11)
    return save_figure(figure, path)


def plot_gates(result: dict, path: Path) -> Path:
    """What the model answers as its gates open, and where training put the gates."""
    figure, axes = new_figure(1, 2, size=(9.6, 3.6))
    opening, trained = axes.flat
    factors = [100 * row["factor"] for row in result["opening"]]
    opening.plot(factors, [100 * row["right"] for row in result["opening"]], marker="o")
    opening.set_xlabel("gates, % of their trained opening")
    opening.set_ylabel("`what is at` answered right, %")
    opening.set_ylim(-3, 103)
    layers = [row["layer"] for row in result["trained"]]
    for name, offset, colour in (("attention", -0.2, PALETTE[0]), ("feed_forward", 0.2, PALETTE[1])):
        heights = [row[name] for row in result["trained"]]
        trained.bar([i + offset for i in layers], heights, width=0.38, color=colour, label=name.replace("_", "-"))
    trained.axhline(0, color="black", linewidth=0.8)
    trained.set_xticks(layers)
    trained.set_xlabel("before language-model layer")
    trained.set_ylabel("tanh(gate)")
    trained.legend(frameon=False)
    return save_figure(figure, path)


def plot_captions(pixels: list[Tensor], samples: list[dict], path: Path) -> Path:
    """One panel a sample: its images uint8[M, 3, h, w] side by side, the prompt, the model's words, and the truth where
    they differ."""
    columns = 4
    rows = (len(samples) + columns - 1) // columns
    figure, axes = new_figure(rows, columns, size=(3.4 * columns, 3.9 * rows), grid=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, images, sample in zip(axes.flat, pixels, samples, strict=False):
        ax.imshow(torch.cat(list(images), dim=-1).permute(1, 2, 0).numpy())
        words = [f"prompt: {sample['prompt']}", f"model: {sample['said']}"]
        words += [] if sample["right"] else [f"truth: {sample['truth']}"]
        text = "\n".join(textwrap.fill(line, 46) for line in words)
        colour = "black" if sample["right"] else PALETTE[4]
        ax.set_title(text, fontsize=8, loc="left", y=-0.02, va="top", color=colour)
    return save_figure(figure, path)
