"""What from_meds and from_long share: windows, hours, series and codes, no leak, equal bytes."""

import dataclasses
import itertools
import json
import logging

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MIMICtrajectoryDataset
from event_files import (
    GAP,
    GAP_SERIES,
    GLUCOSE,
    GLUCOSE_SERIES,
    LACTATE,
    MEDS_DEMO,
    YEAR,
    Mini,
    long,
    meds,
    moment,
    random_events,
    write_table,
)
from medgemma_clinical.data import events
from medgemma_clinical.data.duck import Database
from medgemma_clinical.files import InputError
from table_requests import make_rows

SERIES = (GAP_SERIES, GLUCOSE_SERIES)
FOLDERS = itertools.count()


@pytest.fixture(params=["from_meds", "from_long"])
def make(request, tmp_path):
    """Rows of either command."""

    def make_them(mini, **flags):
        folder = tmp_path / str(next(FOLDERS))
        flags = {"series": (GAP_SERIES,), **flags}
        if request.param == "from_meds":
            return meds(mini.write_meds(folder), **flags)
        flags.pop("context", None)
        return long(mini, folder, **flags)

    make_them.command = request.param
    return make_them


def cell(rows, column="clinical_trajectory"):
    return rows[column].item()


def test_the_window_is_closed_at_both_ends(make):
    mini = Mini().ask(1, 30).measure(1, 30 + 0.4 / 3600, 99)
    for hour in (5.99, 6, 12, 30, 30.01):
        mini.measure(1, hour, hour)
    assert cell(make(mini)) == "6 (0h) -> 12 (6h) -> 30 (24h)"
    assert cell(make(mini, window_hours=18.0)) == "12 (0h) -> 30 (18h)"


def test_hours_count_from_the_window_or_the_first_observation(make):
    mini = Mini().ask(1, 30).measure(1, 12, 15).measure(1, 8, 200, GLUCOSE).measure(1, 30, 11)
    rows = make(mini, series=SERIES)
    assert cell(rows) == "15 (6h) -> 11 (24h)"
    assert cell(rows, "prediction_hours") == "24"
    rows = make(mini, series=SERIES, hours_from="first")
    assert cell(rows) == "15 (4h) -> 11 (22h)"
    assert cell(rows, "trajectory_glucose [mg/dL]") == "200 (0h)"
    assert cell(rows, "prediction_hours") == "22"


def test_the_first_series_decides_and_a_name_given_twice_joins(make):
    mini = Mini().ask(1, 30).ask(2, 30).measure(1, 12, 15).measure(2, 12, 15).measure(2, 13, 16)
    mini.measure(1, 14, 7, "other gap").measure(1, 15, 8, "other thing")
    joined = (GAP_SERIES, "Anion gap [mEq/L]=other*")
    rows = make(mini, series=joined, min_observations=2)
    expected = ["15 (6h) -> 7 (8h) -> 8 (9h)", "15 (6h) -> 16 (7h)"]
    assert rows["clinical_trajectory"].tolist() == expected
    assert make(mini, series=joined, min_observations=3)["subject_id"].tolist() == ["1"]
    rows = make(mini, series=("x=other thing", *SERIES[:1]))
    assert rows["subject_id"].tolist() == ["1"]
    assert list(rows)[3:5] == ["clinical_trajectory", "trajectory_anion gap [mEq/L]"]


def test_rows_are_named_by_subject_and_time_and_labels_not_known_are_left_out(make):
    mini = Mini().ask(10, 30.5, 1).ask(9, 30, 0).ask(9, 20, 0).ask(9, 25, None)
    for subject in (9, 10):
        mini.measure(subject, 12, 15)
    rows = make(mini)
    first, *_, last = rows["id"]
    assert (first, last) == ("9 2150-01-01T20:00:00", "10 2150-01-02T06:30:00")
    assert rows["label_escalation"].tolist() == [0, 0, 1]


