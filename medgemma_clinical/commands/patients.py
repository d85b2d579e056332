"""The page of single patients beside predictions: which rows it shows, and how it is written."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.scoring import ScoringRows
from medgemma_clinical.data.training_data import patient_hashes, row_hashes
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.judgement.overlap import Overlap, find_overlap
from medgemma_clinical.evaluation.patients.patient_page import PatientsContent, write_patients
from medgemma_clinical.evaluation.report import STAGE_TITLES
from medgemma_clinical.files import InputError
from medgemma_clinical.inference.explain import ScoredRow, explain
from medgemma_clinical.inference.trajectory_model import TrajectoryModel
from medgemma_clinical.models.model_card import random_model_notice, weight_0_sentence
from medgemma_clinical.provenance import git_commit, versions

logger = logging.getLogger(__name__)

MOST_ROWS = 12
"""Rows with the highest risks that the page shows where none is asked for."""


def patients_path(predictions: Path) -> Path:
    """Return the path of the page of patients beside a file of predictions."""
    return predictions.with_suffix(".patients.html")


@dataclass
class PatientChoice:
    """The rows of the page, chosen while predictions are written; no other row is kept.

    Attributes:
        asked: ids that the user gives; None for the ``MOST_ROWS`` highest risks.
        rows: chosen up to now.
        found: ids among ``asked`` that the input holds, also without a score.
    """

    asked: Sequence[str] | None
    rows: list[ScoredRow] = field(default_factory=list)
    found: set[str] = field(default_factory=set)

    def add(self, lines: pd.DataFrame, scored: ScoringRows) -> None:
        """Choose among some rows.

        Args:
            lines: of the predictions.
            scored: the rows with a score, ``scored.places`` being their lines.
        """
        ids = lines["id"].to_numpy()[scored.places]
        risks = lines["probability"].to_numpy()[scored.places]
        if self.asked is None:
            chosen = np.argsort(-risks, kind="stable")[:MOST_ROWS]
        else:
            self.found |= set(lines["id"]) & set(self.asked)
            chosen = np.flatnonzero(np.isin(ids, list(self.asked)))
        reports = lines["report"].to_numpy()[scored.places] if "report" in lines else None
        problems = lines["problem"].to_numpy()[scored.places]
        self.rows += [
            ScoredRow(
                id=str(ids[k]),
                number=int(scored.numbers[scored.places[k]]),
                dataset=scored.dataset.subset(np.array([k])),
                probability=float(risks[k]),
                report=None if reports is None else str(reports[k]),
                problem=str(problems[k]),
            )
            for k in chosen.tolist()
        ]
        if self.asked is None:
            self.rows = sorted(self.rows, key=lambda row: -row.probability)[:MOST_ROWS]
        else:
            self.rows.sort(key=lambda row: list(self.asked or ()).index(row.id))

    def check_found(self, source: str) -> None:
        """Check that the input holds each id that was asked for; no id is named.

        Raises:
            InputError: it does not.
        """
        places = [k for k, name in enumerate(self.asked or (), 1) if name not in self.found]
        if places:
            asked = len(self.asked or ())
            missing = f"{len(places)} of these {asked} ids, the first at place {places[0]}"
            raise InputError(
                f"--patients: no row of {source} has {missing if asked > 1 else 'this id'}: give "
                "ids as the predictions have them"
            )

    def sentence(self) -> str:
        """Return how the rows were chosen."""
        if self.asked is None:
            return f"Shown are the rows with the highest risk, {MOST_ROWS} at most."
        return "Shown are the rows that were asked for, as far as they have a score."


def kept_sentence(config: dict[str, Any]) -> str:
    """Return what a model still reads where its soft tokens are removed."""
    if not config.get("stage1_logit"):
        return "The text stays."
    return (
        "The text and stage 1's log-odds stay; the weight of the language model's own log-odds "
        f"beside them is {config['residual_weight']:.3g}."
    )


def choose_patients(request: Namespace) -> PatientChoice | None:
    """Return the empty choice that the flags ask for; None without ``--explain``.

    Raises:
        InputError: ``--patients`` names no id.
    """
    if request.patients is not None and not request.patients:
        raise InputError("--patients names no id: give ID,ID, or leave the flag out")
    return PatientChoice(request.patients) if request.explain else None


def find_in_training(
    rows: Sequence[ScoredRow], trained: NDArray[np.int64], *, named: bool
) -> tuple[Overlap, list[str]]:
    """Find rows among those that trained a model, see ``find_overlap``.

    Args:
        rows: at least one.
        trained: hashes of the patients and rows that trained; empty where not known.
        named: whether the training data have identifiers of patients.

    Returns:
        How many there are in words; and of each row whether it is one of them: "yes" as there,
        "perhaps" where only the identifier or only the row is equal, "no", or "not known" of a row
        that holds too few values to be compared.
    """
    first = np.zeros(1, dtype=np.int64)
    patients = np.concatenate([patient_hashes(row.dataset, first) for row in rows])
    hashes = np.array([_hash_row(row.dataset, trained) for row in rows])
    named = named and rows[0].dataset.named
    overlap = find_overlap(patients, hashes, trained, named=named, fewest=0)
    compared = (hashes != 0) & bool(len(trained))
    states = [overlap.sure, overlap.perhaps, compared]
    return overlap, np.select(states, ["yes", "perhaps", "no"], "not known").tolist()


def _hash_row(dataset: TrajectoryDataset, trained: NDArray[np.int64]) -> int:
    """Return the hash of the first row; of one without label, with the label that trained it."""
    row = dataset.subset(np.zeros(1, dtype=np.int64))
    hashes = []
    for label in (0.0, 1.0) if np.isnan(row.labels[0]) else row.labels.tolist():
        row.labels[0] = label
        hashes += row_hashes(row, np.zeros(1, dtype=np.int64)).tolist()
    return max(hashes, key=lambda each: each in trained)


def explain_patients(
    choice: PatientChoice,
    model: TrajectoryModel,
    request: Namespace,
    training: tuple[NDArray[np.int64], bool],
) -> None:
    """Write the page of the chosen rows, if one of them has a score.

    Args:
        choice: of the rows.
        model: that scored them.
        request: checkpoint and place of the predictions.
        training: hashes of those who trained the model, and whether they have identifiers.
    """
    if not choice.rows:
        logger.info("patients: no row to show has a score: no page")
        return
    logger.info("patients: explaining %d rows", len(choice.rows))
    trained, named = training
    overlap, found = find_in_training(choice.rows, trained, named=named)
    rows = [
        replace(explain(row, model.trained, model.batch_size), in_training=word)
        for row, word in zip(choice.rows, found, strict=True)
    ]
    config, dataset = model.config, choice.rows[0].dataset
    base = config.get("base_model")
    content = PatientsContent(
        outcome=config["outcome"],
        threshold=model.threshold,
        chosen=choice.sentence(),
        kept=kept_sentence(config),
        overlap=overlap.sentence if overlap.flatters else "",
        unused=weight_0_sentence(config),
        warning=random_model_notice(config),
        method={
            **dataset.asked(),
            "Model": STAGE_TITLES[config["stage"]] + (f", {base}" if base else ""),
            "Checkpoint": request.checkpoint.absolute().name,
            "Versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
            "Commit": git_commit() or "not known",
        },
    )
    path = patients_path(request.predictions)
    write_patients(path, rows, content)
    logger.info("patients: %s; the page holds patients' data: do not share it", path)
