"""The layout: which module may import which, what the script shows, what a start loads."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finished_runs import write_run
from medgemma_clinical.provenance import code_files
from pages import make_rows
from site_files import make_site, parts

ROOT = Path(__file__).parent.parent
PACKAGE = "medgemma_clinical"
PROMISED = {"medgemma_trainer": "main", "dte_encoder": "ClinicalODERNN"}
PROMISED |= {"dataset_format": "MIMICtrajectoryDataset", "srtr_dataset": "SRTRTrajectoryDataset"}
ROOMS = ("data", "evaluation", "models", "training", "inference", "commands")  # from below

SHOWN = {"ClinicalODERNN", "SoftPrompt", "LoraConfig", "BitsAndBytesConfig", "AdamW"}
SHOWN |= {"warmup_and_cosine", "nn.Linear"}
IMPORTS = (ast.Import, ast.ImportFrom)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(nodes):
    """Return the modules that code imports, those for types alone included."""
    nodes, found = list(nodes), set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        nodes += ast.iter_child_nodes(node)
    return found


TREES = {name_of(path): ast.parse(path.read_text()) for path in (ROOT / PACKAGE).rglob("*.py")}
GRAPH = {name: imports([tree]) for name, tree in TREES.items()}


def rank(module):
    """Return the place of a module in the one direction of imports."""
    room = f"{module}.".split(".")[1]
    if room == "__main__":
        return len(ROOMS) + 1
    return 1 + ROOMS.index(room) if room in ROOMS else 0


def test_the_top_level_holds_what_the_card_promises():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not listed:
        pytest.skip("no checkout")  # what users make in the folder is theirs
    shown = {line.partition("/")[0] for line in listed.splitlines() if not line.startswith(".")}
    files = {f"{name}.py" for name in PROMISED} | {"README.md", "LICENSE", "requirements.txt"}
    assert shown == files | {"pyproject.toml", "tests", PACKAGE}
    for file, name in PROMISED.items():
        body = ast.parse((ROOT / f"{file}.py").read_text()).body
        assert name in {x.name for x in body if isinstance(x, (ast.ClassDef, ast.FunctionDef))}


def test_imports_go_one_way_and_models_stay_with_the_models():
    for name, found in GRAPH.items():
        assert not found & {*PROMISED}, name
        own = [other for other in found if other.startswith(PACKAGE)]
        assert not [other for other in own if rank(other) > rank(name)], name
        assert "argparse" not in found or rank(name) >= len(ROOMS) or name.endswith(".flags"), name
        if 0 < rank(name) <= 2:  # data and evaluation
            heavy = {"transformers", "peft", "accelerate", "torchdiffeq"}
            assert not heavy & {other.partition(".")[0] for other in found}, name
            assert "torch" not in imports(x for x in TREES[name].body if isinstance(x, IMPORTS))
    own = {name: found & {*GRAPH} - {name.rpartition(".")[0]} for name, found in GRAPH.items()}
    graphlib.TopologicalSorter(own).prepare()  # raises where modules import each other


KINDS = r"outcome_kind ==|isinstance\(.*(LabelOutcome|Hazards)|competing_events is"
KINDS += r'|"events" (not )?in |has_curves|has_tripod'
ASKING = re.compile(rf"{PACKAGE}/(data/|models/(outcome|hazards)|evaluation/(target|time_\w+))")


def test_few_modules_ask_whether_labels_or_times_are_learned():
    files = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / PACKAGE).rglob("*.j2")]
    files += [ROOT / "medgemma_trainer.py", ROOT / "dte_encoder.py"]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        if not ASKING.match(str(path.relative_to(ROOT)))
        for line in path.read_text().splitlines()
        if re.search(KINDS, line)
    ]
    assert not found, "a target or an outcome answers"


def test_the_script_shows_the_wiring():
    text = (ROOT / "medgemma_trainer.py").read_text()
    nodes = list(ast.walk(ast.parse(text)))
    used = {ast.unparse(x) for x in nodes if isinstance(x, (ast.Name, ast.Attribute))}
    assert used >= SHOWN
    for function in (x for x in nodes if isinstance(x, ast.FunctionDef)):
        # The language model's libraries take seconds to load, which stage 1 need not wait for.
        lazy = {name.partition(".")[0] for name in imports([function])}
        assert lazy == ({"peft", "transformers"} if function.name == "build_llm" else set())


def test_the_hash_of_the_code_covers_whatever_decides_a_result():
    shipped = {path for path in (ROOT / PACKAGE).rglob("*.*") if path.is_file()}
    others = {
        path
        for path in shipped
        if {"docs", "sample", "__pycache__"} & {*path.relative_to(ROOT).parts}
    }
    assert {*code_files()} == shipped - others | {ROOT / f"{name}.py" for name in PROMISED}


LANGUAGE_MODEL = ("transformers", "peft", "bitsandbytes")
TORCH = ("torch", "accelerate", "lightgbm", *LANGUAGE_MODEL)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a module on a machine on which some packages cannot be loaded."""

    def run(words, broken, code=0):
        packages = tmp_path / f"without {' '.join(broken)}"
        packages.mkdir(exist_ok=True)
        for name in broken:  # no import hides such an error
            (packages / f"{name}.py").write_text(f"raise OSError('{name} cannot be loaded')")
        monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-2000:]
        return done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *("dataset_format from_long --help", "srtr_dataset --help", f"{PACKAGE} predict --help"),
        *("medgemma_trainer --help", "medgemma_trainer --epochs 0"),
    ],
)
def test_help_and_refused_flags_load_neither_torch_nor_scikit_learn(words, start):
    code = 2 if words.endswith("0") else 0
    start(words.split(), (*TORCH, "sklearn", "matplotlib"), code)


@pytest.mark.slow
def test_results_are_pooled_and_compared_without_torch(start, tmp_path):
    runs = [write_run(tmp_path / name / "trajectory", seed) for seed, name in enumerate("ab")]
    for name, rows in zip("ab", parts(make_rows(400), (200, 200)), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(make_site(rows)))
    start([PACKAGE, "compare", *runs, "--output_dir", "out"], TORCH)
    start([PACKAGE, "pool", "a.json", "b.json", "--output_dir", "out"], TORCH)
    assert {"compare.html", "sites.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_stage_1_needs_no_language_model_and_lightgbm_only_to_fit_trees(start, dka_file, tmp_path):
    data = ["--data_path", dka_file]
    train = ["medgemma_trainer", "--trajectory_only", *data, "--trajectory_epochs", 1]
    start([*train, "--output_dir", "run"], LANGUAGE_MODEL)
    model = ["--checkpoint", "run/trajectory", "--use", "gradient boosting"]
    start([PACKAGE, "predict", *model, *data, "--predictions", "p.csv"], ["lightgbm"])
    error = start([*train, "--output_dir", "refused"], ["lightgbm"], code=2)
    assert "libomp" in error.splitlines()[-1]
    assert not (tmp_path / "refused").exists(), "refused before the training"


def test_ci_takes_actions_by_commit_and_packages_from_one_index():
    text = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").iterdir())
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in actions)
    assert not re.search("INDEX", text, re.IGNORECASE)
