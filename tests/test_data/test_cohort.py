"""The cohort of a hospital: items, units, cohorts, columns; ``test_mimic_slow`` reads all again."""

import pandas as pd
import pytest

from medgemma_clinical.data.duck import open_database
from medgemma_clinical.data.mimic import KETOACIDOSIS
from medgemma_clinical.files import InputError
from mimic_files import (
    BICARBONATE,
    CHLORIDE,
    CREATININE,
    GAP,
    GLUCOSE,
    PH,
    SODIUM,
    Mini,
    extracted,
    write_tables,
)

HEMATOCRIT, WHOLE_BLOOD_GLUCOSE = 51221, 50809
DEATH = {"outcome": ["death"]}
COMPUTED = {"compute_gap": "always"}

# --------------------------------------------------------------------------- values and items


def one():
    return Mini().admit(1)


def two_trios():
    return one().trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)


def test_a_table_without_storing_times_takes_charting_times_and_warns(tmp_path, caplog):
    tables = one().gaps(1, (0, 20), (12, 18), (30, 9)).tables()
    tables["hosp/labevents"] = tables["hosp/labevents"].drop(columns="storetime")
    result = extracted(write_tables(tmp_path, tables))
    assert result.series(1) == "20 (0h) -> 18 (12h)"
    assert "only values charted by then" in result.description["prediction_time"]
    assert "no column storetime" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "item", "unit", "name", "plausible"),
    [
        ("bicarbonate", BICARBONATE, "mEq/L", "Bicarbonate", (3.0, 60.0)),
        ("50882", BICARBONATE, "mEq/L", "Bicarbonate", (3.0, 60.0)),
        ("pH", PH, "", "pH", (6.5, 8.0)),
        ("Hematocrit", HEMATOCRIT, "%", "Hematocrit", None),
    ],
)
def test_an_item_may_be_named_or_numbered_and_be_no_known_analyte(
    wanted, item, unit, name, plausible, run
):
    mini = one().settling(1).lab(1, 2, 7.1, item, unit=unit).lab(1, 3, 7.2, item, unit=unit)
    result = run(mini, item=wanted)
    assert result.series(1) == "7.1 (0h) -> 7.2 (1h)"
    described = [result.description[key] for key in ("series", "unit", "plausible")]
    assert described == [name, unit, plausible]
    assert result.rows.loc[1, "static_last_anion gap [mEq/L]"] == 18
    assert not result.rows.filter(like=f"static_last_{name.lower()}").size
    assert result.context(1).endswith("anion gap 18 (mEq/L)")


@pytest.mark.parametrize(
    ("unit", "request_", "problem"),
    [
        (None, {"item": "5"}, r"d_labitems\.csv: --item 5"),
        (None, {"item": "Glucose"}, r"d_labitems\.csv: --item Glucose: .*50809.*50931"),
        (None, {"item": "51222"}, r"d_labitems\.csv: --item 51222"),
        ("mEq/L", {"item": "51221"}, "none is left"),
        ("g/L", {}, r"labevents\.csv: item 50868 has values in 'g/L', 'mEq/L'"),
        ("g/L", COMPUTED, r"labevents\.csv: item 50983 has values in 'g/L', 'mEq/L'"),
    ],
)
def test_no_such_item_and_units_that_nothing_converts_are_refused(unit, request_, problem, run):
    mini = two_trios().settling(1).lab(1, 2, 20, unit=unit).lab(1, 2, 20, SODIUM, unit=unit)
    with pytest.raises(InputError, match=problem):
        run(mini, **request_)


def test_known_units_are_converted_and_other_chemistry_in_an_unknown_one_is_left_out(run):
    cells = {
        GLUCOSE: ("mmol/L", 20.0, "360.32"),
        CREATININE: ("umol/L", 88.4, "0.999981"),
        PH: ("", 7.2, "7.2"),
        GAP: ("MEQ/L", 17.0, "17"),
    }
    mini = one().gaps(1, (30, 9)).admit(2).settling(2).lab(1, 2, 140, SODIUM, unit="g/L")
    for item, (unit, value, _) in cells.items():
        mini.lab(1, 1, value, item, unit=unit).lab(1, 2, value, item, unit=unit)
        mini.lab(2, 2, 100, item).lab(2, 3, 100, item)
    for item, (_, _, expected) in cells.items():
        result = run(mini, item=str(item), **DEATH)
        assert result.series(1) == f"{expected} (0h) -> {expected} (1h)", item
        assert result.description["values"]["of sodium in no unit or an unknown one"] == 1
    assert pd.isna(result.rows.loc[1, "static_last_sodium [mEq/L]"])


