"""The layout: which module may import which, what the script shows, what a start loads."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medgemma_clinical.provenance import code_files

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
        assert "argparse" not in found or rank(name) >= len(ROOMS), name
        if 0 < rank(name) <= 2:  # data and evaluation
            heavy = {"transformers", "peft", "accelerate", "torchdiffeq"}
            assert not heavy & {other.partition(".")[0] for other in found}, name
            assert "torch" not in imports(x for x in TREES[name].body if isinstance(x, IMPORTS))
    own = {name: found & {*GRAPH} - {name.rpartition(".")[0]} for name, found in GRAPH.items()}
    graphlib.TopologicalSorter(own).prepare()  # raises where modules import each other


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


@pytest.mark.parametrize("module", ["dataset_format.py", "srtr_dataset.py"])
def test_checking_a_file_loads_no_torch(module):
    command = [sys.executable, "-X", "importtime", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "accelerate", "sklearn", "transformers", "matplotlib"}
    assert f"{PACKAGE}.data.trajectories" in loaded


def test_ci_takes_actions_by_commit_and_packages_from_one_index():
    text = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").iterdir())
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in actions)
    assert not re.search("INDEX", text, re.IGNORECASE)
