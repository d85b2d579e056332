"""The commands from_meds and from_long: what they share, no leak; then what is one's own."""

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
    EPOCH,
    GAP,
    GAP_SERIES,
    GLUCOSE,
    GLUCOSE_SERIES,
    LACTATE,
    MEDS_DEMO,
    YEAR,
    Mini,
    long,
    long_file,
    meds,
    meds_file,
    moment,
    name_of,
    random_events,
    write_table,
)
from medgemma_clinical.data.importers import events
from medgemma_clinical.files import InputError
from table_requests import make_rows

SERIES = (GAP_SERIES, GLUCOSE_SERIES)
DEATH, LEFT = "MEDS_DEATH", "HOSPITAL_DISCHARGE//home"


@pytest.fixture(params=["from_meds", "from_long"])
def make(request, tmp_path):
    """Rows of either command."""

    def make_them(mini, name=None, **flags):
        folder = tmp_path / (name or str(len([*tmp_path.iterdir()])))
        flags = {"series": (GAP_SERIES,), **flags}
        if request.param == "from_meds":
            return meds(mini.write_meds(folder), **flags)
        for name in ("context", "event"):
            flags.pop(name, None)
        return long(mini, folder, **{"equal_times": "keep", **flags})

    make_them.command = request.param
    return make_them


def simple():
    return Mini().ask(1, 30).measure(1, 12, 15)


def four(*measured):
    mini = Mini().ask(1, 30).ask(2, 30).ask(3, 30).ask(4, 30)
    for subject in measured:
        mini.measure(subject, 12, 15)
    return mini


@pytest.mark.slow
def test_what_looks_wrong_is_warned_of(make, caplog):
    in_storage = make.command == "from_long"
    few = Mini().ask(1, 30).measure(1, 24, 15)
    for hour in range(10, 19):
        few.measure(1, hour, 15)
    midnight = four(9, 1).measure(1, 12 if in_storage else 24, 15, stored=24)
    for mini, flags, warnings in (
        (few, {}, []),
        (four(9, 1, 2), {}, []),
        (
            midnight,
            {"series": (GAP_SERIES, "lactate=lac*")},
            ["--series lactate=lac*", "midnight", "3 of the 4 subjects"],
        ),
    ):
        caplog.clear()
        make(mini, **flags)
        records = [x for x in caplog.records if x.levelno >= logging.WARNING]
        lines = [x.getMessage() for x in records if "storetime" not in x.msg]
        assert len(lines) == len(warnings)
        assert all(line.startswith("warning: ") for line in lines)
        assert all(any(text in line for line in lines) for text in warnings)


@pytest.mark.parametrize(
    ("mini", "series", "named"),
    [
        *((simple(), wrong, f"--series {wrong}") for wrong in ("=x", "a, b=x", "50868=x")),
        (simple(), "a [b=x", "--series"),
        (simple(), "anion gap [mmol/L]=x", "--series anion gap"),
        (simple().ask(1, 30, 1), GLUCOSE_SERIES, "subject_id and prediction_time"),
        (four(9), GLUCOSE_SERIES, "4 of the 4 subjects"),
        (Mini().ask(1, 30).measure(1, 20, 1, GLUCOSE), GLUCOSE_SERIES, "no value of anion gap"),
    ],
)
def test_wrong_flags_and_labels_are_refused_by_name(make, mini, series, named):
    with pytest.raises(InputError, match=re.escape(named)):
        make(mini, series=(GAP_SERIES, series))


