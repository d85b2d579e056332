"""New data beside old: what is stored of the training patients, and what does not fit them."""

import numpy as np
import pandas as pd
import pytest

from conftest import DATA, SAMPLE
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data import analytes
from medgemma_clinical.data.distributions import compare, describe, quantile, row_medians
from medgemma_clinical.data.small_cells import MIN_CELL

CHEMISTRY = DATA / "physionet2012_chemistry.csv.gz"
SIZES = (11, 12, 21, 22, 32, 33, 47, 100, 101, 550, 3000)


def rows_of(values, name="creatinine", kind="series", patients=None):
    """Rows with one measured variable, a patient each unless ``patients`` names them."""
    columns = pd.MultiIndex.from_tuples([(kind, name)])
    index = np.arange(len(values)) if patients is None else patients
    return pd.DataFrame(np.asarray(values, dtype=float)[:, None], index, columns)


def entry_of(values, **more):
    return describe(rows_of(values, **more))["series"].get("creatinine")


def medians_of(path):
    dataset = MIMICtrajectoryDataset(path, max_len=64)
    dataset.static_inputs = dataset.static_names
    return row_medians(dataset)


@pytest.fixture(scope="module")
def chemistry():
    return medians_of(CHEMISTRY)


# ------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("n", SIZES)
def test_each_number_is_a_mean_of_11_patients(n):
    """Patient k has the value k, so that the distance of two means tells their groups."""
    values = np.arange(n, dtype=float)
    entry = entry_of(np.random.default_rng(0).permutation(values))
    groups = [MIN_CELL] * (n // MIN_CELL)
    assert 1 <= len(entry["means"]) == len(entry["levels"]) <= max(1, len(groups))
    rounding = 10 ** np.floor(np.log10((n - 1) / 20)) / 2
    low = np.arange(MIN_CELL).mean()
    assert entry["means"][0] >= low - rounding
    assert entry["means"][-1] <= n - 1 - low + rounding
    gaps = np.diff(entry["means"])
    assert (gaps >= MIN_CELL - 2 * rounding).all(), "two groups share patients"
    assert quantile(entry, 0.5) == pytest.approx(np.median(values), abs=2 * rounding)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("extreme", [1e6, -1e6])
def test_one_patient_of_extreme_values_is_not_seen(n, extreme):
    ordinary = np.random.default_rng(n).normal(90, 20, n - 1)
    patients = [*range(n - 1), *["one"] * 40]  # with many rows
    entry = entry_of([*ordinary, *[extreme] * 40], patients=patients)
    assert np.abs(entry["means"]).max() <= (1e6 + 10 * 200) / MIN_CELL
    assert sum(abs(mean) > 200 for mean in entry["means"]) <= 1
    if n >= 100:  # a tenth of the spread is resolved: differences of sums tell no patient
        assert all(float(mean).is_integer() for mean in entry["means"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.5] * 10, None),
        ([1.5] * 10 + [np.nan] * 90, None),
        ([0.0] * 90 + [1.0] * 10, None),
        ([1.0] * 90 + [0.0] * 10, None),
        ([0.0] * 75 + [1.0] * 25, {"measured": 1.0, "share": 0.25}),
        ([0.0] * 75 + [1.0] * 25 + [np.nan] * 10, {"measured": 1.0, "share": 0.25}),
        ([0.0] * 75 + [1.0] * 25 + [np.nan] * 11, {"measured": 0.9, "share": 0.25}),
        ([3.25] * 11, {"measured": 1.0, "levels": [0.5], "means": [3.25]}),
        ([3.25] * 11 + [np.nan] * 2000, {"measured": 0.0055, "levels": [0.5], "means": [3.25]}),
    ],
)
def test_nothing_tells_a_count_below_11(values, expected):
    assert entry_of(values) == expected


def test_a_patient_counts_once_by_the_median():
    patients = np.repeat([*range(30), 30], [1] * 30 + [500])
    values = np.where(patients == 30, 1000.0, patients)
    once = [*range(30), 1000.0]
    assert entry_of(values, patients=patients) == entry_of(once)
    indicator = entry_of([*[0, 1] * 15, 0, 1, 1, 1], patients=[*range(30), *[30] * 4])
    assert indicator == {"measured": 1.0, "share": 0.52}
    wide = entry_of(np.arange(1000))
    assert [quantile(wide, x) for x in (0.25, 0.5, 0.75)] == pytest.approx([250, 500, 750], abs=5)
    assert wide["levels"][0] == 0.01


def test_the_medians_of_rows_are_those_of_pandas():
    dataset = MIMICtrajectoryDataset(CHEMISTRY, max_len=64)
    table = row_medians(dataset)
    assert [name for _, name in table] == list(dataset.features)
    for i in (0, 17, 3849):
        values = pd.DataFrame(dataset.values[dataset.offsets[i] : dataset.offsets[i + 1]])
        np.testing.assert_array_equal(table.iloc[i], values.median())


# ------------------------------------------------------------------ what does not fit


