"""Regressions on texts: what they read, what they learn, and what they may not know."""

import copy
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import rankdata

from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.terms import frequent_terms, terms
from medgemma_clinical.evaluation import baselines, text_features
from medgemma_clinical.evaluation.baselines import (
    FROZEN,
    WITH_TEXT,
    WORDS,
    fit_baselines,
    label_fits,
    text_settings,
    tune_baselines,
)
from medgemma_clinical.evaluation.text_features import Reading, TextModel
from medgemma_clinical.evaluation.time_baselines import PeriodFits, periods_of
from trajectories import dataset_of

FINDINGS = {"vomiting": 1.5, "confused": 1.0, "eating": -1.5}
N = 400
TRAIN, TEST = np.arange(300), np.arange(300, N)


def notes(seed=0):
    """Rows of one or two a patient: the label follows findings that texts affirm, not deny."""
    rng = np.random.default_rng(seed)
    has = rng.random((N, 3)) < 0.4
    odds = has @ np.array([*FINDINGS.values()]) - 0.6
    texts = [
        ". ".join(
            f"{'' if there else 'not '}{name}" for name, there in zip(FINDINGS, row, strict=True)
        )
        for row in has
    ]
    return {
        "series": [f"{rng.integers(1, 30)} (0h)" for _ in range(N)],
        "label_escalation": (odds + rng.logistic(size=N) > 0).astype(int),
        "subject_id": [f"p{k // 2 if k < 100 else k}" for k in range(N)],
        "clinical_context": texts,
    }, odds