def test_what_is_written_is_read(tmp_path):
    mini = Mini()
    for subject in range(40):
        mini.ask(subject, 30, subject % 2).measure(subject, 8, None, "DRUG//x")
        mini.measure(subject, 9, 12.5 + subject).measure(subject, 8.5, 100, GLUCOSE)
        mini.measure(subject, 9, None, "NOTE//chest", text=f"shadow {subject}")
        mini.measure(subject, 40 + subject, None, (DEATH, LEFT)[subject % 2])
    folder = mini.write_meds(tmp_path / "meds")
    words = ["from_meds", "--meds_dir", str(folder), "--labels", str(folder / "task")]
    words += ["--series", SERIES[0], "--series", SERIES[1], "--context", "x=DRUG*"]
    words += ["--notes", "NOTE*", "--outcome", "Death", "--out", str(tmp_path / "out.csv")]
    words += ["--event", f"Death={DEATH}", "--event", "left=HOSPITAL*"]
    assert dataset_format.main(words) == 0
    dataset = MIMICtrajectoryDataset(tmp_path / "out.csv")
    assert (dataset.features, dataset.units) == (("anion gap", "glucose"), ("mEq/L", "mg/dL"))
    assert (len(dataset), dataset.outcome) == (40, "Death")
    assert dataset.contexts[0].startswith("x. Note (")
    assert dataset.limits(0) is None, "those of another series would be wrong"
    times = MIMICtrajectoryDataset(tmp_path / "out.csv", outcome_kind="time", horizon_hours=[24])
    assert times.competing_events.names == ("Death", "left")
    ends = zip(times.events, times.event_hours, strict=True)
    assert [*ends] == [(1 + k % 2, 10 + k) for k in range(40)]
    assert times.question == dataset.question
    description = json.loads((tmp_path / "out.json").read_text())
    assert description["rows"] == {"rows": 40, "patients": 40, "events": 20}
    assert description["arguments"]["series"] == list(SERIES)
    tables = {"data/train/0.parquet", "labels: task/deep/0.parquet"}
    assert {*description["tables_sha256"]} >= tables


def slowly(mini, series, *, stored, **flags):
    """The rows of all labels by a loop over all events: id, label, hours and series, as texts."""
    window, fewest = flags.get("window_hours", 24.0), flags.get("min_observations", 1)
    found = []
    for label in sorted(mini.labels, key=lambda label: (label["subject"], label["hours"])):
        end = moment(label["hours"])
        start, cells = end - pd.Timedelta(window, "h"), []
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
                one = {"last": values[-1:], "mean": [(None, mean)]}
                at[time] = one.get(flags.get("equal_times"), values)
            cells.append(at)
        if sum(map(len, cells[0].values())) < fewest:
            continue
        zero = min(time for at in cells for time in at) if "hours_from" in flags else start

        def hours(time, zero=zero):
            return f"{round((time.floor('s') - zero.floor('s')).total_seconds() / 3600, 2):g}h"

        texts = [
            " -> ".join(f"{v:.10g} ({hours(time)})" for time in sorted(at) for _, v in at[time])
            for at in cells
        ]
        known = "" if label["label"] is None else label["label"]
        found.append([name_of(label), known, hours(end).rstrip("h"), *texts])
    return found


@pytest.mark.slow
def test_a_loop_over_all_events_gives_the_same_rows(make):
    mini, stored = random_events(np.random.default_rng(1), 20), make.command == "from_long"
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
        assert rows[columns].astype(object).fillna("").to_numpy().tolist() == expected
        assert 20 < len(expected) <= len(mini.labels)


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_after_the_prediction_time_changes_an_input(make):
    rng = np.random.default_rng(3)
    mini = random_events(rng, 20)
    context = (f"lactate [mmol/L]={LACTATE}", "insulin=DRUG*")
    flags = {"series": SERIES, "context": context, "event": (f"lactate={LACTATE}",)}
    if make.command == "from_long":
        flags["equal_times"] = "last"
    rows = make(mini, **flags).set_index("id").drop(columns="label_escalation")
    assert len(rows) > 20
    ends = rows.reindex(columns=["event_hours", "event"])
    rows = rows.drop(columns=[*ends], errors="ignore")
    labels = {name_of(label): label for label in mini.labels}
    for name in rows.index[::12]:
        changed = after(mini, labels[name], rng, stored=make.command == "from_long")
        found = make(changed, **flags).set_index("id")
        before, again = rows.loc[[name]], found.reindex(columns=rows.columns)
        pd.testing.assert_frame_equal(before, again, check_dtype=False)
        if make.command == "from_meds":
            assert found["event_hours"].tolist() != ends.loc[[name], "event_hours"].tolist()


@pytest.mark.slow
def test_threads_memory_batches_and_the_order_of_rows_change_no_byte(make, monkeypatch):
    rng = np.random.default_rng(5)
    mini = random_events(rng, 15)
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


# --------------------------------------------------------------------------- from_long

GLUCOSE_COLUMN = f"trajectory_{GLUCOSE} [mg/dL]"


def two():
    mini = Mini().ask(1, 30, 1).ask(2, 30, 0).measure(1, 12, 15).measure(2, 12, 14)
    return mini.measure(1, 13, 100, GLUCOSE)


def mixed():
    return two().measure(1, 14, 5.1, GLUCOSE, unit="mmol/L").measure(1, 15, 120, GLUCOSE)


def no_unit():
    return two().measure(1, 14, 90, GLUCOSE, unit="")


LABELS = two().label_table()


