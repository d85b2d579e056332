"""MIMIC-IV by another, slow reading: the demo and random hospitals; the same rows from any form."""

import hashlib

import numpy as np
import pytest

from medgemma_clinical.data.cohort import OUTCOMES
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
    read_tables,
    shuffled,
    with_storing_times,
    write_tables,
)
from slow_mimic import UNITS, compare_with, read_slowly


@pytest.fixture(scope="module")
def demo():
    return read_tables(DEMO)


def test_the_demo_is_read_as_a_slow_independent_reading_reads_it(demo):
    stays, _, _ = read_slowly(demo)
    for outcome, request, counts in (
        (["death"], {"window_hours": 30.0, "horizon_hours": 24.0}, (205, 1)),
        ([*OUTCOMES], {"compute_gap": "reported"}, (86, 64)),
    ):
        result = extracted(DEMO, outcome, **request)
        rows = compare_with(stays, result, outcome, **request)
        assert (len(rows), rows["label_escalation"].sum()) == counts
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
    for subject, age in enumerate([*rng.choice([17, 18, 50, 88, 89, 91], 100).tolist(), None]):
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
    assert len(rows) > 5


# --------------------------------------------------------------------------- same rows


def test_any_form_order_and_limit_gives_the_same_rows(demo, tmp_path):
    stored = with_storing_times(demo, 0)
    stored["hosp/labevents"]["comments"] = 'a ""high"" value,\nsaid so'
    mixed = {name: shuffled(table, 1) for name, table in stored.items()}
    request = {"series": ("all",), "compute_gap": "always", "threads": 2, "memory_limit": "2GB"}
    first = extracted(write_tables(tmp_path / "csv", stored), **request)
    assert len(first.rows) > 50
    for form in (".csv", ".csv.gz", ".parquet"):
        folder = write_tables(tmp_path / f"mixed{form}", mixed, form)
        other = extracted(folder, **request | {"threads": 1, "memory_limit": "200MB"})
        assert other.rows.equals(first.rows)
        for key in ("flow", "definitions", "values"):
            assert other.description[key] == first.description[key]
        for name, digest in other.description["tables_sha256"].items():
            content = (folder / f"{name}{form}").read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest
