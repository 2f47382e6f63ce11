"""What the README says is so: its snippets run, its commands exist, its tables are those of the recorded runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import readme_tables
from reporting import stale_blocks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet, capsys):
    scope = {}
    exec(snippet, scope)
    out = capsys.readouterr().out
    if "text" in scope:
        assert scope["text"].shape == (2, 10, 768) and scope["visual_tokens"].shape == (2, 3, 64, 512)
    elif "processor" in scope:
        assert "An image of a cat.An image of" in out
    else:
        assert "red circle" in out


def test_there_are_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (\w+)", README)) - {"are"}))
def test_make_targets_exist(target):
    dry_run = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry_run.returncode == 0, dry_run.stderr


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (\w+\.py)", README))))
def test_named_scripts_explain_themselves(script):
    help_text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in help_text.stdout and len(help_text.stdout) > 300


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m (flamingo_vlm\.\w+)", README))))
def test_named_commands_exist(command):
    assert (ROOT / f"{command.replace('.', '/')}.py").exists()


def test_every_file_in_the_tree_exists():
    tree = README.split("## What is where")[1].split("```")[1]
    places = (ROOT, ROOT / "flamingo_vlm")
    names = re.findall(r"\b(\w+\.py)\b", tree)
    missing = [name for name in names if not any((place / name).exists() for place in places)]
    assert not missing


def test_every_module_is_in_the_tree():
    tree = README.split("## What is where")[1].split("```")[1]
    modules = [*ROOT.glob("*.py"), *(ROOT / "flamingo_vlm").glob("[!_]*.py")]
    assert not [path.name for path in modules if path.name not in tree]


def test_tables_are_those_of_the_recorded_runs():
    assert stale_blocks(ROOT / "README.md", readme_tables.blocks()) == [], "run python readme_tables.py"
