"""Write what several sites can pool: ``predict --aggregate``."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from medgemma_clinical import __version__
from medgemma_clinical.commands.pool import FORMAT
from medgemma_clinical.evaluation.aggregate import aggregate, count_kinds, count_problem
from medgemma_clinical.files import InputError, json_hash, move_aside, write_json
from medgemma_clinical.models.trained_model import TrainedModel

logger = logging.getLogger(__name__)


def write_aggregate(
    path: Path,
    trained: TrainedModel,
    rows: pd.DataFrame,  # labels, risks by model and hashes ``patient`` of new labelled rows
    used: str,
    compared: str | None,  # the baseline of the planned comparison
) -> None:
    """Write the aggregate of new labelled rows, if they are enough."""
    target = trained.outcome.targets[0]
    everyone = len(rows)
    labels = target.labels(rows) if everyone else np.empty(0)
    rows, labels = rows[~np.isnan(labels)], labels[~np.isnan(labels)]
    patients = rows.get("patient", pd.Series()).astype(str)
    if problem := count_problem(count_kinds(labels, patients.to_numpy())):
        raise InputError(f"--aggregate {path}: {problem}: not written")
    # The stage, where the baseline is what is used.
    other = compared if compared != used else trained.name
    hashes = trained.identity()
    of_baselines = json_hash([*hashes.values()])
    models = {
        name: hashes["sha256"] if name == trained.name else of_baselines
        for name in (used, other)
        if name
    }
    risks = {name: rows[target.column(name)] for name in models}
    found = aggregate(rows.assign(patient=patients, label=labels, **risks), models)
    unknown = round(20 * (1 - len(rows) / everyone)) / 20  # a count cannot be told
    if unknown:
        logger.info(
            "outcome not known by the horizon: %.2g %% of the rows, left out", 100 * unknown
        )
    for aside in move_aside([path]):
        logger.info("earlier file moved to %s", aside)
    about = {"format": FORMAT, "version": __version__, "outcome": trained.config["outcome"]}
    about |= {"target": target.title, "unknown": unknown} if target.horizon else {}
    write_json(path, about | found)
    logger.info("aggregate: %s", path)
