"""``monitor``: what it reads, refuses and writes; ``--monitor_rule`` in a checkpoint."""

import re
import stat
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.commands import monitoring as reading
from medgemma_clinical.commands.prediction_files import read_table
from medgemma_clinical.commands.predictions import inputs_path
from medgemma_clinical.evaluation import monitoring
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import MODEL
from medgemma_clinical.inference.hub import save_model, shared_copy
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.trained_model import read_model_sha256, read_trained_config
from pages import Page
from predicting import MARKER, predicted, refused, write_data
from time_rows import OUTCOME, TARGETS
from trajectories import LABEL

pytestmark = pytest.mark.slow

STAGE = STAGE_NAMES["trajectory"]
REFERENCE = {"patients": 500, "shift": 0.0, "multiplier": 1.0}
REFERENCE |= {"covariance": [[0.02, 0.01], [0.01, 0.01]], "edges": []}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(monitoring, "REPLICATES", 100)
    monkeypatch.setattr(monitoring, "YEARS", 200)
    monkeypatch.setattr("medgemma_clinical.evaluation.metrics.REPLICATES", 50)
    monkeypatch.setattr(reading, "latest_now", lambda: pd.Timestamp("2026-06-01T12:00Z"))


@pytest.fixture(scope="module")
def checkpoint(runs, tmp_path_factory):
    """The stage 1 of ``runs``, as if enough held-out patients had been there."""
    content = torch.load(runs / TRAJECTORY_FILE, weights_only=True)
    names = [STAGE, *content["config"]["models"]]
    content["config"]["reference"] = dict.fromkeys(names, REFERENCE)
    path = tmp_path_factory.mktemp("monitored") / TRAJECTORY_FILE
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def scored(runs, tmp_path_factory):
    """Predictions of 400 new rows by the command line, and their outcomes over four months."""
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:600].reset_index(drop=True)
    folder = tmp_path_factory.mktemp("scored")
    data = write_data(rows.drop(columns=LABEL), folder / "new.csv")
    predicted(runs / "trajectory", data, folder / "out.csv")
    days = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(400) * 120 // 400, unit="D")
    outcomes = pd.DataFrame({"id": rows["subject_id"], "label": rows[LABEL]})
    outcomes["admitted"] = days.strftime("%Y-%m-%d")
    outcomes["ward"] = np.where(np.arange(400) % 2, "A", "B")
    return folder / "out.csv", outcomes


def words_of(predictions, checkpoint, outcomes, folder, *more):
    path = folder / "outcomes.csv"
    outcomes.to_csv(path, index=False)
    words = ["monitor", str(predictions), "--checkpoint", str(checkpoint)]
    words += ["--outcomes", str(path), "--date", "admitted"]
    return [*words, "--output_dir", str(folder / "out"), *more]


def run(capsys, *arguments):
    """Return the console's lines, and the table."""
    capsys.readouterr()
    words = words_of(*arguments)
    assert trainer.main(words) == 0
    table = pd.read_csv(arguments[3] / "out" / "monitor.csv", keep_default_na=False)
    return capsys.readouterr().out.splitlines(), table


def test_predictions_say_when_and_the_inputs_lie_beside_for_their_owner(runs, scored):
    predictions, _ = scored
    table, inputs = pd.read_csv(predictions), pd.read_csv(inputs_path(predictions))
    assert [*table][-2:] == ["predicted_at", MODEL]
    assert table[MODEL].unique().tolist() == [read_model_sha256(runs / "trajectory")]
    assert table["predicted_at"].nunique() == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", table["predicted_at"][0])
    assert stat.S_IMODE(inputs_path(predictions).stat().st_mode) == 0o600
    assert inputs["id"].equals(table["id"])
    rows = pd.read_csv(SAMPLE).iloc[200:600].reset_index(drop=True)
    last = rows["clinical_trajectory"].str.extract(r"([\d.]+) \([\d.]+h\)$")[0].astype(float)
    assert inputs["Serum bicarbonate"].tolist() == last.tolist()
    assert inputs["Serum bicarbonate measured"].eq(1).all()
    name = "static_weight [kg]"
    pd.testing.assert_series_equal(inputs[name], rows[name], check_dtype=False)
    assert inputs[f"{name} measured"].equals(rows[name].notna().astype(int))


