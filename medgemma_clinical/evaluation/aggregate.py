"""What a site gives away of its labelled rows for pooling, and what several sites say together.

An aggregate has no row: two models at most, few digits, counts of patients to the nearest 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm

from medgemma_clinical.data.small_cells import count_patients
from medgemma_clinical.evaluation.metrics import LOGIT, Array, log_odds, newton_steps, of_labels
from medgemma_clinical.evaluation.pooling import random_effects

BOUNDS = {"auroc": (0, 1), "oe": (0.001, 1000), "intercept": (-1000, 1000), "slope": (-1000, 1000)}
BOUNDS |= {"brier": (0, 1)}
"""Metrics of each model, with bounds of their values; intercept: slope held at 1."""

ERRORS = {name: f"{name}_error" for name in ("auroc", "oe", "intercept", "slope")}
"""Standard errors: of the logit of the AUROC, of the logarithm of O/E."""

NEEDED = {"patients": 100, "events": 20, "non_events": 20}
"""Patients of an aggregate, and those of them with, and without, the event."""

THREE_DIGITS = 500
"""Patients from which on numbers have three digits, below two."""

HALF_DIGIT = 0.005
"""Of an AUROC of two digits, which may be 1 and has no logit then."""

REACH = norm.ppf(0.975)


def few_digits(content: Any, digits: int = 3) -> Any:
    """Return plain content whose fractions have so many digits and decimals, None for NaN."""

    def rounded(text: str) -> float:
        return round(float(f"{float(text):.{digits}g}"), digits)

    return json.loads(json.dumps(content), parse_float=rounded, parse_constant=lambda _: None)


def count_kinds(labels: Array, patients: Any) -> dict[str, int]:
    """Return the numbers of ``NEEDED`` of some rows."""
    kinds = labels >= 0, labels == 1, labels == 0
    return {name: count_patients(patients, x) for name, x in zip(NEEDED, kinds, strict=True)}


def count_problem(counts: Mapping[str, int]) -> str:
    """Return why rows of these counts are in no aggregate; counts may be rounded to 5."""
    patients, events, non_events = (counts[name] for name in NEEDED)
    if not max(events, non_events) <= patients <= events + non_events + 5:
        return f"contradictory counts: {events} with and {non_events} without the event"
    if all(counts[name] >= need for name, need in NEEDED.items()):
        return ""
    need = "{} patients, {} of them with and {} without the event".format(*NEEDED.values())
    return f"takes {need}: these are {patients}, {events} and {non_events}"


def aggregate(rows: pd.DataFrame, models: Mapping[str, str | None]) -> dict[str, Any]:
    """Return counts of rows of one site, and the metrics of models, given by name and hash.

    The errors follow from rounded metrics, risks and counts: they say nothing more of the labels.
    """
    labels, patients = rows["label"].to_numpy(float), rows["patient"].to_numpy(str)
    known = of_labels(labels)
    exact = count_kinds(labels, patients)
    counts = {name: 5 * round(n / 5) for name, n in exact.items()}
    digits = 3 if exact["patients"] >= THREE_DIGITS else 2
    share = exact["patients"] / len(rows)  # the rows of a patient count as one
    lines = []
    for name, digest in models.items():
        risk = rows[name].to_numpy(float)
        found = known.ranking(risk) | known.level(risk) | known.calibration(risk)
        values = {key: float(found[key][0]) for key in BOUNDS}
        rounded = pd.Series(few_digits(values, digits), dtype=float)  # None becomes NaN
        errors = standard_errors(rounded, risk, counts, share)
        numbers = few_digits(rounded.to_dict() | errors, digits)
        lines.append({"name": name, "sha256": digest, **numbers})
    return {**counts, "models": lines}


def standard_errors(
    values: pd.Series[float], risk: Array, counts: Mapping[str, int], share: float
) -> dict[str, float]:
    """Return the ``ERRORS`` of rounded metrics on n rows, each of which counts ``share``.

    Source: Newcombe 2006, method 4, for the AUROC; the observed information for the others.
    """
    auroc = float(np.clip(values["auroc"], HALF_DIGIT, 1 - HALF_DIGIT))
    both, odds = [counts["events"], counts["non_events"]], log_odds(risk)
    half = sum(both) / 2 - 1
    spread = 1 + half * (1 - auroc) / (2 - auroc) + half * auroc / (1 + auroc)
    # As many events as the rounded intercept expects.
    expected = expit(values["intercept"] + odds)
    information = share * (expected * (1 - expected)).sum()
    errors = {
        "auroc": np.sqrt(spread / (auroc * (1 - auroc) * np.prod(both))),
        "oe": np.sqrt(information) / (share * expected.sum()),
        "intercept": 1 / np.sqrt(information),
    }
    ones, turned = np.ones((1, len(odds))), values["slope"] * odds
    level = newton_steps(LOGIT, expected, ones, ones, [0.0], turned)[0, 0]
    expected = expit(level + turned)
    weights = expected * (1 - expected)
    centred = odds - weights @ odds / weights.sum()
    errors["slope"] = 1 / np.sqrt(share * weights @ centred**2)
    return {ERRORS[name]: float(error) for name, error in errors.items()}


# --------------------------------------------------------------------------- of several sites


def read_models(content: Any) -> pd.DataFrame:
    """Return the checked metrics of an aggregate; an error of any type where it is none."""
    numbers = [*BOUNDS, *ERRORS.values()]
    table = pd.DataFrame(content["models"])[["name", "sha256", *numbers]]
    table = table.astype(dict.fromkeys(numbers, float))
    bounds = BOUNDS | dict.fromkeys(ERRORS.values(), (0.001, 1000))
    sound = [table[name].between(*bounds[name]) | table[name].isna() for name in numbers]
    texts = [content["version"], content["outcome"], *table["name"], *table["sha256"]]
    if not (
        np.all(sound) and table["name"].is_unique and all(isinstance(text, str) for text in texts)
    ):
        raise ValueError("out of bounds")
    return table


def pool_sites(sites: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return the metrics of all sites, what is pooled by random effects, and what is left out."""
    tables = {name: read_models(site) for name, site in sites.items()}
    models = pd.concat(tables, names=["site"]).reset_index("site")
    notes = []
    for model, part in models.groupby("name", sort=False):
        same = part.loc[part["sha256"] == part["sha256"].mode()[0], "site"]
        if others := [name for name in sites if name not in {*same}]:
            text = "files without it, or with another one"
            notes.append(f"{model} is not pooled: {text}: {', '.join(others)}.")
            models = models[models["name"] != model]
    notes += [
        f"{site}: {100 * content['unknown']:.2g} % of the rows, of which {content['target']} is "
        "unknown, are left out."
        for site, content in sites.items()
        if content.get("unknown")
    ]
    columns = ["site", "name"]
    parts = [
        models[columns].assign(
            metric=name, value=models[name], error=models.get(ERRORS.get(name, ""), np.nan)
        )
        for name in BOUNDS
    ]
    table = pd.concat(parts, ignore_index=True).rename(columns={"name": "model"})
    effect = scaled(table["metric"], table["value"])
    for end, sign in (("low", -1), ("high", 1)):
        table[end] = unscaled(table["metric"], effect + sign * REACH * table["error"])
    lines = {}
    with_error = table.assign(effect=effect)[table["metric"].isin(ERRORS)]
    for key, part in with_error.groupby(["model", "metric"], sort=False):
        estimates = part.dropna(subset=["effect", "error"])
        if others := sorted({*part["site"]} - {*estimates["site"]}):
            text = "its logistic fit has no finite solution"
            notes.append(f"{', '.join(others)}: left out of the {key[1]} of {key[0]}: {text}.")
        found = random_effects(estimates["effect"].to_numpy(), estimates["error"].to_numpy() ** 2)
        pooled = pd.Series(found)
        spread = pooled[["i2", "tau2"]]
        pooled = unscaled(pd.Series(key[1], pooled.index), pooled)
        lines[key] = {"sites": len(estimates), **pooled, **spread}
    return table, pd.DataFrame.from_dict(lines, "index").rename_axis(["model", "metric"]), notes


def scaled(metric: Any, x: pd.Series[float]) -> pd.Series[float]:
    """Return metrics on the scales on which sites are pooled: logit of AUROC, log of O/E."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds, log = logit(x.clip(HALF_DIGIT, 1 - HALF_DIGIT)), np.log(x)
    return x.mask(metric == "auroc", odds).mask(metric == "oe", log)


def unscaled(metric: Any, x: pd.Series[float]) -> pd.Series[float]:
    """Return metrics from the scales of ``scaled``."""
    return x.mask(metric == "auroc", expit(x)).mask(metric == "oe", np.exp(x.clip(upper=700)))
