"""Tests of MIMICtrajectoryDataset: what of a table becomes rows, patients and labels; the check."""

import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MAX_LEN_SEVERAL, Description, InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.texts import SERIES_TEXT, PromptOptions
from trajectories import LABEL, SERIES, dataset_of, table_of

ROOT = Path(dataset_format.__file__).parent
BICARBONATE = ROOT / "medgemma_clinical" / "sample" / "physionet2012_bicarbonate.csv"
CHEMISTRY = ROOT / "tests" / "data" / "physionet2012_chemistry.csv.gz"
GLUCOSE, UREA = "trajectory_glucose [mg/dL]", "trajectory_Blood_urea"
THREE = pd.DataFrame(
    {
        SERIES: ["24 (0h) -> 20 (2h)", "", "7 (1h)"],
        GLUCOSE: ["300 (2h) -> 250 (2.5h)", "90 (4h)", None],
        UREA: ["", "5 (4h) -> 6 (1h)", ""],
        LABEL: [0, 1, 0],
        "subject_id": ["a", "b", "c"],
        "clinical_context": ["old", "", "young"],
    }
)
NAN = float("nan")


def rows_of(dataset, i):
    """Time and values of each observation."""
    rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
    return np.column_stack([dataset.times[rows], dataset.values[rows]])


def refused(table, place, **options):
    with pytest.raises(InputError, match=place):
        MIMICtrajectoryDataset(table, **options)


# --------------------------------------------------------------------------- observations


def test_the_sample_of_nine_series_holds_the_bicarbonate_of_the_other_file():
    same = MIMICtrajectoryDataset(CHEMISTRY, 20, series=["Serum bicarbonate"])
    assert same.fingerprint() == MIMICtrajectoryDataset(BICARBONATE).fingerprint()


def test_the_most_recent_observations_are_kept(caplog):
    long = " -> ".join(f"{k} ({k}h)" for k in reversed(range(60)))
    shifted = " -> ".join(f"{k} ({k + 0.5}h)" for k in range(60))
    table = table_of([long, "1 (0h)"], trajectory_x=[shifted, ""])
    with caplog.at_level(logging.INFO):
        dataset = MIMICtrajectoryDataset(table)
    assert any("1 of 2 patients" in x and "--max_len 120" in x for x in caplog.messages)
    assert dataset.lengths.tolist() == [MAX_LEN_SEVERAL, 1]
    assert rows_of(dataset, 0)[[0, -1], 0].tolist() == [59.5 - (MAX_LEN_SEVERAL - 1) / 2, 59.5]
    for options, length in (({"max_len": 7}, 7), ({"series": ["Anion gap"]}, 20)):
        assert MIMICtrajectoryDataset(table, **options).lengths.tolist() == [length, 1]
    assert dataset_of([long, "1 (0h)"], 3).times.tolist() == [57, 58, 59, 0]


def test_chosen_series_come_in_their_order_and_rows_without_them_are_left_out():
    table = THREE.assign(split=["train", "val", "test"], prediction_hours=9)
    dataset = MIMICtrajectoryDataset(table, series=["blood_UREA", "Glucose"])
    assert dataset.features == ("Blood urea", "glucose")
    assert (dataset.ids.tolist(), dataset.labels.tolist()) == (["a", "b"], [0, 1])
    assert dataset.contexts.tolist() == ["old", ""]
    assert dataset.parts.tolist() == ["train", "val"]
    assert dataset.prediction_hours.tolist() == [9, 9]
    np.testing.assert_array_equal(rows_of(dataset, 0), [(2, NAN, 300), (2.5, NAN, 250)])
    np.testing.assert_array_equal(rows_of(dataset, 1), [(1, 6, NAN), (4, 5, 90)])
    refused(THREE.assign(**{UREA: ""}), "Blood urea", series=["Blood urea"])


def test_a_quiet_file_brings_no_notice_and_the_formats_defaults(caplog):
    table = table_of(["1 (0h) -> 2 (1h) -> 0 (1h)", "3 (0h)"], subject_id=["a", "b"])
    with caplog.at_level(logging.INFO):
        dataset = MIMICtrajectoryDataset(table, **dict.fromkeys(MIMICtrajectoryDataset.options))
    assert caplog.messages == []
    assert dataset.read_options == {"max_len": 20, "label_column": LABEL}
    described = MIMICtrajectoryDataset(THREE, description=Description(time_scale=8760.0))
    for each, scale, assumed in ((dataset, 72.0, True), (described, 8760.0, False)):
        assert (each.time_scale, each.assumed_time_scale) == (scale, assumed)


# --------------------------------------------------------------------------- patients and labels


def test_contexts_may_be_empty_and_one_long_one_costs_no_memory_for_every_row():
    contexts = [" man, 54 years ", None, "x" * 20_000, *["short"] * 997]
    dataset = dataset_of(["1 (0h)"] * 1000, clinical_context=contexts)
    assert dataset.contexts[:2].tolist() == ["man, 54 years", ""]
    assert dataset.contexts.nbytes < 1_000_000