def test_without_series_all_items_are_read_whatever_their_case_the_most_measured_first(tmp_path):
    mini = two().measure(2, 13, 110, GLUCOSE).measure(1, 14, 120, GLUCOSE.upper(), unit="mg/dL")
    for hour in range(40, 60):  # later than the prediction times
        mini.measure(1, hour, 16)
    rows = long(mini, tmp_path)
    assert rows["clinical_trajectory"][0] == "100 (7h) -> 120 (8h)"
    assert rows[f"trajectory_{GAP} [mEq/L]"].tolist() == ["15 (6h)", "14 (6h)"]


def test_what_is_stored_after_the_prediction_time_is_not_known(tmp_path, caplog):
    mini = Mini().ask(1, 30).measure(1, 12, 15, stored=30).measure(1, 13, 16, stored=30.01)
    table = mini.measure(1, 14, 17).measure(1, 31, 18, stored=29).measure(1, 9, None).long()
    table.loc[2, "storetime"] = pd.NaT
    rows, description = long_file(table, tmp_path, mini.label_table())
    assert rows["clinical_trajectory"][0] == "15 (6h)"
    counts = {"without a number": 1, "never stored": 1, "converted": 0}
    assert description["values"] == {"repeated": 0, **counts}
    rows = long(table.drop(columns="storetime"), tmp_path, mini.label_table())
    assert rows["clinical_trajectory"][0] == "15 (6h) -> 16 (7h) -> 17 (8h)"
    assert "no storetime" in caplog.text


@pytest.mark.slow
def test_a_factor_converts_the_values_of_a_unit_and_one_without_a_use_is_named(tmp_path, caplog):
    flags = {"factor": (f"{GLUCOSE}:mmol/L=18.016",), "series": (GAP, GLUCOSE)}
    rows, description = long_file(mixed(), tmp_path, **flags)
    assert rows[GLUCOSE_COLUMN][0] == "100 (7h) -> 91.8816 (8h) -> 120 (9h)"
    assert description["values"]["converted"] == 1
    flags = {"factor": (f"{GLUCOSE}:=1",), "series": (f"glucose={GLUCOSE}",)}
    assert long(no_unit(), tmp_path, **flags)["clinical_trajectory"][0] == "100 (7h) -> 90 (8h)"
    flags = {"factor": (f"{GLUCOSE}:mg/dL=0.0555",), "series": (GAP, f"x [mmol/L]={GLUCOSE}")}
    assert long(two(), tmp_path, **flags)["trajectory_x [mmol/L]"][0] == "5.55 (7h)"
    assert "--factor" not in caplog.text
    long(two(), tmp_path, factor=(f"{GLUCOSE}:mmol=18",))
    assert re.search(f"warning: --factor '{GLUCOSE}:mmol=': .* mg/dL", caplog.text)


@pytest.mark.parametrize(
    ("mini", "factor", "series", "named"),
    [
        (mixed(), "", "", f"in mg/dL and in mmol/L: .* '{GLUCOSE}:mmol/L="),
        (no_unit(), "", "", "in mg/dL and in no unit"),
        (two(), "", f"glucose [mmol/L]={GLUCOSE}", "in mmol/L and in mg/dL"),
        *((two(), f"{GLUCOSE}:mg/dL={factor}", "", "--factor") for factor in ("0", "inf")),
        *((two(), wrong, "", f"--factor {wrong}") for wrong in ("glucose=18", "gap:mg=x")),
        (two(), f"{GLUCOSE}:mg/dL=2", f"x [mg/dL]={GLUCOSE}", f"--factor '{GLUCOSE}:mg/dL="),
        # A series of converted values alone needs a unit of its own.
        *((two(), f"{GLUCOSE}:mg/dL=2", s, r"--series '.* \[unit") for s in ("", GLUCOSE)),
    ],
)
def test_units_that_contradict_are_refused_by_name(mini, factor, series, named, tmp_path):
    flags = {"factor": (factor,) if factor else (), "series": (series,) if series else ()}
    with pytest.raises(InputError, match=named):
        long(mini, tmp_path, **flags)


def test_columns_have_the_names_that_are_given(tmp_path):
    names = {"subject_id": "patient no", "charttime": "drawn", "item": 'the "test"'}
    table = two().long().rename(columns={**names, "value": "valuenum"})
    labels = two().label_table("died").rename(columns={"subject_id": "subject"})
    columns = ("subject_id=patient no", "time=drawn", 'item=the "test"', "unit=", "label=died")
    table = table.assign(value="a text beside it")
    rows = long(table, tmp_path, labels, columns=(*columns, "labels.subject_id=subject"))
    assert rows["clinical_trajectory"].tolist() == ["15 (6h)", "14 (6h)"]
    assert f"trajectory_{GLUCOSE}" in rows, "without a unit"


