"""The cohort of a hospital: whose a value is, units, prediction time, who is at risk, columns."""

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

HEMATOCRIT = 51221

# --------------------------------------------------------------------------- whose a value is


def test_a_value_without_hadm_id_belongs_to_the_one_admission_around_it(run):
    """Patient 10001 has two admissions apart; 10003 three, of which two overlap."""
    mini = Mini().admit(1, 0, 100).admit(2, 200, 300, subject=10_001)
    for hour in (0, 3, 100, 150, 200, 202, 301):
        mini.lab(1, hour, hour / 10, named=False)
    mini.admit(3, 0, 100).admit(4, 50, 300, subject=10_003).admit(5, 10, 20, subject=10_003)
    for hour in (1, 4, 15, 20, 30, 60, 100, 110, 120):
        mini.lab(3, hour, hour, named=False)
    result = run(mini, outcome=["death"], window_hours=30.0)
    assert result.series(1) == "0 (0h) -> 0.3 (3h)"
    assert result.series(2) == "20 (0h) -> 20.2 (2h)"
    assert result.series(3) == "1 (0h) -> 4 (3h) -> 30 (29h)"
    assert result.series(4) == "110 (0h) -> 120 (10h)"
    assert 5 not in result.rows.index
    counts = result.description["values"]
    assert counts["without hadm_id, within one admission: taken"] == 5 + 5
    assert counts["without hadm_id, within none or several"] == 2 + 4


def test_a_value_is_never_taken_from_another_patient(run):
    mini = Mini().admit(1).settling(1).admit(2).settling(2)
    result = run(mini.lab(2, 5, 77, hadm_id=1).lab(2, 6, 66, hadm_id=99))
    assert result.series(1) == result.series(2) == "20 (0h) -> 18 (3h)"
    assert result.description["values"]["whose hadm_id is no admission of the patient"] == 2


def test_a_named_admission_takes_values_from_a_day_before_it_to_its_end(run):
    """A value of the emergency department precedes the admission that it names."""
    mini = Mini()
    for hadm, hour in enumerate((-24.0, -24.02, 200.02), 1):
        mini.admit(hadm).lab(hadm, hour, 25).gaps(hadm, (0, 20), (3, 18), (30, 9))
    result = run(mini, window_hours=25.0, outcome=["death"])
    starts = [result.series(hadm).startswith("25 (0h)") for hadm in (1, 2, 3)]
    assert starts == [True, False, False]
    assert result.description["values"]["outside the admission that they name"] == 2


def test_a_value_that_is_no_number_is_left_out(run):
    result = run(Mini().admit(1).settling(1).lab(1, 2, None).lab(1, 3, "inf"))
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert result.description["values"]["without a number"] == 2


# --------------------------------------------------------------------------- items and units


def test_an_item_may_be_named_or_numbered(run):
    mini = Mini().admit(1).settling(1).lab(1, 2, 15, BICARBONATE).lab(1, 3, 16, BICARBONATE)
    by_name, by_number = run(mini, item="bicarbonate"), run(mini, item="50882")
    assert by_name.series(1) == by_number.series(1) == "15 (0h) -> 16 (1h)"
    description = by_name.description
    assert (description["series"], description["unit"]) == ("Bicarbonate", "mEq/L")
    assert description["plausible"] == (3.0, 60.0)
    assert "anion gap 18 (mEq/L)" in by_name.context(1)
    assert by_name.rows.loc[1, "static_last_anion gap [mEq/L]"] == 18
    assert "bicarbonate" not in by_name.context(1)
    assert "static_last_bicarbonate [mEq/L]" not in by_name.rows


def test_an_item_may_have_no_unit_or_be_no_known_analyte(run):
    mini = Mini().admit(1).settling(1).lab(1, 2, 7.1, PH).lab(1, 3, 7.2, PH)
    for hour, value in ((1, 40.5), (2, 39), (30, 35)):
        mini.lab(1, hour, value, HEMATOCRIT, unit="%")
    acidity = run(mini, item="pH")
    assert (acidity.description["series"], acidity.description["unit"]) == ("pH", "")
    assert acidity.series(1) == "7.1 (0h) -> 7.2 (1h)"
    other = run(mini, item="Hematocrit")
    assert (other.description["series"], other.description["unit"]) == ("Hematocrit", "%")
    assert other.series(1) == "40.5 (0h) -> 39 (1h)"
    assert other.description["plausible"] is None


