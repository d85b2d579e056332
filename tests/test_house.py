"""Tests of the house: what lies where, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "dte_encoder": set[str](),
    "dataset_format": set[str](),
    "srtr_dataset": {"dataset_format"},
    "medgemma_trainer": {"dte_encoder", "dataset_format", "srtr_dataset"},
}
TOP_LEVEL = {f"{module}.py" for module in MAY_IMPORT} | {"requirements.txt", "README.md", "tests"}


def imported_modules(path: Path) -> set[str]:
    """Give the first names of all imports, wherever they stand; a relative one as ``.``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_run_one_way(module: str) -> None:
    path = ROOT / f"{module}.py"
    if not path.exists():
        pytest.skip("not written yet")
    local = set(MAY_IMPORT) | {"tests", "problems", "conftest", "."}
    assert imported_modules(path) & local <= MAY_IMPORT[module]


def test_nothing_else_is_visible_at_the_top_level() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {"medgemma_trainer.py", "dte_encoder.py", "dataset_format.py"} <= top
    assert {name for name in top if not name.startswith(".")} - TOP_LEVEL == set()


def test_importing_the_trainer_loads_no_language_model_package() -> None:
    heavy = {"transformers", "peft", "bitsandbytes", "sklearn", "matplotlib"}
    code = (
        "import sys, medgemma_trainer; "
        f"print(sorted({heavy!r} & set(sys.modules))); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["[]", "True"]


def loaded(*words: str, code: int = 0) -> set[str]:
    """Give the modules that a fresh process has loaded when it ends, as Python itself tells."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_help_loads_no_torch() -> None:
    modules = loaded("medgemma_trainer.py", "--help")
    assert "dataset_format" in modules
    assert not modules & {"torch", "dte_encoder", "accelerate", "sklearn", "transformers"}


def test_a_wrong_flag_is_refused_before_torch_is_loaded() -> None:
    assert "torch" not in loaded("medgemma_trainer.py", "--wrong", code=2)


def test_an_end_loads_nothing_more() -> None:
    modules = loaded("medgemma_trainer.py", "--trajectory_only", "--data_path", "none", code=2)
    assert "torch" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "sympy", "sklearn"}


@pytest.mark.parametrize("module", ["dataset_format.py", "srtr_dataset.py"])
def test_checking_a_file_loads_no_torch(module: str) -> None:
    assert not loaded(module, "--help") & {"torch", "sklearn"}


def test_the_first_step_of_stage_1_loads_only_what_it_needs(tmp_path: Path) -> None:
    code = """
import sys, medgemma_trainer as trainer
def stop(*_):
    print(*sys.modules)
    sys.exit()
trainer.take_step = stop
trainer.main(sys.argv[1:])
"""
    sample = ROOT / "tests" / "data" / "physionet2012_bicarbonate.csv"
    words = ["--trajectory_only", "--data_path", str(sample), "--output_dir", str(tmp_path)]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert {"torch", "medgemma_trainer"} <= modules
    unused = {"transformers", "peft", "sklearn", "matplotlib", "jinja2", "torchdiffeq"}
    # torch's own optimizers load a compiler: a second.
    assert not modules & (unused | {"torch._dynamo", "sympy"})
