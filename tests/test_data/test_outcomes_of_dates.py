"""Labels and times to events from columns of dates: whole commands beside a slow second way."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest

import dataset_format
from exports import answer

pytestmark = pytest.mark.slow

ADMITTED = pd.Timestamp("2024-03-02 08:00")
ASKED = ADMITTED + pd.Timedelta("24h")
DAY, HOUR = pd.Timedelta("1D"), pd.Timedelta("1h")
INPUTS = r"^(id|subject_id|prediction|clinical_|trajectory_|static_)"


def after(*hours):
    """Cells of times, in hours from the prediction time; None is empty."""
    return ["" if hour is None else str(ASKED + hour * HOUR) for hour in hours]


def days(*numbers):
    """Cells of whole days of March 2024; the prediction time is on the third."""
    first = pd.Timestamp("2024-03-01") - DAY
    return ["" if k is None else f"{first + k * DAY:%Y-%m-%d}" for k in numbers]


def values_of(table, hours=(1, 9, 30)):
    rng = np.random.default_rng(3)
    pairs = [(row, hour) for row in table.to_dict("records") for hour in hours]
    lines = [(row["MRN"], pd.Timestamp(row["Admitted"]) + hour * HOUR) for row, hour in pairs]
    labs = pd.DataFrame(lines, columns=["MRN", "Taken"])
    return labs.assign(Test="Creatinine", Level=rng.uniform(0.5, 3, len(labs)).round(2))


@pytest.fixture
def make(tmp_path, capsys):
    """Return the exit code, what was said, and the rows and description that were written."""

    def run(people, *flags, labs=None, last=2000):
        table = pd.DataFrame({"Admitted": ADMITTED, **people})
        table.insert(0, "MRN", [f"P{k:03d}" for k in range(len(table))])
        if labs is None:
            labs = values_of(table)
            labs.loc[len(labs)] = ["P000", ADMITTED + last * HOUR, "Creatinine", 1.0]
        for name, content in (("labs", labs), ("people", table)):
            content.to_csv(tmp_path / f"{name}.csv", index=False)
        words = [f"--table={tmp_path / 'labs.csv'}", f"--labels={tmp_path / 'people.csv'}"]
        words += ["--columns", "subject_id=MRN", "time=Taken", "item=Test", "value=Level"]
        words += [f"--out={tmp_path / 'out.csv'}", "--prediction_time=Admitted + 24 h", *flags]
        capsys.readouterr()
        code = dataset_format.main(["from_long", *words])
        said = "".join(capsys.readouterr())
        if code or "--preview" in flags:
            return code, said, None, None
        rows = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
        return code, said, rows, json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    return run


def read(rows, *names):
    """The cells of some columns of each patient that has a row."""
    return {int(row.pop("subject_id")[1:]): tuple(row.values()) for row in columns_of(rows, names)}


def columns_of(rows, names):
    return rows[["subject_id", *names]].to_dict("records")


# --------------------------------------------------------------------------- labels of dates

MONTH = "death within 30 days=Died"


@pytest.mark.parametrize(
    ("label", "died", "left", "labels"),
    [
        (MONTH, after(-0.01, 0, 5, 720, 720.02, None), after(*[99] * 6), "-11100"),
        ("death within 12 h=Died", after(-9, 0, 12, 12.02, 0.5, None), after(*[99] * 6), "-11010"),
        (MONTH, days(2, 3, 4, 33, 34, None), after(*[99] * 6), "-11100"),
        ("death within 12 h=Died", days(2, 3, 4, 1, 5, None), after(*[99] * 6), "-10-00"),
        ("death by Left=Died", after(3, 9, 9.02, -1, None, 5), after(*[9] * 5, None), "110-01"),
        ("death by Left=Died", days(5, 6, 7, 2, None, 3), after(*[72] * 5, None), "110-01"),
        ("death by Left=Died", after(3, 63.9, 64, -1, None, 5), days(*[5] * 5, None), "110-01"),
        ("death by Left=Died", days(4, 5, 6, 2, None, 3), days(*[5] * 5, None), "110-01"),
    ],
)
def test_a_date_by_an_end_is_a_label(label, died, left, labels, make):
    """A date alone is its whole day: that of the end counts, that of the prediction is not past.

    A stay without an end goes on until the event.
    """
    _, _, rows, about = make({"Died": died, "Left": left}, f"--label={label}")
    found = {k: text for k, text in enumerate(labels) if text != "-"}
    assert read(rows, "label_escalation") == {k: (text,) for k, text in found.items()}
    assert about["outcome"] == label.partition("=")[0].partition(" by ")[0]
    assert about["flow"][0]["removed"] == labels.count("-")


def test_the_day_before_a_prediction_at_midnight_is_past(make):
    people = {"Admitted": days(2, 2, 2), "Died": days(2, 3, None)}
    assert read(make(people, f"--label={MONTH}")[2], "label_escalation") == {1: ("1",), 2: ("0",)}
    people["Died"] = days(2, 3, 4)
    assert read(make(people, "--event=death=Died")[2], "event") == {1: ("1",), 2: ("1",)}
    people = {"Admitted": days(2, 2), "Left": days(2, 3), "Dead": ["no", "yes"]}
    assert [*read(make(people, "--outcome_column=Dead", "--end_time=Left")[2])] == [1]


@pytest.mark.parametrize("flag", [f"--label={MONTH}", "--label=x by Left=Died", "--event=x=Died"])
def test_a_past_outcome_leaves_out_new_patients_too_and_no_lost_event_is_past(flag, make):
    people = {"Died": after(-3, 5, None), "Left": after(*[99] * 3)}
    _, _, rows, _ = make(people, flag, "--no_labels")
    assert [*read(rows)] == [1, 2]
    assert all(re.match(INPUTS, name) for name in rows)
    labs = values_of(pd.DataFrame({"MRN": ["P000", "P002"], "Admitted": ADMITTED}), (1, 2000))
    _, said, *_ = make(people, flag, labs=labs)
    assert "1 of 2 rows (50.0%), 1 of 2 patients and 1 of 1 events are lost" in said


def test_a_date_has_the_zone_of_the_prediction(make):
    """At half past midnight here the day before is over, though not in UTC."""
    start = pd.Timestamp("2024-03-02 00:30+02:00")
    people = {"Admitted": [start.isoformat()] * 3, "Died": days(2, 3, None)}
    labs = pd.DataFrame({"MRN": ["P000", "P001", "P002"] * 2, "Test": "x", "Level": 1.0})
    labs["Taken"] = [(start + k * HOUR).isoformat() for k in (1, 2, 3, 900, 901, 902)]
    flags = [f"--label={MONTH}"], ["--event=death=Died"]
    assert read(make(people, *flags[0], labs=labs)[2], "label_escalation") == {1: ("1",), 2: ("0",)}
    assert [*read(make(people, *flags[1], labs=labs)[2])] == [1, 2]
    code, said, *_ = make({**people, "Died": after(1, 2, None)}, *flags[0], labs=labs)
    assert (code, "with a zone" in said) == (2, True)


@pytest.mark.parametrize("last", ["values", "Died", "Left"])
def test_what_no_table_can_know_yet_is_no_label(last, make):
    """The end lies beyond the last time of both tables; an event is known nonetheless."""
    people = {"Died": after(None, 5, None), "Left": after(*[1] * 3)}
    if last != "values":
        people[last][2] = after(719 if last == "Died" else 721)[0]
    flags = ["--label=death within 30 days=Died", "--label=left within 30 days=Left"]
    at = {"values": 24 + 719, "Died": 100, "Left": 100}[last]
    _, _, rows, about = make(people, *flags, last=at)
    cell = "" if last != "Left" else "0"
    main = {0: cell, 1: "1", 2: "1" if last == "Died" else cell}
    further = "label_left_within_30_days"
    assert {k: cells[0] for k, cells in read(rows, "label_escalation").items()} == main
    assert about["labels"] == {further: {"outcome": "left within 30 days"}}
    assert [cells[0] for cells in read(rows, further).values()][:2] == ["1", "1"]


def test_yes_and_no_stand_under_a_title_beside_dates(make):
    people = {"Dead": ["ja", "nein", ""], "Died": after(5, None, None), "Moved": [*"qqr"]}
    labels = ["--label=death in hospital=Dead", f"--label={MONTH}", "--label=move=Moved"]
    _, _, rows, about = make(people, *labels, "--positive=ja", "--positive=r")
    names = "label_escalation", "label_death_within_30_days", "label_move"
    found = {0: ("1", "1", "0"), 1: ("0", "0", "0"), 2: ("", "0", "1")}
    assert read(rows, *names) == found
    assert about["outcome"] == "death in hospital"
    assert [*about["labels"].values()] == [{"outcome": MONTH[:-5]}, {"outcome": "move"}]


@pytest.mark.parametrize(
    "flag", ["--label=death=Died", "--outcome_column=Died", "--columns=label=Died", "--keep=Died"]
)
def test_dates_without_an_end_are_a_question(flag, make, tmp_path):
    people = {"Died": after(5, None, 800, None)}
    code, said, *_ = make(people, flag)
    assert code == 2
    assert "people.csv" in said
    code, said, *_ = make(people, flag, "--preview")
    assert code == 0
    asked = said.partition("open questions")[2]
    assert "  --label '" in asked
    assert "within 30 days=Died'" in asked
    answer(tmp_path / "out.toml")
    assert dataset_format.main(["from_long", f"--config={tmp_path / 'out.toml'}"]) == 0
    rows = pd.read_csv(tmp_path / "out.csv")
    assert rows["label_escalation"].tolist() == [1, 0, 0, 0]
    assert [*rows.filter(like="label_")] == ["label_escalation"]


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        (["--label=death within 30 days"], "--label death within 30 days: "),
        (["--label==Died"], "--label =Died: "),
        (["--label=death within 30 days=Dead"], "column label=?: |Dead"),
        (["--label=death by Gone=Died"], "--label .*Gone"),
        ([f"--label={MONTH}", "--label=x by Left=Died", "--label=x! by ICU=Left"], "--label"),
        (["--event=death=Died", "--event=ICU"], "--event ICU: "),
        (["--event=1=Died"], "--event 1=Died: "),
        (["--event=death=Died", "--event_names=x"], "--event: "),
        (["--event=death=Dead"], "--event death=Dead: .*people.csv"),
        (["--event=death=Died", "--interventions=ICU"], "--interventions ICU: "),
        (["--event=Died"], "--event: "),
        (["--event=death=Died", "--event_time=Gone"], "people.csv.*event_time"),
    ],
)
def test_a_label_or_event_that_cannot_be_read_is_refused(flags, place, make):
    code, said, *_ = make(dict.fromkeys(("Died", "ICU", "Left"), after(5, None)), *flags)
    error = said.splitlines()[-1]
    assert code == 2
    assert pd.Series([error]).str.contains(place).all(), error


# --------------------------------------------------------------------------- times to events


EVENTS = ["--event=ICU=ICU", "--event=death=Died", "--event=discharge=Left"]


ENDED = [*EVENTS[:2], "--event_time=Left"]
STAYED = [*EVENTS[:2], "--end_time=Left"]


@pytest.mark.parametrize(
    ("flags", "cells"),
    [
        (
            EVENTS,
            {(5, 7, 50): (5, 1), (7, 5, 5): (5, 2), (-1, 5, 50): None, (None,) * 3: ("", "")},
        ),
        (EVENTS[::-1], {(None, 5, 5): (5, 1)}),  # of one time the first that is named
        (
            ENDED,
            {
                (None, None, 30): (30, 0),
                (None, 64, 30): (30, 0),  # is on a later day
                (None, 39, 30): (39, 2),
                (None, 5, None): (5, 2),
                (None, None, -1): None,
            },
        ),
        (STAYED, {(None, None, 30): (30, 0), (None, 5, -30): None}),
    ],
)
def test_the_first_event_counts(flags, cells, make):
    columns = zip(*cells, (60, 61, 62), strict=True)
    people = {
        name: after(*column) for name, column in zip(("ICU", "Died", "Left"), columns, strict=True)
    }
    _, said, rows, about = make(people, *flags)
    found = read(rows, "event_hours", "event")
    for k, expected in enumerate(cells.values()):
        hours, event = found.get(k, (None, None))
        assert (hours is None) == (expected is None)
        if expected:
            assert (hours and float(hours), event and int(event)) == expected
    named = [flag.split("=")[1] for flag in flags if flag.startswith("--event=")]
    assert about["events"] == {str(k): name for k, name in enumerate(named, start=1)}
    assert about["outcome"] == named[0]
    warned = [x for x in said.splitlines() if "warning" in x and "people.csv" in x]
    assert len(warned) == (("", "") in cells.values())
    removed = [step["removed"] for step in about["flow"] if "before" in step["rule"]]
    assert sum(removed) == [*cells.values()].count(None)


def random_people(rng, whole, count=120):
    """Times on a grid of six hours, so that many are equal or at midnight, and whole days."""
    start = pd.Timestamp("2024-03-02") + 6 * HOUR * rng.integers(0, 8, count)
    table = {"Admitted": start.astype(str)}
    for name in ("ICU", "Died", "Left"):
        at = start + 6 * HOUR * rng.integers(-2, 24, count)
        at = pd.Series(at).dt.normalize() if name in whole else pd.Series(at)
        at[0] = pd.Timestamp("2024-03-09" if name in whole else "2024-03-09 06:00")
        table[name] = at.astype(str).where(rng.random(count) < 0.6, "").str.replace("NaT", "")
    return table


def spans(cells):
    """First and last moment of each cell: a whole day where no cell has a time of day."""
    times = [pd.Timestamp(cell) if cell else None for cell in cells]
    is_day = all(at is None or at == at.normalize() for at in times)
    last = DAY - pd.Timedelta("1us") if is_day else pd.Timedelta(0)
    return [None if at is None else (at, at + last) for at in times]


def slow_event(asked, events, end):
    """Hours and number of the first event of a patient, None of no row; plain and slow."""
    found = []
    for number, span in enumerate(events, start=1):
        if span is None or (end and span[0].normalize() > end[1].normalize()):
            continue
        others = [x[0] for x in events if x and x[0] == x[1] and span[0] <= x[0] <= span[1]]
        others = [x for x in others if not end or x.normalize() <= end[1].normalize()]
        found.append((min([span[1], *others]), number))
    at, number = min(found, default=(end[1] if end else None, 0))
    if at is None:
        return "", ""
    return None if at < asked else ((at - asked) / HOUR, number)


def slow_label(asked, event, end, known):
    if (event and event[1] < asked) or (end is not None and end < asked):
        return None
    if event and (end is None or event[0] <= end):
        return "1"
    return "0" if end is not None and end <= known else ""


@pytest.mark.parametrize("whole", [(), ("ICU", "Left"), ("ICU", "Died", "Left")])
@pytest.mark.parametrize("end", ["", "event_time", "end_time"])
def test_events_are_those_of_a_slow_second_way(end, whole, make):
    people = random_people(np.random.default_rng(len(whole)), whole)
    flags = EVENTS[:2] if end else EVENTS
    _, _, rows, _ = make(people, *flags, *([f"--{end}=Left"] if end else []))
    columns = [spans(people[name]) for name in ("ICU", "Died", "Left")[: len(flags)]]
    ends = spans(people["Left"]) if end else itertools.repeat(None)
    expected = {}
    for k, (start, *events, last) in enumerate(
        zip(people["Admitted"], *columns, ends, strict=False)
    ):
        asked = pd.Timestamp(start) + DAY
        is_gone = end == "end_time" and last and last[1] < asked
        result = None if is_gone else slow_event(asked, events, last)
        if result:
            expected[k] = tuple(map(str, result))
    found = read(rows, "event_hours", "event")
    assert found.keys() == expected.keys()
    assert 50 < len(found) < 120
    for k, (hours, event) in expected.items():
        assert found[k][1] == event
        assert found[k][0] == hours or abs(float(found[k][0]) - float(hours)) < 1e-3


@pytest.mark.parametrize("whole", [(), ("Died", "Left"), ("ICU", "Died", "Left")])
def test_labels_are_those_of_a_slow_second_way(whole, make):
    people = random_people(np.random.default_rng(len(whole)), whole)
    titles = ["death within 3 days=Died", "ICU by Left=ICU", "left within 36 h=Left"]
    titles.append("death within 12 h=Died")
    labs = values_of(pd.DataFrame(people).assign(MRN=[f"P{k:03d}" for k in range(120)]), (1, 9))
    _, _, rows, _ = make(people, *(f"--label={title}" for title in titles), labs=labs)
    icu, died, left = (spans(people[name]) for name in ("ICU", "Died", "Left"))
    known = max(x[0] for x in (*icu, *died, *left) if x)
    expected = {}
    for k, start in enumerate(people["Admitted"]):
        asked = pd.Timestamp(start) + DAY
        end = left[k] and left[k][1]
        cells = [slow_label(asked, died[k], asked + 3 * DAY, known)]
        cells += [slow_label(asked, icu[k], end, known)]
        cells += [slow_label(asked, left[k], asked + 36 * HOUR, known)]
        cells.append(slow_label(asked, died[k], asked + 12 * HOUR, known))
        if cells[0] is not None:
            expected[k] = tuple(cell or "" for cell in cells)
    names = ("icu", "left_within_36_h", "death_within_12_h")
    found = read(rows, "label_escalation", *(f"label_{name}" for name in names))
    assert found == expected
    assert {cell for cells in found.values() for cell in cells} == {"0", "1", ""}


def test_a_column_that_names_the_first_event_gives_the_same(make):
    people = random_people(np.random.default_rng(9), ())
    _, _, dated, about = make(people, *EVENTS[:2], "--event_time=Left")
    columns = [spans(people[name]) for name in ("ICU", "Died", "Left")]
    why, ended = [], []
    for start, *events, end in zip(people["Admitted"], *columns, strict=True):
        asked = pd.Timestamp(start) + DAY
        hours, number = slow_event(asked, events, end) or (-1, 0)
        why.append(("censored", "ICU", "Death")[number or 0])
        ended.append("" if hours == "" else str(asked + hours * HOUR))
    words = ["--event=Why", "--event_time=Ended", "--event_names", "ICU", "death"]
    _, _, rows, other = make({**people, "Why": why, "Ended": ended}, *words)
    pd.testing.assert_frame_equal(rows, dated)
    assert other["events"] == about["events"] == {"1": "ICU", "2": "death"}


@pytest.mark.parametrize("whole", [(), ("Died", "Left")])
def test_a_future_that_is_altered_changes_no_input(whole, make):
    people = random_people(np.random.default_rng(4), whole)
    people |= {"Age": np.arange(120)}
    table = pd.DataFrame(people).assign(MRN=[f"P{k:03d}" for k in range(120)])
    labs = values_of(table, (1, 9, 23.9, 24.1, 90))
    flags = [*EVENTS[:2], "--event_time=Left", f"--label={MONTH}", "--static=age=Age"]
    _, _, before, _ = make(people, *flags, labs=labs)
    start = pd.to_datetime(table["Admitted"])
    asked = labs["MRN"].map(dict(zip(table["MRN"], start + DAY, strict=True)))
    values = labs["Level"].where(labs["Taken"] <= asked, labs["Level"] * 7)
    pd.testing.assert_frame_equal(make(people, *flags, labs=labs.assign(Level=values))[2], before)
    later = {}
    for name in ("ICU", "Died", "Left"):
        at = pd.to_datetime(pd.Series(people[name]), errors="coerce")
        is_late = at.dt.normalize() > (start + DAY).dt.normalize()
        later[name] = people[name].where(~is_late, (at + 2 * DAY).astype(str))
        later[name] = later[name].where(~is_late | (np.arange(120) % 3 > 0), "")
    _, _, altered, _ = make({**people, **later}, *flags, labs=labs)
    pd.testing.assert_frame_equal(altered.filter(regex=INPUTS), before.filter(regex=INPUTS))
    assert (altered["event_hours"] != before["event_hours"]).sum() > 30
