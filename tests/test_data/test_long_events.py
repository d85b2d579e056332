"""from_long on a list of patients with times to competing events."""

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MIMICtrajectoryDataset
from event_files import EPOCH, long_file, moment, write_table
from medgemma_clinical.data import checks
from medgemma_clinical.files import InputError

PATIENTS = 6
ENDS = [80.0, 50.25, 30.0, 24.0, None, 23.5]  # hours; risks are wanted at 24 h
EVENTS = ["", "Death", "transplant", "death", "", "death"]
WORDS = ("death", "Transplant")
FLAGS = {"event_time": "Ended", "event": ("Why",), "event_names": WORDS, "window_hours": 24.0}


def values(patients=PATIENTS, later=()):
    rows = [(k, hour, 7 + k + hour / 100) for k in range(patients) for hour in (1, 20, *later)]
    table = pd.DataFrame(rows, columns=["subject_id", "charttime", "value"])
    table["charttime"] = [moment(hour) for hour in table["charttime"]]
    return table.assign(item="creatinine", unit="mg/dL", storetime=table["charttime"])


def people(ends=ENDS, events=EVENTS, asked=24.0, **columns):
    table = pd.DataFrame({"subject_id": range(len(ends)), "Why": events})
    times = {"prediction_time": moment(asked), "Ended": [moment(x) for x in ends]}
    return table.assign(**times, **columns)


@pytest.fixture
def make(tmp_path):
    def make_them(labels=None, table=None, **flags):
        table = values() if table is None else table
        labels = people() if labels is None else labels
        return long_file(table, tmp_path, labels, **{**FLAGS, **flags})

    return make_them


def test_times_to_events_are_hours_from_the_prediction_time(make, caplog):
    caplog.set_level(logging.INFO)
    rows, about = make(interventions=("TRANSPLANT",))
    assert rows["subject_id"].tolist() == [*"01234"]
    np.testing.assert_array_equal(rows["event_hours"], [56, 26.25, 6, 0, np.nan])
    assert rows["event"].astype(object).where(rows["event"].notna(), None).tolist() == [
        *(0, 1, 2, 1),
        None,
    ]
    assert not [name for name in rows if name.startswith("label")]
    assert about["events"] == {"1": "death", "2": "Transplant"}
    assert (about["interventions"], about["outcome"]) == ([2], "death")
    assert "death" in about["question"]
    assert about["rows"] == {"rows": 5, "patients": 5, "events": 2}
    past = about["flow"][0]
    assert (past["removed"], past["left"], past["patients"]) == (1, 5, 5)
    assert sum("before the prediction time" in line for line in caplog.messages) == 1
    assert "storetime=storetime" in "".join(about["arguments"]["columns"])


@pytest.mark.parametrize(
    ("cells", "names", "events"),
    [
        (["0", "1", "2.0", "None", "Censored", "alive"], (), [0, 1, 2, 0, 0, 0]),
        (["0", "1", "2", "no", "", "nan"], ("died",), "column Why: 1 cell "),
        (["Home", "died", "1", "2", "alive", "it's"], ("died", "home", "it's"), [2, 1, 1, 2, 0, 3]),
        (["0", "died", "died", "home", "", ""], (), "column Why: 3 cells .*--event_names"),
        (["0", "1.5", "100", "-1", "", ""], (), "column Why: 3 cells "),
    ],
)
def test_events_are_numbers_or_words(cells, names, events, make):
    labels = people([90.0] * PATIENTS, cells)
    if isinstance(events, str):
        with pytest.raises(InputError, match=events):
            make(labels, event_names=names)
    else:
        rows, about = make(labels, event_names=names)
        assert rows["event"].tolist() == events
        assert ("events" in about) == bool(names)


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        ({"event": ()}, "--event_time: "),
        ({"event_time": ""}, "--event: "),
        ({"event": ("Wy",)}, "labels.csv: --columns event=.*Why"),
        ({"event_time": "End"}, "labels.csv: --columns event_time=.*Ended"),
        ({"event_names": ("death", "transplant", "Death")}, "--event_names: "),
        ({"event_names": ("death", "transplant", "1")}, "--event_names: "),
        ({"interventions": ("1",)}, "--interventions 1: "),
        ({"interventions": ("death",)}, "--interventions death: "),
        ({"interventions": ("surgery",)}, "--interventions surgery: "),
        ({"keep": ("Event",)}, "column Event: is a name of the output"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, place, make):
    with pytest.raises(InputError, match=place):
        make(people(Event="x"), **flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"Why": ["", "death", "", "", "death", ""]}, "column Ended: 1 cell "),
        ({"Ended": "soon"}, "column Ended: "),
        ({"Ended": "2150-01-03T01:00+01:00"}, "column Ended: times with a zone"),
    ],
)
def test_an_event_without_a_time_is_refused_and_other_times_as_any_column(change, place, make):
    with pytest.raises(InputError, match=place):
        make(people().assign(**change))


def test_times_may_be_numbers(make):
    table, labels = values(), people()
    for frame in (table, labels):
        for name in frame.select_dtypes("datetime"):
            frame[name] = (frame[name] - EPOCH) / pd.Timedelta("1h")
    rows, _ = make(labels, table, time_unit="hours")
    assert rows["event_hours"].tolist()[:4] == [56, 26.25, 6, 0]


