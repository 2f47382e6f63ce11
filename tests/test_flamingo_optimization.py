"""The optimization script runs from end to end, says in JSON all it prints, and answers bad input with one sentence."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import flamingo_optimization as optimization
from experiments import combined, speculation
from experiments.lab import exams_of
from flamingo_optimization import EXPERIMENTS, main, summary
from readme_tables import IDEAS, optimizations_block
from reporting import read_json

ROOT = Path(__file__).parent.parent
every_configuration = combined.configurations
SCENES = 20  # the fewest


def few_configurations(leave_out, compiled):
    """Two parts alone, all together, and with the cache."""
    rows = every_configuration(leave_out, compiled)
    some = (combined.BASELINE, f"only {combined.HALF}", f"only {combined.DRAFT}", combined.ALL, "all four, warm cache")
    return {name: rows[name] for name in some}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What the script printed, its folder of plots, and its JSON: all seven, on few scenes, few words an answer, each
    thing timed three times."""
    folder = tmp_path_factory.mktemp("run")
    prepare = optimization.prepare
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(optimization, "prepare", lambda arguments: replace(prepare(arguments), seconds=0.0))
        monkeypatch.setattr(speculation, "NEW_TOKENS", 6)
        monkeypatch.setattr(combined, "NEW_TOKENS", 6)
        monkeypatch.setattr(combined, "configurations", few_configurations)
        printed = []
        monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        arguments = ["--quick", "--device", "cpu", "--preset", "shapes", "--scenes", str(SCENES)]
        main([*arguments, "--json", str(folder / "results.json"), "--plot", str(folder / "plots")])
    return "\n".join(printed), folder / "plots", read_json(folder / "results.json")


def test_the_optimizations_import_from_the_script():
    from flamingo_optimization import (
        AdaptivePerceiverResampler,
        OptimizedFlamingo,
        SparseCrossAttention,
        VisualTokenCache,
    )

    for each in (AdaptivePerceiverResampler, OptimizedFlamingo, SparseCrossAttention, VisualTokenCache):
        assert isinstance(each, type)


def test_all_seven_are_printed_and_recorded(whole_run):
    printed, _, results = whole_run
    for number, (name, _) in EXPERIMENTS.items():
        assert f"\n{number}. " in "\n" + printed, f"experiment {number} has its title"
        assert results["experiments"][name]["points"], name
        assert results["experiments"][name]["of"], f"{name} says what its speedups are of"
    assert [row["optimization"] for row in results["summary"]] == [name for name, _ in EXPERIMENTS.values()]
    assert "Summary" in printed


def test_every_point_was_measured(whole_run):
    for name, result in whole_run[2]["experiments"].items():
        for each in result["points"]:
            assert set(each) == {"setting", "speedup", "quality", "bytes"}, name
            assert each["speedup"] > 0
            assert each["quality"] is None or 0 <= each["quality"] <= 1


def test_drafts_say_the_plain_models_words(whole_run):
    rows = [row for row in whole_run[2]["experiments"]["speculative decoding"]["rows"] if "same" in row]
    assert len(rows) > 5
    assert {row["same"] for row in rows} == {1.0}


def test_the_cache_changes_no_bit(whole_run):
    rows = whole_run[2]["experiments"]["visual token cache"]["rates"]
    assert all(row["identical"] for row in rows if row.get("hit rate") is not None)


def test_the_summary_picks_the_fastest_within_one_point():
    points = [
        {"setting": "exact", "speedup": 1.5, "quality": None, "bytes": None},
        {"setting": "near", "speedup": 2.0, "quality": 0.981, "bytes": None},
        {"setting": "far", "speedup": 9.0, "quality": 0.97, "bytes": None},
    ]
    rows = summary({"a": {"points": points}, "b": {"points": points[2:]}}, 0.99)
    picked = {name: row for name, row in zip("ab", rows, strict=True)}
    assert (picked["a"]["setting"], picked["a"]["within"]) == ("near", True)
    assert (picked["b"]["setting"], picked["b"]["within"]) == ("far", False)


def test_each_part_stands_alone_is_added_and_is_left_out():
    rows = every_configuration(leave_out=True, compiled=True)
    of = {name: set(parts) for name, (_, parts) in rows.items()}
    everything = set(combined.PARTS)
    for part in everything:
        assert {part} in of.values()
        assert everything - {part} in of.values()
    assert of[combined.BASELINE] == set()
    assert of[combined.ALL] == everything
    assert all(more - less for less, more in zip(list(of.values())[4:6], list(of.values())[5:7], strict=True))


def test_the_readme_shows_every_optimization(whole_run):
    block = optimizations_block(whole_run[2])
    assert list(IDEAS) == [name for name, _ in EXPERIMENTS.values()]
    for _, module in IDEAS.values():
        assert f"`{module}.py`" in block
        assert (ROOT / f"{module}.py").exists()


def test_the_plot_is_a_picture(whole_run):
    assert (whole_run[1] / "optimizations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "8"], "invalid choice: '8'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
        (["--data", "cifar10"], "train it with python train_mini_flamingo.py --data cifar10"),
        (["--dtype", "float16", "--device", "cpu"], "use bfloat16, or a GPU"),
        (["--scenes", "19"], "--scenes must be at least 20"),
        (["--threads", "0"], "expected a whole number, 1 or more"),
    ],
)
def test_a_slip_is_answered_in_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_compiling_needs_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit):
        main(["--compile"])
    assert "there is no no-such-compiler: install one or leave it out" in capsys.readouterr().err


def test_missing_companions_are_named(tmp_path, monkeypatch, capsys):
    for name in ("model", "token_reader"):
        (tmp_path / f"{name}.safetensors").symlink_to(ROOT / f"data/mini_flamingo/{name}.safetensors")
    monkeypatch.setitem(optimization.FOLDERS, "shapes", tmp_path)
    monkeypatch.setattr(optimization, "exams_of", lambda data, root, count: exams_of(data, root, 2))
    with pytest.raises(SystemExit):
        main(["--quick", "--only", "6"])
    assert "is missing: python train_companions.py makes it" in capsys.readouterr().err


def test_help_teaches():
    said = subprocess.run(
        [sys.executable, "flamingo_optimization.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name, _ in EXPERIMENTS.values():
        assert name in said
    for option in ("--only", "--device", "--dtype", "--preset", "--quick", "--data", "--compile", "--json", "--plot"):
        assert option in said
