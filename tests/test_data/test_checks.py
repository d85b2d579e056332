"""Tests of the check of a data set: its summary, its suspicions, its verdict."""

import logging

import numpy as np
import pytest

from dataset_format import InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.checks import check as run_check
from medgemma_clinical.data.checks import (
    describe_cut,
    describe_sample_size,
    sample_sizes,
    summarize,
)
from medgemma_clinical.data.dka import Description
from medgemma_clinical.data.leaks import describe_leaks
from medgemma_clinical.data.training_data import describe_long_spans, labelled_rows
from medgemma_clinical.evaluation.baselines import LOGISTIC
from trajectories import GAP, table_of

SOUND = ["20 (0h) -> 21 (4h)"] * 200
NAN = np.nan


def dataset_of(series, **columns):
    """Return a data set whose rows are named patients."""
    patients = [f"p{k}" for k in range(len(series))]
    table = table_of(series, **{"subject_id": patients, **columns})
    return MIMICtrajectoryDataset(table, description=GAP, require_labels=False)


@pytest.fixture
def checked(caplog):
    """Return what the check says of a data set, and how many of its lines are warnings."""

    def check(dataset):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run_check(lambda: dataset)
        warnings = [line for line in caplog.messages if line.startswith("warning: ")]
        return caplog.messages, warnings

    return check


def test_a_sound_data_set_is_ready(checked):
    (*_, split, size, folds, verdict), warnings = checked(dataset_of(SOUND))
    assert split.partition(": ")[2] == (
        "train 160 rows, 160 patients, 80 events; val 20 rows, 20 patients, 10 events; test 20 "
        "rows, 20 patients, 10 events"
    )
    assert "on 8 predictors needs 600 patients" in size
    assert "--folds 5" in folds
    assert (verdict, warnings) == ("ready", [])


RARE = {
    "trajectory_lactate": [f"{k} (0h)" for k in range(10)] + [""] * 190,
    "static_rare": [*range(10), *[NAN] * 190],
    "static_two": [1] * 10 + [0] * 190,
}


@pytest.mark.parametrize(
    ("series", "columns", "words"),
    [
        (SOUND[:98], {}, ["fewer than 100 patients", "fewer than 10 patients of the test"]),
        (SOUND[:100], {}, ["fewer than 10 patients of the test"]),
        (SOUND, {"label_escalation": [1] * 90 + [0] * 110}, ["fewer than 10 patients"]),
        (["180 (0h) -> 21 (4h)"] * 200, {}, ["Anion gap: 200 of 400 values lie outside -5 to 60"]),
        (["20 (0h) -> 21 (9000h)"] * 200, {}, ["--time_scale 9000"]),
        (SOUND, {"static_same": 1}, ["static_same is not read"]),
        (SOUND, RARE, ["lactate", "static_rare", "static_two"]),
        (SOUND, {"clinical_contexts": "54 years"}, ["clinical_context"]),
    ],
)
def test_what_looks_wrong_is_a_warning(series, columns, words, checked):
    dataset = dataset_of(series, **columns)
    messages, warnings = checked(dataset)
    warnings += dataset.warnings
    assert len(warnings) == len(words)
    assert all(word in line for word, line in zip(words, warnings, strict=True)), warnings
    assert messages[-1] == "ready, with warnings"


def test_a_given_split_is_shown_as_such_with_its_counts(checked):
    split = ["train"] * 12 + ["val", "val", "test", "test"]
    messages, _ = checked(dataset_of(SOUND[:16], split=split))
    (line,) = (line for line in messages if "column split" in line)
    assert line.endswith("test 2 rows, 2 patients, 1 event")
    assert not any("--folds" in line for line in messages)


def test_without_labels_a_file_is_ready_to_predict_on_and_rows_without_one_are_counted(checked):
    messages, _ = checked(dataset_of(SOUND, label_escalation=[NAN] * 200))
    assert messages[-1].startswith("ready to predict on, ")
    assert not any(line.startswith("split") for line in messages)
    some = np.where(np.arange(200) < 12, NAN, np.arange(200) % 2)
    rows = dataset_of(SOUND, label_escalation=some)
    messages, _ = checked(rows)
    assert labelled_rows(rows).flow.to_numpy().tolist() == [["without a label", 12, 188, 188]]
    assert any("12 rows without a label" in line for line in messages)
    assert any(line.startswith("split") and "train 152 rows" in line for line in messages)
    assert messages[-1] == "ready, with warnings"  # of few patients in the test part


