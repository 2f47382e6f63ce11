"""What OpenFlamingo's checkpoint files hold, under the names that the tensors have here.

Released files are flat dicts of tensors; training files keep that dict under "model_state_dict", its names perhaps
prefixed with "module.". A gated block before decoder layer i has two names, and a file may hold either or both:

    lang_encoder.<decoder layers>.{i}.gated_cross_attn_layer.*   v2
    lang_encoder.gated_cross_attn_layers.{i}.*                   v1
    gated_cross_attn_layers.{i}.*                                here

Left out: every file that would have to be unpickled.
"""

import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_V1 = re.compile(r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.")
_V2 = re.compile(r"lang_encoder\..+\.(\d+)\.gated_cross_attn_layer\.")
_HERE = re.compile(r"gated_cross_attn_layers\.(\d+)\.")
_DECODER_LAYER = re.compile(r"lang_encoder\.(old_decoder_blocks\.|.+\.\d+\.decoder_layer\.)")


@dataclass(frozen=True)
class OpenFlamingoFile:
    """What a file holds: tensors under the names they have in `Flamingo`, each once; ignored: the name in the file of
    each frozen tensor -> why it is not needed. The tensors are mapped from the disk and read when they are used."""

    path: Path
    kind: str  # "released" or "training"
    epoch: int | None
    spellings: tuple[str, ...]  # of the gated blocks' names: "v1", "v2", both or none
    tensors: dict[str, Tensor]
    ignored: dict[str, str]


def read_openflamingo_file(path: str | Path) -> OpenFlamingoFile:
    """Raises FileNotFoundError where there is nothing, and ValueError for what is no checkpoint, is damaged, holds
    anything that would have to be unpickled, or holds one tensor twice with different values."""
    path = Path(path)
    content = _load(path)
    kind = "training" if "model_state_dict" in content else "released"
    state, epoch = content.get("model_state_dict", content), content.get("epoch")
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} is no OpenFlamingo checkpoint: expected a dict of tensors, got {_kind_of(state)}")
    return OpenFlamingoFile(path, kind, epoch, *in_our_names(state, path))


def in_our_names(state: Mapping[str, Tensor], path: str | Path) -> tuple[tuple[str, ...], dict[str, Tensor], dict]:
    """OpenFlamingo's state dict -> spellings, tensors and ignored of an `OpenFlamingoFile`. path is for errors."""
    tensors, ignored, spellings = {}, {}, set()
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} is no OpenFlamingo checkpoint: expected a tensor under each name, and under {key!r} it holds "
                f"{_kind_of(tensor)}"
            )
        name = key.removeprefix("module.")
        if reason := _not_needed(name):
            ignored[key] = reason
            continue
        for spelling, pattern in (("v1", _V1), ("v2", _V2)):
            if pattern.match(name):
                name = pattern.sub(r"gated_cross_attn_layers.\1.", name)
                spellings.add(spelling)
        if name in tensors and not same(tensors[name], tensor):
            raise ValueError(
                f"{path} holds {name} twice, under two names and with different values: which one is right?"
            )
        tensors[name] = tensor
    return tuple(sorted(spellings)), tensors, ignored


def _load(path: Path) -> dict:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: expected the checkpoint file itself")
    with path.open("rb") as file:
        start = file.read(40)
    if not start.startswith(b"PK\x03\x04"):
        begins = f"begins with {start!r}" if start else "is empty"
        raise ValueError(
            f"{path} is no file of torch.save, which is a zip archive: it {begins}. Perhaps it is a web page or a Git "
            "LFS pointer in place of the file itself: download it again"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is refused: it holds Python objects beside tensors, numbers and text, which could run any code "
            "when they are unpickled (or it is damaged). Where you trust its source, ask for a file of tensors alone"
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or was not downloaded completely: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no OpenFlamingo checkpoint: expected a dict, got {_kind_of(content)}")
    return content


def _not_needed(name: str) -> str | None:
    if name.startswith("vision_encoder."):
        return "the vision encoder is frozen and comes from its own repository"
    if _DECODER_LAYER.match(name):
        return "the decoder layers are frozen and come from the language model's own repository"
    return None


def decoder_layer_of(name: str) -> int | None:
    """The decoder layer before which the gated block of that parameter (in our names) stands; None: of no block."""
    match = _HERE.match(name)
    return int(match[1]) if match else None


def _gated_layers(tensors: Iterable[str]) -> list[int]:
    return sorted({layer for name in tensors if (layer := decoder_layer_of(name)) is not None})


def anatomy(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """What names and shapes tell of a model, by the names of its settings; None where it cannot be told."""
    layers = _gated_layers(tensors)
    every = layers[0] + 1 if layers else None
    regular = layers and layers == list(range(layers[0], layers[-1] + 1, every))
    norm = f"gated_cross_attn_layers.{layers[0]}.attn.norm.weight" if layers else ""

    def size(name: str, axis: int) -> int | None:
        return tensors[name].shape[axis] if name in tensors and tensors[name].dim() > axis else None

    return {
        "number of gated blocks": len(layers),
        "cross_attn_every_n_layers": every if regular else None,
        "width of the language model": size(norm, 0),
        "vis_dim": size("perceiver.latents", 1),
        "num_latents": size("perceiver.latents", 0),
        "resampler_depth": len({name.split(".")[2] for name in tensors if name.startswith("perceiver.layers.")}),
    }


def summary(file: OpenFlamingoFile) -> str:
    """What a file holds, as aligned lines."""
    layers = _gated_layers(file.tensors)
    stored = {tensor.data_ptr(): tensor for tensor in file.tensors.values()}.values()  # tied ones once
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored}))
    size = sum(tensor.nbytes for tensor in stored)
    epoch = "" if file.epoch is None else f", epoch {file.epoch}"
    rows = {
        "file": f"{file.path} ({file.kind}{epoch}), names of {' and '.join(file.spellings) or 'no gated block'}",
        "parameters": f"{sum(tensor.numel() for tensor in stored):,} ({size / 2**20:,.1f} MiB, {dtypes})",
        "not needed": f"{len(file.ignored)} tensors of frozen parts",
        "before layers": ", ".join(map(str, layers)) or "none",
    }
    rows |= {what: "cannot be told" if value is None else value for what, value in anatomy(file.tensors).items()}
    for gate in ("attn_gate", "ff_gate"):
        named = (f"gated_cross_attn_layers.{layer}.{gate}" for layer in layers)
        if values := [file.tensors[name].float().tanh() for name in named if name in file.tensors]:
            low, middle, high = torch.cat([value.flatten() for value in values]).quantile(torch.tensor([0, 0.5, 1]))
            rows[f"tanh({gate})"] = f"min {low:+.4f}  median {middle:+.4f}  max {high:+.4f}"
    names = [name for name in file.tensors if name.startswith("lang_encoder.")]
    rows |= {name: " x ".join(map(str, file.tensors[name].shape)) for name in names}
    width = max(map(len, rows))
    return "\n".join(f"{what:<{width}}  {value}" for what, value in rows.items())


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind_of(value: object) -> str:
    return "an empty dict" if value == {} else f"a value of type {type(value).__name__}"
