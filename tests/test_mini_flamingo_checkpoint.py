"""Checkpoints: what is saved is what is loaded, and what cannot be loaded is named."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mini_flamingo_checkpoint as checkpoint
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


def change_config(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["config"] |= changes
    path.write_text(json.dumps(content))


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
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


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


@pytest.mark.parametrize("moves", [0, 1])
def test_a_kill_while_moving_files_leaves_the_old_checkpoint(saved, monkeypatch, moves):
    old, folder = saved
    torch.manual_seed(1)
    done, move = [], os.replace

    def killed(source, target):
        if len(done) == moves:
            raise Killed
        done.append(target)
        move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        save_mini_flamingo(folder, tiny_flamingo(), VOCABULARY)
    monkeypatch.undo()
    assert same_weights(load_mini_flamingo(folder), old)
    assert load_tokenizer(folder).words == VOCABULARY
    again = tiny_flamingo()
    save_mini_flamingo(folder, again, VOCABULARY)
    assert same_weights(load_mini_flamingo(folder), again), "what the kill left behind is in nobody's way"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_kill_while_writing_weights_leaves_the_old_checkpoint(saved, monkeypatch):
    old, folder = saved

    def killed(tensors, path):
        path.write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(checkpoint, "save_file", killed)
    torch.manual_seed(1)
    with pytest.raises(Killed):
        save_mini_flamingo(folder, tiny_flamingo(), VOCABULARY)
    assert same_weights(load_mini_flamingo(folder), old)


def test_a_kill_between_a_new_config_and_its_weights_is_noticed(saved, monkeypatch):
    """They are moved one after the other; what lies there in between is refused and not taken for a model."""
    _, folder = saved

    def killed(path, module):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint, "save_weights", killed)
        save_mini_flamingo(folder, tiny_flamingo(dim=24), VOCABULARY)
    with pytest.raises(ValueError, match="holds the weights of another model"):
        load_mini_flamingo(folder)


# ---------------------------------------------------------------------------------------------------- errors


def test_a_folder_without_a_checkpoint_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        for load in (load_mini_flamingo, load_tokenizer):
            with pytest.raises(ValueError, match=f"no trained Mini Flamingo in {folder}: train one with python"):
                load(folder)


def test_missing_weights_are_named(saved):
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing: train it with python"):
        load_mini_flamingo(saved[1])


@pytest.mark.parametrize("content", [b"", b"{", b'{"config": ', b"not json at all", b"\xff\xfe\x00"])
def test_a_damaged_config_is_named(saved, content):
    (saved[1] / "config.json").write_bytes(content)
    for load in (load_mini_flamingo, load_tokenizer):
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            load(saved[1])


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"config": {}}', '{"vocabulary": []}', '{"config": 3, "vocabulary": []}']
)
def test_a_config_without_its_parts_is_named(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json must hold a config and a vocabulary"):
        load_mini_flamingo(saved[1])


@pytest.mark.parametrize("value", ["wide", None, [64], True, -64])
def test_a_field_that_is_no_size_is_named(saved, value):
    change_config(saved[1], dim=value)
    with pytest.raises(ValueError, match=r"config\.json: dim must be a number, 0 or more; got "):
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
    tensors = load_file(path)
    name = "resampler.latents"
    latents = tensors.pop(name)
    for other, message in (
        ({name: latents[:3]}, r"of another shape: resampler.latents \[3, 80\] instead of \[6, 80\]$"),
        ({name: latents, "stranger": latents.clone()}, "unknown: stranger$"),
        ({}, "missing: resampler.latents$"),
    ):
        save_file(tensors | other, path)
        with pytest.raises(ValueError, match=message):
            load_mini_flamingo(folder)


def test_fields_of_another_version_are_named(saved):
    change_config(saved[1], colour_depth=8)
    with pytest.raises(ValueError, match=r"config\.json is not of this version: unknown fields \['colour_depth'\]"):
        load_mini_flamingo(saved[1])
    path = saved[1] / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["colour_depth"], content["config"]["dim"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json is not of this version: .*missing fields \['dim'\]"):
        load_mini_flamingo(saved[1])
