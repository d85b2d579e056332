"""Metrics laid out as tables of text, for console, report, comparison and model card alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import count_patients, minority_patients
from medgemma_clinical.evaluation.baselines import ENSEMBLE
from medgemma_clinical.evaluation.metrics_table import Metrics
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
    "auroc": (
        "AUROC",
        ".3f",
        "how often an event has a higher risk than a non-event; 0.5 is chance",
    ),
    "auprc": ("AUPRC", ".3f", "mean precision over recall; the prevalence is chance"),
    "accuracy": ("Accuracy at 0.5", ".3f", "share of rows on the right side of a risk of 50 %"),
    "calibration_slope": ("Slope", ".2f", "below 1 the risks are too extreme; 1 is ideal"),
    "calibration_in_the_large": (
        "In the large",
        "+.2f",
        "below 0 the risks are too high; 0 is ideal",
    ),
    "e_average": (
        "E-average",
        ".3f",
        "mean distance of the risks from calibrated ones; 0 is ideal",
    ),
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
    lines = []
    for model in metrics.models:
        auroc = metrics.row(model, "auroc")
        line: dict[str, Any] = {"Model": model, "AUROC [95 %]": value_text(auroc)}
        if "sd" in auroc:
            line["SD over splits"] = _number(auroc["sd"], ".3f")
        line |= {"Minus reference [95 %]": "", "Verdict": "the reference"}
        if model != metrics.models[0]:
            beside = f" to {auroc.reference}" if model == ENSEMBLE else ""
            line["Minus reference [95 %]"] = difference_text(auroc) + beside
            line["Verdict"] = difference_verdict(auroc, metrics.counts["minority_patients"])
        if cost is not None:
            for name in (name for name in COST if name in cost):
                title, form = COST[name]
                value: Any = cost[name].get(model)
                line[title] = "" if pd.isna(value) else f"{value:{form}}"
        line["AUPRC"] = _number(metrics.row(model, "auprc").value, ".3f")
        line["Brier"] = _number(metrics.row(model, "brier").value, ".4f")
        lines.append(line)
    return pd.DataFrame(lines)


def model_table(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a line of text a model; ``cost`` has the index model and columns of ``COST``."""
    return model_cells(metrics, cost).map(str)


def _number(value: float, form: str) -> str:
    return NO_VALUE if pd.isna(value) else f"{value:{form}}"


def metric_table(metrics: Metrics, names: Sequence[str]) -> pd.DataFrame:
    """Return metrics of the first model as text, with their meanings."""
    lines = []
    for name in names:
        title, form, meaning = METRICS[name]
        scale = 100 if title.endswith("(%)") else 1
        lines.append(
            (title, value_text(metrics.row(metrics.models[0], name), form, scale), meaning)
        )
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
    """Return the counts of each part, as numbers."""
    lines = [
        {
            "part": PARTS.get(part, part),
            "rows": len(rows),
            "patients": count_patients(groups, rows),
            "events": int(labels[rows].sum()),
            "minority_patients": minority_patients(labels[rows], groups[rows]),
        }
        for part, rows in split.items()
    ]
    return pd.DataFrame(lines)


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
    known = {name: x for name, x in reports.items() if name in WRITTEN}
    if not known["abnormal_values"]:
        known = {name: x for name, x in known.items() if not name.startswith("abnormal")}
    lines = [
        (title, _share_text(known[name]) if "share" in name else _count(known[name]), meaning)
        for name, (title, meaning) in WRITTEN.items()
        if name in known
    ]
    return pd.DataFrame(lines, columns=["Metric", "Value [95 %]", "Meaning"])


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
