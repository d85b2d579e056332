"""Snippets, tutorial, MEDS commands and notebook of the pages run as they stand, on few rows."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import spreadsheet

import dataset_format
import medgemma_trainer
from conftest import SAMPLE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "medgemma_clinical" / "docs"
SNIPPET = re.compile(r"<!-- snippet -->\n```python\n(.*?)```", re.DOTALL)
ANSWERS = r"^```toml\n# ([\w.]+)\n((?:[^`\n]*\n)*)```"
COMMAND = r"^(?:python ([\w/]+)\.py|medgemma-clinical) ((?:[^\n]*\\\n)*[^\n]*)"
STEP = re.compile(f"{ANSWERS}|{COMMAND}", re.MULTILINE)
MAIN = {
    "dataset_format": dataset_format.main,
    "medgemma_trainer": medgemma_trainer.main,
    "tests/benchmarks/spreadsheet": spreadsheet.main,
}
QUICK = {"--trajectory_only": "--trajectory_epochs=2", "--out .": "--rows=400"}


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
    ("parts", "made"),
    [
        (
            [
                ("tutorial-spreadsheet.md", "# Tutorial", "Continue with"),
                ("external.md", "## 1. ", "has calibration"),
            ],
            ("risks.patients.html", "external_risks.report.html"),
        ),
        (
            [("import.md", "## MEDS\n", "\n## ")],
            ("checkpoints_medgemma_dka/trajectory/report.html",),
        ),
    ],
)
def test_commands_of_pages(parts, made):
    Path("tests").symlink_to(ROOT / "tests")
    for page, begin, end in parts:
        text = (DOCS / page).read_text(encoding="utf-8").split(begin)[1].split(end)[0]
        for name, answers, script, words in STEP.findall(text):
            if name:
                change_flags(Path(name), answers)
                continue
            quick = [flag for known, flag in QUICK.items() if known in words]
            main = MAIN[script or "medgemma_trainer"]
            assert main(shlex.split(words.replace("\\\n", " ")) + quick) == 0
    assert all(Path(name).is_file() for name in made)


def change_flags(path, answers):
    """Change a previewed file to a page's answers, which a user types into it."""
    flags = tomllib.loads(path.read_text(encoding="utf-8")) | tomllib.loads(answers)
    lines = [f"{name} = {json.dumps(value)}" for name, value in flags.items()]
    path.write_text("\n".join(lines), encoding="utf-8")


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
