"""Who may import whom, and what importing does: nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# DESIGN section 2, top to bottom: a module imports only modules above it. Write a new module in at its place.
LAYERS = ["media_masks", "attention_layers", "feedforward"]
MODELS = [
    "perceiver_resampler",
    "gated_cross_attention",
    "vision_encoder",
    "language_model",
    "token_sampling",
    "conditioned_language_model",
    "mini_flamingo",
    "interleaved_text",
    "mini_flamingo_checkpoint",
    "shapes_world",
    "shapes_texts",
    "cifar_utils",
    "mini_flamingo_evaluation",
    "token_reader",
    "training_loop",
    "shapes_curriculum",
    "mosaic_curriculum",
]
OPTIMIZATIONS = [
    "content_keys",
    "visual_token_cache",
    "confidence_head",
    "reduced_tokens",
    "sparse_cross_attention",
    "reduced_precision",
    "adaptive_resampler",
    "speculative_decoding",
    "optimized_flamingo",
]
HELPERS = ["benchmarking", "reporting", "command_line"]
PARTS_OF_SCRIPTS = ["sample_images", "exploration_plots", "companions", "experiments", "optimization_plots"]
SCRIPTS = [
    "train_mini_flamingo",
    "train_companions",
    "flamingo_paper_exploration",
    "flamingo_optimization",
    "compare_peers",
    "readme_tables",
]
ORDER = [*LAYERS, *MODELS, *OPTIMIZATIONS, *HELPERS, *PARTS_OF_SCRIPTS, *SCRIPTS]

FOR_PACKAGE = {*LAYERS, "perceiver_resampler", "gated_cross_attention", *OPTIMIZATIONS, *HELPERS}  # of flamingo_vlm
HEAVY = {"matplotlib", "torchvision", "transformers", "torchao"}  # imported where they are used

STUDY = sorted(path.stem for path in ROOT.glob("*.py"))
PACKAGE = sorted((ROOT / "flamingo_vlm").glob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def imported_by(path):
    """Top-level names of everything the file imports, inside its functions too; relative imports stay at home."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def allowed_in(module):
    """The project's modules that one of the study's modules may import."""
    if module in HELPERS:
        return set(HELPERS[: HELPERS.index(module)])
    above = set(ORDER[: ORDER.index(module)]) - set(SCRIPTS)
    return above | {"flamingo_vlm"} if module in SCRIPTS else above


def test_every_root_module_has_its_place():
    unknown = sorted(set(STUDY) - set(ORDER))
    assert not unknown, (
        f"add {unknown} to the order in tests/test_imports.py (DESIGN section 2), each below what it imports"
    )


@pytest.mark.parametrize("module", [name for name in ORDER if name in STUDY])
def test_imports_point_upward(module):
    ours = imported_by(ROOT / f"{module}.py") & {*ORDER, *STUDY, "flamingo_vlm", "tests"}
    wrong = sorted(ours - allowed_in(module))
    assert not wrong, f"{module} imports {wrong}, which do not stand above it in the order of tests/test_imports.py"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_the_package_uses_layers_and_optimizations_alone(path):
    wrong = sorted(imported_by(path) & {*ORDER, *STUDY, "tests"} - FOR_PACKAGE)
    assert not wrong, f"flamingo_vlm/{path.name} imports {wrong}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_import_no_script(path):
    assert not imported_by(path) & {*SCRIPTS, "tests"}


@pytest.mark.parametrize("module", LAYERS)
def test_layers_need_torch_and_einops_alone(module):
    foreign = imported_by(ROOT / f"{module}.py") - sys.stdlib_module_names - set(LAYERS)
    assert foreign <= {"torch", "einops"}


# Imports each module once, in a process of its own whose command line no module may read, and notes what that did.
_WATCHED_IMPORTS = """
import contextlib, importlib, io, json, logging, random, sys, traceback
import torch

def state():
    return {
        "seeds torch": torch.get_rng_state().tolist(),
        "seeds random": hash(random.getstate()),
        "sets the default dtype": str(torch.get_default_dtype()),
        "sets the number of threads": torch.get_num_threads(),
        "turns gradients off": torch.is_grad_enabled(),
        "sets up logging": len(logging.root.handlers),
    }

heavy, modules = json.loads(sys.stdin.read())
report = {}
for name in modules:
    before, loaded, written = state(), set(sys.modules), io.StringIO()
    effects = []
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            importlib.import_module(name)
        except BaseException:
            effects.append(traceback.format_exc())
    if written.getvalue():
        effects.append("prints " + written.getvalue()[:500])
    effects += [f"loads {package}" for package in heavy if package in set(sys.modules) - loaded]
    effects += [what for what, value in state().items() if value != before[what]]
    report[name] = effects
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def effects_of_importing():
    """Module name -> what importing it did. One process for all: torch alone takes two seconds to import."""
    study = effects([name for name in ORDER if name in STUDY], HEAVY)
    return study | effects([f"flamingo_vlm.{path.stem}" for path in PACKAGE if path.stem != "__init__"], {"matplotlib"})


def effects(modules, heavy):
    process = subprocess.run(
        [sys.executable, "-c", _WATCHED_IMPORTS, "--no-such-argument"],
        input=json.dumps([sorted(heavy), modules]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    (line,) = process.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("module", [name for name in ORDER if name in STUDY])
def test_importing_does_nothing(module, effects_of_importing):
    assert effects_of_importing[module] == []


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.stem != "__init__"], ids=lambda path: path.stem)
def test_importing_the_package_does_nothing(path, effects_of_importing):
    assert effects_of_importing[f"flamingo_vlm.{path.stem}"] == []
