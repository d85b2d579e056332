"""Metrics laid out as tables of text, for console, report, comparison and model card alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from medgemma_clinical.evaluation import verdicts
from medgemma_clinical.evaluation.metrics_table import Metrics
from medgemma_clinical.evaluation.target import LABEL, Target


class Metric(NamedTuple):
    """How a metric is shown, and what it means."""

    title: str  # that of a share ends in (%)
    form: str
    meaning: str

    @property
    def scale(self) -> int:
        """By which a value is multiplied."""
        return 100 if self.title.endswith("(%)") else 1

    def text(self, row: Any) -> str:
        """Write value and interval of a line of a metrics table."""
        return verdicts.value_text(row, self.form, self.scale)

    def number(self, value: float) -> str:
        """Write a value, a dash where undefined."""
        return verdicts.NO_VALUE if pd.isna(value) else f"{self.scale * value:{self.form}}"


METRICS = {
    "auroc": Metric("AUROC", ".3f", "how often an event ranks above a non-event; 0.5 is chance"),
    "auprc": Metric("AUPRC", ".3f", "mean precision over recall; the observed share is chance"),
    "log_loss": Metric("Log loss", ".4f", "mean of -ln(risk given to what happened)"),
    "brier": Metric("Brier score", ".4f", "mean squared distance of risk and outcome"),
    "scaled_brier": Metric(
        "Scaled Brier score",
        "z.3f",
        "gain over the observed share as everyone's risk; 0 is none, 1 perfect",
    ),
    "observed": Metric("Observed (%)", ".1f", "share of those with the event"),
    "mean_risk": Metric("Mean risk (%)", ".1f", "mean of the predicted risks"),
    "oe": Metric("O/E", ".2f", "observed over expected events, weighted alike; 1 is ideal"),
    "intercept": Metric(
        "Intercept",
        "+z.2f",
        "calibration in the large, the slope held at 1; 0 is ideal; below, risks are too high",
    ),
    "slope": Metric("Slope", "z.2f", "1 is ideal; below, risks are too extreme; above, too alike"),
    "ici": Metric("ICI", ".3f", "mean distance of the risks from the calibration curve"),
    "ici_ideal": Metric("ICI if calibrated", ".3f", "what noise alone would show on these rows"),
    "e50": Metric("E50", ".3f", "median distance from the calibration curve"),
    "e90": Metric("E90", ".3f", "90th percentile of the distance"),
    "net_benefit": Metric(
        "Net benefit",
        "z.4f",
        "share of true positives minus that of false ones, weighted by the odds of the threshold",
    ),
    "sensitivity": Metric("Sensitivity (%)", ".1f", "of the events, those predicted positive"),
    "specificity": Metric("Specificity (%)", ".1f", "of the non-events, those predicted negative"),
    "ppv": Metric("PPV (%)", ".1f", "of the predicted positives, those with the event"),
    "npv": Metric("NPV (%)", ".1f", "of the predicted negatives, those without it"),
    "positives": Metric("Positives (%)", ".1f", "of all, those predicted positive"),
    "effective_n": Metric("Effective rows", ".0f", "rows that the weights are worth"),
    "weights_cut": Metric("Weights cut (%)", ".1f", "of the rows whose status is known"),
    "largest_weight": Metric("Largest weight", ".1f", "of a row, which stands for so many"),
    "expected_slope": Metric("Expected slope", ".2f", "of new patients; 1 by construction"),
    "expected_intercept": Metric(
        "Expected intercept", "+z.2f", "of new patients; 0 by construction"
    ),
    "expected_ici": Metric(
        "Expected ICI", ".3f", "on these rows, which taught the rule: in new ones larger"
    ),
}
"""The one registry of metrics."""

BESIDE = "auprc", "brier", "oe"
"""Metrics of each model beside its AUROC."""

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
    for name in BESIDE:
        values = metrics.metric(name)["value"]
        table[METRICS[name].title] = [METRICS[name].number(x) for x in values]
    costs = pd.DataFrame(cost, metrics.models, [*COST]).astype(float)
    for name, (title, form) in COST.items():
        table[title] = ["" if pd.isna(x) else f"{x:{form}}" for x in costs[name]]
    return table.loc[:, ~table.isin(["", verdicts.NO_VALUE]).all()]


def model_table(
    metrics: Metrics, cost: pd.DataFrame | None = None, targets: Sequence[Target] = (LABEL,)
) -> pd.DataFrame:
    """Return a line of text for each model and target.

    ``cost`` has the index model and columns of ``COST``.
    """
    tables = [model_cells(metrics.at(target), cost).map(str) for target in targets]
    if len(tables) > 1:
        for target, table in zip(targets, tables, strict=True):
            table.insert(1, "Risk", target.title)
    return pd.concat(tables).fillna("")


def metric_table(metrics: Metrics, names: Sequence[str]) -> pd.DataFrame:
    """Return what is known of metrics of the first model as text, with their meanings."""
    lines, values = [], metrics.of(metrics.models[0])
    for name in filter(values.index.__contains__, names):
        metric = METRICS[name]
        text = metric.text(values.loc[name])
        lines += [(metric.title, text, metric.meaning)] if text != verdicts.NO_VALUE else []
    return pd.DataFrame(lines, columns=METRIC_COLUMNS)