@pytest.mark.parametrize(
    ("item", "problem"),
    [("5", "no such item"), ("Glucose", "50809, Blood, Chemistry; 50931"), ("51221", "none is")],
)
def test_an_item_that_is_unknown_ambiguous_or_never_measured_is_refused(item, problem, run):
    with pytest.raises(InputError, match=problem):
        run(Mini().admit(1).settling(1), item=item)


def test_known_units_are_converted(run):
    cells = {
        GLUCOSE: ("mmol/L", 20.0, "360.32"),
        CREATININE: ("umol/L", 88.4, "0.999981"),
        PH: ("", 7.2, "7.2"),
        GAP: ("MEQ/L", 17.0, "17"),
    }
    mini = Mini().admit(1).gaps(1, (30, 9)).admit(2).settling(2)
    for item, (unit, value, _) in cells.items():
        mini.lab(1, 1, value, item, unit=unit).lab(1, 2, value, item, unit=unit)
        mini.lab(2, 2, 100, item).lab(2, 3, 100, item)
    for item, (_, _, expected) in cells.items():
        result = run(mini, item=str(item), outcome=["death"])
        assert result.series(1) == f"{expected} (0h) -> {expected} (1h)", item


def test_other_chemistry_in_an_unknown_unit_is_left_out_and_counted(run):
    mini = Mini().admit(1).settling(1).lab(1, 2, 140, SODIUM, unit="g/L")
    mini.lab(1, 3, 8, PH, unit="").lab(1, 4, 100, CHLORIDE, unit="")
    result = run(mini)
    assert result.context(1).endswith("admission, pH 8")
    last = result.rows.filter(like="static_last").loc[1].dropna()
    assert last.to_dict() == {"static_last_pH": 8}
    assert result.description["values"]["of sodium in no unit or an unknown one"] == 1


def test_a_series_in_units_that_nothing_converts_is_refused(run):
    mini = Mini().admit(1).settling(1).lab(1, 2, 40, HEMATOCRIT, unit="%")
    mini.lab(1, 3, 40, HEMATOCRIT, unit="g/L")
    with pytest.raises(InputError, match=r"labevents\.csv: item 51221 has values in '%', 'g/L'"):
        run(mini, item="51221")
    with pytest.raises(InputError, match=r"item 50868 has values in 'g/L', 'mEq/L'"):
        run(mini.lab(1, 2, 20, unit="g/L"))


# --------------------------------------------------------------------------- computed gaps


def test_every_gap_is_computed(run):
    """A reported one is then no input and no outcome, whenever it is drawn."""
    mini = Mini().admit(1).trio(1, 2, 140).trio(1, 5, 138.1).trio(1, 30, 131).settling(1)
    mini.lab(1, 6, 150, SODIUM).lab(1, 6, 100, CHLORIDE)  # no bicarbonate: no gap
    mini.admit(2).settling(2).gaps(1, (50, 30))
    result = run(mini, compute_gap="always")
    assert result.rows.index.tolist() == [1]
    assert result.series(1) == "20 (0h) -> 18.1 (3h)"
    assert result.labels(1) == [0, 0, 0], "131 - 100 - 20 = 11"
    assert "anion gap" not in result.context(1)
    assert not [name for name in result.rows if "static_last_anion" in name]
    assert "without potassium" in result.description["definitions"]["anion_gap"]
    assert result.description["series"] == "Anion gap without potassium"
    other = run(mini, compute_gap="always", item="bicarbonate")
    assert "anion gap 18.1 (mEq/L)" in other.context(1)
    assert other.rows.loc[1, "static_last_anion gap without potassium [mEq/L]"] == 18.1


def test_a_computed_series_has_the_unit_of_its_components(run):
    mini = Mini().admit(1).trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)
    mini.lab(1, 2, 20, GAP, unit="mg/dL")
    assert run(mini, compute_gap="always").description["unit"] == "mEq/L"
    mini.lab(1, 2, 20, SODIUM, unit="mg/dL")
    with pytest.raises(InputError, match="item 50983 has values in 'mEq/L', 'mg/dL'"):
        run(mini, compute_gap="always")


