"""The contexts that tests/benchmarks/phrasings.py writes: apart, true, blind to the label."""

import re
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import phrasings
from phrasings import TESTING, TRAINING, UNITS, Facts

EVERY = [
    Facts(age, man, unit, kg)
    for (age, kg), man, unit in product(
        [(16, 34), (20, None), (41, 100), (79, 77), (83, 300), (90, 145)], [True, False], UNITS
    )
]
"""Patients of each kind."""

NAMES = re.compile("|".join(map(re.escape, (name for u in UNITS for name in (u, *UNITS[u])))))
DENIED = re.compile(r"\bnot (\w+ ){0,3}$", re.IGNORECASE)
NEITHER = re.compile(r"\b(?:no|not a) (wo)?man\b", re.IGNORECASE)
WOMAN, MAN = (
    re.compile(r"\b(woman|she|her|lady|female|F)(?=\b|\d)", re.IGNORECASE),
    re.compile(r"\b(man|he|his|him|gentleman|male|M)(?=\b|\d)", re.IGNORECASE),
)


def test_twelve_phrasings_train_and_eight_others_test():
    assert (len(set(TRAINING)), len(set(TESTING)), len({*TRAINING, *TESTING})) == (12, 8, 20)
    for facts in EVERY:
        other = next(unit for unit in UNITS if unit != facts.unit)
        texts = {phrasings.write(each, facts, other) for each in (*TRAINING, *TESTING)}
        assert len(texts) == 20


@pytest.mark.parametrize("phrasing", [*TRAINING, *TESTING])
def test_a_phrasing_says_the_facts_and_nothing_else(phrasing):
    for facts in EVERY:
        other = next(unit for unit in UNITS if unit != facts.unit)
        text = phrasings.write(phrasing, facts, other)
        units = [(found[0], DENIED.search(text[: found.start()])) for found in NAMES.finditer(text)]
        assert not all(denied for _, denied in units)
        for name, denied in units:
            unit = other if denied else facts.unit
            assert name in {unit, *UNITS[unit]}
        said = NEITHER.sub(lambda found: "man" if found[1] else "woman", text)
        right, wrong = (MAN, WOMAN) if facts.man else (WOMAN, MAN)
        assert right.search(said)
        assert not wrong.search(said)
        assert_numbers_are_true(text, facts)


def assert_numbers_are_true(text, facts):
    """Read age and weight back, in the units and words that a text has them in."""
    stone = re.search(r"(\d+) stone (\d+)", text)
    pounds = re.search(r"(\d+) (?:lb|pounds)", text)
    kilograms = re.search(r"(?:wt |in kg: )(\d+)|(\d+) (?:kg|kilo)", text)
    grams = re.search(r"(\d+) g\b", text)
    words = re.search(r"(?:at|and weighs) ([a-z -]+) kilograms", text)
    weight = None
    if stone:
        weight = round((14 * int(stone[1]) + int(stone[2])) / 2.20462)
    elif pounds:
        weight = round(int(pounds[1]) / 2.20462)
    elif kilograms:
        weight = int(kilograms[1] or kilograms[2])
    elif grams:
        weight = int(grams[1]) // 1000
    elif words:
        weight = number_of(words[1])
    assert weight == facts.kg
    for found in (stone, pounds, kilograms, grams, words):
        text = text.replace(found[0], "") if found else text
    ages = [int(number) for number in re.findall(r"\d+", text)]
    if "months" in text:
        assert [age // 12 for age in ages] == [facts.age]
    elif "decade" in text:
        assert f"{phrasings.DECADES[facts.age // 10]} decade" in text
    elif ages:
        assert ages == [facts.age]
    else:
        assert phrasings.in_words(facts.age) in text or phrasings.in_decade(facts.age) in text


def number_of(words):
    return next(number for number in range(1000) if phrasings.in_words(number) == words)


def test_numbers_in_words():
    numbers = {0: "zero", 16: "sixteen", 70: "seventy", 76: "seventy-six", 100: "one hundred"}
    numbers |= {145: "one hundred and forty-five", 300: "three hundred"}
    assert {number: phrasings.in_words(number) for number in numbers} == numbers


def test_thirds_of_a_decade():
    ages = {16: "mid teens", 20: "early twenties", 43: "early forties", 74: "mid seventies"}
    ages |= {77: "late seventies", 90: "early nineties"}
    assert {age: phrasings.in_decade(age) for age in ages} == ages


def test_stone_convert_back():
    for kg in range(20, 301):
        stone, pounds = map(int, phrasings.in_stone(kg).split(" stone "))
        assert pounds < 14
        assert round((14 * stone + pounds) / 2.20462) == kg


def test_parts_have_their_phrasings_and_labels_no_say(tmp_path):
    table = phrasings.read_table(400)
    first = pd.read_csv(phrasings.build(table, tmp_path, 3), dtype=str)
    shares = first["split"].value_counts(normalize=True)
    assert shares.round(2).to_dict() == {"train": 0.4, "test": 0.4, "val": 0.2}
    facts = phrasings.known_facts(table)
    for fact, text, part in zip(facts, first["clinical_context"], first["split"], strict=True):
        able = TESTING if part == "test" else TRAINING
        assert any(phrasings.write(each, fact, unit) == text for each in able for unit in UNITS)
    flipped = table.assign(label_escalation=table["label_escalation"].map({"0": "1", "1": "0"}))
    again = pd.read_csv(phrasings.build(flipped, tmp_path, 3), dtype=str)
    same = (first["split"] == "test") == (again["split"] == "test")
    assert same.sum() > 150
    assert (first["clinical_context"] == again["clinical_context"])[same].all()
