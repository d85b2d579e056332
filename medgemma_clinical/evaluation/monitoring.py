"""Whether a model still holds after its go-live: metrics by period, their limits, and a rule.

Limits are made from the development cohort: outcomes of a period's own risks are drawn by the
calibration there, ``reference``, whose uncertainty is drawn, too, as are shifts of the log-odds by
which stable periods differ. Letters: n patients, R draws.
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
    ASKS_UNIT,
    MIN_MEASURED,
    RARE,
    compare_column,
    find_unit_change,
    unit_changes,
    usual_range,
)
from medgemma_clinical.evaluation.metrics import (
    CHUNK_CELLS,
    REPLICATES,
    Array,
    log_odds,
    of_labels,
)
from medgemma_clinical.evaluation.metrics_table import VALUE, bootstrap, with_interval
from medgemma_clinical.evaluation.tables import METRICS

PERIODS = {"week": ("W", 52), "month": ("M", 12), "quarter": ("Q", 4)}
"""Periods, by pandas' name, and how many a year has."""

MONITORED = "positives", "oe", "intercept", "slope", "auroc", "brier", "net_benefit"

LIMITED = ("oe", "intercept", "slope", "auroc", "brier")
RANKED = ("slope", "auroc")
"""Metrics with limits; of these, those that a period of few events does not have."""

LIMITS = ["limit_low", "limit_high"]
LINE = ["period", "site", "metric", *VALUE, *LIMITS]
PROBLEM = ["period", "name", "problem"]
CHANGES = {"refit": [("auroc", "low")], "recalibrate": [("oe", "low"), ("oe", "high")]}
"""Metrics and limits beyond which consecutive periods call for an action, after ``stop``."""

ROUNDING = 1e-6
"""Share of a value that is no distance: few events have few values, which limits often equal."""

MAX_NAMED = 3
"""Inputs of a verdict."""

YEARS = 2000
"""Simulated stable years."""


@dataclass(frozen=True)
class MonitorRule:
    """When a period is judged and what calls for an action; fixed before a model is used."""

    known: float = 0.9  # share of the outcomes from which on a period is judged
    consecutive: int = 2  # periods outside a limit, on the same side
    odds_ratio: float = 2.0  # which the CUSUM seeks, and its inverse
    period_sd: float = 0.2  # of the log-odds, between the periods of a stable year
    false_alarms: float = 0.05  # share of stable years with an alarm of O/E, AUROC or CUSUM
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
            "measured or changes its unit, whose periods are not judged. A period is judged once "
            f"{100 * self.known:g} % of its outcomes are known, and the last year counts. In at "
            f"most {100 * self.false_alarms:g} % of stable years O/E, AUROC or CUSUM alarm; "
            f"periods of such a year are assumed to differ by an SD of {self.period_sd:g} of the "
            "log-odds."
        )


RULE_BOUNDS = {
    "known": (0.5, 1),
    "consecutive": (1, 12),
    "odds_ratio": (1.1, 10),
    "period_sd": (0, 1),
    "false_alarms": (0.01, 0.5),
    "min_expected": (1, 1000),
}


class Levels(NamedTuple):
    """What makes alarms as rare as a rule says."""

    oe: float  # share of a stable period's values beyond each of both limits
    auroc: float
    cusum: float  # limit of the sum
    false_alarms: float  # share of the simulated years with an alarm

    @property
    def words(self) -> str:
        """The levels in sentences."""
        level = f"{100 * self.oe:.2g} % (O/E and others), {100 * self.auroc:.2g} %"
        return (
            f"Beyond each lie {level} (AUROC) of simulated stable periods; CUSUM limit "
            f"{self.cusum:.3g}. O/E, AUROC or CUSUM alarm in "
            f"{100 * self.false_alarms:.2g} % of simulated stable years"
        )


class Action(NamedTuple):
    """What a rule says is to be done, and why."""

    name: str  # stop, refit or recalibrate
    reason: str
    inputs: str = ""  # whether they changed in the same periods

    @property
    def words(self) -> str:
        """The action in one line, the inputs first."""
        return "; ".join(filter(None, [self.inputs, f"{self.name}: {self.reason}"]))


