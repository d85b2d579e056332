"""MIMIC-IV by another, slow reading; references, any form, and tables that are refused."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.importers.cohort import OUTCOMES
from medgemma_clinical.data.importers.mimic import COLUMNS
from medgemma_clinical.files import InputError
from mimic_files import (
    BICARBONATE,
    CHLORIDE,
    CREATININE,
    DEMO,
    GAP,
    GLUCOSE,
    PH,
    SODIUM,
    Mini,
    extracted,
    moment,
    read_tables,
    shuffled,
    with_storing_times,
    write_tables,
)
from slow_mimic import UNITS, compare_with, read_slowly


@pytest.fixture(scope="module")
def demo():
    return read_tables(DEMO)


@pytest.mark.slow
def test_the_demo_is_read_as_a_slow_independent_reading_reads_it(demo):
    stays, _, _ = read_slowly(demo)
    rows = compare_with(stays, extracted(DEMO, [*OUTCOMES]), [*OUTCOMES])
    assert (len(rows), rows["label_escalation"].sum()) == (86, 64)
    assert (rows.nunique() > 1).sum() == len(rows.columns) - 1  # all but prediction_hours
    assert rows["label_icu"].isna().any()


# --------------------------------------------------------------------------- random hospitals


STARTS = (-50, 0, 13, 30, 90, 10_000, 40_000)
HOURS = (-24.02, -24, -12, -1, 0, 1, 2, 6, 12, 13, 14, 24, 37, 38)
DELAYS = np.array([-1, 0, 0.5, 1, 1, 1, 11.5, 12, 12.5])
PARTS = {SODIUM: 140, CHLORIDE: 100, BICARBONATE: 20}
CODES = [(code, 9) for code in ("25010", "250.13 ", "25000", "2510", "E1010", "4019")]
CODES += [
    (c, 10) for c in ("E0810", "E0911", "E10.11", "e1111", "E1310", "E1101", "E1210", "25010")
]
OTHERS = [  # item, values at the edges of the biochemical cohort, units; the first more often
    (PH, (7.3, 7.3, 7.31), ("units", "", "pH")),
    (GLUCOSE, (250, 251, 600), ("mg/dL", "mg/dL", "mmol/L", "g/L")),
    (BICARBONATE, (18, 18.1, 12), ("mEq/L", "mmol/L")),
    (50809, (100, 251), ("mg/dL",)),
    (CREATININE, (0.9, 88.4), ("mg/dL", "umol/L", "")),
    (51006, (9, 33), ("mg/dL", "mmol/L")),
    (50813, (1, 9.5), ("mmol/L", "mg/dL", "x")),
]


def random_hospital(rng):
    """Patients with admissions apart or overlapping; on the grid of hours edges are often met."""
    mini, hadm = Mini(), 0
    for subject, age in enumerate([*rng.choice([17, 18, 50, 88, 89, 91], 70).tolist(), None]):
        for start in rng.choice(STARTS, int(rng.integers(1, 4)), replace=False):
            hadm += 1
            admit_at_random(mini, hadm, float(start), rng, subject=subject, age=age)
            for _ in range(int(rng.integers(0, 14))):
                draw_at_random(mini, hadm, float(start + rng.choice(HOURS)), rng)
    return mini.tables()


def admit_at_random(mini, hadm, start, rng, **patient):
    end = start + float(rng.choice([6, 12, 13, 30, 37, 49, 200]))
    death = rng.choice([None, end, end + 1, end + 30, end - 1], p=[0.6, 0.1, 0.1, 0.1, 0.1])
    ends = {"end": None if rng.random() < 0.03 else end, "death": death}
    ends["expired"] = int(rng.random() < 0.1)
    code, version = CODES[rng.integers(len(CODES))]
    ends |= {"code": code, "version": version}
    mini.admit(hadm, start, gender=rng.choice(["F", "M", ""]), **ends, **patient)
    for _ in range(int(rng.integers(0, 3))):
        begin = start + float(rng.choice([0, 1, 12, 13, 14, 37]))
        mini.icu(hadm, begin, rng.choice([None, begin + 1, begin + 12, begin + 40]))
        mini.rows["icu/icustays"][-1]["first_careunit"] = rng.choice([*UNITS])


def draw_at_random(mini, hadm, hour, rng):
    """A gap or other chemistry, often with the parts of a gap; some name another admission."""
    hour += rng.choice([0, 0, 0, 0.01])
    words = {"stored": rng.choice([None, *hour + DELAYS]), "named": rng.random() < 0.7}
    if rng.random() < 0.4:
        for item in [*PARTS][: rng.choice([2, 3, 3])]:
            mini.lab(hadm, hour, PARTS[item] + int(rng.choice([-8, -2, 0, 2])), item, **words)
    if words["named"] and rng.random() < 0.05:
        words["hadm_id"] = int(rng.integers(1, 300))
    if rng.random() < 0.7:
        item, values, units = OTHERS[min(rng.integers(len(OTHERS), size=2))]
        value = float(rng.choice(values))
        mini.lab(hadm, hour, value, item, unit=str(rng.choice(units)), **words)
    value = rng.choice([None, "inf", 9, 12, 12.5, 20], p=[0.02, 0.02, *[0.24] * 4])
    mini.lab(hadm, hour, value, **words)


ALL = ("anion gap", "bicarbonate", "chloride", "creatinine", "pH", "potassium", "sodium")
REQUESTS = [
    (["death"], {"cohort": "dka"}),
    (["icu"], {"min_observations": 1, "window_hours": 6.006}),
    (["unresolved"], {"horizon_hours": 24.0, "series": ("bicarbonate", "anion gap")}),
    (["death", "icu"], {"discharged": "exclude", "min_observations": 1, "horizon_hours": 24.0}),
    ([*OUTCOMES], {"compute_gap": "always", "min_observations": 1, "series": ALL}),
    ([*OUTCOMES], {"horizon_hours": 25.0, "discharged": "exclude"}),
    (["death"], {"cohort": "biochemical", "min_observations": 1, "window_hours": 24.0}),
    (["death"], {"compute_gap": "always", "min_observations": 1}),
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_random_hospitals_are_read_as_slowly_read(number, tmp_path):
    tables = random_hospital(np.random.default_rng(number))
    outcome, request = REQUESTS[number]
    labs = tables["hosp/labevents"]
    if "compute_gap" in request:  # the reported one is not read
        labs.loc[labs["itemid"] == str(GAP), "valueuom"] = "mg/dL"
    if number == 5:
        del labs["storetime"]
    stays, counts, _ = read_slowly(tables)
    result = extracted(write_tables(tmp_path / "mimic", tables), outcome, **request)
    rows = compare_with(stays, result, outcome, **request)
    assert "cohort" in request or result.description["values"] == counts
    assert "cohort" not in request or rows["event"].nunique() > 1
    assert len(rows) > 3


OPEN = {1: (20,), 4: (18,)}  # within the window, which ends at hour 13
COURSES = [  # gaps by hour, hour of death, event and hours
    (OPEN | {40: (9,)}, None, (1, 27)),
    (OPEN | {40: (9,)}, 100, (1, 27)),
    (OPEN | {40: (20, 12)}, None, (1, 27)),
    (OPEN | {40: (20,), 150: (9,)}, None, (1, 137)),  # beyond the horizon
    (OPEN, None, (3, 187)),
    (OPEN | {40: (13,)}, 100.5, (2, 87.5)),
    (OPEN | {100: (9,)}, 100, (1, 87)),
    (OPEN | {12.5: (9,)}, None, None),  # closed then, though it is known later
    ({1: (20,), 4: (9,), 40: (20,), 50: (9,)}, 100, None),
]


def test_what_ends_an_open_gap_and_when_is_written_for_cohorts_with_ketoacidosis(tmp_path):
    mini = Mini()
    for hadm, (gaps, death, _) in enumerate(COURSES):
        mini.admit(hadm, end=death or 200, death=death)
        for hour, values in gaps.items():
            for value in values:
                mini.lab(hadm, hour, value)
    mini.admit(99).lab(99, 1, 20, BICARBONATE).lab(99, 4, 20, BICARBONATE).lab(99, 40, 9)
    folder = mini.write(tmp_path / "mimic")
    result = extracted(folder, ["death"], cohort="dka")
    columns = ["event", "event_hours"]
    assert [*result.rows.columns][-2:] == columns[::-1]
    found = [None if pd.isna(row[0]) else tuple(row) for row in result.rows[columns].to_numpy()]
    assert found == [expected for _, _, expected in COURSES]
    names = {"1": "anion gap closed", "2": "death", "3": "discharge"}
    assert result.description["events"] == names
    unmeasured = extracted(folder, ["death"], cohort="dka", item="bicarbonate").rows
    assert unmeasured[columns].isna().all(axis=None)
    without = extracted(folder, ["death"], cohort="all")
    assert not {*columns} & {*without.rows}
    assert "events" not in without.description


# --------------------------------------------------------------------------- same rows


@pytest.mark.slow
def test_any_form_order_and_limit_gives_the_same_rows(demo, tmp_path):
    kept = demo["hosp/patients"]["subject_id"].iloc[:40]
    some = {n: t[t["subject_id"].isin(kept)] if "subject_id" in t else t for n, t in demo.items()}
    stored = with_storing_times(some, 0)
    stored["hosp/labevents"]["comments"] = 'a ""high"" value,\nsaid so'
    mixed = {name: shuffled(table, 1) for name, table in stored.items()}
    request = {"series": ("all",), "compute_gap": "always", "threads": 2, "memory_limit": "2GB"}
    first = extracted(write_tables(tmp_path / "csv", stored), **request)
    assert len(first.rows) > 15
    for form in (".csv.gz", ".parquet"):
        folder = write_tables(tmp_path / f"mixed{form}", mixed, form)
        other = extracted(folder, **request | {"threads": 1, "memory_limit": "200MB"})
        assert other.rows.equals(first.rows)
        for key in ("flow", "definitions", "values"):
            assert other.description[key] == first.description[key]
        for name, digest in other.description["tables_sha256"].items():
            content = (folder / f"{name}{form}").read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest


# --------------------------------------------------------------------------- items

HEMATOCRIT = 51221
SECRET = "98765"  # stands in a spoiled cell; no message may repeat it
LABS, ADMISSIONS, PATIENTS = "hosp/labevents", "hosp/admissions", "hosp/patients"


def one():
    return Mini().admit(1).settling(1)


@pytest.mark.parametrize(
    ("wanted", "item", "unit", "name", "plausible"),
    [
        ("bicarbonate", BICARBONATE, "mEq/L", "Bicarbonate", (3.0, 60.0)),
        ("50820", PH, "", "pH", (6.5, 8.0)),
        ("Hematocrit", HEMATOCRIT, "%", "Hematocrit", None),
    ],
)
def test_an_item_may_be_named_or_numbered_and_be_no_known_analyte(
    wanted, item, unit, name, plausible, tmp_path
):
    mini = one().lab(1, 2, 7.1, item, unit=unit).lab(1, 3, 7.2, item, unit=unit)
    result = extracted(mini.write(tmp_path / "mimic"), item=wanted)
    assert result.series(1) == "7.1 (0h) -> 7.2 (1h)"
    described = [result.description[key] for key in ("series", "unit", "plausible")]
    assert described == [name, unit, plausible]
    assert not result.rows.filter(like=f"static_last_{name.lower()}").size
    assert result.context(1).endswith("anion gap 18 (mEq/L)")


def test_each_series_has_the_reference_range_that_most_often_stands_beside_it(tmp_path):
    """Ranges in another unit, reversed ones and missing ones do not count; of two ends one may."""
    mini = one().admit(2).settling(2)
    ranges = [(8, 20), (8, 20), (10, 18), ("", ""), ("", ""), ("", "")]
    for hour, (low, high) in enumerate(ranges):
        mini.lab(1, hour, 20 - hour, ref_range_lower=low, ref_range_upper=high)
    for hour, unit in enumerate(("umol/L", "umol/L", "mg/dL")):
        factor = 88.4 if unit == "umol/L" else 1
        ends = {"ref_range_lower": 0.4 * factor, "ref_range_upper": 1.1 * factor}
        mini.lab(1, hour, factor, CREATININE, unit=unit, **ends)
    mini.lab(1, 1, 12, BICARBONATE, ref_range_lower=22).lab(1, 1, 138, SODIUM)
    mini.lab(1, 1, 200, GLUCOSE, ref_range_lower=105, ref_range_upper=70).trio(1, 3, 138)
    series = ("anion gap", "creatinine", "glucose", "bicarbonate", "sodium")
    folder = mini.write(tmp_path / "mimic")
    described = extracted(folder, ["death"], series=series).description
    assert described["reference"] == (8, 20)
    assert described["references"] == {"creatinine": (0.4, 1.1), "bicarbonate": (22, None)}
    computed = extracted(folder, ["death"], compute_gap="always", min_observations=1).description
    assert computed["reference"] is None, "computed gaps lack potassium"
    assert computed["series"] == "Anion gap without potassium"


# --------------------------------------------------------------------------- refusals


def assert_refused(folder, place, **request):
    with pytest.raises(InputError) as caught:
        extracted(folder, **request)
    problem = str(caught.value)
    assert place in problem
    assert "\n" not in problem
    assert SECRET not in problem


@pytest.fixture
def folder(tmp_path):
    mini = one().admit(2).settling(2).lab(1, 2, 20, unit="g/L").trio(1, 1, 140)
    return mini.lab(1, 2, 20, SODIUM, unit="g/L").write(tmp_path / "mimic")


def test_no_such_item_and_units_that_nothing_converts_are_refused(folder):
    for request, place in (
        ({"item": "5"}, "d_labitems.csv: --item 5: "),
        ({"item": "Glucose"}, "d_labitems.csv: --item Glucose: "),
        ({"item": "51221"}, "none is left"),
        ({}, "labevents.csv: item 50868 has values in 'g/L', 'mEq/L'"),
        ({"compute_gap": "always"}, "labevents.csv: item 50983 has values in 'g/L', 'mEq/L'"),
    ):
        assert_refused(folder, place, **request)


def test_bad_tables_are_refused_in_one_line(folder):
    for table, old, new, place in (
        (LABS, moment(4), f"{SECRET}th", "labevents.csv, column charttime: "),
        (PATIENTS, ",50\n", ",7\n", "none is left: 2 out"),
        (LABS, "\n", None, "2 candidates"),
        (ADMISSIONS, "\n", None, "0 candidates"),
    ):
        path = folder / f"{table}.csv"
        text = path.read_text()
        path.write_text(text.split(old)[0] + old if new is None else text.replace(old, new))
        assert_refused(folder, place, item="50882")
        path.write_text(text)


@pytest.mark.slow
def test_every_table_in_one_form_and_every_required_column_is_needed(folder):
    for name, columns in COLUMNS.items():
        path = folder / f"{name}.csv"
        content = path.read_text()
        path.unlink()
        assert_refused(folder, f"{name} (.csv")
        needed = [column for column in columns if not columns[column].optional]
        path.write_text(content.replace(needed[-1], f"no_{needed[-1]}", 1))
        assert_refused(folder, f"{name}.csv: no column {needed[-1]}")
        for column in columns.keys() - needed:
            content = content.replace(column, f"no_{column}", 1)
        path.write_text(content)
    extracted(folder, item="50882", min_observations=1)
    (folder / "hosp" / "patients.csv.gz").write_bytes(b"")
    assert_refused(folder, "hosp/patients")
    assert_refused(folder / "gone", "--mimic_dir ")
