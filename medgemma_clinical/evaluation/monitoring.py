"""Whether a model still holds after its go-live: metrics by period, their limits, and a rule.

Limits are made from the development cohort: outcomes of a period's own risks are drawn by the
calibration there, ``reference``, whose uncertainty is drawn, too. Letters: n patients, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binomtest, rankdata

from medgemma_clinical.data.distributions import (
    MIN_MEASURED,
    RARE,
    compare_column,
    usual_range,
)
from medgemma_clinical.evaluation.metrics import (
    CHUNK_CELLS,
    REPLICATES,
    Array,
    calibration,
    log_odds,
    metrics,
    net_benefit,
)
from medgemma_clinical.evaluation.metrics_table import VALUE, bootstrap, with_interval

PERIODS = {"week": ("W", 52), "month": ("M", 12), "quarter": ("Q", 4)}
"""Periods, by pandas' name, and how many a year has."""

METRICS = {
    "positives": ("Positives per 100", ".1f"),
    "oe": ("O/E", ".2f"),
    "intercept": ("Intercept", "+.2f"),
    "slope": ("Slope", ".2f"),
    "auroc": ("AUROC", ".3f"),
    "brier": ("Brier score", ".4f"),
    "net_benefit": ("Net benefit", ".4f"),
}
"""Name and format of each metric; the intercept is calibration in the large."""

LIMITED = ("oe", "intercept", "slope", "auroc", "brier")
RANKED = ("slope", "auroc")
"""Metrics with limits; of these, those that a period of few events does not have."""

LIMITS = ["limit_low", "limit_high"]
LINE = ["period", "site", "metric", *VALUE, *LIMITS]
PROBLEM = ["period", "name", "problem"]
ARMS = ("stop", "refit", "recalibrate")
"""What a rule may say, what goes first."""

ROUNDING = 1e-6
"""Share of a value that is no distance: few events have few values, which limits often equal."""

MAX_NAMED = 3
"""Inputs of a verdict."""

YEARS = 2000
"""Simulated stable years."""


@dataclass(frozen=True)
class MonitorRule:
    """When a period is judged and when an arm applies; fixed before a model is used."""

    known: float = 0.9  # share of the outcomes from which on a period is judged
    consecutive: int = 2  # periods outside a limit, on the same side
    odds_ratio: float = 2.0  # which the CUSUM seeks, and its inverse
    false_alarms: float = 0.05  # share of stable years with an alarm of any arm
    min_expected: int = 10  # events, and non-events, of a period that has slope and AUROC

    @classmethod
    def checked(cls, content: Mapping[str, Any]) -> Self:
        """Return the rule of a file's keys; ValueError names what is wrong."""
        kinds = {name: type(default) for name, default in asdict(cls()).items()}
        for name, value in content.items():
            if name not in kinds:
                raise ValueError(f"unknown key {name}: the keys are {', '.join(kinds)}")
            low, high = RULE_BOUNDS[name]
            is_number = type(value) is int or type(value) is kinds[name]
            if not (is_number and low <= value <= high):
                noun = "whole number" if kinds[name] is int else "number"
                raise ValueError(f"{name}: give a {noun} from {low:g} to {high:g}")
        return cls(**content)

    @property
    def words(self) -> str:
        """The rule in sentences."""
        return (
            "Recalibrate when observed divided by expected events (O/E) lies outside its limits, "
            f"on the same side, in {self.consecutive} consecutive periods, or when a CUSUM of odds "
            f"{self.odds_ratio:g} times as high or low signals; refit when the AUROC lies below "
            f"its limit in {self.consecutive} consecutive periods; stop when an input is no longer "
            "measured or changes its unit. A period is judged once "
            f"{100 * self.known:g} % of its outcomes are known, the last year counts, and in a "
            f"stable year the arms together alarm in at most {100 * self.false_alarms:g} %."
        )


RULE_BOUNDS = {
    "known": (0.5, 1),
    "consecutive": (1, 12),
    "odds_ratio": (1.1, 10),
    "false_alarms": (0.01, 0.5),
    "min_expected": (1, 1000),
}


class Levels(NamedTuple):
    """What makes alarms as rare as a rule says."""

    oe: float  # share of a stable period's values beyond each of both limits
    auroc: float
    cusum: float  # limit of the sum
    false_alarms: float  # share of the simulated years with an alarm


