"""``predict``: its input, output and stops, the inputs of a model, labelled rows, checkpoints."""

import gzip
import json
import os
import re
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import medgemma_trainer as trainer
from conftest import SAMPLE
from language_models import TINY_MODEL
from medgemma_clinical.commands import predictions, results
from medgemma_clinical.data.overlap import TrainingPatients
from medgemma_clinical.evaluation.decision import choose_threshold
from medgemma_clinical.evaluation.metrics import of_labels
from medgemma_clinical.files import json_hash
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory, save_trajectory
from medgemma_clinical.models.trained_model import read_trained_config
from predicting import SERIES, STAGES, command, predicted, read_predictions, refused, write_data
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import random_tables, write_folder

pytestmark = pytest.mark.slow

LABEL = "label_escalation"

# --------------------------------------------------------------------------- paths and stops


def test_earlier_predictions_and_the_page_beside_them_are_moved_aside(runs, table, tmp_path):
    rows = write_data(table.head(40), tmp_path / "rows.csv")
    out, page = tmp_path / "out.csv", tmp_path / "out.report.html"
    out.write_text("someone's")
    page.write_text("someone's")
    for name in (".out.csv.lock", ".out.csv.partial"):  # of a dead run
        (tmp_path / name).write_text("left")
    predicted(runs / "trajectory", rows, out)
    aside = [path for path in tmp_path.iterdir() if path.is_file() and ".1" in path.name]
    assert [path.read_text() for path in aside] == ["someone's"] * 2
    assert not list(tmp_path.glob(".*"))


def test_an_existing_output_stays_when_the_run_fails(runs, table, tmp_path, monkeypatch):
    monkeypatch.setitem(MEMORY_ROWS, "trajectory", 4)
    few = table.head(20).copy()
    few.loc[15, SERIES] = "oops"
    data, out = write_data(few, tmp_path / "bad.csv"), tmp_path / "out.csv"
    out.write_text("earlier")
    assert trainer.main(command(runs / "trajectory", data, out, "--strict")) == 2
    cut = tmp_path / "bad.csv.gz"
    cut.write_bytes(gzip.compress(data.read_bytes())[:-40])
    assert trainer.main(command(runs / "trajectory", cut, out)) == 2

    def closed(*_):
        assert list(tmp_path.glob(".out.csv*.partial")), "half a file is there"
        os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "count_implausible", closed)
        assert trainer.main(command(runs / "trajectory", data, out)) == 129
    assert {path.name for path in tmp_path.iterdir()} == {
        "bad.csv",
        "bad.csv.gz",
        "bad.json",
        "out.csv",
    }
    assert out.read_text() == "earlier"


def test_ids_stay_as_they_were_written(runs, table, tmp_path):
    ids = ["-5", "+1e3", "a=b", "7", "=HYPERLINK(1)"]
    rows = table.head(5).drop(columns=LABEL).assign(id=ids)
    data, out = write_data(rows, tmp_path / "rows.csv"), tmp_path / "new.csv"
    found = predicted(runs / "trajectory", data, out)
    assert found["id"].tolist() == ids
    risks = found["probability"].tolist()
    assert risks == [float(f"{x:.6g}") for x in risks], "as monitor reads them"


@pytest.mark.parametrize(
    ("risk", "written", "positive"),
    [
        (0.09999999, 0.1, 1),
        (0.1, 0.1, 1),
        (0.0999994, 0.0999994, 0),
        (1.23456789e-9, 1.23457e-9, 0),
    ],
)
def test_risks_are_written_with_six_digits_and_decided_as_written(risk, written, positive):
    columns = {"probability": [risk, np.nan], "prediction": [0, 0], "probability_age": [risk, 0.5]}
    table = pd.DataFrame({"id": ["a", "b"], **columns}).astype({"prediction": "Int64"})
    found = predictions.as_written(table, 0.1)
    assert [*found] == [*table]
    assert found["probability"].tolist()[0] == written
    assert found["probability_age"].tolist() == [written, 0.5]
    assert found["prediction"].tolist() == [positive, pd.NA]


