"""Checkpoints: what is saved is what is loaded, and what cannot be loaded is named."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mini_flamingo_checkpoint import load_mini_flamingo, load_tokenizer, load_weights, save_mini_flamingo, save_weights
from tiny_flamingo import TINY, random_images, tiny_flamingo

VOCABULARY = ("<pad>", "<image>", "<|endofchunk|>", *(f"word{i}" for i in range(17)))


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def saved(tmp_path):
    model = tiny_flamingo()
    save_mini_flamingo(tmp_path, model, VOCABULARY)
    return model, tmp_path


def read_metadata(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def write_metadata(folder, metadata):
    """The same weights under other metadata."""
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata)


def change_config(folder, **changes):
    metadata = read_metadata(folder)
    write_metadata(folder, metadata | {"config": json.dumps(json.loads(metadata["config"]) | changes)})


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    model = tiny_flamingo(dim=24, depth=2)
    folder = tmp_path / "new" / "folder"
    save_mini_flamingo(folder, model, VOCABULARY)
    loaded = load_mini_flamingo(str(folder))
    assert same_weights(loaded, model)
    assert loaded.config == model.config == replace(TINY, dim=24, depth=2)
    assert load_tokenizer(folder).words == VOCABULARY
    ids, images = torch.tensor([[1, 5, 6]]), random_images(1, 1)
    assert torch.equal(loaded(ids, images), model(ids, images))
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"], "one file is the whole model"


def test_config_and_vocabulary_are_json_in_the_metadata(saved):
    model, folder = saved
    metadata = read_metadata(folder)
    assert {key: json.loads(text) for key, text in metadata.items()} == {
        "config": asdict(model.config),
        "vocabulary": list(VOCABULARY),
    }


def test_words_of_any_script_are_kept(tmp_path):
    words = ("<pad>", "<image>", "<|endofchunk|>", "grün", "赤", 'a"b\\c', "\u2028", "🦩")
    save_mini_flamingo(tmp_path, tiny_flamingo(vocabulary_size=len(words)), words)
    assert load_tokenizer(tmp_path).words == words


def test_equal_models_make_equal_files(saved):
    """Byte for byte, though safetensors itself writes metadata in a random order; and others read what we write."""
    model, folder = saved
    path = folder / "model.safetensors"
    contents = set()
    for _ in range(12):
        save_mini_flamingo(folder, model, VOCABULARY)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    tensors = load_file(path)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loaded_model_is_frozen_where_the_paper_freezes_it(saved):
    model = load_mini_flamingo(saved[1])
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] in ("resampler", "gated_layers")), name


def test_saving_replaces_what_was_there(saved):
    _, folder = saved
    torch.manual_seed(1)
    other = tiny_flamingo(heads=4)
    save_mini_flamingo(folder, other, VOCABULARY[::-1])
    loaded = load_mini_flamingo(folder)
    assert same_weights(loaded, other)
    assert loaded.config.heads == 4
    assert load_tokenizer(folder).words == VOCABULARY[::-1]


def test_weights_of_any_module_round_trip(tmp_path):
    module, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    module.weight = torch.nn.Parameter(torch.randn(3, 4).T)  # not contiguous
    save_weights(tmp_path / "linear.safetensors", module)
    load_weights(tmp_path / "linear.safetensors", other)
    assert same_weights(other, module)


class Killed(BaseException):
    """Like KeyboardInterrupt: no `except Exception` may catch it."""


def killed_replace(source, target):
    raise Killed


def killed_write(path, content):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name", "killed"), [(os, "replace", killed_replace), (Path, "write_bytes", killed_write)]
)
def test_a_kill_while_saving_leaves_the_old_model_with_its_own_words(saved, monkeypatch, owner, name, killed):
    """Whether it comes while the file is written or just before it is moved into its place."""
    old, folder = saved
    torch.manual_seed(1)
    other = tiny_flamingo(dim=24)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, killed)
        save_mini_flamingo(folder, other, VOCABULARY[::-1])
    loaded = load_mini_flamingo(folder)
    assert same_weights(loaded, old) and loaded.config == old.config
    assert load_tokenizer(folder).words == VOCABULARY
    save_mini_flamingo(folder, other, VOCABULARY[::-1])
    assert same_weights(load_mini_flamingo(folder), other), "what the kill left behind is in nobody's way"
    assert load_tokenizer(folder).words == VOCABULARY[::-1]
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("owner", "name", "killed"), [(os, "replace", killed_replace), (Path, "write_bytes", killed_write)]
)
def test_a_kill_in_the_first_save_leaves_no_model(tmp_path, monkeypatch, owner, name, killed):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, killed)
        save_mini_flamingo(tmp_path, tiny_flamingo(), VOCABULARY)
    for load in (load_mini_flamingo, load_tokenizer):
        with pytest.raises(ValueError, match="no trained Mini Flamingo"):
            load(tmp_path)


def test_weights_of_a_module_are_replaced_whole_too(tmp_path, monkeypatch):
    path, old, other = tmp_path / "linear.safetensors", torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    save_weights(path, old)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "replace", killed_replace)
        save_weights(path, other)
    load_weights(path, other)
    assert same_weights(other, old)


# ---------------------------------------------------------------------------------------------------- errors


def test_a_folder_without_a_checkpoint_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        for load in (load_mini_flamingo, load_tokenizer):
            with pytest.raises(ValueError, match=f"no trained Mini Flamingo in {folder}: train one with python"):
                load(folder)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"linear\.safetensors is missing: train it with python"):
        load_weights(tmp_path / "linear.safetensors", torch.nn.Linear(3, 4))


@pytest.mark.parametrize("left", [None, (), ("config",), ("vocabulary",)])
def test_weights_that_are_no_mini_flamingo_are_named(saved, left):
    """Safetensors without metadata, or with another program's."""
    _, folder = saved
    metadata = read_metadata(folder)
    write_metadata(folder, None if left is None else {"format": "pt", **{key: metadata[key] for key in left}})
    for load in (load_mini_flamingo, load_tokenizer):
        with pytest.raises(ValueError, match=r"model\.safetensors is no Mini Flamingo of this version: its metadata"):
            load(folder)


