"""Tests of DKA files with several series of one patient: columns, union of times, text."""

from __future__ import annotations

import gzip
import hashlib
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dataset_format
from dataset_format import MAX_LEN_SEVERAL, InputError, MIMICtrajectoryDataset
from medgemma_clinical.data.texts import SERIES_TEXT, PromptOptions
from trajectories import LABEL, SERIES, random_text, table_of

DATA = Path(dataset_format.__file__).parent / "tests" / "data"
BICARBONATE, CHEMISTRY = (
    DATA / "physionet2012_bicarbonate.csv",
    DATA / "physionet2012_chemistry.csv.gz",
)
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


def rows_of(dataset: MIMICtrajectoryDataset, i: int) -> list[tuple[float, ...]]:
    """Time and values of each observation."""
    rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
    return [
        (t, *v) for t, v in zip(dataset.times[rows].tolist(), dataset.values[rows], strict=True)
    ]


def slow_union(texts: list[str]) -> list[tuple[float, ...]]:
    """Join series one value after the other: the k-th at a time with the k-th of the others."""
    table: dict[tuple[float, int], list[float]] = {}
    for f, text in enumerate(texts):
        seen: dict[float, int] = {}
        for piece in text.split("->") if text else []:
            value, hours = (float(x) for x in piece.replace(")", "").replace("h", "").split("("))
            seen[hours] = seen.get(hours, -1) + 1
            table.setdefault((hours, seen[hours]), [NAN] * len(texts))[f] = value
    return [(hours, *values) for (hours, _), values in sorted(table.items())]


# --------------------------------------------------------------------------- format


def test_observations_are_the_union_of_all_times_and_the_rest_is_missing() -> None:
    dataset = MIMICtrajectoryDataset(THREE)
    assert dataset.features == ("Anion gap", "glucose", "Blood urea")
    assert dataset.units == ("mEq/L", "mg/dL", "")
    expected = [
        [(0, 24, NAN, NAN), (2, 20, 300, NAN), (2.5, NAN, 250, NAN)],
        [(1, NAN, NAN, 6), (4, NAN, 90, 5)],
        [(1, 7, NAN, NAN)],
    ]
    for i, rows in enumerate(expected):
        np.testing.assert_array_equal(rows_of(dataset, i), rows)
    batch = dataset.collate([1])
    assert batch["observed"].tolist() == [[[False, False, True], [False, True, True]]]
    assert batch["times"].tolist() == [[0, 3]]


def test_the_union_agrees_with_a_slow_reference_on_random_texts() -> None:
    rng = np.random.default_rng(5)
    columns = [[random_text(rng) if rng.random() < 0.7 else "" for _ in range(300)] for _ in "abcd"]
    columns[0] = [a or random_text(rng) for a in columns[0]]
    names = [SERIES, "trajectory_a", "trajectory_b [u]", "trajectory_c"]
    table = pd.DataFrame({**dict(zip(names, columns, strict=True)), LABEL: [0, 1] * 150})
    dataset = MIMICtrajectoryDataset(table, max_len=1000)
    for i, texts in enumerate(zip(*columns, strict=True)):
        np.testing.assert_array_equal(rows_of(dataset, i), slow_union(list(texts)), repr(texts))


def test_equal_times_within_a_series_stay_apart_and_pair_with_the_others_in_order() -> None:
    table = table_of(["1 (0h) -> 2 (0h) -> 3 (5h)"], trajectory_x=["7 (0h) -> 8 (5h) -> 9 (5h)"])
    rows = rows_of(MIMICtrajectoryDataset(table), 0)
    np.testing.assert_array_equal(rows, [(0, 1, 7), (0, 2, NAN), (5, 3, 8), (5, NAN, 9)])


def test_series_of_one_value_each_share_an_observation_at_a_common_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        same = MIMICtrajectoryDataset(table_of(["1 (5h)"], trajectory_x=["7 (5h)"]))
        apart = MIMICtrajectoryDataset(table_of(["1 (5h)"], trajectory_x=["7 (0h)"]))
    assert rows_of(same, 0) == [(5, 1, 7)]
    np.testing.assert_array_equal(rows_of(apart, 0), [(0, NAN, 7), (5, 1, NAN)])
    assert not [message for message in caplog.messages if "sorted" in message]


def test_a_file_of_one_series_gives_the_very_same_tensors_and_prompts_as_ever() -> None:
    # Taken before further series could be read.
    dataset = MIMICtrajectoryDataset(BICARBONATE)
    digest = hashlib.sha256()
    batch = dataset.collate(range(len(dataset)))
    for tensor in (batch[k] for k in ("times", "values", "observed", "labels", "index")):
        digest.update(tensor.numpy().tobytes())
    for i in range(len(dataset)):
        digest.update(dataset.prompt(i).encode())
    assert digest.hexdigest().startswith("2c78b36fee4760cfc880cc6741aa5070")
    assert dataset.fingerprint().startswith("6981afb4427cbdc5f618cc1ddca086b8")