def test_nothing_left_says_by_which_rule(make):
    mini = Mini().ask(1, 30).ask(2, 30).measure(1, 20, 100, GLUCOSE).measure(9, 1, 15)
    expected = "from the first window to the last; .* no value of anion gap in the window"
    with pytest.raises(InputError, match=expected):
        make(mini, series=SERIES)


def test_a_code_without_an_event_is_warned_of(make, caplog):
    with caplog.at_level(logging.WARNING):
        rows = make(Mini().ask(1, 30).measure(1, 12, 15), series=(GAP_SERIES, "lactate=lac*"))
    assert rows["trajectory_lactate"].isna().all()
    assert "warning: --series lactate=lac*" in caplog.text
    assert GAP_SERIES not in caplog.text


def test_more_than_a_tenth_of_events_at_midnight_are_warned_of(make, caplog):
    few = Mini().ask(1, 30).measure(1, 24, 15)
    for hour in range(10, 19):
        few.measure(1, hour, 15)
    with caplog.at_level(logging.WARNING):
        make(few)
        assert "midnight" not in caplog.text
        stored = {"stored": 24} if make.command == "from_long" else {}
        make(Mini().ask(1, 30).measure(1, 12 if stored else 24, 15, **stored))
    assert "midnight" in caplog.text
    assert all(each.getMessage().startswith("warning: ") for each in caplog.records)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"series": ("=x",)}, "--series =x"),
        ({"series": ("a, b=x",)}, "--series a, b=x"),
        ({"series": ("a [b=x",)}, "--series"),
        ({"series": ("50868=x",)}, "--series 50868=x"),
        ({"series": (GAP_SERIES, "anion gap [mmol/L]=x")}, "--series anion gap"),
    ],
)
def test_a_wrong_flag_is_named(make, flags, named):
    with pytest.raises(InputError) as caught:
        make(Mini().ask(1, 30).measure(1, 12, 15), **flags)
    assert str(caught.value).startswith(named)


def test_one_subject_twice_at_one_time_is_refused(make):
    with pytest.raises(InputError, match=r"(task|labels\.csv): subject_id and prediction_time"):
        make(Mini().ask(1, 30, 0).ask(1, 30, 1).measure(1, 12, 15))


def test_subjects_with_other_names_are_refused_or_warned_of(make, caplog):
    mini = Mini().ask(1, 30).ask(2, 30).ask(3, 30).ask(4, 30).measure(9, 12, 15)
    with pytest.raises(InputError, match="4 of 4 subjects"):
        make(mini)
    with caplog.at_level(logging.WARNING):
        make(mini.measure(1, 12, 15))
        assert "3 of 4 subjects" in caplog.text
        caplog.clear()
        make(mini.measure(2, 12, 15))
    assert not caplog.text


def test_a_folder_named_like_a_column_replaces_no_column(make, tmp_path):
    """As exports of Spark and pyarrow name folders: ``value=1000/``."""
    mini = Mini().ask(1, 30, 1).measure(1, 12, 15)
    expected = make(mini)
    for name in ("subject_id=7", {"from_meds": "numeric_value=99"}.get(make.command, "value=1000")):
        folder = tmp_path / name
        if make.command == "from_meds":
            again = meds(mini.write_meds(folder))
        else:
            again = long(mini, folder, series=(GAP_SERIES,))
            table = write_table(mini.long(), folder / "table.parquet")
            other = long(mini, folder, series=(GAP_SERIES,), table=table)
            pd.testing.assert_frame_equal(other, expected)
        pd.testing.assert_frame_equal(again, expected)


