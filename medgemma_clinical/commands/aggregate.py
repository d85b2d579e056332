"""Write what several sites can pool, and remember of which rows: ``--predict --aggregate``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical import __version__
from medgemma_clinical.commands.pool import FORMAT
from medgemma_clinical.data.small_cells import MIN_CELL, minority_patients
from medgemma_clinical.evaluation.aggregate import aggregate, three_digits
from medgemma_clinical.evaluation.metrics_table import MINORITY_PATIENTS, TESTED
from medgemma_clinical.files import InputError, move_aside, read_json, write_json
from medgemma_clinical.models.checkpoints import READING_ERRORS
from medgemma_clinical.models.trained_model import TrainedModel, checkpoint_path

logger = logging.getLogger(__name__)

LEDGER = ".aggregates.json"
"""End of the name of the file beside a checkpoint that knows the rows of its aggregates."""


def write_aggregate(
    path: Path,
    checkpoint: Path,
    trained: TrainedModel,
    rows: pd.DataFrame,  # demographics, risks, hashes ``patient`` and ``rows`` (with either label)
    medians: pd.DataFrame,  # of the same rows
    min_cell: int | None,  # None where it was not typed
    seed: int,
) -> None:
    """Write the aggregate of new labelled rows, unless an earlier one and it tell of few."""
    min_cell = 0 if min_cell == 0 else max(MIN_CELL, min_cell or 0)
    need, patients = max(min_cell, MINORITY_PATIENTS), rows.get("patient", pd.Series()).astype(str)
    if rows.empty or minority_patients(rows["label"].to_numpy(), patients.to_numpy()) < need:
        text = f"takes {need} new patients with the event and as many without it"
        raise InputError(f"--aggregate {path}: {text}: not written")
    names = [trained.name, *(name for name in trained.rules if name != trained.name)]
    risks = rows[names].dropna(axis=1)  # NaN of a baseline that lacks a column
    tested = rows.assign(id=patients, patient=patients)[TESTED].join(risks)
    reference = trained.config.get("reference", {})
    edges = {name: entry["edges"] for name, entry in reference.items()}
    found = aggregate(tested, edges, (rows, medians), min_cell, seed)
    about: dict[str, Any] = {"name": trained.name, "outcome": trained.config["outcome"]}
    about |= {"threshold": three_digits(trained.rule.threshold), **trained.identity()}
    best = checkpoint_path(checkpoint).resolve()
    ledger = best.with_name(best.name + LEDGER)
    remember(ledger, path, hashes_of(rows, medians), min_cell)
    for aside in move_aside([path]):
        logger.info("earlier file moved to %s", aside)
    write_json(path, {"format": FORMAT, "version": __version__, "model": about, **found})
    logger.info("aggregate: %s", path)


def hashes_of(rows: pd.DataFrame, medians: pd.DataFrame) -> pd.DataFrame:
    """Return hashes of n rows: of the patient, of all that an aggregate is made from, of both."""
    about = medians.reset_index(drop=True).set_axis(range(medians.shape[1]), axis=1)
    about = about.join(rows[["label", "observations", "age", "sex"]])
    about["series"] = [int(hashes[0]) for hashes in rows["rows"]]  # the label is beside it
    hashes = rows[["patient"]].assign(row=_hash(about))
    return hashes.assign(pair=_hash(hashes))


def _hash(table: pd.DataFrame) -> pd.Series[int]:
    return pd.util.hash_pandas_object(table, index=False).astype(np.int64)


def remember(ledger: Path, path: Path, hashes: pd.DataFrame, min_cell: int) -> None:
    """Add rows to a ledger; refuse those that differ from earlier ones in few patients."""
    try:
        earlier = read_json(ledger)["aggregates"] if ledger.exists() else []
        tables = [pd.DataFrame(x, columns=hashes.columns).astype(np.int64) for x in earlier]
    except READING_ERRORS as error:
        raise InputError(f"{ledger}: damaged: restore it, or move it away") from error
    # Without names, too: a new export may name the same patients otherwise.
    apart = [patients_apart(hashes, table, key) for table in tables for key in ("pair", "row")]
    if few := [n for n in apart if 0 < n < min_cell]:
        raise InputError(
            f"--aggregate {path}: its rows differ from those of an earlier aggregate in {few[0]} "
            f"patients, so both tell of these: not written: give the same rows, or {min_cell} more "
            "patients"
        )
    if 0 not in apart[::2]:
        write_json(ledger, {"aggregates": [*earlier, hashes.to_numpy().tolist()]})


def patients_apart(first: pd.DataFrame, second: pd.DataFrame, key: str) -> int:
    """Count the patients of rows that only one of two aggregates rests on, known by a hash."""
    apart = first[~first[key].isin(second[key])], second[~second[key].isin(first[key])]
    return int(pd.concat(apart)["patient"].nunique())
