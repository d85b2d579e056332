"""Rows to score beside the data of a checkpoint: the same series, units, facts and outcome."""

from __future__ import annotations

from typing import Any

import pandas as pd

from medgemma_clinical.data.dka.columns import check_header
from medgemma_clinical.data.dka.description import LABEL, Description, comparable, find_series
from medgemma_clinical.data.dka.facts import check_inputs
from medgemma_clinical.files import InputError


def described_by(config: dict[str, Any], table: pd.DataFrame) -> Description:
    """Describe a DataFrame as a checkpoint's data: the main column is the series without its own.

    Args:
        config: of the checkpoint.
        table: the DataFrame.
    """
    label = config["read_options"].get("label_column", LABEL)
    labels = {label: {"outcome": config["outcome"], "question": config["question"]}}
    own = {comparable(series.name) for series in find_series(table, Description(), None, "")[1:]}
    for name, unit in zip(config["features"], config["units"], strict=True):
        if comparable(name) not in own:
            return Description(series=name, unit=unit, plausible=None, labels=labels)
    return Description(labels=labels)


def check_same_meaning(
    table: pd.DataFrame, description: Description, config: dict[str, Any], source: str
) -> None:
    """Refuse a file that lacks an input of a checkpoint, or has another unit or outcome.

    Raises:
        InputError: names the difference.
    """
    label = config["read_options"].get("label_column", LABEL)
    check_header(table, source, label, labelled=False)
    found = {comparable(s.name): s for s in find_series(table, description, None, source)}
    where = "the JSON file beside it"
    for name, unit in zip(config["features"], config["units"], strict=True):
        series = found.get(comparable(name))
        if series is None:
            known = ", ".join(each.name for each in found.values())
            column = f"trajectory_{name} [{unit}]" if unit else f"trajectory_{name}"
            raise InputError(
                f"{source}: the checkpoint reads {name}, the file holds {known}: add a column "
                f"'{column}', or name the main series in {where}"
            )
        if series.unit != unit:
            raise InputError(
                f"{source}, column {series.column}: the checkpoint reads {name} in {unit or 'no'} "
                f"unit, the file has {series.unit or 'none'}: convert the values, or correct the "
                f"unit in the column's name or {where}"
            )
    check_inputs(table, config["inputs"], source)
    outcome = description.for_label(label).outcome
    if outcome != config["outcome"]:
        raise InputError(
            f"{source}: the checkpoint predicts {config['outcome']}, the file's outcome of "
            f"{label} is {outcome}: correct it in {where}"
        )
