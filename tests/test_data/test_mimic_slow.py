"""MIMIC-IV by another, slow reading: the demo and random hospitals; the same rows from any form."""

import hashlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.cohort import OUTCOMES, RULES
from mimic_files import (
    BICARBONATE,
    CHLORIDE,
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
from slow_mimic import UNITS, read_slowly


def compare(folder, tables, outcome, computed=False, **request):
    """Compare all rows, the rules that removed others and the counts; return rows and reading."""
    stays, counts, _ = read_slowly(tables)
    names = {"window_hours": "window", "horizon_hours": "horizon", "min_observations": "fewest"}
    words = {names[name]: value for name, value in request.items() if name in names}
    words |= {"computed": computed, "exclude": "discharged" in request}
    judged = {hadm: stay.judge(outcome, **words) for hadm, stay in stays.items()}
    request["compute_gap"] = "always" if computed else "reported"
    result = extracted(folder, outcome, **request)
    removed = Counter(each for each in judged.values() if isinstance(each, str))
    fewest = request.get("min_observations", 2)
    expected = {RULES[rule].format(fewest): count for rule, count in removed.items()}
    assert result.removed() == expected
    kept = {hadm: each for hadm, each in judged.items() if isinstance(each, dict)}
    expected = pd.DataFrame.from_dict(kept, "index")
    found = result.rows[[name for name in expected if name in result.rows]].sort_index()
    assert len(found.columns) >= 19
    numbers = [name for name in found if name != "clinical_trajectory"]
    typed = dict.fromkeys(numbers, float)
    pd.testing.assert_frame_equal(
        found.astype(typed), expected[list(found)].sort_index().astype(typed), check_names=False
    )
    return found, result, counts


@pytest.fixture(scope="module")
def demo():
    return read_tables(DEMO)


@pytest.mark.parametrize(("window", "horizon"), [(12.0, 72.0), (30.0, 24.0)])
def test_the_demo_is_read_as_a_slow_independent_reading_reads_it(window, horizon, demo):
    times = {"window_hours": window, "horizon_hours": horizon}
    rows, _, _ = compare(DEMO, demo, ["death"], **times)
    assert (rows.drop(columns="label_escalation").nunique() > 1).all()
    assert rows["label_icu"].isna().any()
    assert rows["label_unresolved"].isna().any()


def test_the_demo_has_so_many_rows_and_events(demo):
    rows, _, _ = compare(DEMO, demo, [*OUTCOMES])
    assert (len(rows), rows["label_escalation"].sum()) == (86, 64)
    assert len(compare(DEMO, demo, ["death"])[0]) == 87


# --------------------------------------------------------------------------- random hospitals


STARTS = (-50, 0, 13, 30, 90, 10_000, 40_000)
HOURS = (-24.02, -24, -12, -1, 0, 1, 2, 6, 12, 13, 14, 24, 37, 38)
DELAYS = np.array([-1, 0, 0.5, 1, 1, 1, 11.5, 12, 12.5])
PARTS = {SODIUM: 140, CHLORIDE: 100, BICARBONATE: 20}


def random_hospital(rng):
    """Patients with admissions apart or overlapping; on the grid of hours edges are often met."""
    mini, hadm = Mini(), 0
    for subject, age in enumerate([*rng.choice([17, 18, 50, 88, 91], 150).tolist(), None]):
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
    mini.admit(hadm, start, gender=rng.choice(["F", "M", ""]), **ends, **patient)
    for _ in range(int(rng.integers(0, 3))):
        begin = start + float(rng.choice([0, 1, 12, 13, 14, 37]))
        mini.icu(hadm, begin, rng.choice([None, begin + 1, begin + 12, begin + 40]))
        mini.rows["icu/icustays"][-1]["first_careunit"] = rng.choice([*UNITS])


def draw_at_random(mini, hadm, hour, rng):
    """A gap or other chemistry, often with the parts of a gap; some name another admission."""
    words = {"stored": rng.choice([None, *hour + DELAYS]), "named": rng.random() < 0.7}
    if rng.random() < 0.4:
        for item in [*PARTS][: rng.choice([2, 3, 3])]:
            mini.lab(hadm, hour, PARTS[item] + int(rng.choice([-8, -2, 0, 2])), item, **words)
    if words["named"] and rng.random() < 0.05:
        words["hadm_id"] = int(rng.integers(1, 300))
    item = GAP if rng.random() < 0.7 else int(rng.choice([GLUCOSE, 50809, PH]))
    value = rng.choice([None, "inf", 9, 12, 12.5, 20], p=[0.02, 0.02, *[0.24] * 4])
    mini.lab(hadm, hour, value, item, **words)


REQUESTS = [
    (["death"], {}),
    (["icu"], {"min_observations": 1, "window_hours": 6.0}),
    (["unresolved"], {"horizon_hours": 24.0}),
    (["death", "icu"], {"discharged": "exclude", "min_observations": 1, "horizon_hours": 24.0}),
    ([*OUTCOMES], {"computed": True, "min_observations": 1}),
    ([*OUTCOMES], {"horizon_hours": 25.0, "discharged": "exclude"}),
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_random_hospitals_are_read_as_slowly_read(number, tmp_path):
    tables = random_hospital(np.random.default_rng(number))
    outcome, request = REQUESTS[number]
    folder = write_tables(tmp_path / "mimic", tables)
    rows, result, counts = compare(folder, tables, outcome, **request)
    assert result.description["values"] == counts
    assert len(rows) > 20


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
