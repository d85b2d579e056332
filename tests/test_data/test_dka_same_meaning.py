"""Rows to score: which series of a DataFrame is the checkpoint's, and what contradicts it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from medgemma_clinical.data.dka.description import Description
from medgemma_clinical.data.dka.same_meaning import check_same_meaning, described_by
from medgemma_clinical.files import InputError

CONFIG: dict[str, Any] = {
    "features": ["Lactate", "pH"],
    "units": ["mmol/L", ""],
    "inputs": {"static": [], "prediction_time": False},
    "outcome": "Death",
    "question": "Will the patient die?",
    "read_options": {"max_len": 64, "label_column": "label_escalation"},
}


def table(*columns: str) -> pd.DataFrame:
    return pd.DataFrame({name: ["1 (0h)"] for name in ("clinical_trajectory", *columns)})


@pytest.mark.parametrize(
    ("columns", "series", "unit"),
    [
        (("trajectory_pH",), "Lactate", "mmol/L"),
        (("trajectory_lactate [mmol/L]",), "pH", ""),
        (("trajectory_pH", "trajectory_Lactate [mmol/L]"), "Anion gap", "mEq/L"),
    ],
)
def test_the_main_column_is_the_series_without_a_column_of_its_own(
    columns: tuple[str, ...], series: str, unit: str
) -> None:
    rows = table(*columns)
    found = described_by(CONFIG, rows)
    assert (found.series, found.unit) == (series, unit)
    assert found.for_label("label_escalation").outcome == "Death"
    check_same_meaning(rows, found, CONFIG, "DataFrame")


def test_another_series_unit_or_outcome_is_refused() -> None:
    lactate = Description(series="Lactate", unit="mmol/L", outcome="Death")
    for rows, words in (
        (table(), "the checkpoint reads pH, the file holds Lactate"),
        (table("trajectory_pH [kPa]"), "reads pH in no unit, the file has kPa"),
    ):
        with pytest.raises(InputError, match=words):
            check_same_meaning(rows, lactate, CONFIG, "DataFrame")
    other = Description(series="Lactate", unit="mmol/L", outcome="Discharge")
    with pytest.raises(InputError, match=r"predicts Death, the file's outcome .* is Discharge"):
        check_same_meaning(table("trajectory_pH"), other, CONFIG, "DataFrame")
