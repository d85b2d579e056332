"""The tables of predictions of a run folder: how they are written, and the one way to read them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from medgemma_clinical.evaluation.baselines import ENSEMBLE, best_blend
from medgemma_clinical.evaluation.metrics_table import Metrics, named_model
from medgemma_clinical.evaluation.target import NO_RISKS, Target, is_risk, weight_columns
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.provenance import METRICS

logger = logging.getLogger(__name__)

VAL, TEST = "predictions_val.csv", "predictions_test.csv"
FOLDS, REPEATS = "predictions_folds.csv", "predictions_repeats.csv"


def predictions_csv(table: pd.DataFrame, model: str, targets: Sequence[Target]) -> str:
    """Return a table of predictions as its file: the model's own first risk is ``probability``."""
    own = {target.column(model): target.output for target in targets}
    weights = pd.DataFrame(weight_columns(targets), table.index)
    named = table.rename(columns=own)
    named = named.assign(probability=named[targets[0].output]).join(weights)
    first = [name for name in named if name in NO_RISKS[:4]]
    last = [name for name in named if name not in (*first, *weights, "probability", "patient")]
    columns = [*first, "probability", "patient", *weights, *last]
    return named[columns].to_csv(index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read a file of predictions as it is."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: name the folder of a finished stage")
    try:
        return pd.read_csv(path, dtype={"id": str, "patient": str}, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a table of predictions") from error


def read_targets(folder: Path, name: str = METRICS) -> tuple[Target, ...]:
    """Return what the predictions of a run folder are about."""
    path = folder / name
    try:
        return tuple(Target.from_json(x) for x in read_json(path)["targets"])
    except OSError as error:
        raise InputError(f"{path}: no such file: name the folder of a finished stage") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: of an earlier version of the program: train again") from error


def read_predictions(
    folder: Path, model: str | None, targets: Sequence[Target], name: str = TEST
) -> pd.DataFrame:
    """Read a file of predictions: what happened, then risks; the file's own are ``model``'s.

    None: the file has no own model.
    """
    path = folder / name
    table = read_table(path).drop(columns="fold", errors="ignore")
    try:
        table, _ = named_model(table)
        if model is not None:
            own = {target.output: target.column(model) for target in targets}
            table = table.rename(columns=own, errors="raise")
            table = table.drop(columns="probability", errors="ignore")
        needed = ["id", "patient", *(target.event for target in targets)]
        if missing := [name for name in needed if name not in table]:
            raise KeyError(missing[0])
        risks = [name for name in map(str, table) if is_risk(name)]
        table = table[[*table.columns.difference(risks, sort=False), *risks]]
        numbers = table.drop(columns=["id", "patient"]).astype(float)
        is_known = table["label"].isin([0, 1]).all() if "label" in table else True
        sound = numbers[risks].ge(0) & numbers[risks].le(1)
        if not (sound.all(axis=None) and is_known and risks):
            raise ValueError
    except KeyError as error:
        raise InputError(f"{path}: lacks a column: {error.args[0]}") from error
    except ValueError as error:
        rule = "labels are 0 or 1, risks are numbers from 0 to 1, of one model"
        raise InputError(f"{path}: not a table of predictions: {rule}") from error
    return table.astype(numbers.dtypes)


def shared_models(tables: list[pd.DataFrame], target: Target) -> list[pd.DataFrame]:
    """Leave out models that are missing in some table, and log their names."""
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    if len({best_blend(target.models(table)) for table in tables}) > 1:
        shared = [name for name in shared if not str(name).startswith(ENSEMBLE)]  # other blends
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