@dataclass(frozen=True)
class Monitored:
    """What is known of the patients by period; the lines of ``table`` without a site are of all."""

    table: pd.DataFrame  # ``LINE``
    counts: pd.DataFrame  # period, site, patients, known, is_complete
    sums: pd.DataFrame  # the CUSUM after each patient: date, period, signal, higher, lower
    levels: Levels
    problems: pd.DataFrame  # ``PROBLEM``, inputs that do not fit the training
    now: str  # the last period of patients enough to judge their inputs, or empty
    actions: list[Action]  # that apply, the first one goes first
    not_judged: str  # in no period, and which one would do

    @property
    def verdict(self) -> str:
        """The result in one line."""
        wait = f"waiting for outcomes of {', '.join(self.waiting)}" if self.waiting else ""
        if not self.actions and not self.counts["is_complete"].any():
            return "waiting for outcomes"
        words = [self.actions[0].words] if self.actions else ["no action", self.not_judged]
        return "; ".join(filter(None, [*words, wait]))

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
    found = {"positives": _share(positive, len(risk))}
    is_known = ~np.isnan(labels)
    labels, risk = labels[is_known], risk[is_known]
    if len(labels):
        found["oe"] = _share(int(labels.sum()), len(labels)) * len(labels) / risk.sum()
    table = pd.DataFrame.from_dict(found, orient="index", columns=VALUE)

    def statistic(draws: Array) -> dict[str, Array]:
        benefit = of_labels(labels, draws).net_benefit(risk, np.array([threshold]))[:, 0]
        return {**_values(labels, risk, draws), "net_benefit": benefit}

    if 0 < labels.sum() < len(labels):
        drawn = with_interval(*bootstrap(np.arange(len(labels)), seed, statistic))
        table = pd.concat([table, drawn])
    return table.reindex([*MONITORED])


def _share(count: int, total: int) -> Array:
    """Return a share and its interval. Source: Clopper and Pearson 1934."""
    interval = binomtest(count, total).proportion_ci()
    return np.array([count / total, interval.low, interval.high])


def _values(labels: Array, risk: Array, weights: Array) -> dict[str, Array]:
    known = of_labels(labels, weights)
    found = known.calibration(risk) | known.ranking(risk)
    return {name: found[name] for name in ("intercept", "slope", "auroc", "brier")}


def draw_calibrations(reference: Mapping[str, Any], size: int, rng: Generator) -> Array:
    """Draw intercepts and slopes (R, 2) that the development cohort leaves possible."""
    mean = [reference["shift"], reference["multiplier"]]
    options: Any = {"method": "eigh", "check_valid": "ignore"}
    return rng.multivariate_normal(mean, reference["covariance"], size, **options)


def draw_labels(odds: Array, calibrations: Array, period_sd: float, rng: Generator) -> Array:
    """Draw labels (R, n) of a period's log-odds (n,) by calibrations (R, 2) and its shift."""
    intercept, slope = calibrations.T[:, :, None]
    shifted = intercept + rng.normal(0, period_sd, intercept.shape) + slope * odds
    return (rng.random(shifted.shape) < expit(shifted)) * 1.0


