"""Metrics laid out as tables of text, for console, report, comparison and model card alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_text
from medgemma_clinical.evaluation.metrics_table import Metrics, count
from medgemma_clinical.evaluation.verdicts import (
    NO_VALUE,
    difference_text,
    difference_verdict,
    interval_text,
    json_text,
    percent,
    value_text,
)
from medgemma_clinical.evaluation.written_reports import WRITTEN

METRICS = {
    "auroc": ("AUROC", ".3f", "how often an event ranks above a non-event; 0.5 is chance"),
    "auprc": ("AUPRC", ".3f", "mean precision over recall; the prevalence is chance"),
    "accuracy": ("Accuracy at 0.5", ".3f", "share on the right side of a risk of 50 %"),
    "calibration_slope": ("Slope", ".2f", "below 1 the risks are too extreme; 1 is ideal"),
    "calibration_in_the_large": ("In the large", "+.2f", "0 is ideal; below, risks are too high"),
    "ici": ("ICI", ".3f", "mean distance of the risks from the calibration curve; 0 is ideal"),
    "brier_skill": ("Brier skill", ".3f", "gain over the prevalence as everyone's risk"),
    "calibration_intercept": ("Intercept", "+.2f", "log-odds of the event at a risk of 50 %"),
    "e50": ("E50", ".3f", "median of these distances"),
    "e90": ("E90", ".3f", "90th percentile of these distances"),
    "brier": ("Brier score", ".4f", "mean squared distance of risk and outcome"),
    "log_loss": ("Log loss", ".4f", "mean of -ln(risk given to what happened)"),
    "sensitivity": ("Sensitivity (%)", ".1f", "of the events, those predicted positive"),
    "specificity": ("Specificity (%)", ".1f", "of the non-events, those predicted negative"),
    "ppv": ("PPV (%)", ".1f", "of the predicted positives, those with the event"),
    "npv": ("NPV (%)", ".1f", "of the predicted negatives, those without it"),
    "positives": ("Positives (%)", ".1f", "of all, those predicted positive"),
}
"""Name, format and meaning of each metric; the name of a share ends in (%)."""

SUBGROUP_METRICS = {"auroc": ("AUROC", ".3f"), "oe": ("O/E", ".2f"), "slope": ("Slope", ".2f")}
"""Name and format of the metrics of subgroups and sites."""

COST = {
    "seconds_an_epoch": ("Seconds an epoch", ",.1f"),
    "tokens": ("Tokens", ",.0f"),
    "memory_mib": ("Memory (MiB)", ",.0f"),
    "residual_weight": ("Weight", ".1f"),
}
CASE_MIX = {
    "patients": "Patients",
    "prevalence": "Prevalence of the event",
    "age": "Age in years, median (quartiles)",
    "women": "Women",
    "observations": "Observations, median (quartiles)",
}
METRIC_COLUMNS = ["Metric", "Value [95 %]", "Meaning"]
MINUS = "Minus reference [95 %]"
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def model_cells(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``model_table`` with its verdicts as such, which a page draws as marks."""
    reference, lines = metrics.models[0], []
    for model, row in metrics.metric("auroc").iterrows():
        line: dict[str, Any] = {"Model": model, "Verdict": "the reference", MINUS: ""}
        if model != reference:
            beside = "" if row.reference == reference else f" to {row.reference}"
            line[MINUS] = difference_text(row) + beside
            line["Verdict"] = ""
            if model in metrics.planned:
                line["Verdict"] = difference_verdict(row, metrics.counts["minority_patients"])
        line["AUROC [95 %]"] = value_text(row)
        if "sd" in row:
            line["SD over splits"] = f"{row['sd']:.3f}"
        lines.append(line)
    table = pd.DataFrame(lines)
    for name, title, form in (("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f")):
        values = metrics.metric(name)["value"]
        table[title] = [NO_VALUE if pd.isna(x) else f"{x:{form}}" for x in values]
    costs = (pd.DataFrame() if cost is None else cost).reindex(metrics.models)
    for name, (title, form) in COST.items():
        if name in costs and costs[name].notna().any():
            numbers = costs[name].astype(float)
            table[title] = ["" if pd.isna(x) else f"{x:{form}}" for x in numbers]
    return table