# --------------------------------------------------------------------------- labelled rows


@pytest.fixture(scope="module")
def strangers():
    """100 further stays, none of which trained a model of ``runs``."""
    others = pd.read_csv(SAMPLE, dtype=str).iloc[200:300].reset_index(drop=True)
    others.insert(1, "id", [f"row {k}" for k in range(len(others))])
    return others


def test_metrics_are_those_of_the_labelled_rows(runs, strangers, tmp_path, capsys):
    mixed = strangers.copy()
    mixed.loc[::3, LABEL] = ""
    mixed.loc[1, SERIES] = "oops"
    out = tmp_path / "out.csv"
    lines = predicted(runs / "trajectory", write_data(mixed, tmp_path / "mixed.csv"), out)
    known = (mixed[LABEL] != "") & lines["probability"].notna()
    labels = mixed.loc[known, LABEL].astype(int)
    score = roc_auc_score(labels, lines.loc[known, "probability"])
    page = out.with_suffix(".report.html").read_text().replace("\xa0", " ")
    for text in (page, capsys.readouterr().out.replace("\xa0", " ")):
        assert f"AUROC {score:.3f} [" in text
        assert f"{known.sum()} patients" in text
        assert "he ensemble of this model and" in text
    assert "simple model (blend with statics;" in page, "as planned in training"
    assert not any(f">{i}<" in page for i in mixed["id"]), "no id of a patient"
    predicted(runs / "trajectory", tmp_path / "mixed.csv", out, "--primary", "last value")
    page = out.with_suffix(".report.html").read_text()
    assert "simple model (last value)" in page
    assert "--min_cell" in page
    few = write_data(strangers.head(9).assign(**{LABEL: "0"}), tmp_path / "few.csv")
    predicted(runs / "trajectory", few, out)
    assert not out.with_suffix(".report.html").exists(), "the report of other predictions"


def test_rows_of_the_training_data_are_left_out_and_counted(
    runs, table, strangers, tmp_path, capsys, monkeypatch
):
    """Known by identifier and row, whatever the label now; not by an identifier alone.

    Another hospital may use the same identifiers.
    """
    stage = "classification"  # which finds them beside its stage 1
    monkeypatch.setitem(MEMORY_ROWS, stage, 70)
    parts = [runs / stage / f"predictions_{part}.csv" for part in ("val", "test")]
    held_out = pd.concat(pd.read_csv(path, dtype=str)["patient"] for path in parts)
    trained = int((~table["subject_id"].isin(held_out)).sum())
    both = pd.concat([table, strangers]).reset_index(drop=True)
    foreign = strangers.assign(subject_id=table["subject_id"].to_numpy())
    turned = both.assign(**{LABEL: 1 - both[LABEL].astype(int)})
    for rows, left_out in ((both, trained), (turned, trained), (strangers, 0), (foreign, 0)):
        data, out = write_data(rows, tmp_path / "cohort.csv"), tmp_path / "out.csv"
        lines = predicted(runs / stage, data, out)
        sentence = f"{left_out} are in the training data"
        shown, page = capsys.readouterr().out, out.with_suffix(".report.html").read_text()
        assert sentence in shown
        assert sentence in page
        assert ("optimistic" in page) == (left_out > 0), "the validation part is not known"
        new = ~rows["subject_id"].isin(set(table["subject_id"]) - set(held_out))
        new = new if left_out else new | True
        score = roc_auc_score(rows.loc[new, LABEL].astype(int), lines.loc[new, "probability"])
        assert f"AUROC {score:.3f} [" in shown.replace("\xa0", " ")
        out.with_suffix(".report.html").unlink()