@pytest.mark.parametrize(("key", "load"), [("config", load_mini_flamingo), ("vocabulary", load_tokenizer)])
@pytest.mark.parametrize("text", ["", "{", '{"dim": ', "not json at all"])
def test_damaged_metadata_is_named(saved, key, load, text):
    _, folder = saved
    write_metadata(folder, read_metadata(folder) | {key: text})
    with pytest.raises(ValueError, match=rf"model\.safetensors is damaged: the {key} in its metadata is not JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "load", "texts"),
    [("config", load_mini_flamingo, ("[]", "3", "null")), ("vocabulary", load_tokenizer, ("{}", '"word"', "null"))],
)
def test_metadata_of_another_kind_is_named(saved, key, load, texts):
    _, folder = saved
    for text in texts:
        write_metadata(folder, read_metadata(folder) | {key: text})
        with pytest.raises(ValueError, match=rf"the {key} in its metadata must be a (dict|list); got "):
            load(folder)


def test_a_vocabulary_of_other_things_than_words_is_named(saved):
    _, folder = saved
    write_metadata(folder, read_metadata(folder) | {"vocabulary": '["<pad>", 3]'})
    with pytest.raises(ValueError, match=r"model\.safetensors: its vocabulary must be a list of words"):
        load_tokenizer(folder)


@pytest.mark.parametrize("value", ["wide", None, [64], True, -64, 64.5, 64.0])
def test_a_field_that_is_no_size_is_named(saved, value):
    change_config(saved[1], dim=value)
    with pytest.raises(ValueError, match="dim in its config must be a whole number, 0 or more; got "):
        load_mini_flamingo(saved[1])


def test_a_fraction_is_fine_where_the_config_has_one(saved):
    change_config(saved[1], attention_gain=1.5)
    assert load_mini_flamingo(saved[1]).config.attention_gain == 1.5
    change_config(saved[1], attention_gain="high")
    with pytest.raises(ValueError, match="attention_gain in its config must be a number, 0 or more; got 'high'"):
        load_mini_flamingo(saved[1])


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1])
def test_truncated_weights_are_named(saved, kept):
    path = saved[1] / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_mini_flamingo(saved[1])


def test_a_web_page_in_the_place_of_weights_is_named(saved):
    (saved[1] / "model.safetensors").write_text("<!DOCTYPE html>" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_mini_flamingo(saved[1])


def test_weights_of_another_config_are_named(saved):
    change_config(saved[1], dim=24)
    with pytest.raises(ValueError, match=r"model\.safetensors holds the weights of another model.*instead of.*more"):
        load_mini_flamingo(saved[1])
    change_config(saved[1], dim=TINY.dim, depth=TINY.depth + 1)
    with pytest.raises(ValueError, match=r"missing: gated_layers\.3.*and \d+ more"):
        load_mini_flamingo(saved[1])
    change_config(saved[1], depth=TINY.depth - 1)
    with pytest.raises(ValueError, match=r"unknown: gated_layers\.2.*and \d+ more"):
        load_mini_flamingo(saved[1])


def test_a_single_other_tensor_is_named(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    tensors, metadata = load_file(path), read_metadata(folder)
    name = "resampler.latents"
    latents = tensors.pop(name)
    for other, message in (
        ({name: latents[:3]}, r"of another shape: resampler.latents \[3, 80\] instead of \[6, 80\]$"),
        ({name: latents, "stranger": latents.clone()}, "unknown: stranger$"),
        ({}, "missing: resampler.latents$"),
    ):
        save_file(tensors | other, path, metadata)
        with pytest.raises(ValueError, match=message):
            load_mini_flamingo(folder)


def test_fields_of_another_version_are_named(saved):
    _, folder = saved
    change_config(folder, colour_depth=8)
    with pytest.raises(
        ValueError, match=r"is not of this version: its config has the unknown fields \['colour_depth'\]"
    ):
        load_mini_flamingo(folder)
    metadata = read_metadata(folder)
    config = json.loads(metadata["config"])
    del config["colour_depth"], config["dim"]
    write_metadata(folder, metadata | {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=r"is not of this version: .* lacks the fields \['dim'\]"):
        load_mini_flamingo(folder)
