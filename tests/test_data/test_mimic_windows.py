"""MIMIC-IV: the prediction time, who is at risk then, and what is known by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medgemma_clinical.data.duck import open_database
from medgemma_clinical.data.mimic.tables import KETOACIDOSIS
from mimic_files import (
    BICARBONATE,
    CHLORIDE,
    EPOCH,
    GAP,
    GLUCOSE,
    PH,
    SODIUM,
    Mini,
    Run,
    extracted,
    write_tables,
)

# --------------------------------------------------------------------------- prediction time


def test_the_prediction_time_is_the_first_value_and_the_window(run: Run) -> None:
    """First value at 2 h, so asked at 14 h: what is charted and stored by then, no later."""
    mini = Mini().admit(1, -5.0).gaps(1, (2, 20), (5.5, 18), (13, 16), (13.5, 15), (14.5, 9))
    mini.lab(1, 12.75, 99, stored=14.0).lab(1, 14, 17, stored=14.0).lab(1, 13.25, 98, stored=14.01)
    result = run(mini)
    # 13 is stored at 14 and counts; 13.5 is stored at 14.5 and does not.
    assert result.series(1) == "20 (0h) -> 18 (3.5h) -> 99 (10.75h) -> 16 (11h) -> 17 (12h)"
    assert "19 h since admission" in result.context(1)


def test_equal_times_are_ordered_by_storing_time_and_value_and_are_all_kept(run: Run) -> None:
    mini = Mini().admit(1).lab(1, 3, 15).gaps(1, (0, 20)).lab(1, 3, 14).lab(1, 3, 19, stored=3.5)
    assert run(mini.gaps(1, (20, 9))).series(1) == "20 (0h) -> 19 (3h) -> 14 (3h) -> 15 (3h)"


def test_storing_times_decide_which_values_count(run: Run) -> None:
    """1: a first value known only at 14 h opens no window. 2: known when charted, not before.

    3: without a storing time a value is no input, but an outcome.
    """
    mini = Mini().admit(1).lab(1, 0, 30, stored=14.0).gaps(1, (3, 20), (6, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20)).lab(2, 3, 18, stored=1.0).lab(2, 13, 5, stored=11.0)
    mini.admit(3).gaps(3, (0, 20), (3, 18)).lab(3, 4, 3, stored=None).lab(3, 20, 9, stored=None)
    result = run(mini)
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert ", 15 h since admission" in result.context(1)
    assert result.series(2) == "20 (0h) -> 18 (3h)"
    assert result.series(3) == "20 (0h) -> 18 (3h)"
    assert result.labels(3) == [0, 0, 0]
    counts = result.description["values"]
    assert counts["without a time of storing: no input, outcome alone"] == 2


def test_a_table_without_storing_times_takes_charting_times_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
def test_window_and_fewest_observations_are_respected(
    window_hours: float, min_observations: int, kept: bool, run: Run
) -> None:
    mini = Mini().admit(1).gaps(1, (0, 20), (1, 19), (5, 18), (30, 9))
    mini.admit(2).gaps(2, (0, 20), (0.5, 8), (0.75, 8), (30, 9))  # never empty
    result = run(mini, window_hours=window_hours, min_observations=min_observations)
    assert (1 in result.rows.index) == kept
    assert not kept or result.series(1) == "20 (0h) -> 19 (1h) -> 18 (5h)"


# --------------------------------------------------------------------------- at risk


NOT_AT_RISK: dict[str, tuple[dict[str, Any], str]] = {
    "17 years old": ({"age": 17}, "under 18"),
    "of unknown age": ({"age": None}, "under 18"),
    "dead at the prediction time": ({"end": 13, "death": 13.0}, "died by"),
    "dead in the window, discharge recorded later": ({"end": 60, "death": 9.0}, "died by"),
    "discharged at the prediction time": ({"end": 13}, "discharged by"),
    "death on a later day than the discharge": ({"end": 12, "death": 50.0}, "discharged by"),
    "without an end": ({"end": None}, "no value"),
    "not admitted yet": ({"start": 13.02}, "before the admission"),
}


def test_admissions_not_at_risk_are_left_out_by_the_first_rule_that_applies(run: Run) -> None:
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


def test_one_minute_decides_at_the_edge_of_risk(run: Run) -> None:
    """Asked at 13 h: after a discharge or a death a minute later the patient is at risk."""
    minute = 1 / 60
    mini = Mini().admit(1, 0, 13 + minute).settling(1)
    mini.admit(2, 0, 13 + minute, death=13 + minute).settling(2)
    assert run(mini, outcome=["death"]).rows["label_death"].to_dict() == {1: 0, 2: 1}


YEARS = 24 * 365.25
AGES: dict[int, tuple[float, float, str]] = {  # anchor age, admission in years from 2150, text
    1: (18, 0, "18-year-old woman"),
    2: (17, 1.1, "18-year-old"),
    3: (40, -2.2, "37-year-old"),
    4: (91, 0, "Over 89-year-old woman"),
    5: (88, 2.5, "Over 89-year-old"),
    6: (91, -2.2, "Over 86-year"),
    7: (91, 2.2, "Over 89-year-old"),
    8: (89, 0, "89-year-old woman"),
}


def test_the_age_is_that_of_the_year_of_admission(run: Run) -> None:
    mini = Mini()
    for hadm, (age, years, _) in AGES.items():
        hour = round(years * YEARS)
        mini.admit(hadm, hour, hour + 200.0, age=age)
        mini.gaps(hadm, (hour + 1, 20), (hour + 4, 18), (hour + 40, 9))
    result = run(mini)
    for hadm, (_, _, text) in AGES.items():
        assert result.context(hadm).startswith(text), hadm
    assert pd.Timestamp("2150-01-01") == EPOCH


# --------------------------------------------------------------------------- cohorts


CODES = [
    *((c, 9, True) for c in ("25010", "25011", "25012", "25013", "250.13 ")),
    *((c, 9, False) for c in ("25000", "25020", "2510", "E1010", "2761")),
    *((c, 10, True) for c in ("E0810", "E0911", "E1010", "E10.11", "E1110", "e1111", "E1310")),
    *((c, 10, False) for c in ("E0800", "E0801", "E1100", "E1101", "E1300", "E1065", "E1210")),
    *((c, 10, False) for c in ("25010", "E872", "R7309")),
]


def test_the_codes_of_ketoacidosis(tmp_path: Path) -> None:
    codes, versions, inside = zip(*CODES, strict=True)
    cells = pd.DataFrame(
        {
            "hadm_id": range(len(CODES)),
            "icd_code": codes,
            "icd_version": [float(version) for version in versions],
        }
    )
    with open_database(tmp_path / "out.csv", "100MB", 1) as database:
        database.add("codes", cells)
        kept = database.frame(f"FROM codes WHERE {KETOACIDOSIS} ORDER BY hadm_id")
    assert kept["hadm_id"].tolist() == [k for k, wanted in enumerate(inside) if wanted]


def test_the_coded_cohort_says_that_it_is_chosen_in_hindsight(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    mini = Mini().admit(1, code="E1110").settling(1).admit(2, code="E1101").settling(2)
    result = run(mini, cohort="dka")
    assert list(result.rows.index) == [1]
    assert result.removed() == {"not coded as diabetic ketoacidosis": 1}
    assert "hindsight" in result.description["definitions"]["cohort"]
    assert "hindsight" in caplog.text


SICK: dict[int, float | None] = {GLUCOSE: 251.0, BICARBONATE: 18.0, GAP: 12.5}
BIOCHEMICAL: dict[str, tuple[dict[int, float | None], float, bool]] = {
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


def test_the_biochemical_cohort_is_known_within_the_window(run: Run) -> None:
    mini = Mini()
    for hadm, (changed, hour, _) in enumerate(BIOCHEMICAL.values(), 1):
        mini.admit(hadm, code="4019", version=9).gaps(hadm, (0, 11), (1, 11), (60, 9))
        for item, value in (SICK | changed).items():
            mini.lab(hadm, hour, value, item)
    result = run(mini, cohort="biochemical", outcome=["death"])
    inside = {name: hadm in result.rows.index for hadm, name in enumerate(BIOCHEMICAL, 1)}
    assert inside == {name: wanted for name, (_, _, wanted) in BIOCHEMICAL.items()}


# --------------------------------------------------------------------------- context


def test_the_context_holds_what_is_known_and_nothing_later(run: Run) -> None:
    mini = Mini().admit(1, gender="M").settling(1).icu(1, 10, 50).icu(1, 51, 60)
    mini.lab(1, 0.5, 111, SODIUM).lab(1, 0.5, 90, CHLORIDE)  # before the window
    mini.lab(1, 1, 131, SODIUM).lab(1, 6, 140, SODIUM).lab(1, 12.5, 150, SODIUM)
    mini.lab(1, 6, 7.25, PH).lab(1, 7, 300, GLUCOSE).lab(1, 8, 280, 50809)
    mini.lab(1, 6, 40, 51221, unit="%")  # no chemistry
    assert run(mini).context(1) == (
        "50-year-old man, Medical Intensive Care Unit (MICU), 13 h since admission, "
        "glucose 280 (mg/dL), pH 7.25, sodium 140 (mEq/L)"
    )
