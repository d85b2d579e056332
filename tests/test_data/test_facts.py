"""Tests of the facts of patients: words and numbers of contexts, and which of them are read."""

from __future__ import annotations

import logging
import re
from string import ascii_lowercase as LETTERS
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.checks import describe_unusable_facts, log_check
from medgemma_clinical.data.facts import (
    CONTEXT_NUMBER,
    context_table,
    fact_groups,
    facts_of,
    frequent_words,
    numbers_as_written,
    unusable_facts,
)
from medgemma_clinical.data.texts import NUMBER, PromptOptions
from medgemma_clinical.data.training_data import prepare_data
from trajectories import table_of

CONTEXTS = ["54-year-old woman, 76 kg, BMI 27.5", "61-year-old man, 80 kg, BMI 25", "man", ""] * 30
EVERYONE = np.arange(120)
NUMBERS = ["year (number)", "kg (number)", "bmi (number)"]


def dataset_of(**columns: Any) -> MIMICtrajectoryDataset:
    """Return 120 rows, each of a patient of its own."""
    return MIMICtrajectoryDataset(
        table_of(["1 (0h)"] * 120, **{"subject_id": EVERYONE.astype(str), **columns})
    )


# --------------------------------------------------------------------------- contexts


def test_facts_of_a_context_are_numbers_by_their_word_and_the_other_words() -> None:
    dataset = dataset_of(clinical_context=[*CONTEXTS[:-1], "rare"])
    names = dataset.choose_facts(EVERYONE, 0)
    assert set(names) == {*NUMBERS, "old", "woman", "man"}
    facts = dataset.fact_table(names)
    assert list(facts) == names
    assert facts[NUMBERS].to_numpy()[0].tolist() == [54, 76, 27.5]
    assert facts.loc[:2, "woman"].tolist() == [1, 0, 0]
    assert facts.loc[:2, "old"].tolist() == [1, 1, 0]
    assert facts.loc[2, NUMBERS].isna().all()


def test_numbers_as_written_are_those_of_the_facts_in_the_order_of_the_text() -> None:
    text = f"{CONTEXTS[0]}, weight: 75 kg, 1e12 cells"
    written = {"year": "54-year", "kg": "weight: 75 kg", "bmi": "BMI 27.5"}
    written = {f"{word} (number)": number for word, number in written.items()}
    assert numbers_as_written(text) == written
    assert list(written) == list(numbers_as_written(text))
    assert {name: facts_of(text)[name] for name in written} == dict(
        zip(written, [54, 75, 27.5], strict=True)
    )


def test_an_empty_context_says_nothing_of_any_word() -> None:
    table = context_table(["woman, 76 kg", "", "man"], ["woman", "kg (number)", "man"])
    assert table["woman"].fillna(9).tolist() == [1, 9, 0]
    assert table["man"].fillna(9).tolist() == [0, 9, 1]
    assert table["kg (number)"].fillna(9).tolist() == [76, 9, 9]


def test_the_training_part_alone_decides_what_is_rare() -> None:
    dataset = dataset_of(clinical_context=[*CONTEXTS[:-1], "rare"])
    assert "rare" in dataset.choose_facts(EVERYONE[100:], 0)
    assert "rare" not in dataset.choose_facts(EVERYONE[:100], 0)
    assert "rare" not in dataset.choose_facts(EVERYONE, 0)


def test_a_number_of_a_few_patients_is_no_fact_however_many_rows_they_have() -> None:
    values = [f"woman, BMI {20 + k % 5}" if k % 4 == 0 else "woman" for k in EVERYONE]
    for patients, limit in ((EVERYONE, 30), (EVERYONE // 8, 15)):
        dataset = dataset_of(clinical_context=values, subject_id=patients.astype(str))
        assert "bmi (number)" in dataset.choose_facts(EVERYONE, limit)
        assert "bmi (number)" not in dataset.choose_facts(EVERYONE, limit + 1)


FROM_EACH_LETTER = re.compile(rf"(?:([^\W\d_]+)[ :=]+)?({NUMBER})(?:[ -]?([^\W\d_]+|%))?")
"""The plain form of CONTEXT_NUMBER, which takes the square of a word's length."""

PIECES = [*"aeE\u00e95 0.-+ :=%_\n", "year", "BMI 27", "1e5", " kg", "54-year-old "]


@given(st.lists(st.sampled_from(PIECES), max_size=15).map("".join))
def test_the_numbers_of_a_context_are_those_of_the_plain_form(text: str) -> None:
    assert CONTEXT_NUMBER.findall(text) == FROM_EACH_LETTER.findall(text)


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), max_size=4))
def test_a_table_of_contexts_holds_each_fact_of_each_context(texts: list[str]) -> None:
    names = sorted({name for text in texts for name in facts_of(text)})
    table = context_table(texts, names)
    assert table.shape == (len(texts), len(names))
    for row, text in zip(table.to_dict("records"), texts, strict=True):
        held = {name: value for name, value in row.items() if value and not np.isnan(value)}
        assert held == {name: value for name, value in facts_of(text).items() if value}


# --------------------------------------------------------------------------- small cells


def unusable(values: list[float], fewest: int, groups: Any = None) -> str:
    """Return why a fact with these values is not read."""
    patients = np.arange(len(values)) if groups is None else np.array(groups)
    table = pd.DataFrame({"fact": values}, dtype=float)
    return unusable_facts(table, patients.astype(str), fewest).get("fact", "")


