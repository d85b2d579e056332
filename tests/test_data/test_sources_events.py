"""What from_meds and from_long share: windows, hours, series, splits of codes, and no leak."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MIMICtrajectoryDataset
from event_files import GAP, GAP_SERIES, GLUCOSE, GLUCOSE_SERIES, Mini, long, meds, moment
from medgemma_clinical.data.duck import Database
from medgemma_clinical.data.sources import events as shared
from medgemma_clinical.data.sources.events import parse_series
from medgemma_clinical.files import InputError

SERIES = (GAP_SERIES, GLUCOSE_SERIES)
Make = Callable[..., pd.DataFrame]
COUNTER: Iterator[int] = iter(range(10**6))


@pytest.fixture(params=["from_meds", "from_long"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Rows of either command."""

    def make_rows(mini: Mini, **flags: Any) -> pd.DataFrame:
        folder = tmp_path / str(next(COUNTER))
        flags = {"series": (GAP_SERIES,), **flags}
        if request.param == "from_meds":
            return meds(mini.write_meds(folder), **flags)
        folder.mkdir()
        return long(mini, folder, **flags)

    return make_rows


def cell(rows: pd.DataFrame, column: str = "clinical_trajectory") -> str:
    return str(rows[column].item())


def test_the_window_is_closed_at_both_ends(make: Make) -> None:
    mini = Mini().ask(1, 30)
    for hour in (5.99, 6, 12, 30, 30.01):
        mini.measure(1, hour, hour)
    assert cell(make(mini)) == "6 (0h) -> 12 (6h) -> 30 (24h)"
    assert cell(make(mini, window_hours=18)) == "12 (0h) -> 30 (18h)"


def test_a_fraction_of_a_second_decides(make: Make) -> None:
    late = 30 + 0.4 / 3600
    mini = Mini().ask(1, 30).measure(1, 20, 20).measure(1, late, 99)
    assert cell(make(mini)) == "20 (14h)"


def test_hours_count_from_the_window_or_the_first_observation(make: Make) -> None:
    mini = Mini().ask(1, 30).measure(1, 12, 15).measure(1, 8, 200, GLUCOSE).measure(1, 30, 11)
    rows = make(mini, series=SERIES)
    assert cell(rows) == "15 (6h) -> 11 (24h)"
    assert cell(rows, "prediction_hours") == "24"
    rows = make(mini, series=SERIES, hours_from="first")
    assert cell(rows) == "15 (4h) -> 11 (22h)"
    assert cell(rows, "trajectory_glucose [mg/dL]") == "200 (0h)"
    assert cell(rows, "prediction_hours") == "22"


def test_the_first_series_decides_and_a_name_given_twice_joins(make: Make) -> None:
    mini = Mini().ask(1, 30).ask(2, 30).measure(1, 12, 15).measure(2, 12, 15).measure(2, 13, 16)
    mini.measure(1, 14, 7, "other gap").measure(1, 15, 8, "other thing")
    joined = (GAP_SERIES, "Anion gap [mEq/L]=other*")
    rows = make(mini, series=joined, min_observations=2)
    assert rows["clinical_trajectory"].tolist() == [
        "15 (6h) -> 7 (8h) -> 8 (9h)",
        "15 (6h) -> 16 (7h)",
    ]
    assert make(mini, series=joined, min_observations=3)["subject_id"].tolist() == ["1"]
    rows = make(mini, series=("x=other thing", *SERIES[:1]))
    assert rows["subject_id"].tolist() == ["1"]
    assert list(rows)[3:5] == ["clinical_trajectory", "trajectory_anion gap [mEq/L]"]


def test_rows_are_named_by_subject_and_prediction_time(make: Make) -> None:
    mini = Mini().ask(10, 30.5, 1).ask(9, 30, 0).ask(9, 20, 0)
    for subject in (9, 10):
        mini.measure(subject, 12, 15)
    rows = make(mini)
    first, *_, last = rows["id"]
    assert (first, last) == ("9 2150-01-01T20:00:00", "10 2150-01-02T06:30:00")
    assert rows["label_escalation"].tolist() == [0, 0, 1]


