"""Scored rows: as the run scored them, in order, the unreadable ones with their problem."""

import gzip
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE
from dataset_format import MIMICtrajectoryDataset, read_description
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.files import InputError
from medgemma_clinical.inference import scoring
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM
from predicting import MARKER, SERIES, STAGES, command, predicted, refused, spoil, write_data

pytestmark = pytest.mark.slow

STAGE_1 = STAGE_NAMES["trajectory"]


@pytest.fixture(scope="module")
def rows(runs, table):
    """The first rows, and all that a run of the table held out."""
    parts = [pd.read_csv(path)["id"] for path in (runs / "trajectory").glob("predictions_*.csv")]
    return table[table["id"].isin(pd.concat([*parts, table["id"].head(16)]))]


@pytest.fixture(scope="module")
def scored(runs, rows, tmp_path_factory):
    """The predictions of each stage, in batches of another size."""
    out = tmp_path_factory.mktemp("scored")
    files = write_data(rows, out / "rows.csv"), out / "out.csv"
    return {stage: predicted(runs / stage, *files, "--batch_size", "7") for stage in STAGES}


def set_rows(monkeypatch, rows):
    """Let so many rows of a file be in memory at a time."""
    for stage in STAGES:
        monkeypatch.setitem(MEMORY_ROWS, stage, rows)


def same(one, other):
    """Compare two tables of predictions."""
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_are_those_of_the_run(stage, runs, rows, scored):
    out = scored[stage]
    assert out["id"].tolist() == rows["id"].tolist()  # the input's order
    report = ["report"] if stage == "generative" else []
    others = [name for name in out if name.startswith("probability_")]
    assert list(out) == ["id", "probability", "prediction", *report, "problem", *others]
    by_id = out.set_index("id")
    assert by_id["probability"].std() > 1e-4  # equal constants would prove nothing
    for part in ("val", "test"):
        own = pd.read_csv(runs / stage / f"predictions_{part}.csv").set_index("id")
        assert np.abs(by_id["probability"] - own["probability"]).max() < 1e-6
        no_baselines = ["label", "probability", "patient", STAGE_1, "model_sha256"]
        own = own.drop(columns=no_baselines, errors="ignore")
        assert others == ["probability_" + re.sub(r"\W+", "_", name) for name in own]
        if part == "val":  # there the baselines are those that did not learn from it
            continue
        for name, column in zip(own, others, strict=True):
            assert np.abs(by_id[column] - own[name]).max() < 1e-6, name  # six digits
    threshold = json.loads((runs / stage / "metrics.json").read_text())["threshold"]
    assert (out["prediction"] == (out["probability"] >= threshold)).all(), "as written"
    assert set(out["prediction"]) == {0, 1}


def test_reports_are_those_of_the_run_and_begin_with_the_verdict_of_the_prediction(runs, scored):
    out = scored["generative"]
    lines = (runs / "generative" / "generations_test.jsonl").read_text().splitlines()
    own = {line["id"]: line["text"] for line in map(json.loads, lines)}
    written = out.set_index("id")["report"]
    assert {i: written[i] for i in own} == own
    outcome = json.loads(SAMPLE.with_suffix(".json").read_text())["outcome"]
    words = out["prediction"].map({0: f"{outcome}: no", 1: f"{outcome}: yes"})
    assert all(r.startswith(w) for r, w in zip(out["report"], words, strict=True))


