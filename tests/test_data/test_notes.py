"""Notes in the context: those written by the prediction time, in order, with their hours."""

import numpy as np
import pytest

from event_files import Mini, meds, meds_file, moment, random_events
from medgemma_clinical.files import InputError

SHOWN = ("NOTE//chest", "NOTE//discharge")


def asked():
    return Mini().ask(1, 30).measure(1, 12, 15).ask(2, 30).measure(2, 12, 15)


def note(mini, subject, hours, text, code="NOTE//chest"):
    return mini.measure(subject, hours, None, code, text=text)


def contexts(mini, folder, **flags):
    rows = meds(mini.write_meds(folder), **{"notes": SHOWN, **flags})
    return rows["clinical_context"].fillna("").tolist()


def name_of(label):
    return f"{label['subject']} {moment(label['hours']):%Y-%m-%dT%H:%M:%S}"


def test_notes_stand_in_order_with_their_hours_behind_the_context(tmp_path):
    mini = note(note(asked(), 1, 29.5, "No  change.\nClear\tlungs."), 1, -20, "Was well.")
    mini = note(note(mini, 1, 30, "On time."), 1, 30.01, "Too late.")
    note(note(mini, 1, 8, "Another kind", "OTHER//x"), 1, None, "When?")
    note(mini.measure(1, None, None, "GENDER//F"), 9, 8, "No label").measure(
        1, 8, 3.0, "NOTE//chest"
    )
    expected = "Note (-26h): Was well. Note (23.5h): No change. Clear lungs. Note (24h): On time."
    assert contexts(mini, tmp_path / "1") == [f"Woman. {expected}", ""]
    expected = expected.replace("-26h", "-32h").replace("23.5", "17.5").replace("24h", "18h")
    assert contexts(mini, tmp_path / "2", hours_from="first")[0] == f"Woman. {expected}"
    assert contexts(mini, tmp_path / "3", notes=()) == ["Woman", ""]
    other = contexts(mini, tmp_path / "4", notes=("OTHER//*",))
    assert other == ["Woman. Note (2h): Another kind", ""]


def test_the_oldest_words_are_cut(tmp_path):
    mini = note(note(note(asked(), 1, 10, "a b c"), 1, 11, "d e f"), 1, 12, "g h")
    for words, expected in {
        2: "Note (6h): g h",
        1: "Note (6h): h",
        4: "Note (5h): e f Note (6h): g h",
        5: "Note (5h): d e f Note (6h): g h",
        6: "Note (4h): c Note (5h): d e f Note (6h): g h",
        99: "Note (4h): a b c Note (5h): d e f Note (6h): g h",
    }.items():
        found = contexts(mini, tmp_path / str(words), max_note_words=words)
        assert found[0] == expected


def test_no_words_are_no_limit(tmp_path):
    with pytest.raises(InputError, match="--max_note_words 0"):
        contexts(asked(), tmp_path / "meds", max_note_words=0)


def test_a_date_counts_from_the_end_of_its_day(tmp_path):
    mini = note(note(asked(), 1, 24, "written this day"), 1, 0, "written yesterday")
    assert contexts(mini, tmp_path / "meds")[0] == "Note (18h): written yesterday"


def test_no_note_reaches_a_log(tmp_path, caplog):
    with caplog.at_level("DEBUG"):
        _, description = meds_file(
            note(asked(), 1, 8, "SECRET").write_meds(tmp_path / "meds"), notes=SHOWN
        )
    assert "1 of 2 prediction times have notes" in caplog.text
    assert "SECRET" not in caplog.text + str(description)


def test_nothing_written_later_changes_a_cell(tmp_path):
    rng = np.random.default_rng(6)
    mini = random_events(rng, subjects=20)
    for hour in rng.uniform(-500, 90, 300):
        note(mini, int(rng.integers(20)), hour, f"word {hour:.0f} " * rng.integers(1, 90))
    rows = meds(mini.write_meds(tmp_path / "whole"), notes=SHOWN).set_index("id")
    assert rows["clinical_context"].str.contains("Note").mean() > 0.9
    labels = [each for each in mini.labels if name_of(each) in rows.index]
    for number, label in enumerate(labels[::6]):
        changed = Mini(splits=mini.splits, labels=[label])
        for event in mini.events:
            if not event["text"] or event["hours"] <= label["hours"]:
                changed.events.append(event)
            elif rng.random() < 0.7:
                changed.events.append({**event, "text": "she died"})
        note(changed, label["subject"], label["hours"] + 0.001, "she died", SHOWN[1])
        again = meds(changed.write_meds(tmp_path / str(number)), notes=SHOWN).set_index("id")
        assert again["clinical_context"].item() == rows.loc[name_of(label), "clinical_context"]
