"""Discrimination and calibration in subgroups of the patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.evaluation.metrics import Array, calibration, metrics
from medgemma_clinical.evaluation.metrics_table import (
    MINORITY_PATIENTS,
    bootstrap,
    count,
    label_risk_patient,
    with_interval,
)
from medgemma_clinical.evaluation.suppress import suppress_table
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, ReportContent, Topic
from medgemma_clinical.evaluation.verdicts import interval_text, percent

SUBGROUP_METRICS = {"auroc": ("AUROC", ".3f"), "oe": ("O/E", ".2f"), "slope": ("Slope", ".2f")}
"""Name and format of the metrics of subgroups and sites."""


def subgroups(evaluated: Evaluated) -> Topic:
    """Return the topic."""
    content = evaluated.content
    exact = subgroup_table(evaluated.rows, evaluated.model, content.bands, content.seed)
    table = suppress_table(exact, evaluated.min_cell, by="group")
    cells = subgroup_cells(table, content.noun)
    return Topic(
        "Subgroups",
        tables=[Cells(cells, subgroup_caption(content, "in subgroups"), is_wide=True)],
        numbers={"subgroups": table},
    )


def subgroup_caption(content: ReportContent, where: str) -> str:
    """Return the caption of ``subgroup_cells``."""
    pooled = f"The pooled risks of {content.folds} models" if content.folds else "The same model"
    about = "O/E: observed divided by expected events; a dash: too few patients"
    return f"{pooled} {where}; {about}"


def subgroup_table(rows: pd.DataFrame, model: str, bands: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return counts, AUROC and calibration of each category in ``bands`` (n rows)."""
    labels, risk, patients = label_risk_patient(rows, model)
    lines: list[dict[str, Any]] = []
    scored = {}  # rows by line
    for group, column in bands.items():
        for level in column.cat.categories:
            members = np.flatnonzero(column.to_numpy() == level)
            if len(members):
                counts = count(labels[members], patients[members])
                if counts["minority_patients"] >= MINORITY_PATIENTS:
                    scored[len(lines)] = members
                # The observed and the predicted share of events.
                mean = {"prevalence": labels[members].mean(), "risk": risk[members].mean()}
                lines.append({"group": str(group), "level": str(level), **counts, **mean})

    def statistic(weights: Array) -> dict[Any, Array]:
        values: dict[Any, Array] = {}
        for k, members in scored.items():
            part = labels[members], risk[members], weights[:, members]
            values[k, "auroc"] = metrics(*part)["auroc"]
            values[k, "slope"] = calibration(*part)["calibration_slope"]
            with np.errstate(invalid="ignore"):  # observed by expected events
                values[k, "oe"] = part[2] @ part[0] / (part[2] @ part[1])
        return values

    table = pd.DataFrame(lines)
    intervals = with_interval(*bootstrap(labels, patients, seed, statistic)) if scored else None
    for name in SUBGROUP_METRICS:
        columns = [name, f"{name}_low", f"{name}_high"]
        table[columns] = (
            np.nan if intervals is None else intervals.xs(name, level=1).reindex(table.index)
        )
    return table


def subgroup_cells(table: pd.DataFrame, noun: str) -> pd.DataFrame:
    """Return a ``subgroup_table`` or a ``site_table`` as text, with the metrics that any has."""
    is_site = "site" in table
    cells = pd.DataFrame(
        {
            "Site" if is_site else "Subgroup": (
                table["site"] if is_site else table["group"] + ": " + table["level"]
            ),
            noun.capitalize(): table["n"].map(count_text),
            "Events": table["events"].map(count_text),
            "Observed": table["prevalence"].map(percent),
            "Mean risk": table["risk"].map(percent),
        }
    )
    for name, (title, form) in SUBGROUP_METRICS.items():
        if table[name].notna().any():
            numbers = (table[column] for column in (name, f"{name}_low", f"{name}_high"))
            texts = [
                interval_text(value, low, high, form)
                for value, low, high in zip(*numbers, strict=True)
            ]
            place = 1 if name == "auroc" else len(cells.columns)  # a phone shows two columns
            cells.insert(place, f"{title} [95 %]", texts)
    return cells