def spoilt(column, cell):
    return lambda table: table.astype(str).assign(**{column: [cell, *table[column][1:]]})


def renamed(**names):
    return lambda table: table.rename(columns=names)


CELLS = {"value": "<0.1", "storetime": "720", "charttime": "31.01.2150"}
CELLS |= dict.fromkeys(("subject_id", "item"), "")


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    [
        *((spoilt(*pair), {}, f"table.csv, column {pair[0]}: ") for pair in CELLS.items()),
        (renamed(subject_id="who", item="what"), {}, "--columns subject_id=? item=?: "),
        (renamed(storetime="x"), {"equal_times": "last"}, "--equal_times last"),
        (renamed(), {"columns": ("value=valu",)}, "value=?"),
        (renamed(), {"columns": ("time=",)}, "--columns time="),
        (renamed(), {"columns": ("labels.subject_id=x",)}, "labels.csv"),
        (lambda table: table.assign(item="x, fast", unit=""), {}, "table.csv: item x, fast: "),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_place(change, flags, named, tmp_path):
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        long(change(two().long()), tmp_path, LABELS, **flags)
    assert not any(cell and cell in str(caught.value) for cell in CELLS.values())


def test_times_may_be_numbers(tmp_path):
    mini = Mini().ask(1, 30.5).measure(1, 6.5, 15).measure(1, 30.5, 16).measure(1, 30.6, 17)
    table, labels = mini.long(), mini.label_table()
    for frame, column in ((table, "charttime"), (table, "storetime"), (labels, "prediction_time")):
        frame[column] = (frame[column] - EPOCH) / pd.Timedelta("1D")
    rows = long(table, tmp_path, labels, time_unit="days")
    assert rows["clinical_trajectory"][0] == "15 (0h) -> 16 (24h)"
    assert float(rows["prediction_time"][0]) == pytest.approx(30.5 / 24)
    assert rows["id"][0] == f"1 {rows['prediction_time'][0]}"


# --------------------------------------------------------------------------- from_meds


def with_parts():
    return Mini().ask(1, 30, 1).ask(2, 30, 0, "tuning").measure(1, 12, 4.1).measure(2, 12, 15)


@pytest.fixture
def folder(tmp_path):
    return with_parts().write_meds(tmp_path / "meds")


def test_numbers_of_32_bits_are_written_in_their_shortest_text_others_left_out(tmp_path):
    mini = (
        with_parts().measure(1, 13, None).measure(1, 14, float("inf")).measure(1, 15, float("nan"))
    )
    rows = meds(mini.write_meds(tmp_path / "meds"))
    assert rows["clinical_trajectory"].tolist() == ["4.1 (6h)", "15 (6h)"]
    assert list(rows)[4:] == ["prediction_hours", "label_escalation", "split"]


def test_labels_are_read_from_whichever_column_and_file_holds_them(folder, tmp_path):
    kinds = {"boolean_value": "boolean", "integer_value": "Int64", "float_value": "Float32"}
    for column, kind in kinds.items():
        table = with_parts().label_table(column, kind)
        for other in kinds.keys() - {column}:
            table[other] = pd.Series([pd.NA, pd.NA], dtype=kinds[other])
        task = folder / "task"
        table.to_parquet(task / "deep/0.parquet")
        several = write_table(table, tmp_path / "labels.csv"), task / "deep/0.parquet", task
        labels = dict(zip(kinds, several, strict=True))[column]
        assert meds(folder, labels=labels)["label_escalation"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"categorical_value": ["yes", "no"]}, "boolean_value, integer_value, float_value"),
        ({"integer_value": [0, 3]}, "column integer_value: 1 cell"),
        ({"float_value": [0.5, 0.7]}, "column float_value: 2 cells"),
        ({"boolean_value": True, "zone": True}, "column prediction_time: 2 cells"),
    ],
)
def test_labels_that_are_no_answer_and_times_with_a_zone_are_refused(values, named, folder):
    table = with_parts().label_table().drop(columns="label").assign(**values)
    if "zone" in table:
        table["prediction_time"] = table["prediction_time"].dt.tz_localize("Europe/Berlin")
    table.to_parquet(folder / "task" / "deep" / "0.parquet")
    with pytest.raises(InputError, match=rf"0\.parquet.*{named}"):
        meds(folder)


