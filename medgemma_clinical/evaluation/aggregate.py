"""What a site gives away of its labelled rows for pooling, and what several sites say together.

An aggregate has no row: counts are rounded to 5, other numbers have three significant digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm

from medgemma_clinical.data.small_cells import MIN_CELL, count_patients
from medgemma_clinical.evaluation.metrics import Array, calibration, metrics
from medgemma_clinical.evaluation.metrics_table import (
    TESTED,
    bootstrap,
    label_risk_patient,
    with_interval,
)
from medgemma_clinical.evaluation.suppress import distant_thresholds
from medgemma_clinical.evaluation.topics.cohort import case_mix, case_mix_cells, suppress_case_mix
from medgemma_clinical.evaluation.topics.subgroups import random_effects

METRICS: dict[str, tuple[float, float]]
METRICS = dict.fromkeys(("auroc", "auprc", "brier", "mean_risk", "observed"), (0, 1))
METRICS |= {"brier_skill": (-1000, 1), "log_loss": (0, 1000), "oe": (0.001, 1000)}
METRICS |= dict.fromkeys(("intercept", "slope"), (-1000, 1000))
"""Metrics of an aggregate, with bounds of their values in a file; intercept: slope held at 1."""

REACH = norm.ppf(0.975)
HALF_DIGIT = 5e-4
"""Of an AUROC of three digits, which may be 1 and has no logit then."""


def aggregate(
    rows: pd.DataFrame,  # ``TESTED``, then the risk of each model
    edges: Mapping[str, list[float]],  # of risk groups of the development cohort, by model
    cohort: tuple[pd.DataFrame, pd.DataFrame],  # ``demographics`` and ``row_medians``
    min_cell: int,
    seed: int,
) -> dict[str, Any]:
    """Return counts, metrics with variances, risk groups and case mix of rows of one site.

    Source: Debray et al. 2017, BMJ 356:i6460, for the variance by the ends of the interval.
    """
    risks = {str(name): rows[name].to_numpy(float) for name in rows.columns.drop(TESTED)}
    labels, _, patients = label_risk_patient(rows, next(iter(risks)))

    def count(members: Any) -> int:
        exact = count_patients(patients, members)
        return max(5 * round(exact / 5), 5 * math.ceil(min_cell / 5)) if min_cell else exact

    def statistic(weights: Array) -> dict[Any, Array]:
        values: dict[Any, Array] = {}
        for name, risk in risks.items():
            found, fit = (f(labels, risk, weights) for f in (metrics, calibration))
            found["intercept"] = fit["calibration_in_the_large"]
            found["slope"] = fit["calibration_slope"]
            total = weights.sum(axis=1)
            found |= {"mean_risk": weights @ risk / total, "observed": weights @ labels / total}
            found["oe"] = found["observed"] / found["mean_risk"]
            values |= {(name, metric): found[metric] for metric in METRICS}
        return values

    table = with_interval(*bootstrap(labels, patients, seed, statistic))
    table = table.rename_axis(["model", "metric"]).reset_index()
    ends = [scaled(table["metric"], table[end]) for end in ("low", "high")]
    table["variance"] = (((ends[1] - ends[0]) / (2 * REACH)) ** 2).where(ends[1] > ends[0])
    groups = []
    for name, risk in risks.items():
        cuts = distant_thresholds(labels, risk, patients, max(1, min_cell), edges.get(name, []))
        for low, high in zip([0, *cuts], [*cuts, np.inf], strict=True) if cuts else ():
            part = (risk >= low) & (risk < high)
            shares = {"risk": risk[part].mean(), "observed": labels[part].mean()}
            groups.append({"model": name, "from": low, "patients": count(part), **shares})
    # Quantiles of fewer patients would be values of some of them.
    mix = case_mix(*cohort, max(min_cell, MIN_CELL))
    mix = suppress_case_mix(mix, min_cell, hide_events=False)
    content = {
        "min_cell": min_cell,
        "patients": count(labels >= 0),
        "events": count(labels == 1),
        "non_events": count(labels == 0),
        "metrics": table[["model", "metric", "value", "variance"]].to_dict("records"),
        "groups": groups,
        "case_mix": {name: x for name, x in mix.items() if name not in ("rows", "patients")},
    }
    return three_digits(content)


def three_digits(content: Any) -> Any:
    """Return plain content whose fractions have three significant digits, None for NaN."""

    def rounded(text: str) -> float:
        return float(f"{float(text):.3g}")

    return json.loads(json.dumps(content), parse_float=rounded, parse_constant=lambda _: None)


def scaled(metric: Any, x: pd.Series[float]) -> pd.Series[float]:
    """Return metrics on the scales on which sites are pooled: logit of AUROC, log of O/E."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds, log = logit(x.clip(HALF_DIGIT, 1 - HALF_DIGIT)), np.log(x)
    return x.mask(metric == "auroc", odds).mask(metric == "oe", log)


