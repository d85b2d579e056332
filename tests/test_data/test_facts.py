"""Tests of the facts of patients: words and numbers of contexts, and which of them are read."""

import re
from string import ascii_lowercase as LETTERS

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.checks import describe_unusable_facts
from medgemma_clinical.data.facts import (
    CONTEXT_NUMBER,
    context_table,
    fact_groups,
    facts_of,
    frequent_words,
    numbers_as_written,
    patients_behind,
    unusable_facts,
)
from medgemma_clinical.data.texts import NUMBER, PromptOptions
from medgemma_clinical.data.training_data import prepare_data
from trajectories import table_of

CONTEXTS = ["54-year-old woman, 76 kg, BMI 27.5", "61-year-old man, 80 kg, BMI 25", "man", ""] * 30
EVERYONE = np.arange(120)
NUMBERS = ["year (number)", "kg (number)", "bmi (number)"]


def dataset_of(**columns):
    """Return 120 rows, each of a patient of its own."""
    return MIMICtrajectoryDataset(
        table_of(["1 (0h)"] * 120, **{"subject_id": EVERYONE.astype(str), **columns})
    )


# --------------------------------------------------------------------------- contexts


def test_facts_of_a_context_are_numbers_by_their_word_and_the_other_words():
    dataset = dataset_of(clinical_context=[*CONTEXTS[:-1], "rare"])
    names = dataset.choose_facts(EVERYONE)
    assert set(names) == {*NUMBERS, "old", "woman", "man"}
    facts = dataset.fact_table(names)
    assert list(facts) == names
    assert facts[NUMBERS].to_numpy()[0].tolist() == [54, 76, 27.5]
    assert facts.loc[:2, "woman"].tolist() == [1, 0, 0]
    assert facts.loc[:2, "old"].tolist() == [1, 1, 0]
    assert facts.loc[2, NUMBERS].isna().all()


def test_numbers_as_written_are_those_of_the_facts_in_the_order_of_the_text():
    text = f"{CONTEXTS[0]}, weight: 75 kg, 1e12 cells"
    written = {"year": "54-year", "kg": "weight: 75 kg", "bmi": "BMI 27.5"}
    written = {f"{word} (number)": number for word, number in written.items()}
    assert numbers_as_written(text) == written
    assert list(written) == list(numbers_as_written(text))
    assert {name: facts_of(text)[name] for name in written} == dict(
        zip(written, [54, 75, 27.5], strict=True)
    )


def test_an_empty_context_says_nothing_of_any_word():
    table = context_table(["woman, 76 kg", "", "man"], ["woman", "kg (number)", "man"])
    assert table["woman"].fillna(9).tolist() == [1, 9, 0]
    assert table["man"].fillna(9).tolist() == [0, 9, 1]
    assert table["kg (number)"].fillna(9).tolist() == [76, 9, 9]


def test_the_training_part_alone_decides_what_is_rare():
    dataset = dataset_of(clinical_context=[*CONTEXTS[:-6], *["rare"] * 6])
    assert "rare" in dataset.choose_facts(EVERYONE[100:])
    assert "rare" not in dataset.choose_facts(EVERYONE[:116])


@pytest.mark.parametrize(("patients", "read"), [(EVERYONE // 24, True), (EVERYONE // 30, False)])
def test_a_number_of_a_few_patients_is_no_fact_however_many_rows_they_have(patients, read):
    values = [f"woman, BMI {20 + k % 5}" if k % 4 == 0 else "woman" for k in EVERYONE]
    dataset = dataset_of(clinical_context=values, subject_id=patients.astype(str))
    assert ("bmi (number)" in dataset.choose_facts(EVERYONE)) == read


FROM_EACH_LETTER = re.compile(rf"(?:([^\W\d_]+)[ :=]+)?({NUMBER})(?:[ -]?([^\W\d_]+|%))?")
"""The plain form of CONTEXT_NUMBER, which takes the square of a word's length."""

PIECES = [*"aeE\u00e95 0.-+ :=%_\n", "year", "BMI 27", "1e5", " kg", "54-year-old "]


@given(st.lists(st.sampled_from(PIECES), max_size=15).map("".join))
def test_the_numbers_of_a_context_are_those_of_the_plain_form(text):
    assert CONTEXT_NUMBER.findall(text) == FROM_EACH_LETTER.findall(text)


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), max_size=4))
def test_a_table_of_contexts_holds_each_fact_of_each_context(texts):
    names = sorted({name for text in texts for name in facts_of(text)})
    table = context_table(texts, names)
    assert table.shape == (len(texts), len(names))
    for row, text in zip(table.to_dict("records"), texts, strict=True):
        held = {name: value for name, value in row.items() if value and not np.isnan(value)}
        assert held == {name: value for name, value in facts_of(text).items() if value}


