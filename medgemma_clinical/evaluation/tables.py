"""Metrics laid out as tables of text, for console, report, comparison and model card alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.evaluation.metrics_table import Metrics, count
from medgemma_clinical.evaluation.verdicts import (
    NO_VALUE,
    difference_text,
    difference_verdict,
    interval_text,
    percent,
    value_text,
)
from medgemma_clinical.evaluation.written_reports import WRITTEN

METRICS = {
    "auroc": ("AUROC", ".3f", "how often an event ranks above a non-event; 0.5 is chance"),
    "auprc": ("AUPRC", ".3f", "mean precision over recall; the prevalence is chance"),
    "accuracy": ("Accuracy at 0.5", ".3f", "share of rows on the right side of a risk of 50 %"),
    "calibration_slope": ("Slope", ".2f", "below 1 the risks are too extreme; 1 is ideal"),
    "calibration_in_the_large": ("In the large", "+.2f", "0 is ideal; below, risks are too high"),
    "e_average": ("E-average", ".3f", "mean distance from calibrated risks; 0 is ideal"),
    "brier_skill": ("Brier skill", ".3f", "gain over the prevalence as everyone's risk"),
    "calibration_intercept": ("Intercept", "+.2f", "log-odds of the event at a risk of 50 %"),
    "brier": ("Brier score", ".4f", "mean squared distance of risk and outcome"),
    "log_loss": ("Log loss", ".4f", "mean of -ln(risk given to what happened)"),
    "sensitivity": ("Sensitivity (%)", ".1f", "of the events, those predicted positive"),
    "specificity": ("Specificity (%)", ".1f", "of the non-events, those predicted negative"),
    "ppv": ("PPV (%)", ".1f", "of the predicted positives, those with the event"),
    "npv": ("NPV (%)", ".1f", "of the predicted negatives, those without it"),
    "positives": ("Positives (%)", ".1f", "of all rows, those predicted positive"),
}
"""Name, format and meaning of each metric; the name of a share ends in (%)."""

COST = {
    "seconds_an_epoch": ("Seconds an epoch", ",.1f"),
    "tokens": ("Tokens", ",.0f"),
    "memory_mib": ("Memory (MiB)", ",.0f"),
    "residual_weight": ("Weight", ".1f"),
}
CASE_MIX = {
    "rows": "Rows",
    "patients": "Patients",
    "prevalence": "Prevalence of the event",
    "age": "Age in years, median (quartiles)",
    "women": "Women",
    "observations": "Observations a row, median (quartiles)",
}
PARTS = {"train": "training", "val": "validation", "test": "test"}


def model_cells(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``model_table`` with its verdicts as such, which a page draws as marks."""
    reference, lines = metrics.models[0], []
    for model, row in metrics.metric("auroc").iterrows():
        line: dict[str, Any] = {"Model": model, "AUROC [95 %]": value_text(row)}
        if "sd" in row:
            line["SD over splits"] = f"{row['sd']:.3f}"
        line |= {"Minus reference [95 %]": "", "Verdict": "the reference"}
        if model != reference:
            beside = "" if row["reference"] == reference else f" to {row['reference']}"
            line["Minus reference [95 %]"] = difference_text(row) + beside
            line["Verdict"] = difference_verdict(row, metrics.counts["minority_patients"])
        lines.append(line)
    table = pd.DataFrame(lines)
    known = (cost if cost is not None else pd.DataFrame()).reindex(metrics.models)
    for name, (title, form) in COST.items():
        if name in known and known[name].notna().any():
            table[title] = _texts(known[name].astype(float), form, "")
    for name, title, form in (("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f")):
        table[title] = _texts(metrics.metric(name)["value"], form, NO_VALUE)
    return table