def test_what_is_written_is_read(tmp_path):
    mini = Mini()
    rng = np.random.default_rng(0)
    for subject in range(40):
        mini.ask(subject, 30, subject % 2).measure(subject, None, None, "GENDER//F")
        mini.measure(subject, -40 * YEAR, None, "MEDS_BIRTH").measure(subject, 8, None, "DRUG//x")
        for hour in rng.uniform(6, 30, 5):
            mini.measure(subject, hour, rng.normal(12, 3)).measure(subject, hour, 100, GLUCOSE)
            mini.measure(subject, hour, None, "NOTE//chest", text=f"shadow {hour}")
    folder = mini.write_meds(tmp_path / "meds")
    words = ["from_meds", "--meds_dir", str(folder), "--labels", str(folder / "task")]
    words += ["--series", SERIES[0], "--series", SERIES[1], "--context", "x=DRUG*"]
    words += ["--notes", "NOTE*", "--outcome", "Death", "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main(words) == 0
    dataset = MIMICtrajectoryDataset(tmp_path / "out.csv")
    assert (dataset.features, dataset.units) == (("anion gap", "glucose"), ("mEq/L", "mg/dL"))
    assert (len(dataset), dataset.outcome) == (40, "Death")
    assert dataset.question == "Will the outcome 'Death' occur?"
    assert dataset.contexts[0].startswith("40-year-old woman, x. Note (")
    assert dataset.limits(0) is None, "those of another series would be wrong"
    description = json.loads((tmp_path / "out.json").read_text())
    assert description["rows"] == {"rows": 40, "patients": 40, "events": 20}
    assert description["arguments"]["series"] == list(SERIES)
    names = {*description["tables_sha256"]}
    assert names >= {"data/train/0.parquet", "labels: task/deep/0.parquet"}


def test_only_events_from_the_first_window_to_the_last_are_kept(make, monkeypatch):
    mini = Mini().ask(1, 30).ask(1, 80)
    for hour in (5.9, 6, 40, 80, 80.1):
        mini.measure(1, hour, hour)
    seen = []
    run_file = Database.run_file

    def look(database, path):
        if path.stem == "events":
            seen.extend(database.frame("SELECT value FROM record ORDER BY value")["value"])
        run_file(database, path)

    monkeypatch.setattr(Database, "run_file", look)
    make(mini)
    assert seen == [6, 40, 80]


# --------------------------------------------------------------------------- second reading


def slowly(mini, code, *, stored):
    """The cells of a series of each label by a loop over all events, where there is one."""
    found = {}
    events = [
        (each["subject"], moment(each["hours"]), moment(each["stored"]), each["value"])
        for each in mini.events
        if each["code"] == code
    ]
    for label in mini.labels:
        end = moment(label["hours"])
        start = end - pd.Timedelta(24, "h")
        values = []
        for subject, time, stored_time, value in events:
            known = stored_time if stored else time
            if subject == label["subject"] and start <= time <= end and known <= end:
                seconds = time.floor("s") - start.floor("s")
                hour = seconds.total_seconds() / 3600
                values.append((time, known, value, f"{round(hour, 2):g}"))
        if values:
            name = f"{label['subject']} {end:%Y-%m-%dT%H:%M:%S}"
            found[name] = " -> ".join(f"{value:g} ({hour}h)" for *_, value, hour in sorted(values))
    return found


def test_a_loop_over_all_events_gives_the_same_rows(make):
    mini = random_events(np.random.default_rng(1))
    rows = make(mini, series=SERIES).set_index("id")
    stored = make.command == "from_long"
    assert rows["clinical_trajectory"].to_dict() == slowly(mini, GAP, stored=stored)
    glucose = slowly(mini, GLUCOSE, stored=stored)
    shown = rows["trajectory_glucose [mg/dL]"].dropna().to_dict()
    assert shown == {name: text for name, text in glucose.items() if name in rows.index}


@pytest.mark.parametrize("command", ["from_meds", "from_long"])
def test_the_demo_gives_the_trajectories_of_from_mimic(command, tmp_path):
    mimic, labels = MEDS_DEMO.with_name("mimic_iv_demo"), MEDS_DEMO / "labels/hospital_mortality"
    flags = {"mimic_dir": mimic, "out": tmp_path / "mimic.csv", "cohort": "all"}
    flags |= {"compute_gap": "reported", "outcome": ("death",)}
    expected, _ = make_rows("from_mimic", **flags)
    flags = {"out": tmp_path / "out.csv", "window_hours": 12.0, "hours_from": "first"}
    columns = ["subject_id", "clinical_trajectory", "label_escalation"]
    if command == "from_meds":
        series = ("anion gap [mEq/L]=LAB//50868//mEq/L",)
        flags |= {"meds_dir": MEDS_DEMO, "labels": labels, "series": series}
    else:
        table = pd.read_parquet(labels).rename(columns={"boolean_value": "label"})
        flags["labels"] = write_table(table, tmp_path / "labels.csv")
        flags |= {"table": mimic / "hosp/labevents.csv.gz", "series": ("anion gap=50868",)}
    rows, description = make_rows(command, **flags)
    assert description["unit"] == "mEq/L"
    mine, theirs = (each[columns].astype(str).sort_values(columns) for each in (rows, expected))
    assert mine.to_numpy().tolist() == theirs.to_numpy().tolist()
    assert len(rows) == 87


# --------------------------------------------------------------------------- leaks


def after(mini, label, rng, *, stored):
    """Change everything that is measured (or stored) later than one prediction time."""
    hours = label["hours"]
    changed = Mini(splits=mini.splits, labels=[label])
    for event in mini.events:
        known = event["stored"] if stored and event["stored"] is not None else event["hours"]
        if event["hours"] is None or max(event["hours"], known) <= hours:
            changed.events.append(event)
        elif rng.random() < 0.7:
            later = hours + float(rng.exponential(9)) + 0.01
            value = None if event["value"] is None else 999.0
            changed.events.append({**event, "hours": later, "stored": later, "value": value})
    for code, value in ((GAP, 888.0), (GLUCOSE, 777.0), (LACTATE, 1.0), ("DRUG//insulin", None)):
        changed.measure(label["subject"], hours + 0.001, value, code)
    return changed


def test_nothing_after_the_prediction_time_changes_an_input(make):
    rng = np.random.default_rng(3)
    mini = random_events(rng)
    context = (f"lactate [mmol/L]={LACTATE}", "insulin=DRUG*")
    flags = {"series": SERIES, "context": context}
    if make.command == "from_long":
        flags["equal_times"] = "last"
    rows = make(mini, **flags).set_index("id").drop(columns="label_escalation")
    assert len(rows) > 80
    labels = {f"{e['subject']} {moment(e['hours']):%Y-%m-%dT%H:%M:%S}": e for e in mini.labels}
    for name in rows.index[::15]:
        changed = after(mini, labels[name], rng, stored=make.command == "from_long")
        again = make(changed, **flags).set_index("id")
        before, again = rows.loc[[name]], again.reindex(columns=rows.columns)
        pd.testing.assert_frame_equal(before, again, check_dtype=False)


# --------------------------------------------------------------------------- the same bytes


def test_threads_memory_batches_and_the_order_of_rows_change_no_byte(make, monkeypatch):
    rng = np.random.default_rng(5)
    mini = random_events(rng)
    for event in mini.events[::3]:  # several values at one time
        mini.events.append({**event, "value": event["value"] and event["value"] / 3})
    shuffled = dataclasses.replace(mini, events=[*mini.events], labels=[*mini.labels])
    rng.shuffle(shuffled.events)
    rng.shuffle(shuffled.labels)
    flags = {"series": SERIES, "context": ("x=LAB*",)}
    whole = make(mini, **flags, threads=1, memory_limit="200MB")
    monkeypatch.setattr(events, "MAX_PAIRS", 100)
    again = make(shuffled, **flags, threads=2, memory_limit="2GB")
    assert whole.to_csv() == again.to_csv()