def test_too_few_events_are_refused_behind_the_summary(caplog):
    with caplog.at_level(logging.INFO), pytest.raises(InputError):
        run_check(lambda: dataset_of(["20 (0h)"] * 3))
    assert "rows 3, patients 3" in caplog.messages
    assert caplog.messages[-1] == "not ready"


RNG = np.random.default_rng(0)
DIES = np.arange(200) % 2
HIDDEN = RNG.normal(5, 1, 200).round(4)
LEAKS = {
    "static_died": DIES,
    "static_score": DIES + RNG.normal(0, 0.3, 200),
    "static_survived": 1 - DIES,
    "static_lactate_at_death": np.where(DIES == 1, HIDDEN, np.nan),
    "static_code_status": np.where(np.arange(200) % 4 < 2, DIES, np.nan),
    "clinical_context": np.where(DIES == 1, "woman, died on day 3", "woman, discharged on day 9"),
    "prediction_hours": np.where(DIES == 1, 30, 50),
    "trajectory_troponin": np.where(DIES == 1, [f"{x} (1h)" for x in HIDDEN], ""),
    "trajectory_glucose": [
        f"{x} (0h)" + " -> 6 (1h)" * dies for x, dies in zip(HIDDEN, DIES, strict=True)
    ],
}


@pytest.mark.parametrize("name", LEAKS)
def test_an_input_that_tells_the_label_is_a_warning_that_names_it(name, checked):
    _, warnings = checked(dataset_of(SOUND, **{name: LEAKS[name]}))
    lines = [line for line in warnings if "known at the prediction time" in line]
    words = {"clinical_context": ["'died'", "'discharged'"]}.get(name, [""])
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert name.removeprefix("trajectory_") in line
        assert word in line


def test_texts_whose_words_together_tell_the_label_are_a_warning(checked):
    words = np.array([f"{a} {b}" for a in ("pale", "warm") for b in ("calm", "dull")], object)
    first = RNG.integers(0, 2, 200)
    texts = words[2 * first + (first ^ DIES)]  # a pair tells it, and no word alone
    _, warnings = checked(dataset_of(SOUND, clinical_context=texts))
    (line,) = [line for line in warnings if "known at the prediction time" in line]
    assert "clinical_context: " in line
    assert "'" not in line
    _, warnings = checked(dataset_of(SOUND, clinical_context=RNG.permutation(texts)))
    assert not [line for line in warnings if "clinical_context" in line]


def test_a_leak_that_several_words_share_is_found(checked):
    told = np.array(["arrest", "asystole", "coded", "blue", "pressors", "maximal"])
    texts = [f"was seen {told[k % 6]}" if dies else "was seen" for k, dies in enumerate(DIES)]
    _, warnings = checked(dataset_of(SOUND, clinical_context=texts))
    assert [line for line in warnings if "clinical_context: its words" in line]


@pytest.mark.parametrize("words", ["Pat. is verstorben.", "now Comfort Care only", "EXPIRED"])
def test_texts_that_may_state_what_came_later_are_counted(words):
    texts = np.where(np.arange(200) < 3, words, "was well, mother died of cancer")
    (line,) = describe_leaks(dataset_of(SOUND, clinical_context=texts), np.arange(200))
    assert "3 training rows" in line
    assert describe_leaks(dataset_of(SOUND, clinical_context=texts), np.arange(3, 200)) == []


