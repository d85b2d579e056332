"""Earlier stages beside a later one: only the same rows, data and stage 1."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from language_models import patients
from medgemma_clinical.commands.run_folder import RUN_FORMAT, write_run
from medgemma_clinical.commands.several.earlier_stages import EarlierStages, earlier_stages
from medgemma_clinical.evaluation.baselines import STAGE_1, STAGE_2
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.files import file_hash
from medgemma_clinical.training.stage import Stage
from stages import STAGE_1 as TRAJECTORY
from stages import stage_of_patients

DATA = patients()
ROWS = {"val": np.arange(8, 12), "test": np.arange(12, 16)}
RISKS = {part: np.linspace(0.1, 0.7, 4) + len(part) / 100 for part in ROWS}
FACTS: dict[str, Any] = {"data": {"data_sha256": "d"}, "seed": 3, "stage_1_sha256": "s"}


@pytest.fixture(scope="module")
def stage() -> Stage:
    risks = np.linspace(0, 1, len(DATA))
    return replace(stage_of_patients(TRAJECTORY), name="generative", stage1_risks=risks)


def found(stage: Stage, folder: Path | None, **facts: Any) -> EarlierStages:
    predictions = {
        part: Predictions(0.0, DATA.labels[rows], np.zeros(4), rows, np.zeros(4))
        for part, rows in ROWS.items()
    }
    place = None if folder is None else folder / "generative"
    return earlier_stages(stage, place, {**FACTS, **facts}, DATA, predictions)


Change = Callable[[pd.DataFrame], pd.DataFrame]


def finish_stage2(folder: Path, change: Change | None = None, **facts: Any) -> Path:
    """Write what a finished stage 2 leaves, its test predictions changed before they are hashed."""
    place = folder / "classification"
    place.mkdir()
    hashes = {}
    for part, rows in ROWS.items():
        path = place / f"predictions_{part}.csv"
        table = pd.DataFrame({"id": DATA.ids[rows], "label": DATA.labels[rows].astype(int)})
        table["probability"], table["patient"] = RISKS[part], DATA.groups[rows]
        (change(table) if change and part == "test" else table).to_csv(path, index=False)
        hashes[f"classification/{path.name}"] = file_hash(path)
    run = {"format": RUN_FORMAT, **FACTS, "results_sha256": hashes, **facts}
    write_run(place, {key: value for key, value in run.items() if value is not None})
    return place


def test_a_finished_stage_2_of_the_same_rows_stands_beside_stage_3(
    stage: Stage, tmp_path: Path
) -> None:
    finish_stage2(tmp_path)
    earlier = found(stage, tmp_path)
    assert earlier.unshown == []
    assert list(earlier.risks) == [STAGE_1, STAGE_2]
    for part, rows in ROWS.items():
        assert earlier.risks[STAGE_2][part].tolist() == RISKS[part].tolist()
        assert stage.stage1_risks is not None
        assert earlier.risks[STAGE_1][part].tolist() == stage.stage1_risks[rows].tolist()


@pytest.mark.parametrize(
    ("change", "facts", "reason"),
    [
        (None, {"data": {"data_sha256": "e"}}, "was trained on other data"),
        (None, {"seed": 4}, "has another seed, and so another split"),
        (None, {"stage_1_sha256": "t"}, "reads another stage 1"),
        (None, {"results_sha256": None}, "this output folder holds no finished stage 2"),
        (None, {"results_sha256": {}}, "were changed"),
        (None, {"format": RUN_FORMAT + 1}, "is damaged"),
        (lambda table: table.iloc[1:], {}, "was tested on other rows"),
        (lambda table: table.iloc[::-1], {}, "was tested on other rows"),
        (lambda table: table.assign(label=1 - table["label"]), {}, "was tested on other rows"),
        (lambda table: table.assign(id=table["id"] + "x"), {}, "was tested on other rows"),
    ],
)
def test_another_stage_2_is_not_shown_and_one_line_says_why(
    change: Change | None,
    facts: dict[str, Any],
    reason: str,
    stage: Stage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    finish_stage2(tmp_path, change, **facts)
    with caplog.at_level(logging.INFO):
        earlier = found(stage, tmp_path)
    assert list(earlier.risks) == [STAGE_1]
    (line,) = earlier.unshown
    assert line.startswith("Stage 2 is not shown: ")
    assert reason in line
    assert str(tmp_path) not in line, "a page is shared"
    assert caplog.messages == [line]


def test_changed_predictions_of_stage_2_are_not_shown(stage: Stage, tmp_path: Path) -> None:
    path = finish_stage2(tmp_path) / "predictions_val.csv"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert list(found(stage, tmp_path).risks) == [STAGE_1]
    path.unlink()
    (line,) = found(stage, tmp_path).unshown
    assert "were changed" in line


def test_without_a_folder_or_for_another_stage_nothing_is_said_of_stage_2(
    stage: Stage, tmp_path: Path
) -> None:
    finish_stage2(tmp_path)
    assert found(stage, None).unshown == []
    assert list(found(stage, None).risks) == [STAGE_1]
    second = found(replace(stage, name="classification"), tmp_path)
    assert (list(second.risks), second.unshown) == ([STAGE_1], [])
    assert found(replace(stage, name="trajectory", stage1_risks=None), tmp_path) == EarlierStages()


def test_a_stage_that_builds_on_no_stage_1_says_so(stage: Stage) -> None:
    earlier = found(replace(stage, name="classification", stage1_risks=None), None)
    (line,) = earlier.unshown
    assert line.startswith("Stage 1 is not shown: ")
    assert earlier.risks == {}


def test_stages_that_read_text_alone_are_compared(stage: Stage, tmp_path: Path) -> None:
    place = finish_stage2(tmp_path)
    content = {"format": RUN_FORMAT, **FACTS, "stage_1_sha256": None}
    hashes = {f"classification/{p.name}": file_hash(p) for p in place.glob("*.csv")}
    write_run(place, {**content, "results_sha256": hashes})
    alone = found(replace(stage, stage1_risks=None), tmp_path, stage_1_sha256=None)
    assert list(alone.risks) == [STAGE_2]
