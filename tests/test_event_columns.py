"""Times to competing events in the DKA format: columns, names, rows to score, the check."""

import json
import logging
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import Description, InputError, MIMICtrajectoryDataset
from event_files import write_table
from medgemma_clinical.data import checks
from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.training_data import prepare_data
from trajectories import GAP, LABEL, SERIES, table_of

NAN = float("nan")
HORIZONS = [24.0, 72.0]
NAMED = Description(events=("death", "transplant"), interventions=(2,))


def events_table(events=(0, 1, 2, NAN), hours=(9, 0, 30.5, NAN), **columns):
    patients = [f"p{k}" for k in range(len(events))]
    table = table_of(["1 (0h) -> 2 (3h)"] * len(events), subject_id=patients)
    return table.drop(columns=LABEL).assign(event_hours=hours, event=events, **columns)


def read(table, about=NAMED, horizon_hours=HORIZONS, **options):
    return MIMICtrajectoryDataset(table, description=about, horizon_hours=horizon_hours, **options)


# --------------------------------------------------------------------------- columns


def test_two_columns_are_times_to_events_with_the_names_of_the_description():
    table = pd.concat([events_table(), events_table([1], [1]).assign(**{SERIES: ""})])
    dataset = read(table.assign(subject_id=range(5)))
    np.testing.assert_array_equal(dataset.events, [0, 1, 2, NAN])
    np.testing.assert_array_equal(dataset.labels, [0, 1, 0, NAN])
    expected = [(0, 9, 0), (0, 0, 1), (0, 30.5, 2), (0, NAN, NAN)]
    np.testing.assert_array_equal(dataset.targets(), expected)
    np.testing.assert_array_equal(dataset.targets(np.array([1])), expected[1:2])
    names = ("death", "transplant")
    assert dataset.competing_events == CompetingEvents(names, (24.0, 72.0), (2,))
    assert (dataset.outcome_kind, dataset.outcome) == ("time", "death")
    assert dataset.question == "Will the outcome death occur?"
    assert dataset.task_description()["Horizon"].startswith("24h, 72h from")
    options = {"max_len": 20, "outcome_kind": "time", "horizon_hours": [24.0, 72.0]}
    assert json.loads(json.dumps(dataset.read_options)) == options


@pytest.mark.parametrize(
    ("about", "options", "names"),
    [
        (GAP, {}, ("event 1", "event 2")),
        (Description(), {"outcome": "ICU"}, ("ICU", "event 2")),
        (Description(events=("a", "b", "c")), {}, ("a", "b", "c")),
    ],
)
def test_events_are_as_many_as_are_named_or_else_as_the_largest_number(about, options, names):
    dataset = read(events_table(), about, **options)
    assert (dataset.competing_events.names, dataset.outcome) == (names, names[0])
    assert names[0] in dataset.question


def test_the_question_of_a_description_is_asked_where_it_is_about_the_first_event():
    about = Description(events=("death",), outcome="death", question="Will she die?")
    assert read(events_table([0, 1], [1, 1]), about).question == "Will she die?"
    other = Description(events=("death",), outcome="AKI", question="Will she have AKI?")
    assert "death" in read(events_table([0, 1], [1, 1]), other).question


