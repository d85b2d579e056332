"""Subgroups of SRTR registrations: read from the files' own columns, not from the text."""

import re
from pathlib import Path

import numpy as np
import pytest

from medgemma_clinical.data.case_mix import UNKNOWN
from srtr_dataset import SRTRTrajectoryDataset

SRTR = Path(__file__).parents[1] / "data" / "srtr_saf"


@pytest.mark.parametrize("organ", ["kidney", "liver"])
def test_organ_age_and_sex_are_those_of_the_registration(organ: str) -> None:
    whole = SRTRTrajectoryDataset(SRTR, organ)
    dataset = whole.subset(np.arange(len(whole))[::-7])
    groups = dataset.subgroups()
    assert list(groups) == ["observations", "age", "sex", "organ"]
    assert set(groups["organ"]) == {organ}
    people = dataset.people()
    for context, sex, age in zip(dataset.contexts, people["sex"], people["age"], strict=True):
        words = {"man": "man", "woman": "woman", "patient": UNKNOWN}
        assert words[re.findall(r"\b(?:wo)?man\b|\bpatient\b", context.lower())[0]] == sex
        assert np.isnan(age) or context.startswith(str(int(age)))
    request = whole.asked()
    assert f"day {whole.definition.landmark} after listing" in request["Prediction time"]
    assert request["Horizon"].startswith(f"{whole.definition.horizon} days")
