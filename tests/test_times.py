"""Times to events in a run: its files, its predictions, and what is not there for them yet."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from chai_card import read_facts
from conftest import whole_reports
from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.commands import command_line
from medgemma_clinical.commands.patients import patients_path
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation.censoring import Watched
from medgemma_clinical.evaluation.metrics_table import MODEL, evaluate
from medgemma_clinical.evaluation.target import observed_rows, read_weights, targets_of
from medgemma_clinical.evaluation.time_metrics import metrics_at
from medgemma_clinical.evaluation.verdicts import percent
from medgemma_clinical.files import InputError
from medgemma_trainer import TrajectoryClassifier, TrajectoryModel, fit_trajectory, main
from pages import Page
from predicting import predicted, refused

pytestmark = pytest.mark.slow

RISKS = ["risk_24h", "risk_72h", "risk_without_transplant_24h", "risk_without_transplant_72h"]
EVENTS = ["event_hours", "event"]
TUNES = False
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


def test_the_facts_of_a_run_name_each_horizon(times):
    facts = read_facts((times / "trajectory" / "model_facts.xml").read_text())
    assert "KeyMetrics/UsefulnessUsabilityEfficacy/Results/MetricResult/Label" in dict(facts)
    shown = {"AUROC (death by 24h), this model", "O/E (death by 72h), this model"}
    assert shown <= {text for _, text in facts}
    assert "transplant" in dict(facts)["TrustIngredients/AISystemFacts/OutcomesAndOutputs"]


def test_a_run_writes_the_risks_of_each_horizon_and_their_metrics(times):
    table = part(times)
    columns = ["id", *EVENTS, "probability", "patient"]
    assert [*table][:5] == columns
    assert "Aalen-Johansen risk_24h" in table
    assert [*table][-5:] == [*(f"ensemble {risk}" for risk in RISKS), MODEL]
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
    assert [x["name"] for x in metrics_file(times)["targets"]] == RISKS
    tripod = (times / "trajectory" / "tripod.md").read_text()
    assert all(title in tripod for title in ("death by 24h", "death by 72h without transplant"))
    found = pd.Series({name: x["low"] for name, x in metrics.items() if name[:2] in ("ic", "e5")})
    assert len(found) == 12
    assert found.isna().all()  # distances have no interval
    history = (times / "trajectory" / "history.jsonl").read_text().splitlines()
    aurocs = [json.loads(line)["val_auroc"] for line in history]
    assert all(0 < auroc < 1 for auroc in aurocs)
    page = (times / "trajectory" / "report.html").read_text()
    events = CompetingEvents(("death", "transplant"), (24.0, 72.0), (2,))
    assert events.assumption in page
    assert all(title in page for title in events.risk_titles.values())


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
    np.testing.assert_allclose(risk, found["probability"], rtol=5e-6)
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
        assert f"death {first} by 24h, {last} by 72h; transplant" in text


def test_python_saves_and_lists_a_model_of_times_and_predicts_no_yes_or_no(times, tmp_path):
    model = TrajectoryModel.from_pretrained(times / "trajectory")
    model.save_pretrained(tmp_path / "saved")
    rows = waiting(30).drop(columns=EVENTS)
    again = TrajectoryModel.from_pretrained(tmp_path / "saved").predictions(rows)
    pd.testing.assert_frame_equal(again, model.predictions(rows))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "death by 72h without transplant" in card
    results = model.results()
    assert [*results.index.unique(level=0)] == RISKS
    expected = metrics_file(times)["test"]["auroc_72h"]["value"]
    assert results.loc[("risk_72h", "stage 1 (trajectory alone)"), "auroc"] == expected
    above = model.predict_proba(rows)[:, 1] >= model.threshold
    assert (model.predict(rows) == above).all()


def test_what_happens_later_changes_no_prediction(times, tmp_path):
    rows, altered = waiting(150), waiting(150)
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
        (["--mode", "generative"], "--mode generative: not for times to events"),
        (["--horizon_hours", "24,1000"], "horizon 1000"),
    ],
)
def test_what_times_do_not_have_is_refused_in_one_line(times, tmp_path, capsys, words, expected):
    line = ["--data_path", times / "waiting.csv", "--output_dir", tmp_path / "run"]
    line += [] if "--mode" in words else ["--trajectory_only"]
    line += [] if "--horizon_hours" in words else ["--horizon_hours", "24,72"]
    assert refused(capsys, [*map(str, line), *words], expected, out=tmp_path / "run")


def test_several_runs_are_recalibrated_and_compared(times, tmp_path):
    (tmp_path / "rule.toml").write_text("consecutive = 3\n")
    words = ["--trajectory_only", "--data_path", times / "waiting.csv", "--output_dir", tmp_path]
    words += ["--horizon_hours", "24,72", "--trajectory_epochs", 1, "--log_file", "none"]
    words += ["--calibrate", "platt", "--seeds", 2, "--monitor_rule", tmp_path / "rule.toml"]
    assert main([*map(str, words)]) == 0
    for seed in (0, 1):
        folder = tmp_path / f"seed_{seed}" / "trajectory"
        moves = json.loads((folder / "metrics.json").read_text())["calibration"]["moves"]
        val = pd.read_csv(folder / "predictions_val.csv")
        values = metrics_at(val["event_hours"], val["event"], val["risk_24h"], 24)
        if "risk_24h" in moves:  # it fits these rows by construction
            assert (values["slope"], values["intercept"]) == pytest.approx((1, 0), abs=1e-6)
        model = TrajectoryModel.from_pretrained(folder)
        assert model.config["monitor_rule"]["consecutive"] == 3
        rules = model.trained.rules[model.trained.name]
        assert {*moves} == {name for name, rule in rules.items() if rule.is_moved}
        test = pd.read_csv(folder / "predictions_test.csv")
        rows = waiting().set_index("subject_id", drop=False).loc[test["id"]].drop(columns=EVENTS)
        found = model.predictions(rows)
        np.testing.assert_allclose(found[RISKS], test[RISKS], rtol=1e-5)
    assert any(moves)
    page = Page((tmp_path / "seeds_trajectory.html").read_text())
    assert "death by 72h" in page.text


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
    rows, options = waiting(4000), {"trajectory_epochs": 1, "horizon_hours": [72]}
    options["baselines"] = False
    found = [
        fit_trajectory(rows, **options, censoring=censoring).metrics["test"]
        for censoring in ("km", "regression")
    ]
    assert found[0]["brier"]["value"] != found[1]["brier"]["value"]
    assert found[0]["brier"]["value"] == pytest.approx(found[1]["brier"]["value"], rel=0.1)


def test_training_ranks_and_its_risks_have_the_level_of_the_events():
    options = {"horizon_hours": [24, 72], "batch_size": 32, "test": False, "baselines": False}
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
    weights = {"uncensored_risk_without_transplant_24h": rng.uniform(0.5, 1, 300)}
    table = rows[EVENTS].assign(id=rows["subject_id"], patient=rows["subject_id"])
    table = table.assign(**risks, **weights)
    found = evaluate(table, 0, targets=read_weights(targets_of(events), table)).of("m")["value"]
    ended = rows["event"].replace(2, 0)
    risk, (censoring,) = risks["m risk_without_transplant_24h"], weights.values()
    expected = metrics_at(rows["event_hours"], ended, risk, 24, censoring=censoring)
    for name, value in expected.items():
        assert found[f"{name}_without_transplant_24h"] == pytest.approx(value)


# --------------------------------------------------------------------------- ways of use


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folded")
    waiting(600).to_csv(folder / "waiting.csv", index=False)
    (folder / "waiting.json").write_text(json.dumps(ABOUT))
    words = ["--trajectory_only", "--data_path", folder / "waiting.csv", "--output_dir", folder]
    words += ["--horizon_hours", "24,72", "--trajectory_epochs", 2, "--log_file", "none"]
    with whole_reports():
        assert main([*map(str, words), "--folds", "2", "--final"]) == 0
    return folder


def test_folds_predict_each_row_once_and_final_learns_from_all(folded):
    table = pd.read_csv(folded / "folds_trajectory" / "predictions_folds.csv")
    rows = waiting(600).set_index("subject_id").loc[table["id"], EVENTS]
    np.testing.assert_array_equal(table[EVENTS], rows)
    assert sorted(table["id"]) == sorted(waiting(600)["subject_id"])
    metrics = json.loads((folded / "folds_trajectory" / "metrics.json").read_text())
    by_fold = []
    for k, part in table.groupby("fold"):
        own = pd.read_csv(folded / f"folds_trajectory/fold_{k}/trajectory/predictions_test.csv")
        shared = [name for name in own if name in table]
        names = [*own[shared].select_dtypes("float").columns.difference(EVENTS)]
        pd.testing.assert_frame_equal(part[names].rank(), own[names].rank().set_index(part.index))
        others = own[shared].columns.difference(names)
        pd.testing.assert_frame_equal(part[others].reset_index(drop=True), own[others])
        by_fold.append(
            metrics_at(part["event_hours"], part["event"], part["risk_72h"], 72)["auroc"]
        )
    found = metrics["folds"]
    assert found["auroc_72h"]["value"] == pytest.approx(np.mean(by_fold))
    whole = metrics_at(table["event_hours"], table["event"], table["risk_72h"], 72)
    assert found["oe_72h"]["value"] == pytest.approx(whole["oe"])
    assert found["effective_n_72h"]["value"] == pytest.approx(whole["effective_n"])
    best = found["models"]["ensemble"]
    assert best["reference"] == "blend with statics"
    expected = best["auroc"]["value"] - found["models"][best["reference"]]["auroc"]["value"]
    assert best["auroc"]["difference"] == pytest.approx(expected)
    final = TrajectoryModel.from_pretrained(folded / "trajectory")
    assert final.config["metrics"]["folds"]["auroc"] == found["auroc"]
    assert final.threshold == metrics["threshold"]


def test_a_cohort_is_reported_updated_and_reloaded(folded, tmp_path):
    rows = waiting(900, seed=3)
    rows["subject_id"] = "new" + rows["subject_id"]
    rows["event_hours"] *= 2.5  # half as many events by each horizon
    rows.to_csv(tmp_path / "new.csv", index=False)
    (tmp_path / "new.json").write_text(json.dumps(ABOUT))
    more = ["--update", str(tmp_path / "updated")]
    found = predicted(folded / "trajectory", tmp_path / "new.csv", tmp_path / "out.csv", *more)
    page = (tmp_path / "out.report.html").read_text()
    before = metrics_at(rows["event_hours"], rows["event"], found["risk_72h"], 72)
    assert before["oe"] < 0.7
    assert f"{before['oe']:.2f}" in page
    model = TrajectoryModel.from_pretrained(tmp_path / "updated")
    after = model.predictions(rows)
    moved = metrics_at(rows["event_hours"], rows["event"], after["risk_72h"], 72)
    assert moved["oe"] == pytest.approx(1, abs=0.02)
    assert moved["auroc"] == pytest.approx(before["auroc"])
    ensemble = [name for name in found if name.endswith("_ensemble")]
    pd.testing.assert_frame_equal(after[ensemble], found[ensemble], rtol=5e-6)
    assert (after["prediction"] == found["prediction"]).all()
    before_update = TrajectoryModel.from_pretrained(folded / "trajectory")
    curves = before_update.predict_cumulative_incidence(rows)
    assert [*curves] == ["id", "hour", "cause", "incidence"]
    at = curves[(curves["hour"] == 72) & (curves["cause"] == "death")].set_index("id")
    np.testing.assert_allclose(at.loc[found["id"], "incidence"], found["risk_72h"], rtol=5e-6)
    whole = curves.groupby(["id", "hour"])["incidence"].sum()
    assert whole.between(0, 1).all()
    again = model.predict_cumulative_incidence(rows.head(5), [0, 24, 50.5, 72])
    first = again[again["cause"] == "death"].pivot(index="id", columns="hour", values="incidence")
    expected = model.predictions(rows.head(5)).set_index("id").loc[first.index]
    np.testing.assert_allclose(first[24.0], expected["risk_24h"], rtol=1e-9)
    np.testing.assert_allclose(first[72.0], expected["risk_72h"], rtol=1e-9)
    assert (first[0.0] < 1e-12).all()
    assert first[50.5].between(first[24.0], first[72.0]).all()
    with pytest.raises(ValueError, match="last horizon"):
        model.predict_cumulative_incidence(rows.head(5), [100])


def test_a_used_baseline_and_a_goal_are_those_of_the_folds(folded, tmp_path):
    waiting(60, seed=4).drop(columns=EVENTS).to_csv(tmp_path / "new.csv", index=False)
    words = folded / "trajectory", tmp_path / "new.csv", tmp_path / "out.csv"
    found = predicted(*words, "--use", "Aalen-Johansen", "--threshold", "0.05")
    assert found["probability"].nunique() == 1
    assert found["prediction"].nunique() == 1
    goal = predicted(*words, "--threshold", "sensitivity 0.9")
    assert set(goal["prediction"]) == {0, 1}
    table = pd.read_csv(folded / "folds_trajectory" / "predictions_folds.csv")
    ends = goal.groupby("prediction")["probability"].agg(["min", "max"])
    case = (table["event"] == 1) & (table["event_hours"] <= 24)
    risk = table.loc[case, "probability"]  # nobody is censored before
    assert (risk > ends.loc[0, "max"]).mean() >= 0.9 > (risk > ends.loc[1, "min"]).mean() - 0.1


def test_labels_have_no_curves_and_the_classifier_takes_no_times(tmp_path, capsys):
    rows = waiting(200).drop(columns=EVENTS)
    rows["label_escalation"] = np.arange(200) % 2
    model = fit_trajectory(rows, trajectory_epochs=1, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="label"):
        model.predict_cumulative_incidence(rows)
    with pytest.raises(InputError, match="label_escalation"):
        TrajectoryClassifier().fit(waiting(200))


def test_no_row_counts_for_more_than_twenty():
    """Who is surely transplanted at once has next to no chance of not being so."""
    rows, rng = waiting(400), np.random.default_rng(0)
    sick = rows["clinical_trajectory"].str.extract(r"-> ([\d.]+)")[0].astype(float) > 22
    rows.loc[sick, "event"], rows.loc[sick, "event_hours"] = 2, rng.uniform(1, 20, sick.sum())
    late = np.flatnonzero(sick)[:2]
    rows.loc[late, "event"], rows.loc[late, "event_hours"] = 1, 23.0
    about = Description(series="MELD", events=("death", "transplant"), interventions=(2,))
    data = MIMICtrajectoryDataset(rows, description=about, horizon_hours=[24.0])
    usual, without = targets_of(data.competing_events)
    observed, (_, target) = observed_rows([usual, without], data, np.arange(400), "km", 0)
    known = target.known(observed)
    assert known.largest_weight > 3
    assert known.cut == 0
    rarer = replace(target, watched=Watched(given=target.watched.probability / 10))
    known = rarer.known(observed)
    assert known.largest_weight == 20
    assert known.cut > 0