@pytest.mark.parametrize("named", [True, False])
def test_an_equal_identifier_counts_only_where_both_files_have_some(
    named, runs, table, tmp_path, capsys, monkeypatch
):
    """The rows of half the training patients have changed since: only the names tell them."""
    changed = table.copy()
    changed.loc[::2, SERIES] = "20 (0h) -> 21 (1h) -> 23 (2h)"
    known = read_trajectory(runs / TRAJECTORY_FILE).train_patients
    training = TrainingPatients(known, named)
    monkeypatch.setattr(predictions, "training_patients", lambda *_: training)
    data = write_data(changed, tmp_path / "cohort.csv")
    predicted(runs / "trajectory", data, tmp_path / "out.csv")
    found = re.search(r"(\d+) are in the training", capsys.readouterr().out)
    parts = [runs / "trajectory" / f"predictions_{part}.csv" for part in ("val", "test")]
    trained = len(table) - sum(len(pd.read_csv(path)) for path in parts)
    assert found
    assert (int(found[1]) == trained) == named


def test_a_checkpoint_without_its_training_patients_says_so(runs, table, tmp_path):
    """As a later stage alone, or beside another stage 1; from any folder it finds its own."""
    copy_of(runs, "classification", tmp_path)
    folder, file = tmp_path / "classification", tmp_path / TRAJECTORY_FILE
    model = trainer.TrajectoryModel.from_pretrained(folder).trained
    assert len(predictions.training_patients(model, folder)[0])
    other = read_trajectory(file)
    save_trajectory(file, other.weights, other.config, other.train_patients[1:].copy())
    data = write_data(table, tmp_path / "cohort.csv")
    for damage in (lambda: None, lambda: file.write_bytes(b"no"), file.unlink):
        damage()
        assert not len(predictions.training_patients(model, folder)[0])
        out = tmp_path / "out.csv"
        predicted(folder, data, out)
        assert "does not hold its training data" in out.with_suffix(".report.html").read_text()


def test_metrics_of_many_chunks_are_those_of_one(runs, strangers, tmp_path, monkeypatch):
    rows = strangers.assign(subject_id=[f"p{k % 17}" for k in range(len(strangers))])
    data, evaluated = write_data(rows, tmp_path / "rows.csv"), []
    evaluate = predictions.evaluate

    def kept(table, *rule, **plan):
        evaluated.append(table)
        return evaluate(table, *rule, **plan)

    monkeypatch.setattr(predictions, "evaluate", kept)
    for name, size in (("one", 10_000), ("many", 30)):
        monkeypatch.setitem(MEMORY_ROWS, "trajectory", size)
        predicted(runs / "trajectory", data, tmp_path / f"{name}.csv")
    assert evaluated[1]["patient"].nunique() == 17
    pd.testing.assert_frame_equal(*evaluated, rtol=0, atol=2e-6)


CHANGED = "fit the training data if"


def in_another_unit(rows):
    """The rows with their series ten times as high, as in another unit."""
    cells = [re.sub(r"([\d.]+) \(", lambda m: f"{float(m[1]) * 10:g} (", x) for x in rows[SERIES]]
    return rows.assign(**{SERIES: cells})


