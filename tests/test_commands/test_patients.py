"""``--predict --explain``: which rows the page shows, its place, and that nothing else tells."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.commands.patients import MOST_ROWS, find_in_training, patients_path
from medgemma_clinical.data.training_data import patient_hashes
from medgemma_clinical.inference.explain import ScoredRow
from medgemma_clinical.inference.hub import share_checkpoint
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
from medgemma_clinical.models.sharing.model_card import weight_0_sentence
from pages import Page
from predicting import (
    MARKER,
    SERIES,
    STAGES,
    command,
    predicted,
    refused,
    spoil,
    write_data,
)


def shown(page: Path) -> list[str]:
    """Return the ids that the page shows, in order."""
    return re.findall(r'<section id="row-\d+" class="patient">\s*<h2>(.*?)</h2>', page.read_text())


def in_training(page: Path) -> list[str]:
    """Return the last column of the page's first table."""
    first = page.read_text().partition("<tbody>")[2].partition("</tbody>")[0]
    return re.findall(r"<td>([^<]*)</td></tr>", first)


def marked(table: pd.DataFrame, rows: int) -> pd.DataFrame:
    """Return some rows whose id, patient and context hold a marker."""
    few = table.head(rows).copy()
    few["id"] = [f"{MARKER}-{k}" for k in range(rows)]
    few["subject_id"] = [f"{MARKER}p{k}" for k in range(rows)]
    return few.assign(clinical_context=f"54-year-old woman, {MARKER}")