def drawn(n, seed, center=90.0, spread=0.4):
    return center * np.exp(spread * np.random.default_rng(seed).normal(size=n))


UNIT, NEVER, RARE = "is the unit right", "never measured", "of patients here"


@pytest.mark.parametrize(
    ("old", "new", "name", "expected"),
    [
        (drawn(200, 1), drawn(200, 2), "creatinine", []),
        (drawn(200, 1), drawn(20, 2) / 88.4, "creatinine", [UNIT]),
        (drawn(200, 1), drawn(19, 2) / 88.4, "creatinine", []),
        (drawn(30, 1), drawn(20, 2) / 88.4, "creatinine", [UNIT]),
        (drawn(21, 1), drawn(20, 2) / 88.4, "creatinine", []),  # their spread is not known
        (drawn(30, 1), drawn(60, 2) * 1.6, "creatinine", []),  # beyond the mean of the upper half
        (drawn(200, 1), drawn(200, 2) * 1.5, "creatinine", []),
        (drawn(26, 1, 0.2, 1.9), drawn(30, 2, 2.0, 1.9), "troponin", []),  # so skewed are halves
        # Inside the middle 98 %: the factor between two units alone tells.
        (drawn(400, 1, spread=0.8), drawn(200, 2, spread=0.8) * 2.144, "Harnstoff", [UNIT]),
        (drawn(400, 1, spread=0.8), drawn(200, 2, spread=0.8) / 2.801, "urea nitrogen", [UNIT]),
        (drawn(400, 1, spread=0.8), drawn(50, 2, spread=0.8) * 2.144, "urea", []),
        (drawn(400, 1, spread=0.8), drawn(200, 2, spread=0.8) * 2.144, "platelets", []),
        (drawn(400, 1, spread=0.8), drawn(200, 2, spread=0.8) * 1.4, "urea", []),
        (drawn(400, 1, 1.5, 0.9), drawn(60, 2, 1.5, 0.9) * 9.008, "Lactate", [UNIT]),
        (drawn(400, 1, 120, 0.2), drawn(60, 2, 120, 0.2) / 10, "haemoglobin", [UNIT]),
        ([2014.0] * 100, [2014.0] * 100, "year", []),
        (np.tile([2013.0, 2014], 50), [2014.0] * 100, "year", []),
        ([0, 1] * 50, [1.0] * 50, "sex male", []),
        ([0, 1] * 50, [2.0] * 50, "sex male", [UNIT]),
        (drawn(200, 1), [np.nan] * 20, "lactate", [NEVER]),
        (drawn(200, 1), [np.nan] * 19, "lactate", []),
        ([*drawn(20, 1), *[np.nan] * 180], [np.nan] * 100, "lactate", []),
        (drawn(200, 1), [*drawn(5, 2), *[np.nan] * 95], "lactate", [RARE]),
        (drawn(200, 1), [*drawn(15, 2), *[np.nan] * 95], "lactate", []),
        ([*drawn(20, 1), *[np.nan] * 980], drawn(30, 2), "lactate", [RARE]),
        ([*drawn(20, 1), *[np.nan] * 980], drawn(19, 2), "lactate", []),
    ],
)
def test_what_does_not_fit_is_named(old, new, name, expected):
    training = describe(rows_of(old, name))
    problems = compare(training, rows_of(new, name))
    assert len(problems) == len(expected)
    assert all(x.startswith(f"{name}: ") for x in problems)
    assert all(word in x for word, x in zip(expected, problems, strict=True))
    assert compare({}, rows_of(new, name)) == []  # of an older checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("path", [SAMPLE, CHEMISTRY])
def test_held_out_patients_and_other_units_of_the_sample_fit(path):
    rows, rng = medians_of(path), np.random.default_rng(0)
    for training, n in [(50, 40), (200, 40), (600, 100), (3000, 800)] * 5:
        order = rng.permutation(len(rows))
        assert compare(describe(rows.iloc[order[:training]]), rows.iloc[order[-n:]]) == []
    names = [name for name in rows["static"] if name.startswith("static_unit_")]
    assert len(names) == 4
    units = [rows[rows["static", name] == 1] for name in names]
    for old in units:
        for new in units:
            assert compare(describe(old), new) == []
            few = old.sample(100, random_state=1), new.sample(60, random_state=1)
            assert compare(describe(few[0]), few[1]) == []


@pytest.mark.parametrize("name", ["creatinine", "glucose", "lactate", "urea nitrogen"])
def test_the_other_unit_of_an_analyte_is_seen_in_the_sample(name, chemistry):
    order = np.random.default_rng(0).permutation(len(chemistry))
    training = describe(chemistry.iloc[order[:1000]])
    factors = [x for x in analytes.FACTORS[name].values() if x != 1]
    for factor in (*factors, *(1 / x for x in factors)):
        new = chemistry.iloc[order[-300:]].copy()
        new["series", name] *= factor
        (problem,) = compare(training, new)
        assert problem.startswith(f"{name}: the values fit")
        near = f"{max(factor, 1 / factor):.3g}"[:3]
        assert near in problem
