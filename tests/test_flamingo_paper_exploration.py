"""The exploration script runs from end to end, says in JSON all it prints, and answers bad input with one sentence."""

import json
import shutil

import pytest
import torch

import exploration_plots
import flamingo_paper_exploration as exploration
import mini_flamingo_evaluation as evaluation
from benchmarking import compare
from command_line import ROOT
from flamingo_paper_exploration import main, with_gates_scaled
from interleaved_text import IMAGE, WordTokenizer
from mini_flamingo_checkpoint import save_mini_flamingo
from reporting import read_json
from sample_images import FOLDER, load_samples
from shapes_texts import VOCABULARY
from tiny_flamingo import TINY, random_images, set_gates, tiny_flamingo
from tiny_shapes import talkative_flamingo

PNG = b"\x89PNG\r\n\x1a\n"


def make_quick(monkeypatch):
    """Three scenes an exam, four words an answer, each thing timed once."""
    held_out_exams, question_exam = evaluation.held_out_exams, evaluation.question_exam
    monkeypatch.setattr(evaluation, "held_out_exams", lambda count: held_out_exams(3))
    monkeypatch.setattr(evaluation, "question_exam", lambda kind, count: question_exam(kind, 3))
    monkeypatch.setattr(evaluation, "MAX_WORDS", 4)

    def compare_once(functions, *, device, min_seconds, memory=True):
        return compare(functions, device=device, warmup=0, min_runs=1, min_seconds=0, memory=memory)

    monkeypatch.setattr(exploration, "compare", compare_once)
    monkeypatch.setattr(exploration, "matmul_ceiling", lambda device: 1e11)


