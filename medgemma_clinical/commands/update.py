"""Write a model whose decision rule is updated on labelled rows: ``--predict --update``."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.overlap import add_training_rows
from medgemma_clinical.evaluation.decision import NOT_UPDATED
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS
from medgemma_clinical.evaluation.updating import CHOSEN, Updates, updated_rule
from medgemma_clinical.evaluation.verdicts import difference_text
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
    updates: Updates | None,
    data_sha256: str | None,
) -> None:
    """Fit the rule of the model ``used`` to new labelled rows; write the model as a folder.

    ``rows``: ``label``, risk of ``used``, hashes ``patient`` and ``rows`` (with either label).
    """
    if updates is None:
        need = f"{2 * MINORITY_PATIENTS} new patients with the event and as many without it"
        raise InputError(f"--update {folder}: takes {need}: only the predictions were written")
    labels = rows["label"].to_numpy(float)
    gain = difference_text(updates.table.loc[(CHOSEN, "log_loss")], "+.4f")
    logger.info("change of the log loss by an update, in halves that it has not seen: %s", gain)
    if updates.method == NOT_UPDATED:
        text = "--update %s: not written: tests show no need to update %s on these rows"
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
    config = updated_config(trained, used, updates.slope, updates.intercept, about)
    with owner_only(), atomic(folder) as whole:
        save_model(replace(trained, config=config, train_patients=train_patients), whole)
        for aside in move_aside([folder]):  # a failure leaves the earlier model in its place
            logger.info("earlier model moved to %s", aside)
    logger.info("updated model: %s", folder)


def updated_config(
    trained: TrainedModel, used: str, slope: float, intercept: float, about: dict[str, Any]
) -> Config:
    """Return the configuration with the updated rule of a model, and what updated it."""
    config, earlier = trained.config, trained.config.get("updated", {})
    rule = asdict(updated_rule(trained.rules[used], slope, intercept))
    moved = earlier.get("stage", [1.0, 0.0])
    if used == trained.name:
        config = {**config, "decision": rule}
        moved = [slope * moved[0], intercept + slope * moved[1]]
    else:
        config = {**config, "models": {**config["models"], used: rule}}
    has_hashes = trained.train_patients is not None and len(trained.train_patients) > 0
    complete = has_hashes and earlier.get("complete", True)
    # ``stage``: how far all updates moved the stage, so that its ensemble stays as it was.
    # ``complete``: whether the hashes of training patients are those of all.
    return {**config, "updated": {**about, "stage": moved, "complete": complete}}
