"""Tests of MIMICtrajectoryDataset: what of a table becomes rows, patients and labels; the check."""

import hashlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MAX_LEN_SEVERAL, Description, InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.data.texts import SERIES_TEXT, PromptOptions
from trajectories import LABEL, SERIES, dataset_of, random_text, table_of
from visits import cohort

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


def slow_union(texts):
    """Join series one value after the other: the k-th at a time with the k-th of the others."""
    table = {}
    for f, text in enumerate(texts):
        seen = {}
        for piece in text.split("->") if text else []:
            value, hours = (float(x) for x in piece.replace(")", "").replace("h", "").split("("))
            seen[hours] = seen.get(hours, -1) + 1
            table.setdefault((hours, seen[hours]), [NAN] * len(texts))[f] = value
    return [(hours, *values) for (hours, _), values in sorted(table.items())]


def refused(table, place, **options):
    with pytest.raises(InputError, match=place):
        MIMICtrajectoryDataset(table, **options)


# --------------------------------------------------------------------------- observations


def test_the_union_agrees_with_a_slow_reference_on_random_texts():
    rng = np.random.default_rng(5)
    columns = [[random_text(rng) if rng.random() < 0.7 else "" for _ in range(300)] for _ in "abcd"]
    columns[0] = [a or random_text(rng) for a in columns[0]]
    names = [SERIES, "trajectory_a", "trajectory_b [u]", "trajectory_c"]
    table = pd.DataFrame({**dict(zip(names, columns, strict=True)), LABEL: [0, 1] * 150})
    dataset = MIMICtrajectoryDataset(table, max_len=1000)
    for i, texts in enumerate(zip(*columns, strict=True)):
        np.testing.assert_array_equal(rows_of(dataset, i), slow_union(texts), repr(texts))


def test_a_file_of_one_series_gives_the_very_same_tensors_and_prompts_as_ever():
    # Taken before further series could be read.
    dataset = MIMICtrajectoryDataset(BICARBONATE)
    digest = hashlib.sha256()
    batch = dataset.collate(range(len(dataset)))
    for tensor in (batch[k] for k in ("times", "values", "observed", "labels", "index")):
        digest.update(tensor.numpy().tobytes())
    for i in range(len(dataset)):
        digest.update(dataset.prompt(i).encode())
    assert digest.hexdigest().startswith("2c78b36fee4760cfc880cc6741aa5070")


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


def test_a_row_without_any_value_is_refused_or_noted():
    table = THREE.assign(**{SERIES: ["1 (0h)", "", ""], UREA: ""})
    refused(table, f"row 2, column {SERIES}: ")
    refused(table[[SERIES, LABEL]], f"row 1, column {SERIES}: ")
    findings = Findings("x", strict=False)
    assert len(MIMICtrajectoryDataset(table[[SERIES, LABEL]], findings=findings)) == 1
    assert [*findings.problems] == [1, 2]


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_a_file_and_its_data_frame_give_the_same_data_set(ending, tmp_path):
    table = cohort(30).assign(split=lambda t: np.where(t["subject_id"] < "P010", "test", "train"))
    path, sources = tmp_path / f"data.{ending}", [table.set_index("subject_id")]
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
        sources.append(tmp_path / "indexed.parquet")
        sources[0].to_parquet(sources[1])
    else:
        table.to_csv(path, index=False)
    expected = MIMICtrajectoryDataset(table)
    for dataset in map(MIMICtrajectoryDataset, [path, *sources]):
        assert dataset.fingerprint() == expected.fingerprint()
        for name in ("times", "values", "offsets", "labels", "ids", "groups", "contexts", "parts"):
            assert np.array_equal(getattr(dataset, name), getattr(expected, name)), name


def test_a_quiet_file_brings_no_notice_and_the_formats_defaults(caplog):
    table = table_of(["1 (0h) -> 2 (1h)", "3 (0h)"], subject_id=["a", "b"])
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


def test_labels_are_0_and_1_or_booleans_and_required_to_learn():
    words = ["True", "FALSE", "true", "false", "1", "0.0"]
    assert dataset_of(["1 (0h)"] * 6, label_escalation=words).labels.tolist() == [1, 0, 1, 0, 1, 0]
    place = f"row 1, column {LABEL}: "
    for wrong in ("yes", "truer", "2", "0.5", 3):
        table = table_of(["1 (0h)"] * 2, label_escalation=[True, wrong])
        refused(table, place, require_labels=False)
        options = {"require_labels": False, "findings": Findings("x")}
        np.testing.assert_array_equal(MIMICtrajectoryDataset(table, **options).labels, [1, NAN])
    table = table_of(["1 (0h)"] * 2, label_escalation=[1, None])
    refused(table, place)
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


def test_the_command_summarises_the_sample_data():
    command = [sys.executable, str(ROOT / "dataset_format.py"), "check", str(BICARBONATE)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("rows 3,850, patients 3,850", "539 events in 3,850", "train 3,080 rows"):
        assert words in result.stdout
    assert "warning" not in result.stdout
    assert result.stdout.endswith("\nready\n")


@pytest.mark.parametrize("arguments", ["", "check", "chec a.csv", "check a b", "check a --ser b"])
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        dataset_format.main(arguments.split())
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