def model_table(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a line of text a model; ``cost`` has the index model and columns of ``COST``."""
    return model_cells(metrics, cost).map(str)


def _texts(values: Iterable[float], form: str, unknown: str) -> list[str]:
    return [unknown if pd.isna(value) else f"{value:{form}}" for value in values]


def metric_table(metrics: Metrics, names: Sequence[str]) -> pd.DataFrame:
    """Return metrics of the first model as text, with their meanings."""
    lines = []
    for name, row in metrics.of(metrics.models[0]).loc[[*names]].iterrows():
        title, form, meaning = METRICS[str(name)]
        scale = 100 if title.endswith("(%)") else 1
        lines.append((title, value_text(row, form, scale), meaning))
    return pd.DataFrame(lines, columns=["Metric", "Value [95 %]", "Meaning"])


def subgroup_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a ``subgroup_table`` with ``prevalence`` as text; it may be suppressed."""
    auroc = table[["auroc", "auroc_low", "auroc_high"]].itertuples(index=False)
    return pd.DataFrame(
        {
            "Subgroup": table["group"] + ": " + table["level"],
            "Rows": table["n"].map(_count),
            "Events": table["events"].map(_count),
            "Observed": table["prevalence"].map(percent),
            "Mean risk": table["risk"].map(percent),
            "AUROC [95 %]": [interval_text(*each) for each in auroc],
        }
    )


def count_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of counts, which may be suppressed, as text."""
    return table.map(_count).rename(columns=str.capitalize)


def _count(count: int | str) -> str:
    return count if isinstance(count, str) else f"{count:,}"


def split_table(
    labels: NDArray[Any], groups: NDArray[Any], split: Mapping[str, NDArray[Any]]
) -> pd.DataFrame:
    """Return part, rows, patients, events and minority_patients of each part, as numbers."""
    lines = [
        {"part": PARTS.get(part, part), **count(labels[rows], groups[rows])}
        for part, rows in split.items()
    ]
    return pd.DataFrame(lines).rename(columns={"n": "rows"})


def case_mix_table(development: Mapping[str, float], here: Mapping[str, float]) -> pd.DataFrame:
    """Return two results of ``case_mix_of`` side by side, as numbers."""
    return pd.DataFrame({"development": development, "these rows": here}, dtype=float)


def case_mix_cells(development: Mapping[str, float], here: Mapping[str, float]) -> pd.DataFrame:
    """Return two case mixes side by side as text; a dash: not known, or hidden."""
    lines = [
        (title, *(_case_mix_text(mix, name) for mix in (development, here)))
        for name, title in CASE_MIX.items()
    ]
    return pd.DataFrame(lines, columns=["Case mix", "Development", "These rows"])


def _case_mix_text(mix: Mapping[str, float], name: str) -> str:
    if f"{name}_median" in mix:
        low, middle, high = (mix[f"{name}_{end}"] for end in ("q1", "median", "q3"))
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"
    if name in ("rows", "patients") and name in mix:
        return f"{mix[name]:,.0f}"
    return percent(mix.get(name, math.nan))


def counts_text(n: int, events: int) -> str:
    """Return rows and events in words."""
    return f"{n:,} rows, {events:,} with the event"


def written_table(reports: Mapping[str, Any] | None) -> pd.DataFrame | None:
    """Return the metrics of written reports as text, with their meanings; None without any."""
    if not reports:
        return None
    lines = [
        (title, _share_text(known) if isinstance(known, dict) else _count(known), meaning)
        for (title, meaning), known in ((WRITTEN[name], reports[name]) for name in WRITTEN)
    ]
    table = pd.DataFrame(lines, columns=["Metric", "Value [95 %]", "Meaning"])
    return table[~table["Metric"].str.startswith("Abnormal") | bool(reports["abnormal_values"])]


def written_sentence(reports: Mapping[str, Any] | None) -> str:
    """Return the result of written reports in one sentence; empty without reports."""
    if not reports or not reports["reports"]:
        return ""
    expected, inventing = (_share_text(reports[k]) for k in ("parse_share", "inventing_share"))
    return (
        f"Of {_count(reports['reports'])} written reports {expected} % have the expected form, and "
        f"{inventing} % state something that their row does not hold."
    )


def _share_text(share: Mapping[str, float | None]) -> str:
    return value_text(pd.Series(share, dtype=float), ".1f", 100)
