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