def test_a_label_that_is_not_known_or_not_there_is_nan_where_none_is_required():
    table = table_of(["1 (0h)"] * 2, label_escalation=[True, None])
    refused(table, f"row 1, column {LABEL}: ")
    refused(table.fillna("yes"), f"row 1, column {LABEL}: ", require_labels=False)
    for each, first in ((table, 1), (table.drop(columns=LABEL), NAN)):
        dataset = MIMICtrajectoryDataset(each, require_labels=False)
        np.testing.assert_array_equal(dataset.collate([0, 1])["labels"], [first, NAN])


def test_any_column_of_0_and_1_is_the_label():
    table = table_of(["1 (0h)"] * 3, label_death=[1, 1, 0])
    dataset = MIMICtrajectoryDataset(table, label_column="label_death")
    assert (dataset.labels.tolist(), dataset.outcome) == ([1, 1, 0], "Death")
    assert dataset.read_options["label_column"] == "label_death"
    for required in (True, False):
        options = {"label_column": "death", "require_labels": required}
        refused(table, "column death: ", **options)


# --------------------------------------------------------------------------- prompts

MAIN = "Anion gap (mEq/L): 24 (0h) -> 20 (2h). "
LAST = "Last values: Anion gap 20 mEq/L (2h), glucose 250 mg/dL (2.5h), Blood urea not measured. "
GLUCOSE_TEXT = "glucose (mg/dL): 300 (2h) -> 250 (2.5h). "
PROMPTS = {
    "all": MAIN + GLUCOSE_TEXT + "Blood urea: not measured. ",
    "main": MAIN,
    "last": LAST,
    "none": "",
}


@pytest.mark.parametrize("choice", SERIES_TEXT)
def test_the_prompt_holds_the_series_that_were_chosen_and_what_a_report_computes(choice):
    dataset, question = MIMICtrajectoryDataset(THREE), "Will care have to be escalated?\n"
    prompts = [dataset.prompt(0, PromptOptions(series=choice, computed=c)) for c in (False, True)]
    assert prompts[0] == "old. " + PROMPTS[choice] + question
    words = re.escape(prompts[0]).replace(re.escape(MAIN), re.escape(MAIN) + "lowest .*falling. ")
    words = words.replace(re.escape(GLUCOSE_TEXT), re.escape(GLUCOSE_TEXT) + "falling. ")
    assert re.fullmatch(words, prompts[1])


# --------------------------------------------------------------------------- check


def checked(table, folder, *flags):
    table.to_csv(folder / "data.csv", index=False)
    return dataset_format.main(["check", str(folder / "data.csv"), *flags])


def test_the_check_prints_a_line_a_series(tmp_path, capsys):
    table = pd.concat([THREE.assign(subject_id=THREE["subject_id"] + str(k)) for k in range(20)])
    (tmp_path / "data.json").write_text('{"limits": {"Blood_Urea": [1, 5.5]}}')
    assert checked(table, tmp_path) == 2
    assert "equal" in capsys.readouterr().err
    assert checked(table, tmp_path, "--allow_duplicates") == 0
    output = capsys.readouterr().out
    assert "Anion gap [mEq/L]: median 20, quartiles 7 to 24" in output
    assert re.search(r"Blood urea: median 5.5, .* in 20 of 60 patients, median 2 ", output)
    assert "warning: Blood urea: 20 of 40 values lie outside 1 to 5.5" in output
    assert output.count("lie outside") == 1
    words = ("--series", "glucose", "--max_len", "1", "--allow_duplicates")
    assert checked(table, tmp_path, *words) == 0
    output = capsys.readouterr().out
    assert "Blood urea" not in output
    assert "observations a row: median 1, quartiles 1 to 1" in output


EVENTS = [k // 2 % 2 for k in range(40)]


@pytest.mark.parametrize(
    ("columns", "flags", "named"),
    [
        ({}, [], None),
        ({LABEL: ""}, [], None),
        ({}, ["--series", "lactate"], "--series"),
        ({}, ["--max_len", "0"], "--max_len"),
        ({"trajectory_x": ""}, [], " x: "),
        ({LABEL: 0}, [], "event"),
    ],
)
def test_the_check_refuses_what_the_trainer_would(columns, flags, named, tmp_path, capsys):
    table = table_of(["1 (0h)"] * 40, subject_id=[str(k // 2) for k in range(40)])
    table = table.assign(**{LABEL: EVENTS, "trajectory_x": ["5 (1h)", ""] * 20, **columns})
    assert checked(table, tmp_path, *flags) == (2 if named else 0)
    output = capsys.readouterr()
    if named:
        assert re.fullmatch(rf"error: .*{named}.*\n", output.err)
    else:
        assert re.search(r"x: median 5.* in 20 of 20 patients", output.out)


def test_the_command_summarises_the_sample_data(capsys):
    assert dataset_format.main(["check", str(BICARBONATE)]) == 0
    output = capsys.readouterr()
    for words in ("rows 3,850, patients 3,850", "539 events in 3,850", "train 3,080 rows"):
        assert words in output.out
    assert "warning" not in output.out + output.err
    assert output.out.endswith("\nready\n")


@pytest.mark.parametrize("arguments", ["", "check", "chec a.csv", "check a --ser b"])
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        dataset_format.main(arguments.split())
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