def doubled(risk: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Return labels, risks and weights (R, 2n) in which each patient stands with either label."""
    return np.repeat([0.0, 1.0], len(risk)), np.tile(risk, 2), np.hstack([1 - labels, labels])


def period_limits(
    risk: Array, reference: Mapping[str, Any], levels: Levels, rule: MonitorRule, rng: Generator
) -> pd.DataFrame:
    """Return ``LIMITS`` by metric of patients with known outcomes, as in a stable period."""
    odds, calibrations, parts = log_odds(risk), draw_calibrations(reference, REPLICATES, rng), []
    for part in np.array_split(calibrations, math.ceil(2 * REPLICATES * len(risk) / CHUNK_CELLS)):
        labels = draw_labels(odds, part, rule.period_sd, rng)
        values = {"oe": labels.sum(axis=1) / risk.sum(), **_values(*doubled(risk, labels))}
        parts.append(pd.DataFrame(values))
    table = pd.concat(parts).replace([np.inf, -np.inf], np.nan)
    lines = {}
    for name, column in table.dropna(axis=1, thresh=REPLICATES // 2 + 1).items():
        level = levels.auroc if name == "auroc" else levels.oe
        high = column.quantile(1 - level, interpolation="higher")
        lines[name] = [column.quantile(level, interpolation="lower"), high]
    return pd.DataFrame.from_dict(lines, orient="index", columns=LIMITS)


def has_ranks(risk: Array, reference: Mapping[str, Any], rule: MonitorRule) -> bool:
    """Return whether enough events, and non-events, are expected for slope and AUROC."""
    expected = float(stable_risk(risk, reference).sum())
    return min(expected, len(risk) - expected) >= rule.min_expected


def stable_risk(risk: Array, reference: Mapping[str, Any]) -> Array:
    """Return risks (n,) as the development cohort calibrates them."""
    stable: Array = expit(reference["shift"] + reference["multiplier"] * log_odds(risk))
    return stable


# ------------------------------------------------------------------ CUSUM and false alarms


def cusum_steps(labels: Array, risk: Array, odds_ratio: float) -> Array:
    """Return what each patient adds to the sums for higher and for lower odds, (2, ..., n).

    ``labels`` (..., n); ``risk`` (..., n) where nothing has changed.
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
    """Choose levels by simulated stable years; each check has its share of the false alarms."""
    risks = rng.choice(risk, (per_year, size))
    ranked = np.array([has_ranks(of_period, reference, rule) for of_period in risks])
    calibrations = draw_calibrations(reference, YEARS, rng)
    oe, auroc = np.zeros((2, YEARS, per_year))
    highest = np.zeros(YEARS)
    for years in np.array_split(np.arange(YEARS), math.ceil(2 * YEARS * risks.size / CHUNK_CELLS)):
        drawn = [draw_labels(log_odds(x), calibrations[years], rule.period_sd, rng) for x in risks]
        labels = np.stack(drawn, axis=1)  # (years, periods, n)
        oe[years] = labels.sum(axis=2) / risks.sum(axis=1)
        for k in np.flatnonzero(ranked):
            case, risk, weights = doubled(risks[k], drawn[k])
            auroc[years, k] = of_labels(case, weights).ranking(risk)["auroc"]
        steps = cusum_steps(labels, stable_risk(risks, reference), rule.odds_ratio)
        sums = steps.reshape(2, len(years), -1).cumsum(axis=2)
        lowest = np.minimum(np.minimum.accumulate(sums, axis=2), 0)
        highest[years] = (sums - lowest).max(axis=(0, 2))
    below = np.where(ranked, _tails(np.where(np.isfinite(auroc), auroc, 1.0)), 1.0)
    sides = (_longest(_tails(sign * oe), rule.consecutive) for sign in (1, -1))
    # Level of a check at which a year would just alarm; the smaller, the rarer.
    years_of = [np.minimum(*sides), _longest(below, rule.consecutive), -highest]
    share = rule.false_alarms / (2 + ranked.any())
    levels = [
        x[x < np.quantile(x, share, method="higher")].max(initial=least)
        for x, least in zip(years_of, (0.0, 0.0, -np.inf), strict=True)
    ]
    alarms = np.any([x <= level for x, level in zip(years_of, levels, strict=True)], axis=0)
    return Levels(levels[0], levels[1], -levels[2], float(alarms.mean()))


def _tails(values: Array) -> Array:
    """Return the share of the years whose value of the same period is as low, (years, periods)."""
    ranks: Array = rankdata(values, method="max", axis=0)
    return ranks / len(values)


def _longest(tails: Array, consecutive: int) -> Array:
    """Return the lowest level that so many consecutive periods of a year reach, (years,)."""
    size = min(consecutive, tails.shape[1])
    lowest: Array = sliding_window_view(tails, size, axis=1).max(axis=2).min(axis=1)
    return lowest


# ------------------------------------------------------------------ inputs and actions


def compare_inputs(
    inputs: pd.DataFrame, periods: pd.Series[str], training: Mapping[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare last values (n, inputs), NaN where not measured, with those of training patients.

    Returns lines of ``Monitored.table``, the share measured and the median of each input by period,
    and ``Monitored.problems``.
    """
    entries = {name: x for kind in ("series", "static") for name, x in training[kind].items()}
    entries = {name: x for name, x in entries.items() if name in inputs}
    changes = dict[str, Any]()
    for name, entry in entries.items():
        of_all = find_unit_change(name, entry, inputs[name].to_numpy(float))
        changes[name] = unit_changes(name, entry, inputs[name], periods, of_all)
    lines, problems = [], []
    for period, part in inputs.groupby(periods):
        for name, entry in entries.items():
            column = part[name].to_numpy(float)
            values, share = column[~np.isnan(column)], entry["measured"]
            measured = *_share(len(values), len(column)), share / RARE, min(1, share * RARE)
            lines.append((period, "", f"measured: {name}", *measured))
            if len(values):
                median = float(np.median(values)), np.nan, np.nan, *usual_range(entry)
                lines.append((period, "", f"median: {name}", *median))
            texts = compare_column(name, entry, column, changes[name].get(period))
            problems += [(period, name, text) for text in texts]
    return pd.DataFrame(lines, columns=LINE), pd.DataFrame(problems, columns=PROBLEM)


def outside(lines: Any, side: str) -> Any:
    """Return which values lie beyond their limit, ``low`` or ``high``; on it is within."""
    distance = lines.limit_low - lines.value if side == "low" else lines.value - lines.limit_high
    return distance > ROUNDING * abs(lines.value)


def _runs_outside(
    lines: pd.DataFrame, metric: str, side: str, consecutive: int
) -> list[tuple[str, list[str]]]:
    """Return runs of so many periods beyond a limit of a metric, in words, and the periods."""
    lines, limit = lines[lines["metric"] == metric], f"limit_{side}"
    beyond = outside(lines, side)
    (title, form, _), where = METRICS[metric], {"low": "below", "high": "above"}[side]
    runs = []
    for _, run in lines[beyond].groupby((~beyond).cumsum()[beyond]):
        if len(run) >= consecutive:
            names = run["period"].tolist()
            value, ends = (
                _span([f"{x:{form}}" for x in sorted(run[name])]) for name in ("value", limit)
            )
            words = f"{title} {where} its limit in {_span(names)}: {value} (limit {ends})"
            runs.append((words, names))
    return runs


def _span(texts: Sequence[str]) -> str:
    """Return the first and the last of some texts."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _named(problems: pd.DataFrame) -> str:
    """Return the first inputs of ``PROBLEM`` in words."""
    texts = [f"{name} in {period}: {text}" for period, name, text in problems.to_numpy()]
    if len(texts) > MAX_NAMED:
        texts = [*texts[:MAX_NAMED], f"{len(texts) - MAX_NAMED} more"]
    return "; ".join(texts)


def _inputs_words(problems: pd.DataFrame, checked: Sequence[str], periods: Sequence[str]) -> str:
    """Return whether inputs changed in some periods; only those of ``checked`` tell."""
    changed = problems[problems["period"].isin(periods)].drop_duplicates("name")
    if len(changed):
        return f"changed inputs: {_named(changed)}"
    found = "inputs fit the training data" if {*periods} <= {*checked} else "inputs not checked"
    return f"{found} in {_span(sorted(periods))}"


def _longer(
    scored: pd.DataFrame, period: str, reference: Mapping[str, Any], rule: MonitorRule
) -> str:
    """Return the shortest longer period of which some has events enough, in words."""
    names = [*PERIODS]
    for name in names[names.index(period) + 1 :]:
        risks = scored["risk"].groupby(period_names(scored["date"], name))
        if any(has_ranks(risk.to_numpy(float), reference, rule) for _, risk in risks):
            return f"take --period {name}"
    return "too few events in any period"


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


def _actions(
    of_judged: pd.DataFrame,  # lines of the last year
    signals: pd.DataFrame,  # of its CUSUM
    problems: pd.DataFrame,
    checked: Sequence[str],  # periods whose inputs are compared, of which the last one may stop
    rule: MonitorRule,
) -> list[Action]:
    """Return the actions that apply."""
    now = problems[problems["period"].isin(checked[-1:])]
    # Outcomes of periods of another unit tell of the unit, not of the model.
    wrong = problems[asks_unit(problems) & problems["period"].isin(of_judged["period"])]
    periods = [*dict.fromkeys(wrong["period"])]
    of_judged = of_judged.assign(value=of_judged["value"].mask(of_judged["period"].isin(periods)))
    reason = _named(now if len(now) else wrong.drop_duplicates("name"))
    reason += f"; not judged: {', '.join(periods)}" if periods else ""
    actions = [Action("stop" if len(now) else "check the unit", reason)] if reason else []
    for name, changes in CHANGES.items():
        found = [run for x in changes for run in _runs_outside(of_judged, *x, rule.consecutive)]
        if name == "recalibrate":
            for x in signals.drop_duplicates("signal").itertuples():
                when = f"first in {x.period} ({x.date:%Y-%m-%d})"
                found.append((f"the CUSUM for {x.signal} odds signals {when}", [str(x.period)]))
        if found:
            inputs = _inputs_words(problems, checked, [x for _, names in found for x in names])
            actions.append(Action(name, "; ".join(words for words, _ in found), inputs))
    return actions


def asks_unit(problems: pd.DataFrame) -> pd.Series[bool]:
    """Return which of ``PROBLEM`` are of units."""
    return problems["problem"].astype(str).str.endswith(ASKS_UNIT)


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
    risk = scored["risk"].to_numpy(float)
    levels = alarm_levels(risk, size, per_year, reference, rule, rng)
    tables, counts = [], []
    for site, of_site in [("", scored), *(scored.groupby("site") if "site" in scored else ())]:
        for name, part in of_site.groupby("period"):
            measured = _with_limits(part, threshold, seed, reference, levels, rule, rng)
            tables.append(measured.assign(period=name, site=site))
            is_complete = part["label"].notna().mean() >= rule.known
            count = {"period": name, "site": site, **_counts(part), "is_complete": is_complete}
            counts.append(count)
    problems, checked = pd.DataFrame(columns=PROBLEM), []
    if inputs is not None:
        lines, problems = compare_inputs(inputs.loc[rows.index], rows["period"], training)
        tables.append(lines)
        sizes = rows["period"].value_counts(sort=False)
        checked = [*sizes[sizes >= MIN_MEASURED].index]
    table = pd.concat(tables).reindex(columns=LINE).replace([np.inf, -np.inf], np.nan)
    of_parts = pd.DataFrame(counts)
    of_all = of_parts[of_parts["site"] == ""].set_index("period")["is_complete"]
    complete = [*of_all[of_all].index]
    # Not to the first period that waits alone: some outcomes never come.
    wrong_unit = {*problems.loc[asks_unit(problems), "period"]}
    clean = [name for name in complete if name not in wrong_unit]
    sums = _cusum_of(scored, clean, reference, rule, levels.cusum)
    last_year = complete[-per_year:]
    of_judged = table[(table["site"] == "") & table["period"].isin(last_year)]
    signals = sums[sums["period"].isin(last_year) & (sums["signal"] != "")]
    actions = _actions(of_judged, signals, problems, checked, rule)
    not_judged = [] if checked else ["inputs not checked"]
    if _lacks_ranks(of_judged, rule):
        longer = _longer(scored, period, reference, rule)
        not_judged.insert(0, f"slope and AUROC not judged: {longer}")
    now = checked[-1] if checked else ""
    return Monitored(table, of_parts, sums, levels, problems, now, actions, "; ".join(not_judged))


def _with_limits(
    rows: pd.DataFrame,  # of a period
    threshold: float,
    seed: int,
    reference: Mapping[str, Any],
    levels: Levels,
    rule: MonitorRule,
    rng: Generator,
) -> pd.DataFrame:
    """Return ``measure`` with the counts and limits of a period, a row a metric."""
    labels, risk = rows["label"].to_numpy(float), rows["risk"].to_numpy(float)
    of_known = risk[~np.isnan(labels)]
    table = measure(labels, risk, threshold, seed)
    if len(of_known):
        table = table.join(period_limits(of_known, reference, levels, rule, rng))
    if not has_ranks(of_known, reference, rule):
        table.loc[[*RANKED]] = np.nan
    for name, number in _counts(rows).items():
        table.loc[name, "value"] = number
    return table.rename_axis("metric").reset_index()


def _counts(rows: pd.DataFrame) -> dict[str, int]:
    """Return the counts of the rows of a period."""
    return {"patients": len(rows), "known": int(rows["label"].notna().sum())}


def _lacks_ranks(lines: pd.DataFrame, rule: MonitorRule) -> bool:
    """Return whether an action would need the AUROC of periods that have none."""
    lacks = lines.loc[lines["metric"] == "auroc", "value"].isna().to_numpy().astype(float)
    return bool(len(lacks) and _longest(lacks[None], rule.consecutive)[0])