def test_a_report_that_does_not_parse_is_a_problem_and_the_score_stays(
    runs, table, tmp_path, scored, monkeypatch
):
    few = table.head(16).drop(columns="label_escalation")
    few.loc[3, SERIES] = f"24 ({MARKER}h)"

    def write(scores, *_):
        """Write the true reports; that of each third row breaks off."""
        dataset = scores.rows.dataset
        dataset.labels = scores.positive.astype(float)
        texts = [dataset.report(i) for i in range(len(dataset))]
        return [text[:-9] if k % 3 == 0 else text for k, text in enumerate(texts)]

    monkeypatch.setattr(scoring, "reports_of", write)
    data = write_data(few, tmp_path / "few.csv")
    out = predicted(runs / "generative", data, tmp_path / "out.csv")
    assert SERIES in out["problem"][3]
    fine, own = out.drop(index=3), scored["generative"].head(16).drop(index=3)
    assert (fine["problem"] != "").tolist() == [k % 3 == 0 for k in range(15)]
    same(fine[["id", "probability", "prediction"]], own[["id", "probability", "prediction"]])
    data = write_data(few.drop(index=3), data)
    strict = predicted(runs / "generative", data, tmp_path / "strict.csv", "--strict")
    assert (strict["problem"] != "").sum() == 5, "the row can be scored"


@pytest.mark.parametrize("stage", ["classification", "generative"])
def test_a_batch_that_does_not_fit_the_memory_is_scored_in_parts(
    stage, runs, table, scored, tmp_path, monkeypatch, capsys
):
    """On the command line and from Python: the same risks, and one row that is too long."""
    read, tries = TrajectoryLLM.read, []

    def limited(model, batch, trajectory):
        tries.append(len(batch["index"]))
        if tries[-1] > room:
            raise torch.OutOfMemoryError(MARKER)
        return read(model, batch, trajectory)

    monkeypatch.setattr(TrajectoryLLM, "read", limited)
    few = table.head(16).drop(columns="label_escalation")
    data, room = write_data(few, tmp_path / "few.csv"), 5
    known = scored[stage].head(16)[["probability", "prediction"]]
    same(predicted(runs / stage, data, tmp_path / "out.csv")[[*known]], known)
    model = trainer.TrajectoryModel.from_pretrained(runs / stage)
    np.testing.assert_allclose(model.predict_proba(few)[:, 1], known["probability"], atol=1e-6)
    assert tries == [16, 8, 4, 4, 4, 4] * 2
    room = 0
    words = command(runs / stage, data, tmp_path / "none.csv")
    assert refused(capsys, words, "--max_text_tokens", code=3, out=tmp_path / "none.csv")


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
        assert problem.partition(":")[0] in out["problem"][row]
    fine = out["problem"] == ""
    assert out["probability"].notna().equals(fine)
    for column in out.filter(regex="^(prediction|probability_)"):
        assert out[column].notna().equals(fine), column
    alone = write_data(bad[fine.to_numpy()], tmp_path / "good.csv")
    same(
        out[fine].reset_index(drop=True), predicted(runs / stage, alone, tmp_path / "good_out.csv")
    )
    shown = capsys.readouterr()
    assert MARKER not in shown.out + shown.err + "".join(out["problem"])


@pytest.mark.parametrize("row", [3, 12])
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


@pytest.mark.parametrize("ending", ["csv.gz", "parquet"])
def test_chunks_and_storage_do_not_matter(ending, runs, table, tmp_path, monkeypatch):
    bad, _ = spoil(table)
    whole = predicted(runs / "trajectory", write_data(bad, tmp_path / "a.csv"), tmp_path / "0.csv")
    data = tmp_path / f"a.{ending}"
    if ending == "csv.gz":
        data.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    else:
        # With a pandas index, as saved from pandas.
        bad.assign(hours=1.5).set_index("subject_id").to_parquet(data, row_group_size=7)
    sizes, score = [], scoring.score_rows
    monkeypatch.setattr(
        scoring, "score_rows", lambda rows, *more: sizes.append(len(rows.ids)) or score(rows, *more)
    )
    for rows in (7, 30):
        set_rows(monkeypatch, rows)
        same(predicted(runs / "trajectory", data, tmp_path / f"{rows}.csv"), whole)
        assert max(sizes) <= rows
        assert sum(sizes) == 30
        sizes.clear()