def test_every_gap_is_computed(run):
    """A reported one, in whatever unit, is then no input and no outcome, whenever it is drawn."""
    mini = one().trio(1, 2, 140).trio(1, 5, 138.1).trio(1, 30, 131).settling(1)
    mini.lab(1, 6, 150, SODIUM).lab(1, 6, 100, CHLORIDE)  # no bicarbonate: no gap
    mini.admit(2).settling(2).gaps(2, (50, 30)).lab(1, 2, 20, GAP, unit="mg/dL")
    result = run(mini, **COMPUTED)
    assert result.rows["clinical_trajectory"].to_dict() == {1: "20 (0h) -> 18.1 (3h)"}
    assert result.rows["label_unresolved"].tolist() == [0], "131 - 100 - 20 = 11"
    assert not result.rows.filter(like="static_last_anion").size
    described = [result.description[key] for key in ("series", "unit")]
    assert described == ["Anion gap without potassium", "mEq/L"]
    other = run(mini, item="bicarbonate", **COMPUTED)
    assert other.rows.loc[1, "static_last_anion gap without potassium [mEq/L]"] == 18.1


@pytest.mark.parametrize(
    ("age", "years", "text", "number"),
    [
        (17, 1.1, "18-year-old woman", 18),
        (91, 0, "Over 89-year-old woman", 90),
        (88, 4.5, "Over 89-year-old woman", 90),
        (91, -2.2, "Over 86-year-old woman", 87),
        (89, 0, "89-year-old woman", 89),
    ],
)
def test_the_age_is_that_of_the_year_of_admission_and_at_most_90(age, years, text, number, run):
    hour = round(years * 24 * 365.25)
    mini = Mini().admit(1, hour, hour + 200.0, age=age)
    result = run(mini.gaps(1, (hour + 1, 20), (hour + 4, 18), (hour + 40, 9)))
    assert result.context(1).startswith(f"{text}, ")
    assert result.rows["static_age [years]"].tolist() == [number]


# --------------------------------------------------------------------------- cohorts

CODES = [
    *((c, 9, True) for c in ("25010", "25011", "25012", "25013", "250.13 ")),
    *((c, 9, False) for c in ("25000", "25020", "2510", "E1010", "2761")),
    *((c, 10, True) for c in ("E0810", "E0911", "E1010", "E10.11", "E1110", "e1111", "E1310")),
    *((c, 10, False) for c in ("E0800", "E0801", "E1100", "E1101", "E1300", "E1065", "E1210")),
    *((c, 10, False) for c in ("25010", "E872", "R7309")),
]


def test_the_codes_of_ketoacidosis(tmp_path):
    cells = pd.DataFrame(CODES, columns=["icd_code", "icd_version", "inside"]).reset_index()
    with open_database(tmp_path / "out.csv", "100MB", 1) as database:
        database.add("codes", cells.astype({"icd_version": float}))
        kept = database.frame(f"SELECT index FROM codes WHERE {KETOACIDOSIS} ORDER BY index")
    assert kept["index"].tolist() == cells.index[cells["inside"]].tolist()


def test_the_coded_cohort_says_that_it_is_chosen_in_hindsight_and_warns_of_nothing(run, caplog):
    mini = one().settling(1).admit(2, code="E1101").settling(2)
    with caplog.at_level("INFO"):
        result = run(mini, cohort="dka")
    assert list(result.rows.index) == [1]
    assert result.removed() == {"not coded as diabetic ketoacidosis": 1}
    (record,) = [each for each in caplog.records if "hindsight" in each.message]
    assert record.levelname == "INFO"


SICK = {GLUCOSE: 251.0, BICARBONATE: 18.0, GAP: 12.5}
BIOCHEMICAL = {
    "sick": ({}, 3.0, True),
    "a glucose of 250": ({GLUCOSE: 250.0}, 3.0, False),
    "a bicarbonate of 18.1": ({BICARBONATE: 18.1}, 3.0, False),
    "a gap of 12": ({GAP: 12.0}, 3.0, False),
    "a pH of 7.30": ({PH: 7.30}, 3.0, True),
    "a pH of 7.31": ({PH: 7.31}, 3.0, False),
    "no glucose": ({GLUCOSE: None}, 3.0, False),
    "after the window": ({}, 12.5, False),
    "stored after the window": ({}, 11.5, False),
}


def test_the_biochemical_cohort_is_known_within_the_window(run):
    mini = Mini()
    for hadm, (changed, hour, _) in enumerate(BIOCHEMICAL.values(), 1):
        mini.admit(hadm, code="4019", version=9).gaps(hadm, (0, 11), (1, 11), (60, 9))
        for item, value in (SICK | changed).items():
            mini.lab(hadm, hour, value, item)
    result = run(mini, cohort="biochemical", **DEATH)
    inside = {name: hadm in result.rows.index for hadm, name in enumerate(BIOCHEMICAL, 1)}
    assert inside == {name: wanted for name, (_, _, wanted) in BIOCHEMICAL.items()}


# --------------------------------------------------------------------------- columns