def test_a_computed_gap_is_known_when_its_last_component_is(run):
    """1: one component is stored too late. 2: one has no storing time, so it is no input."""
    mini = Mini()
    for hadm, stored in ((1, 13.5), (2, None)):
        mini.admit(hadm).trio(hadm, 1, 140).trio(hadm, 6, 138)
        mini.lab(hadm, 4, 139, SODIUM).lab(hadm, 4, 100, CHLORIDE)
        mini.lab(hadm, 4, 20, BICARBONATE, stored=stored)
    mini.trio(1, 30, 131).trio(2, 30, 131, stored=None)
    result = run(mini, compute_gap="always")
    assert result.series(1) == result.series(2) == "20 (0h) -> 18 (5h)"
    assert result.labels(2) == [0, 0, 0], "131 - 100 - 20 = 11: closed, an outcome all the same"


def test_of_several_values_at_one_time_the_one_known_first_is_computed_with(run):
    mini = Mini().admit(1).trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)
    mini.lab(1, 1, 99, SODIUM, stored=6.0).lab(1, 3, 150, SODIUM, stored=3.5)
    assert run(mini, compute_gap="always").series(1) == "20 (0h) -> 30 (2h)"


# --------------------------------------------------------------------------- prediction time


def test_the_prediction_time_is_the_first_value_and_the_window(run):
    """First value at 2 h, so asked at 14 h: what is charted and stored by then, no later."""
    mini = Mini().admit(1, -5.0).gaps(1, (2, 20), (5.5, 18), (13, 16), (13.5, 15), (14.5, 9))
    mini.lab(1, 12.75, 99, stored=14.0).lab(1, 14, 17, stored=14.0).lab(1, 13.25, 98, stored=14.01)
    result = run(mini)
    # 13 is stored at 14 and counts; 13.5 is stored at 14.5 and does not.
    assert result.series(1) == "20 (0h) -> 18 (3.5h) -> 99 (10.75h) -> 16 (11h) -> 17 (12h)"
    assert "19 h since admission" in result.context(1)


def test_equal_times_are_ordered_by_storing_time_and_value_and_are_all_kept(run):
    mini = Mini().admit(1).lab(1, 3, 15).gaps(1, (0, 20)).lab(1, 3, 14).lab(1, 3, 19, stored=3.5)
    assert run(mini.gaps(1, (20, 9))).series(1) == "20 (0h) -> 19 (3h) -> 14 (3h) -> 15 (3h)"


def test_storing_times_decide_which_values_count(run):
    """1: a first value known only at 14 h opens no window. 2: known when charted, not before.

    3: without a storing time a value is no input, but an outcome.
    """
    mini = Mini().admit(1).lab(1, 0, 30, stored=14.0).gaps(1, (3, 20), (6, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20)).lab(2, 3, 18, stored=1.0).lab(2, 13, 5, stored=11.0)
    mini.admit(3).gaps(3, (0, 20), (3, 18)).lab(3, 4, 3, stored=None).lab(3, 20, 9, stored=None)
    result = run(mini)
    assert [result.series(hadm) for hadm in (1, 2, 3)] == ["20 (0h) -> 18 (3h)"] * 3
    assert ", 15 h since admission" in result.context(1)
    assert result.labels(3) == [0, 0, 0]
    counts = result.description["values"]
    assert counts["without a time of storing: no input, outcome alone"] == 2


def test_a_table_without_storing_times_takes_charting_times_and_warns(tmp_path, caplog):
    tables = Mini().admit(1).gaps(1, (0, 20), (12, 18), (30, 9)).tables()
    tables["hosp/labevents"] = tables["hosp/labevents"].drop(columns="storetime")
    result = extracted(write_tables(tmp_path, tables))
    assert result.series(1) == "20 (0h) -> 18 (12h)"
    assert "only values charted by then" in result.description["prediction_time"]
    assert "no column storetime" in caplog.text


@pytest.mark.parametrize(
    ("window_hours", "min_observations", "kept"),
    [(6.0, 2, True), (1.99, 3, False), (2.0, 3, False), (6.0, 3, True)],
)
def test_window_and_fewest_observations_are_respected(window_hours, min_observations, kept, run):
    mini = Mini().admit(1).gaps(1, (0, 20), (1, 19), (5, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20), (0.5, 8), (0.75, 8), (30, 9))  # never empty
    result = run(mini, window_hours=window_hours, min_observations=min_observations)
    assert (1 in result.rows.index) == kept
    assert not kept or result.series(1) == "20 (0h) -> 19 (1h) -> 18 (5h)"


# --------------------------------------------------------------------------- at risk

