"""Models side by side on the same test patients, of one split or of several."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import is_small, rarer_patients
from medgemma_clinical.evaluation.baselines import COMBINED, describe_baselines, richest_blend
from medgemma_clinical.evaluation.bootstrap import (
    NO_VALUE,
    Estimate,
    Figures,
    bootstrap,
    estimate,
)
from medgemma_clinical.evaluation.cohort import DECIMALS, SAME_RISK, UNKNOWN, hides_accuracy
from medgemma_clinical.evaluation.judgement.sentences import Finding, Judgement
from medgemma_clinical.evaluation.judgement.verdict import (
    FEW,
    SAME,
    Verdict,
    group_by_verdict,
    judge_interval,
)
from medgemma_clinical.evaluation.metrics import METRICS, weighted_metrics
from medgemma_clinical.evaluation.plots import plot_forest, plot_style, to_image
from medgemma_clinical.evaluation.report import INTERVALS, render
from medgemma_clinical.evaluation.report_tables import counts_text
from medgemma_clinical.files import atomic, move_aside, write_text
from medgemma_clinical.provenance import code_hash

logger = logging.getLogger(__name__)

TESTED = ["id", "patient", "label"]
"""Columns of a table of test predictions that say what was tested; each other one is a model."""

RUN_FIGURES = {
    "seconds_an_epoch": ("Seconds an epoch", ".3g", "seconds an epoch"),
    "tokens": ("Tokens", ".0f", "tokens"),
    "memory_mib": ("Memory (MiB)", ",.0f", "MiB of memory"),
    "residual_weight": ("Weight", ".2g", ""),
}
"""Cost of a model, and weight of its language model, where they are known: title, form, and the
unit in a sentence; empty for what is no cost."""

DIFFERENCE, BESIDE = "Minus reference [95 %]", "Verdict"
"""Columns of the paired difference of AUROC and of the verdict on it."""

MEANINGS = {
    "Test AUROC [95 %]": (
        "how often a row with the event has a higher risk than one without; 0.5 is chance, 1 is "
        "perfect"
    ),
    "SD of AUROC": "spread of the AUROC over the splits (standard deviation); so for AUPRC, Brier",
    DIFFERENCE: "AUROC of the model of the row minus that of the reference, patient by patient",
    BESIDE: "on the model of the row beside the reference, by this difference; a dash for none",
    "Seconds an epoch": "of training for one pass over the training part, with its validation",
    "Tokens": "that the language model reads of a patient, on average",
    "Memory (MiB)": "peak of the GPU, without one that of the process",
    "Weight": "of the language model beside the stage 1 that it builds on; 0 adds nothing to that",
    "AUPRC": "share of alarms that are right, averaged over the sensitivities; higher is better",
    "Brier": "mean squared distance of risk and outcome; lower is better",
}
"""What the columns of ``comparison_table`` mean, for its page."""

Results = dict[str, dict[str, Any]]
"""By model: n, events, rarer_patients, the metrics as ``{"value", "low", "high"}``,
same (whether its risks are the reference's, row by row), minus_reference (paired differences); of
the combined model also minus_blend, see ``Cohort.combined``; unjudged, where it has no verdict."""


def compare_models(
    tables: Sequence[pd.DataFrame], reference: str, seed: int, fewest: int
) -> Results:
    """Score the same models on one test part, or on those of several splits.

    Of several splits each figure is the mean, and its interval that of the mean: patients are drawn
    once for all splits, each with all the rows that any test part holds of the patient.

    Args:
        tables: one a split: the columns ``TESTED``, then the probabilities of each model.
        reference: the model that the others are compared with, paired.
        seed: of the bootstrap.
        fewest: patients of the smallest cell that is shown.

    Returns:
        See ``Results``. Figures that are not shown are None; over several splits each metric also
        has its values in ``splits`` and their standard deviation ``sd``.
    """
    joined = pd.concat(tables, keys=range(len(tables)))
    labels = joined["label"].to_numpy(dtype=float)
    groups = joined["patient"].to_numpy(dtype=np.str_)
    split = joined.index.get_level_values(0).to_numpy()
    parts = [split == part for part in range(len(tables))]
    risks = {str(model): joined[model].to_numpy() for model in joined.columns.drop(TESTED)}
    same = _same_risks(risks, reference)

    def by_split(weights: NDArray[np.float64]) -> Figures:
        """Return (splits, R) values of each model and metric."""
        figures: Figures = {}
        for model, risk in risks.items():
            scores = [weighted_metrics(labels[p], risk[p], weights[:, p]) for p in parts]
            figures |= {(model, m): np.stack([each[m] for each in scores]) for m in METRICS}
        return figures

    def means(weights: NDArray[np.float64]) -> Figures:
        return {name: values.mean(axis=0) for name, values in by_split(weights).items()}

    if any(is_small(rarer_patients(labels[p], groups[p]), fewest) for p in parts):
        return _unknown_results(same, len(labels), several=len(tables) > 1)
    draws = bootstrap(labels, groups, seed, means, split)
    values = by_split(np.ones((1, len(labels))))
    unshown = _hidden_accuracies(risks, labels, groups, parts, fewest)
    digits = DECIMALS if fewest else None
    counts = {
        "n": len(labels),
        "events": int(labels.sum()),
        "rarer_patients": rarer_patients(labels, groups),
    }
    minus = partial(_differences, values, draws, unshown, digits)
    results: Results = {}
    for model in risks:
        scores = _scores(values, draws, digits, model)
        if model in unshown:
            scores["accuracy"] = UNKNOWN.to_json()
        paired = {"same": same[model], "minus_reference": minus(model, reference)}
        results[model] = {**counts, **scores, **paired}
    blend = richest_blend(risks)
    if COMBINED in risks and blend:
        results[COMBINED]["minus_blend"] = minus(COMBINED, blend)
    return results


def _scores(
    values: Figures, draws: Figures, digits: int | None, model: str
) -> dict[str, dict[str, Any]]:
    """Return the metrics of a model, means over the splits; of several also values and spread."""
    scores: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        here = values[model, metric]
        scores[metric] = dict(estimate(here.mean(), draws[model, metric]).to_json(digits))
        if len(here) > 1:
            scores[metric]["splits"] = [Estimate(x).to_json(digits)["value"] for x in here[:, 0]]
            scores[metric]["sd"] = Estimate(here.std(ddof=1)).to_json(digits)["value"]
    return scores


def _differences(
    values: Figures,
    draws: Figures,
    unshown: set[str],
    digits: int | None,
    model: str,
    other: str,
) -> dict[str, Any]:
    """Return the paired differences of two models, means over the splits."""
    paired = {}
    for metric in METRICS:
        one, two = (model, metric), (other, metric)
        difference = (values[one] - values[two]).mean()
        paired[metric] = estimate(difference, draws[one] - draws[two]).to_json(digits)
    if {model, other} & unshown:
        paired["accuracy"] = UNKNOWN.to_json()
    return paired


def _hidden_accuracies(
    risks: dict[str, NDArray[np.float64]],
    labels: NDArray[np.float64],
    groups: NDArray[np.str_],
    parts: Sequence[NDArray[np.bool_]],
    fewest: int,
) -> set[str]:
    """Return the models whose accuracy is hidden in some part, and so in the mean over all."""
    return {
        model
        for model, risk in risks.items()
        if any(hides_accuracy(labels[p], risk[p], groups[p], fewest) for p in parts)
    }


def _same_risks(risks: dict[str, NDArray[np.float64]], reference: str) -> dict[str, bool]:
    """Return whether each model gives each row the risk of the reference."""
    return {
        model: np.allclose(risk, risks[reference], rtol=0, atol=SAME_RISK)
        for model, risk in risks.items()
    }


def _unknown_results(same: dict[str, bool], rows: int, *, several: bool) -> Results:
    unknown = dict.fromkeys(METRICS, UNKNOWN.to_json() | ({"sd": None} if several else {}))
    counts = {"n": rows, "events": None, "rarer_patients": None}
    return {
        model: {**counts, **unknown, "same": own, "minus_reference": unknown}
        for model, own in same.items()
    }


def verdict_beside(result: dict[str, Any]) -> Verdict:
    """Return the verdict on a model beside the reference, by its paired difference of AUROC."""
    if result["same"]:
        return SAME
    return judge_interval(_estimate(result["minus_reference"]["auroc"]), result["rarer_patients"])


def judged_models(results: Results, reference: str) -> dict[str, Verdict]:
    """Return the verdict on each model that has one beside the reference."""
    return {
        name: verdict_beside(result)
        for name, result in results.items()
        if name != reference and not result.get("unjudged")
    }


def comparison_table(results: Results, reference: str) -> pd.DataFrame:
    """Return the test figures of all models, a line each; the cost stands beside the gain."""
    lines = []
    for name, result in results.items():
        own = name == reference
        line: dict[str, Any] = {
            "Model": name,
            "Test AUROC [95 %]": _estimate(result["auroc"]).text(),
        }
        if "sd" in result["auroc"]:
            line["SD of AUROC"] = Estimate(result["auroc"]["sd"]).value_text(".3f")
        difference = _estimate(result["minus_reference"]["auroc"]).text("+.3f")
        line[DIFFERENCE] = "" if own else difference
        verdict = NO_VALUE if result.get("unjudged") else verdict_beside(result)
        line[BESIDE] = "the reference" if own else verdict
        for figure, (title, form, _) in RUN_FIGURES.items():
            if any(each.get(figure) is not None for each in results.values()):
                known = result.get(figure)
                line[title] = "" if known is None else f"{known:{form}}"
        for metric, title, form in (("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f")):
            line[title] = _estimate(result[metric]).value_text(form)
            if "sd" in result[metric]:
                line[f"SD of {title}"] = Estimate(result[metric]["sd"]).value_text(form)
        lines.append(line)
    return pd.DataFrame(lines)


def counts_sentence(results: Results) -> str:
    """Return on how many rows and events a comparison rests."""
    first = next(iter(results.values()))
    parts = "test parts of all splits" if "sd" in first["auroc"] else "test part"
    return f"{parts}: {counts_text(first['n'], first['events'])}"


def comparison_findings(
    results: Results, reference: str, asked: Sequence[str] = ()
) -> list[Finding | str]:
    """Return the result in words: each model asked about, the highest AUROC, all, combined.

    The highest AUROC is that of models that have a verdict and risks of their own: the combined
    model holds the first model and a blend.

    Args:
        results: of all models.
        reference: the model that the others are compared with.
        asked: models that have a finding each, whatever their AUROC.
    """
    if results[reference]["events"] is None:
        hidden = f"No figure is shown by --min_cell ({counts_sentence(results)})."
        return [Finding(FEW, FEW.words, hidden)]
    found: list[Finding | str] = [_reference_sentence(results, reference)]
    judged = judged_models(results, reference)
    found += [
        _finding(results, model, reference, "Its AUROC is") for model in asked if model in judged
    ]
    own = [model for model in judged if model != COMBINED]
    apart = [model for model in results if model not in (reference, *own)]
    others = [model for model in own if not results[model]["same"]]
    best = max([reference, *others], key=lambda model: results[model]["auroc"]["value"])
    left_out = f", {' and '.join(apart)} apart" if apart else ""
    if best == reference:
        found.append(f"No other model has a higher AUROC{left_out}.")
    elif best not in asked:
        highest = (
            f"It has the highest AUROC of the {1 + len(others)} models{left_out}, which is partly "
            "chance:"
        )
        found.append(_finding(results, best, reference, highest))
    verdicts = {name: verdict for name, verdict in judged.items() if name not in asked}
    if groups := group_by_verdict(verdicts):
        found.append(f"The {'other ' if asked else ''}models beside {reference}: {groups}")
    if "minus_blend" in results.get(COMBINED, {}):
        found.append(_combined_finding(results))
    return found


def _reference_sentence(results: Results, reference: str) -> str:
    """Return the AUROC of the reference; over several splits its range too."""
    auroc = results[reference]["auroc"]
    score, counts = _estimate(auroc).text(), counts_sentence(results)
    if "splits" not in auroc:
        return f"The reference is {reference}: test AUROC {score} ({counts})."
    splits = auroc["splits"]
    return (
        f"Over {len(splits)} splits the test AUROC of {reference}, the reference, is "
        f"{min(splits):.3f} to {max(splits):.3f}, mean {score} ({counts})."
    )


def _finding(results: Results, model: str, reference: str, beginning: str) -> Finding:
    """Return what a model gains beside the reference, and at what cost; its AUROC comes first."""
    result = results[model]
    score, difference = (_estimate(each["auroc"]) for each in (result, result["minus_reference"]))
    verdict = verdict_beside(result)
    text = f"{beginning} {score.text()}; the paired difference is {difference.text('+.3f')}."
    if verdict == SAME:
        text = f"Both give each row the same risk: AUROC {score.text()}."
    costs = [
        f"{_cost(result, figure)} {unit} (reference: {_cost(results[reference], figure)})"
        for figure, (_, _, unit) in RUN_FIGURES.items()
        if unit and result.get(figure) is not None
    ]
    if costs:
        text += f" Cost: {', '.join(costs)}."
    return Finding(verdict, verdict.sentence(f"the model {model} is", reference), text)


def _cost(result: dict[str, Any], figure: str) -> str:
    known = result.get(figure)
    return NO_VALUE if known is None else f"{known:{RUN_FIGURES[figure][1]}}"


def _combined_finding(results: Results) -> Finding:
    blend, first_model = richest_blend(results), next(iter(results))
    gain = _estimate(results[COMBINED]["minus_blend"]["auroc"])
    verdict = judge_interval(gain, results[COMBINED]["rarer_patients"])
    return Finding(
        verdict,
        verdict.sentence(f"the model {first_model} joined with {blend} is", f"{blend} alone"),
        f"{COMBINED.capitalize()} (the mean of their log-odds) minus {blend}: paired difference "
        f"{gain.text('+.3f')}.",
    )


def write_comparison(
    folder: Path,
    name: str,
    results: Results,
    reference: str,
    *,
    title: str,
    sentences: Sequence[str],
    warnings: Sequence[str] = (),
    card: dict[str, str],
    asked: Sequence[str] = (),
    models: dict[str, str] | None = None,
    notice: str = "",
    splits: pd.DataFrame | None = None,
    parts: Sequence[Finding] = (),
) -> None:
    """Log the table of a comparison, and write ``NAME.json``, ``NAME.png`` and ``NAME.html``.

    An earlier result that differs is moved aside first. The page has the ``warnings`` before the
    result in words and the ``sentences`` after it, in which the models ``asked`` about and the
    ``parts`` of a model have a finding each; ``card`` says how the comparison was made, ``models``
    what its models are; ``notice`` is a banner above all; ``splits`` has the figures of each split.
    """
    text = json.dumps(results, indent=2) + "\n"
    paths = {ending: folder / f"{name}{ending}" for ending in (".json", ".png", ".html")}
    if paths[".json"].exists() and paths[".json"].read_text(encoding="utf-8") != text:
        for aside in move_aside(paths.values()):
            logger.info("an earlier result was moved to %s", aside)
    table = comparison_table(results, reference)
    first, *others = comparison_findings(results, reference, asked)
    findings = [first, *parts, *others]
    differences = {
        name: (_estimate(results[name]["minus_reference"]["auroc"]), verdict)
        for name, verdict in judged_models(results, reference).items()
    }
    with plot_style():
        figure, alt = plot_forest(differences, reference)
        with atomic(paths[".png"]) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        image = to_image(figure, alt)
    judged = [each for each in findings if isinstance(each, Finding)]
    page = render(
        "comparison",
        title=title,
        notice=notice,
        warnings=warnings,
        style=Judgement(judged).verdict.style if judged and not warnings else "",
        findings=[*findings, *sentences],
        reference=reference,
        several=any("sd" in result["auroc"] for result in results.values()),
        comparison=table,
        splits=splits,
        meanings={name: meaning for name, meaning in MEANINGS.items() if name in table},
        image=image,
        models={**(models or {}), **describe_baselines(results)},
        card={**card, "Intervals": INTERVALS, "SHA-256 of the code": code_hash()},
    )
    write_text(paths[".html"], page)
    write_text(paths[".json"], text)
    logger.info("\n%s\n%s\n\nresults: %s", table.to_string(index=False), first, folder)


def part_findings(
    tables: Sequence[pd.DataFrame], parts: Mapping[str, tuple[str, str]], seed: int, fewest: int
) -> list[Finding]:
    """Return what each part of a model adds, in words; nothing where no figure is shown.

    Args:
        tables: as for ``compare_models``.
        parts: by name of the part, the model with it and the model without it; a part is left out
            where one of them is not in the tables.
        seed: of the bootstrap.
        fewest: patients of the smallest cell that is shown.
    """
    found = []
    for part, (one, other) in parts.items():
        if {one, other} <= {*tables[0].columns}:
            pair = [table[[*TESTED, one, other]] for table in tables]
            result = compare_models(pair, other, seed, fewest)[one]
            difference = _estimate(result["minus_reference"]["auroc"])
            verdict = verdict_beside(result)
            text = f"The AUROC of {one} minus that of {other} is {difference.text('+.3f')}."
            if verdict == SAME:
                text = f"The risks of {one} are those of {other}, row by row."
            if result["events"] is not None:
                found.append(Finding(verdict, f"{part}: {verdict.words}", text))
    return found


def _estimate(score: dict[str, Any]) -> Estimate:
    return Estimate(score["value"], score["low"], score["high"])
