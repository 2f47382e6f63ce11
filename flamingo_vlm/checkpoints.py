"""OpenFlamingo's checkpoints: into our `Flamingo`, out of it, and looked at.

A checkpoint holds what was trained: resampler, gated blocks and input embedding. The vision encoder and the decoder
layers are frozen and come from repositories of their own, so that a file lacks them is no error. That it lacks anything
else is one, and here it is raised: OpenFlamingo loads with strict=False, which hides it.

Embeddings have the language model's own names. OpenFlamingo neither trains nor saves an untied output embedding,
although it has rows for the new tokens, which are therefore others after each load. Here it is saved, and loaded where
a file holds it. Left out: optimizer state.

    python -m flamingo_vlm.checkpoints inspect FILE
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo_vlm.checkpoint_files import (
    OpenFlamingoFile,
    anatomy,
    decoder_layer_of,
    listed,
    read_openflamingo_file,
    same,
    summary,
)
from flamingo_vlm.conditioning import plain_language_model
from flamingo_vlm.model import Flamingo, check_plain_resampler

RESAMPLER, GATED, INPUT, OUTPUT = "resampler", "gated cross-attention", "input embedding", "output embedding"

# ---------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class LoadReport:
    """What loading did. `str` of it is for people.

    loaded:  name of a tensor -> number of parameters
    ignored: name of one that the file holds -> why it is not needed
    absent:  name of one that the file lacks -> what that means
    """

    path: Path
    loaded: dict[str, int]
    ignored: dict[str, str]
    absent: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: loaded {len(self.loaded)} tensors with {sum(self.loaded.values()):,} parameters.",
            "Vision encoder and decoder layers are frozen and come from repositories of their own: that a checkpoint "
            "lacks them is no error.",
        ]
        for title, entries in (("Not needed", self.ignored), ("Not in the file", self.absent)):
            for reason in dict.fromkeys(entries.values()):
                names = [name for name in entries if entries[name] == reason]
                lines.append(f"{title}: {listed(names)}: {reason}.")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Place:
    """A parameter that a checkpoint holds, and its names in `OpenFlamingoFile.tensors`: several where embeddings are
    tied."""

    part: str
    parameter: nn.Parameter
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]


def load_openflamingo_checkpoint(model: Flamingo, path: str | Path, *, frozen_embeddings: bool = False) -> LoadReport:
    """Copies the file's weights into the model, in the model's precision and on its devices, or raises and copies none.

    The model has the tokenizer's vocabulary, new tokens included. frozen_embeddings: the file's model was trained with
    frozen embeddings, so it may lack the input embedding; the new tokens' rows then stay as they are.

    Raises FileNotFoundError, and ValueError for a file that cannot be read (see `read_openflamingo_file`), that lacks a
    tensor, has one of another shape or one that this model does not know.
    """
    file, places = read_openflamingo_file(path), _places(model)
    found = [place for place in places if any(name in file.tensors for name in place.names)]
    missing = [place for place in places if place not in found]
    absent = {place.name: reason for place in missing if (reason := _may_be_absent(place, frozen_embeddings))}
    claimed, frozen = {name for place in places for name in place.names}, _language_model_names(model)
    unclaimed = [name for name in file.tensors if name not in claimed]
    problems = [
        *_differences(file, model),
        *_lacking([place for place in missing if place.name not in absent]),
        *(problem for place in found for problem in _mismatches(place, file)),
        *_unknown([name for name in unclaimed if name not in frozen]),
    ]
    if problems:
        raise ValueError(f"{path} does not fit this model, and nothing was loaded: {'; '.join(problems)}")
    with torch.no_grad():
        for place in found:
            place.parameter.copy_(next(file.tensors[name] for name in place.names if name in file.tensors))
    not_needed = dict.fromkeys(unclaimed, "this part is frozen and comes from the language model's own repository")
    loaded = {place.name: place.parameter.numel() for place in found}
    return LoadReport(file.path, loaded, file.ignored | not_needed, absent)


def _places(model: Flamingo) -> list[_Place]:
    """Everything that is trained, and the output embedding, which has rows of new tokens too. Raises ValueError where
    the model has no weights, only shapes."""
    parts = [
        (RESAMPLER, "perceiver", model.perceiver),
        (GATED, "gated_cross_attn_layers", model.gated_cross_attn_layers),
    ]
    places = [
        _Place(part, parameter, (f"{prefix}.{name}",))
        for part, prefix, module in parts
        for name, parameter in module.named_parameters()
    ]
    names = _language_model_names(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    candidates = [(INPUT, embedding.weight)]
    if head is not None:  # None: the input embedding is the head
        candidates += [(OUTPUT, head.weight), (OUTPUT, getattr(head, "bias", None))]
    for part, parameter in candidates:
        if parameter is not None and not any(parameter is place.parameter for place in places):
            places.append(_Place(part, parameter, tuple(name for name in names if names[name] is parameter)))
    if unreal := [place.name for place in places if place.parameter.is_meta]:
        raise ValueError(f"the model must be in memory, and these have no values (meta device): {listed(unreal)}")
    return places


def _language_model_names(model: Flamingo) -> dict[str, Tensor]:
    """Parameters and buffers of the language model by their names in a file, tied ones under each of their names."""
    plain = plain_language_model(model.lang_encoder)
    tensors = dict(plain.named_buffers(remove_duplicate=False)) | dict(plain.named_parameters(remove_duplicate=False))
    if plain.config.model_type == "gpt_neox":  # transformers 5 renamed it
        head = tensors.get("lm_head.weight", tensors.get("embed_out.weight"))
        tensors |= {"lm_head.weight": head, "embed_out.weight": head}
    return {f"lang_encoder.{name}": tensor for name, tensor in tensors.items()}


def _may_be_absent(place: _Place, frozen_embeddings: bool) -> str | None:
    """What it means that the file does not hold this, or None where it must."""
    if place.part == OUTPUT:
        return "the rows of the new tokens stay as they are: OpenFlamingo neither trains nor saves them"
    if place.part == INPUT and frozen_embeddings:
        return "the rows of the new tokens stay as they are, and are not those of the training"
    return None


def _mismatches(place: _Place, file: OpenFlamingoFile) -> list[str]:
    """What is wrong with the tensors that are to become this parameter."""
    (name, tensor), *others = ((name, file.tensors[name]) for name in place.names if name in file.tensors)
    expected = place.parameter.shape
    if tensor.shape != expected:
        problem = f"{name} is {list(tensor.shape)} in the file and {list(expected)} in this model"
        if place.part in (INPUT, OUTPUT) and tensor.dim() > 0 and tensor.shape[1:] == expected[1:]:
            problem += (
                f", a vocabulary of {len(tensor)} tokens and one of {expected[0]}: add the new tokens to the same "
                "tokenizer that the file was trained with, and call resize_token_embeddings(len(tokenizer))"
            )
        return [problem]
    return [
        f"{name} and {other} are one tensor in this model (tied embeddings) and two different ones in the file"
        for other, twin in others
        if not same(tensor, twin)
    ]


def _differences(file: OpenFlamingoFile, model: Flamingo) -> list[str]:
    """How the file's model was built otherwise, where that can be told."""
    theirs, ours = anatomy(file.tensors), anatomy(dict(model.named_parameters()))
    return [
        f"{what} is {theirs[what]} in the file and {ours[what]} in this model"
        for what in theirs
        if theirs[what] and theirs[what] != ours[what]
    ]