NOT_AT_RISK = {
    "17 years old": ({"age": 17}, "under 18"),
    "of unknown age": ({"age": None}, "under 18"),
    "dead at the prediction time": ({"end": 13, "death": 13.0}, "died by"),
    "dead in the window, discharge recorded later": ({"end": 60, "death": 9.0}, "died by"),
    "discharged at the prediction time": ({"end": 13}, "discharged by"),
    "death on a later day than the discharge": ({"end": 12, "death": 50.0}, "discharged by"),
    "without an end": ({"end": None}, "no value"),
    "not admitted yet": ({"start": 13.02}, "before the admission"),
}


def test_admissions_not_at_risk_are_left_out_by_the_first_rule_that_applies(run):
    mini = Mini()
    for hadm, (admission, _) in enumerate(NOT_AT_RISK.values(), 10):
        mini.admit(hadm, **admission).settling(hadm)
    result = run(mini.admit(1).settling(1))
    assert list(result.rows.index) == [1]
    removed = result.removed()
    assert sum(removed.values()) == len(NOT_AT_RISK)
    for start in {rule for _, rule in NOT_AT_RISK.values()}:
        (rule,) = [rule for rule in removed if start in rule]
        assert removed[rule] == sum(start == wanted for _, wanted in NOT_AT_RISK.values())


def test_one_minute_decides_at_the_edge_of_risk(run):
    """Asked at 13 h: after a discharge or a death a minute later the patient is at risk."""
    minute = 1 / 60
    mini = Mini().admit(1, 0, 13 + minute).settling(1)
    mini.admit(2, 0, 13 + minute, death=13 + minute).settling(2)
    assert run(mini, outcome=["death"]).rows["label_death"].to_dict() == {1: 0, 2: 1}


YEARS = 24 * 365.25
AGES = {  # anchor age, admission in years from 2150, text, number
    1: (18, 0, "18-year-old woman", 18),
    2: (17, 1.1, "18-year-old", 18),
    3: (40, -2.2, "37-year-old", 37),
    4: (91, 0, "Over 89-year-old woman", 90),
    5: (88, 2.5, "Over 89-year-old", 90),
    6: (91, -2.2, "Over 86-year", 87),
    7: (91, 2.2, "Over 89-year-old", 90),
    8: (89, 0, "89-year-old woman", 89),
    9: (88, 4.5, "Over 89-year-old", 90),
}


def test_the_age_is_that_of_the_year_of_admission_and_at_most_90(run):
    mini = Mini()
    for hadm, (age, years, _, _) in AGES.items():
        hour = round(years * YEARS)
        mini.admit(hadm, hour, hour + 200.0, age=age)
        mini.gaps(hadm, (hour + 1, 20), (hour + 4, 18), (hour + 40, 9))
    result = run(mini)
    for hadm, (_, _, text, number) in AGES.items():
        assert result.context(hadm).startswith(text), hadm
        assert result.rows.loc[hadm, "static_age [years]"] == number


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
    mini = Mini().admit(1, code="E1110").settling(1).admit(2, code="E1101").settling(2)
    with caplog.at_level("INFO"):
        result = run(mini, cohort="dka")
    assert list(result.rows.index) == [1]
    assert result.removed() == {"not coded as diabetic ketoacidosis": 1}
    assert "hindsight" in result.description["definitions"]["cohort"]
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
    result = run(mini, cohort="biochemical", outcome=["death"])
    inside = {name: hadm in result.rows.index for hadm, name in enumerate(BIOCHEMICAL, 1)}
    assert inside == {name: wanted for name, (_, _, wanted) in BIOCHEMICAL.items()}


# --------------------------------------------------------------------------- columns


def test_context_and_static_features_hold_what_is_known_and_nothing_later(run):
    mini = Mini().admit(1, gender="M").settling(1).icu(1, 10, 50).icu(1, 51, 60)
    mini.lab(1, 0.5, 111, SODIUM).lab(1, 0.5, 90, CHLORIDE)  # before the window
    mini.lab(1, 1, 131, SODIUM).lab(1, 6, 140, SODIUM).lab(1, 12.5, 150, SODIUM)
    mini.lab(1, 6, 7.25, PH).lab(1, 7, 300, GLUCOSE).lab(1, 8, 280, 50809)
    mini.lab(1, 6, 40, 51221, unit="%")  # no chemistry
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


