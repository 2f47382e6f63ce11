"""A trained Mini Flamingo in a folder: safetensors for weights, JSON for everything else.

    config.json              MiniFlamingoConfig and the vocabulary
    model.safetensors        all weights of the Mini Flamingo
    token_reader.safetensors the resampler's warm-up decoder
    training.json            how it was trained and what it scores

Nothing is ever unpickled. Each file is written beside its place and moved into it, so a killed run leaves no half file.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interleaved_text import WordTokenizer
from mini_flamingo import MiniFlamingo, MiniFlamingoConfig

SHIPPED = Path(__file__).parent / "data" / "mini_flamingo"


def save_mini_flamingo(folder: Path, model: MiniFlamingo, vocabulary: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"config": asdict(model.config), "vocabulary": list(vocabulary)}, indent=1)
    partial = folder / "config.json.partial"
    partial.write_text(text + "\n")
    os.replace(partial, folder / "config.json")
    save_weights(folder / "model.safetensors", model)


def load_mini_flamingo(folder: Path | str = SHIPPED, device: str | torch.device = "cpu") -> MiniFlamingo:
    """The model, frozen parts frozen, in eval mode. Raises ValueError for a missing or damaged file, an unknown config
    field and weights of another config."""
    folder = Path(folder)
    settings = _read_config(folder)["config"]
    known = {field.name for field in fields(MiniFlamingoConfig)}
    if set(settings) != known:
        raise ValueError(
            f"{folder / 'config.json'} is not of this version: unknown fields {sorted(set(settings) - known)}, "
            f"missing fields {sorted(known - set(settings))}"
        )
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{folder / 'config.json'}: {name} must be a number, 0 or more; got {value!r}")
    model = MiniFlamingo(MiniFlamingoConfig(**settings))
    load_weights(folder / "model.safetensors", model)
    return model.freeze_pretrained().to(device).eval()


def load_tokenizer(folder: Path | str = SHIPPED) -> WordTokenizer:
    """The words that the model in this folder knows. Raises ValueError for a missing or damaged file."""
    return WordTokenizer(_read_config(Path(folder))["vocabulary"])


def save_weights(path: Path, module: nn.Module) -> None:
    """Atomically: beside its place first, then moved."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, partial)
    os.replace(partial, path)


def load_weights(path: Path, module: nn.Module) -> None:
    """Raises ValueError where the file is missing or damaged, or its names or shapes are not the module's."""
    tensors = _read_tensors(path)
    expected = module.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    other_shape = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other_shape))
        if names
    ]
    if problems:
        raise ValueError(f"{path} holds the weights of another model; {'; '.join(problems)}")
    module.load_state_dict(tensors)


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"no trained Mini Flamingo in {folder}: train one with python train_mini_flamingo.py")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of the JSON or of its UTF-8
        raise ValueError(f"{path} is damaged: {error}") from None
    parts = {"config": dict, "vocabulary": list}
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in parts.items()):
        raise ValueError(f"{path} must hold a config and a vocabulary")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path} is missing: train it with python train_mini_flamingo.py")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
