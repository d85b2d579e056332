"""``predict --explain``: which rows the page shows, its path, and that nothing else tells."""

import re

import pandas as pd
import pytest

from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.commands.patients import MAX_ROWS, patients_path
from medgemma_clinical.commands.predictions import inputs_path
from medgemma_clinical.evaluation.verdicts import percent
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
from medgemma_trainer import TrajectoryModel
from pages import Page
from predicting import MARKER, SERIES, STAGES, predicted, spoil, write_data

pytestmark = pytest.mark.slow


def shown(out):
    """Return the ids that the page beside predictions shows, in order."""
    return re.findall("<h2>(.*?)</h2>", patients_path(out).read_text())[1:-1]


def count_in_training(out):
    """Return how many rows of the page are in the training data; None where it is not known."""
    text = Page(patients_path(out).read_text()).text
    if "None of these rows is in the training data" in text:
        return 0
    found = re.search(r"In the training data, .* optimistic: (\d+) of \d+", text)
    return found and int(found[1])


def test_the_riskiest_rows_are_shown_however_the_file_is_cut(runs, table, tmp_path, monkeypatch):
    few = table.head(MAX_ROWS + 15)
    data, out = write_data(few, tmp_path / "rows.csv"), tmp_path / "out.csv"
    for size in (1000, 9):
        monkeypatch.setitem(MEMORY_ROWS, "trajectory", size)
        lines = predicted(runs / "trajectory", data, out, "--explain")
        riskiest = lines.sort_values("probability", ascending=False, kind="stable")["id"]
        assert shown(out) == riskiest.head(MAX_ROWS).tolist()


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_shows_what_the_stage_has_and_all_other_files_are_as_without_it(
    stage, runs, table, tmp_path
):
    data, plain, more = (tmp_path / name for name in ("rows.csv", "plain.csv", "more.csv"))
    new = pd.read_csv(SAMPLE, dtype=str)[200:208].assign(label_escalation=["0", "1"] * 4)
    write_data(pd.concat([table.head(4), new.assign(id=[f"new {k}" for k in range(8)])]), data)
    expected = predicted(runs / stage, data, plain)
    assert not patients_path(plain).exists(), "the page is never written unless asked for"
    lines = predicted(runs / stage, data, more, "--explain", "--patients=row 3, row 1")
    pd.testing.assert_frame_equal(lines, expected)
    assert inputs_path(more).read_bytes() == inputs_path(plain).read_bytes()
    reports = [out.with_suffix(".report.html").read_bytes() for out in (plain, more)]
    assert reports[0] == reports[1]
    assert {path.name for path in tmp_path.glob("more*")} == {
        *("more.csv", "more.inputs.csv", "more.report.html", "more.patients.html")
    }
    assert shown(more) == ["row 3", "row 1"], "in the order given"
    page = Page(patients_path(more).read_text())
    for k in (3, 1):
        assert f"row {k} {percent(lines['probability'][k])}".replace("\xa0", " ") in page.text
    assert ("soft prompt" in page.text) == (stage != "trajectory")
    assert ("Written report" in page.text) == (stage == "generative")
    if stage == "generative":
        assert lines["report"][3].partition(".")[0] in page.text
        assert lines["problem"][3][1:] in page.text


def test_the_page_is_the_owners_alone_and_no_message_names_a_patient(runs, tmp_path, capsys):
    few, names = pd.read_csv(SAMPLE, dtype=str)[200:224], [f"{MARKER}-{k}" for k in range(24)]
    few = few.assign(id=names, subject_id=[f"{MARKER}p{k}" for k in range(24)])
    few["clinical_context"] = f"54-year-old woman, {MARKER}"
    data, out = write_data(few, tmp_path / "rows.csv"), tmp_path / "out.csv"
    chosen = f"{names[3]},{MARKER}-77,{names[4]}"  # one that no row has
    predicted(runs / "trajectory", data, out, "--explain", "--patients", chosen)
    page = patients_path(out)
    assert page.stat().st_mode & 0o777 == 0o600
    assert shown(out) == [names[3], names[4]]
    told = capsys.readouterr()
    assert str(page) in told.out
    assert "1 of these ids" in told.out + told.err
    assert MARKER not in told.out + told.err
    assert f"{MARKER}p" not in page.read_text(), "the row's id alone"
    assert MARKER not in out.with_suffix(".report.html").read_text()
    assert not list(tmp_path.glob(".*")), "no half page"


def test_a_row_without_a_score_is_not_shown_and_an_earlier_page_leaves(runs, table, tmp_path):
    data, out = write_data(spoil(table)[0], tmp_path / "rows.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out, "--explain", "--patients", "row 3,row 5")
    assert shown(out) == ["row 5"]
    predicted(runs / "trajectory", data, out, "--explain", "--patients", "row 3")
    assert not patients_path(out).exists()


def test_the_page_counts_its_rows_in_the_training_data(runs, table, tmp_path):
    """One row of the training part and one of another, whole and lacking what identifies them."""
    stage = "classification"
    parts = [runs / stage / f"predictions_{part}.csv" for part in ("val", "test")]
    held_out = pd.concat(pd.read_csv(path, dtype=str)["patient"] for path in parts)
    long = table[table[SERIES].str.count("->") >= 2]  # with three values, which are compared
    is_held_out = long["subject_id"].isin(held_out)
    rows = pd.concat([long[~is_held_out].head(1), long[is_held_out].head(1)])
    rows = rows.assign(id=["a", "b"])
    out = tmp_path / "out.csv"
    for few, count in (
        (rows, 1),
        (rows.assign(label_escalation=""), 1),
        (rows.assign(subject_id=["x", "y"]), 1),
        (rows.assign(**{SERIES: "20 (0h)"}), 0),  # equal identifiers alone prove nothing
        (pd.read_csv(SAMPLE, dtype=str).iloc[200:202].assign(id=["a", "b"]), 0),
    ):
        predicted(runs / stage, write_data(few, tmp_path / "rows.csv"), out, "--explain")
        assert count_in_training(out) == count
    more = "--explain", "--model_name", TINY_MODEL
    for stage in STAGES[:2]:
        TrajectoryModel.from_pretrained(runs / stage).save_pretrained(tmp_path / stage)
        predicted(tmp_path / stage, tmp_path / "rows.csv", out, *more)
        assert (count_in_training(out) is None) == (stage != "trajectory")  # apart from stage 1