def test_a_label_is_learned_where_it_stands_and_times_where_they_are_asked_for():
    table = events_table(**{LABEL: [1, 0, 0, 0]})
    label, time = read(table, horizon_hours=None), read(table, outcome_kind="time")
    without = MIMICtrajectoryDataset(table.drop(columns=["event", "event_hours"]))
    assert (label.outcome_kind, time.outcome_kind) == ("label", "time")
    assert label.read_options == without.read_options == {"max_len": 20, "label_column": LABEL}
    assert label.fingerprint() == without.fingerprint() != time.fingerprint()
    assert (label.events, label.competing_events) == (None, None)
    assert label.targets().tolist() == [1, 0, 0, 0]
    assert f"{LABEL} is taken for" not in "".join(time.warnings)
    with pytest.raises(InputError, match="column event_hours: "):
        read(table.drop(columns="event_hours"), outcome_kind="time")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"event": [0, 3, 2, NAN]}, "row 1, column event: "),
        ({"event": [0, -1, 2, NAN]}, "row 1, column event: "),
        ({"event": [0, 1.5, 2, NAN]}, "row 1, column event: "),
        ({"event": ["0", "dead", "2", ""]}, "row 1, column event: "),
        ({"event": [0, NAN, 2, NAN]}, "row 1, column event: "),
        ({"event_hours": [9, NAN, 3, NAN]}, "row 1, column event: "),
        ({"event_hours": [9, -0.1, 3, NAN]}, "row 1, column event_hours: "),
        ({"event_hours": ["9", "soon", "3", ""]}, "row 1, column event_hours: "),
        ({"event": NAN, "event_hours": NAN}, "column event: "),
        ({LABEL: 1}, "--horizon_hours: "),
    ],
)
def test_a_wrong_cell_is_refused_by_its_place(change, place):
    with pytest.raises(InputError, match=place):
        read(events_table().assign(**change))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        *(({"horizon_hours": x}, "--horizon_hours: ") for x in (None, [], [72, 24], [0], [NAN])),
        ({"outcome_kind": "label"}, f"column {LABEL}: "),
        ({"label_column": "died"}, "column died: "),
        ({"outcome_kind": "times"}, "--outcome_kind times: "),
        ({"about": Description(interventions=(3,))}, "key interventions"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options, place):
    with pytest.raises(InputError, match=place):
        read(events_table(), **options)


# --------------------------------------------------------------------------- rows to score

CONFIG = {
    "read_options": {"max_len": 2, "outcome_kind": "time", "horizon_hours": HORIZONS},
    "events": asdict(CompetingEvents(("death", "transplant"), (24.0, 72.0), (2,))),
    "features": ["Anion gap"],
    "units": ["mEq/L"],
    "inputs": {"static": [], "prediction_time": False},
    "outcome": "death",
    "question": "Will the patient die?",
}


def scored(source):
    findings = Findings("x", strict=False)
    (rows,) = MIMICtrajectoryDataset.scoring_rows(source, CONFIG, findings, 100)
    return rows, findings


def test_new_rows_are_read_as_the_checkpoint_says_with_or_without_their_events():
    rows, findings = scored(events_table([0, 1, 3, 2], [9, 0, 30.5, NAN]).assign(**{LABEL: 1}))
    np.testing.assert_array_equal(rows.dataset.targets(), [(0, 9, 0), (0, 0, 1)])
    assert {*findings.problems} == {2, 3}
    assert rows.dataset.competing_events.interventions == (2,)
    assert rows.dataset.read_options == CONFIG["read_options"]
    assert rows.dataset.outcome == "death"
    assert not findings.counts.total()
    for missing in (["event"], ["event", "event_hours"]):
        rows, _ = scored(events_table().drop(columns=missing))
        unknown = rows.dataset.collate([0, 3])["outcomes"].isnan()
        assert unknown.tolist() == [[False, True, True]] * 2
        assert np.isnan(rows.dataset.labels).all()


def test_events_of_other_names_are_refused(tmp_path):
    path = write_table(events_table(), tmp_path / "new.csv")
    path.with_suffix(".json").write_text('{"events": {"1": "death", "2": "transplant"}}')
    assert len(scored(path)[0].dataset) == 4
    path.with_suffix(".json").write_text('{"events": {"1": "death", "2": "discharge"}}')
    with pytest.raises(InputError, match="column event: "):
        scored(path)


# --------------------------------------------------------------------------- leaks


def test_a_future_that_is_altered_changes_no_input():
    table = events_table([0, 1, 2, 0], [9, 1, 30, 40])
    future = table.assign(event=[2, 0, 1, 1], event_hours=[80, 2, 3, 0])
    before, after = (read(each) for each in (table, future))
    assert before.fingerprint() != after.fingerprint()
    assert before.row_fingerprint() != after.row_fingerprint()
    batches = [dataset.collate(range(4)) for dataset in (before, after)]
    for name in before.collate([0]).keys() - {"labels", "outcomes"}:
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    np.testing.assert_array_equal(before.summaries(), after.summaries())
    assert [before.prompt(i) for i in range(4)] == [after.prompt(i) for i in range(4)]


