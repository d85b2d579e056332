"""Training from Python: one function a stage; each returns a ``TrajectoryModel``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.inference.trajectory_model import Rows, TrajectoryModel, results_table


@dataclass(frozen=True, repr=False)
class CrossValidation:
    """What ``cross_validate`` found.

    Attributes:
        predictions: a row a patient's row, of the model that did not learn from the patient: id,
            label, probability, patient, fold, then the risks of baselines and ensemble.
        metrics: the content of ``metrics.json``; its part "folds" has the metrics.
    """

    predictions: pd.DataFrame
    metrics: dict[str, Any]

    def results(self) -> pd.DataFrame:
        """Return a row a model, as ``TrajectoryModel.results``."""
        return results_table(self.metrics["folds"])

    def __repr__(self) -> str:
        """Return the results, not the patients."""
        return f"{type(self).__name__}:\n{self.results()}"


def cross_validate(
    rows: Rows,
    folds: int = 5,
    stage: str = "trajectory",
    encoder: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    **flags: Any,
) -> CrossValidation:
    """Judge every patient by a model that learned from the others, in folds of patients.

    Metrics that compare risks are means over the folds, each with the interval of a bootstrap of
    the patients; baselines are fitted on the same folds.

    Args:
        rows: a DataFrame or a file in the DKA format, or a data set; a column ``split`` is not
            read.
        folds: number of parts into which the patients are dealt out, stratified by the event.
        stage: "trajectory", "classification" or "generative".
        encoder: of the other stages: path of each fold's trained stage 1, ``{fold}`` in place of
            the fold's number.
        output_dir: run folder; the same call goes on there after a stop. None keeps nothing.
        **flags: those of the command line without dashes, as for ``fit_trajectory``;
            ``leave_out="COLUMN"`` holds out each site of a column in place of folds, and
            ``final=True`` with an ``output_dir`` also trains a model on all patients there.

    Returns:
        Predictions, metrics, and ``results()``.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag or the data are wrong, or there are too few patients for the folds.
    """
    chosen = {"trajectory_only": True} if stage == "trajectory" else {"mode": stage}
    keywords = {**flags, "folds": None if flags.get("leave_out") else folds}
    keywords |= {"output_dir": output_dir} | ({"ode_checkpoint": encoder} if encoder else {})
    return TrajectoryModel.program.cross_validate(chosen, rows, keywords)


def fit_trajectory(rows: Rows, **flags: Any) -> TrajectoryModel:
    """Train stage 1: encoder and head, no language model.

    Args:
        rows: a DataFrame or a file in the DKA format, or a data set.
        **flags: those of the command line without dashes, with the same defaults, as in
            ``trajectory_epochs=50``. Without ``output_dir`` nothing is written.

    Returns:
        The best model; ``results()`` gives its metrics.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag or the data are wrong; the text says where, and what to do.
    """
    return TrajectoryModel.program.fit({"trajectory_only": True}, rows, None, flags)


def fit_classification(
    rows: Rows, encoder: TrajectoryModel | str | Path | None = None, **flags: Any
) -> TrajectoryModel:
    """Train stage 2: MedGemma reads soft prompt and text, a head gives a probability.

    Args:
        rows: as for ``fit_trajectory``.
        encoder: a trained stage 1, or where it lies; stays frozen. None trains a new one with it.
        **flags: as for ``fit_trajectory``, for example ``model_name``, ``epochs``, ``lora_rank``.

    Returns:
        The best model; ``results()`` gives its metrics.

    Raises:
        TypeError: there is no such flag.
        InputError: a flag, the data, stage 1 or the language model are wrong.
    """
    return TrajectoryModel.program.fit({"mode": "classification"}, rows, encoder, flags)


def fit_generative(
    rows: Rows, encoder: TrajectoryModel | str | Path | None = None, **flags: Any
) -> TrajectoryModel:
    """Train stage 3: MedGemma reads soft prompt and text, and writes a verdict with a report.

    Arguments, result and errors are those of ``fit_classification``.
    """
    return TrajectoryModel.program.fit({"mode": "generative"}, rows, encoder, flags)