UNITS = {
    "Medical Intensive Care Unit (MICU)": {"medical"},
    "Surgical Intensive Care Unit (SICU)": {"surgical"},
    "Medical/Surgical Intensive Care Unit (MICU/SICU)": {"medical", "surgical"},
    "Coronary Care Unit (CCU)": {"cardiac"},
    "Cardiac Vascular Intensive Care Unit (CVICU)": {"cardiac"},
    "Neuro Surgical Intensive Care Unit (Neuro SICU)": {"neuro", "surgical"},
    "Trauma SICU (TSICU)": {"trauma", "surgical"},
    "CCU-CTICU": {"cardiac"},
    "Med-Surg ICU": {"medical", "surgical"},
    "": set(),
}


def test_a_unit_is_of_the_kinds_that_its_name_tells(tmp_path):
    mini = Mini().admit(99).settling(99)
    for hadm in range(1, len(UNITS) + 1):
        mini.admit(hadm).settling(hadm).icu(hadm, 2, 60)
    tables = mini.tables()
    tables["icu/icustays"]["first_careunit"] = list(UNITS)
    rows = extracted(write_tables(tmp_path, tables), ["death"]).rows
    kinds = rows.filter(regex="static_unit_").rename(columns=lambda name: name[12:])
    found = [set(kinds.columns[row == 1]) for row in kinds.to_numpy()]
    assert found == [*UNITS.values(), set()]
    assert rows["static_icu"].tolist() == [1] * len(UNITS) + [0]


def test_sex_is_unknown_where_nobody_recorded_it(run):
    mini = Mini().admit(1, gender="M").settling(1).admit(2, gender="F").settling(2)
    rows = run(mini.admit(3, gender="").settling(3), window_hours=10.5).rows
    assert rows["static_sex_male"].fillna(-1).tolist() == [1, 0, -1]
    assert rows["prediction_hours"].tolist() == [10.5] * 3


def patient():
    """One admission, asked at 13 h, with serum and whole blood glucose."""
    mini = Mini().admit(1, gender="M").settling(1).lab(1, 0.5, 99, GLUCOSE)
    mini.lab(1, 2, 300, GLUCOSE).lab(1, 3, 280, 50809).lab(1, 14, 1, GLUCOSE)
    return mini.lab(1, 5, 7.25, PH).lab(1, 4, 140, SODIUM)


def test_further_series_are_columns_with_name_and_unit(run):
    result = run(patient(), series=("anion gap", "Glucose", "pH", "bicarbonate"))
    row = result.rows.loc[1]
    assert row["clinical_trajectory"] == "20 (0h) -> 18 (3h)"
    assert row["trajectory_glucose [mg/dL]"] == "300 (1h) -> 280 (2h)"
    assert row["trajectory_pH"] == "7.25 (4h)"
    assert row.isna()["trajectory_bicarbonate [mEq/L]"]
    assert row["clinical_context"].endswith("admission, sodium 140 (mEq/L)")
    assert row.filter(like="static_last").dropna().to_dict() == {"static_last_sodium [mEq/L]": 140}
    assert result.description["limits"]["glucose"] == (5.0, 2500.0)


def test_the_first_series_gives_the_prediction_time_and_is_counted(run):
    mini = patient().admit(2).settling(2).lab(2, 2, 90, GLUCOSE)
    result = run(mini, series=("glucose", "anion gap"), outcome=["death"])
    assert result.rows.index.tolist() == [1], "2 has one glucose alone"
    assert result.series(1) == "99 (0h) -> 300 (1.5h) -> 280 (2.5h)"
    assert result.rows.loc[1, "trajectory_anion gap [mEq/L]"] == "20 (0.5h) -> 18 (3.5h)"
    assert result.description["series"] == "Glucose"


def test_each_series_has_the_reference_range_that_most_often_stands_beside_it(run):
    """Ranges in another unit, reversed ones and missing ones do not count; of two ends one may."""
    mini = Mini().admit(1).admit(2).settling(2)
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
    described = run(mini, series=series, outcome=["death"]).description
    assert described["reference"] == (8, 20)
    assert described["references"] == {"creatinine": (0.4, 1.1), "bicarbonate": (22, None)}
    mini.trio(1, 1, 140).trio(1, 3, 138)
    computed = run(mini, outcome=["death"], compute_gap="always").description
    assert computed["reference"] is None, "computed gaps lack potassium"


def test_the_prediction_time_is_rounded_as_the_hours_of_the_series(run):
    mini = patient().lab(1, 11.507, 7.3, PH, stored=11.507)
    rows = run(mini, window_hours=10.508, series=("anion gap", "pH")).rows
    assert rows["trajectory_pH"].tolist() == ["7.25 (4h) -> 7.3 (10.51h)"]
    assert rows["prediction_hours"].tolist() == [10.51]
