"""Snippets, the spreadsheet tutorial and the notebook of the pages run as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

import dataset_format
import medgemma_trainer
from conftest import SAMPLE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "medgemma_clinical" / "docs"
SNIPPET = re.compile(r"<!-- snippet -->\n```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^python (\w+)\.py ((?:[^\n]*\\\n)*[^\n]*)", re.MULTILINE)
STEP = re.compile(f"{SNIPPET.pattern}|{COMMAND.pattern}", re.DOTALL | re.MULTILINE)
MAIN = {"dataset_format": dataset_format.main, "medgemma_trainer": medgemma_trainer.main}


def run_python(code, folder):
    """Run code in a process of its own that finds the program by PYTHONPATH alone."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_snippets_run_as_they_stand_from_another_folder(tmp_path):
    table = pd.read_csv(SAMPLE, nrows=400)
    table.head(300).to_csv(tmp_path / "dka_training_data.csv", index=False)
    new = table.tail(50).drop(columns="label_escalation")
    new.to_csv(tmp_path / "new_patients.csv", index=False)
    table.iloc[300:].to_csv(tmp_path / "other_hospital.csv", index=False)
    readme = SNIPPET.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    page = SNIPPET.findall((DOCS / "python.md").read_text(encoding="utf-8"))
    assert (len(readme), len(page)) == (1, 3)
    texts = [code.replace("trajectory_epochs=50", "trajectory_epochs=2") for code in page]
    short = 'output_dir="runs", trajectory_epochs=2)'
    texts += [code.replace('output_dir="runs")', short) for code in readme]
    run_python(f"for code in {texts!r}:\n    exec(code, {{}})", tmp_path)
    assert (tmp_path / "model" / "medgemma_trajectory_best.pt").is_file()


def run_commands(steps, folder, monkeypatch):
    """Run what a page shows, as in a clone of the program."""
    (folder / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(folder)
    for snippet, script, words in steps:
        if snippet:
            exec(snippet, {})
        else:
            argv = shlex.split(words.replace("\\\n", " "))
            assert MAIN[script](argv + ["--trajectory_epochs=2"] * ("runs" in argv)) == 0


def test_spreadsheet_tutorial_leads_to_a_report(tmp_path, monkeypatch):
    page = (DOCS / "tutorial-spreadsheet.md").read_text(encoding="utf-8").split("## 7")[0]
    steps = STEP.findall(page.replace('chemistry.csv.gz")', 'chemistry.csv.gz", nrows=120)'))
    assert [step[1] for step in steps if step[1]] == [*["dataset_format"] * 2, "medgemma_trainer"]
    run_commands(steps, tmp_path, monkeypatch)
    assert len(pd.read_csv("stays.csv", usecols=["static_sex_male"])) == 120
    assert Path("runs/trajectory/report.html").is_file()


def test_meds_commands_of_the_import_page_make_a_file(tmp_path, monkeypatch):
    page = (DOCS / "import.md").read_text(encoding="utf-8").split("## MEDS\n")[1].split("## ")[0]
    steps = [("", *found) for found in COMMAND.findall(page) if found[0] == "dataset_format"]
    assert [step[2].split()[0] for step in steps] == ["from_meds", "from_meds", "check"]
    run_commands(steps, tmp_path, monkeypatch)
    assert "trajectory_lactate [mmol/L]" in pd.read_csv("icu_mortality.csv").columns


def test_notebook_runs_and_was_stored_with_its_outputs(tmp_path):
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0].startswith("%pip install")
    assert all(cell["outputs"] for cell in cells[2:])
    code = (
        "\n".join(sources[1:]).replace("iloc[:800]", "iloc[:300]").replace("epochs=10", "epochs=2")
    )
    run_python("\n".join([code, "assert same and len(curve) > 5"]), tmp_path)
