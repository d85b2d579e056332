"""Write a model whose decision rule is updated on labelled rows: ``predict --update``."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from medgemma_clinical.data.overlap import add_training_rows
from medgemma_clinical.evaluation.decision import NOT_UPDATED
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS
from medgemma_clinical.evaluation.time_updates import TimeUpdates
from medgemma_clinical.evaluation.updating import Updates
from medgemma_clinical.files import InputError, atomic, move_aside, owner_only
from medgemma_clinical.inference.hub import save_model
from medgemma_clinical.models.checkpoints import Config
from medgemma_clinical.models.trained_model import TrainedModel

logger = logging.getLogger(__name__)


def write_update(
    folder: Path,
    trained: TrainedModel,
    used: str,
    rows: pd.DataFrame,
    updates: Updates | TimeUpdates | None,
    data_sha256: str | None,
) -> None:
    """Fit the rule of the model ``used`` to new labelled rows; write the model as a folder.

    ``rows``: ``label``, risk of ``used``, hashes ``patient`` and ``rows`` (with either label).
    """
    if updates is None:
        need = f"{2 * MINORITY_PATIENTS} new patients with the event and as many without it"
        raise InputError(f"--update {folder}: takes {need}: only the predictions were written")
    labels, text = rows["label"].to_numpy(float), "change of the log loss by an update"
    logger.info("%s, in halves that it has not seen: %s", text, updates.gain)
    if updates.method == NOT_UPDATED:
        text = "--update %s: not written: these rows show no need to update %s"
        logger.warning(text, folder, used)
        return
    logger.info("update of %s by its %s", used, updates.method)
    about = {
        "model": used,
        "method": updates.method,
        "rows": len(rows),
        "patients": int(rows["patient"].nunique()),
        "events": int(labels.sum()),
        "data_sha256": data_sha256,
    }
    train_patients = trained.train_patients
    if train_patients is not None:
        hashes = rows["patient"].to_numpy(), np.stack(rows["rows"].tolist())
        train_patients = add_training_rows(train_patients, *hashes, labels)
    config: Config = trained.outcome.updated(
        trained.config, used, trained.rules[used], updates, rows
    )
    has_hashes = trained.train_patients is not None and len(trained.train_patients) > 0
    # Whether the hashes of training patients are those of all.
    complete = has_hashes and trained.config.get("updated", {}).get("complete", True)
    config["updated"] = {**about, **config["updated"], "complete": complete}
    with owner_only(), atomic(folder) as whole:
        save_model(replace(trained, config=config, train_patients=train_patients), whole)
        for aside in move_aside([folder]):  # a failure leaves the earlier model in its place
            logger.info("earlier model moved to %s", aside)
    logger.info("updated model: %s", folder)