# ------------------------------------------------------------------- few patients

ALONE = np.arange(100)


@pytest.mark.parametrize(
    ("values", "groups", "behind"),
    [
        ([1.0, 2, 3, np.nan], ALONE, 3),
        ([1.0, 2, 3, np.nan], [0, 0, 1, 2], 2),
        ([np.nan] * 3, ALONE, 0),
        ([7.0] * 9, ALONE, 9),
        ([0.0] * 9 + [1.0] * 3, ALONE, 3),
        ([1.0] * 9 + [0.0] * 3, ALONE, 3),
        ([0.0] * 9 + [5.0, 10, 20], ALONE, 3),
        ([0.0] * 9 + [5.0, 10, 20], [*range(9), 20, 20, 21], 2),
        ([0.0] * 3 + [5.0, 10, 20], ALONE, 6),
    ],
)
def test_the_patients_behind_a_column_know_it_or_differ_in_it(values, groups, behind):
    """Where most rows share a value, mean and spread tell of the others."""
    groups = np.array(groups)[: len(values)]
    assert patients_behind(np.array(values), groups) == behind


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([1.0, 2, 3, 4, 5, np.nan], True),
        ([1.0, 2, 3, 4, np.nan, np.nan], False),
        ([0.0] * 9 + [1.0] * 5, True),
        ([0.0] * 9 + [1.0] * 4, False),
        ([3.0] * 9 + [np.nan], False),
        ([np.nan] * 9, False),
    ],
)
def test_a_static_feature_needs_two_values_and_five_patients(values, read):
    table = pd.DataFrame({"x": values})
    assert ("x" not in unusable_facts(table, ALONE[: len(values)].astype(str))) == read


DECLARED = {
    "static_age [years]": 20 + EVERYONE % 60,
    "static_rare": [float(k) if k < 3 else np.nan for k in EVERYONE],
    "static_same": 1,
    "static_two": EVERYONE < 3,
}


def test_declared_facts_come_before_words_and_are_left_out_by_name():
    dataset = dataset_of(**DECLARED, clinical_context=["man", "woman"] * 60)
    options = {"max_samples": 0, "seed": 0, "prompts": PromptOptions()}
    data = prepare_data(dataset, **options)
    unusable = describe_unusable_facts(dataset, data.split["train"])
    assert [line.split()[2] for line in unusable] == ["static_rare", "static_same", "static_two"]
    assert data.dataset.fact_names == ("static_age [years]", "man", "woman")
    assert data.description()["inputs"]["facts"] == list(data.dataset.fact_names)
    assert data.dataset.facts[:2].tolist() == [[20, 1, 0], [21, 0, 1]]
    assert prepare_data(dataset, **options, facts=False).dataset.fact_names == ()


def test_endless_numbers_and_words_are_no_facts():
    assert facts_of("weight 1e999 kg, height 180 cm") == facts_of("weight kg, height 180 cm")
    assert frequent_words(["x" * 101, "x" * 100]) == ["x" * 100]
    many = [" ".join(f"{a}{b}{c}" for a in LETTERS for b in LETTERS for c in "xy")] * 3
    assert len(frequent_words(many)) == 1000


def test_a_page_groups_facts_by_their_source():
    names = ["static_age [years]", "years on dialysis", "man", "year (number)", "icu", "% (number)"]
    assert fact_groups(names) == {
        "declared": ["static_age [years]", "years on dialysis"],
        "words of the context": ["man", "icu"],
        "numbers of the context, by their word": ["year", "%"],
    }
    assert fact_groups([]) == {}
