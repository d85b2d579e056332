"""Subgroups and case mix, by static features of the same names in every data set."""

from pathlib import Path

import numpy as np
import pytest

from medgemma_clinical.data.distributions import row_medians
from medgemma_clinical.data.trajectories import UNKNOWN
from medgemma_clinical.evaluation.demographics import (
    AGE_EDGES,
    banded,
    demographic_bands,
    demographics,
)
from medgemma_clinical.evaluation.topics.cohort import case_mix
from srtr_dataset import SRTRTrajectoryDataset
from trajectories import dataset_of

SRTR = Path(__file__).parents[1] / "data" / "srtr_saf"
CELLS = [" -> ".join(f"1 ({h}h)" for h in range(n)) for n in (1, 2, 4, 20, 7)]


@pytest.mark.parametrize("age", ["static_age [years]", "static_age"])
def test_subgroups_are_bands_of_static_features_without_any_context(age):
    columns = {age: [68, 17, 80, np.nan, 40], "static_sex_male": [1, 0, 0, np.nan, 1]}
    groups = demographic_bands(demographics(dataset_of(CELLS, **columns)))
    assert groups["observations"].tolist() == ["1", "2", "3 to 4", "20 or more", "5 to 9"]
    ages = ["60 to 74", "under 18", "75 or older", UNKNOWN, "40 to 59"]
    assert groups["age"].tolist() == ages
    assert groups["sex"].tolist() == ["man", "woman", "woman", UNKNOWN, "man"]
    context = {"clinical_context": ["68-year-old man"] * 5}
    assert list(demographic_bands(demographics(dataset_of(CELLS, **context)))) == ["observations"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"sex w": [1, 0, np.nan]}, ["woman", "man", UNKNOWN]),
        ({"Geschlecht weiblich": [1, 0, 0]}, ["woman", "man", "man"]),
        ({"gender_männlich": [1, 0, 0]}, ["man", "woman", "woman"]),
        ({"sex d": [0, 0, 1], "sex m": [0, 1, 0], "sex w": [1, 0, 0]}, ["woman", "man", "d"]),
        ({"sex_divers": [0, 0, 1], "sex_f": [1, 0, 0]}, ["woman", "man", "divers"]),
        ({"female": [1, 0, 0]}, ["woman", "man", "man"]),
        ({"m": [1, 0, 0]}, [UNKNOWN] * 3),
        ({"sex m": [1, 0, 0], "sex w": [0, 1, 0]}, ["man", "woman", UNKNOWN]),
        ({"sex not known": [0, 0, 1], "sex female": [1, 0, 0]}, ["woman", "man", UNKNOWN]),
        ({"sex": [1, 2, 2], "sex hormone": [3, 4, 5]}, [UNKNOWN] * 3),
    ],
)
def test_a_column_of_each_sex_is_read_by_its_word(columns, expected):
    names = {f"static_{name}": values for name, values in columns.items()}
    rows = demographics(dataset_of(CELLS[:3], **names))
    assert rows["sex"].tolist() == expected
    assert rows["sex"].cat.categories[-1] == UNKNOWN


def test_bands_begin_at_their_edges():
    edges = np.array([17.99, 18, 39.9, 40, 75, np.nan])
    expected = ["under 18", "18 to 39", "18 to 39", "40 to 59", "75 or older", UNKNOWN]
    bands = banded(edges, AGE_EDGES, "under 18", "older")
    assert bands.tolist() == expected
    assert list(bands.categories) == [*dict.fromkeys(expected[:4]), "60 to 74", *expected[4:]]


def test_case_mix_counts_known_values_only():
    columns = {"subject_id": list("abcd"), "label_escalation": [1, 0, 0, 0]}
    columns |= {"static_age": [50, 60, 70, None], "static_sex_male": [1, 1, 0, None]}
    dataset = dataset_of([CELLS[0], CELLS[1], "1 (0h) -> 2 (1h) -> 3 (2h)", CELLS[0]], **columns)
    dataset.labels[3] = np.nan
    quartiles = {"observations_q1": 1, "observations_median": 1.5, "observations_q3": 2.25}
    known = {"age_q1": 55, "age_median": 60, "age_q3": 65, "prevalence": 1 / 3, "women": 1 / 3}
    counts = {"rows": 4, "patients": 4}
    rows, medians = demographics(dataset), row_medians(dataset)
    distributions = {"series": {}, "static": {}}  # of fewer than 11 patients
    mix = case_mix(rows, medians)
    assert {name: mix.pop(name) for name in distributions} == distributions
    assert mix == pytest.approx({**counts, **quartiles, **known})
    assert set(case_mix(rows.iloc[3:], medians.iloc[3:])) == {*counts, *quartiles, *distributions}


def test_case_mix_counts_each_patient_once():
    once = {"subject_id": np.arange(161), "static_age": [*np.arange(160) % 40 + 40, 103.25]}
    once |= {"static_sex_male": np.arange(161) % 2, "label_escalation": np.arange(161) % 4 // 3}
    rows = np.array([*range(160), *[160] * 45])  # the last patient has 45 rows
    mixes = []
    for chosen in (np.arange(161), rows):
        columns = {name: np.asarray(x)[chosen] for name, x in once.items()}
        dataset = dataset_of(["1 (0h)"] * len(chosen), **columns)
        mixes.append(case_mix(demographics(dataset), row_medians(dataset)))
    assert [mix.pop("rows") for mix in mixes] == [161, 205]
    assert mixes[0] == mixes[1]
    assert mixes[1]["age_q3"] < 80


@pytest.mark.parametrize("organ", ["kidney", "liver"])
def test_age_and_sex_of_a_registration_are_those_of_its_text(organ):
    whole = SRTRTrajectoryDataset(SRTR, organ)
    rows = demographics(whole.subset(np.arange(len(whole))[::-7]))
    assert list(demographic_bands(rows)) == ["observations", "age", "sex"]
    for context, sex, age in zip(whole.contexts[::-7], rows["sex"], rows["age"], strict=True):
        words = {"man": "man", "woman": "woman", "patient": UNKNOWN}
        person = context.partition(",")[0].lower().split()[-1]
        assert words[person] == sex
        assert np.isnan(age) or context.startswith(str(int(age)))