def test_a_label_stands_beside_times_where_it_is_named(make, tmp_path):
    labels = people(outcome=[0, 1, 0, 1, 0, 1])
    assert "label_escalation" not in make(labels)[0]
    rows, about = make(labels, columns=("label=outcome",))
    assert rows["label_escalation"].tolist() == [0, 1, 0, 1, 0]
    assert (about["outcome"], about["rows"]["events"]) == ("Event", 2)
    path = write_table(rows, tmp_path / "both.csv")
    path.with_suffix(".json").write_text(json.dumps(about))
    times = MIMICtrajectoryDataset(path, outcome_kind="time", horizon_hours=[24])
    assert (MIMICtrajectoryDataset(path).outcome, times.outcome) == ("Event", "death")


def test_an_event_column_is_a_label_as_before_where_no_time_is_given(make):
    labels = people().drop(columns="Why").assign(event=[0, 1, 0, 1, 0, 1])
    rows, about = make(labels, event=(), event_time="", event_names=())
    assert rows["label_escalation"].tolist() == [0, 1, 0, 1, 0, 1]
    assert not {"events", "interventions"} & {*about}


@pytest.mark.slow
def test_a_future_that_is_altered_changes_no_input(make):
    before, _ = make()
    table = values(later=(24.5, 30))
    stored = values().assign(value=99.0, storetime=moment(24.1))
    labels = people(
        [24.5, 99, 30.25, 40, 80, 25], ["death", "", "death", "", "death", "transplant"]
    )
    after, _ = make(labels, pd.concat([table, stored]))
    assert after["subject_id"].tolist() == [*"012345"]
    kept = after[after["subject_id"] != "5"].drop(columns=["event", "event_hours"])
    pd.testing.assert_frame_equal(before.drop(columns=["event", "event_hours"]), kept)
    assert (before["event_hours"] != after["event_hours"].iloc[:5]).all()


# --------------------------------------------------------------------------- the command


def words_of(**flags):
    return [
        f"--{name}={x}"
        for name, value in flags.items()
        for x in (value if isinstance(value, tuple) else [value])
    ]


@pytest.fixture
def files(tmp_path):
    table = write_table(values(), tmp_path / "labs.csv")
    labels = write_table(people(), tmp_path / "patients.csv")
    return [f"--table={table}", f"--labels={labels}"]


def run(*words):
    return dataset_format.main(["from_long", *map(str, words)])


@pytest.mark.slow
def test_a_preview_asks_for_the_words_and_writes_a_file_that_runs(files, tmp_path, capsys):
    out, config = tmp_path / "data.csv", tmp_path / "data.toml"
    flags = {"event_time": "Ended", "event": "Why"}
    assert run(*files, *words_of(**flags), f"--out={out}", "--preview") == 0
    shown = capsys.readouterr().out
    parts = "event_time         Ended", "event              Why", "--event_names 'Death'"
    assert all(part in shown for part in parts)
    assert re.search(r"^  event_hours +56.0 ", shown, re.MULTILINE)
    text = config.read_text()
    assert "VALUE" in text
    assert "transplant" not in text.lower()  # a word of cells
    assert run(f"--config={config}") == 2
    config.write_text(text.replace("event_names = [", 'event_names = [\n"death", "transplant",'))
    assert run(f"--config={config}") == 0
    typed = tmp_path / "typed.csv"
    names = {"event_names": ("death", "transplant"), "series": "creatinine [mg/dL]=creatinine"}
    assert run(*files, *words_of(**flags, **names), f"--out={typed}") == 0
    assert out.read_bytes() == typed.read_bytes()


@pytest.mark.slow
def test_new_patients_are_read_like_an_earlier_file_with_or_without_their_events(files, tmp_path):
    earlier, out = tmp_path / "earlier.csv", tmp_path / "new.csv"
    assert run(*files, *words_of(**FLAGS, interventions="2"), f"--out={earlier}") == 0
    assert run(*files, f"--like={earlier}", f"--out={out}") == 0
    assert out.read_bytes() == earlier.read_bytes()
    assert run(*files, f"--like={earlier}", "--no_labels", f"--out={out}") == 0
    assert pd.read_csv(out)["subject_id"].tolist() == [*range(5)], "one has died before"
    write_table(people().drop(columns=["Ended", "Why"]), tmp_path / "patients.csv")
    assert run(*files, f"--like={earlier}", "--no_labels", f"--out={out}") == 0
    rows = pd.read_csv(out)
    assert len(rows) == PATIENTS
    assert not {"event", "event_hours", "label_escalation"} & {*rows}


def test_the_check_reads_what_the_command_wrote(tmp_path, capsys):
    patients = 240
    table = write_table(values(patients), tmp_path / "labs.csv")
    cells = [("", "death", "transplant")[k % 3] for k in range(patients)]
    labels = people([25.0 + k for k in range(patients)], cells)
    labels = write_table(labels, tmp_path / "patients.csv")
    out = tmp_path / "data.csv"
    flags = words_of(**FLAGS, interventions="transplant")
    assert run(f"--table={table}", f"--labels={labels}", *flags, f"--out={out}") == 0
    dataset = MIMICtrajectoryDataset(out, horizon_hours=[24, 72])
    assert dataset.competing_events.risk_names[2] == "risk_without_Transplant_24h"
    assert dataset.events.tolist() == [k % 3 for k in range(patients)]
    assert dataset_format.main(["check", str(out), "--horizon_hours", "24,72"]) == 0
    shown = capsys.readouterr().out
    assert "rows by event: censored 80, death 80, Transplant 80" in shown
    assert checks.describe_events(dataset)[0] in shown