def model_table(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a line of text a model; ``cost`` has the index model and columns of ``COST``."""
    return model_cells(metrics, cost).map(str)


def metric_table(metrics: Metrics, names: Sequence[str]) -> pd.DataFrame:
    """Return what is known of metrics of the first model as text, with their meanings."""
    lines, values = [], metrics.of(metrics.models[0])
    for name in names:
        title, form, meaning = METRICS[name]
        text = value_text(values.loc[name], form, 100 if title.endswith("(%)") else 1)
        lines += [(title, text, meaning)] if text != NO_VALUE else []
    return pd.DataFrame(lines, columns=METRIC_COLUMNS)


def subgroup_cells(table: pd.DataFrame, noun: str) -> pd.DataFrame:
    """Return a ``subgroup_table`` or a ``site_table`` as text, with the metrics that any has."""
    first = {"Site": table["site"]} if "site" in table else {}
    first = first or {"Subgroup": table["group"] + ": " + table["level"]}
    cells: dict[str, Any] = {
        **first,
        noun.capitalize(): table["n"].map(count_text),
        "Events": table["events"].map(count_text),
        "Observed": table["prevalence"].map(percent),
        "Mean risk": table["risk"].map(percent),
    }
    for name, (title, form) in SUBGROUP_METRICS.items():
        if table[name].notna().any():
            numbers = (table[each] for each in (name, f"{name}_low", f"{name}_high"))
            cells[f"{title} [95 %]"] = [
                interval_text(value, low, high, form)
                for value, low, high in zip(*numbers, strict=True)
            ]
    return pd.DataFrame(cells)


def update_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of ``Updates``, without index, as text, a line a method."""
    methods = table.set_index(["method", "metric"]).groupby(level=0, sort=False)
    lines = [
        {
            "Update": method,
            "Slope": value_text(row.loc["calibration_slope"], ".2f"),
            "ICI": value_text(row.loc["ici"]),
            "Log loss [95 %]": value_text(row.loc["log_loss"], ".4f"),
            "Change [95 %]": difference_text(row.loc["log_loss"], "+.4f"),
        }
        for method, row in ((method, rows.droplevel(0)) for method, rows in methods)
    ]
    cells = pd.DataFrame(lines)
    cells.loc[0, "Change [95 %]"] = ""  # not updated: the reference of the others
    return cells


def count_cells(table: pd.DataFrame, noun: str) -> pd.DataFrame:
    """Return a table of counts, which may be suppressed, as text; its rows are called ``noun``."""
    named = table.map(count_text).rename(columns={"rows": noun}).rename(columns=str.capitalize)
    return named.loc[:, ~named.columns.duplicated()]


def part_table(
    labels: NDArray[Any], groups: NDArray[Any], split: Mapping[str, NDArray[Any]]
) -> pd.DataFrame:
    """Return part, rows, patients, events and minority_patients of each part, as numbers."""
    lines = [
        {"part": PART_NAMES.get(part, part), **count(labels[rows], groups[rows])}
        for part, rows in split.items()
    ]
    return pd.DataFrame(lines).rename(columns={"n": "rows"})


def case_mix_cells(development: Mapping[str, float], here: Mapping[str, float]) -> pd.DataFrame:
    """Return what is known of two results of ``case_mix`` as text; a dash: of one alone."""
    table = pd.DataFrame({"Case mix": CASE_MIX.values()})
    for title, mix in (("Training data", development), ("Scored here", here)):
        table[title] = [_case_mix_text(mix, name) for name in CASE_MIX]
    return table[(table.iloc[:, 1:] != NO_VALUE).any(axis=1)]


def _case_mix_text(mix: Mapping[str, float], name: str) -> str:
    if f"{name}_median" in mix:
        low, middle, high = (mix[f"{name}_{end}"] for end in ("q1", "median", "q3"))
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"
    if name not in mix:
        return NO_VALUE
    return count_text(mix[name]) if name == "patients" else percent(mix[name])


def written_table(reports: Mapping[str, Any] | None) -> pd.DataFrame | None:
    """Return what is known of written reports as text, with meanings; None without any."""
    if not reports:
        return None
    lines = []
    for name, (title, meaning) in WRITTEN.items():
        metric = reports[name]
        text = json_text(metric, ".1f", 100) if isinstance(metric, dict) else count_text(metric)
        lines += [(title, text, meaning)] if text != NO_VALUE else []
    return pd.DataFrame(lines, columns=METRIC_COLUMNS)


def written_sentence(reports: Mapping[str, Any] | None) -> str:
    """Return the result of written reports in one sentence; empty without reports."""
    if not reports or not reports["reports"]:
        return ""
    names = ("parse_share", "inventing_share")
    if any(reports[name]["value"] is None for name in names):  # hidden
        return ""
    expected, inventing = (json_text(reports[name], ".1f", 100) for name in names)
    return (
        f"Of {count_text(reports['reports'])} written reports {expected} % have the expected form, "
        f"and {inventing} % state a number that the patient's data do not hold."
    )
