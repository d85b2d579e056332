"""``--predict``: the places of its input and output, stops, and figures on labelled rows."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.commands import predict
from medgemma_clinical.commands.predict import check_output, find_source
from medgemma_clinical.commands.run_folder import read_run, write_run
from medgemma_clinical.evaluation.cohort import Cohort, cohort_figures
from medgemma_clinical.evaluation.decision import threshold_text
from medgemma_clinical.evaluation.report import STAGE_NAMES
from medgemma_clinical.files import InputError, file_hash
from medgemma_clinical.inference.hub import share_checkpoint
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
from medgemma_clinical.models.checkpoints import (
    TRAJECTORY_FILE,
    read_trajectory,
    save_trajectory,
)
from medgemma_clinical.models.sharing.model_card import RANDOM_MODEL
from medgemma_clinical.models.trained_model import read_trained_config
from pages import Page
from predicting import (
    SERIES,
    STAGES,
    command,
    predicted,
    read_predictions,
    refused,
    write_data,
)

# --------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("srtr", {"organ": "kidney", "data_dir": Path("d")}, ["--organ kidney", "on liver"]),
        ("srtr", {"dataset": "dka", "data_dir": Path("d")}, ["--dataset dka", "on srtr"]),
        ("dka", {"organ": "liver", "data_path": Path("x.csv")}, ["on --dataset dka"]),
        ("srtr", {"data_path": Path("x.csv")}, ["on --dataset srtr", "--data_dir alone"]),
        ("dka", {"data_path": Path("x"), "data_dir": Path("d")}, ["--data_path alone"]),
        ("dka", {}, ["on --dataset dka", "--data_path alone"]),
    ],
)
def test_data_of_another_kind_than_the_checkpoints_are_refused(
    kind: str, flags: dict[str, Any], expected: list[str]
) -> None:
    reading = {"srtr": {"organ": "liver"}, "dka": {}}[kind]
    names = ("dataset", "organ", "data_path", "data_dir")
    request = Namespace(**{**dict.fromkeys(names), **flags})
    with pytest.raises(InputError) as error:
        find_source(request, {"dataset": kind, "reading": reading}, trainer.DATASETS)
    assert all(text in str(error.value) for text in expected)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("out.json", None, "give a .csv file in a folder that exists"),
        ("missing/out.csv", None, "give a .csv file in a folder that exists"),
        ("out.csv", "id,label,probability,patient\n1,0,0.5,1\n", "was not written by --predict"),
        ("out.csv", "id,probability,prediction,clinical_trajectory\n", "was not written by"),
        ("out.report.html", "<p>someone else's</p>", "out.report.html was not written by"),
        ("out.patients.html", "<p>someone else's</p>", "out.patients.html was not written by"),
    ],
)
def test_nothing_of_another_origin_is_written_over(
    name: str, content: str | None, problem: str, tmp_path: Path
) -> None:
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=problem):
        check_output(tmp_path / re.sub(r"\.(report|patients)\.html", ".csv", name))


@pytest.mark.parametrize("name", ["out.csv", "out.report.html", "out.patients.html"])
def test_a_folder_in_the_way_of_the_output_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=name):
        check_output(tmp_path / "out.csv")


def test_earlier_predictions_and_what_a_dead_run_left_are_replaced(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data, out = write_data(table.head(9), tmp_path / "rows.csv"), tmp_path / "new.csv"
    for name in (".new.csv.lock", ".new.csv.partial"):
        (tmp_path / name).write_text("left")
    first = predicted(runs / "trajectory", data, out)
    pd.testing.assert_frame_equal(predicted(runs / "trajectory", data, out), first)
    assert not list(tmp_path.glob("*.partial"))


def test_an_existing_output_stays_when_the_run_fails(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MEMORY_ROWS, "trajectory", 4)
    few = table.head(20).copy()
    few.loc[15, SERIES] = "oops"
    data, out = write_data(few, tmp_path / "bad.csv"), tmp_path / "out.csv"
    earlier = "id,probability,prediction,problem\n1,0.5,0,\n"
    out.write_text(earlier)
    assert trainer.main(command(runs / "trajectory", data, out, "--strict")) == 2
    cut = tmp_path / "bad.csv.gz"
    cut.write_bytes(gzip.compress(data.read_bytes())[:-40])
    assert trainer.main(command(runs / "trajectory", cut, out)) == 2
    assert out.read_text() == earlier

    def closed(*_: Any) -> None:
        assert list(tmp_path.glob(".out.csv*.partial")), "half a file is there"
        os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "count_implausible", closed)
        assert trainer.main(command(runs / "trajectory", data, out)) == 129
    assert not list(tmp_path.glob(".*.partial"))
    assert out.read_text() == earlier
    visible = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert visible == {"bad.csv", "bad.csv.gz", "bad.json", "out.csv"}
    assert trainer.main(command(runs / "trajectory", data, out)) == 0
    assert out.read_text() != earlier


def test_two_runs_do_not_write_one_file(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one starts while the first one writes."""
    few = table.head(20).drop(columns="label_escalation")
    data, out = write_data(few, tmp_path / "few.csv"), tmp_path / "out.csv"
    words, codes = command(runs / "trajectory", data, out), []
    table_of = predict.prediction_table

    def meanwhile(*given: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(predict, "prediction_table", table_of)
        codes.append(trainer.main(words))
        return table_of(*given, **keywords)

    monkeypatch.setattr(predict, "prediction_table", meanwhile)
    assert trainer.main(words) == 0
    assert codes == [2]
    assert len(read_predictions(out)) == len(few)
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_without_rows_is_refused(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out.csv", write_data(table.head(0), tmp_path / "empty.csv")
    assert refused(capsys, command(runs / "trajectory", data, out), "no rows", out=out)


# --------------------------------------------------------------------------- labelled rows


def test_figures_are_those_of_the_labelled_rows(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = table.copy()
    mixed.loc[::3, "label_escalation"] = ""
    bad = mixed.index[1]
    mixed.loc[bad, SERIES] = "oops"
    out = tmp_path / "out.csv"
    data = write_data(mixed, tmp_path / "mixed.csv")
    lines = predicted(runs / "trajectory", data, out, "--min_cell", "0")
    known = (mixed["label_escalation"] != "") & lines["probability"].notna()
    labels = mixed.loc[known, "label_escalation"].astype(int)
    score = roc_auc_score(labels, lines.loc[known, "probability"])
    shown = " ".join(capsys.readouterr().out.split())
    counts = f"{int(known.sum())} rows, {labels.sum()} events"
    assert f"rows with a label: {counts} AUROC: {score:.3f} [" in shown
    page = out.with_suffix(".report.html").read_text()
    config = read_trained_config(runs / "trajectory")
    assert f"a risk of {threshold_text(config['decision']['threshold'])}" in page
    assert f"AUROC {score:.3f} [" in page
    assert "Case mix" in page
    (row,) = re.findall(r"<tr>\s*<th[^>]*>Rows</th>(.*?)</tr>", page, re.DOTALL)
    expected = [f"{config['case_mix']['rows']:,.0f}", f"{int(known.sum()):,}"]
    assert expected == re.findall(r"<td>\s*(.*?)\s*</td>", row, re.DOTALL)
    assert f"{int(known.sum()):,} rows with a score and a label" in page
    assert not any(f">{i}<" in page for i in mixed["id"]), "no id of a patient"
    few = write_data(table.head(3).assign(label_escalation="0"), tmp_path / "few.csv")
    predicted(runs / "trajectory", few, out)
    assert "one class only" in capsys.readouterr().out
    assert not out.with_suffix(".report.html").exists(), "the report of other predictions"


def result_of(page: Path) -> str:
    """Return the words of the box at the top of a report."""
    text = page.read_text()
    start = text.index('<section class="verdict')
    return Page(text[start : text.index("</section>", start) + len("</section>")]).text


@pytest.mark.parametrize("stage", STAGES)
def test_the_report_says_first_how_many_judged_patients_trained(
    stage: str,
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of the run; other people under its identifiers, and under their own; no identifiers."""
    monkeypatch.setitem(MEMORY_ROWS, stage, 30)
    parts = [runs / stage / f"predictions_{part}.csv" for part in ("val", "test")]
    held_out = pd.concat(pd.read_csv(path, dtype=str)["patient"] for path in parts)
    trained = (~table["subject_id"].isin(held_out)).sum()
    others = pd.read_csv(SAMPLE, dtype=str).iloc[200:300].assign(id=table["id"].to_numpy())
    strangers = others.assign(subject_id=table["subject_id"].to_numpy())
    pseudonyms = table.assign(subject_id=[f"pseudonym {k}" for k in range(100)])
    for rows, sentence in (
        (table, f"{trained} of these 100 patients trained the model: the figures flatter it."),
        (
            strangers,
            f"{trained} of these 100 patients have the identifier of a patient who trained",
        ),
        (others, "No patient here has the identifier, or the last values, of one who trained"),
        (pseudonyms, "of these 100 patients have the last values, hours and outcome"),
        (table.drop(columns=["subject_id", "id"]), "of these 100 patients have the last values"),
    ):
        out = tmp_path / "out.csv"
        predicted(runs / stage, write_data(rows, tmp_path / "cohort.csv"), out, "--min_cell", "0")
        shown = capsys.readouterr().out
        page = out.with_suffix(".report.html")
        assert sentence in Page(page.read_text()).text, "among the facts on the data"
        warned = rows is not others
        assert (sentence in result_of(page)[: len("100 ") + len(sentence)]) == warned
        assert (sentence in shown.partition("than chance")[0]) == warned
        title = f"In-hospital death: {STAGE_NAMES[stage]} on the rows of cohort.csv"
        assert f"<title>{title}</title>" in page.read_text()


def test_a_checkpoint_without_its_training_patients_says_so(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    """As a shared copy; as a later stage beside another stage 1 or a damaged file."""
    share_checkpoint(runs / "trajectory", tmp_path / "shared")
    whole = tmp_path / "whole"
    shutil.copytree(runs / "classification", whole / "classification")
    shutil.copy(runs / TRAJECTORY_FILE, whole)
    for name in ("alone", "another", "garbage", "damaged", "other_rows"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "alone" / TRAJECTORY_FILE).unlink()
    (tmp_path / "damaged" / "classification" / "run.json").write_text("{")
    other = read_trajectory(runs / TRAJECTORY_FILE)
    path, trained = tmp_path / "another" / TRAJECTORY_FILE, other.train_patients
    save_trajectory(path, other.weights, other.config, trained[1:].copy())
    (tmp_path / "garbage" / TRAJECTORY_FILE).write_bytes(b"no checkpoint")
    other.config["rows_sha256"] = "0" * 64
    path = tmp_path / "other_rows" / TRAJECTORY_FILE
    save_trajectory(path, other.weights, other.config, trained)
    for name in ("garbage", "other_rows"):
        folder, digest = (
            tmp_path / name / "classification",
            file_hash(tmp_path / name / TRAJECTORY_FILE),
        )
        write_run(folder, {**(read_run(folder) or {}), "stage_1_sha256": digest})
    data = write_data(table, tmp_path / "cohort.csv")
    unknown = "The checkpoint does not hold its training patients: if these "
    for checkpoint in (tmp_path / "shared", *sorted(tmp_path.glob("*/classification"))):
        predicted(checkpoint, data, tmp_path / "out.csv")
        known = checkpoint.parent == whole
        result = result_of(tmp_path / "out.report.html")
        assert result.startswith(unknown) == (not known), checkpoint


def test_a_checkpoint_finds_its_stage_1_from_any_folder(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainer.TrajectoryModel.from_pretrained(runs / "classification").trained
    for folder, name in (("classification", "."), ("classification", "best"), ("", "generative")):
        monkeypatch.chdir(runs / folder)
        assert len(predict.training_patients(model, Path(name))[0])


def test_the_page_of_a_run_with_the_random_model_says_so(
    runs: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    data = write_data(table, tmp_path / "new.csv")
    for stage in ("classification", "trajectory"):
        out = tmp_path / f"{stage}.csv"
        predicted(runs / stage, data, out)
        page = out.with_suffix(".report.html").read_text()
        assert (RANDOM_MODEL in page) == (stage == "classification")


def test_figures_of_many_chunks_are_those_of_one(
    runs: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table.copy()
    rows["subject_id"] = [f"p{k % 17}" for k in range(len(rows))]  # a patient in many chunks
    data = write_data(rows, tmp_path / "rows.csv")
    judged: list[Cohort] = []

    def kept(cohort: Cohort, *rest: Any) -> Any:
        judged.append(cohort)
        return cohort_figures(cohort, *rest)

    monkeypatch.setattr(predict, "cohort_figures", kept)
    for name, size in (("one", 10_000), ("many", 7)):
        monkeypatch.setitem(MEMORY_ROWS, "trajectory", size)
        predicted(runs / "trajectory", data, tmp_path / f"{name}.csv")
    one, many = judged
    assert len(np.unique(many.groups)) == 17
    np.testing.assert_array_equal(one.labels, many.labels)
    np.testing.assert_array_equal(one.groups, many.groups)
    np.testing.assert_allclose(one.probability, many.probability, atol=1e-6)
    pd.testing.assert_frame_equal(one.subgroups, many.subgroups)
    out = read_predictions(tmp_path / "many.csv")
    np.testing.assert_array_equal(many.probability, out["probability"])


def test_a_run_that_was_not_finished_has_no_threshold(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    whole = torch.load(runs / "medgemma_trajectory_best.pt", weights_only=True)
    del whole["config"]["decision"]
    torch.save(whole, tmp_path / "early.pt")
    data = write_data(table.head(9).drop(columns="label_escalation"), tmp_path / "rows.csv")
    out = predicted(tmp_path / "early.pt", data, tmp_path / "new.csv")
    assert "the checkpoint has no threshold" in capsys.readouterr().out
    assert (out["prediction"] == (out["probability"] >= 0.5)).all()
    predicted(runs / "trajectory", data, tmp_path / "new.csv")
    assert "has no threshold" not in capsys.readouterr().out


def test_an_interrupted_report_leaves_the_predictions_and_no_page_of_others(
    runs: Path,
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = write_data(table, tmp_path / "new.csv"), tmp_path / "out.csv"
    predicted(runs / "trajectory", data, out)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "write_report", interrupted)
    capsys.readouterr()
    assert trainer.main(command(runs / "trajectory", data, out)) == 130
    assert f"predictions: {out}" in capsys.readouterr().out
    assert len(pd.read_csv(out)) == len(table)
    assert not out.with_suffix(".report.html").exists(), "the page of other predictions"


def test_the_page_on_labelled_rows_shows_no_small_cell(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = table["label_escalation"].astype(int)
    few = pd.concat([table[events == 1].head(7), table[events == 0].head(60)])
    few.loc[few.index[-3:], SERIES] = "oops"
    data, out = write_data(few, tmp_path / "few.csv"), tmp_path / "out.csv"
    assert trainer.main(command(runs / "trajectory", data, out)) == 0
    assert "rows with a label: 64 rows, events not shown" in capsys.readouterr().out
    page = out.with_suffix(".report.html").read_text()
    assert "without a score; without a label" in page
    assert "<td>fewer than 11</td>" in page
    assert "no figure is shown (--min_cell 0 shows all" in page
    assert "AUROC" not in page
    assert trainer.main(command(runs / "trajectory", data, out, "--min_cell", "0")) == 0
    assert "rows with a label: 64 rows, 7 events" in capsys.readouterr().out
    page = out.with_suffix(".report.html").read_text()
    assert "<td>3</td>" in page
    assert "ROC curve" in page
    tiny = write_data(few.head(10), tmp_path / "tiny.csv")
    assert trainer.main(command(runs / "trajectory", tiny, out)) == 0
    assert "labelled rows: fewer than 11, too few" in capsys.readouterr().out
    assert not out.with_suffix(".report.html").exists()


def test_ids_that_a_spreadsheet_would_run_stay_and_are_counted(
    runs: Path, table: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["=HYPERLINK(1)", "+A1", "-x", "@x", "-5", "+1e3", "a=b", "7", "x"]
    rows = table.head(9).drop(columns="label_escalation").assign(id=ids)
    data, out = write_data(rows, tmp_path / "rows.csv"), tmp_path / "new.csv"
    assert predicted(runs / "trajectory", data, out)["id"].tolist() == ids
    warning = "4 ids begin like a formula: a spreadsheet would run them: import the column as text"
    assert capsys.readouterr().out.count(warning) == 1
    data = write_data(rows.tail(5), tmp_path / "rows.csv")
    predicted(runs / "trajectory", data, out)
    assert "formula" not in capsys.readouterr().out