def test_context_and_static_features_hold_what_is_known_and_nothing_later(run):
    mini = Mini().admit(1, gender="M").settling(1).icu(1, 10, 50).icu(1, 51, 60)
    mini.lab(1, 0.5, 111, SODIUM).lab(1, 0.5, 90, CHLORIDE)  # before the window
    mini.lab(1, 1, 131, SODIUM).lab(1, 6, 140, SODIUM).lab(1, 12.5, 150, SODIUM)
    mini.lab(1, 6, 7.25, PH).lab(1, 7, 300, GLUCOSE).lab(1, 8, 280, WHOLE_BLOOD_GLUCOSE)
    mini.lab(1, 6, 40, HEMATOCRIT, unit="%")  # no chemistry
    result = run(mini)
    assert result.context(1) == (
        "50-year-old man, Medical Intensive Care Unit (MICU), 13 h since admission, "
        "glucose 280 (mg/dL), pH 7.25, sodium 140 (mEq/L)"
    )
    static = result.rows.filter(like="static_").loc[1]
    assert static.notna().sum() == 2 + 6 + 1 + 3
    assert static[static.notna() & (static != 0)].to_dict() == {
        "static_age [years]": 50,
        "static_sex_male": 1,
        "static_icu": 1,
        "static_unit_medical": 1,
        "static_hours_since_admission [h]": 13,
        "static_last_glucose [mg/dL]": 280,
        "static_last_pH": 7.25,
        "static_last_sodium [mEq/L]": 140,
    }


def patient():
    """One admission, asked at 13 h, with serum and whole blood glucose."""
    mini = Mini().admit(1, gender="M").settling(1).lab(1, 0.5, 99, GLUCOSE)
    mini.lab(1, 2, 300, GLUCOSE).lab(1, 3, 280, WHOLE_BLOOD_GLUCOSE).lab(1, 14, 1, GLUCOSE)
    return mini.lab(1, 5, 7.25, PH).lab(1, 4, 140, SODIUM)


def test_further_series_are_columns_with_name_and_unit_and_the_first_gives_the_time(run):
    result = run(patient(), series=("anion gap", "Glucose", "pH", "bicarbonate"))
    assert result.rows.filter(regex="traject|static_last|hours$").loc[1].dropna().to_dict() == {
        "clinical_trajectory": "20 (0h) -> 18 (3h)",
        "trajectory_glucose [mg/dL]": "300 (1h) -> 280 (2h)",
        "trajectory_pH": "7.25 (4h)",
        "prediction_hours": 12,
        "static_last_sodium [mEq/L]": 140,
    }
    assert "trajectory_bicarbonate [mEq/L]" in result.rows
    assert result.context(1).endswith("admission, sodium 140 (mEq/L)")
    assert result.description["limits"]["glucose"] == (5.0, 2500.0)
    mini = patient().admit(2).settling(2).lab(2, 2, 90, GLUCOSE)  # one glucose alone
    result = run(mini, series=("glucose", "anion gap"), **DEATH)
    series = result.rows["clinical_trajectory"].to_dict()
    assert series == {1: "99 (0h) -> 300 (1.5h) -> 280 (2.5h)"}
    assert result.rows.loc[1, "trajectory_anion gap [mEq/L]"] == "20 (0.5h) -> 18 (3.5h)"


def test_each_series_has_the_reference_range_that_most_often_stands_beside_it(run):
    """Ranges in another unit, reversed ones and missing ones do not count; of two ends one may."""
    mini = one().admit(2).settling(2)
    ranges = [(8, 20), (8, 20), (10, 18), ("", ""), ("", ""), ("", "")]
    for hour, (low, high) in enumerate(ranges):
        mini.lab(1, hour, 20 - hour, ref_range_lower=low, ref_range_upper=high)
    for hour, unit in enumerate(("umol/L", "umol/L", "mg/dL")):
        factor = 88.4 if unit == "umol/L" else 1
        ends = {"ref_range_lower": 0.4 * factor, "ref_range_upper": 1.1 * factor}
        mini.lab(1, hour, factor, CREATININE, unit=unit, **ends)
    mini.lab(1, 1, 12, BICARBONATE, ref_range_lower=22)
    mini.lab(1, 1, 200, GLUCOSE, ref_range_lower=105, ref_range_upper=70).lab(1, 1, 138, SODIUM)
    series = ("anion gap", "creatinine", "glucose", "bicarbonate", "sodium")
    described = run(mini, series=series, **DEATH).description
    assert described["reference"] == (8, 20)
    assert described["references"] == {"creatinine": (0.4, 1.1), "bicarbonate": (22, None)}
    computed = run(mini.trio(1, 1, 140).trio(1, 3, 138), **DEATH, **COMPUTED).description
    assert computed["reference"] is None, "computed gaps lack potassium"


def test_the_prediction_time_is_rounded_as_the_hours_of_the_series(run):
    mini = patient().lab(1, 11.507, 7.3, PH, stored=11.507)
    rows = run(mini, window_hours=10.508, series=("anion gap", "pH")).rows
    assert rows["trajectory_pH"].tolist() == ["7.25 (4h) -> 7.3 (10.51h)"]
    assert rows["prediction_hours"].tolist() == [10.51]
