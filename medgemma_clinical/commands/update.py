"""Write a model whose decision rule is updated on labelled rows: ``predict --update``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from medgemma_clinical.data.overlap import add_training_rows
from medgemma_clinical.evaluation.decision import NOT_UPDATED, DecisionRule
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS
from medgemma_clinical.evaluation.rules import apply_rules, references, stored
from medgemma_clinical.evaluation.updating import Update
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
    updates: list[Update] | None,
    data_sha256: str | None,
) -> None:
    """Fit the rule of the model ``used`` to new labelled rows; write the model as a folder.

    ``rows``: ``label``, risk of ``used``, hashes ``patient`` and ``rows`` (with either label).
    """
    if updates is None:
        need = f"{2 * MINORITY_PATIENTS} new patients with the event and as many without it"
        raise InputError(f"--update {folder}: takes {need}: only the predictions were written")
    has_several = len(trained.outcome.targets) > 1
    for update in updates:
        own = f" of {update.target.title}" if has_several else ""
        text = "change of the log loss%s by an update, in halves that it has not seen: %s"
        logger.info(text, own, update.gain)
    moved = [update for update in updates if update.method != NOT_UPDATED]
    if not moved:
        text = "--update %s: not written: these rows show no need to update %s"
        logger.warning(text, folder, used)
        return
    methods = {update.target.title: update.method for update in moved}
    named = [f"{title}: {method}" for title, method in methods.items()]
    method = ", ".join(named if has_several else methods.values())
    logger.info("update of %s: %s", used, method)
    updated = updated_model(trained, used, moved, rows, method, data_sha256)
    with owner_only(), atomic(folder) as whole:
        save_model(updated, whole)
        for aside in move_aside([folder]):  # a failure leaves the earlier model in its place
            logger.info("earlier model moved to %s", aside)
    logger.info("updated model: %s", folder)


def updated_model(
    trained: TrainedModel,
    used: str,
    updates: Sequence[Update],
    rows: pd.DataFrame,
    method: str,
    data_sha256: str | None,
) -> TrainedModel:
    """Return a model whose rule is updated, which knows the rows as training data."""
    labels = trained.outcome.targets[0].labels(rows)
    train_patients = trained.train_patients
    if train_patients is not None:
        hashes = rows["patient"].to_numpy(), np.stack(rows["rows"].tolist())
        train_patients = add_training_rows(train_patients, *hashes, np.nan_to_num(labels))
    has_hashes = trained.train_patients is not None and len(trained.train_patients) > 0
    config = updated_config(trained, used, updates, rows)
    config["updated"] = {
        "before": trained.sha256,
        "model": used,
        "method": method,
        "rows": len(rows),
        "patients": int(rows["patient"].nunique()),
        "events": int(np.nansum(labels)),
        "data_sha256": data_sha256,
        # Whether the hashes of training patients are those of all.
        "complete": has_hashes and trained.config.get("updated", {}).get("complete", True),
    }
    return replace(trained, config=config, train_patients=train_patients)


def updated_config(
    trained: TrainedModel, used: str, updates: Sequence[Update], rows: pd.DataFrame
) -> Config:
    """Return a configuration in which the rules of a model are updated on labelled rows."""
    targets, config = trained.outcome.targets, trained.config
    own = dict(trained.rules[used])
    before = {name: DecisionRule(threshold=rule.threshold) for name, rule in own.items()}
    further = dict(before)
    for update in updates:
        move, link = (update.multiplier, update.shift), update.target.link
        name = update.target.name
        own[name] = own[name].followed_by(*move, link)
        further[name] = before[name].followed_by(*move, link)
    moved = stored({used: own})[used]
    delivered = apply_rules(rows, {used: further}, targets)
    kept = {name: x for name, x in config.get("reference", {}).items() if name != used}
    kept |= references(delivered, [used], targets[0])
    config = {**config, "reference": kept}
    if used != trained.name:
        return {**config, "models": {**config["models"], used: moved}}
    return {**config, "decision": moved}
