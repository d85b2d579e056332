"""The Python of the pages: snippets and the notebook run as they stand, from another folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from conftest import SAMPLE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "medgemma_clinical" / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"
SNIPPET = re.compile(r"<!-- snippet -->\n```python\n(.*?)```", re.DOTALL)


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that finds the program by PYTHONPATH alone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: training data, new patients, another hospital's."""
    folder = tmp_path_factory.mktemp("user")
    table = pd.read_csv(SAMPLE, nrows=400)
    table.head(300).to_csv(folder / "dka_training_data.csv", index=False)
    table.tail(50).drop(columns="label_escalation").to_csv(folder / "new_patients.csv", index=False)
    table.iloc[300:].to_csv(folder / "other_hospital.csv", index=False)
    return folder


def test_the_snippets_run_as_they_stand_from_another_folder(place: Path) -> None:
    readme = SNIPPET.findall((ROOT / "README.md").read_text())
    page = SNIPPET.findall((DOCS / "python.md").read_text())
    assert (len(readme), len(page)) == (1, 3)
    texts = [code.replace("trajectory_epochs=50", "trajectory_epochs=2") for code in page]
    short = 'output_dir="runs", trajectory_epochs=2)  #'
    texts += [code.replace('output_dir="runs")  #', short) for code in readme]
    done = run_python(f"for code in {texts!r}:\n    exec(code, {{}})", place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / "model" / "medgemma_trajectory_best.pt").is_file()
    assert not list(ROOT.glob("runs*"))


def code_cells(notebook: dict[str, Any]) -> list[str]:
    return ["".join(x["source"]) for x in notebook["cells"] if x["cell_type"] == "code"]


def test_the_notebook_runs_as_it_stands(tmp_path: Path) -> None:
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    notebooks = tmp_path / "program" / "medgemma_clinical" / "docs"
    notebooks.mkdir(parents=True)
    for name in (
        "medgemma_clinical/sample",
        "medgemma_trainer.py",
        "dataset_format.py",
        "srtr_dataset.py",
    ):
        (tmp_path / "program" / name).symlink_to(ROOT / name)
    shown = 'print("RISKS", len(curve), curve["probability"].between(0, 1).all(), same)'
    done = run_python("\n\n".join([*cells, shown]), notebooks)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = re.findall(r"^RISKS (\d+) (\w+) (\w+)$", done.stdout, re.MULTILINE)
    assert int(line[0]) > 5
    assert line[1:] == ("True", "True")
    assert not list(notebooks.iterdir())
