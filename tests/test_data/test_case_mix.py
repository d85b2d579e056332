"""Tests of subgroups and case mix."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.case_mix import AGE_BANDS, UNKNOWN, banded, join_bands
from medgemma_clinical.evaluation.cohort import subgroup_rows


def test_subgroups_are_bands_and_words_found_in_contexts() -> None:
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


def test_case_mix_counts_known_values_only() -> None:
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
    mix = MIMICtrajectoryDataset(table).case_mix(np.arange(3), 0)
    assert mix == pytest.approx(
        {
            "rows": 3,
            "patients": 2,
            "observations_q1": 1,
            "observations_median": 2,
            "observations_q3": 3,
            "age_q1": 50,
            "age_median": 60,
            "age_q3": 70,
            "prevalence": 1 / 3,
            "women": 1 / 3,
        }
    )
    assert set(MIMICtrajectoryDataset(table).case_mix(np.array([3]), 0)) == {
        *("rows", "patients", "prevalence"),
        *("observations_q1", "observations_median", "observations_q3"),
    }


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["under 18", "18 to 39"], "under 40"),
        (["under 18", "18 to 39", "40 to 59"], "under 60"),
        (["18 to 39", "40 to 59"], "18 to 59"),
        (["60 to 74", "75 or older"], "60 or older"),
        ([*AGE_BANDS], "known"),
        ([*AGE_BANDS, UNKNOWN], "known or not known"),
        (["60 to 74", "75 or older", UNKNOWN], "60 or older or not known"),
        (["75 or older", UNKNOWN], "75 or older or not known"),
        (["1", "2"], "1 to 2"),
        (["2", "3 to 4"], "2 to 4"),
        (["10 to 19", "20 or more"], "10 or more"),
        (["18 to 39"], "18 to 39"),
        (["woman", "man"], "woman or man"),
        (["man", UNKNOWN], "man or not known"),
    ],
)
def test_joined_bands_have_one_name(names: list[str], joined: str) -> None:
    assert join_bands(names) == joined


@pytest.mark.parametrize("unknown", [0, 5, 20])
@pytest.mark.parametrize("women", [3, 30])
def test_case_mix_and_subgroups_tell_the_same_of_women(women: int, unknown: int) -> None:
    """A few of unknown sex join the men in both; a few women are told of in neither."""
    sexes = ["woman"] * women + ["man"] * 40 + [""] * unknown
    table = pd.DataFrame({"clinical_trajectory": ["1 (0h)"] * len(sexes)}).assign(
        label_escalation=0, clinical_context=[f"50-year-old {sex}" for sex in sexes]
    )
    dataset = MIMICtrajectoryDataset(table)
    labels, groups = np.zeros(len(sexes)), np.arange(len(sexes))
    found = subgroup_rows(dataset.subgroups(), labels, groups, 11)
    shown = {name: len(rows) for name, rows in found.items() if name.startswith("sex: woman")}
    mix = dataset.case_mix(groups, 11)
    if women == 3:
        assert "women" not in mix
        assert "sex: woman" not in shown
    else:
        among = len(sexes) - (unknown if unknown == 20 else 0)
        assert mix["women"] == pytest.approx(shown["sex: woman"] / among)


def test_no_quartile_and_no_share_of_a_few_patients_is_told() -> None:
    rows = 60
    sexes = ["woman"] * 30 + ["man"] * 29 + [""]
    table = pd.DataFrame(
        {
            "clinical_trajectory": ["1 (0h)"] * rows,
            "label_escalation": [0, 1] * 30,
            "clinical_context": [f"{20 + k}-year-old {sex}" for k, sex in enumerate(sexes)],
        }
    )
    mix = MIMICtrajectoryDataset(table).case_mix(np.arange(rows), 11)
    assert mix["women"] == 0.5, "of all rows: of 59 with a known sex it would tell of the one"
    assert (mix["age_q1"], mix["age_median"], mix["age_q3"]) == (34, 49, 64), "values that occur"
    few = MIMICtrajectoryDataset(table).case_mix(np.arange(43), 11)
    assert not [name for name in few if name.startswith("age")]
    assert "age_median" in MIMICtrajectoryDataset(table).case_mix(np.arange(44), 11)
