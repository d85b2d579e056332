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

HEMATOCRIT, WHOLE_BLOOD_GLUCOSE = 51221, 50809
DEATH = {"outcome": ["death"]}
COMPUTED = {"compute_gap": "always"}

# --------------------------------------------------------------------------- values of a series


def one():
    return Mini().admit(1)


def two_trios():
    return one().trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)


def apart_and_overlapping():
    """Patient 10001 has two admissions apart; 10003 three, of which two overlap."""
    mini = Mini().admit(1, 0, 100).admit(2, 200, 300, subject=10_001)
    for hour in (0, 3, 100, 150, 200, 202, 301):
        mini.lab(1, hour, hour / 10, named=False)
    mini.admit(3, 0, 100).admit(4, 50, 300, subject=10_003).admit(5, 10, 20, subject=10_003)
    for hour in (1, 4, 15, 20, 30, 60, 100, 110, 120):
        mini.lab(3, hour, hour, named=False)
    return mini


def around_the_admission():
    """A value of the emergency department precedes the admission that it names."""
    mini = Mini()
    for hadm, hour in enumerate((-24.0, -24.02, 200.02), 1):
        mini.admit(hadm).lab(hadm, hour, 25).gaps(hadm, (0, 20), (3, 18), (30, 9))
    return mini


def stored_late_or_never():
    """1: a first value known only at 14 h opens no window. 2: known when charted, not before."""
    mini = one().lab(1, 0, 30, stored=14.0).gaps(1, (3, 20), (6, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20)).lab(2, 3, 18, stored=1.0).lab(2, 13, 5, stored=11.0)
    mini.admit(3).gaps(3, (0, 20), (3, 18)).lab(3, 4, 3, stored=None)
    return mini.lab(3, 20, 9, stored=None)


def gaps_of_late_components():
    """1: one component is stored too late. 2: one has no storing time, so it is no input."""
    mini = Mini()
    for hadm, stored in ((1, 13.5), (2, None)):
        mini.admit(hadm).trio(hadm, 1, 140).trio(hadm, 6, 138)
        mini.lab(hadm, 4, 139, SODIUM).lab(hadm, 4, 100, CHLORIDE)
        mini.lab(hadm, 4, 20, BICARBONATE, stored=stored)
    return mini.trio(1, 30, 131).trio(2, 30, 131, stored=None)