def test_a_file_without_ids_names_rows_as_the_run_does(runs, table, tmp_path, monkeypatch):
    set_rows(monkeypatch, 4)
    data = write_data(table.head(10).drop(columns=["id", "subject_id"]), tmp_path / "plain.csv")
    out = predicted(runs / "trajectory", data, tmp_path / "out.csv")
    assert out["id"].tolist() == [str(k) for k in range(2, 12)]


def test_rows_with_a_value_outside_the_declared_limits_are_counted_once(table):
    few, findings = table.head(5).copy(), Findings("few", strict=False)
    few.loc[1, SERIES] = "2400 (0h) -> 2300 (1h)"
    described = read_description(SAMPLE)
    scoring.count_implausible(MIMICtrajectoryDataset(few, description=described), findings)
    assert sum(findings.counts.values()) == 1


def test_a_text_that_is_too_long_is_a_problem_of_its_row(runs, table):
    model = trainer.TrajectoryModel.from_pretrained(runs / "classification")
    model.config["max_text_tokens"] = 400
    few = table.head(6).copy()
    few.loc[2, "clinical_context"] = "very " * 200
    problems = model.predictions(few)["problem"]
    assert [row for row, text in enumerate(problems) if text] == [2]
    with pytest.raises(InputError, match="row 2"):
        model.predict_proba(few)


def test_a_score_that_is_no_number_is_a_problem_of_its_row(runs, table, monkeypatch):
    outputs = scoring.outputs

    def broken(*given):
        for batch, output in outputs(*given):
            output.logit[batch["index"] == 3] = np.nan
            yield batch, output

    monkeypatch.setattr(scoring, "outputs", broken)
    lines = trainer.TrajectoryModel.from_pretrained(runs / "trajectory").predictions(table.head(9))
    for bad in (lines["probability"].isna(), lines["problem"] != ""):
        assert bad.tolist() == [k == 3 for k in range(9)]


def test_several_series_are_read_by_name_and_others_ignored(tmp_path, capsys):
    few, rng = pd.read_csv(SAMPLE, nrows=60, dtype=str), np.random.default_rng(0)
    few["trajectory_lactate [mmol/L]"] = [f"{v:.1f} (3h)" for v in rng.uniform(1, 9, 60)]
    few["trajectory_pH"] = ["" if k % 3 else "7.2 (1h)" for k in range(60)]
    data, run = write_data(few, tmp_path / "train.csv"), tmp_path / "trajectory"
    words = ["--output_dir", str(tmp_path), "--log_file", "none", "--data_path", str(data)]
    words += ["--trajectory_only", "--trajectory_epochs", "1", "--series", "lactate,pH"]
    assert trainer.main(words) == 0
    columns = [few.columns[0], "trajectory_pH", SERIES, "trajectory_lactate [mmol/L]"]
    other = few[[*columns, *few.filter(like="static_")]].assign(
        age="50", **{"trajectory_K": "4 (0h)"}
    )
    out = predicted(run, write_data(other, data), tmp_path / "out.csv").set_index("id")
    own = pd.read_csv(run / "predictions_test.csv", dtype={"id": str}).set_index("id")
    assert np.abs(out.loc[own.index, "probability"] - own["probability"]).max() < 1e-6
    lacks, target = write_data(other.drop(columns="trajectory_pH"), data), tmp_path / "absent.csv"
    assert refused(capsys, command(run, lacks, target), "pH", "lactate", out=target)


def test_columns_of_sex_stay_for_the_subgroups_and_others_go(runs, table):
    config = trainer.TrajectoryModel.from_pretrained(runs / "trajectory").config
    more = table.assign(**{"static_sex d": "0", "static_shoe": "43"})
    (chunk,) = MIMICtrajectoryDataset.scoring_rows(more, config, Findings("DataFrame"), 1000)
    names = chunk.dataset.static_names
    assert ("static_sex d" in names, "static_shoe" in names) == (True, False)
