"""The DKA format: files, description, columns, patients, rows to score; the command check."""

import gzip
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
from arrow_tables import ArrowStream
from dataset_format import MAX_LEN_SEVERAL, Description, InputError, MIMICtrajectoryDataset
from event_files import write_table
from medgemma_clinical.data.dka import (
    find_features,
    numbers_of,
    read_description,
    text_of,
)
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.table_files import as_frame, read_tables
from medgemma_clinical.files import file_hash
from trajectories import GAP, LABEL, SERIES, dataset_of, table_of

ENDS = (".json", ".csv")
GLUCOSE, UREA = "trajectory_glucose [mg/dL]", "trajectory_Blood_urea"
THREE = pd.DataFrame(
    {
        SERIES: ["24 (0h) -> 20 (2h)", "", "7 (1h)"],
        GLUCOSE: ["300 (2h) -> 250 (2.5h)", "90 (4h)", None],
        UREA: ["", "5 (4h) -> 6 (1h)", ""],
        LABEL: [0, 1, 0],
        "subject_id": ["a", "b", "c"],
        "clinical_context": ["old", "", "young"],
    }
)
NAN = float("nan")
SECRET = "98765"  # stands in the cells that are refused; no message may repeat it


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


def assert_refused(source, place, **options):
    """Return the message of the refusal, which names the place."""
    with pytest.raises(InputError, match=place) as caught:
        MIMICtrajectoryDataset(source, **options)
    return str(caught.value)


# --------------------------------------------------------------------------- files


def numbered(count):
    return pd.DataFrame({"name": [f"n{k}" for k in range(count)], "value": range(count)})


@pytest.mark.parametrize("ending", ["csv.gz", "parquet"])
def test_read_tables__chunks_have_at_most_the_wanted_rows(ending, tmp_path):
    path = write_table(numbered(7), tmp_path / f"data.{ending}")
    chunks, read = zip(*read_tables(path, 3), strict=True)
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert (list(read), read[-1]) == (sorted(read), path.stat().st_size)


