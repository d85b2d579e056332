"""MIMIC-IV: whose a value is, its item and unit, and the computed anion gap."""

from __future__ import annotations

from typing import Any

import pytest

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
    Run,
)

HEMATOCRIT = 51221


# --------------------------------------------------------------------------- whose value it is


def test_a_value_without_hadm_id_belongs_to_the_one_admission_around_it(run: Run) -> None:
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


def test_a_value_is_never_taken_from_another_patient(run: Run) -> None:
    mini = Mini().admit(1).settling(1).admit(2).settling(2)
    result = run(mini.lab(2, 5, 77, hadm_id=1).lab(2, 6, 66, hadm_id=99))
    assert result.series(1) == result.series(2) == "20 (0h) -> 18 (3h)"
    assert result.description["values"]["whose hadm_id is no admission of the patient"] == 2


def test_a_named_admission_takes_values_from_a_day_before_it_to_its_end(run: Run) -> None:
    """A value of the emergency department precedes the admission that it names."""
    mini = Mini()
    for hadm, hour in enumerate((-24.0, -24.02, 200.02), 1):
        mini.admit(hadm).lab(hadm, hour, 25).gaps(hadm, (0, 20), (3, 18), (30, 9))
    result = run(mini, window_hours=25.0, outcome=["death"])
    starts = [result.series(hadm).startswith("25 (0h)") for hadm in (1, 2, 3)]
    assert starts == [True, False, False]
    assert result.description["values"]["outside the admission that they name"] == 2


def test_two_admissions_of_a_patient_are_two_rows(run: Run) -> None:
    mini = Mini().admit(1, subject=7).settling(1).admit(2, 400, 600, subject=7)
    result = run(mini.gaps(2, (401, 16), (402, 15), (450, 15)))
    assert result.rows["subject_id"].tolist() == [7, 7]
    assert result.rows["label_escalation"].tolist() == [0, 1]


def test_a_value_that_is_no_number_is_left_out(run: Run) -> None:
    infinite: Any = "inf"
    result = run(Mini().admit(1).settling(1).lab(1, 2, None).lab(1, 3, infinite))
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert result.description["values"]["without a number"] == 2


# --------------------------------------------------------------------------- items and units


def test_an_item_may_be_named_or_numbered(run: Run) -> None:
    mini = Mini().admit(1).settling(1).lab(1, 2, 15, BICARBONATE).lab(1, 3, 16, BICARBONATE)
    by_name, by_number = run(mini, item="bicarbonate"), run(mini, item="50882")
    assert by_name.series(1) == by_number.series(1) == "15 (0h) -> 16 (1h)"
    description = by_name.description
    assert (description["series"], description["unit"]) == ("Bicarbonate", "mEq/L")
    assert description["plausible"] == (3.0, 60.0)
    assert "anion gap 18 (mEq/L)" in by_name.context(1)
    assert "bicarbonate" not in by_name.context(1)


def test_an_item_may_have_no_unit_or_be_no_known_analyte(run: Run) -> None:
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
def test_an_item_that_is_unknown_ambiguous_or_never_measured_is_refused(
    item: str, problem: str, run: Run
) -> None:
    with pytest.raises(InputError, match=problem):
        run(Mini().admit(1).settling(1), item=item)


def test_known_units_are_converted(run: Run) -> None:
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


def test_other_chemistry_in_an_unknown_unit_is_left_out_and_counted(run: Run) -> None:
    mini = Mini().admit(1).settling(1).lab(1, 2, 140, SODIUM, unit="g/L")
    mini.lab(1, 3, 8, PH, unit="").lab(1, 4, 100, CHLORIDE, unit="")
    result = run(mini)
    assert result.context(1).endswith("admission, pH 8")
    assert result.description["values"]["of sodium in no unit or an unknown one"] == 1


def test_a_series_in_units_that_nothing_converts_is_refused(run: Run) -> None:
    mini = Mini().admit(1).settling(1).lab(1, 2, 40, HEMATOCRIT, unit="%")
    mini.lab(1, 3, 40, HEMATOCRIT, unit="g/L")
    with pytest.raises(InputError, match="values in '%', 'g/L': nothing converts them"):
        run(mini, item="51221")
    with pytest.raises(InputError, match="50868 has values in 'g/L', 'mEq/L': known are"):
        run(mini.lab(1, 2, 20, unit="g/L"))


