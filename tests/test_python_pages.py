"""Snippets, tutorial, MEDS commands and notebook of the pages run as they stand, on few rows."""

import json
import re
import shlex
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import spreadsheet

import dataset_format
import medgemma_trainer
from conftest import SAMPLE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "medgemma_clinical" / "docs"
SNIPPET = re.compile(r"<!-- snippet -->\n```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(
    r"^(?:python ([\w/]+)\.py|medgemma-clinical) ((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE
)
MAIN = {
    "dataset_format": dataset_format.main,
    "medgemma_trainer": medgemma_trainer.main,
    "tests/benchmarks/spreadsheet": spreadsheet.main,
}
QUICK = {"--trajectory_only": "--trajectory_epochs=2", "--out .": "--rows=120"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A user's folder, which is the current one; figures are closed afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


def test_snippets_of_readme_and_python_page():
    table = pd.read_csv(SAMPLE, nrows=200)
    table.head(160).to_csv("dka_training_data.csv", index=False)
    shutil.copy(SAMPLE.with_suffix(".json"), "dka_training_data.json")
    table.tail(20).drop(columns="label_escalation").to_csv("new_patients.csv", index=False)
    table.tail(40).to_csv("other_hospital.csv", index=False)
    page = SNIPPET.findall((DOCS / "python.md").read_text(encoding="utf-8"))
    readme = SNIPPET.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert (len(readme), len(page)) == (1, 4)
    quick = 'output_dir="runs", trajectory_epochs=2)'
    for code in (*page, *readme):
        short = code.replace("epochs=50", "epochs=2").replace("GroupKFold(5)", "GroupKFold(2)")
        exec(short.replace('data.csv", output_dir="runs")', f'data.csv", {quick}'), {})
    assert Path("model/medgemma_trajectory_best.pt").is_file()


@pytest.mark.parametrize(
    ("page", "begin", "end", "made"),
    [
        ("tutorial-spreadsheet.md", "# Tutorial", "Continue with", "risks.patients.html"),
        ("import.md", "## MEDS\n", "\n## ", "checkpoints_medgemma_dka/trajectory/report.html"),
    ],
)
def test_commands_of_a_page(page, begin, end, made):
    Path("tests").symlink_to(ROOT / "tests")
    text = (DOCS / page).read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    for script, words in COMMAND.findall(text):
        quick = [flag for known, flag in QUICK.items() if known in words]
        assert (
            MAIN[script or "medgemma_trainer"](shlex.split(words.replace("\\\n", " ")) + quick) == 0
        )
    assert Path(made).is_file()


def test_notebook_and_its_stored_outputs():
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    install, *sources = ["".join(cell["source"]) for cell in cells]
    assert install.startswith("%pip install")
    assert all(cell["outputs"] for cell in cells[2:])
    code = "\n".join([*sources, "assert same and len(risks) == len(known)"])
    short = {"iloc[:800]": "iloc[:200]", "epochs=10": "epochs=2", "GroupKFold(3)": "GroupKFold(2)"}
    for whole, part in short.items():
        assert whole in code
        code = code.replace(whole, part)
    exec(code, {})
