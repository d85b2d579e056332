"""Tables of predictions: how runs write them, and the one way to read them and their outcomes."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.importers import tables
from medgemma_clinical.evaluation.baselines import ENSEMBLE, best_blend
from medgemma_clinical.evaluation.metrics_table import MODEL, Metrics, named_model
from medgemma_clinical.evaluation.target import NO_RISKS, Target, is_risk, weight_columns
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.provenance import METRICS

logger = logging.getLogger(__name__)

VAL, TEST = "predictions_val.csv", "predictions_test.csv"
FOLDS, REPEATS = "predictions_folds.csv", "predictions_repeats.csv"

TEXTS = ("id", "patient", MODEL)
FORMS = {
    "label": "0, 1 or empty",
    "risk": "a number from 0 to 1",
    "event_hours": "a number from 0 on, or empty",
    "event": "0, 1, 2, ... or empty",
    "fold": "0, 1, 2, ...",
    "date": "an ISO date",
}
"""What a column of this name holds, and of any other name a risk."""

YEARS = 1900, 2200


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


def read_table(path: Path, needed: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV file as text; refuse one without some columns."""
    if not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path}: no such file")
    try:
        with tables.open_text(path, "utf-8-sig") as text:
            separator, _, _ = tables.read_header(text)
            text.seek(0)
            table = pd.read_csv(text, dtype=str, keep_default_na=False, sep=separator)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'damaged'}") from error
    except (ValueError, EOFError, csv.Error) as error:  # pandas' and Unicode's, too
        raise InputError(f"{path}: not a CSV file in UTF-8") from error
    for name in needed:
        if name not in table:
            raise InputError(f"{path}: line 1: no column {name}")
    return table


def parse(table: pd.DataFrame, path: Path, column: str, form: str = "risk") -> pd.Series[Any]:
    """Parse a column of text by its form in ``FORMS``; refuse the first cell of another form."""
    cells = table[column]
    if form == "date":
        values: Any = pd.to_datetime(cells, format="ISO8601", utc=True, errors="coerce")
        is_wrong = ~values.dt.year.between(*YEARS)
    else:
        values = pd.to_numeric(cells, errors="coerce")
        if form == "label":
            is_right = values.isin([0, 1])
        elif form == "risk":
            is_right = values.between(0, 1)
        elif form == "event_hours":
            is_right = values.between(0, np.inf, inclusive="left")
        else:
            is_right = values.ge(0) & (values % 1 == 0)
        is_wrong = ~is_right & (cells != "")
    if is_wrong.any():
        row = int(is_wrong.argmax())
        text = f"{path}: line {row + 2}: column {column}: give {FORMS[form]}"
        raise InputError(text, value=cells.iloc[row])
    return values


def read_rows(path: Path, needed: Sequence[str] = ()) -> pd.DataFrame:
    """Read predictions that a run has written: texts, numbers and risks."""
    rows = read_table(path, ["id", "patient", *needed])
    for name in rows.columns.difference([*TEXTS]):
        rows[name] = parse(rows, path, name, name if name in FORMS else "risk")
        if rows[name].isna().any():
            raise InputError(f"{path}: column {name}: an empty cell")
    return rows


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
    needed = [target.event for target in targets]
    if model is not None:
        needed += [target.output for target in targets]
    table = read_rows(path, needed).drop(columns="fold", errors="ignore")
    try:
        table, _ = named_model(table)
    except ValueError as error:
        raise InputError(f"{path}: {error}: train again") from error
    if model is not None:
        own = {target.output: target.column(model) for target in targets}
        table = table.rename(columns=own).drop(columns="probability", errors="ignore")
    risks = [column for column in map(str, table) if is_risk(column)]
    happened = table.columns.difference(risks, sort=False)
    numbers = table.columns.difference([*TEXTS], sort=False)
    return table[[*happened, *risks]].astype(dict.fromkeys(numbers, float))


def read_runs(
    folders: Sequence[Path], model: str | None, name: str = METRICS
) -> tuple[list[pd.DataFrame], tuple[Target, ...]]:
    """Return the test predictions of runs of one model, and what they are about."""
    targets = read_targets(folders[0], name)
    tables = [read_predictions(folder, model, targets) for folder in folders]
    return shared_models(tables, targets[0]), targets


def shared_models(tables: Sequence[pd.DataFrame], target: Target) -> list[pd.DataFrame]:
    """Leave out models that are missing in some table, and log their names."""
    shared = [column for column in tables[0] if all(column in table for table in tables)]
    if len({best_blend(target.models(table)) for table in tables}) > 1:
        shared = [column for column in shared if not str(column).startswith(ENSEMBLE)]
    left_out = sorted({str(column) for table in tables for column in table} - set(shared))
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