def test_the_sample_of_nine_series_holds_the_bicarbonate_of_the_other_file() -> None:
    nine = MIMICtrajectoryDataset(CHEMISTRY)
    assert len(nine.features) == 9
    assert nine.source.endswith(".csv.gz")
    alone, same = (
        MIMICtrajectoryDataset(BICARBONATE),
        MIMICtrajectoryDataset(CHEMISTRY, 20, series=["Serum bicarbonate"]),
    )
    assert same.fingerprint() == alone.fingerprint()
    assert [same.prompt(i) for i in range(50)] == [alone.prompt(i) for i in range(50)]


def test_the_most_recent_of_the_union_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    long = " -> ".join(f"{k} ({k}h)" for k in range(60))
    shifted = " -> ".join(f"{k} ({k + 0.5}h)" for k in range(60))
    table = table_of([long, "1 (0h)"], trajectory_x=[shifted, ""])
    with caplog.at_level(logging.INFO):
        dataset = MIMICtrajectoryDataset(table)
    assert dataset.lengths.tolist() == [MAX_LEN_SEVERAL, 1]
    assert rows_of(dataset, 0)[-1][::2] == (59.5, 59)
    assert rows_of(dataset, 0)[0][0] == 59.5 - (MAX_LEN_SEVERAL - 1) / 2
    assert any("as rows are longer than 64: " in message for message in caplog.messages)
    assert MIMICtrajectoryDataset(table, 7).lengths.tolist() == [7, 1]
    assert MIMICtrajectoryDataset(table, series=["Anion gap"]).lengths.tolist() == [20, 1]


@pytest.mark.parametrize(
    "name",
    [
        *("trajectory_ _ [u]", "trajectory_x [", "trajectoryglucose", "Trajectory_x"),
        *("trajectory_vitamin, 1 [u]", "trajectory_24", "trajectory_x [24]", "trajectory_a\\nb ["),
    ],
)
def test_a_series_column_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"row 1, column .*write trajectory_NAME") as caught:
        MIMICtrajectoryDataset(table_of(["1 (0h)"], **{name: ["1 (0h)"]}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["trajectory_Glucose", "trajectory_anion_gap [mmol/L]"])
def test_two_series_of_one_name_are_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"column {re.escape(name)}: another column is a series of that name"
    ):
        MIMICtrajectoryDataset(THREE.assign(**{name: ""}))


@pytest.mark.parametrize(
    ("cell", "problem"),
    [("5 (1h) -> 98765", "piece 2 is not of the form"), ("98765e60 (1h)", "too large")],
)
def test_a_bad_cell_is_named_by_its_own_column(cell: str, problem: str) -> None:
    table = THREE.assign(**{UREA: ["", "", cell]})
    with pytest.raises(InputError, match=rf"row 2, column {UREA}: .*{problem}") as caught:
        MIMICtrajectoryDataset(table)
    assert "98765" not in str(caught.value)


def test_a_row_without_any_value_is_refused() -> None:
    table = THREE.assign(**{SERIES: ["1 (0h)", "", ""], UREA: ""})
    with pytest.raises(InputError, match=r"row 2, .*no series of this row holds a value$"):
        MIMICtrajectoryDataset(table)
    with pytest.raises(InputError, match=r"row 1, column clinical_trajectory: is empty"):
        MIMICtrajectoryDataset(table[[SERIES, LABEL]])