def test_a_fact_needs_enough_patients() -> None:
    values = [1.0, 2, 3, 4, np.nan, np.nan]
    assert unusable(values, 4) == unusable(values, 0) == ""
    assert unusable(values, 5) == "fewer than 5 patients of the training part have it"
    assert unusable(values, 3, [0, 0, 1, 1, 2, 3]) != ""
    assert unusable(values, 2, [0, 0, 1, 1, 2, 3]) == ""


def test_each_value_of_a_fact_of_two_needs_enough_patients() -> None:
    values = [0.0] * 9 + [1.0] * 3
    few = "fewer than 4 patients of the training part have one of its two values"
    assert unusable(values, 3) == unusable(values, 0) == ""
    assert unusable(values, 4) == few
    assert unusable([1 - value for value in values], 4) == few
    assert unusable(values, 3, [*range(9), 20, 20, 21]) != ""


def test_where_most_patients_share_a_value_enough_must_have_another() -> None:
    few = "fewer than 4 patients of the training part have a value other than the most frequent one"
    values = [0.0] * 9 + [5.0, 10.0, 20.0]
    assert unusable(values, 4) == few
    assert unusable(values, 3) == unusable(values, 0) == unusable([*values, 1.0], 4) == ""
    assert unusable(values, 3, [*range(9), 20, 20, 21]) != ""
    assert unusable(values[6:], 4) == "", "three patients alone share the value: none is given away"


def test_a_fact_of_one_value_or_none_teaches_nothing() -> None:
    one = "the training part knows one value of it at most"
    assert unusable([3.0, 3.0, np.nan], 0) == unusable([np.nan] * 9, 0) == one


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, np.nan]), st.integers(0, 5)), max_size=20),
    st.integers(0, 4),
)
def test_the_values_of_a_fact_that_is_read_are_those_of_enough_patients(
    rows: list[tuple[float, int]], fewest: int
) -> None:
    patients: dict[float, set[int]] = {}
    for value, patient in rows:
        if not np.isnan(value):
            patients.setdefault(value, set()).add(patient)
    enough = len(set().union(*patients.values())) >= fewest
    values, groups = [value for value, _ in rows], [patient for _, patient in rows]
    if len(patients) == 2:
        enough = min(map(len, patients.values())) >= fewest
    elif patients:
        usual = max(sorted(patients), key=values.count)
        others = set().union(*(each for value, each in patients.items() if value != usual))
        enough &= len(patients[usual]) < fewest or len(others) >= fewest
    assert (unusable(values, fewest, groups) == "") == (len(patients) > 1 and enough)


# --------------------------------------------------------------------------- declared facts

RARE = [float(k) if k < 5 else np.nan for k in EVERYONE]
DECLARED: dict[str, Any] = {
    "static_age [years]": 20 + EVERYONE % 60,
    "static_rare": RARE,
    "static_same": 1,
    "static_two": EVERYONE < 5,
}
RARE_LINE = "the fact static_rare is not read: fewer than 11 patients of the training part have it"
OTHER_LINES = (
    "the fact static_same is not read: the training part knows one value of it at most",
    "the fact static_two is not read: fewer than 11 patients of the training part have one of its "
    "two values",
)


def test_declared_facts_come_before_words_and_are_left_out_by_name() -> None:
    dataset = dataset_of(**DECLARED, clinical_context=["man", "woman"] * 60)
    options: dict[str, Any] = {"max_samples": 0, "seed": 0, "prompts": PromptOptions()}
    data = prepare_data(dataset, **options)
    unusable = describe_unusable_facts(dataset, data.split["train"], 11)
    assert unusable == [RARE_LINE, *OTHER_LINES]
    assert data.dataset.fact_names == ("static_age [years]", "man", "woman")
    assert data.description()["inputs"]["facts"] == list(data.dataset.fact_names)
    assert data.dataset.facts is not None
    assert data.dataset.facts[:2].tolist() == [[20, 1, 0], [21, 0, 1]]
    assert prepare_data(dataset, **options, facts=False).dataset.fact_names == ()


def test_the_check_names_the_facts_that_are_not_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_check(dataset_of(**DECLARED), 11)
    for line in (RARE_LINE, *OTHER_LINES):
        assert f"warning: {line}" in caplog.messages
    assert caplog.messages[-1] == "ready, with warnings"


def test_endless_numbers_and_words_are_no_facts() -> None:
    assert facts_of("weight 1e999 kg, height 180 cm") == facts_of("weight kg, height 180 cm")
    assert frequent_words(["x" * 101, "x" * 100]) == ["x" * 100]
    many = [" ".join(f"{a}{b}{c}" for a in LETTERS for b in LETTERS for c in "xy")] * 3
    assert len(frequent_words(many)) == 1000


def test_a_page_groups_facts_by_their_source() -> None:
    names = ["static_age [years]", "years on dialysis", "man", "year (number)", "icu", "% (number)"]
    assert fact_groups(names) == {
        "declared": ["static_age [years]", "years on dialysis"],
        "words of the context": ["man", "icu"],
        "numbers of the context, by their word": ["year", "%"],
    }
    assert fact_groups([]) == {}
