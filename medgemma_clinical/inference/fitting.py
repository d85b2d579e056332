"""Training from Python: one function a stage; each returns a ``TrajectoryModel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medgemma_clinical.inference.trajectory_model import Rows, TrajectoryModel


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
