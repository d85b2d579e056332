"""What from_meds and from_long share: windows, hours, series and codes, no leak, equal bytes."""

import dataclasses
import json
import logging
import re

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
    name_of,
    random_events,
    write_table,
)
from medgemma_clinical.data import events
from medgemma_clinical.files import InputError
from table_requests import make_rows

SERIES = (GAP_SERIES, GLUCOSE_SERIES)


@pytest.fixture(params=["from_meds", "from_long"])
def make(request, tmp_path):
    """Rows of either command."""

    def make_them(mini, name=None, **flags):
        folder = tmp_path / (name or str(len([*tmp_path.iterdir()])))
        flags = {"series": (GAP_SERIES,), **flags}
        if request.param == "from_meds":
            return meds(mini.write_meds(folder), **flags)
        flags.pop("context", None)
        return long(mini, folder, **flags)

    make_them.command = request.param
    return make_them


def simple():
    return Mini().ask(1, 30).measure(1, 12, 15)


def four(*measured):
    mini = Mini().ask(1, 30).ask(2, 30).ask(3, 30).ask(4, 30)
    for subject in measured:
        mini.measure(subject, 12, 15)
    return mini


def test_what_looks_wrong_is_warned_of(make, caplog):
    in_storage = make.command == "from_long"
    few = Mini().ask(1, 30).measure(1, 24, 15)
    for hour in range(10, 19):
        few.measure(1, hour, 15)
    midnight = Mini().ask(1, 30).measure(1, 12 if in_storage else 24, 15, stored=24)
    with caplog.at_level(logging.WARNING):
        for mini, flags, warning in (
            (few, {}, None),
            (midnight, {}, "midnight"),
            (simple(), {"series": (GAP_SERIES, "lactate=lac*")}, "--series lactate=lac*"),
            (four(9, 1), {}, "3 of 4 subjects"),
            (four(9, 1, 2), {}, None),
        ):
            make(mini, **flags)
            lines = [line.getMessage() for line in caplog.records if "storetime" not in line.msg]
            assert len(lines) == bool(warning)
            assert not lines or (warning in lines[0] and lines[0].startswith("warning: "))
            caplog.clear()


@pytest.mark.parametrize(
    ("mini", "series", "named"),
    [
        *((simple(), wrong, f"--series {wrong}") for wrong in ("=x", "a, b=x", "50868=x")),
        (simple(), "a [b=x", "--series"),
        (simple(), "anion gap [mmol/L]=x", "--series anion gap"),
        (simple().ask(1, 30, 1), GLUCOSE_SERIES, "subject_id and prediction_time"),
        (four(9), GLUCOSE_SERIES, "4 of 4 subjects"),
        (Mini().ask(1, 30).measure(1, 20, 1, GLUCOSE), GLUCOSE_SERIES, "no value of anion gap"),
    ],
)
def test_wrong_flags_and_labels_are_refused_by_name(make, mini, series, named):
    with pytest.raises(InputError, match=re.escape(named)):
        make(mini, series=(GAP_SERIES, series))


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
    assert dataset.contexts[0].startswith("40-year-old woman, x. Note (")
    assert dataset.limits(0) is None, "those of another series would be wrong"
    description = json.loads((tmp_path / "out.json").read_text())
    assert description["rows"] == {"rows": 40, "patients": 40, "events": 20}
    assert description["arguments"]["series"] == list(SERIES)
    assert {*description["tables_sha256"]} >= {
        "data/train/0.parquet",
        "labels: task/deep/0.parquet",
    }


def slowly(
    mini,
    series,
    *,
    stored,
    window_hours=24.0,
    hours_from="window",
    min_observations=1,
    equal_times="keep",
):
    """The rows of all labels by a loop over all events: id, label, hours and series, as texts."""
    found = []
    for label in sorted(mini.labels, key=lambda label: (label["subject"], label["hours"])):
        end = moment(label["hours"])
        start, cells = end - pd.Timedelta(window_hours, "h"), []
        for codes in series:
            at = {}
            for event in mini.events:
                if event["subject"] == label["subject"] and event["code"] in codes:
                    time = moment(event["hours"])
                    known = moment(event["stored"]) if stored else time
                    if start <= time <= end and known <= end:
                        at.setdefault(time, []).append((known, event["value"]))
            for time, values in at.items():
                values.sort()
                mean = float(f"{sum(value for _, value in values) / len(values):.10g}")
                at[time] = {"keep": values, "last": values[-1:], "mean": [(None, mean)]}[
                    equal_times
                ]
            cells.append(at)
        if label["label"] is None or sum(map(len, cells[0].values())) < min_observations:
            continue
        zero = start if hours_from == "window" else min(time for at in cells for time in at)

        def hours(time, zero=zero):
            return f"{round((time.floor('s') - zero.floor('s')).total_seconds() / 3600, 2):g}h"

        texts = [
            " -> ".join(f"{v:.10g} ({hours(time)})" for time in sorted(at) for _, v in at[time])
            for at in cells
        ]
        found.append([name_of(label), label["label"], hours(end).rstrip("h"), *texts])
    return found


def test_a_loop_over_all_events_gives_the_same_rows(make):
    mini, stored = random_events(np.random.default_rng(1)), make.command == "from_long"
    whole = {"window_hours": 30.0, "hours_from": "first", "min_observations": 3}
    requests = [({}, False), (whole, True)]
    requests += [({"equal_times": "last"}, True), ({"equal_times": "mean"}, False)] * stored
    for flags, joined in requests:
        texts, series = [GLUCOSE_SERIES, GAP_SERIES], [{GLUCOSE}, {GAP}]
        if joined:
            texts = [*texts[::-1], "Anion gap [mEq/L]=LAB//lac*"]
            series = [{GAP, LACTATE}, {GLUCOSE}]
        rows = make(mini, series=texts, **flags)
        columns = ["id", "label_escalation", "prediction_hours", *rows.filter(like="trajectory")]
        expected = slowly(mini, series, stored=stored, **flags)
        assert rows[columns].fillna("").to_numpy().tolist() == expected
        assert 50 < len(expected) < len(mini.labels)


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
    assert len(rows) > 60
    labels = {name_of(label): label for label in mini.labels}
    for name in rows.index[::25]:
        changed = after(mini, labels[name], rng, stored=make.command == "from_long")
        again = make(changed, **flags).set_index("id")
        before, again = rows.loc[[name]], again.reindex(columns=rows.columns)
        pd.testing.assert_frame_equal(before, again, check_dtype=False)


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
