"""Scored rows: as the run scored them, in order, the unreadable ones with their problem."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.commands import predict
from medgemma_clinical.evaluation import decision
from medgemma_clinical.inference import scoring
from medgemma_clinical.inference.scoring import NO_FORM
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
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


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory):
    """The predictions of each stage for its whole file."""
    out = tmp_path_factory.mktemp("scored")  # the runs are shared by all workers
    more = ("--batch_size", "7")
    return {
        stage: predicted(runs / stage, runs / "train.csv", out / f"{stage}.csv", *more)
        for stage in STAGES
    }


def set_rows(monkeypatch, rows):
    """Let so many rows of a file be in memory at a time."""
    for stage in STAGES:
        monkeypatch.setitem(MEMORY_ROWS, stage, rows)


# --------------------------------------------------------------------------- as the run


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_are_those_of_the_run(stage, runs, table, scored):
    out = scored[stage]
    assert out["id"].tolist() == table["id"].tolist()  # the input's order
    assert list(out)[-1] == "problem"
    whole = "" if stage != "generative" else NO_FORM  # a random model writes no report
    assert (out["problem"] == whole).all()
    known = out.set_index("id")["probability"]
    assert known.std() > 1e-4  # equal constants would prove nothing
    for part in ("val", "test"):
        own = pd.read_csv(runs / stage / f"predictions_{part}.csv").set_index("id")
        assert np.abs(known[own.index] - own["probability"]).max() < 1e-6
    threshold = json.loads((runs / stage / "metrics.json").read_text())["threshold"]
    clear = (out["probability"] - threshold).abs() > 1e-6  # at the very threshold sums may round
    assert (out["prediction"] == (out["probability"] >= threshold))[clear].all()
    assert set(out["prediction"]) == {0, 1}


def test_reports_are_those_of_the_run(runs, scored):
    out = scored["generative"]
    assert list(out) == ["id", "probability", "prediction", "report", "problem"]
    assert ",".join(map(str, out)) + "\n" in predict.HEADERS, "a second run replaces the file"
    lines = (runs / "generative" / "generations_test.jsonl").read_text().splitlines()
    own = {line["id"]: line["text"] for line in map(json.loads, lines)}
    written = out.set_index("id")["report"]
    assert {i: written[i] for i in own} == own


def test_each_report_gives_the_verdict_of_its_prediction(runs, scored):
    out = scored["generative"]
    outcome = json.loads(SAMPLE.with_suffix(".json").read_text())["outcome"]
    words = out["prediction"].map({0: f"{outcome}: no", 1: f"{outcome}: yes"})
    assert [r.startswith(w) for r, w in zip(out["report"], words, strict=True)] == [True] * 100
    assert words.nunique() == 2


def test_a_report_that_does_not_parse_is_a_problem_and_the_score_stays(
    runs, table, tmp_path, scored, monkeypatch, capsys
):
    few = table.head(16).drop(columns="label_escalation")
    few.loc[3, SERIES] = f"24 ({MARKER}h)"

    def write(scores, *_):
        """Write the true reports; that of each third row breaks off."""
        dataset = scores.rows.dataset
        dataset.labels = scores.alarms.astype(float)
        texts = [dataset.report(i) for i in range(len(dataset))]
        return [text[:-9] if k % 3 == 0 else text for k, text in enumerate(texts)]

    monkeypatch.setattr(scoring, "reports_of", write)
    data = write_data(few, tmp_path / "few.csv")
    out = predicted(runs / "generative", data, tmp_path / "out.csv")
    assert f"column {SERIES}" in out["problem"][3]
    fine = out.drop(index=3)
    assert fine["problem"].tolist() == [NO_FORM if k % 3 == 0 else "" for k in range(15)]
    own = scored["generative"].head(16).drop(index=3)
    assert np.abs(fine["probability"] - own["probability"]).max() < 1e-6
    assert fine["prediction"].tolist() == own["prediction"].tolist()
    shown = capsys.readouterr().out
    assert f"fewer than 11 rows have a score, but {NO_FORM}" in shown
    assert "16 rows: 15 scored" in shown
    assert "1 without a score" in shown
    strict = predicted(
        runs / "generative", write_data(few.drop(index=3), data), tmp_path / "s.csv", "--strict"
    )
    assert (strict["problem"] == NO_FORM).sum() == 5, "the row can be scored"


def test_word_prediction_and_probability_agree_in_every_row_of_several_series(
    tmp_path, monkeypatch
):
    # Whatever a tiny model has learned, each verdict is taken for about half of the rows.
    monkeypatch.setattr(decision, "youden_threshold", lambda _, risks: float(np.median(risks)))
    few = pd.read_csv(SAMPLE.with_name("physionet2012_chemistry.csv.gz"), nrows=80, dtype=str)
    data = write_data(few, tmp_path / "train.csv")
    words = ["--mode", "generative", "--series", "serum bicarbonate,potassium,pH", "--min_cell"]
    words += ["0", "--data_path", str(data), "--output_dir", str(tmp_path), "--log_file", "none"]
    words += ["--model_name", "tiny", "--epochs", "1", "--adapter_lr", "0.01"]
    assert trainer.main(words) == 0
    folder = tmp_path / "generative"
    page = (folder / "report.html").read_text(encoding="utf-8")
    for line in ("1 is not shown: this model builds on none", "2 is not shown: this output folder"):
        assert f"Stage {line}" in page
    threshold = json.loads((folder / "metrics.json").read_text())["threshold"]
    out = predicted(folder, data, tmp_path / "out.csv")
    assert out["prediction"].nunique() == 2
    assert (out["prediction"] == (out["probability"] >= threshold)).all()
    told = out["report"].str.extract("^In-hospital death: (yes|no)")[0]
    assert (told == out["prediction"].map({0: "no", 1: "yes"})).all()
    lines = pd.read_json(folder / "generations_test.jsonl", lines=True, dtype={"id": str})
    assert lines["target"].str.contains("potassium: .*ph: ", regex=True).all()
    told = lines["text"].str.extract("^In-hospital death: (yes|no)")[0]
    assert (told == lines["verdict"].map({0: "no", 1: "yes"})).all()
    assert (lines["verdict"] == (lines["probability"] >= threshold)).all()
    assert lines["verdict"].tolist() == out.set_index("id")["prediction"][lines["id"]].tolist()


def test_labels_may_be_missing_wrong_or_absent_however_strict(runs, table, tmp_path):
    stage = "classification"
    few = table.head(20).assign(label_escalation="0")
    whole = predicted(runs / stage, write_data(few, tmp_path / "whole.csv"), tmp_path / "1.csv")
    labels = few.assign(label_escalation=["", "2", "yes", "1"] * 5, split="nowhere")
    for name, changed in {"labels": labels, "none": few.drop(columns="label_escalation")}.items():
        data = write_data(changed, tmp_path / f"{name}.csv")
        again = predicted(runs / stage, data, tmp_path / f"{name}_out.csv", "--strict")
        pd.testing.assert_frame_equal(again, whole, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(("stage", "rows"), [("trajectory", 3), ("classification", 1000)])
def test_bad_rows_are_kept_with_their_problem(
    stage, rows, runs, table, tmp_path, monkeypatch, capsys
):
    set_rows(monkeypatch, rows)
    bad, problems = spoil(table)
    out = predicted(runs / stage, write_data(bad, tmp_path / "bad.csv"), tmp_path / "out.csv")
    assert out["id"].tolist() == bad["id"].tolist()
    assert {row for row, problem in enumerate(out["problem"]) if problem} == set(problems)
    for row, problem in problems.items():
        assert problem in out["problem"][row]
    fine = out["problem"] == ""
    assert out["probability"].notna().equals(fine)
    assert out["prediction"].notna().equals(fine)
    alone = write_data(bad[fine.to_numpy()], tmp_path / "good.csv")
    good = predicted(runs / stage, alone, tmp_path / "good_out.csv")
    same = out[fine].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, good, rtol=0, atol=1e-6, check_dtype=False)
    shown = capsys.readouterr()
    assert MARKER not in shown.out + shown.err
    assert MARKER not in "".join(out["problem"])
    assert "30 rows: 23 scored" in shown.out
    assert shown.out.count("1 rows were not in time order") == 2  # once a command, not a chunk


def test_a_row_with_too_many_fields_is_kept_with_its_problem(runs, tmp_path):
    data = write_data(pd.DataFrame({"id": [], SERIES: []}), tmp_path / "bad.csv")
    header = f"id,{SERIES},clinical_context"
    data.write_text(f"{header}\na,24 (0h),\n\nb,24 (0h),,22 (1h)\nc,24 (0h),\n")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert out["id"].tolist() == ["a", "b", "c"]
    assert out["probability"].isna().tolist() == [False, True, False]
    assert "4 fields where the header has 3" in out["problem"][1]


@pytest.mark.parametrize("row", [3, 11, 12])
def test_strict_refuses_the_file_with_row_and_column(
    row, runs, table, tmp_path, monkeypatch, capsys
):
    set_rows(monkeypatch, 4)  # the row counts in the file, not in a chunk
    bad, problems = spoil(table)
    good = table.head(30).drop(columns="label_escalation")
    good.loc[row] = bad.loc[row]
    data, out = write_data(good, tmp_path / "bad.csv"), tmp_path / "out.csv"
    where = problems[row].split(":")[0]
    words = command(runs / "trajectory", data, out, "--strict")
    assert refused(capsys, words, f"bad.csv, row {row + 2}", where, out=out)
    assert MARKER not in "".join(capsys.readouterr())


def test_a_text_that_is_too_long_is_a_problem_of_its_row(
    runs, table, tmp_path, monkeypatch, capsys
):
    load = trainer.TrajectoryModel.from_pretrained

    def with_a_limit(*given, **keywords):
        model = load(*given, **keywords)
        model.config["max_text_tokens"] = 400
        return model

    monkeypatch.setattr(trainer.TrajectoryModel, "from_pretrained", with_a_limit)
    few, out = table.head(6).copy(), tmp_path / "out.csv"
    few.loc[2, "clinical_context"] = "very " * 200
    data = write_data(few, tmp_path / "long.csv")
    lines = predicted(runs / "classification", data, out)
    assert [row for row, text in enumerate(lines["problem"]) if text] == [2]
    assert "longer than 400 tokens" in lines["problem"][2]
    out.unlink()
    words = command(runs / "classification", data, out, "--strict")
    assert refused(capsys, words, "row 4", "400 tokens")
    assert not out.exists()


def test_a_score_that_is_no_number_is_a_problem_of_its_row(runs, table, tmp_path, monkeypatch):
    outputs = scoring.outputs

    def broken(*given):
        for batch, output in outputs(*given):
            output.logit[batch["index"] == 3] = np.nan
            yield batch, output

    monkeypatch.setattr(scoring, "outputs", broken)
    data = write_data(table.head(9), tmp_path / "few.csv")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert out["probability"].isna().tolist() == [k == 3 for k in range(9)]
    assert "no finite score" in out["problem"][3]


# --------------------------------------------------------------------------- chunks and storage


@pytest.mark.parametrize("ending", ["csv.gz", "parquet"])
def test_chunks_and_storage_do_not_matter(ending, runs, table, tmp_path, monkeypatch):
    bad, _ = spoil(table)
    whole = predicted(runs / "trajectory", write_data(bad, tmp_path / "a.csv"), tmp_path / "0.csv")
    data = tmp_path / f"a.{ending}"
    if ending == "csv.gz":
        data.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    elif ending == "parquet":
        pytest.importorskip("pyarrow")
        # With a pandas index, as saved from pandas.
        bad.assign(hours=1.5).set_index("subject_id").to_parquet(data, row_group_size=7)
    for rows in (7, 30):
        set_rows(monkeypatch, rows)
        out = predicted(runs / "trajectory", data, tmp_path / f"{rows}.csv")
        pd.testing.assert_frame_equal(out, whole, rtol=0, atol=1e-6)


def test_few_rows_are_held_at_a_time_and_nothing_of_those_without_a_label(
    runs, table, tmp_path, monkeypatch
):
    set_rows(monkeypatch, 8)
    held = []
    tallies = []
    add = predict.PredictionTally.add

    def counted(self, lines, rows):
        held.append(len(rows.dataset))
        tallies.append(self)
        add(self, lines, rows)

    monkeypatch.setattr(predict.PredictionTally, "add", counted)
    data = write_data(table.drop(columns="label_escalation"), tmp_path / "many.csv")
    predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert (max(held), sum(held)) == (8, 100)
    assert (tallies[-1].rows, sum(map(len, tallies[-1].labelled))) == (100, 0)


def test_a_file_without_ids_names_rows_as_the_run_does(runs, table, tmp_path, monkeypatch):
    set_rows(monkeypatch, 4)
    data = write_data(table.head(10)[[SERIES, "clinical_context"]], tmp_path / "plain.csv")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert out["id"].tolist() == [str(k) for k in range(2, 12)]


# --------------------------------------------------------------------------- kinds of data


@pytest.mark.parametrize("kind", ["unit", "outcome", "none"])
def test_a_file_of_another_kind_is_refused_with_what_differs(kind, runs, table, tmp_path, capsys):
    words = {
        "unit": {"unit": "mg/dL"},
        "outcome": {"outcome": "Stroke"},
    }
    data = write_data(table, tmp_path / "other.csv", **words.get(kind, {}))
    if kind == "none":
        data.with_suffix(".json").unlink()
    expected = {
        "unit": ("mmol/L", "mg/dL"),
        "outcome": ("In-hospital death", "Stroke"),
        "none": ("Serum bicarbonate", "Anion gap", "JSON"),
    }
    out = tmp_path / "out.csv"
    asked = command(runs / "classification", data, out)
    assert refused(capsys, asked, *expected[kind], out=out)


def test_several_series_are_read_by_name_and_others_ignored(tmp_path, capsys):
    rng = np.random.default_rng(0)
    few = pd.read_csv(SAMPLE, nrows=60, dtype=str)
    few["trajectory_lactate [mmol/L]"] = [f"{v:.1f} (3h)" for v in rng.uniform(1, 9, 60)]
    few["trajectory_pH"] = ["" if k % 3 else "7.2 (1h)" for k in range(60)]
    data = write_data(few, tmp_path / "train.csv")
    place = ["--output_dir", str(tmp_path), "--log_file", "none"]
    place += ["--trajectory_only", "--trajectory_epochs", "1", "--data_path", str(data)]
    assert trainer.main([*place, "--series", "lactate,pH"]) == 0
    columns = [few.columns[0], "trajectory_pH", SERIES, "trajectory_lactate [mmol/L]"]
    other = few[[*columns, "clinical_context"]].assign(age="50", **{"trajectory_K": "4 (0h)"})
    new = write_data(other, tmp_path / "new.csv")
    out = predicted(tmp_path / "trajectory", new, tmp_path / "out.csv").set_index("id")
    own = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv", dtype={"id": str})
    difference = out["probability"][own["id"]].to_numpy() - own["probability"].to_numpy()
    assert np.abs(difference).max() < 1e-6
    other.loc[3, "trajectory_pH"] = "sour"
    other.loc[4, ["trajectory_pH", "trajectory_lactate [mmol/L]"]] = ""
    out = predicted(tmp_path / "trajectory", write_data(other, new), tmp_path / "out.csv")
    assert "column trajectory_pH: piece 1" in out["problem"][3]
    assert "no series of this row" in out["problem"][4]
    assert (out["problem"] != "").sum() == 2
    lacks = write_data(other.drop(columns="trajectory_pH"), tmp_path / "lacks.csv")
    target = tmp_path / "absent.csv"
    words = command(tmp_path / "trajectory", lacks, target)
    assert refused(capsys, words, "pH", "lactate", out=target)


def test_values_outside_declared_limits_are_counted_by_row(runs, table, tmp_path, capsys):
    few = table.head(5).copy()
    few.loc[1, SERIES] = "2400 (0h) -> 2300 (1h)"
    data = write_data(few, tmp_path / "few.csv")
    predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert "1 rows hold values of Serum bicarbonate outside" in capsys.readouterr().out
