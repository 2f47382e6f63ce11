"""The sample images in data/flamingo_test_images: held-out scenes as PNG files, with prompts and true answers.

    samples.json   [{"images": ["scene-1.png"], "prompt": "<image> list :", "truth": "a1 large red circle ; ."}, ...]

`write_samples` makes the folder, the same from the same seed. Put images of your own beside them, list them in
samples.json, and the exploration script shows what the model says of them.
"""

import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import shapes_texts as texts
from interleaved_text import Example, answer_of, prompt_of
from reporting import read_json, write_json
from shapes_world import Scene, render, sample_scene

FOLDER = Path(__file__).parent / "data" / "flamingo_test_images"


def load_image(path: Path | str, size: int) -> Tensor:
    """An image file -> uint8[3, size, size]. Raises ValueError naming the file where it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
            if pixels.size != (size, size):
                pixels = pixels.resize((size, size), Image.Resampling.BICUBIC)
    except Exception as error:  # damage shows as OSError, SyntaxError, ValueError, DecompressionBombError ...
        raise ValueError(f"cannot read the image {path}: {error}") from None
    return torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def load_samples(folder: Path, size: int) -> list[dict]:
    """The entries of samples.json, each with its `pixels` uint8[M, 3, size, size]. Raises ValueError for a missing or
    damaged listing and for an image that cannot be read."""
    listing = folder / "samples.json"
    if not listing.exists():
        raise ValueError(f"{listing} is missing: it lists the images, their prompts and the true answers")
    entries = read_json(listing)
    if not isinstance(entries, list) or not entries or not all(map(_is_sample, entries)):
        raise ValueError(f"{listing} must be a list of samples, each with images (a list of names), prompt and truth")
    return [
        {key: entry[key] for key in ("images", "prompt", "truth")}
        | {"pixels": torch.stack([load_image(folder / name, size) for name in entry["images"]])}
        for entry in entries
    ]


def _is_sample(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list) or not entry["images"]:
        return False
    return all(isinstance(text, str) for text in (*entry["images"], entry.get("prompt"), entry.get("truth")))


def sample_examples(seed: int = 7) -> list[Example]:
    """Captions, one question of each kind, and an episode whose word only its four shots define; all held out."""
    rng = random.Random(seed)

    def scene(low: int, high: int) -> Scene:
        return sample_scene(rng, "held-out", low, high)

    return [
        texts.caption_example(scene(3, 3)),
        texts.caption_example(scene(8, 8)),
        texts.caption_example(scene(2, 2), "describe"),
        *(texts.question_example(scene(4, 7), [kind], rng) for kind in texts.QUESTION_KINDS),
        texts.word_example(rng, 4, "held-out"),
    ]


def write_samples(folder: Path = FOLDER, seed: int = 7) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for number, example in enumerate(sample_examples(seed), start=1):
        names = [
            f"scene-{number}{'abcdefgh'[i] if len(example.scenes) > 1 else ''}.png" for i in range(len(example.scenes))
        ]
        for name, pixels in zip(names, render(example.scenes, generator), strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
        entries.append({"images": names, "prompt": prompt_of(example), "truth": answer_of(example)})
    write_json(folder / "samples.json", entries)