def test_one_subject_twice_at_one_time_is_refused(make: Make) -> None:
    with pytest.raises(
        InputError, match=r"(parquet|csv): subject_id and prediction_time appear twice"
    ):
        make(Mini().ask(1, 30, 0).ask(1, 30, 1).measure(1, 12, 15))


def test_labels_that_are_not_known_are_left_out(make: Make) -> None:
    mini = Mini().ask(1, 30, None).ask(2, 30, 1).measure(1, 12, 15).measure(2, 12, 15)
    assert make(mini)["subject_id"].tolist() == ["2"]


def test_nothing_left_says_by_which_rule(make: Make) -> None:
    mini = Mini().ask(1, 30).ask(2, 30).measure(1, 20, 100, GLUCOSE).measure(9, 1, 15)
    expected = "from the first window to the last; .* no value of anion gap in the window"
    with pytest.raises(InputError, match=expected):
        make(mini, series=SERIES)


def test_a_code_that_is_not_there_is_refused_with_the_nearest(make: Make) -> None:
    mini = Mini().ask(1, 30).measure(1, 12, 15).measure(2, 12, 9, "LAB//lactate")
    with pytest.raises(InputError, match="no event has this code: did you mean LAB//gap"):
        make(mini, series=("gap=LAB//gaps",))
    rows = make(mini, series=(GAP_SERIES, "lactate=LAB//lactate"))
    assert rows["trajectory_lactate"].isna().all()


