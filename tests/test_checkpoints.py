"""Checkpoints: what OpenFlamingo saves we load, what we save it reads, and nothing is lost in silence."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, get_constant_schedule_with_warmup

from flamingo_vlm import checkpoints
from flamingo_vlm.checkpoints import load_openflamingo_checkpoint, main, save_openflamingo_checkpoint
from flamingo_vlm.model import Flamingo
from flamingo_vlm.mosaic_gpt import MosaicGPTConfig
from laws import randomized
from open_flamingo_reference import reference_flamingo, saved_by_open_flamingo
from tiny_vlm import EOC, MEDIA, VIS_DIM, TinyVision, tiny_flamingo, tiny_language_model

FAMILIES = ["opt", "gpt_neox", "llama", "mpt", MosaicGPTConfig.model_type]
UNTIED = ["gpt_neox", "llama"]
LAYERS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "llama": "model.layers"}
EMBEDDING = {
    "opt": "lang_encoder.model.decoder.embed_tokens.weight",
    "gpt_neox": "lang_encoder.gpt_neox.embed_in.weight",
    "llama": "lang_encoder.model.embed_tokens.weight",
}


def ours(family="llama", every=2, **options):
    """Of the size that theirs always has."""
    return tiny_flamingo(family, every, **({"num_latents": 64, "resampler_depth": 6} | options))


def theirs(family="llama", every=2):
    """OpenFlamingo's own model, trained by the dice."""
    layers = LAYERS.get(family, "transformer.blocks")
    model = reference_flamingo(tiny_language_model(family), TinyVision(), every, layers)
    torch.manual_seed(2)
    for part in (
        model.perceiver,
        model.lang_encoder.gated_cross_attn_layers,
        model.lang_encoder.get_input_embeddings(),
    ):
        randomized(part)
    return model