# --------------------------------------------------------------------------- check


def population(patients=300, seed=0, **columns):
    rng = np.random.default_rng(seed)
    return events_table(rng.permutation(np.arange(patients) % 3), rng.integers(1, 99, patients))


def slow_uncensored(hours, events, at):
    """The definition, a time of the sample after the other."""
    share = 1.0
    for time in sorted({*hours}):
        if time <= at:
            leave = sum((h == time) and (e != 0) for h, e in zip(hours, events, strict=True))
            at_risk = sum(h >= time for h in hours) - leave
            lost = sum((h == time) and (e == 0) for h, e in zip(hours, events, strict=True))
            share *= 1 - lost / at_risk if at_risk else 1
    return share


def test_who_is_still_watched_is_the_estimate_of_kaplan_and_meier_with_ties():
    rng = np.random.default_rng(1)
    for _ in range(20):
        hours, events = rng.integers(0, 9, 30).astype(float), rng.integers(0, 3, 30).astype(float)
        at = np.array([-1.0, 0.0, 2.5, 4.0, 8.0, 99.0])
        expected = [slow_uncensored(hours, events, hour) for hour in at]
        np.testing.assert_allclose(checks.uncensored(hours, events, at), expected)
    half = checks.uncensored(np.array([5.0, 5.0, 9.0, 9.0]), np.array([0.0, 1, 1, 1]), [4, 5, 9])
    np.testing.assert_allclose(half, [1, 2 / 3, 2 / 3])  # the event at 5 h comes first


def test_the_check_shows_events_follow_up_and_censoring(tmp_path, capsys):
    path = write_table(population(), tmp_path / "data.csv")
    path.with_suffix(".json").write_text('{"events": {"1": "death", "2": "transplant"}}')
    assert dataset_format.main(["check", str(path), "--horizon_hours", "24,72"]) == 0
    shown = capsys.readouterr().out
    assert "rows by event: censored 100, death 100, transplant 100" in shown
    assert "hours to the event or the end of the record: median " in shown
    dataset = read(pd.read_csv(path))
    for hour in (24, 72):
        share = slow_uncensored(dataset.event_hours.tolist(), dataset.events.tolist(), hour)
        assert f"{share:.1%} at {hour} h" in shown
    assert dataset_format.main(["check", str(path)]) == 2
    assert "--horizon_hours" in capsys.readouterr().err
    label = ["--outcome_kind", "label", "--horizon_hours", "24"]
    assert dataset_format.main(["check", str(path), *label]) == 2


def test_a_cause_of_few_training_patients_is_refused_and_may_be_merged(caplog):
    caplog.set_level(logging.INFO)
    table = population().assign(split=(["train"] * 8 + ["val", "test"]) * 30)
    ten, rest = np.split(np.flatnonzero(table["split"].eq("train") & table["event"].eq(2)), [10])
    table.loc[rest, "event"], table.loc[ten, "event_hours"] = 0, 1.0
    late = table.assign(event_hours=table["event_hours"].where(~table.index.isin(ten[:1]), 1e4))
    patients = {"max_samples": 0, "seed": 0, "prompts": PromptOptions()}
    assert len(prepare_data(read(table), **patients).dataset) == 300
    with pytest.raises(InputError, match="event 2"):  # it happens after the last horizon
        prepare_data(read(late), **patients)
    table.loc[table["event"].eq(2) & table["split"].eq("train"), "subject_id"] = "p0"
    table["split"] = np.where(table["subject_id"].eq("p0"), "train", table["split"])
    for use in (
        lambda: prepare_data(read(table), **patients),
        lambda: checks.check(lambda: read(table, allow_duplicates=True)),
    ):
        with pytest.raises(InputError, match="event 2, transplant, by"):
            use()
    merged = read(table.assign(event=table["event"].clip(upper=1)), GAP)
    assert merged.competing_events.names == ("event 1",)
    assert len(prepare_data(merged, **patients).dataset) == 300