def ends_slowly(mini, kinds):
    """By id, hours to the first later event of some codes and its number, else to the last."""
    found = {}
    for label in mini.labels:
        start = moment(label["hours"])
        later = [
            (moment(event["hours"]), kinds.get(event["code"], 0))
            for event in mini.events
            if event["subject"] == label["subject"] and moment(event["hours"]) > start
        ]
        first = min((end for end in later if end[1]), default=max(later, default=None))
        hours = first and (first[0] - start) / pd.Timedelta("1h")
        found[name_of(label)] = first and (pytest.approx(hours, rel=1e-9), first[1])
    return found


def test_the_first_event_after_a_prediction_time_is_the_outcome_or_the_last_is_censored(tmp_path):
    rng = np.random.default_rng(8)
    mini = random_events(rng)
    for subject in range(0, 30, 2):
        mini.measure(subject, float(rng.uniform(20, 100)), None, DEATH)
    for subject in range(0, 30, 3):
        mini.measure(subject, 40.0, None, LEFT)
    for subject in range(30, 50):  # two at one time
        mini.ask(subject, 30).measure(subject, 12, 15)
        for code in rng.permutation([DEATH, LEFT, LACTATE])[1:]:
            mini.measure(subject, 40.0, None, str(code))
    mini.ask(50, 30).measure(50, 12, 15).measure(50, 30, None, DEATH)  # at the prediction time
    mini.ask(51, 30).measure(51, 12, 15).measure(51, 40, None, LEFT).measure(51, 40, None, DEATH)
    mini.ask(52, 30).measure(52, 12, 15).measure(52, 45, 16)
    event = (f"death={DEATH}", "left=HOSPITAL_DISCHARGE*", "left=TRANSFER*", f"high={LACTATE}")
    flags = {"event": event, "no_splits": True}
    rows, description = meds_file(mini.write_meds(tmp_path / "meds"), **flags)
    expected = ends_slowly(mini, {DEATH: 1, LEFT: 2, LACTATE: 3})
    pairs = rows[["event_hours", "event"]].astype(object).to_numpy()
    found = [None if pd.isna(pair[0]) else tuple(pair) for pair in pairs]
    assert found == [expected[name] for name in rows["id"]]
    assert {*rows["event"].dropna()} == {0, 1, 2, 3}
    assert found[-3:] == [None, (10, 1), (15, 0)]
    assert description["events"] == {"1": "death", "2": "left", "3": "high"}
    assert "label_escalation" in rows


def test_without_event_flags_nothing_is_written_and_an_event_that_nobody_has_is_named(
    folder, caplog
):
    rows, description = meds_file(folder)
    assert not rows.filter(like="event").size
    assert "events" not in description
    rows = meds(folder, event=(f"death={DEATH}",))
    assert rows[["event_hours", "event"]].isna().all(axis=None)
    assert "warning: --event death: " in caplog.text
    with pytest.raises(InputError, match="--event death: "):
        meds(folder, event=("death",))


def test_age_sex_values_and_presence_are_a_text_and_static_columns(tmp_path):
    mini = with_parts().ask(3, 30).measure(3, 12, 15).measure(1, -60 * YEAR, None, "MEDS_BIRTH")
    mini.measure(1, None, None, "GENDER//F").measure(2, None, None, "GENDER//M")
    mini.measure(1, 8, 3.5, LACTATE).measure(1, 29, 2.1, LACTATE)
    mini.measure(1, 31, 9.9, LACTATE).measure(2, 1, 7, LACTATE)
    mini.measure(2, 10, None, "DRUG//insulin").measure(2, None, None, "RACE//x")
    mini.measure(3, 4, None, "DRUG//insulin").measure(3, 31, None, "DRUG//insulin")
    context = ("lactate [mmol/L]=LAB//lac*", "insulin=DRUG*", "race x=RACE//x", "pH [-]=LAB//pH")
    rows = meds(mini.write_meds(tmp_path / "meds"), context=context).fillna("")
    texts = ["60-year-old woman, lactate 2.1 mmol/L", "Man, insulin, race x", ""]
    assert rows["clinical_context"].tolist() == texts
    assert rows.loc[:, "static_age [years]":].drop(columns="split").astype(str).to_dict("list") == {
        "static_age [years]": ["60", "", ""],
        "static_sex_male": ["0", "1", ""],
        "static_lactate [mmol/L]": ["2.1", "", ""],
        "static_insulin": ["0", "1", "0"],
        "static_race x": ["0", "1", "0"],
        "static_pH [-]": ["", "", ""],
        "label_escalation": ["1", "0", "0"],
    }