PLAIN = "20 (0h) -> 18 (3h)"
SERIES = {  # hospital, request, series by admission, some counts of values
    "without hadm_id: of the one admission around it": (
        apart_and_overlapping(),
        DEATH | {"window_hours": 30.0},
        {
            1: "0 (0h) -> 0.3 (3h)",
            2: "20 (0h) -> 20.2 (2h)",
            3: "1 (0h) -> 4 (3h) -> 30 (29h)",
            4: "110 (0h) -> 120 (10h)",
        },
        {
            "without hadm_id, within one admission: taken": 5 + 5,
            "without hadm_id, within none or several": 2 + 4,
        },
    ),
    "never of another patient": (
        one().settling(1).admit(2).settling(2).lab(2, 5, 77, hadm_id=1).lab(2, 6, 66, hadm_id=99),
        {},
        {1: PLAIN, 2: PLAIN},
        {"whose hadm_id is no admission of the patient": 2},
    ),
    "named: from a day before the admission to its end": (
        around_the_admission(),
        DEATH | {"window_hours": 25.0},
        {1: "25 (0h) -> 20 (24h)", 2: PLAIN, 3: PLAIN},
        {"outside the admission that they name": 2},
    ),
    "no number": (
        one().settling(1).lab(1, 2, None).lab(1, 3, "inf"),
        {},
        {1: PLAIN},
        {"without a number": 2},
    ),
    "stored late or never": (
        stored_late_or_never(),
        {},
        dict.fromkeys((1, 2, 3), PLAIN),
        {"without a time of storing: no input, outcome alone": 2},
    ),
    # 12 is stored at 14 and counts; 13.5 is stored at 14.5 and does not.
    "asked at 14 h": (
        one().gaps(1, (2, 20), (5.5, 18), (13, 16), (13.5, 15), (14.5, 9))
        .lab(1, 12.75, 99, stored=14.0).lab(1, 14, 17, stored=14.0).lab(1, 13.25, 98, stored=14.01),
        {},
        {1: "20 (0h) -> 18 (3.5h) -> 99 (10.75h) -> 16 (11h) -> 17 (12h)"},
        {},
    ),
    "equal times: by storing time and value": (
        one().lab(1, 3, 15).gaps(1, (0, 20), (3, 14), (20, 9)).lab(1, 3, 19, stored=3.5),
        {},
        {1: "20 (0h) -> 19 (3h) -> 14 (3h) -> 15 (3h)"},
        {},
    ),
    "a computed gap: with the first known of equal times": (
        two_trios().lab(1, 1, 99, SODIUM, stored=6.0).lab(1, 3, 150, SODIUM, stored=3.5),
        COMPUTED,
        {1: "20 (0h) -> 30 (2h)"},
        {},
    ),
    "a computed gap: known when its last component is": (
        gaps_of_late_components(),
        COMPUTED,
        {1: "20 (0h) -> 18 (5h)", 2: "20 (0h) -> 18 (5h)"},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERIES)
def test_which_values_make_a_series(name, run):
    mini, request, series, counts = SERIES[name]
    result = run(mini, **request)
    assert result.rows["clinical_trajectory"].to_dict() == series
    assert counts.items() <= result.description["values"].items()
    assert result.rows["label_unresolved"].eq(0).all() or "outcome" in request


def test_a_table_without_storing_times_takes_charting_times_and_warns(tmp_path, caplog):
    tables = one().gaps(1, (0, 20), (12, 18), (30, 9)).tables()
    tables["hosp/labevents"] = tables["hosp/labevents"].drop(columns="storetime")
    result = extracted(write_tables(tmp_path, tables))
    assert result.series(1) == "20 (0h) -> 18 (12h)"
    assert "only values charted by then" in result.description["prediction_time"]
    assert "no column storetime" in caplog.text


@pytest.mark.parametrize(
    ("window_hours", "min_observations", "kept"),
    [(6.0, 3, True), (1.99, 3, False), (2.0, 3, False)],
)
def test_window_and_fewest_observations_are_respected(window_hours, min_observations, kept, run):
    mini = one().gaps(1, (0, 20), (1, 19), (5, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20), (0.5, 8), (0.75, 8), (30, 9))  # never empty
    result = run(mini, window_hours=window_hours, min_observations=min_observations)
    assert result.rows.index.tolist() == [1, 2][not kept :]


# --------------------------------------------------------------------------- items and units


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
    assert result.labels(1) == [0, 0, 0], "131 - 100 - 20 = 11"
    assert not result.rows.filter(like="static_last_anion").size
    described = [result.description[key] for key in ("series", "unit")]
    assert described == ["Anion gap without potassium", "mEq/L"]
    other = run(mini, item="bicarbonate", **COMPUTED)
    assert other.rows.loc[1, "static_last_anion gap without potassium [mEq/L]"] == 18.1


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
EDGE = 13 + 1 / 60


def test_admissions_not_at_risk_are_left_out_by_the_first_rule_that_applies(run):
    """Asked at 13 h: after a discharge or a death a minute later the patient is at risk."""
    mini = Mini().admit(1, 0, EDGE).settling(1).admit(2, 0, EDGE, death=EDGE).settling(2)
    for hadm, (admission, _) in enumerate(NOT_AT_RISK.values(), 10):
        mini.admit(hadm, **admission).settling(hadm)
    result = run(mini, **DEATH)
    assert result.rows["label_death"].to_dict() == {1: 0, 2: 1}
    removed = result.removed()
    assert sum(removed.values()) == len(NOT_AT_RISK)
    for start in {rule for _, rule in NOT_AT_RISK.values()}:
        (rule,) = [rule for rule in removed if start in rule]
        assert removed[rule] == sum(start == wanted for _, wanted in NOT_AT_RISK.values())


AGES = {  # anchor age, admission in years from 2150, text, number
    1: (18, 0, "18-year-old woman", 18),
    2: (17, 1.1, "18-year-old", 18),
    3: (40, -2.2, "37-year-old", 37),
    4: (91, 0, "Over 89-year-old woman", 90),
    5: (88, 4.5, "Over 89-year-old", 90),
    6: (91, -2.2, "Over 86-year", 87),
    7: (91, 2.2, "Over 89-year-old", 90),
    8: (89, 0, "89-year-old woman", 89),
}


def test_the_age_is_that_of_the_year_of_admission_and_at_most_90(run):
    mini = Mini()
    for hadm, (age, years, _, _) in AGES.items():
        hour = round(years * 24 * 365.25)
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


UNITS = {
    "Medical Intensive Care Unit (MICU)": {"medical"},
    "Surgical Intensive Care Unit (SICU)": {"surgical"},
    "Coronary Care Unit (CCU)": {"cardiac"},
    "Cardiac Vascular Intensive Care Unit (CVICU)": {"cardiac"},
    "Neuro Surgical Intensive Care Unit (Neuro SICU)": {"neuro", "surgical"},
    "Trauma SICU (TSICU)": {"trauma", "surgical"},
    "CCU-CTICU": {"cardiac"},
    "Med-Surg ICU": {"medical", "surgical"},
    "": set(),
}


def test_kinds_of_units_and_sexes_where_they_are_known(tmp_path):
    mini = Mini().admit(99, gender="M").settling(99)
    for hadm in range(1, len(UNITS) + 1):
        mini.admit(hadm, gender="" if hadm == 1 else "F").settling(hadm).icu(hadm, 2, 60)
    tables = mini.tables()
    tables["icu/icustays"]["first_careunit"] = list(UNITS)
    rows = extracted(write_tables(tmp_path, tables), ["death"]).rows
    kinds = rows.filter(regex="static_unit_").rename(columns=lambda name: name[12:])
    found = [set(kinds.columns[row == 1]) for row in kinds.to_numpy()]
    assert found == [*UNITS.values(), set()]
    assert rows["static_icu"].tolist() == [1] * len(UNITS) + [0]
    assert rows["static_sex_male"].fillna(-1).tolist() == [-1] + [0] * (len(UNITS) - 1) + [1]


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
