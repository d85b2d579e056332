"""Tests of the DKA format: files, description, columns, cells, and rows to score."""

import gzip
import json
import logging
import re
import sys

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import Description, InputError, MIMICtrajectoryDataset
from medgemma_clinical.data import dka
from medgemma_clinical.data.dka import (
    find_features,
    plain_table,
    read_description,
    read_tables,
    text_of,
)
from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.files import file_hash
from trajectories import LABEL, SERIES, dataset_of, one_series, random_text, table_of

SECRET = "98765"  # stands in the cells that are refused; no message may repeat it
NAN = float("nan")


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# --------------------------------------------------------------------------- files


def numbered(count):
    return pd.DataFrame({"name": [f"n{k}" for k in range(count)], "value": range(count)})


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize("max_rows", [1, 3, 7, 10])
def test_chunks_join_to_the_whole_file(max_rows, ending, tmp_path):
    path, table = tmp_path / f"data.{ending}", numbered(7)
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    chunks = list(read_tables(path, max_rows))
    assert [len(chunk) for chunk, _ in chunks] == {1: [1] * 7, 3: [3, 3, 1]}.get(max_rows, [7])
    whole = pd.concat([chunk for chunk, _ in chunks])
    first = 0 if ending == "parquet" else 2
    assert whole.index.tolist() == list(range(first, first + 7))
    assert text_of(whole, "name").tolist() == table["name"].tolist()
    assert text_of(whole, "value").tolist() == [str(k) for k in range(7)]
    read = [read for _, read in chunks]
    assert read == sorted(read)
    assert read[-1] == path.stat().st_size


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_a_header_alone_is_refused(ending, tmp_path):
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        numbered(0).to_parquet(path)
    else:
        numbered(0).to_csv(path, index=False)
    for source in (path, numbered(0)):
        with pytest.raises(InputError, match="no rows"):
            list(read_tables(source))


