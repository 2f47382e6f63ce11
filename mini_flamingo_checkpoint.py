"""A trained Mini Flamingo in a folder: one file is the whole model.

    model.safetensors        all weights of the Mini Flamingo; in its metadata, as JSON, the MiniFlamingoConfig
                             ("config") and the words of its vocabulary in the order of their ids ("vocabulary")
    token_reader.safetensors the resampler's warm-up decoder
    training.json            how it was trained and what it scores

Nothing is ever unpickled. A file is written beside its place and moved into it, so a run killed at any moment leaves
the old model with its own words, or the new one with its own. Equal models make equal files, byte for byte.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from interleaved_text import WordTokenizer
from mini_flamingo import MiniFlamingo, MiniFlamingoConfig

SHIPPED = Path(__file__).parent / "data" / "mini_flamingo"


def save_mini_flamingo(folder: Path, model: MiniFlamingo, vocabulary: Sequence[str]) -> None:
    """Atomically: weights, config and vocabulary are one file."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"config": json.dumps(asdict(model.config)), "vocabulary": json.dumps(list(vocabulary))}
    _write(_model_file(folder), model, metadata)


def load_mini_flamingo(folder: Path | str = SHIPPED, device: str | torch.device = "cpu") -> MiniFlamingo:
    """The model, frozen parts frozen, in eval mode. Raises ValueError for a missing or damaged file, one that holds no
    Mini Flamingo, an unknown config field and weights of another config."""
    path = _model_file(folder)
    with _opened_model(path) as file:
        model = MiniFlamingo(_config(path, _metadata(path, file, "config", dict)))
        _fill(path, model, _tensors(file))
    return model.freeze_pretrained().to(device).eval()


def load_tokenizer(folder: Path | str = SHIPPED) -> WordTokenizer:
    """The words that the model in this folder knows. Raises ValueError for a missing or damaged file, or one that
    holds no Mini Flamingo."""
    path = _model_file(folder)
    with _opened_model(path) as file:
        words = _metadata(path, file, "vocabulary", list)
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: its vocabulary must be a list of words")
    return WordTokenizer(words)


def save_weights(path: Path, module: nn.Module) -> None:
    """Atomically: beside its place first, then moved."""
    _write(path, module, None)


def load_weights(path: Path, module: nn.Module) -> None:
    """Raises ValueError where the file is missing or damaged, or its names or shapes are not the module's."""
    with _opened(path) as file:
        _fill(path, module, _tensors(file))


def _model_file(folder: Path | str) -> Path:
    return Path(folder) / "model.safetensors"


def _write(path: Path, module: nn.Module, metadata: dict[str, str] | None) -> None:
    content = save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, metadata)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_with_sorted_metadata(content))
    os.replace(partial, path)


def _with_sorted_metadata(content: bytes) -> bytes:
    """safetensors writes metadata in an order that changes from call to call. Its file is 8 bytes with the length of a
    JSON header, that header filled up with spaces to a multiple of 8, and the tensors at offsets counted from there."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


@contextmanager
def _opened_model(path: Path) -> Iterator[safe_open]:
    if not path.exists():
        raise ValueError(f"no trained Mini Flamingo in {path.parent}: train one with python train_mini_flamingo.py")
    with _opened(path) as file:
        yield file


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.exists():
        raise ValueError(f"{path} is missing: train it with python train_mini_flamingo.py")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _metadata(path: Path, file: safe_open, key: str, kind: type) -> Any:
    metadata = file.metadata() or {}
    if not {"config", "vocabulary"} <= metadata.keys():
        raise ValueError(
            f"{path} is no Mini Flamingo of this version: its metadata must hold a config and a vocabulary; "
            "train one with python train_mini_flamingo.py"
        )
    try:
        value = json.loads(metadata[key])
    except ValueError as error:
        raise ValueError(f"{path} is damaged: the {key} in its metadata is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged: the {key} in its metadata must be a {kind.__name__}; got {value!r}")
    return value


def _config(path: Path, settings: Mapping[str, Any]) -> MiniFlamingoConfig:
    known = {field.name: field.type for field in fields(MiniFlamingoConfig)}
    if set(settings) != set(known):
        raise ValueError(
            f"{path} is not of this version: its config has the unknown fields {sorted(set(settings) - set(known))} "
            f"and lacks the fields {sorted(set(known) - set(settings))}"
        )
    for name, value in settings.items():
        allowed, what = (int, "whole number") if known[name] is int else ((int, float), "number")
        if isinstance(value, bool) or not isinstance(value, allowed) or value < 0:
            raise ValueError(f"{path}: {name} in its config must be a {what}, 0 or more; got {value!r}")
    return MiniFlamingoConfig(**settings)


def _tensors(file: safe_open) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file itself is not iterable)


def _fill(path: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
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
