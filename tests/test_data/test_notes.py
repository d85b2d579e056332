"""Notes in the context: those written by the prediction time, in order, with their hours."""

import numpy as np
import pandas as pd
import pytest

import mimic_files
from event_files import Mini, meds, meds_file, name_of, random_events
from medgemma_clinical.files import InputError
from mimic_files import extracted, write_tables

SHOWN = ("NOTE//chest", "NOTE//discharge")


def note(mini, subject, hours, text, code="NOTE//chest"):
    return mini.measure(subject, hours, None, code, text=text)


def asked(*notes):
    """Two subjects asked at 30 h, and notes (hour, text) of the first."""
    mini = Mini().ask(1, 30).measure(1, 12, 15).ask(2, 30).measure(2, 12, 15)
    for written in notes:
        note(mini, 1, *written)
    return mini


@pytest.fixture
def contexts(tmp_path):
    def build(mini, **flags):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        rows = meds(mini.write_meds(folder), **{"notes": SHOWN, **flags})
        return rows.set_index("id")["clinical_context"].fillna("")

    return build


@pytest.mark.slow
def test_notes_stand_in_order_with_their_hours_behind_the_context(contexts):
    mini = asked((29.5, "No  change.\nClear\tlungs."), (-20, "Was well."), (30, "On time."))
    note(note(mini, 1, 30.01, "Too late."), 1, 8, "Another kind", "OTHER//x")
    note(note(mini.measure(1, None, None, "GENDER//F"), 1, None, "When?"), 9, 8, "No label")
    note(mini, 1, 24, "A date counts from the end of its day.").measure(1, 8, 3.0, "NOTE//chest")
    expected = "Note (-26h): Was well. Note (23.5h): No change. Clear lungs. Note (24h): On time."
    first = expected.replace("-26h", "-32h").replace("23.5", "17.5").replace("24h", "18h")
    for flags, text in (
        ({}, f"Woman. {expected}"),
        ({"hours_from": "first"}, f"Woman. {first}"),
        ({"notes": ()}, "Woman"),
        ({"notes": ("OTHER//*",)}, "Woman. Note (2h): Another kind"),
    ):
        assert contexts(mini, **flags).tolist() == [text, ""]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (1, "Note (6h): h"),
        (2, "Note (6h): g h"),
        (4, "Note (5h): e f Note (6h): g h"),
        (6, "Note (4h): c Note (5h): d e f Note (6h): g h"),
        (99, "Note (4h): a b c Note (5h): d e f Note (6h): g h"),
    ],
)
def test_the_oldest_words_are_cut(words, expected, contexts):
    mini = asked((10, "a b c"), (11, "d e f"), (12, "g h"))
    assert contexts(mini, max_note_words=words).iloc[0] == expected


def test_a_shard_without_texts_has_no_notes(tmp_path):
    folder = note(asked(), 1, 8, "Was well.").write_meds(tmp_path / "meds")
    (shard,) = (folder / "data").rglob("*.parquet")
    table = pd.read_parquet(shard)
    own = table["subject_id"] == 1
    table[own].to_parquet(shard)
    table[~own].drop(columns="text_value").to_parquet(shard.with_name("1.parquet"))
    assert len(meds(folder, notes=SHOWN)) == 2
    table.drop(columns="text_value").to_parquet(shard)
    with pytest.raises(InputError, match=r"meds: .*text_value"):
        meds(folder, notes=SHOWN)


def test_no_note_reaches_a_log(tmp_path, caplog):
    with caplog.at_level("DEBUG"):
        _, description = meds_file(asked((8, "SECRET")).write_meds(tmp_path / "x"), notes=SHOWN)
    assert "1 of 2 prediction times have notes" in caplog.text
    assert "SECRET" not in caplog.text + str(description)


@pytest.mark.parametrize("title", ["DISCHARGE SUMMARY: ", "Entlassbrief vom 3.4.: ", "Epikrise "])
def test_a_discharge_summary_of_unknown_storing_time_is_left_out_and_counted(
    title, contexts, caplog
):
    with caplog.at_level("INFO"):
        texts = contexts(asked((8, f"{title} died"), (9, "was well"), (31, "later"), (40, "died")))
    assert texts.iloc[0] == "Note (3h): was well"
    assert "left out 1 discharge summaries" in caplog.text
    assert "left out 2 notes written later, and 0 of the admission" in caplog.text


