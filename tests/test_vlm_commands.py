"""The package's commands, run on models that they make themselves."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flamingo_vlm import Flamingo, benchmark, convert, generate, tiny_model
from flamingo_vlm.checkpoints import save_openflamingo_checkpoint

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["benchmark", "checkpoints", "convert", "generate", "tiny_model"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.main([str(folder)])
    return folder


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def said(capsys):
    return capsys.readouterr().out.splitlines()


def test_tiny_model_says_the_same_twice_and_reads_the_image(tiny, image, tmp_path, capsys):
    prompt = ["--model", str(tiny), "--prompt", "<image>An image of"]
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "blue.png")
    texts = []
    for name in (image, image, tmp_path / "blue.png"):
        generate.main([*prompt, "--image", str(name), "--device", "cpu"])
        text, summary = said(capsys)
        assert re.fullmatch(r"\[\d+ tokens, 1 images, [\d.]+ s on cpu\]", summary)
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options", [["--beams", "3"], ["--temperature", "0.7", "--seed", "3"], ["--dtype", "bfloat16"]]
)
def test_ways_to_generate(tiny, image, options, capsys):
    arguments = ["--model", str(tiny), "--prompt", "<image>a", "--image", str(image), "--max-new-tokens", "4"]
    generate.main([*arguments, *options])
    assert said(capsys)[-1].startswith("[")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "<image>a"], "1 <image> tokens, but 0 images"),
        (["--prompt", "<image>a", "--image", "missing.png"], "missing.png cannot be read as an image"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a", "--device", "tpu"], "--device tpu cannot be used here"),
        (["--prompt", "a", "--max-new-tokens", "0"], "expected a whole number, 1 or more"),
        (["--prompt", "a", "--model", "nowhere"], "nowhere is no folder of a saved model"),
    ],
)
def test_a_slip_is_told_in_a_sentence(tiny, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", str(tiny), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_checkpoint_becomes_a_folder_that_generates(tmp_path, image, capsys):
    """`convert` on local parts: what it saves is the tower, the language model and the checkpoint's weights."""
    model, processor = tiny_model.tiny_model(seed=1)
    tokens = len(processor.tokenizer)
    model.vision_encoder.model.save_pretrained(tmp_path / "clip")
    processor.image_processor.save_pretrained(tmp_path / "clip")
    with torch.no_grad():  # the checkpoint's own word embeddings must not come from the language model's folder
        weight = model.get_input_embeddings().weight
        trained = weight.clone()
        model.lang_encoder.config.pad_token_id = 0
        model.lang_encoder.resize_token_embeddings(tokens - 3, mean_resizing=False)
        model.lang_encoder.save_pretrained(tmp_path / "lm")
        tiny_model.byte_tokenizer().save_pretrained(tmp_path / "lm")
        model.lang_encoder.resize_token_embeddings(tokens, mean_resizing=False)
        model.get_input_embeddings().weight.copy_(trained)
    full = Flamingo(
        model.vision_encoder, model.lang_encoder, model.config.eoc_token_id, model.config.media_token_id, 64, 2
    )
    save_openflamingo_checkpoint(full, tmp_path / "checkpoint.pt")
    parts = [
        "--tower",
        tmp_path / "clip",
        "--lm",
        tmp_path / "lm",
        "--every",
        2,
        "--checkpoint",
        tmp_path / "checkpoint.pt",
    ]
    convert.main([*map(str, ["mine", tmp_path / "mine", *parts]), "--local"])
    assert "loaded" in capsys.readouterr().out
    loaded = Flamingo.from_pretrained(tmp_path / "mine")
    for name, parameter in full.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    generate.main(["--model", str(tmp_path / "mine"), "--prompt", "<image>a", "--image", str(image)])


def test_unknown_releases_are_errors(capsys):
    with pytest.raises(SystemExit):
        convert.main(["OpenFlamingo-99B", "folder"])
    assert "OpenFlamingo-3B-vitl-mpt1b" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as stop:
        import_module(f"flamingo_vlm.{command}").main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(f"usage: python -m flamingo_vlm.{command}") and len(out) > 250


def test_a_command_prints_nothing_beside_its_output():
    """In a process of its own: no warnings of libraries, nor of Python about modules that are imported twice."""
    run = [sys.executable, "-m", "flamingo_vlm.checkpoints", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ") and not done.stderr


# ---------------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture
def small_benchmark(monkeypatch):
    """Of two narrow layers, for its times are not looked at."""
    config = benchmark.OPTConfig

    def small(**options):
        sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
        return config(**options, **sizes, num_hidden_layers=2)

    monkeypatch.setattr(benchmark, "OPTConfig", small)


@pytest.mark.parametrize("re_projecting", [False, True])
@pytest.mark.parametrize("images", [1, 5])
def test_operations_are_those_that_torch_counts(small_benchmark, images, re_projecting):
    """Of one decoding step: the counter's difference between generating three tokens and two."""
    device = torch.device("cpu")
    model = benchmark.opt_125m(device, torch.float32)
    prompt = benchmark.prompt_of(1, images, images, device, torch.float32)
    media = model.encode_media(media_features=prompt["media_features"])

    def counted(new_tokens):
        # the counter knows no fused attention on a CPU, but the products that it is made of
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if re_projecting:
                with benchmark.re_projecting(model, media):
                    benchmark.timed(model, prompt, new_tokens, device)
            else:
                benchmark.timed(model, prompt, new_tokens, device)
        return counter.get_total_flops()

    step = counted(3) - counted(2)
    work = benchmark.work_of_a_token(model, 1, prompt["lang_x"].shape[1] + 2, images, re_projecting)
    assert work.flops == pytest.approx(step, rel=0.01)


def test_the_benchmark_prints_its_table_and_writes_its_record(small_benchmark, tmp_path, capsys):
    path = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    benchmark.main(["--shots", "0", "2", "--rounds", "1", "--new-tokens", "3", "--device", "cpu", "--json", str(path)])
    out = capsys.readouterr().out
    assert "re-projecting" in out and path.exists()
    assert "Behind the same 35 tokens of text" in out and " with 3; of neighbouring turns" in out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("arguments", [["--shots", "-1"], ["--new-tokens", "1"], ["--device", "tpu"]])
def test_the_benchmark_refuses_what_it_cannot_time(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err
