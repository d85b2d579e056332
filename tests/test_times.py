"""Times to events in a run: its files, its predictions, and what is not there for them yet."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from conftest import whole_reports
from medgemma_clinical.commands import command_line
from medgemma_clinical.commands.patients import patients_path
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.evaluation.time_table import evaluate_times
from medgemma_clinical.evaluation.verdicts import percent
from medgemma_trainer import TrajectoryModel, fit_trajectory, main
from pages import Page
from predicting import predicted, refused

RISKS = ["risk_24h", "risk_72h", "risk_without_transplant_24h", "risk_without_transplant_72h"]
EVENTS = ["event_hours", "event"]
ABOUT = {"series": "MELD", "unit": "", "events": {"1": "death", "2": "transplant"}}


def waiting(n=800, seed=0):
    """Rows whose last value decides both hazards; the sickest are transplanted first."""
    rng = np.random.default_rng(seed)
    sick = rng.normal(size=n)
    rates = np.exp([-5.1 + 0.9 * sick, -4.9 + 1.2 * sick, np.full(n, -5.8)])
    times = rng.exponential(1 / rates)
    values = [f"{20 + 3 * x:.1f} (0h) -> {20 + 5 * x:.1f} (6h)" for x in sick]
    return pd.DataFrame(
        {
            "subject_id": [f"p{k}" for k in range(n)],
            "clinical_trajectory": values,
            "static_age [years]": rng.integers(20, 80, n),
            "event_hours": times.min(axis=0).round(1),
            "event": np.array([1, 2, 0])[times.argmin(axis=0)],
        }
    )


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    folder = tmp_path_factory.mktemp("times")
    waiting().to_csv(folder / "waiting.csv", index=False)
    (folder / "waiting.json").write_text(json.dumps({**ABOUT, "interventions": [2]}))
    words = ["--trajectory_only", "--data_path", folder / "waiting.csv", "--output_dir", folder]
    words += ["--horizon_hours", "24,72", "--trajectory_epochs", 3, "--log_file", "none"]
    with whole_reports():
        assert main([*map(str, words)]) == 0
    return folder


def part(times, name="test"):
    return pd.read_csv(times / "trajectory" / f"predictions_{name}.csv")


def metrics_file(times):
    return json.loads((times / "trajectory" / "metrics.json").read_text())


def test_a_run_writes_the_risks_of_each_horizon_and_their_metrics(times):
    table = part(times)
    columns = ["id", *EVENTS, "probability", "patient", *RISKS, "Aalen-Johansen"]
    assert [*table][:10] == columns
    assert [*table][-5:] == ["ensemble", *(f"ensemble {risk}" for risk in RISKS)]
    np.testing.assert_allclose(table["probability"], table["risk_24h"], rtol=1e-9)
    assert (table["risk_24h"] < table["risk_72h"]).all()
    assert (table["risk_72h"] < table["risk_without_transplant_72h"]).all()
    metrics = metrics_file(times)["test"]
    for risk, end, horizon in (("risk_24h", "", 24), ("risk_72h", "_72h", 72)):
        found = metrics_at(table["event_hours"], table["event"], table[risk], horizon)
        for name, value in found.items():
            if np.isfinite(value):
                assert metrics[name + end]["value"] == pytest.approx(value, rel=1e-9)
    effective = metrics["effective_n_without_transplant_24h"]["value"]
    assert 10 < effective < len(table)
    assert metrics["events"] == ((table["event"] == 1) & (table["event_hours"] <= 24)).sum()
    val = part(times, "val")
    case = (val["event"] == 1) & (val["event_hours"] <= 24)
    assert (val.loc[case, "probability"] >= metrics_file(times)["threshold"]).any()
    assert not (times / "trajectory" / "tripod.md").exists()
    found = pd.Series({name: x["low"] for name, x in metrics.items() if name[:2] in ("ic", "e5")})
    assert len(found) == 8
    assert found.isna().all()  # distances have no interval
    history = (times / "trajectory" / "history.jsonl").read_text().splitlines()
    assert all(json.loads(line)["val_auroc"] is None for line in history)
    page = (times / "trajectory" / "report.html").read_text()
    events = CompetingEvents(("death", "transplant"), (24.0, 72.0), (2,))
    assert events.assumption in page
    assert all(risk in page for risk in RISKS)


def test_predictions_of_rows_without_events_are_those_of_the_run(times, tmp_path):
    table = part(times).set_index("id")
    rows = waiting().set_index("subject_id", drop=False).loc[table.index].drop(columns=EVENTS)
    rows.to_csv(tmp_path / "new.csv", index=False)
    found = predicted(times / "trajectory", tmp_path / "new.csv", tmp_path / "out.csv")
    own = ["id", "probability", "prediction", *RISKS, "problem"]
    assert [*found][:8] == own
    others = [f"{risk}_Aalen_Johansen" for risk in RISKS]
    assert [*found][8:12] == others
    assert found["risk_72h_Aalen_Johansen"].nunique() == 1
    np.testing.assert_allclose(found.set_index("id")[RISKS], table[RISKS], rtol=1e-5)
    model = TrajectoryModel.from_pretrained(times / "trajectory")
    risk = model.predict_proba(tmp_path / "new.csv")[:, 1]
    np.testing.assert_allclose(risk, found["probability"], rtol=1e-6)
    over_time = model.risk_over_time(tmp_path / "new.csv").groupby("id", sort=False).last()
    np.testing.assert_allclose(over_time["probability"], risk, rtol=1e-5)


def test_the_page_of_patients_shows_the_incidence_of_each_event(times, tmp_path):
    waiting(30).drop(columns=EVENTS).to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "out.csv"
    found = predicted(times / "trajectory", tmp_path / "new.csv", out, "--explain")
    text = Page(patients_path(out).read_text()).text.replace("\xa0", " ")
    assert "Patients: death by 24h" in text
    for row in found.nlargest(12, "probability").to_dict("records"):
        first, last = (percent(row[name]).replace("\xa0", " ") for name in RISKS[:2])
        assert f"Death {first} by 24h, {last} by 72h; transplant" in text


def test_python_saves_and_lists_a_model_of_times_and_predicts_no_yes_or_no(times, tmp_path):
    model = TrajectoryModel.from_pretrained(times / "trajectory")
    model.save_pretrained(tmp_path / "saved")
    rows = waiting(30).drop(columns=EVENTS)
    again = TrajectoryModel.from_pretrained(tmp_path / "saved").predictions(rows)
    pd.testing.assert_frame_equal(again, model.predictions(rows))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| O/E without_transplant_72h |" in card
    assert card.count("\n| `") == len(model.trained.rules) - 1
    assert model.results().loc["stage 1 (trajectory alone)", "auroc"] > 0.5
    above = model.predict_proba(rows)[:, 1] >= model.threshold
    assert (model.predict(rows) == above).all()


def test_what_happens_later_changes_no_prediction(times, tmp_path):
    rows, altered = waiting(), waiting()
    altered["event_hours"], altered["event"] = altered["event_hours"] + 7, 1
    for name, table in (("rows", rows), ("altered", altered)):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "rows.json").write_text(json.dumps({**ABOUT, "interventions": [2]}))
    (tmp_path / "altered.json").write_text(json.dumps({**ABOUT, "interventions": [2]}))
    found = [
        predicted(times / "trajectory", tmp_path / f"{name}.csv", tmp_path / f"{name}_out.csv")
        for name in ("rows", "altered")
    ]
    pd.testing.assert_frame_equal(*found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--calibrate", "platt"], "--calibrate"),
        (["--mode", "generative"], "--mode generative: not for times to events"),
        (["--horizon_hours", "24,1000"], "horizon 1000"),
        (["--seeds", "2"], "--seeds"),
    ],
)
def test_what_times_do_not_have_is_refused_in_one_line(times, tmp_path, capsys, words, expected):
    line = ["--data_path", times / "waiting.csv", "--output_dir", tmp_path / "run"]
    line += [] if "--mode" in words else ["--trajectory_only"]
    line += [] if "--horizon_hours" in words else ["--horizon_hours", "24,72"]
    assert refused(capsys, [*map(str, line), *words], expected, out=tmp_path / "run")


@pytest.mark.parametrize("text", ["24,x", "72,24", "0,24", "24,24", "24,inf", ""])
def test_horizons_that_do_not_rise_are_no_horizons(text):
    for parse in (command_line.parse_hours, command_line.parse_days):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError):
        command_line.parse_days("1.5")
    assert (command_line.parse_days("365"), command_line.parse_days("90,365")) == (365, [90, 365])
    assert command_line.parse_hours("24,72.5") == [24.0, 72.5]


def test_weights_by_the_inputs_are_an_option(times, tmp_path):
    rows, options = waiting(2000), {"trajectory_epochs": 1, "horizon_hours": [72]}
    found = [
        fit_trajectory(rows, **options, censoring=censoring).metrics["test"]
        for censoring in ("km", "regression")
    ]
    assert found[0]["brier"]["value"] != found[1]["brier"]["value"]
    assert found[0]["brier"]["value"] == pytest.approx(found[1]["brier"]["value"], rel=0.1)


def test_training_ranks_and_its_risks_have_the_level_of_the_events():
    options = {"horizon_hours": [24, 72], "batch_size": 32, "test": False}
    model = fit_trajectory(waiting(900), trajectory_epochs=8, **options)
    rows = waiting(2000, seed=9)
    risk = model.predict_proba(rows.drop(columns=EVENTS))[:, 1]
    by_then = (rows["event"] == 1) & (rows["event_hours"] <= 24)
    assert roc_auc_score(by_then, risk) > 0.65
    assert risk.mean() == pytest.approx(by_then.mean(), rel=0.3)


def test_without_interventions_an_intervention_ends_the_record():
    rows, events = waiting(300), CompetingEvents(("death", "transplant"), (24.0,), (2,))
    rng = np.random.default_rng(0)
    risks = {f"m {name}": rng.uniform(0.05, 0.5, 300) for name in events.risk_names}
    weights = {"uncensored risk_without_transplant_24h": rng.uniform(0.5, 1, 300)}
    table = rows[EVENTS].assign(id=rows["subject_id"], patient=rows["subject_id"])
    found = evaluate_times(table.assign(**risks, **weights), events, 0).of("m")["value"]
    ended = rows["event"].replace(2, 0)
    risk, (censoring,) = risks["m risk_without_transplant_24h"], weights.values()
    expected = metrics_at(rows["event_hours"], ended, risk, 24, censoring=censoring)
    for name, value in expected.items():
        assert found[f"{name}_without_transplant_24h"] == pytest.approx(value)