PLAIN = b'a,b\n1,"x, y"\n3,4\n'
GZIP = gzip.compress(PLAIN * 50)
FLIPPED = GZIP[:-6] + bytes([GZIP[-6] ^ 0xFF]) + GZIP[-5:]
BAD_TABLES = {  # content and what the message names beside the file
    "a quote that swallows rows": (b'a,b\n1,"98765\n3,4\n5,"6"\n7,8\n', "quotes"),
    "text behind a quote": (PLAIN + b'1,"2"98765\n', "quotes"),
    "tabs": (PLAIN.replace(b",", b"\t"), "row 1: .*commas"),
    "semicolons and decimal commas": (b"\na;b\n24,5;0\n", "row 2: .*commas"),
    "empty": (b"\xef\xbb\xbf\n \r\n", "empty"),
    "UTF-16": (PLAIN.decode().encode("utf-16"), "UTF-8"),
    "a flipped gzip": (FLIPPED, "gzip"),
    "no Parquet": (PLAIN, "Parquet"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_damaged_file_is_refused_by_name(name, tmp_path):
    content, place = BAD_TABLES[name]
    ending = "csv.gz" if "gzip" in name else "parquet" if "Parquet" in name else "csv"
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(content)
    for max_rows in (1, 50_000):
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}(: |, ).*{place}") as caught:
            list(read_tables(path, max_rows))
        assert SECRET not in str(caught.value)


def test_what_is_no_table_is_refused(tmp_path, monkeypatch):
    path = write_table(numbered(0), tmp_path / "data.parquet")
    for source in (tmp_path, tmp_path / ("x" * 300), numbered(0), path):
        assert_refused(source, "file|no rows")
    path.write_bytes(path.read_bytes()[:-20])
    assert_refused(path, "Parquet")
    stream = ArrowStream(numbered(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source, place in ((path, "parquet"), (stream, "ArrowStream")):
        assert_refused(source, f"{place}.* pyarrow")


def test_cells_of_any_type_are_text(tmp_path):
    columns = {
        "float": ([1.0, np.nan, 2.5], ["1", "", "2.5"]),
        "large": ([2.0**60, 1e300, -3.0], [str(2.0**60), "1e+300", "-3"]),
        "whole": (pd.array([1, None, 3], dtype="Int64"), ["1", "", "3"]),
        "boolean": (pd.array([True, None, False], dtype="boolean"), ["True", "", "False"]),
        "category": (pd.Categorical([" a ", None, "b"]), ["a", "", "b"]),
        "text": ([" 1.0 ", None, "NA"], ["1.0", "", "NA"]),
    }
    table = pd.DataFrame({name: cells for name, (cells, _) in columns.items()})
    table["not read"] = [[1, 2], None, None]
    table.to_parquet(tmp_path / "data.parquet", row_group_size=2)
    arrow = table.drop(columns="not read").convert_dtypes(dtype_backend="pyarrow")
    for source in (table, tmp_path / "data.parquet", arrow, as_frame(ArrowStream(table))):
        read = pd.concat([chunk for chunk, _ in read_tables(source, 2)])
        for name, (_, expected) in columns.items():
            assert text_of(read, name).tolist() == expected, name


def test_numbers_are_those_of_their_text():
    for column in ([1.5, np.nan, -2e-5, 0.1], [1, 2, 3], [True, False], [1.0, np.inf], [1e39, 2]):
        read = []
        for cells in (pd.Series(column), pd.Series(column).astype(str).replace("nan", "")):
            findings = Findings("x", strict=False)
            numbers = numbers_of(cells.to_frame("x"), "x", findings)
            read.append((numbers[~cells.index.isin(list(findings.problems))], findings.problems))
        np.testing.assert_array_equal(read[0][0], read[1][0])
        assert read[0][1] == read[1][1]
    assert set(read[0][1]) == {0}


# --------------------------------------------------------------------------- description


WRONG_VALUES = {
    "series": [5, "Lactate"],  # the latter without its unit
    "unit": [5],
    "question": [" "],
    "csv_sha256": [5],
    "plausible": [["a", "b"], 3, [60, 3], [0, 1, 2], [None, 2], [0, 1e999], [NAN, 1], []],
    "limits": [[1, 2], {"x": [0, 10**400]}, {"x": []}],
    "reference": [3, [12, 3], [3, 3], [3], [None, None], [None, 3, 4], [3, "x"], [None, NAN]],
    "references": [{"x": [2, 1]}],
    "labels": [["label_death"], {"label_death": "x"}],
    "labels.label_death.outcome": [3],
    "labels.label_death.outcom": ["x"],
    "flow": [3, [3], [{"rule": "a", "removed": 0}], [{"rule": "a", "removed": "x", "left": 1}]],
    "time_scale": [0, -1, NAN, 1e999, "x", None, [72]],
    "events": [["a"], {}, {"0": "a"}, {"1": "a", "3": "b"}, {"1": "a", "2": "a"}, {"1": 5}, 3],
    "interventions": [[1], [0], ["2"], [2.5], 2, [[2]]],
    "zzz": [1],
}


@pytest.mark.parametrize("key", [*WRONG_VALUES, None])
def test_a_wrong_description_is_refused_by_its_key(key, tmp_path):
    place = re.escape(f"{tmp_path / 'data.json'}" + (f", key {key}: " if key else ""))
    contents = [b"{", b"[]", b"null", b"\xff"]
    for value in WRONG_VALUES.get(key, []):
        for name in reversed(key.split(".")):
            value = {name: value}
        contents.append(json.dumps(value).encode())
    for content in contents[4 * bool(key) :]:
        (tmp_path / "data.json").write_bytes(content)
        with pytest.raises(InputError, match=f"^{place}"):
            read_description(tmp_path / "data.csv")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_description_says_what_series_and_label_are(mark, tmp_path):
    content = {
        **{"series": "Lactate", "unit": "mmol/L", "outcome": "Death", "time_scale": 8760},
        **{"limits": {"Blood_Urea": [1, 9], "x": None}, "references": {"Blood urea": [None, 8]}},
        **{"plausible": [0, 20], "reference": [None, 2]},
        **{"flow": [{"rule": "under 18", "removed": 3, "left": 97, "any": 1}], "made_by": {}},
        **{"prediction_time": "at noon", "horizon": "24 h"},
    }
    rows = f"{SERIES},trajectory_blood_urea\n1 (0h),2 (0h)\n"
    path = write(tmp_path / "DATA.CSV.GZ", rows.encode())
    (tmp_path / "DATA.json").write_bytes(mark + json.dumps(content).encode())
    dataset = MIMICtrajectoryDataset(path, require_labels=False)
    assert (dataset.features, dataset.units) == (("Lactate", "blood urea"), ("mmol/L", ""))
    assert (dataset.outcome, dataset.time_scale) == ("Death", 8760.0)
    assert [dataset.limits(f) for f in (0, 1)] == [(0, 20), (1, 9)]
    assert [dataset.reference(f) for f in (0, 1)] == [(None, 2), (None, 8)]
    task = dataset.task_description()
    assert (task["Prediction time"], task["Horizon"]) == ("at noon", "24 h")
    assert dataset.flow.to_dict("records") == [{"rule": "under 18", "removed": 3, "left": 97}]
    dataset.features = ("LACTATE", "Blood Urea")  # as a checkpoint spells them
    assert dataset.limits(1) == (1, 9)


def test_another_label_is_never_called_by_the_outcome_of_label_escalation():
    labels = {"b": {"outcome": "B"}}
    description = Description(outcome="ICU", question="ICU?", horizon="24 h", labels=labels)
    assert description.for_label(LABEL) == description
    found = {name: description.for_label(name) for name in ("label_death", "b", "label_ICU_stay")}
    assert [each.outcome for each in found.values()] == ["Death", "B", "ICU stay"]
    assert [each.horizon for each in found.values()] == ["", "24 h", ""]
    assert "Death" in found["label_death"].question


BOOKS = {"subject_id": ["a", "b"], "id": [1, 2], "stay_id": [3, 4], "split": ["train", "val"]}
MORE = {
    "trajectory_lactate": ["1 (0h)"] * 2,
    "static_age [years]": [1, 2],
    "clinical_context": ["old", "young"],
    "prediction_hours": [1, 2],
    "label_death": [0, 1],
    "age": [1, 2],
}


@pytest.mark.parametrize("name", [None, *MORE])
@pytest.mark.parametrize("is_file", [True, False])
def test_a_table_with_more_than_the_two_columns_is_not_taken_for_ketoacidosis(
    name, is_file, tmp_path
):
    columns = {"label_escalation": [0, 1], **BOOKS, **({name: MORE[name]} if name else {})}
    table = table_of(["1 (0h)"] * 2, **columns)
    source = write_table(table, tmp_path / "data.csv") if is_file else table.set_index("id")
    dataset = MIMICtrajectoryDataset(source)
    text = " ".join([*dataset.task_description().values(), dataset.prompt(0), *dataset.warnings])
    words = ("nion gap", "mEq/L", "Escalat")
    assert [word in text for word in words] == [name is None] * len(words)
    assert ("Main series" in text, "Outcome" in text) == (name is not None,) * 2
    assert any(("description=" in warning) == (not is_file) for warning in dataset.warnings)
    unlabelled = MIMICtrajectoryDataset(table.drop(columns=LABEL), require_labels=False)
    assert unlabelled.outcome == dataset.outcome


def test_a_description_is_given_in_any_form_to_a_table(tmp_path):
    path = write_table(THREE, tmp_path / "data.csv")
    content = {"series": "Lactate", "unit": "mmol/L", "outcome": "Death", "arguments": {"x": (1,)}}
    for given in (content, *(kind(path.with_suffix(x)) for kind in (str, Path) for x in ENDS)):
        path.with_suffix(".json").write_text(json.dumps(content))
        for source in (THREE, write_table(THREE, tmp_path / "other.csv")):
            dataset = MIMICtrajectoryDataset(source, description=given)
            assert (dataset.features[0], dataset.units[0]) == ("Lactate", "mmol/L")
            assert (dataset.outcome, dataset.warnings) == ("Death", ())
            assert dataset.description.arguments == {"x": [1]}
    for wrong in (tmp_path / "none.json", tmp_path / "none.csv", {"serie": "x"}, 5, [], "a\0b"):
        assert_refused(THREE, "none.json|description|a", description=wrong)


NAMED = {"series_name": "Creatinine", "unit": "mg/dL"}


@pytest.mark.parametrize(
    ("content", "flags", "taken", "series", "limits", "outcome"),
    [
        (None, {}, ["Anion gap [mEq/L]", "Escalation"], "Anion gap", (-5, 60), "Escalation"),
        (None, NAMED, ["Escalation"], "Creatinine", None, "Escalation"),
        (None, {"outcome": "AKI"}, ["Anion gap [mEq/L]"], "Anion gap", (-5, 60), "AKI"),
        (None, NAMED | {"unit": "", "outcome": "AKI"}, [], "Creatinine", None, "AKI"),
        ({"outcome": "AKI"}, NAMED, [], "Creatinine", None, "AKI"),
        ({"series": "pH", "unit": ""}, {"outcome": "AKI"}, [], "pH", None, "AKI"),
        ({"time_scale": 9}, NAMED, ["Escalation"], "Creatinine", None, "Escalation"),
    ],
)
def test_what_no_description_says_is_named_by_flags_or_taken_with_a_warning(
    content, flags, taken, series, limits, outcome, tmp_path
):
    path = write_table(table_of(["1 (0h)"] * 2, subject_id=["a", "b"]), tmp_path / "data.csv")
    if content:
        path.with_suffix(".json").write_text(json.dumps(content))
    dataset = MIMICtrajectoryDataset(path, **flags)
    assert len(dataset.warnings) == bool(taken)
    assert all(f"taken for {each}" in dataset.warnings[0] for each in taken)
    assert (dataset.features, dataset.limits(0)) == ((series,), limits)
    assert dataset.outcome == outcome
    assert ("AKI" in dataset.question) == (outcome == "AKI")


def test_further_series_suffice_and_the_first_is_the_main_one():
    columns = ["trajectory_creatinine [mg/dL]", "trajectory_potassium"]
    table = table_of(["1 (0h)", ""], **{columns[1]: ["", "4 (1h)"]}, subject_id=["a", "b"])
    table = table.rename(columns={SERIES: columns[0]})
    dataset = MIMICtrajectoryDataset(table, outcome="AKI")
    assert (dataset.features, dataset.units) == (("creatinine", "potassium"), ("mg/dL", ""))
    assert dataset.warnings == ()
    assert dataset.report(0).startswith("AKI: no. creatinine: first 1 mg/dL")
    chosen = MIMICtrajectoryDataset(table, series=["potassium"], outcome="AKI")
    assert (chosen.features, len(chosen)) == (("potassium",), 1)
    assert_refused(table, "--series_name", **NAMED)
    assert_refused(table.assign(**dict.fromkeys(columns, "")), "of creatinine, potassium")
    trained = {"features": ["creatinine", "potassium"], "units": ["mg/dL", ""], "inputs": NOTHING}
    for each in (table, table.rename(columns={columns[0]: SERIES})):
        ((rows,), _) = scored(each, **trained)
        assert rows.dataset.features == ("creatinine", "potassium")
        np.testing.assert_array_equal(rows.dataset.values, [(1, NAN), (NAN, 4)])


def test_a_description_of_another_file_brings_a_warning(tmp_path):
    table = table_of(["24 (0h)"], subject_id="a")
    path = write_table(table, tmp_path / "data.csv")
    about = {"csv_sha256": file_hash(path), "series": "pH", "unit": "", "outcome": "Death"}
    path.with_suffix(".json").write_text(json.dumps(about))
    assert MIMICtrajectoryDataset(path).warnings == ()
    write_table(table.assign(subject_id="b"), path)
    (text,) = MIMICtrajectoryDataset(path).warnings
    assert "data.json" in text
    trained = {"features": ["pH"], "units": [""], "outcome": "Death"}
    assert [*scored(path, inputs=NOTHING, **trained)[1].warnings] == [text]


# --------------------------------------------------------------------------- columns


def test_without_the_patient_there_is_one_warning_and_none_of_a_column_that_is_not_read():
    others = {"patient_age_years": [1, 2], "encounter_type": [1, 2], "stay_id": [1, 2]}
    for columns in (others, {"patient_id": [1, 1]}):
        dataset = dataset_of(["1 (0h)"] * 2, **columns)
        assert ["subject_id" in text for text in dataset.warnings] == [True]
        assert len(set(dataset.groups)) == 2
    assert dataset_of(["1 (0h)"] * 2, id=["a", "b"], **others).warnings == ()
    assert any("subjectid?" in text for text in dataset_of(["1 (0h)"], subjectid=1).warnings)


def test_a_first_row_of_cells_is_not_shown(tmp_path):
    path = write(tmp_path / "data.csv", f'{SECRET}-a,"{SECRET} (0h) -> 1 (2h)",1\n'.encode() * 9)
    assert SECRET not in assert_refused(path, f"column {SERIES}: ")


SEEMING = {
    "clinical_contexts": ("x", "clinical_context"),
    "predictionhours": (9, "prediction_hours"),
    "SPLIT": ("train", "split"),
    "hospital": ("a", None),
    "label_death": (1, None),
    "trajectory_not_chosen": ("5 (0h)", None),
}


@pytest.mark.parametrize("name", SEEMING)
def test_a_column_that_seems_to_be_meant_brings_a_warning(name):
    cell, meant = SEEMING[name]
    table = table_of(["1 (0h)"], id="a", **{name: [cell]})
    warnings = MIMICtrajectoryDataset(table, description=GAP, series=["anion gap"]).warnings
    assert [meant in text and name in text for text in warnings] == [True] * bool(meant)


@pytest.mark.parametrize(
    ("column", "cells", "warns"),
    [
        ("static_Klinik nord", [0, 1, None], True),
        ("static_hospital_id", [264, 300, 73], True),
        ("static_site", [1, 2, 3], True),
        ("static_hospital days", [1, 2, 3], False),
        ("static_unit_cardiac", [0, 1, 1], False),
        ("static_sitting", [0, 1, 1], False),
    ],
)
def test_a_hospital_among_the_inputs_brings_a_warning(column, cells, warns, tmp_path):
    table = table_of(["1 (0h)"] * 3, subject_id=["a", "b", "c"], **{column: cells})
    for source in (table, write_table(table, tmp_path / "data.csv")):
        warnings = MIMICtrajectoryDataset(source, description=GAP).warnings
        assert [column in text for text in warnings] == [True] * warns


def test_a_column_twice_is_refused_unless_it_is_not_read(tmp_path):
    table = table_of(["1 (0h)"], subject_id="1", static_x=1, trajectory_x="1 (0h)", note="a")
    for name in table:
        path = write_table(pd.concat([table, table[[name]]], axis=1), tmp_path / "data.csv")
        if name != "note":
            assert_refused(path, f"column {name}: ")
    MIMICtrajectoryDataset(path)


BAD_NAMES = ["trajectory_ _ [u]", "trajectory_x [", "trajectoryglucose", "Trajectory_x"]
BAD_NAMES += ["trajectory_vitamin, 1 [u]", "trajectory_24", "trajectory_anion gap"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_series_column_that_cannot_be_read_is_refused(name):
    table = table_of(["1 (0h)"], **{name: ["1 (0h)"]})
    assert_refused(table, "column [tT]rajectory.*: ", description=GAP)


def test_series_are_found_by_their_columns_and_chosen_by_name():
    columns = [LABEL, "trajectory_Blood_urea [ mg/dL ]", SERIES, "trajectory_x  y [1]"]
    table = pd.DataFrame(columns=columns)
    found = find_features(table, GAP, None, "")
    titles = ["Anion gap [mEq/L]", "Blood urea [mg/dL]", "x y"]
    assert [feature.title for feature in found] == titles
    assert [feature.keys for feature in found] == [(SERIES,), (columns[1],), (columns[3],)]
    chosen = find_features(table, GAP, ["X_Y", "anion GAP"], "")
    assert [feature.name for feature in chosen] == ["x y", "Anion gap"]
    for wrong in (["lactate"], ["x y", "X Y"], []):
        with pytest.raises(InputError, match="--series"):
            find_features(table, GAP, wrong, "")


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


@pytest.mark.parametrize("max_rows", [1, 2, 9])
def test_equal_ids_are_numbered_in_whatever_chunks_they_are_read(max_rows, tmp_path):
    ids = ["7", "8", "7", "9 (2)", "9", "", "7 (2)", "9", "8"]
    names = ["7", "8", "7 (2)", "9 (2)", "9", "p", "7 (2) (2)", "9 (3)", "8 (2)"]
    table = table_of(["1 (0h)", "", *["2 (1h)"] * 7], subject_id="p", id=ids)
    chunks, findings = scored(write_table(table, tmp_path / "new.csv"), max_rows, inputs=NOTHING)
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == names
    readable = np.concatenate([chunk.dataset.ids for chunk in chunks]).tolist()
    assert readable == [name for name in names if name != "8"]
    assert [n for text, n in findings.counts.items() if "numbered" in text] == [4]
    whole = MIMICtrajectoryDataset(table.assign(trajectory_x="1 (0h)"))
    assert (whole.ids.tolist(), {*whole.groups}) == (names, {"p"})


@pytest.mark.parametrize("max_rows", [1, 2, 9])
def test_each_row_keeps_its_site_in_whatever_chunks_it_is_read(max_rows, tmp_path):
    wards = ["A", "", " B", "1"]
    source = write_table(table_of(["1 (0h)", "", *["2 (1h)"] * 2], ward=wards), tmp_path / "a.csv")
    options = {**CONFIG["read_options"], "site": "ward"}
    chunks, _ = scored(source, max_rows, inputs=NOTHING, read_options=options)
    assert np.concatenate([each.dataset.sites for each in chunks]).tolist() == ["A", "B", "1"]
    table = table_of(["1 (0h)"] * 4, ward=wards)
    whole, plain = (MIMICtrajectoryDataset(table, site=site) for site in ("ward", None))
    assert whole.subset(np.array([3, 1])).sites.tolist() == ["1", "not known"]
    assert (plain.sites, plain.read_options) == (None, whole.read_options)
    assert plain.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("reads", [True, False])
def test_a_file_without_the_contexts_that_a_model_reads_brings_a_warning(reads):
    prompts, table = {"context": reads}, table_of(["1 (0h)"])
    for columns, expected in (({}, reads), ({"clinical_context": ""}, False)):
        _, findings = scored(table.assign(**columns), inputs=NOTHING, prompts=prompts)
        assert any("clinical_context" in text for text in findings.warnings) == expected


def scored(source, max_rows=100, strict=False, **change):
    findings = Findings(str(source) if not isinstance(source, pd.DataFrame) else "x", strict)
    rows = MIMICtrajectoryDataset.scoring_rows(source, {**CONFIG, **change}, findings, max_rows)
    return list(rows), findings


@pytest.mark.parametrize("max_rows", [1, 9])
@pytest.mark.parametrize(
    ("inputs", "kept", "problems"),
    [
        (INPUTS, "ad", {1: "prediction_hours:", 2: "static_x:"}),
        (NOTHING, "acd", {1: "prediction_hours:"}),  # refused though the model reads no time
    ],
)
def test_a_row_with_a_wrong_input_has_a_problem_and_the_others_are_scored(
    inputs, kept, problems, max_rows, tmp_path
):
    source, first = write_table(pd.DataFrame(NEW), tmp_path / "new.csv"), 2
    chunks, findings = scored(source, max_rows, inputs=inputs)
    readable = [chunk.ids[chunk.positions].tolist() for chunk in chunks]
    assert "".join(map("".join, readable)) == kept
    assert readable == [chunk.dataset.ids.tolist() for chunk in chunks]
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == NEW["id"]
    found = {row - first: text.split()[1] for row, text in findings.problems.items()}
    assert found == problems
    timed = [chunk.dataset.prediction_hours is not None for chunk in chunks]
    assert timed == [inputs["prediction_time"]] * len(chunks)
    place = rf"row ({first + 1}|{first + 2}), column ({'|'.join(problems.values())}) "
    with pytest.raises(InputError, match=place):
        scored(source, max_rows, strict=True, inputs=inputs)


@pytest.mark.parametrize("lacking", ["static_age [years]", "prediction_hours", SERIES])
def test_a_file_that_lacks_an_input_is_refused_by_column_with_the_nearest(lacking):
    there = "static_age" if "age" in lacking else ""
    place = re.escape(f"column {lacking}: ") + ".*" + there
    with pytest.raises(InputError, match=place):
        scored(pd.DataFrame(NEW).rename(columns={lacking: there or "x"}))


TWO = {"features": ["Lactate", "pH"], "units": ["mmol/L", ""], "inputs": NOTHING}
TWO["outcome"] = "Death"


@pytest.mark.parametrize("name", ["pH", "lactate [mmol/L]"])
def test_the_main_column_of_a_data_frame_is_the_series_without_one_of_its_own(name):
    ((row,), _) = scored(table_of(["1 (0h)"], **{f"trajectory_{name}": "1 (0h)"}), **TWO)
    assert (row.dataset.features, row.dataset.outcome) == (("Lactate", "pH"), "Death")
    assert row.dataset.prompt(0).endswith("And then?\n")


@pytest.mark.parametrize(
    ("unit", "outcome", "series", "label", "column"),
    [
        ("mmol/L", "Death", "x", 0, "trajectory_pH"),
        ("mg/dL", "Death", "pH", 0, SERIES),
        ("mmol/L", "Death", "pH [kPa]", 0, "trajectory_pH"),
        ("mmol/L", "Stroke", "pH", 0, LABEL),
        ("mmol/L", None, "pH", 0, None),  # what is not said is that of the training data
        ("mmol/L", "Stroke", "pH", None, None),  # without labels no outcome could differ
    ],
)
def test_a_file_of_another_meaning_is_refused_by_column(
    unit, outcome, series, label, column, tmp_path
):
    cells = {SERIES: "1 (0h)", LABEL: label, f"trajectory_{series}": "2 (0h)"}
    rows = pd.DataFrame({name: [cell] for name, cell in cells.items() if cell is not None})
    path = write_table(rows, tmp_path / "new.csv")
    content = {"series": "Lactate", "unit": unit, **({"outcome": outcome} if outcome else {})}
    path.with_suffix(".json").write_text(json.dumps(content))
    if column:
        with pytest.raises(InputError, match=f"column {column}.*: "):
            scored(path, **TWO)
    else:
        ((row,), _) = scored(path, **TWO)
        assert (row.dataset.outcome, row.dataset.question) == ("Death", "And then?")


# --------------------------------------------------------------------------- observations


def test_the_most_recent_observations_are_kept(caplog):
    long, shifted = (" -> ".join(f"{k} ({k + h}h)" for k in range(60)) for h in (0, 0.5))
    table = table_of([long, "1 (0h)"], trajectory_x=[shifted, ""])
    with caplog.at_level(logging.INFO):
        dataset = MIMICtrajectoryDataset(table, description=GAP)
    assert "1 of 2 patients" in caplog.text
    assert dataset.lengths.tolist() == [MAX_LEN_SEVERAL, 1]
    assert dataset.times[0] == 59.5 - (MAX_LEN_SEVERAL - 1) / 2
    one = MIMICtrajectoryDataset(table, description=GAP, series=["Anion gap"])
    assert one.lengths.tolist() == [20, 1]


def test_chosen_series_come_in_their_order_and_rows_without_them_are_left_out():
    dataset = MIMICtrajectoryDataset(THREE, series=["blood_UREA", "Glucose"])
    assert dataset.features == ("Blood urea", "glucose")
    assert (dataset.ids.tolist(), dataset.labels.tolist()) == (["a", "b"], [0, 1])
    assert dataset.contexts.tolist() == ["old", ""]
    assert dataset.times.tolist() == [2, 2.5, 1, 4]
    np.testing.assert_array_equal(dataset.values, [(NAN, 300), (NAN, 250), (6, NAN), (5, 90)])
    assert_refused(THREE.assign(**{UREA: ""}), "Blood urea", series=["Blood urea"])


def test_rows_without_any_value_are_left_out_and_counted_in_the_flow(caplog):
    caplog.set_level(logging.INFO)
    earlier = {"rule": "under 18", "removed": 2, "left": 4, "patients": 4}
    table = pd.concat([THREE, THREE.iloc[:1].assign(**{SERIES: "", GLUCOSE: "", UREA: None})])
    about = Description("Anion gap", "mEq/L", outcome="Escalation", flow=(earlier,))
    dataset = MIMICtrajectoryDataset(table, description=about)
    assert dataset.groups.tolist() == ["a", "b", "c"]
    assert dataset.flow.to_numpy().tolist() == [[*earlier.values()], ["without a value", 1, 3, 3]]
    assert "1 rows without a value are left out" in caplog.text
    assert MIMICtrajectoryDataset(THREE).flow is None


def test_a_quiet_file_brings_no_notice_and_the_formats_defaults(caplog):
    table = table_of(["1 (0h) -> 2 (1h) -> 0 (1h)", "3 (0h)"], subject_id=["a", "b"])
    with caplog.at_level(logging.INFO):
        options = dict.fromkeys(MIMICtrajectoryDataset.options)
        dataset = MIMICtrajectoryDataset(table, description=GAP, **options)
    assert caplog.messages == []
    assert dataset.read_options == {"max_len": 20, "label_column": LABEL}
    described = MIMICtrajectoryDataset(THREE, description=Description(time_scale=8760.0))
    for each, scale, assumed in ((dataset, 72.0, True), (described, 8760.0, False)):
        assert (each.time_scale, each.assumed_time_scale) == (scale, assumed)


# --------------------------------------------------------------------------- patients and labels


@pytest.mark.parametrize("column", ["id", "subject_id"])
@pytest.mark.parametrize("name", ["A\rB", "x" * 301, "1.2345E+16"])
def test_an_id_that_cannot_name_its_row_is_refused_and_never_breaks_a_line(column, name):
    table = table_of(["1 (0h)"] * 2, **{"id": ["a", "b"], "subject_id": ["a", "b"], column: name})
    assert_refused(table, f"row 0, column {column}: ")
    chunks, findings = scored(table, inputs=NOTHING)
    assert {*findings.problems} == {0, 1}
    assert all(text.isprintable() for chunk in chunks for text in chunk.ids)


def test_a_label_that_is_not_known_is_nan_and_one_at_least_is_required():
    table = table_of(["1 (0h)"] * 2, label_escalation=[True, None])
    assert_refused(table.assign(label_escalation=None), f"column {LABEL}: ")
    for required in (True, False):
        place = f"row 1, column {LABEL}: "
        assert_refused(table.fillna("yes"), place, require_labels=required)
    np.testing.assert_array_equal(MIMICtrajectoryDataset(table).labels, [1, NAN])
    chunks, findings = scored(table.fillna("yes"), inputs=NOTHING)
    np.testing.assert_array_equal(chunks[0].dataset.labels, [1, NAN])
    assert [*(+findings.counts).values()] == [1], "taken as unknown"
    for each, first in ((table, 1), (table.drop(columns=LABEL), NAN)):
        dataset = MIMICtrajectoryDataset(each, require_labels=False)
        np.testing.assert_array_equal(dataset.collate([0, 1])["labels"], [first, NAN])


def test_any_column_of_0_and_1_is_the_label():
    table = table_of(["1 (0h)"] * 3, label_death=[1, 1, 0])
    dataset = MIMICtrajectoryDataset(table, label_column="label_death")
    assert (dataset.labels.tolist(), dataset.outcome) == ([1, 1, 0], "Death")
    assert dataset.read_options["label_column"] == "label_death"
    for required in (True, False):
        assert_refused(table, "column death", label_column="death", require_labels=required)
    table = table_of(["1 (0h)"], static_b=[1])
    assert_refused(table, "column static_b: ", label_column="static_b")


# --------------------------------------------------------------------------- check


def test_the_check_reads_as_its_flags_say_with_the_limits_of_each_series(tmp_path, capsys):
    table = pd.concat([THREE.assign(subject_id=THREE["subject_id"] + str(k)) for k in range(20)])
    words = ["check", str(write_table(table, tmp_path / "data.csv")), "--allow_duplicates"]
    (tmp_path / "data.json").write_text('{"limits": {"Blood_Urea": [1, 5.5]}}')
    assert dataset_format.main(words) == 0
    output = capsys.readouterr().out
    assert "warning: Blood urea: 20 of 40 values lie outside 1 to 5.5" in output
    assert output.count("lie outside") == 1
    assert dataset_format.main([*words, "--series", "glucose", "--max_len", "1"]) == 0
    output = capsys.readouterr().out
    assert "Blood urea" not in output
    assert "observations a row: median 1, quartiles 1 to 1" in output


def test_the_check_shows_a_refused_cell_only_where_that_is_wanted(tmp_path, capsys):
    path = write(tmp_path / "bad.csv", f"{SERIES},{LABEL}\n{SECRET} (0),1\n".encode())
    for flags in ([], ["--show_values"]):
        assert dataset_format.main(["check", str(path), *flags]) == 2
        assert (SECRET in capsys.readouterr().err) == bool(flags)
