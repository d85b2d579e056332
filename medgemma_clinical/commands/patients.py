"""The page of single patients beside predictions: ``predict --explain``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.overlap import TrainingPatients, both_hashes, patient_hashes
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.evaluation.patients import patients_page
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.inference.explain import explain
from medgemma_clinical.inference.trajectory_model import TrajectoryModel
from medgemma_clinical.models import model_card

logger = logging.getLogger(__name__)

ChosenRow = tuple[dict[str, Any], TrajectoryDataset]
"""A row of the predictions, and its data alone."""

MAX_ROWS = 12
"""Rows of the page where no id is given: those with the highest risk."""


def patients_path(predictions: Path) -> Path:
    """Return the path of the page beside a file of predictions."""
    return predictions.with_suffix(".patients.html")


def choose_rows(
    earlier: Sequence[ChosenRow], table: pd.DataFrame, scored: ScoringRows, ids: list[str] | None
) -> list[ChosenRow]:
    """Return the page's rows among earlier ones and some predictions, by id or by risk."""
    table = table.iloc[scored.positions].reset_index(drop=True)
    table = table[table["id"].isin(ids)] if ids else table.nlargest(MAX_ROWS, "probability")
    lines: Any = table.to_dict("records")
    datasets = [scored.dataset.subset(np.array([k])) for k in table.index]
    rows: list[ChosenRow] = [*earlier, *zip(lines, datasets, strict=True)]
    if ids:
        return sorted(rows, key=lambda row: ids.index(row[0]["id"]))
    return sorted(rows, key=lambda row: -row[0]["probability"])[:MAX_ROWS]


def training_sentence(datasets: Sequence[TrajectoryDataset], training: TrainingPatients) -> str:
    """Return how many data sets of one row each are in the training data."""
    if not len(training.hashes):
        return "The checkpoint does not hold its training data: these rows may be among them."
    first = np.zeros(1, dtype=np.int64)
    patients = np.concatenate([patient_hashes(dataset, first) for dataset in datasets])
    rows = np.concatenate([both_hashes(dataset, first) for dataset in datasets])
    count = training.include(patients, rows, has_ids=datasets[0].has_patient_ids).sum()
    if not count:
        return "None of these rows is in the training data."
    return f"In the training data, so that their risks are optimistic: {count} of {len(datasets)}."


def explain_rows(
    chosen: Sequence[ChosenRow],
    model: TrajectoryModel,
    request: Namespace,
    training: TrainingPatients,
) -> None:
    """Write the page of the chosen rows."""
    ids = {row["id"] for row, _ in chosen}
    if lacking := {*(request.patients or ids)} - ids:
        logger.warning("--patients: %d of these ids have no row with a score", len(lacking))
    if not chosen:
        return
    logger.info("patients: explaining %d rows", len(chosen))
    rows = [explain(row, dataset, model.trained, model.batch_size) for row, dataset in chosen]
    config, datasets = model.config, [dataset for _, dataset in chosen]
    overlap = training_sentence(datasets, training)
    notes = [overlap, model_card.weight_0_sentence(config), model_card.built_in_notice(config)]
    checkpoint = {"Checkpoint": request.checkpoint.absolute().name}
    method = datasets[0].task_description() | checkpoint | model_card.describe_model(config)
    path, outcome = patients_path(request.predictions), config["outcome"]
    if curves := rows[0].curves:
        outcome = next(iter(curves.events.risk_titles.values()))
        notes.append(f"Each risk over time is that of {outcome} from its own moment on.")
    write_report(
        path, patients_page(rows, outcome, model.threshold, [*filter(None, notes)], method)
    )
    logger.info("patients: %s; the page holds patients' data: do not share it", path)