def test_a_suspicion_needs_ten_patients_with_and_without_the_event_and_knows_the_training_part():
    few = np.where(np.arange(200) < 9, 1, 0)
    dataset, train = dataset_of(SOUND, label_escalation=few, static_died=few), np.arange(200)
    assert describe_leaks(dataset, train) == []
    dataset = dataset_of(SOUND, static_died=DIES, subject_id=[f"p{k // 20}" for k in range(200)])
    assert len(describe_leaks(dataset, train)) == 1
    assert describe_leaks(dataset, train[:180]) == []
    weak = np.where(np.arange(200) % 20 < 2, 1 - DIES, DIES)  # AUROC 0.9
    weak = dataset_of(SOUND, static_weak=weak, clinical_context=np.where(weak == 1, "pale", "x"))
    assert describe_leaks(weak, train) == []


def test_counts_and_percentiles_of_the_summary_are_exact():
    cells = [f"{k} (0h) -> {k} ({k}h)" for k in range(1, 102)]
    labels = [1.0] + [0.0] * 96 + [NAN] * 4
    lactate = [""] * 98 + ["2 (0h) -> 3 (1h)"] * 3
    dataset = dataset_of(cells, label_escalation=labels, trajectory_lactate=lactate)
    lines = summarize(dataset)
    assert lines[0] == "rows 101, patients 101"
    assert lines[1].endswith("1 event in 97 labelled rows (1.0%)")
    percentiles = "median 51, quartiles 26 to 76, 1st to 99th percentile 2 to 100"
    assert lines[3] == f"span in hours: {percentiles}"
    assert lines[4].startswith(f"Anion gap [mEq/L]: {percentiles}; in 101 of 101 patients")
    assert "in 3 of 101 patients" in lines[5]


def test_published_sample_sizes():
    # pmsampsize(type = "b", csrsquared = 0.288, parameters = 24, prevalence = 0.174), its manual
    assert sample_sizes(24, 0.174, 0.288) == (623, 662, 221)
    assert max(sample_sizes(30, 0.05, 0.05)) == 5249  # pre-eclampsia, Riley 2020
    maximum = 1 - np.exp(2 * (0.2 * np.log(0.2) + 0.8 * np.log(0.8)))  # of a constant risk
    assert sample_sizes(10, 0.2) == sample_sizes(10, 0.2, 0.15 * maximum)


def test_the_predictors_are_the_columns_of_the_logistic_regression_with_statics():
    dataset = dataset_of(["20 (0h) -> 21 (4h)"] * 40, static_age=np.arange(40))
    columns = dataset.baseline_inputs()[LOGISTIC].shape[1] + 1
    text = describe_sample_size(dataset, ["static_age"], np.arange(30))
    needed = max(sample_sizes(columns, 0.5))
    assert f"on {columns} predictors needs {needed:,} patients" in text
    assert text.endswith("the training part has 30")


@pytest.mark.parametrize(("rows", "suggested"), [(3900, True), (4100, False)])
def test_folds_are_suggested_where_a_drawn_test_part_has_few_events(rows, suggested, checked):
    messages, _ = checked(dataset_of(["20 (0h)"] * rows))
    assert any("--folds" in line for line in messages) == suggested


@pytest.mark.parametrize(("hours", "warns"), [(43_812.5, True), (721, True), (720, False)])
def test_spans_far_beyond_an_assumed_time_scale_are_a_warning(hours, warns):
    table = table_of([f"20 (0h) -> 21 ({hours}h)"] * 18 + ["20 (0h) -> 21 (4h)"] * 2)
    for scale, lines in ((None, warns), (72.0, 0)):
        description = Description() if scale is None else Description(time_scale=scale)
        dataset = MIMICtrajectoryDataset(table, description=description)
        assert len(describe_long_spans(dataset)) == lines


@pytest.mark.parametrize(
    ("lengths", "rows_a_patient", "start"),
    [
        ([48] * 30 + [20] * 70, 1, "30 of 100 patients"),
        ([48] * 60 + [20] * 140, 2, "30 of 100 patients"),
        ([777] + [48] * 30 + [20] * 169, 1, "31 of 200 patients"),
        ([48] + [20] * 999, 1, "1 of 1,000 patients"),
    ],
)
def test_who_loses_observations_is_counted_by_patient(lengths, rows_a_patient, start):
    text = describe_cut(np.array(lengths), np.arange(len(lengths)) // rows_a_patient, 20)
    assert text.startswith(f"{start} lose observations")
    assert "--max_len 48 " in text