def _lacking(places: Sequence[_Place]) -> list[str]:
    reasons = []
    for part in dict.fromkeys(place.part for place in places):
        names = [place.name for place in places if place.part == part]
        reason = f"it lacks {len(names)} tensors of the {part} ({listed(names)})"
        if part == INPUT:
            reason += (
                ", without which the new tokens' rows would stay random: if it was trained with frozen embeddings, "
                "pass frozen_embeddings=True; else it is incomplete, or of another language model"
            )
        reasons.append(reason)
    return reasons


def _unknown(names: Sequence[str]) -> list[str]:
    return [f"it holds {len(names)} tensors that this model does not have ({listed(names)})"] if names else []


# ---------------------------------------------------------------------------------------------------- saving


def save_openflamingo_checkpoint(model: Flamingo, path: str | Path) -> None:
    """Writes a file that OpenFlamingo 2.0.1 reads: a flat dict of tensors on the CPU, in the model's precision, each
    under all its names and stored once. It also holds an untied output embedding, which theirs would lose.

    The file appears complete or not at all. Raises ValueError where the model has no weights, only shapes, and for a
    resampler that is not the plain one.
    """
    check_plain_resampler(model)
    tensors = {}
    for place in _places(model):
        tensor = place.parameter.detach().cpu()
        tensors |= {
            theirs: tensor for name in place.names for theirs in _their_names(name, model.decoder_layers_attr_name)
        }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(tensors, partial)
    os.replace(partial, path)


def _their_names(name: str, list_name: str) -> list[str]:
    layer = decoder_layer_of(name)
    if layer is None:
        return [name]
    rest = name.split(".", 2)[2]
    return [
        f"lang_encoder.{list_name}.{layer}.gated_cross_attn_layer.{rest}",
        f"lang_encoder.gated_cross_attn_layers.{layer}.{rest}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_vlm.checkpoints",
        description="Looks into checkpoints of OpenFlamingo, released or from training, without loading a model.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="print what a file holds",
        description="Prints the settings that a model needs for this file to load into it, the sizes of its "
        "embeddings, and how far the gates are open: 0 is shut, 1 or -1 wide open.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="a released checkpoint.pt or a training checkpoint")
    arguments = parser.parse_args(argv)
    try:
        print(summary(read_openflamingo_file(arguments.file)))
    except (ValueError, OSError) as error:
        inspect.error(str(error))


if __name__ == "__main__":
    main()
