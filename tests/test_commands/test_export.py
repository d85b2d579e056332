"""``export``: a folder that servers read and that predicts as the run does, or one line."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.inference import serving
from medgemma_clinical.models.trained_model import read_trained_config
from medgemma_trainer import TrajectoryModel
from merged_models import save_base, save_stage
from predicting import MARKER, predicted, refused, write_data

pytestmark = pytest.mark.slow

PAGE = Path(trainer.__file__).parent / "medgemma_clinical" / "docs" / "sharing.md"


def command(checkpoint, out, *more):
    words = ["export", "merged", "--checkpoint", str(checkpoint), "--out", str(out)]
    return [*words, *more]


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_an_export_predicts_as_the_run_does_and_holds_no_patient(stage, runs, table, tmp_path):
    data = write_data(table.head(15).drop(columns="label_escalation"), tmp_path / "few.csv")
    assert trainer.main(command(runs / stage, tmp_path / "out")) == 0
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or MARKER.encode() not in path.read_bytes(), path
    expected = predicted(runs / stage, data, tmp_path / "1.csv")
    found = predicted(tmp_path / "out", data, tmp_path / "2.csv")
    assert expected["probability"].std() > 1e-4
    own = expected[[name for name in expected if not name.startswith("probability_")]]
    assert len(own.columns) < len(expected.columns), "an export holds no baselines"
    assert "baselines_sha256" not in read_trained_config(tmp_path / "out")
    pd.testing.assert_frame_equal(found, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["trajectory", "classification"])
def test_a_copy_to_give_away_scores_and_aggregates_as_the_run_does(stage, runs, tmp_path):
    copy, base = tmp_path / "copy", [] if stage == "trajectory" else ["--model_name", TINY_MODEL]
    words = ["export", "shared", "--checkpoint", str(runs / stage), "--out", str(copy)]
    assert trainer.main([*words, *base]) == 0
    for path in (copy, *copy.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or MARKER.encode() not in path.read_bytes(), path
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:350]
    rows.loc[rows.index[::3], "label_escalation"] = "1"
    rows.loc[rows.index[::7], "static_weight [kg]"] = ""
    data, found, sites = write_data(rows, tmp_path / "rows.csv"), [], []
    # A ledger is written beside the checkpoint.
    own = tmp_path / "own"
    TrajectoryModel.from_pretrained(runs / stage).save_pretrained(own)
    for name, checkpoint in (("run", own), ("copy", copy)):
        more = ["--use", "blend_with_statics", "--aggregate", str(tmp_path / f"{name}.json")]
        table = predicted(checkpoint, data, tmp_path / f"{name}.csv", *more, *base)
        found.append(table)
        sites.append((tmp_path / f"{name}.json").read_text())
    assert {"probability_stage", "probability_ensemble"} <= {*found[0]}
    words = found[0].pop("probability_words_of_the_context")  # which is not given away
    assert words.notna().all()
    pd.testing.assert_frame_equal(*found, check_exact=True)
    assert sites[0] == sites[1]


def test_the_base_model_may_lie_elsewhere(tmp_path, capsys):
    base, out = save_base(tmp_path / "gemma"), tmp_path / "out"
    stage = save_stage(tmp_path / "run", "classification", base, "nf4", "bf16")
    base.rename(tmp_path / "moved")
    assert refused(capsys, command(stage, out), "--model_name", out=out)
    assert trainer.main(command(stage, out, "--model_name", str(tmp_path / "moved"))) == 0
    other = save_base(tmp_path / "other", lively=True)
    again = command(stage, tmp_path / "again", "--model_name", str(other))
    assert refused(capsys, again, f"--model_name {other}", out=tmp_path / "again")


def test_an_export_runs_in_one_process(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "processes", lambda: SimpleNamespace(num_processes=2))
    words = command(runs / "generative", tmp_path / "out")
    assert refused(capsys, words, "one process", out=tmp_path / "out")


def test_another_logit_is_a_fault_of_the_run(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "MERGE_TOLERANCE", dict.fromkeys(serving.MERGE_TOLERANCE, -1.0))
    assert trainer.main(command(runs / "generative", tmp_path / "out")) == 3
    assert capsys.readouterr().err.count("error: ") == 1  # behind the bar of the shards
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- the page


def run_snippets(heading, names):
    """Run the Python blocks below a heading of the page, as they stand."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    section = next(each for each in sections if each.startswith(heading))
    for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        exec(code, names)


def test_the_code_of_the_page_writes_our_reports(runs, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(runs)
    positive = trainer.TrajectoryModel.from_pretrained(runs / "generative").predict(table) == 1
    few = pd.concat([table[positive].head(3), table[~positive].head(2)])
    write_data(few.drop(columns="label_escalation"), Path("new_patients.csv"))
    assert trainer.main(command(Path("runs/generative"), Path("export"))) == 0
    page = {}
    run_snippets("Serve notes", page)
    expected = predicted(Path("runs/generative"), Path("new_patients.csv"), Path("3.csv"))
    without_risks = expected["report"].str.replace(
        r" \(risk .*? the threshold of .*?\)", "", regex=True
    )
    assert page["reports"] == without_risks.tolist()
    assert expected["prediction"].nunique() == 2
