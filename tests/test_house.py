"""The layout: which module may import which, how large a module may be, what a start loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "medgemma_clinical"
SCRIPTS = ("medgemma_trainer", "dte_encoder", "dataset_format", "srtr_dataset")
ROOMS = ("data", "evaluation", "models", "training", "inference", "commands")
"""From below upwards; the files beside the rooms are lowest."""

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
PROMISED = {
    "dte_encoder": "ClinicalODERNN",
    "dataset_format": "MIMICtrajectoryDataset",
    "srtr_dataset": "SRTRTrajectoryDataset",
}


def rank(module: str) -> int:
    """Place of a module in the one direction of imports."""
    room = module.split(".")[1]
    return 1 + ROOMS.index(room) if room in ROOMS else 0


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, typing: bool = True) -> set[str]:
    """Modules that a file imports anywhere, or, without ``typing``, when it runs."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            skipped.update(ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
    return found


def own_imports(path: Path, *, typing: bool = True) -> set[str]:
    return {name for name in imports(path, typing=typing) if name.startswith(f"{PACKAGE}.")}


def functions(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in nodes]


def test_the_top_level_holds_what_the_card_promises() -> None:
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    made = {"__pycache__", *(name for name in shown if name.startswith("checkpoints_medgemma_"))}
    expected = {f"{name}.py" for name in SCRIPTS}
    assert shown - made == expected | {"README.md", "LICENSE", "requirements.txt", "tests", PACKAGE}


@pytest.mark.parametrize(("file", "name"), PROMISED.items())
def test_a_promised_name_is_defined_in_its_file(file: str, name: str) -> None:
    tree = ast.parse((ROOT / f"{file}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_downwards_or_within_its_room(path: Path) -> None:
    name = name_of(path)
    if name == PACKAGE:
        assert not own_imports(path)
        return
    for other in own_imports(path):
        assert rank(other) <= rank(name), f"{name} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_package_imports_no_top_level_file(path: Path) -> None:
    assert not imports(path) & set(SCRIPTS)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name_of(path): own_imports(path, typing=False) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("room", ["data", "evaluation"])
def test_data_and_evaluation_know_no_model(room: str) -> None:
    for path in (ROOT / PACKAGE / room).rglob("*.py"):
        used = {name.partition(".")[0] for name in imports(path, typing=False)}
        assert not used & {"transformers", "peft", "accelerate", "torchdiffeq"}, path
        tree = ast.parse(path.read_text())
        loads = {
            alias.name
            for node in tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert "torch" not in loads, f"{path} loads torch when it is imported"


def test_arguments_of_the_command_line_stay_with_the_commands() -> None:
    for path in MODULES:
        if name_of(path).startswith(f"{PACKAGE}.commands"):
            continue
        assert "argparse" not in imports(path), path


def test_rooms_keep_their_measure() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 450, path
    assert len((ROOT / "medgemma_trainer.py").read_text().splitlines()) <= 900
    for folder in {path.parent for path in MODULES}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 11, folder
    for path in [*MODULES, *(ROOT / f"{name}.py" for name in SCRIPTS)]:
        for name, length in functions(path):
            assert length <= 60, f"{path}: {name} has {length} lines"
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path


def loaded(*words: str, code: int = 0) -> set[str]:
    """Modules that a program has loaded when it ends, as Python itself reports."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


HEAVY = {"torch", "accelerate", "sklearn", "transformers", "matplotlib"}


def test_help_loads_no_torch() -> None:
    modules = loaded("medgemma_trainer.py", "--help")
    assert "srtr_dataset" in modules, "its organs are choices"
    assert not modules & {*HEAVY, "dataset_format"}


@pytest.mark.parametrize(
    "code", ["import medgemma_trainer", "from medgemma_trainer import TrajectoryModel"]
)
def test_importing_the_script_loads_neither_torch_nor_tables(code: str) -> None:
    modules = loaded("-c", code)
    assert "medgemma_clinical.inference.trajectory_model" in modules
    assert not modules & {*HEAVY, "pandas", "dataset_format", "srtr_dataset"}


def test_a_wrong_flag_is_refused_before_torch_is_loaded() -> None:
    assert "torch" not in loaded("medgemma_trainer.py", "--wrong", code=2)


@pytest.mark.parametrize("module", ["dataset_format.py", "srtr_dataset.py"])
def test_checking_a_file_loads_no_torch(module: str) -> None:
    assert not loaded(module, "--help") & HEAVY
