"""Prompts and reports: their words, and that each number is the patient's own."""

import math
import re

import numpy as np
import pytest

from dataset_format import Description, MIMICtrajectoryDataset
from medgemma_clinical.data.texts import PromptOptions
from trajectories import GAP, dataset_of, one_series, random_text, table_of

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
DEATH = Description(
    series="Serum bicarbonate",
    unit="mmol/L",
    question="Will the patient die in hospital?",
    outcome="In-hospital death",
)


def one_row(series, label=0, description=None, **columns):
    table = table_of([series], label_escalation=label, **columns)
    description = description or Description()
    return MIMICtrajectoryDataset(table, description=description, require_labels=False)


def test_texts_of_the_users_example():
    dataset = one_row("24 (0h) -> 20 (2h) -> 16 (4h) -> 12.5 (6h)")
    assert dataset.prompt(0) == (
        "Anion gap (mEq/L): 24 (0h) -> 20 (2h) -> 16 (4h) -> 12.5 (6h). "
        "Will care have to be escalated?\n"
    )
    assert dataset.report(0) == (
        "Escalation: no. Anion gap: first 24 mEq/L at 0 h, last 12.5 mEq/L at 6 h, "
        "lowest 12.5 mEq/L at 6 h, highest 24 mEq/L at 0 h. "
        "Net change -11.5 mEq/L, -2 mEq/L an hour: falling."
    )


def test_texts_take_context_and_clinical_words_from_the_description():
    context = "54-year-old woman."
    dataset = one_row("26 (1.5h) -> 28 (5.5h)", 1, DEATH, clinical_context=context)
    assert dataset.prompt(0) == (
        "54-year-old woman. Serum bicarbonate (mmol/L): 26 (1.5h) -> 28 (5.5h). "
        "Will the patient die in hospital?\n"
    )
    report = dataset.report(0)
    assert report.startswith("In-hospital death: yes. Serum bicarbonate: first 26 mmol/L at 1.5 h")
    assert report.endswith("Net change 2 mmol/L, 0.5 mmol/L an hour: rising.")


def test_every_number_is_the_patients_own_and_computed_ones_may_stand_in_the_prompt():
    rng = np.random.default_rng(3)
    dataset = dataset_of([random_text(rng) for _ in range(200)])
    for i in range(200):
        times, values = one_series(dataset, i)
        numbers = [float(n) for n in NUMBER.findall(dataset.prompt(i))]
        assert numbers == [n for pair in zip(values, times, strict=True) for n in pair]
        low, high = values.index(min(values)), values.index(max(values))
        report = dataset.report(i)
        stated = [float(n) for n in NUMBER.findall(report)]
        assert stated[:8] == [n for k in (0, -1, low, high) for n in (values[k], times[k])]
        assert stated[8] == pytest.approx(values[-1] - values[0], abs=1e-6)
        assert len(stated) <= 10
        for options in ({}, {"latest": 1}):  # of the whole series, not of its end
            prompt = dataset.prompt(i, PromptOptions(computed=True, **options))
            assert report[report.index("lowest") :] in prompt


@pytest.mark.parametrize(
    ("series", "end"),
    [
        ("1 (0h) -> 2 (1h)", "Net change 1 mEq/L, 1 mEq/L an hour: rising."),
        ("2 (0h) -> 3 (1h) -> 1 (2h)", "Net change -1 mEq/L, -0.5 mEq/L an hour: falling."),
        ("2 (0h) -> 9 (1h) -> 2 (2h)", "Net change 0 mEq/L, 0 mEq/L an hour: level."),
        ("2 (0h)", "Net change 0 mEq/L: level."),  # within no time there is no rate
        ("24 (5h) -> 20 (5h)", "Net change -4 mEq/L: falling."),
        # One significant figure, however small.
        ("20 (0h) -> 20.1 (100h)", ", 0.001 mEq/L an hour: rising."),
        ("20 (0h) -> 24.003 (100h)", ", 0.04 mEq/L an hour: rising."),
        ("20 (0h) -> 18.7 (100h)", ", -0.01 mEq/L an hour: falling."),
        ("20 (0h) -> 1000 (100h)", ", 10 mEq/L an hour: rising."),
    ],
)
def test_rate_and_direction_are_those_of_last_to_first(series, end):
    assert one_row(series).report(0).endswith(end)


def test_a_single_value_computes_nothing_and_zero_has_no_sign():
    dataset = one_row("-0 (0h)", description=GAP, trajectory_x="5 (1h)")
    text = dataset.prompt(0, PromptOptions(computed=True))
    assert text.startswith("Anion gap (mEq/L): 0 (0h). lowest 0 mEq/L at 0 h, highest 0 mEq/L at")
    assert "x: 5 (1h). only one value. Will" in text


def test_there_is_no_report_to_learn_where_the_label_is_unknown():
    dataset = one_row("24 (0h)", math.nan)
    assert dataset.prompt(0)
    with pytest.raises(ValueError, match=" 0 "):
        dataset.report(0)


def test_options_of_the_prompt_leave_the_data_set_as_it_is():
    dataset = one_row("24 (0h) -> 20 (2h) -> 16 (4h)", clinical_context="54-year-old woman")
    whole = dataset.prompt(0)
    assert dataset.prompt(0, PromptOptions(latest=2)) == whole.replace("24 (0h) -> ", "")
    assert dataset.prompt(0, PromptOptions(latest=9)) == whole
    assert dataset.prompt(0, PromptOptions(context=False)) == whole.partition(". ")[2]
    assert dataset.prompt(0, PromptOptions(series="none")) == (
        f"54-year-old woman. {dataset.question}\n"
    )
    two = one_row("24 (0h)", description=GAP, trajectory_x="5 (1h)")
    main = "Anion gap (mEq/L): 24 (0h). Will care have to be escalated?\n"
    assert two.prompt(0, PromptOptions(series="main")) == main
    assert dataset.prompt(0) == whole
