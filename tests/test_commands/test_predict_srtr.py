"""Predictions for SRTR registrations, also where the outcome is not known yet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
from medgemma_clinical.commands.patients import patients_path
from medgemma_clinical.inference.trajectory_model import MEMORY_ROWS
from pages import Page
from predicting import read_predictions, refused
from srtr_dataset import SRTRTrajectoryDataset
from srtr_files import LISTED, candidate, filler, history_row, random_tables, write_folder


@pytest.fixture(scope="module")
def srtr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A liver folder and a run of stage 1 on it."""
    place = tmp_path_factory.mktemp("srtr")
    write_folder(place / "data", *random_tables(300, "liver", seed=1))
    words = ["--trajectory_only", "--dataset", "srtr", "--organ", "liver", "--log_file", "none"]
    words += ["--data_dir", str(place / "data"), "--output_dir", str(place)]
    assert trainer.main([*words, "--trajectory_epochs", "2", "--transplant", "exclude"]) == 0
    return place


def srtr_command(srtr: Path, data: Path, out: Path, *more: str) -> list[str]:
    words = ["--predict", "--checkpoint", str(srtr / "trajectory"), "--data_dir", str(data)]
    return [*words, "--predictions", str(out), *more]


def test_srtr_predictions_are_those_of_the_run(
    srtr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MEMORY_ROWS, "trajectory", 50)
    out = tmp_path / "out.csv"
    assert trainer.main(srtr_command(srtr, srtr / "data", out, "--organ", "liver")) == 0
    lines = read_predictions(out)
    expected = SRTRTrajectoryDataset(srtr / "data", "liver", require_labels=False)
    assert lines["id"].tolist() == expected.ids.tolist()
    own = pd.read_csv(srtr / "trajectory" / "predictions_test.csv", dtype={"id": str})
    known = lines.set_index("id")["probability"][own["id"]].to_numpy()
    assert np.abs(known - own["probability"]).max() < 1e-6


def test_registrations_without_a_known_outcome_are_scored_and_their_future_is_not_read(
    srtr: Path, tmp_path: Path
) -> None:
    candidates, history = filler()
    dead = {"CAN_REM_CD": 8, "CAN_REM_DT": LISTED + 120, "CAN_DEATH_DT": LISTED + 120}
    futures: dict[int, dict[str, Any]] = {
        1: {"CAN_ENDWLFU": LISTED + 130},  # still waits, the horizon not over
        2: {"CAN_REM_CD": 12, "CAN_REM_DT": LISTED + 130},
        3: {"CAN_REM_CD": 4, "CAN_REM_DT": LISTED + 130, "REC_TX_DT": LISTED + 130},
        4: dead,
        5: {},
    }
    candidates += [candidate(px, **future) for px, future in futures.items()]
    candidates.append(candidate(6, CAN_ENDWLFU=LISTED + 80))  # the landmark has not come
    for px in range(1, 7):
        history += [history_row(px, 10), history_row(px, 125, CANHX_BILI=30.0 + px)]
    folder, out = write_folder(tmp_path / "new", candidates, history), tmp_path / "out.csv"
    assert trainer.main(srtr_command(srtr, folder, out)) == 0
    known = read_predictions(out).set_index("id")["probability"]
    assert "6" not in known.index
    assert known[[str(px) for px in futures]].nunique() == 1  # alike up to the landmark


def test_another_organ_is_refused(
    srtr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out.csv", srtr / "data"
    words = srtr_command(srtr, data, out, "--organ", "kidney")
    assert refused(capsys, words, "kidney", "liver", out=out)
    kidney = write_folder(tmp_path / "kidney", *random_tables(50, "kidney", seed=1), "kidney")
    words = srtr_command(srtr, kidney, out)
    assert refused(capsys, words, "cand_liin", "trained on liver", out=out)


def test_the_page_of_patients_shows_days_words_and_the_landmark(srtr: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    dataset = SRTRTrajectoryDataset(srtr / "data", "liver", require_labels=False)
    names = [feature.name for feature in dataset._organ.features if feature.words]
    states = dataset.values[:, [dataset.features.index(name) for name in names]]
    rows = np.flatnonzero(np.add.reduceat(~np.isnan(states).all(axis=1), dataset.offsets[:-1]))
    asked = str(dataset.ids[rows[0]])
    words = srtr_command(srtr, srtr / "data", out, "--explain", "--patients", asked)
    assert trainer.main(words) == 0
    page = Page(patients_path(out).read_text())
    probability = read_predictions(out).set_index("id")["probability"][asked]
    ((alt, svg),) = page.images()
    assert f"{100 * probability:.1f} % at day 90" in alt
    assert ">days<" in svg
    assert "The question is asked at day 90." in page.text
    known = [feature for feature in dataset._organ.features if feature.words]
    shown = [
        f"{feature.name} {word}" for feature in known for word in (feature.words or {}).values()
    ]
    assert any(words in page.text for words in shown)
    facts = page.text.partition("Facts that were read ")[2].partition(" Effect of leaving")[0]
    zero = re.search("of value 0: ([^;]*)", facts)
    assert zero
    assert zero[1].count("blood group") == 3
    assert re.search(r"blood group (A|B|AB|O): 1\b", facts)
    assert ": 0;" not in facts
    assert not re.search(r"[1-9]\.\d\d", facts), "one decimal at most"