def test_chosen_series_come_in_their_order_and_rows_without_them_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        dataset = MIMICtrajectoryDataset(THREE, series=["blood_UREA", "Glucose"])
    assert dataset.features == ("Blood urea", "glucose")
    assert (dataset.ids.tolist(), dataset.labels.tolist()) == (["a", "b"], [0, 1])
    assert dataset.contexts.tolist() == ["old", ""]
    assert dataset.groups.tolist() == ["a", "b"]
    parts = THREE.assign(split=["train", "val", "test"])
    chosen = MIMICtrajectoryDataset(parts, series=["glucose"]).parts
    assert chosen is not None
    assert chosen.tolist() == ["train", "val"]
    np.testing.assert_array_equal(rows_of(dataset, 0), [(2, NAN, 300), (2.5, NAN, 250)])
    np.testing.assert_array_equal(rows_of(dataset, 1), [(1, 6, NAN), (4, 5, 90)])
    assert "DataFrame: 1 rows without a value are left out" in caplog.messages


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        (["lactate"], "--series lactate: no such series among: Anion gap, glucose, Blood urea$"),
        (["glucose", "GLUCOSE"], "once"),
        ([], "one at least"),
    ],
)
def test_a_choice_that_cannot_be_met_is_refused(chosen: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        MIMICtrajectoryDataset(THREE, series=chosen)


def test_a_choice_that_no_row_measures_is_refused() -> None:
    with pytest.raises(InputError, match="no row holds a value of Blood urea"):
        MIMICtrajectoryDataset(THREE.assign(**{UREA: ""}), series=["Blood urea"])


# --------------------------------------------------------------------------- kinds of file


@pytest.mark.parametrize("name", ["data.csv.gz", "data.parquet", "data.csv"])
def test_compressed_files_and_parquet_hold_the_same_as_a_table(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
        THREE.to_parquet(tmp_path / name)
    else:
        THREE.to_csv(tmp_path / name, index=False)
    (tmp_path / "data.json").write_text('{"series": "Gap", "unit": "mmol/L"}')
    dataset = MIMICtrajectoryDataset(tmp_path / name)
    assert dataset.fingerprint() == MIMICtrajectoryDataset(THREE).fingerprint()
    assert (dataset.features[0], dataset.units[0]) == ("Gap", "mmol/L")


@pytest.mark.parametrize("name", ["data.csv.gz", "data.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_file_is_refused_in_one_line(name: str, damage: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    big = pd.concat([THREE.assign(subject_id=f"p{k}") for k in range(200)])
    big.to_parquet(path) if name.endswith("parquet") else big.to_csv(path, index=False)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    whole: dict[str, bytes] = {
        "cut": bytes(content[: len(content) // 2]),
        "text": b"a,b\n",
        "empty": b"",
    }
    path.write_bytes(whole.get(damage, bytes(content)))
    refused = ""
    try:
        MIMICtrajectoryDataset(path)
    except InputError as error:
        refused = str(error)
    # Parquet keeps no checksum: a flipped value may pass unseen.
    assert refused.startswith(str(path)) or damage == "flipped"
    assert "\n" not in refused


def test_parquet_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        MIMICtrajectoryDataset(tmp_path / "data.parquet")


def test_a_gzip_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(b"\xff\xfe\x00\x01"))
    with pytest.raises(InputError, match="UTF-8"):
        MIMICtrajectoryDataset(path)


# --------------------------------------------------------------------------- text


PROMPTS = {
    "all": "old. Anion gap (mEq/L): 24 (0h) -> 20 (2h). glucose (mg/dL): 300 (2h) -> 250 (2.5h). "
    "Blood urea: not measured. ",
    "main": "old. Anion gap (mEq/L): 24 (0h) -> 20 (2h). ",
    "last": "old. Last values: Anion gap 20 mEq/L (2h), glucose 250 mg/dL (2.5h), "
    "Blood urea not measured. ",
    "none": "old. ",
}


@pytest.mark.parametrize("choice", SERIES_TEXT)
def test_the_prompt_holds_the_series_that_were_chosen(choice: str) -> None:
    dataset = MIMICtrajectoryDataset(THREE)
    prompt = dataset.prompt(0, PromptOptions(series=choice))
    assert prompt == PROMPTS[choice] + "Will care have to be escalated?\n"


@pytest.mark.parametrize("choice", SERIES_TEXT)
def test_what_a_report_computes_follows_the_values_of_each_series(choice: str) -> None:
    dataset = MIMICtrajectoryDataset(THREE)
    prompt = dataset.prompt(0, PromptOptions(series=choice, computed=True))
    values = "Anion gap (mEq/L): 24 (0h) -> 20 (2h). "
    sentence = (
        "lowest 20 mEq/L at 2 h, highest 24 mEq/L at 0 h. "
        "Net change -4 mEq/L, -2 mEq/L an hour: falling. "
    )
    expected = PROMPTS[choice].replace(values, values + sentence)
    expected = expected.replace("250 (2.5h). ", "250 (2.5h). falling. ")
    assert prompt == expected + "Will care have to be escalated?\n"
    assert (sentence in prompt) == (choice in ("all", "main"))
    only = "glucose (mg/dL): 90 (4h). only one value. Blood urea: 6 (1h) -> 5 (4h). falling. "
    other = dataset.prompt(1, PromptOptions(series=choice, computed=True))
    assert (only in other) == (choice == "all")


def test_a_report_states_the_main_series_in_full_and_first_and_last_of_the_others() -> None:
    dataset = MIMICtrajectoryDataset(THREE)
    assert dataset.report(0) == (
        "Escalation: no. Anion gap: first 24 mEq/L at 0 h, last 20 mEq/L at 2 h, "
        "lowest 20 mEq/L at 2 h, highest 24 mEq/L at 0 h. "
        "Net change -4 mEq/L, -2 mEq/L an hour: falling. "
        "glucose: from 300 mg/dL at 2 h to 250 mg/dL at 2.5 h, falling. Blood urea: not measured."
    )
    rising = table_of(
        ["1 (0h)"], trajectory_x=["1 (0h) -> 2 (1h)"], trajectory_y=["3 (0h) -> 3 (2h)"]
    )
    assert (
        MIMICtrajectoryDataset(rising)
        .report(0)
        .endswith("x: from 1 at 0 h to 2 at 1 h, rising. y: from 3 at 0 h to 3 at 2 h, level.")
    )
    assert dataset.report(1) == (
        "Escalation: yes. Anion gap: not measured. glucose: only 90 mg/dL at 4 h. "
        "Blood urea: from 6 at 1 h to 5 at 4 h, falling."
    )


# --------------------------------------------------------------------------- check


def checked(table: pd.DataFrame, folder: Path, *flags: str) -> int:
    path = folder / "data.csv"
    table.to_csv(path, index=False)
    return dataset_format.main(["check", str(path), *flags])


def test_the_check_prints_a_line_a_series(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.concat([THREE.assign(subject_id=THREE["subject_id"] + str(k)) for k in range(20)])
    (tmp_path / "data.json").write_text('{"limits": {"Blood_Urea": [1, 5.5]}}')
    assert checked(table, tmp_path) == 2
    assert "are equal in series, context and label" in capsys.readouterr().err
    assert checked(table, tmp_path, "--allow_duplicates") == 0
    output = capsys.readouterr().out
    assert "Anion gap [mEq/L]: median 20, quartiles 7 to 24" in output
    assert "glucose [mg/dL]: median 250" in output
    assert re.search(r"Blood urea: median 5.5, .* in 20 of 60 patients, 2 values a row", output)
    assert (
        "warning: Blood urea: 20 of 40 values lie outside 1 to 5.5: most of them: convert the unit"
    ) in output
    assert output.count("warning: Blood") == output.count("lie outside") == 1
    words = ("--max_len", "1", "--allow_duplicates")
    assert checked(table, tmp_path, "--series", "glucose", *words) == 0
    output = capsys.readouterr().out
    assert "Blood urea" not in output
    assert "observations a row: median 1, quartiles 1 to 1" in output
    assert checked(table, tmp_path, "--series", "lactate") == 2
    assert re.fullmatch(r"error: .*no such series.*\n", capsys.readouterr().err)
    assert checked(table, tmp_path, "--max_len", "0") == 2


def test_without_limits_what_lies_far_outside_the_quartiles_is_suspicious(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 60
    table = table_of(
        [f"{20 + k % 5} (0h)" for k in range(rows)],
        trajectory_x=[f"{100 + k % 10} (0h)" for k in range(rows - 1)] + ["1000 (0h)"],
    )
    assert checked(table, tmp_path) == 0
    assert "warning: x: 1 of 60 values lie outside 5" in capsys.readouterr().out


def test_the_share_of_patients_counts_patients_not_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(["1 (0h)"] * 40, subject_id=[str(k // 2) for k in range(40)])
    table["label_escalation"] = [k // 2 % 2 for k in range(40)]
    table["trajectory_x"] = ["5 (1h)" if k % 2 else "" for k in range(40)]
    assert checked(table, tmp_path) == 0
    assert re.search(r"x: median 5.* in 20 of 20 patients", capsys.readouterr().out)


def test_the_check_refuses_what_the_trainer_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(["1 (0h)"] * 40, trajectory_glucose=[""] * 40)
    assert checked(table, tmp_path) == 2
    assert re.fullmatch(r"error: .*never measures glucose.*\n", capsys.readouterr().err)


# --------------------------------------------------------------------------- nothing lost unseen


def test_a_patient_in_the_index_of_a_table_is_found(tmp_path: Path) -> None:
    indexed = THREE.assign(subject_id=["a", "a", "b"]).set_index("subject_id")
    assert MIMICtrajectoryDataset(indexed).groups.tolist() == ["a", "a", "b"]
    pytest.importorskip("pyarrow")
    indexed.to_parquet(tmp_path / "data.parquet")
    assert MIMICtrajectoryDataset(tmp_path / "data.parquet").groups.tolist() == ["a", "a", "b"]


def test_columns_that_are_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        MIMICtrajectoryDataset(THREE.assign(age=1, hospital=2))
    assert "DataFrame: columns not read: age, hospital" in caplog.messages


def test_columns_that_the_commands_write_for_readers_are_not_listed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = ("hadm_id", "prediction_time", "prediction_hours", "static_age [years]", "label_death")
    with caplog.at_level(logging.INFO):
        MIMICtrajectoryDataset(THREE.assign(**dict.fromkeys(names, 9)))
    assert not any("not read" in message for message in caplog.messages)