def test_dates_without_a_time_are_warned_of(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make(Mini().ask(1, 30).measure(1, 12, 15).measure(1, 24.5, 16))
        assert "midnight" not in caplog.text
        make(Mini().ask(1, 30).measure(1, 12, 15).measure(1, 24, 16))
    assert "midnight: a date without a time counts as known from the beginning" in caplog.text


def test_storing_times_at_midnight_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        long(Mini().ask(1, 30).measure(1, 12, 15, stored=24), tmp_path)
    assert "midnight" in caplog.text
    assert all(each.getMessage().startswith("warning: ") for each in caplog.records)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"series": ("=x",)}, "NAME"),
        ({"series": ("a, b=x",)}, "comma"),
        ({"series": ("a [b=x",)}, "NAME"),
        ({"series": ("50868=x",)}, "words"),
        ({"series": (GAP_SERIES, "anion gap [mmol/L]=x")}, "earlier anion gap has mEq/L"),
        ({"window_hours": 0.0}, "--window_hours 0"),
        ({"window_hours": float("nan")}, "--window_hours nan"),
        ({"min_observations": 0}, "--min_observations 0"),
        ({"outcome": "=1"}, "--outcome =1"),
        ({"outcome": "a" * 201}, "--outcome: longer"),
    ],
)
def test_a_wrong_flag_is_named(make: Make, flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make(Mini().ask(1, 30).measure(1, 12, 15), **flags)


def test_series_alone_name_their_item() -> None:
    assert parse_series("series", ["pH"], code_needed=False)[0].codes == ("pH",)
    with pytest.raises(InputError, match="NAME"):
        parse_series("series", ["pH"])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    mini = Mini()
    rng = np.random.default_rng(0)
    for subject in range(40):
        mini.ask(subject, 30, subject % 2)
        mini.measure(subject, None, None, "GENDER//F").measure(
            subject, -40 * 8766, None, "MEDS_BIRTH"
        )
        for hour in rng.uniform(6, 30, 5):
            mini.measure(subject, hour, rng.normal(12, 3)).measure(subject, hour, 100, GLUCOSE)
    folder = mini.write_meds(tmp_path / "meds")
    words = ["from_meds", "--meds_dir", str(folder), "--labels", str(folder / "task")]
    for series in SERIES:
        words += ["--series", series]
    words += ["--outcome", "Death", "--out", str(tmp_path / "out.csv")]
    assert dataset_format.main(words) == 0
    dataset = MIMICtrajectoryDataset(tmp_path / "out.csv")
    assert (dataset.features, dataset.units) == (("anion gap", "glucose"), ("mEq/L", "mg/dL"))
    assert (len(dataset), dataset.outcome) == (40, "Death")
    assert dataset.question == "Will the outcome 'Death' occur?"
    assert dataset.limits(0) is None, "those of another series would be wrong"
    description = json.loads((tmp_path / "out.json").read_text())
    assert description["rows"] == {"rows": 40, "patients": 40, "events": 20}
    assert description["arguments"]["series"] == list(SERIES)
    assert {*description["tables_sha256"]} >= {
        "data/train/0.parquet",
        "labels: task/deep/0.parquet",
    }


@pytest.mark.parametrize("cell", ["=1+1", "@x", "-a", "+1"])
def test_a_subject_that_seems_a_formula_is_refused(cell: str, tmp_path: Path) -> None:
    mini = Mini().ask(1, 30).measure(1, 12, 15)
    table = mini.long().assign(subject_id=cell)
    labels = mini.label_table("label", "Int64").assign(subject_id=cell)
    with pytest.raises(InputError, match=r"labels.csv: a subject begins with =, \+, - or @"):
        long(table, tmp_path, labels)
    negative = long(table.assign(subject_id=-7), tmp_path, labels.assign(subject_id=-7))
    assert negative["subject_id"].tolist() == ["-7"]


def test_batches_of_subjects_change_no_byte(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    mini = random_events(np.random.default_rng(4))
    whole = make(mini, series=SERIES)
    monkeypatch.setattr(shared, "MOST_PAIRS", 100)
    assert make(mini, series=SERIES).to_csv() == whole.to_csv()


def test_only_events_from_the_first_window_to_the_last_are_kept(tmp_path: Path) -> None:
    mini = Mini().ask(1, 30).ask(1, 80)
    for hour in (5.9, 6, 40, 80, 80.1):
        mini.measure(1, hour, hour)
    seen: list[float] = []
    run_file = Database.run_file

    def look(database: Database, path: Path) -> None:
        if path.stem == "events":
            seen.extend(database.frame("SELECT value FROM record ORDER BY value")["value"])
        run_file(database, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "run_file", look)
        meds(mini.write_meds(tmp_path / "meds"))
        long(mini, tmp_path)
    assert seen == [6, 40, 80] * 2


def test_subjects_with_other_names_are_refused_or_warned_of(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    mini = Mini().ask(1, 30).ask(2, 30).ask(3, 30)
    expected = "no subject of --labels has a value in --table|no event of any subject with a label"
    with pytest.raises(InputError, match=expected):
        make(mini.measure(9, 12, 15))
    mini.measure(1, 12, 15)
    with caplog.at_level(logging.WARNING):
        make(mini)
        assert "subjects with a label have no value in their windows: are" in caplog.text
        caplog.clear()
        make(mini.measure(2, 12, 15))
    assert "are subjects" not in caplog.text


# --------------------------------------------------------------------------- leaks


def random_events(rng: np.random.Generator) -> Mini:
    mini = Mini()
    for subject in range(60):
        mini.measure(subject, -50 * 8766.0 - subject, None, "MEDS_BIRTH")
        mini.measure(subject, None, None, f"GENDER//{'FM'[subject % 2]}")
        for _ in range(2):
            mini.ask(subject, rng.integers(24 * 60, 60 * 60) / 60, int(rng.integers(2)))
        for hour in rng.uniform(0, 90, 40):
            code = (GAP, GLUCOSE, "LAB//lactate", "DRUG//insulin")[rng.integers(4)]
            value = None if code.startswith("DRUG") else float(rng.integers(1, 300))
            stored = hour + rng.exponential(3)
            mini.measure(subject, hour, value, code, stored=stored)
    mini.labels = [
        dict(t) for t in {(each["subject"], each["hours"]): each for each in mini.labels}.values()
    ]
    return mini


def name_of(label: dict[str, Any]) -> str:
    return f"{label['subject']} {moment(label['hours']):%Y-%m-%dT%H:%M:%S}"


def after(
    mini: Mini, subject: int, hours: float, rng: np.random.Generator, *, stored: bool
) -> Mini:
    """Change everything that is measured (or stored) later than one prediction time."""
    changed = Mini(splits=mini.splits)
    changed.labels = [
        each for each in mini.labels if (each["subject"], each["hours"]) == (subject, hours)
    ]
    for event in mini.events:
        known = event["stored"] if stored and event["stored"] is not None else event["hours"]
        late = event["hours"] is not None and max(event["hours"], known) > hours
        if not late:
            changed.events.append(event)
        elif rng.random() < 0.7:
            later = hours + float(rng.exponential(9)) + 0.01
            value = None if event["value"] is None else 999.0
            changed.events.append({**event, "hours": later, "stored": later, "value": value})
    for code, value in (
        (GAP, 888.0),
        (GLUCOSE, 777.0),
        ("LAB//lactate", 1.0),
        ("DRUG//insulin", None),
    ):
        changed.measure(subject, hours + 0.001, value, code)
    return changed


@pytest.mark.parametrize("command", ["from_meds", "from_long"])
def test_nothing_after_the_prediction_time_changes_an_input(command: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    mini = random_events(rng)
    context = ("lactate [mmol/L]=LAB//lactate", "insulin=DRUG*")

    def rows_of(events: Mini, name: str) -> pd.DataFrame:
        folder = tmp_path / name
        if command == "from_meds":
            return meds(events.write_meds(folder), SERIES, context=context)
        folder.mkdir()
        return long(events, folder, series=SERIES, equal_times="last")

    rows = rows_of(mini, "whole").set_index("id").drop(columns="label_escalation")
    assert len(rows) > 80
    asked = [each for each in mini.labels if name_of(each) in rows.index]
    for number, label in enumerate(asked[::15]):
        changed = after(mini, label["subject"], label["hours"], rng, stored=command == "from_long")
        again = rows_of(changed, str(number)).set_index("id")
        before = rows.loc[again.index]
        columns = [name for name in before if name in again or before[name].notna().any()]
        pd.testing.assert_frame_equal(
            before[columns], again.reindex(columns=columns), check_dtype=False
        )


# --------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("command", ["from_meds", "from_long"])
def test_threads_memory_and_the_order_of_rows_change_no_byte(command: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    mini = random_events(rng)
    for event in [*mini.events[::3]]:  # several values at one time
        mini.events.append({**event, "value": event["value"] and event["value"] / 3})
    shuffled = dataclasses.replace(mini, events=[*mini.events], labels=[*mini.labels])
    rng.shuffle(shuffled.events)
    rng.shuffle(shuffled.labels)
    small: dict[str, Any] = {"threads": 1, "memory_limit": "200MB"}
    large: dict[str, Any] = {"threads": 2, "memory_limit": "2GB"}
    made = []
    for name, events, limits in (("one", mini, small), ("two", shuffled, large)):
        folder = tmp_path / name
        if command == "from_meds":
            made.append(meds(events.write_meds(folder), SERIES, context=("x=LAB*",), **limits))
        else:
            folder.mkdir()
            made.append(long(events, folder, equal_times="keep", series=SERIES, **limits))
    assert made[0].to_csv() == made[1].to_csv()


@pytest.mark.parametrize("command", ["from_meds", "from_long"])
def test_help_names_defaults_and_choices(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dataset_format.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--hours_from {window,first} zero of the hours" in text
    assert "--window_hours HOURS length of the window before the prediction time, in hours " in text
    assert "(default: 24.0)" in text
    assert "default: None" not in text
    assert "default: )" not in text