def unscaled(metric: Any, x: pd.Series[float]) -> pd.Series[float]:
    """Return metrics from the scales of ``scaled``."""
    return x.mask(metric == "auroc", expit(x)).mask(metric == "oe", np.exp(x.clip(upper=700)))


# --------------------------------------------------------------------------- of several sites


def read_estimates(content: Any) -> pd.DataFrame:
    """Return the checked metrics of an aggregate; an error of any type where it is none."""
    numbers = {"value": float, "variance": float}
    table = pd.DataFrame(content["metrics"])[["model", "metric", *numbers]].astype(numbers)
    low, high = np.transpose([METRICS[name] for name in table["metric"]])
    sound = table["value"].between(low, high) | table["value"].isna()
    sound &= table["variance"].between(1e-12, 1e6) | table["variance"].isna()
    sizes = [content[name] for name in ("patients", "events", "non_events")]
    groups = [group for group in content["groups"] if group["model"]]
    shares = [group[name] for group in groups for name in ("risk", "observed")]
    is_sound = (
        sound.all()
        and not table.duplicated(["model", "metric"]).any()
        and len(table) == table["model"].nunique() * len(METRICS)
        and content["model"]["name"] in table["model"].unique()
        and all(type(n) is int and 0 < n < 10**9 for n in [*sizes, content["min_cell"] + 1])
        and all(0 <= share <= 1 for share in shares)
    )
    if not is_sound:
        raise ValueError("out of bounds")
    case_mix_cells({"site": content["case_mix"]}, "patients")  # raises where it is none
    return table


def pool_sites(sites: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the estimates of all sites, and what is pooled by random effects; NaN with few."""
    tables = {name: read_estimates(site) for name, site in sites.items()}
    table = pd.concat(tables, names=["site"]).reset_index(level="site")
    hashes = {site["model"]["baselines_sha256"] for site in sites.values()}
    known = table.groupby("model")["site"].transform("nunique") == len(sites)
    if len(hashes) > 1 or None in hashes:  # other baselines, or copies without them
        known = table["model"] == next(iter(sites.values()))["model"]["name"]
    table = table[known].reset_index(drop=True)
    effect = scaled(table["metric"], table["value"])
    for end, sign in (("low", -1), ("high", 1)):
        reach = effect + sign * REACH * np.sqrt(table["variance"])
        table[end] = unscaled(table["metric"], reach)
    lines = {}
    for key, part in table.assign(effect=effect).groupby(["model", "metric"], sort=False):
        estimates = part[["effect", "variance"]].dropna().to_numpy()
        found = pd.Series(random_effects(*estimates.T))
        spread = found[["i2", "tau2"]]
        pooled = unscaled(pd.Series(key[1], found.index), found)
        lines[key] = {"sites": len(estimates), **pooled, **spread}
    return table, pd.DataFrame.from_dict(lines, "index").rename_axis(["model", "metric"])