@pytest.fixture
def quick(monkeypatch):
    """And both forms of the first demonstration small."""
    make_quick(monkeypatch)
    monkeypatch.setattr(exploration, "preset", lambda name: TINY)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_mini_flamingo(folder, talkative_flamingo(gate=0.5), VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def whole_run(model_folder, tmp_path_factory):
    """What the script printed, the folder of its plots, and its JSON."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_quick(monkeypatch)
        printed = []
        monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        arguments = ["--quick", "--device", "cpu", "--model", str(model_folder)]
        main([*arguments, "--json", str(folder / "results.json"), "--plot", str(folder / "plots")])
    return "\n".join(printed), folder / "plots", read_json(folder / "results.json")


# ---------------------------------------------------------------------------------------------------- the whole run


def test_the_layers_import_from_the_script():
    from flamingo_paper_exploration import GatedCrossAttentionBlock, MiniFlamingo, PerceiverResampler

    visual_tokens = PerceiverResampler(dim=32, depth=1)(torch.randn(2, 3, 9, 32))
    block = GatedCrossAttentionBlock(dim=24, dim_visual=32, gate_init=0.5)
    assert block(torch.randn(2, 6, 24), visual_tokens, torch.arange(6).expand(2, 6) // 2).shape == (2, 6, 24)
    assert isinstance(tiny_flamingo(), MiniFlamingo)


def test_all_three_demonstrations_are_printed(whole_run):
    printed, *_ = whole_run
    titles = ["1. Perceiver Resampler against", "2. Gates: closed", "3. Mini Flamingo: parameters"]
    assert [printed.count(title) for title in titles] == [1, 1, 1]
    assert sorted(titles, key=printed.index) == titles
    for sample in read_json(FOLDER / "samples.json"):
        for text in (", ".join(sample["images"]), sample["prompt"]):
            assert text in printed


def test_the_json_is_complete(whole_run):
    results = whole_run[2]
    assert results.keys() == {"environment", "arguments", "seed", "resampler", "gates", "model"}
    assert {"device", "torch", "commit", "threads", "cpu"} <= results["environment"].keys()
    assert results["model"].keys() == {"parameters", "times", "samples", "accuracy"}
    for sample, listed in zip(results["model"]["samples"], read_json(FOLDER / "samples.json"), strict=True):
        assert {key: sample[key] for key in listed} == listed
        assert sample["right"] == (sample["said"] == sample["truth"])
    accuracy = results["model"]["accuracy"]
    assert [row["exam"] for row in accuracy] == list(evaluation.held_out_exams(1))
    assert all(0 <= row[way] <= 1 for row in accuracy for way in ("images", "blank", "shuffled"))
    assert all(row["seconds"] > 0 for row in results["model"]["times"])
    total = results["model"]["parameters"][-1]
    assert total["part"] == "total" and total["total"] == total["frozen"] + total["trained"]
    assert total["total"] == sum(p.numel() for p in talkative_flamingo().parameters())


def test_the_json_holds_every_argument(whole_run, model_folder):
    """Paths inside the repository from its root, of those outside only the name."""
    plots, arguments = whole_run[1], whole_run[2]["arguments"]
    assert arguments == {
        "device": "cpu",
        "threads": None,
        "quick": True,
        "only": ["resampler", "gates", "model"],
        "model": model_folder.name,
        "images": "data/flamingo_test_images",
        "json": "results.json",
        "plot": plots.name,
    }


def test_no_path_of_this_machine_gets_into_the_json(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--quick", "--device", "cpu", "--only", "resampler", "--json", "new/results.json"])
    results = read_json(tmp_path / "new" / "results.json")
    assert results["arguments"]["model"] == "data/mini_flamingo"
    assert results["arguments"]["json"] == "new/results.json" and results["arguments"]["plot"] is None
    text = json.dumps(results)
    for private in (ROOT, tmp_path):
        assert str(private) not in text


def test_the_first_demonstration_is_the_same_each_run(quick, monkeypatch):
    """The same random layers read the same features, whatever was drawn before."""
    outputs, time = [], exploration.compare

    def listen(functions, **settings):
        outputs.append([fn() for fn in functions.values()])
        return time(functions, **settings)

    monkeypatch.setattr(exploration, "compare", listen)
    for draws in (0, 5):
        torch.rand(draws)
        exploration.demonstrate_resampler(torch.device("cpu"), quick=True)
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


def test_the_resampler_s_work_is_stated_as_it_is(whole_run):
    """64 latents against 576 patches and themselves; self-attention scores all patches against all."""
    result = whole_run[2]["resampler"]
    direct, resampler = result["rows"]
    assert (direct["form"], direct["tokens"], direct["scores"]) == ("self-attention", 576, "576 x 576")
    assert (resampler["form"], resampler["tokens"], resampler["scores"]) == ("resampler", 64, "64 x 640")
    assert (direct["compression"], resampler["compression"]) == (1, 9)
    assert direct["speedup"] == 1
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(direct["seconds"] / row["seconds"])
        assert row["peak_bytes"] > 0
    inner = width = 512  # 8 heads, 64 wide; each feed-forward is 4 times as wide
    per_token = 2 * 2 * width * 4 * width
    expected = 4 * (576 * (2 * 4 * width * inner + per_token) + 4 * 576 * 576 * inner)
    assert direct["flops"] == expected
    projections = 64 * 2 * 2 * width * inner + 640 * 2 * 2 * width * inner
    assert resampler["flops"] == 4 * (projections + 64 * per_token + 4 * 64 * 640 * inner)


def test_a_batch_is_counted_as_its_images(quick):
    """FLOPs are of one image, times of the batch."""
    rows = exploration.demonstrate_resampler(torch.device("cpu"), quick=False)["rows"]
    assert [(row["form"], row["batch"]) for row in rows] == [
        ("self-attention", 1), ("resampler", 1), ("self-attention", 8), ("resampler", 8),
    ]  # fmt: skip
    assert rows[0]["flops"] == rows[2]["flops"] and rows[1]["flops"] == rows[3]["flops"]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["of_ceiling"] == pytest.approx(row["batch"] * row["flops"] / row["seconds"] / 1e11)
    assert [row["speedup"] == 1 for row in rows] == [True, False, True, False]


def test_closed_gates_are_the_language_model_and_open_ones_are_not(whole_run):
    opening = whole_run[2]["gates"]["opening"]
    assert [row["factor"] for row in opening] == [0, 0.25, 0.5, 0.75, 1]
    assert [row["identical"] for row in opening] == [True, False, False, False, False]
    changes = [row["change"] for row in opening]
    assert changes[0] == 0 and changes == sorted(changes) and len(set(changes)) == 5
    trained = whole_run[2]["gates"]["trained"]
    assert [row["layer"] for row in trained] == [0, 1, 2]
    for row in trained:
        assert row["attention"] == row["feed_forward"] == pytest.approx(torch.tensor(0.5).tanh().item())


def test_plots_are_written(whole_run):
    printed, plots, _ = whole_run
    assert sorted(path.name for path in plots.iterdir()) == ["captions.png", "gates.png", "latents.png"]
    for path in plots.iterdir():
        assert path.read_bytes().startswith(PNG)
        assert f"saved {path}" in printed


@pytest.mark.parametrize(("only", "others"), [("resampler", "23"), ("gates", "13"), ("model", "12")])
def test_only_runs_what_is_named(quick, model_folder, tmp_path, capsys, only, others):
    """And without --json and --plot nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    model = tmp_path / "nowhere" if only == "resampler" else model_folder  # the resampler needs no trained model
    main(["--quick", "--device", "cpu", "--only", only, "--model", str(model)])
    lines = capsys.readouterr().out.splitlines()
    starts = {line[0] for line in lines if line[:2] in ("1.", "2.", "3.")}
    assert starts == set("123") - set(others)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_number_of_threads_is_set(quick, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    main(["--quick", "--device", "cpu", "--only", "resampler", "--threads", "3"])
    assert asked == [3]


# ---------------------------------------------------------------------------------------------------- demonstrations


def test_scaled_gates_are_a_copy_in_proportion():
    """Of a model whose gates are all different, and some negative."""
    model = talkative_flamingo()
    with torch.no_grad():
        gates = [gate for block in model.gated_layers.values() for gate in (block.attn_gate, block.ff_gate)]
        for i, gate in enumerate(gates):
            gate.fill_((-1) ** i * 0.3 * (i + 1))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for factor in (0.0, 0.25, 1.0):
        scaled = dict(with_gates_scaled(model, factor).named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), "the model itself stays as it is"
            if name.endswith("gate"):
                torch.testing.assert_close(scaled[name].tanh(), factor * parameter.tanh())
            else:
                assert torch.equal(scaled[name], parameter)


@torch.no_grad()
def test_gates_scaled_to_nothing_leave_the_language_model_exactly():
    """Bit for bit, with images before, between and behind the text, padding, and whatever the media hold."""
    model = set_gates(tiny_flamingo(), 1.7)
    ids = torch.tensor([[5, 1, 6, 7, 1, 8], [0, 0, 1, 6, 7, 8]])
    images, words = random_images(2, 2), ids != 0
    text_only = model.language_model(ids, words)
    assert torch.equal(with_gates_scaled(model, 0.0)(ids, images, attention_mask=words), text_only)
    assert not torch.allclose(with_gates_scaled(model, 0.1)(ids, images, attention_mask=words), text_only)
    assert torch.equal(model(ids, images), model(ids, images)) and not torch.equal(model(ids, images), text_only)


def test_gates_are_judged_by_the_accuracy_of_each_opening(quick, monkeypatch):
    """`right` is what the scaled model answers, not the trained one."""
    heard = []

    def listen(model, tokenizer, exam):
        heard.append(model.gated_layers["0"].attn_gate.tanh().item())
        return [exam.examples[0].text] * len(exam.examples)

    monkeypatch.setattr(evaluation, "answers", listen)
    model = talkative_flamingo(gate=1.0)
    exploration.demonstrate_gates(model, WordTokenizer(VOCABULARY), 3)
    full = torch.tensor(1.0).tanh().item()
    assert heard == pytest.approx([0, full / 4, full / 2, 3 * full / 4, full], abs=1e-6)


@torch.no_grad()
def test_latents_look_where_their_attention_lies():
    """Against the softmax written out, head by head; what is missing to 1 the latents look at themselves."""
    model = talkative_flamingo()
    image = load_samples(FOLDER, 80)[0]["pixels"][0]
    maps = exploration.latent_attention(model, image)
    assert maps.shape == (64, 10, 10)
    attention = model.resampler.layers[0][0]
    patches = attention.norm_media(model.vision_encoder(image[None])[0])
    latents = attention.norm_latents(model.resampler.latents)
    q, k = attention.to_q(latents), attention.to_kv(torch.cat((patches, latents)))[:, : attention.inner]
    expected = torch.zeros(64, 100)
    width = attention.inner // attention.heads
    for head in range(attention.heads):
        part = slice(head * width, (head + 1) * width)
        expected += (q[:, part] @ k[:, part].T / width**0.5).softmax(-1)[:, :100] / attention.heads
    torch.testing.assert_close(maps.flatten(1), expected)
    assert (maps.sum((1, 2)) < 1).all()


def test_the_controls_are_those_they_are_called(quick, monkeypatch):
    """Every exam is sat with its own images, with grey ones and with those of the prompt before."""
    own = {str(exam.examples): exam.images for exam in evaluation.held_out_exams(3).values()}

    def listen(model, tokenizer, exam):
        images = own[str(exam.examples)]
        return (
            "images" if torch.equal(exam.images, images)
            else "blank" if (exam.images == exam.images.flatten()[0]).all()
            else "shuffled" if torch.equal(exam.images, torch.cat((images[-1:], images[:-1])))
            else "?"
        )  # fmt: skip

    monkeypatch.setattr(evaluation, "answers", listen)
    monkeypatch.setattr(evaluation, "exact_match", lambda said, exam: said)
    rows = exploration.held_out_accuracy(talkative_flamingo(), WordTokenizer(VOCABULARY), 3)
    assert len(rows) == len(own)
    assert all(row[way] == way for row in rows for way in ("images", "blank", "shuffled"))


@torch.no_grad()
def test_plotted_latents_are_the_most_focused(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(exploration_plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    maps = torch.ones(6, 4, 4)
    maps[[1, 4], 2, 3] = torch.tensor([5.0, 9.0])  # these two look at one place more than at others
    exploration_plots.plot_latents(random_images(size=16), maps, tmp_path / "latents.png", count=2)
    titles = [ax.get_title() for ax in drawn[0].axes if ax.get_title()]
    assert titles == ["image", "latent 1", "latent 4"]


def test_samples_are_answered_from_their_own_images(quick):
    """As `generate` answers each of them."""
    model, tokenizer = talkative_flamingo(), WordTokenizer(VOCABULARY)
    samples = load_samples(FOLDER, 80)[3:5]
    result = exploration.demonstrate_model(model, tokenizer, samples, quick=True)
    for shown, sample in zip(result["samples"], samples, strict=True):
        ids = model.generate(tokenizer.pad_left([sample["prompt"]]), sample["pixels"][None])[0]
        words = [tokenizer.words[i] for i in ids if i not in (tokenizer.eoc_id, tokenizer.pad_id)]
        assert shown["said"] == " ".join(words)


def test_times_are_of_the_first_sample_with_one_image(quick, monkeypatch):
    heard = []
    monkeypatch.setattr(exploration, "time_model", lambda model, tokenizer, sample: heard.append(sample))
    monkeypatch.setattr(exploration, "held_out_accuracy", lambda *_: [])
    samples = load_samples(FOLDER, 80)
    assert len(samples[-1]["images"]) == 5
    order = [samples[-1], samples[4], samples[0]]
    exploration.demonstrate_model(talkative_flamingo(), WordTokenizer(VOCABULARY), order, quick=True)
    assert len(heard) == 1 and heard[0] is samples[4]


@pytest.mark.parametrize("words", [1, 95, 96, 300])
def test_a_prompt_of_any_length_is_timed(quick, words):
    sample = load_samples(FOLDER, 80)[0] | {"prompt": " ".join([IMAGE, *["list"] * (words - 1)])}
    rows = exploration.time_model(talkative_flamingo(), WordTokenizer(VOCABULARY), sample)
    assert [row["part"] for row in rows][2] == f"prompt of {words} words"
    assert all(row["seconds"] > 0 and row["runs"] for row in rows)


# ---------------------------------------------------------------------------------------------------- errors


def refused(capsys, *arguments):
    """The sentence with which the script ends, in the form of argparse's own, and nothing else."""
    with pytest.raises(SystemExit) as stopped:
        main(["--quick", *arguments])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta", "", "cpu cpu"])
def test_a_device_that_is_not_there_is_one_sentence(capsys, model_folder, device):
    line = refused(capsys, "--device", device, "--only", "gates", "--model", str(model_folder))
    assert f"--device {device} cannot be used here" in line and "use cpu" in line


@pytest.mark.parametrize("only", ["gates", "model"])
def test_a_missing_model_is_one_sentence(capsys, tmp_path, only):
    line = refused(capsys, "--device", "cpu", "--only", only, "--model", str(tmp_path / "nothing"))
    assert f"no trained Mini Flamingo in {tmp_path / 'nothing'}: train one with python train_mini_flamingo.py" in line


def test_damaged_weights_are_one_sentence(capsys, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"half a file")
    line = refused(capsys, "--device", "cpu", "--only", "model", "--model", str(folder))
    assert "model.safetensors is damaged" in line


@pytest.mark.parametrize("content", [None, b"", b"no image", (FOLDER / "scene-3.png").read_bytes()[:900]])
def test_an_unreadable_image_is_one_sentence(capsys, model_folder, tmp_path, content):
    images = shutil.copytree(FOLDER, tmp_path / "images")
    (images / "scene-3.png").unlink()
    if content is not None:
        (images / "scene-3.png").write_bytes(content)
    arguments = ["--device", "cpu", "--only", "model", "--model", str(model_folder), "--images", str(images)]
    assert "cannot read the image" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(f"{IMAGE} {IMAGE} list :", "image number 2"), (f"{IMAGE} who are you ?", "'who' is not in the vocabulary")],
)
def test_a_prompt_that_does_not_fit_is_one_sentence(quick, capsys, model_folder, tmp_path, prompt, message):
    images = shutil.copytree(FOLDER, tmp_path / "images")
    entry = {"images": ["scene-1.png"], "prompt": prompt, "truth": ""}
    (images / "samples.json").write_text(json.dumps([entry]))
    arguments = ["--device", "cpu", "--only", "model", "--model", str(model_folder), "--images", str(images)]
    assert message in refused(capsys, *arguments)


def test_samples_without_a_single_image_are_one_sentence(quick, capsys, model_folder, tmp_path):
    images = shutil.copytree(FOLDER, tmp_path / "images")
    several = [sample for sample in read_json(images / "samples.json") if len(sample["images"]) > 1]
    (images / "samples.json").write_text(json.dumps(several))
    arguments = ["--device", "cpu", "--only", "model", "--model", str(model_folder), "--images", str(images)]
    assert "no sample has exactly one image" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--json", "a-file/results.json"), ("--json", "a-folder"), ("--json", "/proc/nowhere/results.json"),
        ("--plot", "a-file"), ("--plot", "a-file/plots"), ("--plot", "/proc/nowhere"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch, tmp_path, option, place):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "a-folder").mkdir()
    monkeypatch.setattr(exploration, "demonstrate_resampler", lambda *_: pytest.fail("the work had begun"))
    line = refused(capsys, "--device", "cpu", option, str(tmp_path / place))
    assert f"{option} {tmp_path / place} " in line


@pytest.mark.parametrize("threads", ["0", "-2", "1.5", "all"])
def test_a_number_of_threads_that_is_none_is_refused(capsys, threads):
    line = refused(capsys, f"--threads={threads}")
    assert f"argument --threads: expected a whole number, 1 or more; got '{threads}'" in line


def test_an_unknown_demonstration_is_refused(capsys):
    assert "invalid choice: 'attention'" in refused(capsys, "--only", "attention")
