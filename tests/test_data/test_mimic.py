"""MIMIC-IV: items, units, references; tables that are damaged, incomplete or foreign.

``test_mimic_slow`` reads whole hospitals again.
"""

import pytest

from medgemma_clinical.data.mimic import COLUMNS
from medgemma_clinical.files import InputError
from mimic_files import BICARBONATE, CREATININE, GLUCOSE, PH, SODIUM, Mini, extracted, moment

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
