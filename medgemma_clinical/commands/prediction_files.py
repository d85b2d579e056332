"""The tables of predictions of a run folder: how they are written, and the one way to read them."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from medgemma_clinical.evaluation.baselines import ENSEMBLE, best_blend
from medgemma_clinical.evaluation.metrics_table import Metrics, named_model
from medgemma_clinical.evaluation.time_table import UNCENSORED
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.models.outcome import LABEL, Outcome

logger = logging.getLogger(__name__)

VAL, TEST = "predictions_val.csv", "predictions_test.csv"
FOLDS, REPEATS = "predictions_folds.csv", "predictions_repeats.csv"


def predictions_csv(table: pd.DataFrame) -> str:
    """Return a table of predictions as its file: the model's own column is ``probability``."""
    names = [name for name in map(str, table) if not name.startswith(UNCENSORED)]
    place = names.index("patient")
    model, risks = names[place + 1], names[place + 2 :]
    ordered = table[[*names[:place], model, "patient", *risks]]
    own = {name: name.removeprefix(f"{model} ") for name in risks}
    return ordered.rename(columns=own | {model: "probability"}).to_csv(index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read a file of predictions as it is."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: name the folder of a finished stage")
    try:
        return pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a table of predictions") from error


def read_predictions(
    folder: Path, model: str = "probability", name: str = TEST, *, outcome: Outcome = LABEL
) -> pd.DataFrame:
    """Read a file of predictions: what happened, then risks; those of the file are ``model``'s."""
    path = folder / name
    table = read_table(path).drop(columns="fold", errors="ignore")
    try:
        table, _ = named_model(table)
        if model != "probability":
            own = {file: risk for risk, file in outcome.columns(model, "").items()}
            table = table.rename(columns=own, errors="raise")
        if missing := [name for name in outcome.tested if name not in table]:
            raise KeyError(missing[0] + (", as it is of times" if "event" in table else ""))
        table = table[[*outcome.tested, *table.columns.drop(outcome.tested)]]
        numbers = table.drop(columns=["id", "patient"]).astype(float)
        risks = numbers.drop(columns=outcome.tested, errors="ignore")
        is_known = table["label"].isin([0, 1]).all() if "label" in table else True
        sound = (risks.ge(0) & risks.le(1)).all(axis=None) and is_known
        if not sound or not len(risks.columns):
            raise ValueError
    except KeyError as error:
        raise InputError(f"{path}: lacks a column: {error.args[0]}") from error
    except ValueError as error:
        rule = "labels are 0 or 1, risks are numbers from 0 to 1, of one model"
        raise InputError(f"{path}: not a table of predictions: {rule}") from error
    return table.astype(numbers.dtypes)


def shared_models(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Leave out models that are missing in some table, and log their names."""
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    if len({best_blend(list(map(str, table))) for table in tables}) > 1:
        shared = [name for name in shared if name != ENSEMBLE]  # they hold different blends
    left_out = sorted({str(name) for table in tables for name in table} - set(shared))
    if left_out:
        logger.info("not in every split, so not pooled: %s", ", ".join(left_out))
    return [table[shared] for table in tables]


def auroc_of(folder: Path, part: str) -> str:
    """Return the AUROC of a finished stage's part in words."""
    path = folder / "metrics.json"
    try:
        metrics = Metrics.from_json(read_json(path)[part])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged: delete the folder of this stage, and start again"
        ) from error
    return value_text(metrics.row(metrics.models[0], "auroc"))
