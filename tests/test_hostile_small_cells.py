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
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import PromptOptions
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


def test_a_part_with_a_few_events_tells_their_number_nowhere(tmp_path: Path) -> None:
    """AUROCs, Brier scores and counts of the other parts would, even rounded."""
    table = pd.read_csv(SAMPLE, nrows=400)
    assert train(table, tmp_path, "--report_to", "tensorboard") == 0
    labels = pd.read_csv(tmp_path / "trajectory" / "predictions_test.csv")["label"]
    assert 0 < labels.sum() < 11
    shared = texts_of(tmp_path)
    assert "number of events not shown" in shared
    assert not re.findall(r"\d[\d,]* events", shared)
    metrics = metrics_of(tmp_path)
    for part in ("validation", "test"):
        beside = [*metrics["baselines"].values(), *metrics["differences"].values()]
        beside += [metrics["combined"], metrics["combined_minus_blend"]]
        figures = [metrics[part], *(each[part] for each in beside)]
        for known in figures:
            unknown = [each for each in known.values() if isinstance(each, dict)]
            assert all(each == {"value": None, "low": None, "high": None} for each in unknown)
            assert len(unknown) >= 5
        assert metrics[part]["events"] is None
    page = (tmp_path / "trajectory" / "report.html").read_text()
    assert "Fewer than 11 of the patients of these 40 rows have, or lack, the event" in page
    assert not re.search(r"(AUROC|AUPRC|Brier)\D*0\.\d\d[1-9]", page)
    (split,) = re.findall(r"Split by patient.*?</table>", page, re.DOTALL)
    counts = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td>.*?</td>", split)]
    assert counts[2::3] == ["\N{EN DASH}"] * 3, "the training part's tells the others'"
    mix = read_trajectory(tmp_path / TRAJECTORY_FILE).config["case_mix"]
    assert "prevalence" not in mix
    lines = (tmp_path / "trajectory" / "history.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["train_loss"] is line["val_loss"] is line["val_auroc"] is None
    assert "losses and AUROC not shown" in shared
    assert "Learning curve" not in page
    for file in (tmp_path / "tracker").rglob("events*"):
        assert not re.search(b"test_auroc|val_loss|val_auroc|train_loss", file.read_bytes())


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
    assert test["sensitivity"]["value"] is not None, "else there is nothing to look at"
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


def test_a_drawn_split_tells_no_part_by_the_other_and_a_given_one_shows_what_is_enough(
    tmp_path: Path,
) -> None:
    table = pd.read_csv(SAMPLE, nrows=1500)
    event = table["label_escalation"] == 1
    parts = np.where(np.arange(1500) % 3 == 0, "test", "train").astype(object)
    parts[np.flatnonzero(event)[:54:6]] = "val"
    parts[np.flatnonzero(~event)[:60]] = "val"
    assert train(table.assign(split=parts), tmp_path) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["validation"]["events"] is None
    assert metrics["test"]["events"] > 20
    assert not re.findall(r"(?:train|val) [\d,]+ rows, \d", texts_of(tmp_path))
    few, others = np.flatnonzero(event), np.flatnonzero(~event)
    split = {"val": np.r_[few[:5], others[:40]], "test": np.r_[few[5:40], others[40:90]]}
    data = Data(MIMICtrajectoryDataset(table), split, PromptOptions(), "", "", 11)
    assert data.hides_events
    assert data.hides_figures
    data.dataset.parts = np.array(["val"] * 1500)
    assert not data.hides_figures