@pytest.fixture(scope="module", autouse=True)
def two_folds():
    """Tune on few patients, and in two folds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "MIN_TUNED", 20)
        patch.setattr(baselines, "FOLDS", 2)
        yield


@pytest.fixture(scope="module")
def dataset():
    return dataset_of(**notes()[0])


def frozen(dataset):
    """Give each text states that hold its findings beside noise, and none to an empty one."""
    rng = np.random.default_rng(1)
    view = copy.copy(dataset)
    states = rng.normal(size=(len(dataset), 8)).astype(np.float32)
    for k, name in enumerate(FINDINGS):
        states[:, k] += [5 * (f"not {name}" not in text) for text in dataset.contexts]
    states[dataset.contexts == ""] = np.nan
    view.text_states, view.text_encoder = states, {"base_model": "some"}
    return view


def auroc(score, labels):
    ranks, events = rankdata(score)[labels == 1], (labels == 1).sum()
    return (ranks.sum() - events * (events + 1) / 2) / (events * (len(labels) - events))


# ------------------------------------------------------------------ what is read


def test_words_and_pairs_are_those_of_eleven_patients_who_have_and_lack_them():
    texts = [*["fever high"] * MIN_CELL, *["fever"] * 20, *["rare"] * (MIN_CELL - 1), "fever 40"]
    groups = np.array([f"p{k}" for k in range(len(texts))])
    assert frequent_terms(np.array(texts, object), groups) == ["fever high", "high"]
    groups[:MIN_CELL] = "p0"  # eleven rows, and one patient
    assert frequent_terms(np.array(texts, object), groups) == []
    for nothing in ("", "7 . 8"):
        assert frequent_terms(np.full(40, nothing, object), np.arange(40).astype(str)) == []


def plain_table(reading, texts):
    """Weigh words and pairs as the textbook does."""
    table = np.zeros((len(texts), len(reading.vocabulary)))
    for row, text in enumerate(texts):
        terms = Counter()
        for clause in text.lower().split("."):
            words = clause.split()
            terms.update([*words, *map(" ".join, itertools.pairwise(words))])
        for k, (term, scale) in enumerate(zip(reading.vocabulary, reading.scale, strict=True)):
            if terms[term]:
                table[row, k] = (1 + math.log(terms[term])) * scale
        table[row] /= np.linalg.norm(table[row]) or 1
    return table


def test_a_pair_of_words_lies_within_a_clause():
    assert terms("No Fever; übel: 7 h, kein Schmerz.\nx") == [
        *("no", "fever", "no fever", "übel", "kein", "schmerz", "kein schmerz")
    ]


def test_words_are_weighed_as_a_plain_loop_weighs_them(dataset):
    reading = Reading.fitted(dataset, TRAIN)
    expected = plain_table(reading, dataset.contexts[TEST])
    assert reading.table(dataset, TEST).toarray() == pytest.approx(expected)
    texts = dataset.contexts[TRAIN]
    for word, scale in zip(reading.vocabulary, reading.scale, strict=True):
        holds = sum(bool(re.search(rf"\b{word}\b", text)) for text in texts)
        assert scale == pytest.approx(math.log((1 + len(texts)) / (1 + holds)) + 1, rel=0.01)


def test_states_are_scaled_by_the_training_part_and_an_empty_text_is_the_mean(dataset):
    view = frozen(dataset)
    view.contexts = view.contexts.copy()
    view.contexts[TEST[0]] = ""
    view = frozen(view)
    table = Reading.fitted(view, TRAIN).table(view)
    assert table[TRAIN].mean(axis=0) == pytest.approx(0, abs=1e-6)
    assert (table[TRAIN] ** 2).sum(axis=1).mean() == pytest.approx(1)
    assert not table[TEST[0]].any()


# ------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("reads", [lambda x: x, frozen], ids=["words", "frozen"])
def test_a_text_ranks_nearly_as_the_truth_and_adds_to_the_series(reads, dataset):
    data, odds = reads(dataset), notes()[1]
    fitted = fit(data, TRAIN)
    risks, labels = fitted.risks(data, TEST), data.labels[TEST]
    alone = WORDS if reads(dataset) is dataset else FROZEN
    truth = auroc(odds[TEST], labels)
    assert auroc(risks[alone], labels) > truth - 0.08
    assert auroc(risks[WITH_TEXT], labels) > truth - 0.1
    assert auroc(risks["logistic regression"], labels) < 0.62
    assert risks[alone].mean() == pytest.approx(labels.mean(), abs=0.12)


def fit(dataset, rows):
    text = text_settings(dataset, rows, [], label_fits(dataset, rows))
    return fit_baselines(dataset, rows, tune_baselines(dataset, rows, [], text=text))


def test_numbers_are_zero_on_average_and_the_level_is_the_training_parts(dataset):
    text = fit(dataset, TRAIN).text
    numbers = text.numbers(dataset, TRAIN)
    assert numbers.mean() == pytest.approx(0, abs=1e-9)
    assert text.risks(numbers).mean() == pytest.approx(dataset.labels[TRAIN].mean(), abs=1e-3)


def test_what_is_fitted_on_top_learns_from_numbers_that_have_not_seen_the_patient(
    dataset, monkeypatch
):
    fits, seen = label_fits(dataset, TRAIN), []

    class Spy(type(fits)):
        def of(self, rows):
            return Spy(self.labels[rows], self.patients[rows])

        def fit_text(self, table, penalty):
            seen.append({*self.patients})
            return super().fit_text(table, penalty)

    spy = Spy(fits.labels, fits.patients)
    table = Reading.fitted(dataset, TRAIN).table(dataset, TRAIN)
    beside = dataset.baseline_inputs()["last value"]
    values = text_features.with_numbers(beside, dataset, TRAIN, spy, table, 1.0)
    coefficients = [fits.fit_text(table, 1.0)[0]]
    assert len(seen) == text_features.CROSS_FITS
    everyone = {*fits.patients}
    assert [len(everyone - part) for part in seen] == pytest.approx(
        [len(everyone) / 5] * 5, rel=0.2
    )
    assert not set.intersection(*[everyone - part for part in seen])
    # A label of one patient moves the numbers of others, and never the patient's own.
    other = copy.copy(dataset)
    other.labels = dataset.labels.copy()
    mine = dataset.groups[TRAIN] == dataset.groups[0]
    flipped = label_fits(dataset, TRAIN)
    flipped.labels[mine] = 1 - flipped.labels[mine]
    after = text_features.with_numbers(beside, dataset, TRAIN, flipped, table, 1.0)
    assert np.array_equal(values[mine], after[mine])
    assert not np.array_equal(values[~mine], after[~mine])
    assert not np.allclose(values[:, -1], (table @ coefficients[0].T)[:, 0])


def test_texts_of_other_parts_change_nothing(dataset):
    other = copy.copy(dataset)
    other.contexts, other.labels = dataset.contexts.copy(), dataset.labels.copy()
    other.contexts[TEST] = "entirely new words of later days " * 3
    other.labels[TEST] = 1 - other.labels[TEST]
    before, after = fit(dataset, TRAIN), fit(other, TRAIN)
    assert before.to_json() == after.to_json()
    assert before.text.to_json() == after.text.to_json()


def test_times_learn_the_text_of_each_event():
    rng = np.random.default_rng(0)
    data = dataset_of(**notes()[0])
    has = np.array([["not " + x not in text for x in FINDINGS] for text in data.contexts])
    rates = np.exp([-4 + 1.5 * has[:, 0], -4 + 1.5 * has[:, 2]])
    ends = rng.exponential(1 / rates)
    hours, event = ends.min(axis=0), ends.argmin(axis=0)
    cuts = np.array([24.0, 72.0])
    begins = np.array([0.0, 24.0])
    exposure = ((np.minimum(hours[:, None], cuts) - begins) / (cuts - begins)).clip(0)
    here = (hours[:, None] > begins) & (hours[:, None] <= cuts)
    is_event = here[:, None] & (event[:, None] == np.arange(2))[:, :, None]
    fits = PeriodFits(periods_of(exposure, is_event), np.zeros((2, 2)))
    reading = Reading.fitted(data, np.arange(N))
    coefficients, level = fits.fit_text(reading.table(data), 10.0)
    numbers = reading.table(data) @ coefficients.T
    assert numbers.shape == (N, 2)
    assert level.shape == (2, 2)
    for event, finding in ((0, 0), (1, 2)):
        for k in range(3):
            gap = numbers[has[:, k], event].mean() - numbers[~has[:, k], event].mean()
            assert (gap > 0.7) == (k == finding), (event, k, gap)
    text = TextModel(reading, coefficients, np.zeros(2), level)
    hazards = text.risks(numbers)
    assert hazards == pytest.approx(np.exp(numbers[..., None] + level))
    # At the likelihood's maximum, expected events are the observed ones in each interval.
    expected = (exposure[:, None] * hazards).sum(axis=0)
    assert expected == pytest.approx(is_event.sum(axis=0), rel=0.01)


def test_a_file_gives_the_same_numbers_to_the_bit(dataset):
    for data in (dataset, frozen(dataset)):
        text = fit(data, TRAIN).text
        again = TextModel.from_json(text.to_json())
        assert np.array_equal(again.numbers(data), text.numbers(data))
        assert again.sha256 == text.sha256
        table = baselines.beside_text(data, [])
        numbers = text.numbers(data)
        assert np.array_equal(again.risks_beside(table, numbers), text.risks_beside(table, numbers))