# --------------------------------------------------------------------------- computed gaps


def test_a_gap_is_computed_where_the_laboratory_reports_none(run: Run) -> None:
    mini = Mini().admit(1)
    for hour, sodium in ((1, 140.0), (3, 138.1), (30, 131.0)):
        mini.trio(1, hour, sodium)
    mini.lab(1, 5, 150, SODIUM).lab(1, 5, 100, CHLORIDE)  # no bicarbonate: no gap
    mini.admit(2).settling(2).trio(2, 2, 150.0)
    assert list(run(mini).rows.index) == [2]
    result = run(mini, compute_gap="missing")
    assert result.series(1) == "20 (0h) -> 18.1 (2h)"
    assert result.labels(1) == [0, 0, 0]
    assert result.series(2) == "20 (0h) -> 18 (3h)", "a series never mixes both"
    assert result.description["rows"]["computed_gaps"] == 1


def test_every_gap_can_be_computed(run: Run) -> None:
    """A reported one is then no input and no outcome, whenever it is drawn."""
    mini = Mini().admit(1).trio(1, 2, 140).trio(1, 5, 138).trio(1, 30, 131).settling(1)
    mini.admit(2).settling(2).gaps(1, (50, 30))
    result = run(mini, compute_gap="always")
    assert result.rows.index.tolist() == [1]
    assert result.series(1) == "20 (0h) -> 18 (3h)"
    assert result.labels(1) == [0, 0, 0], "131 - 100 - 20 = 11"
    assert "anion gap" not in result.context(1)
    assert "without potassium" in result.description["definitions"]["anion_gap"]
    assert result.description["series"] == "Anion gap without potassium"
    assert run(mini, compute_gap="missing").labels(1) == [0, 0, 1]
    other = run(mini, compute_gap="always", item="bicarbonate")
    assert "anion gap 18 (mEq/L)" in other.context(1)


def test_a_computed_series_has_the_unit_of_its_components(run: Run) -> None:
    mini = Mini().admit(1).trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)
    mini.lab(1, 2, 20, GAP, unit="mg/dL")
    assert run(mini, compute_gap="always").description["unit"] == "mEq/L"
    mini.lab(1, 2, 20, SODIUM, unit="mg/dL")
    with pytest.raises(InputError, match="item 50983 has values in 'mEq/L', 'mg/dL'"):
        run(mini, compute_gap="always")


def test_a_computed_gap_is_known_when_its_last_component_is(run: Run) -> None:
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


def test_of_several_values_at_one_time_the_one_known_first_is_computed_with(run: Run) -> None:
    mini = Mini().admit(1).trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)
    mini.lab(1, 1, 99, SODIUM, stored=6.0).lab(1, 3, 150, SODIUM, stored=3.5)
    assert run(mini, compute_gap="always").series(1) == "20 (0h) -> 30 (2h)"


def test_another_series_has_computed_gaps_beside_it_where_none_is_reported_in_time(
    run: Run,
) -> None:
    """1: never reported. 2: reported after the prediction time, by a wrong storing time before."""
    mini = Mini()
    for hadm in (1, 2):
        mini.admit(hadm).trio(hadm, 1, 140).trio(hadm, 3, 138).trio(hadm, 30, 131)
    mini.lab(2, 20, 25, stored=2.0)
    result = run(mini, compute_gap="missing", item="bicarbonate")
    assert "anion gap 18 (mEq/L)" in result.context(1)
    assert result.context(2) == result.context(1)


def test_a_reported_gap_after_the_prediction_time_does_not_change_the_computed_series(
    run: Run,
) -> None:
    mini = Mini().admit(1).trio(1, 1, 140).trio(1, 3, 138).trio(1, 30, 131)
    request: Any = {"compute_gap": "missing", "outcome": ["death"]}
    before = run(mini, **request)
    assert run(mini.lab(1, 12.5, 25).gaps(1, (14, 24)), **request).inputs() == before.inputs()
    assert run(mini.lab(1, 11, 23), **request).series(1) == "23 (0h) -> 25 (1.5h) -> 24 (3h)"