def test_the_first_line_is_the_verdict_and_the_files_are_whole(
    scored, checkpoint, tmp_path, capsys
):
    lines, table = run(capsys, scored[0], checkpoint, scored[1], tmp_path, "--site", "ward")
    assert lines[0] == "monitor: no action"
    assert {*table["site"]} == {"", "A", "B"}
    assert sorted({*table["period"]}) == ["2026-01", "2026-02", "2026-03", "2026-04"]
    page = Page((tmp_path / "out" / "monitor.html").read_text())
    assert "Treatment that the model prompts" in page.text
    raised = scored[1].assign(label="1")
    raised.loc[::3, "label"] = "0"
    lines, _ = run(capsys, scored[0], checkpoint, raised, tmp_path)
    assert lines[0].startswith("monitor: ")
    assert any("recalibrate" in line for line in lines)
    update = next(line for line in lines if "--update" in line)
    assert f"predict --checkpoint {checkpoint} --data_path" in update
    assert (tmp_path / "out" / "monitor.1.html").is_file(), "the earlier page is moved aside"


def test_ids_count_once_and_what_is_left_out_is_counted(scored, checkpoint, tmp_path, capsys):
    predictions, outcomes = scored
    later = pd.read_csv(predictions, dtype=str)
    later["predicted_at"], later["probability"] = "2030-01-01", "0.999"
    later.loc[0, "id"], later.loc[1, "probability"] = "stranger", ""
    inputs = pd.read_csv(inputs_path(predictions), dtype=str)
    inputs.loc[0, "id"] = "stranger"
    later.to_csv(tmp_path / "later.csv", index=False)
    inputs.to_csv(tmp_path / "later.inputs.csv", index=False)
    words = words_of(predictions, checkpoint, outcomes, tmp_path)
    words.insert(2, str(tmp_path / "later.csv"))
    assert trainer.main([*words, "--use", "stage"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "later predictions of the same id, left out: 399" in lines
    assert "patients without a line of outcomes: 1" in lines
    table = pd.read_csv(tmp_path / "out" / "monitor.csv")
    assert table["period"].max() == "2030-01", "no line of outcomes: the time of the prediction"
    few = run(capsys, predictions, checkpoint, outcomes.head(300), tmp_path)[0]
    assert "patients without a line of outcomes: 100" in few
    (tmp_path / "alone.csv").write_bytes(predictions.read_bytes())
    alone = run(capsys, tmp_path / "alone.csv", checkpoint, outcomes, tmp_path)[0]
    assert "inputs not checked" in alone[0]


def test_a_series_in_another_unit_stops(scored, checkpoint, tmp_path, capsys):
    out = tmp_path / "out.csv"
    out.write_bytes(scored[0].read_bytes())
    inputs = pd.read_csv(inputs_path(scored[0]))
    inputs.loc[300:, "Serum bicarbonate"] *= 10
    inputs.to_csv(inputs_path(out), index=False)
    lines, table = run(capsys, out, checkpoint, scored[1], tmp_path)
    assert lines[0].startswith("monitor: stop: Serum bicarbonate in 2026-04: the values fit ")
    median = table[table["metric"] == "median: Serum bicarbonate"]
    assert (median["value"] > median["limit_high"].astype(float)).tolist() == [0, 0, 0, 1]


def test_no_update_is_advised_from_months_of_another_unit(scored, checkpoint, tmp_path, capsys):
    """Too many events in two months: of other patients, or of risks by a wrong unit."""
    outcomes = scored[1].copy()
    outcomes.loc[200:, "label"] = np.where(np.arange(len(outcomes) - 200) % 3, "1", "0")
    out = tmp_path / "out.csv"
    out.write_bytes(scored[0].read_bytes())
    inputs = pd.read_csv(inputs_path(scored[0]))
    for begin, is_advised in ((len(inputs), True), (200, False)):
        other = inputs.copy()
        other.loc[begin:, "Serum bicarbonate"] *= np.where(
            np.arange(len(inputs) - begin) % 2, 10, 1
        )
        other.to_csv(inputs_path(out), index=False)
        lines, _ = run(capsys, out, checkpoint, outcomes, tmp_path)
        assert any("recalibrate" in line for line in lines) == is_advised
        assert any("--update" in line for line in lines) == is_advised
        assert ("divided by 10" in lines[0]) != is_advised


# ------------------------------------------------------------------ times to events


@pytest.fixture(scope="module")
def checkpoint_of_times(checkpoint, tmp_path_factory):
    """A checkpoint whose risks are of an event by a horizon."""
    content = torch.load(checkpoint, weights_only=True)
    config = content["config"]
    rules = {target.name: config["decision"]["label"] for target in TARGETS}
    config |= {**OUTCOME.config, "decision": rules}
    config["models"] = dict.fromkeys(config["models"], rules)
    path = tmp_path_factory.mktemp("times") / TRAJECTORY_FILE
    torch.save(content, path)
    return path


def outcomes_of_times(outcomes):
    """Return outcomes by which some events are later, and some rows are not watched until 24 h."""
    rng, n = np.random.default_rng(0), len(outcomes)
    kind = np.where(outcomes["label"] == "1", rng.choice([1, 1, 2], n), rng.choice([0, 0, 0, 2], n))
    hours = np.where(kind == 0, rng.choice([12.0, 24.0, 90.0, 91.0], n), rng.integers(1, 40, n))
    table = outcomes.assign(event_hours=hours.astype(str), event=kind.astype(str))
    table.loc[rng.random(n) < 0.02, ["event_hours", "event"]] = ""
    table.loc[n - 1, ["event_hours", "event"]] = "3", "1"
    return table.drop(columns="label")


def test_times_are_judged_by_what_is_known_at_the_horizon(
    scored, checkpoint_of_times, tmp_path, capsys, monkeypatch
):
    predictions, outcomes = scored[0], outcomes_of_times(scored[1])
    hours, event = (pd.to_numeric(outcomes[name]) for name in ("event_hours", "event"))
    labels = pd.Series(np.nan, outcomes.index)
    labels[(event > 0) | (hours >= 24)] = 0.0
    labels[(event == 1) & (hours <= 24)] = 1.0
    is_last = outcomes["admitted"] == outcomes["admitted"].max()
    assert (labels[is_last] == 1).any(), "an event is known earlier than its absence"
    labels[is_last] = np.nan  # the horizon has not passed
    ended = (event == 0) & (hours < 24) & ~is_last  # whose status nobody will ever know
    now = pd.Timestamp(outcomes["admitted"].max(), tz="UTC") + pd.Timedelta(hours=47)
    monkeypatch.setattr(reading, "present", lambda: now)
    lines, table = run(capsys, predictions, checkpoint_of_times, outcomes, tmp_path)
    waits = labels.isna() & ~ended
    share = f"{TARGETS[0].title}: {100 * waits.mean():.1f} % not known yet"
    left_out = f"{TARGETS[0].title}: {100 * ended.mean():.1f} % never known, left out"
    for note in (share, left_out):
        assert note in lines
        assert note in Page((tmp_path / "out" / "monitor.html").read_text()).text
    risk, month = pd.read_csv(predictions)["probability"], outcomes["admitted"].str[:7]
    for period, own in table.groupby("period"):
        values = own.set_index("metric")["value"].replace("", np.nan).astype(float)
        known = (month == period) & labels.notna()
        patients = ((month == period) & ~ended).sum()
        assert (values["patients"], values["known"]) == (patients, known.sum())
        assert values["oe"] == pytest.approx(labels[known].sum() / risk[known].sum())
    as_labels = outcomes.drop(columns=["event_hours", "event"])
    as_labels["label"] = labels.map({0.0: "0", 1.0: "1"}).fillna("")
    _, again = run(capsys, predictions, checkpoint_of_times, as_labels, tmp_path)
    both = [
        x[x["metric"].isin(["known", "oe", "auroc", "brier"])].set_index(["period", "metric"])
        for x in (again, table)
    ]
    pd.testing.assert_series_equal(*(x["value"] for x in both))
    later = now + pd.Timedelta(hours=2)
    monkeypatch.setattr(reading, "present", lambda: later)
    lines, _ = run(capsys, predictions, checkpoint_of_times, outcomes, tmp_path)
    assert share not in lines, "then it has"


@pytest.mark.parametrize(("column", "cell"), [("event_hours", "-1"), ("event", "1.5")])
def test_a_wrong_time_or_event_is_refused(
    column, cell, scored, checkpoint_of_times, tmp_path, capsys
):
    outcomes = outcomes_of_times(scored[1])
    outcomes.loc[4, column] = cell
    words = words_of(scored[0], checkpoint_of_times, outcomes, tmp_path)
    assert refused(capsys, words, column, "line 6", out=tmp_path / "out" / "monitor.html")
    without = outcomes.drop(columns=column)
    words = words_of(scored[0], checkpoint_of_times, without, tmp_path)
    assert refused(capsys, words, "line 1", out=tmp_path / "out" / "monitor.html")


# ------------------------------------------------------------------ dates


@pytest.mark.parametrize("year", ["2062", "1926"])
def test_dates_typed_wrong_hide_no_stop(year, scored, checkpoint, tmp_path, capsys):
    out, outcomes = tmp_path / "out.csv", scored[1].copy()
    pd.read_csv(scored[0], dtype=str).assign(predicted_at="2026-05-01").to_csv(out, index=False)
    inputs = pd.read_csv(inputs_path(scored[0]))
    inputs.loc[300:, ["Serum bicarbonate", "Serum bicarbonate measured"]] = np.nan, 0
    inputs.to_csv(inputs_path(out), index=False)
    assert run(capsys, out, checkpoint, outcomes, tmp_path)[0][0].startswith("monitor: stop: ")
    outcomes.loc[2:26, "admitted"] = outcomes["admitted"].str.replace("2026", year)
    if year == "1926":
        lines, _ = run(capsys, out, checkpoint, outcomes, tmp_path)
        assert lines[0].startswith("monitor: stop: Serum bicarbonate in 2026-04: never measured")
        note = "dates more than a year before their prediction: 25"
        assert note in lines
        assert note in Page((tmp_path / "out" / "monitor.html").read_text()).text
        return
    words = words_of(out, checkpoint, outcomes, tmp_path)
    words[words.index("--output_dir") + 1] = str(tmp_path / "refused")
    place = "outcomes.csv", "admitted", "25", "line 4"
    assert refused(capsys, words, *place, out=tmp_path / "refused" / "monitor.html")


@pytest.mark.parametrize(
    ("newest", "date", "is_refused"),
    [
        ("2026-05-01", "2026-06-01", False),
        ("2026-05-01", "2026-06-02", True),
        ("2150-01-01", "2151-01-01", False),
        ("2150-01-01", "2151-02-01", True),
    ],
)
def test_outcomes_are_known_by_today_or_a_year_after_shifted_predictions(
    newest, date, is_refused, scored, checkpoint, tmp_path, capsys
):
    out, outcomes = tmp_path / "p.csv", scored[1].copy()
    pd.read_csv(scored[0], dtype=str).assign(predicted_at=newest).to_csv(out, index=False)
    outcomes.loc[0, "admitted"] = date
    words = words_of(out, checkpoint, outcomes, tmp_path)
    if is_refused:
        assert refused(capsys, words, "admitted", "line 2")
    else:
        assert trainer.main(words) == 0


# ------------------------------------------------------------------ the model


def test_predictions_of_another_model_are_refused(scored, checkpoint, tmp_path, capsys):
    table, other = pd.read_csv(scored[0], dtype=str), tmp_path / "other.csv"
    table.assign(**{MODEL: "0" * 64}).to_csv(other, index=False)
    words = words_of(scored[0], checkpoint, scored[1], tmp_path)
    assert refused(capsys, [words[0], str(other), *words[2:]], "other.csv", checkpoint)
    assert refused(capsys, [*words[:2], str(other), *words[2:]], "other.csv", checkpoint)
    table.loc[5, MODEL] = "0" * 64
    table.to_csv(other, index=False)
    assert refused(capsys, [words[0], str(other), *words[2:]], "other.csv")


def test_predictions_that_name_no_model_are_noted(scored, checkpoint, tmp_path, capsys):
    path = tmp_path / "unnamed.csv"
    pd.read_csv(scored[0], dtype=str).drop(columns=MODEL).to_csv(path, index=False)
    for file, count in ((path, 1), (scored[0], 0)):
        lines, _ = run(capsys, file, checkpoint, scored[1], tmp_path)
        assert sum(MODEL in line for line in lines) == count


@pytest.mark.parametrize("stage", ["trajectory", "classification"])
def test_copies_have_the_name_of_their_model_and_an_update_has_another(stage, runs, tmp_path):
    trained = trainer.TrajectoryModel.from_pretrained(runs / stage).trained
    for part in ("val", "test"):
        names = pd.read_csv(runs / stage / f"predictions_{part}.csv")[MODEL]
        assert names.unique().tolist() == [trained.sha256]
    save_model(replace(trained, baselines=None), tmp_path / "saved")
    shared_copy(trained, tmp_path / "shared")
    for path in (runs / stage, tmp_path / "saved", tmp_path / "shared"):
        assert read_model_sha256(path) == trained.sha256
    config = trained.config
    own = config["decision"]["label"]
    same = {"decision": {"label": {**own, "threshold": 0.123}}}
    assert replace(trained, config={**config, **same}).sha256 == trained.sha256
    changes = [{"decision": {"label": {**own, "multiplier": 0.123}}}]
    changes += [{"updated": {"model": "ensemble", "data_sha256": x}} for x in "ab"]
    names = {replace(trained, config={**config, **change}).sha256 for change in changes}
    assert len(names - {trained.sha256}) == len(changes)


def test_the_model_of_the_risks_is_found_and_may_be_chosen(runs, scored, checkpoint, tmp_path):
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:600].drop(columns=LABEL)
    data = write_data(rows, tmp_path / "new.csv")
    predicted(runs / "trajectory", data, tmp_path / "p.csv", "--use", "ensemble")
    words = words_of(tmp_path / "p.csv", checkpoint, scored[1], tmp_path)
    for more, name in (((), "ensemble"), (("--use", "stage"), STAGE)):
        assert trainer.main([*words, *more]) == 0
        assert f": {name} after go-live" in (tmp_path / "out" / "monitor.html").read_text()


def test_no_recommended_model_is_refused(scored, checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["best_model"] = None
    torch.save(content, tmp_path / "none.pt")
    words = words_of(scored[0], tmp_path / "none.pt", scored[1], tmp_path, "--use", "best")
    assert refused(capsys, words, "--use best", "--use NAME", out=tmp_path / "out" / "monitor")


def test_alerts_and_net_benefit_are_at_the_threshold_of_the_predictions(
    runs, scored, checkpoint, tmp_path, capsys
):
    rows = pd.read_csv(SAMPLE, dtype=str).iloc[200:600].drop(columns=LABEL)
    data, out = write_data(rows, tmp_path / "new.csv"), tmp_path / "p.csv"
    threshold = str(predicted(runs / "trajectory", data, out)["probability"].quantile(0.8))
    found = predicted(runs / "trajectory", data, out, "--threshold", threshold)
    assert refused(capsys, words_of(out, checkpoint, scored[1], tmp_path), "--threshold")
    _, table = run(capsys, out, checkpoint, scored[1], tmp_path, "--threshold", threshold)
    shares = table.loc[(table["metric"] == "positives") & (table["site"] == ""), "value"]
    assert shares.astype(float).mean() == pytest.approx(found["prediction"].mean(), abs=0.001)


@pytest.mark.parametrize(
    ("file", "column", "cell"),
    [
        ("outcomes", "label", f"{MARKER}"),
        ("outcomes", "label", "2"),
        ("outcomes", "admitted", "03/04/2026"),
        ("outcomes", "admitted", ""),
        ("outcomes", "admitted", "0026-03-02"),
        ("outcomes", "id", "132752"),
        ("predictions", "probability", "1.2"),
        ("predictions", "predicted_at", f"{MARKER}"),
    ],
)
def test_a_wrong_cell_is_refused_with_file_and_line(
    file, column, cell, scored, checkpoint, tmp_path, capsys
):
    tables = {"outcomes": scored[1].copy(), "predictions": pd.read_csv(scored[0], dtype=str)}
    tables[file].loc[4, column] = tables[file].loc[2, "id"] if column == "id" else cell
    tables["predictions"].to_csv(tmp_path / "p.csv", index=False)
    words = words_of(tmp_path / "p.csv", checkpoint, tables["outcomes"], tmp_path)
    name = "outcomes.csv" if file == "outcomes" else "p.csv"
    assert refused(capsys, words, name, "line 6", out=tmp_path / "out" / "monitor.html")
    assert MARKER not in capsys.readouterr().err


@pytest.mark.parametrize(
    "fault",
    ["date", "site", "outcomes", "ids", "use", "calibration", "inputs", "threshold", "file"],
)
def test_what_is_not_there_is_refused(fault, runs, scored, checkpoint, tmp_path, capsys):
    words = words_of(scored[0], checkpoint, scored[1], tmp_path)
    if fault == "date":
        words[words.index("admitted")] = "discharged"
    elif fault == "site":
        words += ["--site", "region"]
    elif fault == "outcomes":
        (tmp_path / "outcomes.csv").unlink()
    elif fault == "ids":  # else every month waits for ever
        others = scored[1].assign(id=scored[1]["id"] + "@2026")
        words = words_of(scored[0], checkpoint, others, tmp_path)
    elif fault == "use":
        words += ["--use", "oracle"]
    elif fault == "threshold":
        words += ["--threshold", "0.97"]
    elif fault == "file":
        (tmp_path / "out").write_text("a file")
    elif fault == "calibration":
        words[words.index(str(checkpoint))] = str(runs / "trajectory")
    else:
        (tmp_path / "p.csv").write_bytes(scored[0].read_bytes())
        pd.read_csv(inputs_path(scored[0])).head(7).to_csv(tmp_path / "p.inputs.csv", index=False)
        words[1] = str(tmp_path / "p.csv")
    assert refused(capsys, words, out=tmp_path / "out" / "monitor.html")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_tables_of_outcomes_may_have_the_separators_of_other_tables(mark, scored, tmp_path):
    scored[1].assign(note="a, b").to_csv(tmp_path / "outcomes.csv", sep=mark, index=False)
    found = read_table(tmp_path / "outcomes.csv", ["id", "label", "admitted"])
    pd.testing.assert_frame_equal(found.drop(columns="note"), scored[1])


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    "text", ["known = 2", "kwnon = 0.9", "known = ", "known = 'all'", "false_alarms = 0"]
)
def test_a_wrong_rule_is_refused_before_the_training(text, tmp_path, capsys):
    (tmp_path / "rule.toml").write_text(text)
    words = ["--trajectory_only", "--data_path", str(SAMPLE), "--output_dir", str(tmp_path / "r")]
    words += ["--monitor_rule", str(tmp_path / "rule.toml"), "--log_file", "none"]
    assert refused(capsys, words, "rule.toml")
    assert not (tmp_path / "r").exists()
    assert refused(capsys, [*words[:-3], str(tmp_path / "no.toml"), *words[-2:]], "no.toml")


def test_the_rule_of_a_training_is_kept_and_stands_in_the_card(runs):
    for stage in ("trajectory", "classification"):
        assert read_trained_config(runs / stage)["monitor_rule"]["consecutive"] == 2
    card = (runs / "classification" / "best" / "README.md").read_text()
    assert "Recalibrate when observed divided by expected events" in card