class Arm(NamedTuple):
    """What a rule says is to be done, and why."""

    name: str  # stop, refit or recalibrate
    reason: str


@dataclass(frozen=True)
class Monitored:
    """What is known of the patients by period; the lines of ``table`` without a site are of all."""

    table: pd.DataFrame  # ``LINE``
    counts: pd.DataFrame  # period, site, patients, known, is_complete
    sums: pd.DataFrame  # the CUSUM after each patient: date, period, signal, higher, lower
    levels: Levels
    problems: pd.DataFrame  # ``PROBLEM``, inputs that do not fit the training
    now: str  # the last period of patients enough to judge their inputs, or empty
    arms: list[Arm]  # that apply, the first one goes first

    @property
    def verdict(self) -> str:
        """The result in one line."""
        waiting = self.waiting
        wait = f"waiting for outcomes of {', '.join(waiting)}" if waiting else ""
        if not self.arms and not self.counts["is_complete"].any():
            return "waiting for outcomes"
        found = [f"{arm.name}: {arm.reason}" for arm in self.arms[:1]] or ["no action"]
        return "; ".join(filter(None, [*found, wait]))

    @property
    def waiting(self) -> list[str]:
        """Periods of which too few outcomes are known."""
        of_all = self.counts[self.counts["site"] == ""]
        return of_all.loc[~of_all["is_complete"], "period"].tolist()


# ------------------------------------------------------------------ metrics and limits


def period_names(dates: pd.Series[Any], period: str) -> pd.Series[str]:
    """Return the period of each date as text that sorts: a week by its Monday."""
    periods = dates.dt.tz_localize(None).dt.to_period(PERIODS[period][0])
    return (
        periods.dt.start_time.dt.strftime("%Y-%m-%d") if period == "week" else periods.astype(str)
    )


def measure(labels: Array, risk: Array, threshold: float, seed: int) -> pd.DataFrame:
    """Return ``VALUE`` by metric of n patients, whose labels may be unknown."""
    positive = int((risk >= threshold).sum())
    found = {"positives": 100 * _share(positive, len(risk))}
    is_known = ~np.isnan(labels)
    labels, risk = labels[is_known], risk[is_known]
    if len(labels):
        found["oe"] = _share(int(labels.sum()), len(labels)) * len(labels) / risk.sum()
    table = pd.DataFrame.from_dict(found, orient="index", columns=VALUE)

    def statistic(weights: Array) -> dict[str, Array]:
        benefit = net_benefit(labels, risk, np.array([threshold]), weights)[:, 0]
        return {**_values(labels, risk, weights), "net_benefit": benefit}

    if 0 < labels.sum() < len(labels):
        drawn = with_interval(*bootstrap(labels, np.arange(len(labels)), seed, statistic))
        table = pd.concat([table, drawn])
    return table.reindex([*METRICS])


def _share(count: int, total: int) -> Array:
    """Return a share and its interval. Source: Clopper and Pearson 1934."""
    interval = binomtest(count, total).proportion_ci()
    return np.array([count / total, interval.low, interval.high])


def _values(labels: Array, risk: Array, weights: Array) -> dict[str, Array]:
    ranks, fit = metrics(labels, risk, weights), calibration(labels, risk, weights)
    return {
        "intercept": fit["calibration_in_the_large"],
        "slope": fit["calibration_slope"],
        "auroc": ranks["auroc"],
        "brier": ranks["brier"],
    }


def draw_calibrations(reference: Mapping[str, Any], size: int, rng: Generator) -> Array:
    """Draw intercepts and slopes (R, 2) that the development cohort leaves possible."""
    mean = [reference["intercept"], reference["slope"]]
    options: Any = {"method": "eigh", "check_valid": "ignore"}
    return rng.multivariate_normal(mean, reference["covariance"], size, **options)


def draw_labels(odds: Array, calibrations: Array, rng: Generator) -> Array:
    """Draw labels (R, n) of log-odds (n,) by calibrations (R, 2)."""
    intercept, slope = calibrations.T[:, :, None]
    return (rng.random((len(calibrations), len(odds))) < expit(intercept + slope * odds)) * 1.0