def trained(model):
    """What training changes, by names of our own, of their model or of ours."""
    blocks = model.gated_cross_attn_layers if isinstance(model, Flamingo) else their_blocks(model)
    parts = {"perceiver": model.perceiver, "embedding": model.lang_encoder.get_input_embeddings()}
    parts |= {f"block {i}": block for i, block in blocks.items()}
    return {f"{part} {name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def their_blocks(model):
    blocks = enumerate(model.lang_encoder.gated_cross_attn_layers)
    return {str(i): block for i, block in blocks if block is not None}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def saved(tensors, folder, name="checkpoint.pt"):
    torch.save(tensors, folder / name)
    return folder / name


@pytest.fixture
def ours_saved(tmp_path):
    """Our model and the flat dict it is saved as."""
    model = ours(num_latents=3, resampler_depth=2)
    save_openflamingo_checkpoint(model, tmp_path / "saved.pt")
    return model, torch.load(tmp_path / "saved.pt", weights_only=True)


# ---------------------------------------------------------------------------------------------------- theirs to ours


@pytest.mark.parametrize("family", FAMILIES)
def test_what_open_flamingo_saves_is_loaded(family, tmp_path):
    source, model = theirs(family), ours(family)
    frozen = {name: tensor.clone() for name, tensor in model.vision_encoder.state_dict().items()}
    assert not same(trained(model), trained(source))
    report = load_openflamingo_checkpoint(model, saved(saved_by_open_flamingo(source), tmp_path))
    assert same(trained(model), trained(source))
    assert same(frozen, model.vision_encoder.state_dict())
    assert sum(report.loaded.values()) == sum(tensor.numel() for tensor in trained(model).values())


def as_v1(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not is_v2(name)}


def is_v2(name):
    return ".gated_cross_attn_layer." in name


def as_training_file(model):
    """With the state of a real optimizer and schedule, which is not read."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.0, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=3)
    sum(parameter.sum() for parameter in learned).backward()
    optimizer.step()
    schedule.step()
    return {
        "epoch": 3,
        "model_state_dict": {f"module.{name}": tensor for name, tensor in saved_by_open_flamingo(model).items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": schedule.state_dict(),
    }


@pytest.mark.parametrize(
    "content",
    [
        saved_by_open_flamingo,
        as_v1,
        lambda model: model.state_dict(),
        lambda model: {f"module.{name}": tensor for name, tensor in saved_by_open_flamingo(model).items()},
        as_training_file,
    ],
    ids=["v2", "v1", "both, with every frozen part", "module.", "training file"],
)
def test_every_form_of_file_holds_the_same_model(content, tmp_path):
    source, model = theirs(), ours()
    load_openflamingo_checkpoint(model, saved(content(source), tmp_path))
    assert same(trained(model), trained(source))


def test_the_output_embedding_is_loaded_under_its_name_in_transformers_4(tmp_path):
    source, model = theirs("gpt_neox"), ours("gpt_neox")
    head = torch.randn_like(model.lang_encoder.lm_head.weight)
    content = saved_by_open_flamingo(source) | {"lang_encoder.embed_out.weight": head}
    report = load_openflamingo_checkpoint(model, saved(content, tmp_path))
    assert torch.equal(model.lang_encoder.lm_head.weight, head)
    assert not report.absent


def test_weights_take_the_models_precision(tmp_path):
    source, model = theirs(), ours().to(torch.bfloat16)
    model.perceiver.requires_grad_(False)
    load_openflamingo_checkpoint(model, saved(saved_by_open_flamingo(source), tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert same(trained(model), {name: tensor.bfloat16() for name, tensor in trained(source).items()})
    assert not any(parameter.requires_grad for parameter in model.perceiver.parameters())


def test_the_report_tells_what_is_no_error_and_what_is_lost(tmp_path):
    source, model = theirs(), ours()
    head = model.lang_encoder.lm_head.weight.clone()
    report = load_openflamingo_checkpoint(model, saved(saved_by_open_flamingo(source), tmp_path))
    assert "that a checkpoint lacks them is no error" in str(report)
    assert list(report.absent) == ["lang_encoder.lm_head.weight"], "trap 9"
    assert "Not in the file: lang_encoder.lm_head.weight: the rows of the new tokens stay as they are" in str(report)
    assert torch.equal(model.lang_encoder.lm_head.weight, head)

    everything = load_openflamingo_checkpoint(model, saved(source.state_dict(), tmp_path))
    assert not everything.absent
    unused = source.state_dict().keys() - everything.loaded.keys()
    assert everything.ignored.keys() == {name for name in unused if "perceiver" not in name and "gated" not in name}
    assert "vision_encoder.vision.embed.weight" in everything.ignored
    assert "lang_encoder.model.norm.weight" in everything.ignored
    assert f"loaded {len(everything.loaded)} tensors with {sum(everything.loaded.values()):,} parameters" in str(
        everything
    )


# ---------------------------------------------------------------------------------------------------- ours to theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_open_flamingo_reads_what_we_save(family, tmp_path):
    source, target = ours(family), theirs(family)
    save_openflamingo_checkpoint(source, tmp_path / "new" / "checkpoint.pt")
    missing, unexpected = target.load_state_dict(torch.load(tmp_path / "new" / "checkpoint.pt"), strict=False)
    assert same(trained(target), trained(source))
    if (head := target.lang_encoder.get_output_embeddings()) is not None:
        assert torch.equal(head.weight, source.lang_encoder.get_output_embeddings().weight)
    needed = ("perceiver", "gated_cross_attn_layer", "embed_tokens", "embed_in", "wte", "lm_head")
    assert not [name for name in missing if any(part in name for part in needed)]
    assert unexpected == (["lang_encoder.embed_out.weight"] if family == "gpt_neox" else []), (
        "its name in transformers 4"
    )


@pytest.mark.parametrize("family", [*FAMILIES, "gptj"])
def test_what_we_save_we_load(family, tmp_path):
    """Trap 9: with the output embedding, and where the head has a bias, with that."""
    source, model = ours(family), ours(family)
    for part in (source.perceiver, source.gated_cross_attn_layers, source.lang_encoder):
        randomized(part)
    save_openflamingo_checkpoint(source, tmp_path / "checkpoint.pt")
    report = load_openflamingo_checkpoint(model, tmp_path / "checkpoint.pt")
    assert same(trained(model), trained(source))
    if (head := model.lang_encoder.get_output_embeddings()) is not None:
        assert same(head.state_dict(), source.lang_encoder.get_output_embeddings().state_dict())
    assert not report.absent
    assert not report.ignored


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_stored_once(family, tmp_path):
    model = ours(family)
    save_openflamingo_checkpoint(model, tmp_path / "checkpoint.pt")
    tensors = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    count = len(trained(model)) + (family in UNTIED)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == count < len(tensors)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_openflamingo_checkpoint(ours(), path)
    before = path.read_bytes()

    def disk_full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_openflamingo_checkpoint(ours(), path)
    assert path.read_bytes() == before


class Wrapped(nn.Module):
    """How PEFT wraps a language model: two modules around it, and its attributes looked up in it."""

    def __init__(self, language_model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": language_model})

    def get_base_model(self):
        return self.base_model["model"]

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.get_base_model(), name)


def test_a_wrapped_language_model_keeps_the_names_of_the_file(tmp_path):
    language_model = Wrapped(tiny_language_model("llama"))
    model, plain = ours(language_model=language_model), ours()
    save_openflamingo_checkpoint(model, tmp_path / "wrapped.pt")
    save_openflamingo_checkpoint(plain, tmp_path / "plain.pt")
    one, other = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("wrapped", "plain"))
    assert one.keys() == other.keys()
    source = theirs()
    load_openflamingo_checkpoint(model, saved(source.state_dict(), tmp_path))
    assert same(trained(model), trained(source))


# ---------------------------------------------------------------------------------------------------- what does not fit


def assert_refused(model, path, *sentences, **options):
    """With all of these in the message, and the model as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        load_openflamingo_checkpoint(model, path, **options)
    message = str(raised.value)
    assert message.startswith(str(path))
    for sentence in sentences:
        assert sentence in message, message
    assert same(snapshot(model), before)


@pytest.mark.parametrize(("theirs", "here"), [(4, 2), (2, 4), (1, 2), (3, 2)])
def test_blocks_at_other_layers_are_named_with_the_setting(theirs, here, tmp_path):
    save_openflamingo_checkpoint(ours(every=theirs), tmp_path / "other.pt")
    sentence = f"cross_attn_every_n_layers is {theirs} in the file and {here} in this model"
    assert_refused(ours(every=here), tmp_path / "other.pt", "does not fit this model, and nothing was loaded", sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_latents": 5}, "num_latents is 3 in the file and 5 in this model"),
        ({"num_latents": 5}, "perceiver.latents is [3, 12] in the file and [5, 12] in this model"),
        ({"resampler_depth": 3}, "resampler_depth is 2 in the file and 3 in this model"),
        (
            {"resampler_depth": 1},
            "it holds 11 tensors that this model does not have (perceiver.layers.1.0.norm_media.w",
        ),
        ({"max_num_frames": 4}, "it lacks 1 tensors of the resampler (perceiver.frame_embs)"),
        (
            {"language_model": tiny_language_model("llama", hidden_size=16)},
            "width of the language model is 32 in the file and 16 in this model",
        ),
        (
            {"language_model": tiny_language_model("llama", vocab_size=41)},
            "lang_encoder.model.embed_tokens.weight is [40, 32] in the file and [41, 32] in this model, a vocabulary "
            "of 40 tokens and one of 41: add the new tokens",
        ),
        ({"family": "gpt_neox"}, "it lacks 1 tensors of the input embedding (lang_encoder.gpt_neox.embed_in.weight)"),
        ({"family": "gpt_neox"}, "that this model does not have (lang_encoder.model.embed_tokens.weight)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_model_of_other_settings_is_told_which(ours_saved, options, sentence, tmp_path):
    model = ours(**({"num_latents": 3, "resampler_depth": 2} | options))
    assert_refused(model, saved(ours_saved[1], tmp_path), sentence)


@pytest.mark.parametrize("name", ["perceiver.norm.weight", "perceiver.latents"])
def test_settings_that_agree_or_cannot_be_told_are_not_blamed(ours_saved, name, tmp_path):
    model, tensors = ours_saved
    tensors.pop(name)
    with pytest.raises(ValueError) as raised:
        load_openflamingo_checkpoint(model, saved(tensors, tmp_path))
    assert str(raised.value).endswith(f"nothing was loaded: it lacks 1 tensors of the resampler ({name})")


@pytest.mark.parametrize(
    "part", ["perceiver.latents", "perceiver.layers.1.0.to_kv.weight", "3.attn_gate", "1.ff.3.weight"]
)
def test_no_resampler_or_gated_tensor_may_be_missing(ours_saved, part, tmp_path):
    """Not in any spelling: the later ones of a gated block end alike."""
    model, tensors = ours_saved
    kept = {name: tensor for name, tensor in tensors.items() if not matches(name, part)}
    assert len(kept) == len(tensors) - (1 if part.startswith("perceiver") else 2)
    lacking = part if part.startswith("perceiver") else f"gated_cross_attn_layers.{part}"
    assert_refused(model, saved(kept, tmp_path), "it lacks 1 tensors of the", f"({lacking})")


def matches(name, part):
    if part.startswith("perceiver"):
        return name == part
    layer, _, rest = part.partition(".")
    return re.search(rf"\.{layer}\.(gated_cross_attn_layer\.)?{re.escape(rest)}$", name) and "gated" in name


def test_a_missing_input_embedding_is_an_error_unless_it_was_frozen(ours_saved, tmp_path):
    model, tensors = ours_saved
    expected = {name: tensor.clone() for name, tensor in trained(model).items()}
    tensors.pop(EMBEDDING["llama"])
    path = saved(tensors, tmp_path)
    assert_refused(model, path, f"({EMBEDDING['llama']}), without which the new tokens' rows would stay random")
    nn.init.zeros_(model.perceiver.latents)
    report = load_openflamingo_checkpoint(model, path, frozen_embeddings=True)
    assert same(trained(model), expected)
    assert list(report.absent) == [EMBEDDING["llama"]]
    assert "are not those of the training" in str(report)


def test_frozen_embeddings_that_the_file_holds_are_loaded(ours_saved, tmp_path):
    model, tensors = ours_saved
    nn.init.zeros_(model.get_input_embeddings().weight)
    report = load_openflamingo_checkpoint(model, saved(tensors, tmp_path), frozen_embeddings=True)
    assert torch.equal(model.get_input_embeddings().weight, tensors[EMBEDDING["llama"]])
    assert not report.absent


def test_a_frozen_embedding_is_found_under_the_name_of_the_head_it_is_tied_to(tmp_path):
    """All that OpenFlamingo's filter leaves of MPT's frozen embedding: it keeps frozen tensors by their names."""
    source, model = theirs("mpt"), ours("mpt")
    source.lang_encoder.get_input_embeddings().requires_grad_(False)
    content = saved_by_open_flamingo(source)
    assert "lang_encoder.transformer.wte.weight" not in content
    load_openflamingo_checkpoint(model, saved(content, tmp_path))
    assert same(trained(model), trained(source))


def test_unknown_tensors_are_an_error(ours_saved, tmp_path):
    model, tensors = ours_saved
    tensors["lang_encoder.model.novelty"] = torch.ones(1)
    assert_refused(
        model, saved(tensors, tmp_path), "tensors that this model does not have (lang_encoder.model.novelty)"
    )


def test_buffers_that_old_versions_saved_are_not_needed(ours_saved, tmp_path):
    model, tensors = ours_saved
    names = ["lang_encoder.model.rotary_emb.inv_freq", "lang_encoder.model.layers.0.decoder_layer.self_attn.bias"]
    report = load_openflamingo_checkpoint(model, saved(tensors | dict.fromkeys(names, torch.ones(4)), tmp_path))
    assert sorted(report.ignored) == sorted(names)


def test_two_names_of_one_tensor_must_agree(ours_saved, tmp_path):
    model, tensors = ours_saved
    v1, v2 = (
        "lang_encoder.gated_cross_attn_layers.1.attn_gate",
        "lang_encoder.model.layers.1.gated_cross_attn_layer.attn_gate",
    )
    path = saved(tensors | {v1: tensors[v2].clone()}, tmp_path)
    load_openflamingo_checkpoint(model, path)
    path = saved(tensors | {v1: tensors[v2] + 1}, tmp_path)
    assert_refused(
        model, path, "holds gated_cross_attn_layers.1.attn_gate twice, under two names and with different values"
    )


def test_tied_embeddings_must_be_tied_in_the_file_too(tmp_path):
    model = ours("opt")
    save_openflamingo_checkpoint(model, tmp_path / "saved.pt")
    tensors = torch.load(tmp_path / "saved.pt", weights_only=True)
    tensors["lang_encoder.lm_head.weight"] = tensors["lang_encoder.lm_head.weight"] + 1
    assert_refused(
        model, saved(tensors, tmp_path), f"{EMBEDDING['opt']} and lang_encoder.lm_head.weight are one tensor"
    )


def test_a_model_without_weights_is_neither_filled_nor_saved(ours_saved, tmp_path):
    path = saved(ours_saved[1], tmp_path)
    model = ours(num_latents=3, resampler_depth=2).to("meta")
    with pytest.raises(ValueError, match="the model must be in memory, and these have no values"):
        load_openflamingo_checkpoint(model, path)
    with pytest.raises(ValueError, match="the model must be in memory"):
        save_openflamingo_checkpoint(model, tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()


# ---------------------------------------------------------------------------------------------------- what is no file


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_a_pickle_with_code_in_it_is_refused(ours_saved, tmp_path):
    canary = tmp_path / "canary"
    path = saved(ours_saved[1] | {"extra": Hostile(canary)}, tmp_path)
    assert_refused(ours_saved[0], path, "is refused: it holds Python objects", "could run any code")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<!DOCTYPE html><html>not found</html>", "it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer in place of the file itself"),
        (b"", "it is empty"),
        (b"PK\x03\x04 and nothing more", "is damaged or was not downloaded completely"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told_so(content, sentence, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    assert_refused(tiny_flamingo(), path, sentence)


def test_a_truncated_file_is_told_so(ours_saved, tmp_path):
    path = saved(ours_saved[1], tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_refused(ours_saved[0], path, "is damaged or was not downloaded completely")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "expected a dict, got a value of type list"),
        ({}, "expected a dict of tensors, got an empty dict"),
        ({"model_state_dict": 3}, "expected a dict of tensors, got a value of type int"),
        ({"perceiver.latents": 3.0}, "under 'perceiver.latents' it holds a value of type float"),
        ({"model": {"perceiver.latents": torch.ones(1)}}, "under 'model' it holds a value of type dict"),
        ({"perceiver.latents": torch.tensor(1.0)}, "perceiver.latents is [] in the file and [3, 12] in this model"),
    ],
)
def test_a_file_of_something_else_is_told_so(content, sentence, tmp_path):
    assert_refused(tiny_flamingo(), saved(content, tmp_path), sentence)


def test_no_file_and_a_folder_are_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.pt"):
        load_openflamingo_checkpoint(tiny_flamingo(), tmp_path / "missing.pt")
    assert_refused(tiny_flamingo(), tmp_path, "is a folder")


# ---------------------------------------------------------------------------------------------------- published sizes

# The language models that the published models were trained with. Rows of the embedding: len(tokenizer) with the new
# tokens, as `resize_token_embeddings` leaves them: 50277 + 3 (GPT-NeoX's tokenizer) and 32000 + 3 (LLaMA's).
MPT_1B = ("mosaic_gpt", {}, 50280)
LLAMA_7B = ("llama", {}, 32003)
MPT_7B = ("mpt", {"d_model": 4096, "n_layers": 32, "n_heads": 32}, 50280)
REDPAJAMA_3B = (
    "gpt_neox",
    {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
    50280,
)


@pytest.mark.parametrize(
    ("language_model", "every", "published"),
    [
        (MPT_1B, 1, 1_046_992_944),
        (LLAMA_7B, 2, 2_425_735_200),
        (LLAMA_7B, 4, 1_309_919_248),
        (MPT_7B, 4, 1_384_781_840),
        (REDPAJAMA_3B, 2, 1_089_480_736),
    ],
)
def test_the_trained_parameters_are_as_many_as_published(language_model, every, published):
    """What OpenFlamingo's factory prints for each of its models, all with CLIP ViT-L/14 (width 1024)."""
    family, sizes, vocabulary = language_model
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        lm.resize_token_embeddings(vocabulary, mean_resizing=False)
        model = Flamingo(nn.Identity(), lm, EOC, MEDIA, 1024, every)
    assert sum(tensor.numel() for tensor in trained(model).values()) == published


# ---------------------------------------------------------------------------------------------------- the command


def test_inspect_prints_what_a_model_needs(tmp_path, capsys):
    source = theirs("gpt_neox")
    for i, block in their_blocks(source).items():
        nn.init.constant_(block.attn_gate, 0.5 if i == "1" else -0.25)
    content = as_training_file(source)
    main(["inspect", str(saved(content, tmp_path))])
    printed = capsys.readouterr().out.splitlines()
    values = dict(re.split(r"  +", line, maxsplit=1) for line in printed)
    parameters = sum(tensor.numel() for tensor in trained(source).values())
    assert values == values | {
        "file": f"{tmp_path / 'checkpoint.pt'} (training, epoch 3), names of v2",
        "parameters": f"{parameters:,} ({parameters * 4 / 2**20:,.1f} MiB, float32)",
        "not needed": "0 tensors of frozen parts",
        "before layers": "1, 3",
        "number of gated blocks": "2",
        "cross_attn_every_n_layers": "2",
        "width of the language model": "32",
        "vis_dim": str(VIS_DIM),
        "num_latents": "64",
        "resampler_depth": "6",
        "tanh(attn_gate)": "min -0.2449  median +0.1086  max +0.4621",
        EMBEDDING["gpt_neox"]: "40 x 32",
    }
    assert len({len(line) - len(re.split(r"  +", line, maxsplit=1)[1]) for line in printed}) == 1, "aligned"


def test_inspect_counts_a_tensor_with_many_names_once(tmp_path, capsys):
    model = ours("opt")
    save_openflamingo_checkpoint(model, tmp_path / "checkpoint.pt")
    main(["inspect", str(tmp_path / "checkpoint.pt")])
    printed = capsys.readouterr().out
    assert f"{sum(tensor.numel() for tensor in trained(model).values()):,} (" in printed
    assert "(released), names of v1 and v2" in printed


def test_inspect_says_what_cannot_be_told(tmp_path, capsys):
    """Blocks before layers 1 and 2, no latents, no gates: a file with holes is looked at all the same."""
    names = ["lang_encoder.gated_cross_attn_layers.1.ff.0.bias", "lang_encoder.gated_cross_attn_layers.2.ff.0.bias"]
    main(["inspect", str(saved(dict.fromkeys(names, torch.ones(1)), tmp_path))])
    printed = capsys.readouterr().out
    for setting in ("cross_attn_every_n_layers", "width of the language model", "vis_dim", "num_latents"):
        assert re.search(rf"^{setting} +cannot be told$", printed, re.MULTILINE)
    assert "tanh" not in printed


def test_inspect_of_a_bad_file_ends_with_a_sentence(tmp_path, capsys, monkeypatch):
    """As typed: exit code 2, and no traceback."""
    monkeypatch.setattr(sys, "argv", ["checkpoints", "inspect", str(tmp_path / "missing.pt")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(checkpoints.__file__, run_name="__main__")
    assert end.value.code == 2
    assert f"error: there is no file {tmp_path / 'missing.pt'}" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", "--help"])
    assert end.value.code == 0
    assert "the settings that a model needs" in " ".join(capsys.readouterr().out.split())