def test_the_riskiest_rows_are_shown_however_the_file_is_cut(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_data(table, tmp_path / "rows.csv"), tmp_path / "out.csv"
    for size in (1000, 7):
        monkeypatch.setitem(MEMORY_ROWS, "trajectory", size)
        lines = predicted(runs / "trajectory", data, out, "--explain")
        riskiest = lines.sort_values("probability", ascending=False, kind="stable")["id"]
        assert shown(patients_path(out)) == riskiest.head(MOST_ROWS).tolist()


def test_rows_are_chosen_by_id_in_the_order_given(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write_data(table.head(30), tmp_path / "rows.csv"), tmp_path / "out.csv"
    lines = predicted(runs / "trajectory", data, out, "--explain", "--patients=row 20, row 3")
    page = patients_path(out)
    assert shown(page) == ["row 20", "row 3"]
    text = Page(page.read_text()).text
    for k in (20, 3):
        assert f"row {k} {100 * lines['probability'][k]:.1f} %" in text


@pytest.mark.parametrize("stage", STAGES)
def test_all_other_files_are_as_without_the_page(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, plain, more = (tmp_path / name for name in ("rows.csv", "plain.csv", "more.csv"))
    write_data(table.head(60), data)
    predicted(runs / stage, data, plain, "--min_cell", "0")
    assert not patients_path(plain).exists(), "the page is never written unless asked for"
    predicted(runs / stage, data, more, "--min_cell", "0", "--explain", "--patients", "row 1")
    assert more.read_bytes() == plain.read_bytes()
    reports = [out.with_suffix(".report.html").read_bytes() for out in (plain, more)]
    assert reports[0] == reports[1]
    made = {path.name for path in tmp_path.glob("more*")}
    assert made == {"more.csv", "more.report.html", "more.patients.html"}


def test_the_page_is_the_owners_alone_and_no_message_names_a_patient(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(marked(table, 12), tmp_path / "rows.csv"), tmp_path / "out.csv"
    asked = ["--explain", "--patients", f"{MARKER}-3,{MARKER}-4"]
    predicted(runs / "trajectory", data, out, *asked)
    page = patients_path(out)
    assert page.stat().st_mode & 0o777 == 0o600
    assert shown(page) == [f"{MARKER}-3", f"{MARKER}-4"]
    told = capsys.readouterr()
    assert f"patients: {page}; the page holds patients' data: do not share it" in told.out
    assert MARKER not in told.out + told.err
    assert "This page holds patients' data: do not share it." in Page(page.read_text()).text
    assert f"{MARKER}p" not in page.read_text(), "the row's id alone"
    hidden = [path for path in tmp_path.glob(".*") if not path.name.endswith(".lock")]
    assert not hidden, "no half page"


@pytest.mark.parametrize("page", ["--min_cell=11", "--explain"])
def test_earlier_pages_of_patients_leave_with_their_predictions(
    page: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write_data(table.head(9), tmp_path / "rows.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out, "--explain", "--patients", "row 1")
    assert shown(patients_path(out)) == ["row 1"]
    predicted(runs / "trajectory", write_data(table.tail(9), data), out, page)
    assert patients_path(out).exists() == (page == "--explain")
    assert page != "--explain" or "row 1" not in shown(patients_path(out))


def test_an_id_that_no_row_has_is_refused_by_its_place(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(marked(table, 9), tmp_path / "rows.csv"), tmp_path / "out.csv"
    asked = ["--explain", "--patients", f"{MARKER}-3,{MARKER}-77,{MARKER}-4"]
    words = command(runs / "trajectory", data, out, *asked)
    expected = ("--patients: no row of", "has 1 of these 3 ids, the first at place 2: give ids as")
    assert refused(capsys, words, *expected, out=out)
    alone = command(runs / "trajectory", data, out, "--explain", "--patients", f"{MARKER}-77")
    assert refused(capsys, alone, "rows.csv has this id: give ids as", out=out)
    assert trainer.main(words) == 2
    assert MARKER not in "".join(capsys.readouterr()), "neither those of the file nor the typed"


def test_a_row_without_a_score_is_known_and_not_shown(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, _ = spoil(table)
    data, out = write_data(bad, tmp_path / "rows.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out, "--explain", "--patients", "row 3,row 5")
    assert shown(patients_path(out)) == ["row 5"]
    predicted(runs / "trajectory", data, out, "--explain", "--patients", "row 3")
    assert "no row to show has a score: no page" in capsys.readouterr().out
    assert not patients_path(out).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_of_each_stage_shows_what_the_stage_has(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write_data(table.head(9), tmp_path / "rows.csv"), tmp_path / "out.csv"
    asked = ["--explain", "--patients", "row 2"]
    (line,) = predicted(runs / stage, data, out, *asked).query("id == 'row 2'").to_dict("records")
    page = Page(patients_path(out).read_text())
    ((alt, _),) = page.images()
    assert f"{100 * line['probability']:.1f} % at hour" in alt
    assert "Serum bicarbonate from" in alt
    assert ("Without it the risk is" in page.text) == (stage != "trajectory")
    assert ("log-odds beside them is 1." in page.text) == (stage != "trajectory")
    assert ("Written report" in page.text) == (stage == "generative")
    if stage == "generative":
        assert line["report"].partition(".")[0] in page.text
        problem = line["problem"]
        assert problem, "of a random model"
        assert f"Written report {problem[0].upper()}{problem[1:]}." in page.text


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_says_which_of_its_rows_trained_the_model(
    stage: str, runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    """One row of the training part and one of another, whole and lacking what identifies them."""
    parts = [runs / stage / f"predictions_{part}.csv" for part in ("val", "test")]
    held_out = pd.concat(pd.read_csv(path, dtype=str)["patient"] for path in parts)
    long = table[table[SERIES].str.count("->") >= 2]  # with three values, which are compared
    is_held_out = long["subject_id"].isin(held_out)
    rows = pd.concat([long[~is_held_out].head(1), long[is_held_out].head(1)])
    rows = rows.assign(id=["a", "b"])
    renamed = rows.assign(subject_id=["x", "y"])
    nameless = rows.drop(columns=["subject_id", "id"])
    others = pd.read_csv(SAMPLE, dtype=str).iloc[200:202].assign(id=["a", "b"])
    one_of = "1 of these 2 patients"
    for few, first, words in (
        (rows, f"{one_of} trained the model: the figures flatter it.", ["yes", "no"]),
        (rows.assign(label_escalation=""), f"{one_of} trained the model", ["yes", "no"]),
        (renamed, f"{one_of} have the last values, hours and outcome", ["perhaps", "no"]),
        (nameless.assign(label_escalation=""), f"{one_of} have the last v", ["perhaps", "no"]),
        (rows.assign(**{SERIES: "20 (0h)"}), f"{one_of} have the ident", ["perhaps", "not known"]),
        (others, "", ["no", "no"]),
    ):
        data, out = write_data(few, tmp_path / "rows.csv"), tmp_path / "out.csv"
        asked = "a,b" if "id" in few else "2,3"  # row numbers
        predicted(runs / stage, data, out, "--explain", "--patients", asked)
        assert in_training(patients_path(out)) == words
        text = Page(patients_path(out).read_text()).text
        assert f"by its owner alone. {first}" in text
        assert ("flatter" in text) == bool(first)
        assert "No patient here" not in text


def test_row_numbers_are_no_identifiers(table: pd.DataFrame) -> None:
    dataset = trainer.DATASETS["dka"](table.head(2).drop(columns=["subject_id", "id"]))
    rows = [ScoredRow(str(k), k, dataset.subset(np.array([k])), 0.5) for k in range(2)]
    trained = patient_hashes(dataset, np.arange(2))
    assert "perhaps" not in find_in_training(rows, trained, named=True)[1]


def test_a_shared_model_does_not_know_who_trained_it(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    share_checkpoint(runs / "trajectory", tmp_path / "shared")
    data, out = write_data(table.head(9), tmp_path / "rows.csv"), tmp_path / "out.csv"
    predicted(tmp_path / "shared", data, out, "--explain", "--patients", "row 1,row 2")
    assert in_training(patients_path(out)) == ["not known", "not known"]
    unknown = "alone. The checkpoint does not hold its training patients: if these"
    assert unknown in Page(patients_path(out).read_text()).text


@pytest.mark.parametrize(("weight", "said"), [(0.0, True), (0.001, False), (None, False)])
def test_a_language_model_of_weight_zero_is_named(weight: float | None, said: bool) -> None:
    config = {} if weight is None else {"residual_weight": weight}
    expected = (
        "The language model has weight 0 and adds nothing: rows are ranked as by stage 1 alone."
    )
    assert weight_0_sentence(config) == (expected if said else "")


def test_an_id_of_markup_stays_text(runs: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    few = table.head(3).assign(id=["<script>x</script>", "b", "c"])
    data, out = write_data(few, tmp_path / "rows.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out, "--explain")
    source = patients_path(out).read_text()
    assert "<script" not in source
    assert "&lt;script&gt;" in source