PLAIN = b'a,b\n1,"x, y"\n3,4\n'


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        (PLAIN, [2, 3]),
        (b"\xef\xbb\xbf" + PLAIN, [2, 3]),
        (b"\xef\xbb\xbf\n" + PLAIN.rstrip(), [3, 4]),
        (PLAIN.replace(b"\n", b"\r\n"), [2, 3]),
        (PLAIN.replace(b"\n", b"\r"), [2, 3]),
        (PLAIN.replace(b",", b" , ", 1), [2, 3]),
        (PLAIN.replace(b',"', b', "').replace(b"3,4", b" 3, 4"), [2, 3]),
        (b'"a","b"\n\n , \n1,"x, y"\n,\n\n3,4\n\n\n', [4, 7]),
    ],
    ids=["plain", "BOM", "BOM and blank", "CRLF", "CR", "names", "spaces", "blank rows"],
)
@pytest.mark.parametrize("max_rows", [1, 100])
def test_any_usual_way_to_write_a_csv_reads_the_same(content, numbers, max_rows, tmp_path):
    for name in ("data.csv", "DATA.CSV.GZ"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
        table = pd.concat([chunk for chunk, _ in read_tables(path, max_rows)])
        assert table.index.tolist() == numbers
        assert text_of(table, "a").tolist() == ["1", "3"]
        assert text_of(table, "b").tolist() == ["x, y", "4"]


GZIP = gzip.compress(PLAIN * 1_000)
FLIPPED = GZIP[:-6] + bytes([GZIP[-6] ^ 0xFF]) + GZIP[-5:]
BAD_TABLES = {  # content and what the message names beside the file
    "empty": (b"", "empty"),
    "a field too many in the first row": (b"a,b\n1,2,98765\n3,4\n", "row 2: 3 cells"),
    "a field too many in a late row": (PLAIN + b"1,2,98765\n5,6\n", "row 4: 3 cells"),
    "a field too many behind line breaks": (b'a,b\r\n"1\r\n1",2\r\n3,4,5', "row 3: 3 cells"),
    "an open quote": (PLAIN + b'1,"98765\n3,4\n', "quotes"),
    "an open quote at the end": (PLAIN + b'1,"98765', "quotes"),
    "a quote that swallows rows": (b'a,b\n1,"98765\n3,4\n5,"6"\n7,8\n', "quotes"),
    "a quote that swallows a row": (b'a,b\n1,"98765\n3,4\n"5",6\n', "quotes"),
    "text behind a quote": (PLAIN + b'1,"2"98765\n', "quotes"),
    "semicolons": (PLAIN.replace(b",", b";"), "row 1: .*commas"),
    "semicolons behind quotes": (b'"a";"b"\n"24,5";0\n', "row 1: .*commas"),
    "semicolons and decimal commas": (b"\na;b\n24,5;0\n", "row 2: .*commas"),
    "tabs": (PLAIN.replace(b",", b"\t"), "row 1: .*commas"),
    "PNG": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x01\x00\xff\xfe\xfd", "UTF-8"),
    "UTF-16": (PLAIN.decode().encode("utf-16"), "UTF-8"),
    "Latin-1": (PLAIN + b"\xe9,1\n", "UTF-8"),
    "a cut gzip": (GZIP[: len(GZIP) // 2], "gzip"),
    "a gzip that lacks its end": (GZIP[:-1], "gzip"),
    "a flipped gzip": (FLIPPED, "gzip"),
    "no gzip": (PLAIN, "gzip"),
    "no Parquet": (PLAIN, "Parquet"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
@pytest.mark.parametrize("max_rows", [1, 2, 50_000])
def test_a_damaged_file_is_refused_by_name(name, max_rows, tmp_path):
    content, place = BAD_TABLES[name]
    ending = "csv.gz" if "gzip" in name else "parquet" if "Parquet" in name else "csv"
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}(: |, ).*{place}") as caught:
        list(read_tables(path, max_rows))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("max_rows", [1, 2, 100])
def test_a_row_that_lacks_its_last_cells_has_them_empty(max_rows, tmp_path):
    path = write(tmp_path / "data.csv", b"a,b,c\n1\n2,x\n3,y,z\n4\n")
    table = pd.concat([chunk for chunk, _ in read_tables(path, max_rows)])
    assert [text_of(table, name).tolist() for name in "abc"] == [
        ["1", "2", "3", "4"],
        ["", "x", "y", ""],
        ["", "", "z", ""],
    ]


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none.csv", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="file"):
            list(read_tables(path))
    pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    numbered(3).to_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="Parquet"):
        list(read_tables(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        list(read_tables(path))


def test_texts_of_parquet_are_those_that_were_written(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    columns = {
        "same": pyarrow.array(["x"] * 3_000).dictionary_encode(),
        "few": [None, "", "a", "\u00e9 b"] * 750,
        "whole": [1, None, 3] * 1_000,
        "real": [0.5, None, 2.0] * 1_000,
        "a.b": [True, False] * 1_500,
        "codes": [[1, 2], None] * 1_500,
    }
    path = tmp_path / "data.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table(columns), path, row_group_size=1_100
    )
    for max_rows in (7, 10_000):
        read = pd.concat([table for table, _ in read_tables(path, max_rows)])
        assert read.index.tolist() == list(range(3_000))
        texts = {name: text_of(read, name).tolist()[:4] for name in columns if name != "codes"}
        assert texts == {
            "same": ["x"] * 4,
            "few": ["", "", "a", "\u00e9 b"],
            "whole": ["1", "", "3", "1"],
            "real": ["0.5", "", "2", "0.5"],
            "a.b": ["True", "False"] * 2,
        }


def test_cells_of_any_type_are_text():
    table = pd.DataFrame(
        {
            "float": [1.0, np.nan, 2.5],
            "large": [2.0**60, 1e300, -3.0],
            "nullable": pd.array([1.0, None, 2.5], dtype="Float64"),
            "whole": pd.array([1, None, 3], dtype="Int64"),
            "boolean": pd.array([True, None, False], dtype="boolean"),
            "category": pd.Categorical([" a ", None, "b"]),
            "text": [" 1.0 ", None, "NA"],
        }
    )
    assert {name: text_of(table, name).tolist() for name in table} == {
        "float": ["1", "", "2.5"],
        "large": [str(2.0**60), "1e+300", "-3"],
        "nullable": ["1", "", "2.5"],
        "whole": ["1", "", "3"],
        "boolean": ["True", "", "False"],
        "category": ["a", "", "b"],
        "text": ["1.0", "", "NA"],
    }


def test_a_named_index_is_a_column_unless_the_table_has_it():
    table = numbered(3).rename(columns={"value": " value "})
    assert list(plain_table(table.iloc[1:])) == ["name", "value"]
    assert plain_table(table.iloc[1:]).index.tolist() == [0, 1]
    assert list(plain_table(table.set_index("name"))) == ["name", "value"]
    kept = plain_table(table.set_index("name", drop=False))
    assert (list(kept), kept.index.tolist()) == (["name", "value"], [0, 1, 2])


def test_a_number_is_one_patient_however_it_is_written(tmp_path):
    cells = ["1", "1.0", "01", " 1.00 ", "0", "000", "1.5", "1e3", "P01", "-1", "NA", "10"]
    expected = ["1", "1", "1", "1", "0", "0", "1.5", "1e3", "P01", "-1", "NA", "10"]
    table = table_of(["1 (0h)"] * len(cells), subject_id=cells)
    table.to_csv(tmp_path / "data.csv", index=False)
    for dataset in (MIMICtrajectoryDataset(table), MIMICtrajectoryDataset(tmp_path / "data.csv")):
        assert dataset.groups.tolist() == expected
        assert dataset.ids.tolist() == [cell.strip() for cell in cells]
    renamed = table.rename(columns={"subject_id": "id"})
    assert MIMICtrajectoryDataset(renamed).groups.tolist() == expected
    assert dataset_of(["1 (0h)"] * 3, subject_id=[7.0, 8.0, 2.5]).ids.tolist() == ["7", "8", "2.5"]
    split = table.assign(split=["train", "val"] + ["train"] * 10)
    with pytest.raises(InputError, match="row 1, column split"):
        MIMICtrajectoryDataset(split)


# --------------------------------------------------------------------------- description


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"series": 5, "unit": ""}, "series"),
        ({"question": " "}, "question"),
        ({"csv_sha256": 5}, "csv_sha256"),
        ({"series": "Lactate"}, "series"),
        *(({"plausible": x}, "plausible") for x in (["a", "b"], 3, [60, 3], [0, 1, 2], [None, 2])),
        *(({"plausible": x}, "plausible") for x in ([0, 1e999], [NAN, 1], [False, True], [])),
        ({"limits": {"x": [0, 10**400]}}, "limits.x"),
        ({"limits": [1, 2]}, "limits"),
        *(({"reference": x}, "reference") for x in (3, [12, 3], [3, 3], [3], [None], [None, None])),
        *(({"reference": x}, "reference") for x in ([None, 3, 4], [3, "4"], [None, NAN], [True])),
        ({"references": {"x": [2, 1]}}, "references.x"),
        ({"labels": ["label_death"]}, "labels"),
        ({"labels": {"label_death": "x"}}, "labels.label_death"),
        ({"labels": {"label_death": {"outcome": 3}}}, "labels.label_death.outcome"),
        ({"labels": {"label_death": {"outcom": "x"}}}, "labels.label_death.outcom"),
        *(({"flow": x}, "flow") for x in (3, [3], [{"rule": "a", "removed": 0}])),
        ({"flow": [{"rule": "a", "removed": True, "left": 1}]}, "flow"),
        *(({"time_scale": x}, "time_scale") for x in (0, -1, NAN, 1e999, True, "72", None, [72])),
        ({"serie": "Lactate"}, "serie"),
        ({"zzz": 1}, "zzz"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_key(content, key, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(content))
    place = re.escape(f"{tmp_path / 'data.json'}, key {key}: ")
    with pytest.raises(InputError, match=f"^{place}"):
        read_description(tmp_path / "data.csv")


@pytest.mark.parametrize("content", ["{", "[]", "null", "3", "\xff", "[" * 100_000])
def test_a_file_that_is_no_description_is_refused(content, tmp_path):
    (tmp_path / "data.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"data\.json"):
        read_description(tmp_path / "data.csv")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_description_says_what_series_and_label_are(mark, tmp_path):
    content = {
        **{"series": "Lactate", "unit": "mmol/L", "outcome": "Death", "time_scale": 8760},
        **{"limits": {"Blood_Urea": [1, 9], "x": None}, "references": {"Blood urea": [None, 8]}},
        **{"flow": [{"rule": "under 18", "removed": 3, "left": 97, "any": 1}], "made_by": {}},
        **{"prediction_time": "at noon", "horizon": "24 h"},
    }
    path = tmp_path / "DATA.CSV.GZ"
    path.write_bytes(gzip.compress(f"{SERIES},trajectory_blood_urea\n1 (0h),2 (0h)\n".encode()))
    (tmp_path / "DATA.json").write_bytes(mark + json.dumps(content).encode())
    dataset = MIMICtrajectoryDataset(path, require_labels=False)
    assert (dataset.features, dataset.units) == (("Lactate", "blood urea"), ("mmol/L", ""))
    assert (dataset.outcome, dataset.time_scale) == ("Death", 8760.0)
    assert [dataset.limits(f) for f in (0, 1)] == [None, (1, 9)]
    assert [dataset.reference(f) for f in (0, 1)] == [None, (None, 8)]
    task = dataset.task_description()
    assert (task["Prediction time"], task["Horizon"]) == ("at noon", "24 h")
    assert dataset.flow.to_dict("records") == [{"rule": "under 18", "removed": 3, "left": 97}]
    dataset.features = ("LACTATE", "Blood Urea")  # as a checkpoint spells them
    assert dataset.limits(1) == (1, 9)


def test_without_a_description_the_series_is_the_anion_gap(tmp_path):
    assert read_description(tmp_path / "data.csv") == Description()
    (tmp_path / "data.json").write_text('{"plausible": [0, 9], "reference": [3, 12]}')
    found = read_description(tmp_path / "data.csv")
    assert (found.series, found.plausible, found.reference) == ("Anion gap", (0, 9), (3, 12))
    task = dataset_of(["1 (0h)"], prediction_hours=9).task_description()
    assert "hour" in task["Prediction time"]
    assert task["Horizon"]


def test_another_label_is_never_called_by_the_outcome_of_label_escalation():
    description = Description(
        outcome="ICU", question="ICU?", horizon="24 h", labels={"b": {"outcome": "B"}}
    )
    assert description.for_label(LABEL) == description
    death = description.for_label("label_death")
    assert (death.outcome, death.question) == ("Death", "Will the outcome Death occur?")
    assert (death.horizon, description.for_label("b").horizon) == ("", "24 h")
    assert description.for_label("b").outcome == "B"
    assert description.for_label("label_ICU_stay").outcome == "ICU stay"
    assert description.for_label("label_").outcome == "Label_"


def test_a_description_of_another_file_brings_a_warning(tmp_path, caplog):
    path, table = tmp_path / "data.csv", table_of(["24 (0h)"], subject_id="a")
    table.to_csv(path, index=False)
    path.with_suffix(".json").write_text(json.dumps({"csv_sha256": file_hash(path)}))
    assert MIMICtrajectoryDataset(path).warnings == ()
    table.assign(subject_id="b").to_csv(path, index=False)
    (text,) = MIMICtrajectoryDataset(path).warnings
    assert "data.json" in text
    assert caplog.messages == [f"warning: {path}: {text}"]
    _, findings = scored(path, inputs=NOTHING)
    assert [*findings.warnings] == [text]


# --------------------------------------------------------------------------- columns

ROWS = [f"{20 + k % 7} (0h) -> {18 + k % 5} (2h) -> {k} (3h)" for k in range(60)]
NAMES = ("patient_age_years", "patient_bmi", "patient_died", "person_years", "encounter_type")


@pytest.mark.parametrize("name", [*NAMES, "subjective_pain", "n_patients_on_ward", "stay_id"])
def test_a_column_that_is_not_read_stops_no_training(name):
    table = table_of(ROWS, id=[f"r{k}" for k in range(60)], **{name: [k % 9 for k in range(60)]})
    dataset = MIMICtrajectoryDataset(table)
    assert sum(map(len, dataset.split(0).values())) == 60
    assert dataset.warnings == ()


def test_without_the_patient_there_is_one_warning():
    for columns in ({}, {"patient_id": [k % 9 for k in range(60)]}):
        (text,) = dataset_of(ROWS, **columns).warnings
        assert "subject_id" in text
        assert len(set(dataset_of(ROWS, **columns).groups)) == 60
    assert any("subject_id?" in text for text in dataset_of(ROWS, subjectid=1).warnings)


@pytest.mark.parametrize(
    ("columns", "missing", "meant"),
    [
        (["age", "clinical_trajectorie", LABEL], SERIES, "clinical_trajectorie"),
        ([SERIES, "30_day_mortality", "label_escalatoin"], LABEL, "label_escalatoin"),
        ([SERIES, "30_day_mortality", "outcome"], LABEL, "30_day_mortality"),
        ([SERIES, LABEL, "label_death"], "lable_death", "label_death"),
        ([LABEL, *(f"c{k}" for k in range(50))], SERIES, "31 more"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(columns, missing, meant):
    table = pd.DataFrame({name: ["1 (0h)" if name == SERIES else "0"] for name in columns})
    with pytest.raises(InputError, match=rf"column {missing}: .*{meant}") as caught:
        MIMICtrajectoryDataset(table, label_column=missing if missing != SERIES else None)
    assert "header" not in str(caught.value)


def test_a_first_row_of_cells_is_not_shown(tmp_path):
    path = write(tmp_path / "data.csv", f'{SECRET}-a,"{SECRET} (0h) -> 1 (2h)",1\n'.encode() * 9)
    with pytest.raises(InputError, match=f"column {SERIES}: .*header") as caught:
        MIMICtrajectoryDataset(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "cell", "meant"),
    [
        ("clinical_contexts", "x", "clinical_context"),
        ("context", "x", "clinical_context"),
        ("predictionhours", 9, "prediction_hours"),
        ("Static_age", 9, "static_"),
        ("static age", 9, "static_"),
        ("glucose", "90 (0h) -> 80 (2h)", "trajectory_glucose"),
        ("hospital", "a", ""),
        ("label_death", 1, ""),
        ("prediction_time", "2150", ""),
    ],
)
def test_a_column_that_seems_to_be_meant_brings_a_warning(name, cell, meant, caplog):
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(["1 (0h)"], id="a", **{name: [cell]})
    assert [meant in text and name in text for text in dataset.warnings] == [True] * bool(meant)
    noted = any("columns not read" in message for message in caplog.messages)
    assert noted == (name not in ("label_death", "prediction_time"))


def test_a_series_that_was_not_chosen_brings_no_warning():
    columns = {"trajectory_a": ["1 (0h)"], "trajectory_b [u]": ["2 (0h)"], "subject_id": ["a"]}
    dataset = MIMICtrajectoryDataset(table_of(["1 (0h)"], **columns), series=["a"])
    assert dataset.warnings == ()


def test_keys_of_columns_that_the_file_lacks_are_warnings():
    description = Description(
        limits={"lactat": (0, 9), "lactate": (0, 9), "anion gap": (0, 9)},
        references={"ph": (7.35, None), "lactate": (None, 2)},
        labels={"label_deth": {"outcome": "Death"}, "label_death": {}},
    )
    columns = {"trajectory_Lactate": ["1 (0h)"], "label_death": [1], "subject_id": ["a"]}
    dataset = MIMICtrajectoryDataset(table_of(["1 (0h)"], **columns), description=description)
    keys = [text.split()[1] for text in dataset.warnings]
    assert keys == ["labels.label_deth", "limits.lactat", "limits.anion", "references.ph"]


def test_a_column_twice_is_refused(tmp_path):
    for name in (SERIES, LABEL, "subject_id", "static_x", "trajectory_x"):
        table = table_of(["1 (0h)"], subject_id="1", static_x=1, trajectory_x="1 (0h)")
        path = tmp_path / "data.csv"
        pd.concat([table, table[[name]]], axis=1).to_csv(path, index=False)
        with pytest.raises(InputError, match=f"column {name}: "):
            MIMICtrajectoryDataset(path)
    other = table_of(["1 (0h)"], id="1", note="a")
    MIMICtrajectoryDataset(pd.concat([other, other[["note"]]], axis=1))


BAD_NAMES = ["trajectory_ _ [u]", "trajectory_x [", "trajectoryglucose", "Trajectory_x"]
BAD_NAMES += ["trajectory_vitamin, 1 [u]", "trajectory_24", "trajectory_anion gap"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_series_column_that_cannot_be_read_is_refused(name):
    with pytest.raises(InputError, match=r"column [tT]rajectory.*: "):
        dataset_of(["1 (0h)"], **{name: ["1 (0h)"]})


def test_series_are_found_by_their_columns_and_chosen_by_name():
    columns = [LABEL, "trajectory_Blood_urea [ mg/dL ]", SERIES, "trajectory_x  y [1]"]
    table = pd.DataFrame(columns=columns)
    found = find_features(table, Description(), None, "")
    titles = ["Anion gap [mEq/L]", "Blood urea [mg/dL]", "x y"]
    assert [feature.title for feature in found] == titles
    assert [feature.keys for feature in found] == [(SERIES,), (columns[1],), (columns[3],)]
    chosen = find_features(table, Description(), ["X_Y", "anion GAP"], "")
    assert [feature.name for feature in chosen] == ["x y", "Anion gap"]
    for wrong in (["lactate"], ["x y", "X Y"], []):
        with pytest.raises(InputError, match="--series"):
            find_features(table, Description(), wrong, "")


# --------------------------------------------------------------------------- cells


def reference_parse(text):
    """Read a series slowly, one piece after the other."""
    pairs = []
    for piece in text.split("->"):
        value, hours = piece.replace(")", "").replace("h", "").split("(")
        pairs.append((float(hours), float(value)))
    pairs.sort(key=lambda pair: pair[0])
    return [hours for hours, _ in pairs], [value for _, value in pairs]


def test_the_parser_agrees_with_a_slow_reference_whole_and_in_blocks(monkeypatch):
    rng = np.random.default_rng(1)
    texts = [random_text(rng) for _ in range(500)]
    dataset = dataset_of(texts)
    for i, text in enumerate(texts):
        assert one_series(dataset, i) == reference_parse(text), repr(text)
    monkeypatch.setattr(dka, "BLOCK_ROWS", 7)
    assert dataset_of(texts).fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize(
    "cell",
    [
        "24 (0h) -> 20 (2h)",
        "24(0H)->20(2H)",
        "24 (0h) \u2192 20 (2h)",
        "24 (0 hours) -> 20 (2 Hour)",
        "24 (0hr) -> 20 (2 HRS)",
        "24\u00a0(0h)\u00a0-> 20\u2009(2\u202fh)",
        "20 (2h) ->\n24 (0h)",
        "+2.4e1 (-0h) -> 20. (.2E1h)",
    ],
)
def test_a_series_may_be_written_in_many_ways(cell):
    assert one_series(dataset_of([cell]), 0) == ([0.0, 2.0], [24.0, 20.0])


BAD_CELLS = ["24 (2150-01-01)", "24 (10:30)", "24 (0)", "24 (30min)", "24 (2 days)", "24,5 (0h)"]
BAD_CELLS += ["24 (0h) 20 (2h)", "24 (0h) ->", "-> 24 (0h)", "nan (0h)", "inf (0h)", "24 (0 hos)"]
BAD_CELLS += ["1e999 (0h)", "1 (-1e999h)", "1 (1700000000h)", "24 (0h)\0", "9" * 20_000]


@pytest.mark.parametrize("cell", BAD_CELLS)
def test_an_unreadable_cell_is_refused_by_its_place_or_noted(cell):
    table = table_of(["1 (0h)"] * 5, trajectory_x=["", f"{SECRET} (0h) -> {cell}", "", cell, ""])
    place = r"^DataFrame, row 1, column trajectory_x: .*2 cells.*row 3"
    with pytest.raises(InputError, match=place) as caught:
        MIMICtrajectoryDataset(table)
    assert SECRET not in str(caught.value)
    assert SECRET in caught.value.message(show_value=True)
    findings = Findings("x", strict=False)
    dataset = MIMICtrajectoryDataset(table, findings=findings)
    assert [*findings.problems] == [1, 3]
    assert dataset.numbers.tolist() == [0, 2, 4]


@pytest.mark.parametrize("cell", [SECRET + "x", "37,5", "nan", "inf", "1 2", "1e99", "\uff11"])
def test_a_static_feature_that_is_no_number_is_refused_by_its_place_or_noted(cell):
    table = table_of(["1 (0h)"] * 3, **{"static_x [kg]": ["1", "", cell], "static_y": [1, 2, 3]})
    with pytest.raises(InputError, match=r"^DataFrame, row 2, column static_x \[kg\]: ") as caught:
        MIMICtrajectoryDataset(table)
    assert SECRET not in str(caught.value)
    findings = Findings("x", strict=False)
    assert len(MIMICtrajectoryDataset(table, findings=findings)) == 2
    assert [*findings.problems] == [2]


def test_static_features_are_columns_of_numbers():
    flags = pd.array([True, None, False], dtype="boolean")
    columns = {
        "static_b": [" 2.5 ", "", "-1e2"],
        "static_a [u]": flags,
        "static_c": ["TRUE", "", "0"],
    }
    dataset = dataset_of(["1 (0h)"] * 3, **columns)
    assert dataset.static_names == ("static_b", "static_a [u]", "static_c")
    np.testing.assert_array_equal(dataset.static, [[2.5, 1, 1], [NAN] * 3, [-100, 0, 0]])
    other = dataset_of(["1 (0h)"] * 3, **{**columns, "static_d": columns["static_b"]})
    assert other.fingerprint() != dataset.fingerprint()
    assert dataset_of(["1 (0h)"]).static.shape == (1, 0)
    with pytest.raises(InputError, match="column static_b: "):
        MIMICtrajectoryDataset(table_of(["1 (0h)"], static_b=[1]), label_column="static_b")


@pytest.mark.parametrize("hour", ["3.99", SECRET + "x", "2e6", "nan"])
def test_an_hour_before_the_last_observation_or_none_is_refused_by_its_place(hour):
    series = {SERIES: ["1 (0h) -> 2 (2h)"] * 2, "trajectory_x": ["1 (4h) -> 2 (1h)"] * 2}
    table = table_of(series.pop(SERIES), **series, prediction_hours=["4", hour])
    for max_len in (1, 20):
        with pytest.raises(InputError, match=r"^DataFrame, row 1, column prediction_hours: "):
            MIMICtrajectoryDataset(table, max_len)
    hours = MIMICtrajectoryDataset(table.assign(prediction_hours=["4", ""])).prediction_hours
    np.testing.assert_array_equal(hours, [4, NAN])


# --------------------------------------------------------------------------- rows to score

NOTHING = {"static": [], "prediction_time": False}
INPUTS = {"static": ["static_age [years]", "static_x"], "prediction_time": True}
CONFIG = {
    "features": ["Anion gap"],
    "units": ["mEq/L"],
    "inputs": INPUTS,
    "outcome": "Escalation",
    "question": "And then?",
    "read_options": {"max_len": 20, "label_column": LABEL},
}
NEW = {
    "id": ["a", "b", "c", "d"],
    SERIES: ["1 (0h) -> 2 (4h)", "3 (1h)", "4 (0h)", "5 (0h)"],
    "prediction_hours": ["5", "0.5", "2", ""],
    "static_x": ["1", "2", SECRET + "x", ""],
    "static_other": [SECRET + "x"] * 4,
    "static_age [years]": ["50", "60", "70", "80"],
}


def scored(source, max_rows=100, strict=False, **change):
    findings = Findings(str(source) if not isinstance(source, pd.DataFrame) else "x", strict)
    rows = MIMICtrajectoryDataset.scoring_rows(source, {**CONFIG, **change}, findings, max_rows)
    return list(rows), findings


@pytest.fixture(params=["file", "DataFrame"])
def source_of(request, tmp_path):
    """Make a source of a table: a file, whose rows are numbered from 2, or a DataFrame."""

    def make(table):
        if request.param == "DataFrame":
            return pd.DataFrame(table), 0
        pd.DataFrame(table).to_csv(tmp_path / "new.csv", index=False)
        return tmp_path / "new.csv", 2

    return make


@pytest.mark.parametrize("max_rows", [1, 3, 9])
def test_a_row_with_a_wrong_input_has_a_problem_and_the_others_are_scored(source_of, max_rows):
    source, first = source_of(NEW)
    chunks, findings = scored(source, max_rows)
    readable = [chunk.ids[chunk.positions].tolist() for chunk in chunks]
    assert [name for names in readable for name in names] == ["a", "d"]
    assert readable == [chunk.dataset.ids.tolist() for chunk in chunks]
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == NEW["id"]
    assert {row - first: text.split()[1] for row, text in findings.problems.items()} == {
        1: "prediction_hours:",
        2: "static_x:",
    }
    with pytest.raises(InputError, match=r"row \d, column (static_x|prediction_hours): "):
        scored(source, max_rows, strict=True)


def test_a_value_after_the_prediction_time_is_a_problem_though_the_model_reads_no_time(source_of):
    source, first = source_of(NEW)
    (rows,), findings = scored(source, inputs=NOTHING)
    assert [*findings.problems] == [first + 1]
    assert rows.dataset.ids.tolist() == ["a", "c", "d"]
    assert rows.dataset.prediction_hours is None
    with pytest.raises(InputError, match=f"row {first + 1}, column prediction_hours: "):
        scored(source, strict=True, inputs=NOTHING)


@pytest.mark.parametrize(
    ("lacking", "there", "named"),
    [
        *(
            (name, None, "")
            for name in ("static_x", "static_age [years]", "prediction_hours", SERIES)
        ),
        ("static_age [years]", "static_age [months]", "static_age [months]"),
        ("static_age [years]", "static_age", "static_age"),
    ],
)
def test_a_file_that_lacks_an_input_is_refused_by_column(source_of, lacking, there, named):
    table = {there if name == lacking else name: column for name, column in NEW.items()}
    table.pop(None, None)
    with pytest.raises(
        InputError, match=re.escape(f"column {lacking}: ") + ".*" + re.escape(named)
    ):
        scored(source_of(table)[0])


TWO = {
    "features": ["Lactate", "pH"],
    "units": ["mmol/L", ""],
    "inputs": NOTHING,
    "outcome": "Death",
}


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["trajectory_pH"], ["Lactate", "pH"]),
        (["trajectory_lactate [mmol/L]"], ["Lactate", "pH"]),
        (["trajectory_pH", "trajectory_Lactate [mmol/L]", LABEL], ["Lactate", "pH"]),
    ],
)
def test_the_main_column_of_a_data_frame_is_the_series_without_one_of_its_own(columns, names):
    rows = pd.DataFrame({name: ["0" if name == LABEL else "1 (0h)"] for name in [SERIES, *columns]})
    ((row,), _) = scored(rows, **{**CONFIG, **TWO})
    assert (list(row.dataset.features), row.dataset.outcome) == (names, "Death")
    assert row.dataset.prompt(0).endswith("And then?\n")


@pytest.mark.parametrize(
    ("content", "series", "column"),
    [
        ({"series": "Lactate", "unit": "mmol/L", "outcome": "Death"}, "x", "trajectory_pH"),
        ({"series": "Lactate", "unit": "mg/dL", "outcome": "Death"}, "pH", SERIES),
        ({"series": "Lactate", "unit": "mmol/L", "outcome": "Death"}, "pH [kPa]", "trajectory_pH"),
        ({"series": "Lactate", "unit": "mmol/L", "outcome": "Stroke"}, "pH", LABEL),
    ],
)
def test_a_file_of_another_meaning_is_refused_by_column(content, series, column, tmp_path):
    path = tmp_path / "new.csv"
    path.write_text(f"{SERIES},{LABEL},trajectory_{series}\n1 (0h),0,2 (0h)\n")
    path.with_suffix(".json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"column {column}.*: "):
        scored(path, **TWO)


def test_a_file_without_labels_has_no_outcome_that_could_differ(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text(f"{SERIES},trajectory_pH\n1 (0h),2 (0h)\n")
    path.with_suffix(".json").write_text('{"series": "Lactate", "unit": "mmol/L"}')
    ((row,), _) = scored(path, **TWO)
    assert (row.dataset.outcome, row.dataset.question) == ("Death", "And then?")
    path.write_text(f"{SERIES},trajectory_pH,{LABEL}\n1 (0h),2 (0h),1\n")
    with pytest.raises(InputError, match=f"column {LABEL}: "):
        scored(path, **TWO)


def test_findings_are_logged_without_those_that_concern_no_row(caplog):
    findings = Findings("file")
    findings.notes["a note"] = None
    findings.counts["are odd"] += 2
    findings.counts["are even"] += 0
    findings.problems[5] = SECRET
    with caplog.at_level(logging.INFO):
        findings.log()
    assert caplog.messages == ["file: a note", "file: 2 rows are odd"]


def test_a_bad_file_ends_the_command_with_2_and_one_line(tmp_path, capsys):
    path = write(tmp_path / "bad.csv", f"{SERIES},{LABEL}\n{SECRET} (0),1\n".encode())
    for flags, shown in (([], False), (["--show_values"], True)):
        assert dataset_format.main(["check", str(path), *flags]) == 2
        output = capsys.readouterr()
        assert re.fullmatch(rf"error: .*row 2, column {SERIES}: .+\n", output.err)
        assert output.out.endswith("not ready\n")
        assert (SECRET in output.err) == shown
