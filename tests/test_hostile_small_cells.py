"""What a run leaves to be shared, read by someone who looks for small cells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from conftest import SAMPLE
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, read_trajectory

SHARED = ("report.html", "metrics.json", "history.jsonl")
TRAIN = ["--trajectory_only", "--trajectory_epochs", "1", "--encoder_lr", "0.01"]


def train(table: pd.DataFrame, place: Path, *words: str) -> int:
    data = place / "train.csv"
    table.to_csv(data, index=False)
    return trainer.main([*TRAIN, "--data_path", str(data), "--output_dir", str(place), *words])


def texts_of(place: Path) -> str:
    """Everything that a run wrote for other eyes, its log and without pictures."""
    folder = place / "trajectory"
    files = [folder / name for name in SHARED] + list(folder.glob("*.log"))
    return re.sub(r"data:image[^\"]*", "", "\n".join(file.read_text() for file in files))


def metrics_of(place: Path) -> Any:
    return json.loads((place / "trajectory" / "metrics.json").read_text())


def test_a_small_test_part_shows_no_number_of_events(tmp_path: Path) -> None:
    table = pd.read_csv(SAMPLE, nrows=400)
    assert train(table, tmp_path) == 0
    labels = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv")["label"]
    assert 0 < labels.sum() < 11
    shared = texts_of(tmp_path)
    assert "events not shown" in shared
    events = [int(n.replace(",", "")) for n in re.findall(r"(\d[\d,]*) events", shared)]
    assert all(n >= 11 for n in events)
    assert int(table["label_escalation"].sum()) not in events, "the sum less the others tells it"
    test = metrics_of(tmp_path)["test"]
    assert test["events"] is None
    assert test["sensitivity"] == {"value": None, "low": None, "high": None}
    auroc = test["auroc"]["value"]
    assert auroc == round(auroc, 3), "all its digits would tell the number of pairs"
    page = (tmp_path / "trajectory" / "report.html").read_text()
    (split,) = re.findall(r"Split by patient.*?</table>", page, re.DOTALL)
    counts = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td>.*?</td>", split)]
    assert counts[2::3][1:] == ["\N{EN DASH}"] * 2, "events of validation and test"
    assert "fewer than 11" in page
    assert "ROC curve: not drawn" in page
    assert "(--min_cell 11)" in page


def test_the_flag_shows_all_counts_and_says_so(tmp_path: Path) -> None:
    table = pd.read_csv(SAMPLE, nrows=400)
    assert train(table, tmp_path, "--min_cell", "0") == 0
    labels = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv")["label"]
    assert metrics_of(tmp_path)["test"]["events"] == labels.sum()
    assert f"test {len(labels)} rows, {labels.sum()} events" in texts_of(tmp_path)
    assert "shown (--min_cell 0)" in (tmp_path / "trajectory" / "report.html").read_text()


def test_no_line_of_a_page_or_difference_of_lines_is_a_small_cell(tmp_path: Path) -> None:
    assert train(pd.read_csv(SAMPLE), tmp_path) == 0
    predictions = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv")
    rows, events = len(predictions), int(predictions["label"].sum())
    assert events >= 22
    page = (tmp_path / "trajectory" / "report.html").read_text()
    (table,) = re.findall(r"The same model in subgroups.*?</table>", page, re.DOTALL)
    lines = [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", line)]
        for line in re.findall(r"<tr.*?</tr>", table.replace("\n", " "))[1:]
    ]
    assert len(lines) >= 2
    sums: dict[str, list[int]] = {}
    for name, n, k, *_ in lines:
        counted = np.array([int(n) - int(k), int(k)])
        assert not ((counted > 0) & (counted < 11)).any(), name
        sums.setdefault(name.split(":")[0], []).append(int(n))
    assert all(sum(counts) == rows for counts in sums.values()), "nothing is left out to subtract"
    test = metrics_of(tmp_path)["test"]
    assert (test["n"], test["events"]) == (rows, events)
    if test["sensitivity"]["value"] is not None:
        found = round(test["sensitivity"]["value"] * events)
        spared = round(test["specificity"]["value"] * (rows - events))
        assert min(found, events - found, spared, rows - events - spared) >= 11


def with_rare_series(patients: int) -> pd.DataFrame:
    table = pd.read_csv(SAMPLE, nrows=140)
    values = [f"77.123456 ({k}h)" for k in range(patients)]
    return table.assign(**{"trajectory_rare [x]": values + [""] * (len(table) - patients)})


def test_a_series_of_one_patient_reaches_neither_weights_nor_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(with_rare_series(1), tmp_path) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*fewer than 11 patients .* rare.*--series.*--min_cell 0\n", error)
    assert not (tmp_path / TRAJECTORY_FILE).exists()
    assert not list(tmp_path.glob("trajectory*"))


def test_the_check_shows_no_value_of_a_series_of_a_few_patients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataset_format

    path = tmp_path / "data.csv"
    with_rare_series(10).to_csv(path, index=False)
    assert dataset_format.main(["check", str(path)]) == 2
    shown = capsys.readouterr()
    assert "rare in x: in fewer than 11 patients" in shown.out
    assert "77.1" not in shown.out + shown.err
    with_rare_series(100).to_csv(path, index=False)
    assert dataset_format.main(["check", str(path)]) == 0
    assert "77.1" in capsys.readouterr().out


def test_a_shared_checkpoint_tells_no_count_of_a_few(tmp_path: Path) -> None:
    table = pd.read_csv(SAMPLE, nrows=400)
    women = table["clinical_context"].str.contains("woman")
    few = table[~women | (women.cumsum() <= 5)]
    assert train(few, tmp_path) == 0
    mix = read_trajectory(tmp_path / TRAJECTORY_FILE).config["case_mix"]
    assert "women" not in mix
    assert mix["rows"] > 100
    assert "prevalence" in mix