def test_age_is_in_full_years_and_not_told_above_89(tmp_path):
    mini = Mini()
    births = ["2060-01-02 06:00", "2060-01-02 06:01", "2090-01-03", "2150-01-03"]
    for subject, birth in enumerate(births):
        hours = (pd.Timestamp(birth) - EPOCH) / pd.Timedelta("1h")
        mini.ask(subject, 30).measure(subject, 12, 15).measure(subject, hours, None, "MEDS_BIRTH")
    rows = meds(mini.write_meds(tmp_path / "meds")).fillna("")
    ages = [text.removesuffix("-year-old patient") for text in rows["clinical_context"]]
    assert ages == ["Over 89", "89", "59", ""]
    assert rows["static_age [years]"].tolist() == ["90", "89", "59", ""]


@pytest.mark.slow
def test_codes_and_static_features_of_another_unit_are_refused(tmp_path):
    mini = with_parts().measure(1, 13, 90, "LAB//1//mg/dL").measure(1, 14, 5, "LAB//1//mmol/L")
    folder = mini.write_meds(tmp_path / "meds")
    for series in ("glucose=LAB//1*", "glucose [mmol/L]=LAB//1//mg/dL"):
        with pytest.raises(InputError, match="--series glucose: "):
            meds(folder, (series,))
    for series in ("[MG/DL]=LAB//1//mg/dL", "=LAB//1//mg/dL", "[mmol/L]=LAB//gap"):
        assert len(meds(folder, (f"glucose {series}",)))
    for name in ("age [years]", "Sex_male", "x [mmol/L]"):  # or of an automatic name
        with pytest.raises(InputError, match="--context"):
            meds(folder, context=(f"{name}=LAB//1//mg/dL",))


def test_the_splits_of_meds_become_ours(tmp_path):
    mini = with_parts().ask(3, 30, 0, "held_out").measure(3, 12, 15).ask(4, 30).measure(4, 12, 15)
    del mini.splits[4]
    folder = mini.write_meds(tmp_path / "meds")
    rows, description = meds_file(folder)
    assert rows["split"].tolist() == ["train", "val", "test"]
    removed = {rule["rule"]: rule["removed"] for rule in description["flow"]}
    assert removed["subject in no part of the split"] == 1
    rows = meds(folder, no_splits=True)
    assert len(rows) == 4
    assert "split" not in rows


@pytest.mark.parametrize("splits", [None, {1: "train", 2: "test"}, {1: "train", "1": "tuning"}])
def test_splits_that_cannot_be_used_are_refused(splits, folder):
    path = folder / "metadata" / "subject_splits.parquet"
    path.unlink()
    if splits:
        subjects = [int(subject) for subject in splits]
        write_table(pd.DataFrame({"subject_id": subjects, "split": splits.values()}), path)
    with pytest.raises(InputError, match=r"subject_splits\.parquet.*--no_splits"):
        meds(folder)


def test_a_damaged_shard_or_a_missing_flag_is_named_and_nothing_written(folder, tmp_path, capsys):
    shard = folder / "data" / "tuning" / "0.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    flags = ["--labels", str(folder / "task"), "--out", str(tmp_path / "out.csv"), "--series"]
    for words, named in (([*flags, GAP_SERIES], "tuning/0.parquet"), (flags[:-1], "--series")):
        assert dataset_format.main(["from_meds", "--meds_dir", str(folder), *words]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {"meds", ".out.csv.lock"}


def test_codes_are_listed_by_their_number_of_events(tmp_path, capsys):
    mini = Mini().ask(1, 30)
    for subject in range(12):
        mini.measure(subject, 1, 15).measure(subject, 2, 15).ask(subject, 1, 0, f"p{subject % 2}")
        for hour in range(3 if subject < 10 else 0):
            mini.measure(subject, hour, 1, "LAB//ra\nre")
    folder = mini.write_meds(tmp_path / "meds")
    codes = pd.DataFrame({"code": [GAP], "description": ["Anion gap"], "valueuom": [["mEq/L"]]})
    codes.to_parquet(folder / "metadata" / "codes.parquet")
    assert dataset_format.main(["from_meds", "--meds_dir", str(folder), "--list_codes"]) == 0
    _, *lines = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert lines == [r"30 10 LAB//ra\nre", "24 12 LAB//gap mEq/L Anion gap"]