@pytest.mark.parametrize("stage", STAGES[:2])
def test_values_in_another_unit_warn_and_stand_in_the_case_mix(
    stage, runs, strangers, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setitem(MEMORY_ROWS, stage, 25)

    def warnings(rows, checkpoint=runs / stage):
        caplog.clear()
        data, out = write_data(rows, tmp_path / "new.csv"), tmp_path / "out.csv"
        predicted(checkpoint, data, out)
        shown = [line for line in capsys.readouterr().out.splitlines() if CHANGED in line]
        model = trainer.TrajectoryModel.from_pretrained(checkpoint)
        model.predictions(rows)
        assert [x for x in caplog.messages if CHANGED in x and "DataFrame" in x] == [
            line.replace(str(data), "DataFrame") for line in shown
        ]
        return shown

    bare = strangers.head(30).drop(columns=LABEL)
    assert warnings(bare) == []
    (line,) = warnings(in_another_unit(bare))
    assert ": Serum bicarbonate: " in line
    assert warnings(in_another_unit(bare).head(19)) == []
    if stage != "trajectory":
        folder = copy_of(runs, stage, tmp_path)
        mix = read_trained_config(folder)["case_mix"]
        numbers = {name: x for name, x in mix.items() if name not in ("series", "static")}
        change_config(folder, case_mix=numbers)  # as an older checkpoint has it
        assert warnings(in_another_unit(bare), folder) == []
        return
    warnings(in_another_unit(strangers))
    page = (tmp_path / "out.report.html").read_text().replace("\xa0", " ")
    assert "is the unit right?" in page
    cells = r"Serum bicarbonate</th><td>2\d.* to .*</td><td>(\d+) \((\d+) to (\d+)\)</td>"
    here = list(map(int, re.search(cells, page).groups()))
    dataset = trainer.MIMICtrajectoryDataset(in_another_unit(strangers))
    medians = [np.median(values) for i in range(100) for *_, values in dataset.measured(i)]
    assert here == pytest.approx(np.quantile(medians, [0.5, 0.25, 0.75]), rel=0.02)
    assert '<th scope="row">weight [kg]</th><td>76 (' in page


@pytest.mark.parametrize("size", [30, 10_000])
def test_sites_of_the_labelled_rows_are_counted(size, runs, strangers, tmp_path, monkeypatch):
    monkeypatch.setitem(MEMORY_ROWS, "trajectory", size)
    rows = strangers.assign(ward=["", "A", "A", "B"] * 25)
    rows.loc[1, SERIES], rows.loc[2, LABEL] = "oops", ""
    out = tmp_path / "out.csv"
    predicted(runs / "trajectory", write_data(rows, tmp_path / "a.csv"), out, "--site", "ward")
    source = out.with_suffix(".report.html").read_text()
    cells = r'<th scope="row">([^<]+)</th>\s*(?:<td>[^<]*</td>\s*)??<td>(\d+)</td>'
    counts = dict(re.findall(cells, source))
    assert {"not known": "25", "A": "48", "B": "25"}.items() <= counts.items()


def test_an_interrupted_report_leaves_the_predictions(runs, table, tmp_path, monkeypatch):
    data, out = write_data(table, tmp_path / "new.csv"), tmp_path / "out.csv"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictions, "write_report", interrupted)
    assert trainer.main(command(runs / "trajectory", data, out)) == 130
    assert len(read_predictions(out)) == len(table)


# --------------------------------------------------------------------------- what a model reads

STATICS = ["static_bmi [kg/m2]", "static_admissions"]
TINY = ["--model_name", TINY_MODEL, "--epochs", "1", "--adapter_lr", "0.01"]


@pytest.fixture(scope="module")
def asked(table):
    """The stays with two static columns and a prediction time, some of them unknown."""
    rng = np.random.default_rng(0)
    hours = table[SERIES].str.findall(r"\(([\d.]+)h\)").map(lambda each: max(map(float, each)))
    asked = table.drop(columns=["clinical_context", *table.filter(like="static_")])
    asked[STATICS[0]] = [f"{bmi:.1f}" if bmi > 23 else "" for bmi in rng.normal(27, 4, len(table))]
    asked[STATICS[1]] = rng.integers(0, 4, len(table)).astype(str)
    asked["prediction_hours"] = (hours + rng.integers(0, 40, len(table))).astype(str)
    asked.loc[4::6, "prediction_hours"] = ""
    return asked


