"""The stages that a later one is set beside: stage 1 and a finished stage 2, by their hashes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.commands.run_folder import read_run
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.baselines import STAGE_1, STAGE_2
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.files import InputError, file_hash
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.training.stage import Stage

logger = logging.getLogger(__name__)

Risks = dict[str, NDArray[np.float64]]
"""Probabilities of the rows of each part."""


@dataclass(frozen=True)
class EarlierStages:
    """What is known of the stages below a stage.

    Attributes:
        risks: of each earlier stage by its name.
        unshown: a line on each that cannot be set beside, with the reason.
    """

    risks: dict[str, Risks] = field(default_factory=dict)
    unshown: list[str] = field(default_factory=list)


def earlier_stages(
    stage: Stage,
    folder: Path | None,
    facts: dict[str, Any],
    dataset: TrajectoryDataset,
    predictions: dict[str, Predictions],
) -> EarlierStages:
    """Return the earlier stages that scored the same rows; log which are not shown.

    Args:
        stage: that is judged.
        folder: of the stage; None where nothing is written, so that no other stage lies beside.
        facts: of its run, as ``run_facts``.
        dataset: of its rows.
        predictions: of each scored part.
    """
    found = EarlierStages()
    if stage.name == "trajectory":
        return found
    if stage.stage1_risks is None:
        found.unshown.append("Stage 1 is not shown: this model builds on none (--ode_checkpoint).")
    else:
        found.risks[STAGE_1] = {part: stage.stage1_risks[p.rows] for part, p in predictions.items()}
    if stage.name == "generative" and folder is not None:
        place = folder.with_name("classification")
        try:
            found.risks[STAGE_2] = _read_stage2(place, facts, dataset, predictions)
        except InputError as error:
            found.unshown.append(f"Stage 2 is not shown: {error}.")
    for line in found.unshown:
        logger.info(line)
    return found


def _read_stage2(
    folder: Path,
    facts: dict[str, Any],
    dataset: TrajectoryDataset,
    predictions: dict[str, Predictions],
) -> Risks:
    """Read the probabilities of a finished stage 2 for the rows of a stage 3.

    Raises:
        InputError: why the two are not comparable; names no path, since pages show the reason.
    """
    try:
        run = read_run(folder) or {}
    except InputError as error:
        raise InputError("the run.json of the stage 2 in this output folder is damaged") from error
    if "results_sha256" not in run:
        raise InputError("this output folder holds no finished stage 2")
    for differs, reason in (
        (run["data"]["data_sha256"] != facts["data"]["data_sha256"], "was trained on other data"),
        (run["seed"] != facts["seed"], "has another seed, and so another split"),
        (run["stage_1_sha256"] != facts["stage_1_sha256"], "reads another stage 1"),
    ):
        if differs:
            raise InputError(f"the one in this output folder {reason}")
    risks = {}
    for part, rows in predictions.items():
        path = folder / f"predictions_{part}.csv"
        if file_hash(path) != run["results_sha256"].get(f"{folder.name}/{path.name}"):
            raise InputError("predictions of the one in this output folder were changed")
        table = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)
        own = list(zip(dataset.ids[rows.rows].tolist(), rows.labels.tolist(), strict=True))
        if list(zip(table["id"], table["label"], strict=True)) != own:
            raise InputError("the one in this output folder was tested on other rows")
        risks[part] = table["probability"].to_numpy(np.float64)
    return risks


def changed_stage1(folders: dict[str, Path]) -> dict[str, str]:
    """Return, by its name, a line on each stage with another stage 1 than that beside or compared.

    Args:
        folders: of finished stages by name.
    """
    trained = {name: folder for name, folder in folders.items() if folder.name == "trajectory"}
    lines = {}
    for name, folder in folders.items():
        digest = (read_run(folder) or {}).get("stage_1_sha256")
        if digest is None:
            continue
        for other, place in {f"the {TRAJECTORY_FILE} beside it": folder, **trained}.items():
            path = place.parent / TRAJECTORY_FILE
            if path.is_file() and file_hash(path) != digest:
                lines[name] = (
                    f"The model {name} reads another stage 1 than {other}, which was trained anew "
                    "since or comes from another run. No verdict is given between this model and "
                    "another run: train it again."
                )
                break
    return lines
