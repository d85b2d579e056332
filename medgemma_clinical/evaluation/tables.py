"""Metrics laid out as tables of text, for console, report, comparison and model card alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from medgemma_clinical.evaluation import verdicts
from medgemma_clinical.evaluation.metrics_table import Metrics

METRICS = {
    "auroc": ("AUROC", ".3f", "how often an event ranks above a non-event; 0.5 is chance"),
    "auprc": ("AUPRC", ".3f", "mean precision over recall; the prevalence is chance"),
    "calibration_slope": (
        "Slope",
        ".2f",
        "1 is ideal; below, risks are too extreme; above, too alike",
    ),
    "calibration_in_the_large": (
        "Calibration in the large",
        "+.2f",
        "are risks right on average? 0 is ideal; below, they are too high",
    ),
    "ici": ("ICI", ".3f", "mean distance of the risks from the calibration curve; 0 is ideal"),
    "brier_skill": (
        "Scaled Brier score",
        ".3f",
        "gain over the prevalence as everyone's risk; 0 is none, 1 perfect",
    ),
    "expected_calibration_slope": ("Slope", ".2f", "of new patients; 1 by construction"),
    "expected_calibration_in_the_large": (
        "Calibration in the large",
        "+.2f",
        "of new patients; 0 by construction",
    ),
    "expected_ici": ("ICI", ".3f", "on these rows, which taught the rule: in new ones larger"),
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

COST = {
    "seconds_an_epoch": ("Seconds an epoch", ",.1f"),
    "tokens": ("Tokens", ",.0f"),
    "memory_mib": ("Memory (MiB)", ",.0f"),
    "residual_weight": ("Weight", ".1f"),
}
METRIC_COLUMNS = ["Metric", "Value [95 %]", "Meaning"]
MINUS = "Minus reference [95 %]"
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def model_cells(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``model_table`` with its verdicts as such, which a page draws as marks."""
    reference, lines = metrics.models[0], []
    for model, row in metrics.metric("auroc").iterrows():
        line: dict[str, Any] = {"Model": model, "AUROC [95 %]": verdicts.value_text(row)}
        line |= {"Verdict": "the reference", MINUS: ""}
        if model != reference:
            beside = "" if row.reference == reference else f", minus {row.reference}"
            line[MINUS] = verdicts.difference_text(row) + beside
            line["Verdict"] = ""
            if model in metrics.planned:
                line["Verdict"] = verdicts.difference_verdict(
                    row, metrics.counts["minority_patients"]
                )
        if "sd" in row:
            spread = row["sd"]  # hidden where counts are small
            line["SD over splits"] = verdicts.NO_VALUE if pd.isna(spread) else f"{spread:.3f}"
        lines.append(line)
    table = pd.DataFrame(lines)
    for name, title, form in (("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f")):
        if name not in metrics.of(reference).index:
            continue  # times have no AUPRC
        values = metrics.metric(name)["value"]
        table[title] = [verdicts.NO_VALUE if pd.isna(x) else f"{x:{form}}" for x in values]
    costs = pd.DataFrame(cost, metrics.models, [*COST]).astype(float)
    for name, (title, form) in COST.items():
        table[title] = ["" if pd.isna(x) else f"{x:{form}}" for x in costs[name]]
    return table.loc[:, ~table.isin(["", verdicts.NO_VALUE]).all()]


def model_table(metrics: Metrics, cost: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return a line of text a model; ``cost`` has the index model and columns of ``COST``."""
    return model_cells(metrics, cost).map(str)


def metric_table(metrics: Metrics, names: Sequence[str]) -> pd.DataFrame:
    """Return what is known of metrics of the first model as text, with their meanings."""
    lines, values = [], metrics.of(metrics.models[0])
    for name in filter(values.index.__contains__, names):
        title, form, meaning = METRICS[name]
        text = verdicts.value_text(values.loc[name], form, 100 if title.endswith("(%)") else 1)
        lines += [(title, text, meaning)] if text != verdicts.NO_VALUE else []
    return pd.DataFrame(lines, columns=METRIC_COLUMNS)