@pytest.fixture(scope="module")
def models(asked, tmp_path_factory):
    """A folder with two members of stage 1, and models upon them, some by half of their weight."""
    place = tmp_path_factory.mktemp("inputs")
    data = write_data(asked, place / "train.csv")
    words = ["--data_path", str(data), "--output_dir", str(place), "--log_file", "none"]
    words += ["--batch_size", "8"]
    stage1 = ["--trajectory_only", "--trajectory_epochs", "2", "--encoder_lr", "0.05"]
    stage1 += ["--members", "2"]
    upon = [*TINY, "--ode_checkpoint", str(place / TRAJECTORY_FILE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.decision, "fit_residual_weight", lambda *_: 0.5)
        for flags in (
            stage1,
            upon,
            [*TINY, "--soft_prompt", "off", "--output_dir", f"{place}/text"],
            [*upon, "--soft_prompt", "off", "--output_dir", f"{place}/logit"],
            [*upon, "--stage1_logit", "off", "--output_dir", f"{place}/alone"],
        ):
            assert trainer.main([*words, *flags]) == 0
    return place


@pytest.mark.parametrize(
    "stage", ["trajectory", "classification", "logit/classification", "alone/classification"]
)
def test_the_risks_are_those_of_the_run(stage, models, asked, tmp_path):
    config = read_trained_config(models / stage)
    series = config["features"]
    assert config["inputs"] == {"static": STATICS, "prediction_time": True, "series": series}
    assert config["members"] == 2
    data = write_data(asked.drop(columns=LABEL), tmp_path / "rows.csv")
    out = predicted(models / stage, data, tmp_path / "out.csv").set_index("id")
    own = pd.read_csv(models / stage / "predictions_test.csv", dtype={"id": str}).set_index("id")
    assert len(own) == 10
    assert (out["probability"][own.index] - own["probability"]).abs().max() < 1e-6


@pytest.mark.parametrize("column", [*STATICS, "prediction_hours"])
def test_each_input_moves_the_risk_and_is_asked_for(column, models, asked, tmp_path, capsys):
    rows = asked[(asked[[*STATICS, "prediction_hours"]] != "").all(axis=1)].head(9)
    rows = rows.drop(columns=LABEL)
    changed = rows.assign(**{column: (rows[column].astype(float) + 5).astype(str)})
    risks = [
        predicted(
            models / "trajectory", write_data(t, tmp_path / f"{k}.csv"), tmp_path / f"{k}p.csv"
        )
        for k, t in enumerate((rows, changed))
    ]
    assert ((risks[0]["probability"] - risks[1]["probability"]).abs() > 1e-6).all()
    data = write_data(rows.drop(columns=column), tmp_path / "bare.csv")
    out = tmp_path / "out.csv"
    assert refused(capsys, command(models / "trajectory", data, out), column, out=out)


def test_text_alone_asks_for_no_input_of_stage_1(models, asked, tmp_path, capsys):
    bare = asked.drop(columns=[*STATICS, "prediction_hours", LABEL]).head(9)
    data = write_data(bare, tmp_path / "rows.csv")
    out = predicted(models / "text" / "classification", data, tmp_path / "out.csv")
    assert out["problem"].tolist() == [""] * 9
    rows = asked.head(9).assign(**{STATICS[1]: ["", "", *["1"] * 7]}).drop(columns=LABEL)
    predicted(models / "trajectory", write_data(rows, tmp_path / "a.csv"), tmp_path / "b.csv")
    assert f"{STATICS[1]}: taken as unknown" in capsys.readouterr().out


# --------------------------------------------------------------------------- checkpoints


def copy_of(runs, stage, place):
    """Copy the best model of a stage, to be changed."""
    shutil.copy(runs / TRAJECTORY_FILE, place)
    shutil.copytree(runs / stage, place / stage)
    return place / stage


def change_config(folder, **changes):
    """Change entries of a configuration, and make its hash fit."""
    path = folder / "best" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    del config["config_sha256"]
    path.write_text(json.dumps({**config, "config_sha256": json_hash(config)}))


def test_the_weight_of_the_language_model_lies_with_the_weights(runs, table, tmp_path):
    folder = copy_of(runs, "classification", tmp_path)
    data = write_data(table.head(6).drop(columns=LABEL), tmp_path / "few.csv")
    logits = []
    for weight in (0.0, 0.5, 1.0):
        change_config(folder, residual_weight=weight)
        risk = predicted(folder, data, tmp_path / f"{weight}.csv")["probability"]
        logits.append(np.log(risk / (1 - risk)))
    np.testing.assert_allclose(logits[1], (logits[0] + logits[2]) / 2, atol=1e-5)
    assert not np.allclose(logits[0], logits[2], atol=1e-4)
    alone = predicted(tmp_path / TRAJECTORY_FILE, data, tmp_path / "stage_1.csv")["probability"]
    np.testing.assert_allclose(logits[0], np.log(alone / (1 - alone)), atol=1e-5)


def test_a_threshold_of_the_call_is_a_risk_or_chosen_on_the_validation_part(
    runs, table, tmp_path, capsys
):
    stage = "classification"
    data, out = write_data(table.head(60), tmp_path / "few.csv"), tmp_path / "out.csv"
    lines = predicted(runs / stage, data, out, "--threshold", "0.1", "--use", "blend")
    assert (lines["prediction"] == (lines["probability"] >= 0.1)).all()
    val = pd.read_csv(runs / stage / "predictions_val.csv")
    of_val, goal = of_labels(val["label"].to_numpy(float)), "specificity 0.7"
    for name in ("probability", "blend"):
        use = ("--use", name) if name == "blend" else ()
        lines = predicted(runs / stage, data, out, "--threshold", goal, *use)
        threshold = choose_threshold(goal, of_val, val[name].to_numpy())
        assert (lines["prediction"] == (lines["probability"] >= threshold)).all()
        assert lines["prediction"].nunique() == 2
    page = out.with_suffix(".report.html").read_text()
    assert "for a specificity of at least 70 % on its own validation part" in page
    alone = tmp_path / "alone"
    trainer.TrajectoryModel.from_pretrained(runs / stage).save_pretrained(alone)
    more = ("--model_name", TINY_MODEL, "--threshold")
    words = command(alone, data, tmp_path / "no.csv", *more)
    assert refused(capsys, [*words, goal], "--threshold", out=tmp_path / "no.csv")
    for wrong in ("1.5", "0", "much", "accuracy 0.9", "sensitivity 90", "nan"):
        with pytest.raises(SystemExit, match="2"):
            trainer.main([*words, wrong])


def test_a_page_of_notes_begins_with_the_share_of_right_answers(runs, strangers, tmp_path, capsys):
    rows = strangers.head(12).assign(**{LABEL: ["0", "1", "0"] * 4})
    out = tmp_path / "out.csv"
    lines = predicted(runs / "generative", write_data(rows, tmp_path / "rows.csv"), out)
    right = (lines["prediction"] == rows[LABEL].astype(int).to_numpy()).mean()
    sentence = f"Of 12 written reports {100 * right:.1f} ["
    assert sentence in capsys.readouterr().out
    page = out.with_suffix(".report.html").read_text()
    assert page.index(sentence) < page.index("AUROC")
    folded = predicted(runs / "generative", tmp_path / "rows.csv", out, "--use", "blend")
    assert len(folded) == 12
    assert sentence[:23] not in out.with_suffix(".report.html").read_text()


@pytest.mark.parametrize("stage", STAGES[:2])
def test_a_result_that_was_moved_aside_is_a_checkpoint(stage, runs, table, tmp_path):
    shutil.copytree(runs / stage, tmp_path / f"{stage}.1")
    shutil.copy(runs / TRAJECTORY_FILE, tmp_path / "medgemma_trajectory_best.1.pt")
    data, goal = write_data(table.head(9), tmp_path / "few.csv"), ("--threshold", "specificity 0.7")
    lines = [
        predicted(folder, data, tmp_path / "out.csv", *goal)
        for folder in (runs / stage, tmp_path / f"{stage}.1")
    ]
    pd.testing.assert_frame_equal(*lines)


@pytest.mark.parametrize("stage", ["trajectory", "generative"])
def test_recalibration_and_threshold_lie_with_the_weights(stage, runs, table, tmp_path, capsys):
    folder = copy_of(runs, stage, tmp_path)
    data = write_data(table.head(6).drop(columns=LABEL), tmp_path / "few.csv")
    plain = predicted(folder, data, tmp_path / "1.csv")
    decision = {"label": {"multiplier": 2.0, "shift": 0.5, "threshold": 0.3}}
    if stage == "trajectory":
        content = torch.load(tmp_path / TRAJECTORY_FILE, weights_only=True)
        content["config"]["decision"] = decision
        torch.save(content, tmp_path / TRAJECTORY_FILE)
    else:
        change_config(folder, decision=decision)
    out = predicted(folder, data, tmp_path / "2.csv")
    logit = np.log(plain["probability"] / (1 - plain["probability"]))
    assert np.abs(out["probability"] - 1 / (1 + np.exp(-(0.5 + 2 * logit)))).max() < 5e-6
    assert (out["prediction"] == (out["probability"] >= 0.3)).all()
    if stage == "generative":
        assert (out["report"].str.contains(": yes", regex=False) == out["prediction"].eq(1)).all()
        return
    del content["config"]["decision"]  # of a run that was not finished
    torch.save(content, tmp_path / "early.pt")
    capsys.readouterr()
    out = predicted(tmp_path / "early.pt", data, tmp_path / "3.csv")
    assert "no threshold" in capsys.readouterr().out
    assert (out["prediction"] == (out["probability"] >= 0.5)).all()


def test_another_precision_is_rough(runs, table, tmp_path):
    data = write_data(table.head(20).drop(columns=LABEL), tmp_path / "few.csv")
    expected = predicted(runs / "classification", data, tmp_path / "1.csv")
    words = runs / "classification", data, tmp_path / "2.csv", "--precision", "bf16"
    difference = np.abs(predicted(*words)["probability"] - expected["probability"])
    assert 1e-6 < difference.max() < 0.05


# --------------------------------------------------------------------------- SRTR


@pytest.fixture(scope="module")
def srtr(tmp_path_factory):
    """A liver folder and a run of stage 1 on it."""
    place = tmp_path_factory.mktemp("srtr")
    write_folder(place / "data", *random_tables(300, "liver", seed=1))
    words = ["--trajectory_only", "--dataset", "srtr", "--organ", "liver", "--log_file", "none"]
    words += ["--data_dir", str(place / "data"), "--output_dir", str(place)]
    assert trainer.main([*words, "--trajectory_epochs", "2", "--transplant", "exclude"]) == 0
    return place


def srtr_command(srtr, data, out, *more):
    words = ["predict", "--checkpoint", str(srtr / "trajectory"), "--data_dir", str(data)]
    return [*words, "--predictions", str(out), *more]


def test_srtr_predictions_are_those_of_the_run(srtr, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MEMORY_ROWS, "trajectory", 50)
    out = tmp_path / "out.csv"
    assert trainer.main(srtr_command(srtr, srtr / "data", out, "--organ", "liver")) == 0
    lines = read_predictions(out)
    expected = SRTRTrajectoryDataset(srtr / "data", "liver", require_labels=False)
    assert lines["id"].tolist() == expected.ids.tolist()
    own = pd.read_csv(srtr / "trajectory" / "predictions_test.csv", dtype={"id": str})
    known = lines.set_index("id")["probability"][own["id"]].to_numpy()
    assert np.abs(known - own["probability"]).max() < 1e-6
    other = tmp_path / "other.csv"
    words = srtr_command(srtr, srtr / "data", other, "--organ", "kidney")
    assert refused(capsys, words, "kidney", out=other)
