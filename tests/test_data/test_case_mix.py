"""Tests of subgroups and case mix."""

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.case_mix import AGE_BANDS, UNKNOWN, banded


def test_subgroups_are_bands_and_words_found_in_contexts():
    contexts = [
        "68-year-old man",
        "aged 17, female",
        "Woman, 80 years old",
        "unit 4",
        "man or woman",
    ]
    series = ["1 (0h)", "1 (0h) -> 2 (1h)", "1 (0h) -> 2 (1h) -> 3 (2h) -> 4 (3h)"] + ["1 (0h)"] * 2
    table = pd.DataFrame({"clinical_trajectory": series, "label_escalation": [0, 1, 0, 1, 0]})
    groups = MIMICtrajectoryDataset(table.assign(clinical_context=contexts)).subgroups()
    assert groups["observations"].tolist() == ["1", "2", "3 to 4", "1", "1"]
    assert groups["age"].tolist() == ["60 to 74", "under 18", "75 or older", UNKNOWN, UNKNOWN]
    assert groups["sex"].tolist() == ["man", "woman", "woman", UNKNOWN, UNKNOWN]
    assert list(MIMICtrajectoryDataset(table).subgroups()) == ["observations"]
    edges = np.array([17.99, 18, 39.9, 40, 75, np.nan])
    expected = ["under 18", "18 to 39", "18 to 39", "40 to 59", "75 or older", UNKNOWN]
    assert banded(edges, AGE_BANDS).tolist() == expected


def test_case_mix_counts_known_values_only():
    table = pd.DataFrame(
        {
            "subject_id": ["a", "a", "b", "c"],
            "clinical_trajectory": [
                "1 (0h)",
                "1 (0h) -> 2 (1h)",
                "1 (0h) -> 2 (1h) -> 3 (2h)",
                "1 (0h)",
            ],
            "label_escalation": [1, 0, 0, 0],
            "clinical_context": ["50-year-old man", "60-year-old man", "70-year-old woman", ""],
        }
    )
    dataset = MIMICtrajectoryDataset(table)
    dataset.labels[3] = np.nan
    quartiles = {"observations_q1": 1, "observations_median": 1.5, "observations_q3": 2.25}
    known = {"age_q1": 55, "age_median": 60, "age_q3": 65, "prevalence": 1 / 3, "women": 1 / 3}
    counts = {"rows": 4, "patients": 3}
    expected = {**counts, **quartiles, **known}
    assert dataset.case_mix(np.arange(4)) == pytest.approx(expected)
    assert set(dataset.case_mix(np.array([3]))) == {*counts, *quartiles}
