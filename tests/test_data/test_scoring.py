"""Tests of rows to be scored: what is said of the facts that they lack."""

from medgemma_clinical.data.scoring import Findings, count_unknown_facts
from trajectories import dataset_of


def test_rows_without_a_number_are_counted_and_those_without_a_word_are_not() -> None:
    dataset = dataset_of(
        ["1 (0h)"] * 4,
        static_age=["50", "", "60", ""],
        static_given=["1"] * 4,
        clinical_context=["woman, 76 kg", "man", "", "man, 80 kg"],
    )
    names = ["static_age", "static_given", "kg (number)", "woman"]
    findings = Findings("x")
    count_unknown_facts(dataset.with_inputs(names, prediction_time=False), findings)
    assert +findings.counts == {
        "lack the fact static_age: taken as unknown": 2,
        "lack the fact kg (number): taken as unknown": 2,
    }