def doubled(risk: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Return labels, risks and weights (R, 2n) in which each patient stands with either label."""
    return np.repeat([0.0, 1.0], len(risk)), np.tile(risk, 2), np.hstack([1 - labels, labels])


def period_limits(
    risk: Array, reference: Mapping[str, Any], levels: Levels, rng: Generator
) -> pd.DataFrame:
    """Return ``LIMITS`` by metric of patients with known outcomes, as in a stable period."""
    found: dict[str, list[Array]] = {name: [] for name in LIMITED}
    odds, calibrations = log_odds(risk), draw_calibrations(reference, REPLICATES, rng)
    for part in np.array_split(calibrations, math.ceil(2 * REPLICATES * len(risk) / CHUNK_CELLS)):
        labels = draw_labels(odds, part, rng)
        values = {"oe": labels.sum(axis=1) / risk.sum(), **_values(*doubled(risk, labels))}
        for name in LIMITED:
            found[name].append(values[name])
    lines = {}
    for name, parts in found.items():
        values_of_one = np.concatenate(parts)
        values_of_one = values_of_one[np.isfinite(values_of_one)]
        level = levels.auroc if name == "auroc" else levels.oe
        if len(values_of_one) > REPLICATES / 2:
            low = np.quantile(values_of_one, level, method="lower")
            lines[name] = [low, np.quantile(values_of_one, 1 - level, method="higher")]
    return pd.DataFrame.from_dict(lines, orient="index", columns=LIMITS)


def has_ranks(risk: Array, reference: Mapping[str, Any], rule: MonitorRule) -> bool:
    """Return whether enough events, and non-events, are expected for slope and AUROC."""
    expected = float(stable_risk(risk, reference).sum())
    return min(expected, len(risk) - expected) >= rule.min_expected


def stable_risk(risk: Array, reference: Mapping[str, Any]) -> Array:
    """Return risks (n,) as the development cohort calibrates them."""
    stable: Array = expit(reference["intercept"] + reference["slope"] * log_odds(risk))
    return stable


# ------------------------------------------------------------------ CUSUM and false alarms


def cusum_steps(labels: Array, risk: Array, odds_ratio: float) -> Array:
    """Return what each patient adds to the sums for higher and for lower odds, (2, ..., n).

    ``labels`` (..., n); ``risk`` (n,) where nothing has changed.
    Source: Steiner et al. 2000, "Monitoring surgical performance using risk-adjusted cumulative
    sum charts".
    """
    ratios = [odds_ratio, 1 / odds_ratio]
    return np.stack([labels * np.log(r) - np.log(1 - risk + r * risk) for r in ratios])


def cusum(steps: Array, limit: float) -> tuple[Array, NDArray[np.int64]]:
    """Return max(0, sum) after each of n patients and where it signals, after which it is 0."""
    sums, signals, begin = np.zeros(len(steps)), [], 0
    while begin < len(steps):
        total = np.cumsum(steps[begin:])
        sums[begin:] = total - np.minimum(np.minimum.accumulate(total), 0)
        above = np.flatnonzero(sums[begin:] >= limit)
        if not len(above):
            break
        signals.append(begin + above[0])
        begin = signals[-1] + 1
    return sums, np.array(signals, dtype=np.int64)


def alarm_levels(
    risk: Array,  # of all patients, from which years are drawn
    size: int,  # patients of a typical period
    per_year: int,
    reference: Mapping[str, Any],
    rule: MonitorRule,
    rng: Generator,
) -> Levels:
    """Choose levels by simulated stable years, in which each arm alarms about equally often."""
    risks = rng.choice(risk, (per_year, size))
    calibrations, ranked = draw_calibrations(reference, YEARS, rng), np.zeros(per_year, dtype=bool)
    oe, auroc = np.zeros((2, YEARS, per_year))
    highest = np.zeros(YEARS)
    for years in np.array_split(np.arange(YEARS), math.ceil(2 * YEARS * size / CHUNK_CELLS)):
        total, lowest = np.zeros((2, 2, len(years)))  # of the sums for higher and lower odds
        for k, of_period in enumerate(risks):
            labels = draw_labels(log_odds(of_period), calibrations[years], rng)
            oe[years, k] = labels.sum(axis=1) / of_period.sum()
            if has_ranks(of_period, reference, rule):
                ranked[k] = True
                auroc[years, k] = metrics(*doubled(of_period, labels))["auroc"]
            steps = cusum_steps(labels, stable_risk(of_period, reference), rule.odds_ratio)
            sums = total[:, :, None] + steps.cumsum(axis=2)
            low = np.minimum(lowest[:, :, None], np.minimum.accumulate(sums, axis=2))
            highest[years] = np.maximum(highest[years], (sums - low).max(axis=(0, 2)))
            total, lowest = sums[:, :, -1], low[:, :, -1]
    # Level of an arm at which a year would just alarm; the smaller, the rarer.
    below = np.where(ranked, _tails(np.where(np.isfinite(auroc), auroc, 1.0)), 1.0)
    levels = [
        np.minimum(*(_longest(_tails(sign * oe), rule.consecutive) for sign in (1, -1))),
        _longest(below, rule.consecutive),
        -highest,
    ]
    rarity = np.stack([rankdata(x, method="max") for x in levels]) / YEARS
    of_years = np.sort(rarity.min(axis=0))
    share = of_years[of_years < of_years[int(rule.false_alarms * YEARS)]].max(initial=0.0)
    rarest = zip(levels, rarity, (0.0, 0.0, -np.inf), strict=True)
    oe_level, auroc_level, negative = (x[r <= share].max(initial=least) for x, r, least in rarest)
    return Levels(oe_level, auroc_level, -negative, float((of_years <= share).mean()))


def _tails(values: Array) -> Array:
    """Return the share of the years whose value of the same period is as low, (years, periods)."""
    ranks: Array = rankdata(values, method="max", axis=0)
    return ranks / len(values)


def _longest(tails: Array, consecutive: int) -> Array:
    """Return the lowest level that so many consecutive periods of a year reach, (years,)."""
    size = min(consecutive, tails.shape[1])
    lowest: Array = sliding_window_view(tails, size, axis=1).max(axis=2).min(axis=1)
    return lowest


# ------------------------------------------------------------------ inputs and arms


def compare_inputs(
    inputs: pd.DataFrame, periods: pd.Series[str], training: Mapping[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare last values (n, inputs), NaN where not measured, with those of training patients.

    Returns lines of ``Monitored.table``, the share measured and the median of each input by period,
    and ``Monitored.problems``.
    """
    entries = {name: x for kind in ("series", "static") for name, x in training[kind].items()}
    lines, problems = [], []
    for period, part in inputs.groupby(periods):
        for name, entry in entries.items():
            if name not in part:
                continue
            column = part[name].to_numpy(float)
            values, share = column[~np.isnan(column)], entry["measured"]
            measured = *_share(len(values), len(column)), share / RARE, min(1, share * RARE)
            lines.append((period, "", f"measured: {name}", *measured))
            if len(values):
                median = float(np.median(values)), np.nan, np.nan, *usual_range(entry)
                lines.append((period, "", f"median: {name}", *median))
            problems += [(period, name, text) for text in compare_column(name, entry, column)]
    return pd.DataFrame(lines, columns=LINE), pd.DataFrame(problems, columns=PROBLEM)


def outside(lines: Any, side: str) -> Any:
    """Return which values lie beyond their limit, ``low`` or ``high``; on it is within."""
    distance = lines.limit_low - lines.value if side == "low" else lines.value - lines.limit_high
    return distance > ROUNDING * abs(lines.value)


def _run_outside(lines: pd.DataFrame, sides: Sequence[str], consecutive: int) -> str:
    """Return the last periods in a row, lines of one metric, beyond a limit, in words."""
    title, form = METRICS[lines["metric"].iloc[0]] if len(lines) else ("", "")
    for end in range(len(lines), consecutive - 1, -1):
        run = lines.iloc[end - consecutive : end]
        if any(outside(run, side).all() for side in sides):
            texts = [
                f"{x.value:{form}} in {x.period} (limits {x.limit_low:{form}} to "
                f"{x.limit_high:{form}})"
                for x in run.itertuples()
            ]
            return f"{title} {' and '.join(texts)}"
    return ""


def _cusum_of(
    scored: pd.DataFrame,
    periods: Sequence[str],
    reference: Mapping[str, Any],
    rule: MonitorRule,
    limit: float,
) -> pd.DataFrame:
    """Return ``Monitored.sums`` of the patients of some periods."""
    rows = scored[scored["period"].isin(periods) & scored["label"].notna()]
    risk = stable_risk(rows["risk"].to_numpy(float), reference)
    steps = cusum_steps(rows["label"].to_numpy(float), risk, rule.odds_ratio)
    sums = rows[["date", "period"]].assign(signal="")
    for name, of_side in zip(("higher", "lower"), steps, strict=True):
        sums[name], signals = cusum(of_side, limit)
        sums.loc[sums.index[signals], "signal"] = name
    return sums


def _arms(
    table: pd.DataFrame,
    sums: pd.DataFrame,
    problems: pd.DataFrame,
    complete: Sequence[str],
    rule: MonitorRule,
) -> list[Arm]:
    """Return the arms that apply; ``complete``: periods of the last year, ``problems`` of now."""
    of_all = table[(table["site"] == "") & table["period"].isin(complete)]
    lines = dict(list(of_all.groupby("metric")))
    none = of_all.iloc[:0]
    texts = [f"{name} in {period}: {text}" for period, name, text in problems.to_numpy()]
    texts[MAX_NAMED:] = [f"{len(texts) - MAX_NAMED} more"] * (len(texts) > MAX_NAMED)
    refit = _run_outside(lines.get("auroc", none), ["low"], rule.consecutive)
    recalibrate = [_run_outside(lines.get("oe", none), ["low", "high"], rule.consecutive)]
    for x in sums[sums["period"].isin(complete) & (sums["signal"] != "")].tail(1).itertuples():
        recalibrate.append(f"the CUSUM for {x.signal} odds signals on {x.date:%Y-%m-%d}")
    reasons = ("; ".join(filter(None, parts)) for parts in (texts, [refit], recalibrate))
    return [Arm(name, reason) for name, reason in zip(ARMS, reasons, strict=True) if reason]


# ------------------------------------------------------------------ all together


def monitor(
    rows: pd.DataFrame,  # date, risk (NaN without a score), label (NaN not known yet), maybe site
    inputs: pd.DataFrame | None,  # last values of the same rows
    *,
    threshold: float,
    reference: Mapping[str, Any],
    training: Mapping[str, Any],  # distributions of the last values of the training patients
    rule: MonitorRule,
    period: str,  # of ``PERIODS``
    seed: int,
) -> Monitored:
    """Judge a model, some of whose rows have a score, by the outcomes of its patients."""
    rng, per_year = np.random.default_rng(seed), PERIODS[period][1]
    rows = rows.sort_values("date", kind="stable")
    rows["period"] = period_names(rows["date"], period)
    scored = rows[rows["risk"].notna()]
    size = int(scored["period"].value_counts().median())
    all_risks = scored["risk"].to_numpy(float)
    levels = alarm_levels(all_risks, size, per_year, reference, rule, rng)
    tables, counts = [], []
    for site, of_site in [("", scored), *(scored.groupby("site") if "site" in scored else ())]:
        for name, part in of_site.groupby("period"):
            labels, risk = part["label"].to_numpy(float), part["risk"].to_numpy(float)
            known = ~np.isnan(labels)
            table = measure(labels, risk, threshold, seed)
            if known.any():
                table = table.join(period_limits(risk[known], reference, levels, rng))
            if not has_ranks(risk[known], reference, rule):
                table.loc[[*RANKED]] = np.nan
            about = {"period": name, "site": site}
            numbers = {"patients": len(part), "known": int(known.sum())}
            for counted, number in numbers.items():
                table.loc[counted, "value"] = number
            tables.append(table.rename_axis("metric").reset_index().assign(**about))
            counts.append({**about, **numbers, "is_complete": known.mean() >= rule.known})
    problems = pd.DataFrame(columns=PROBLEM)
    if inputs is not None:
        lines, problems = compare_inputs(inputs.loc[rows.index], rows["period"], training)
        tables.append(lines)
    table = pd.concat(tables).reindex(columns=LINE).replace([np.inf, -np.inf], np.nan)
    count = pd.DataFrame(counts)
    of_all = count[count["site"] == ""].set_index("period")["is_complete"]
    # Not to the first period that waits alone: some outcomes never come.
    sums = _cusum_of(scored, [*of_all[of_all].index], reference, rule, levels.cusum)
    sizes = rows["period"].value_counts(sort=False)
    now = max(sizes[sizes >= MIN_MEASURED].index, default="")
    complete = [*of_all[of_all].index[-per_year:]]
    arms = _arms(table, sums, problems[problems["period"] == now], complete, rule)
    return Monitored(table, count, sums, levels, problems, now, arms)