@pytest.mark.slow
def test_nothing_written_later_changes_a_cell(contexts):
    rng = np.random.default_rng(6)
    mini = random_events(rng, subjects=20)
    for hour in rng.uniform(-500, 90, 200):
        note(mini, int(rng.integers(20)), hour, f"word {hour:.0f} " * rng.integers(1, 90))
    whole = contexts(mini)
    assert whole.str.contains("Note").mean() > 0.9
    for label in [each for each in mini.labels if name_of(each) in whole][::10]:
        changed = Mini(splits=mini.splits, labels=[label])
        for event in mini.events:
            if not event["text"] or event["hours"] <= label["hours"]:
                changed.events.append(event)
            elif rng.random() < 0.7:
                changed.events.append({**event, "text": "she died"})
        note(changed, label["subject"], label["hours"] + 0.001, "she died", SHOWN[1])
        assert contexts(changed).item() == whole[name_of(label)]


# --------------------------------------------------------------------------- MIMIC-IV-Note

DAY = "2150-01-01 00:00:00"


def hospital():
    """Two admissions of one patient, asked at 13 h and at 1013 h; one of another patient."""
    mini = mimic_files.Mini().admit(1, 0, 200, subject=5).admit(2, 1000, 1200, subject=5).admit(3)
    for hadm, start in ((1, 0), (2, 1000), (3, 0)):
        mini.settling(hadm, start)
    return mini.tables()


def hospital_contexts(folder, notes, form=".csv.gz", **flags):
    """Rows with notes, given by table, patient, admission, charting and storing hour, text."""
    columns = ["table", "subject_id", "hadm_id", "charttime", "storetime", "text"]
    table, tables = pd.DataFrame(notes, columns=columns, dtype=object), hospital()
    for time in ("charttime", "storetime"):
        table[time] = [h if isinstance(h, str) else mimic_files.moment(h) for h in table[time]]
    for name in ("discharge", "radiology"):
        tables[name] = table[table["table"] == name].assign(note_seq=1).astype(str)
    folder = write_tables(folder / form.replace(".", "_"), tables, form)
    return extracted(folder, ("death",), notes_dir=folder, **flags)


@pytest.mark.slow
def test_notes_of_a_patient_follow_the_context_of_their_admissions(tmp_path):
    notes = [
        ("radiology", 5, "", 1009.5, 1010, 'IMPRESSION:\n  No "acute"  process,\nclear.'),
        ("discharge", 5, 1, 192, 230.25, "Was well."),
        ("radiology", 5, 2, 1013, 1013.01, "stored too late"),
        ("radiology", 5, 2, 1013.01, 1013, "charted too late"),
        ("radiology", 5, "", 1013, "", "in time, never stored"),
        ("radiology", 5, 2, 1008, "", "A date counts at its end."),
        ("radiology", 5, 2, 1010, 1013, ""),
        ("discharge", 5, 2, 1008, 1009, "a summary of this very stay"),
        ("radiology", 10003, "", DAY, 7, "She is another."),
    ]
    made, plain = hospital_contexts(tmp_path, notes), hospital_contexts(tmp_path, [], ".csv")
    first, second, third = map(plain.context, (1, 2, 3))
    assert made.context(1) == first
    assert made.context(2) == (
        f"{second}. Note (-770.75h): Was well. "
        'Note (9h): IMPRESSION: No "acute" process, clear. Note (12h): in time, never stored'
    )
    assert made.context(3) == f"{third}. Note (6h): She is another."
    assert {"note/discharge", "note/radiology"} < {*made.description["tables_sha256"]}
    columns = made.rows.columns.drop("clinical_context")
    pd.testing.assert_frame_equal(made.rows[columns], plain.rows[columns])
    short = hospital_contexts(tmp_path, notes, ".parquet", max_note_words=4)
    assert short.context(2) == f"{second}. Note (12h): in time, never stored"


@pytest.mark.slow
def test_notes_written_later_change_no_cell(tmp_path):
    rng = np.random.default_rng(2)
    notes = []
    for number in range(300):
        owner = ("discharge", "radiology")[number % 2], (5, 10003)[number % 3 == 0]
        charted = rng.uniform(-300, 40)
        stored = "" if number % 7 == 0 else charted + rng.exponential(9)
        notes.append((*owner, ("", "1", "77")[number % 5 % 3], charted, stored, f"n{number} " * 3))
    cells = hospital_contexts(tmp_path, notes).inputs()
    for each in range(2):
        changed = []
        for *owner, charted, stored, text in notes:
            if max(charted, stored or charted) <= 13:
                changed.append((*owner, charted, stored, text))
            elif rng.random() < 0.7:
                changed.append((*owner, charted, stored, "died"))
        for subject in (5, 10003):
            changed.append(("radiology", subject, "", 12, 13.01, "died soon"))
            changed.append(("discharge", subject, "", DAY, 14, "died soon"))
        again = hospital_contexts(tmp_path / str(each), changed).inputs()
        assert all(again[hadm] == cells[hadm] for hadm in (1, 3))
    assert "Note" in str(cells[1])
