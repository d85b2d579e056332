"""Figures laid out as tables: for pages, and the table that a run prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.small_cells import (
    count_patients,
    count_text,
    has_few_events,
    merge_flow,
)
from medgemma_clinical.evaluation.baselines import STAGE_1, STAGE_2
from medgemma_clinical.evaluation.bootstrap import NO_VALUE, Estimate
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures
from medgemma_clinical.evaluation.decision import threshold_text
from medgemma_clinical.evaluation.judgement.sentences import (
    MODEL_IS,
    caution_sentence,
    combined_finding,
    few_events_sentence,
    judge_baseline,
)
from medgemma_clinical.evaluation.judgement.verdict import CHANCE, judge_interval

EARLIER_STAGES = (STAGE_1, STAGE_2)

Lines = tuple[tuple[str, str, str, str], ...]
"""Key, name, format and meaning of figures."""

DISCRIMINATION: Lines = (
    (
        "auroc",
        "AUROC",
        ".3f",
        "how often a row with the event has a higher risk than one without; 0.5 is chance",
    ),
    (
        "auprc",
        "AUPRC",
        ".3f",
        "share of alarms that are right, averaged over the sensitivities; chance is the "
        "prevalence, {prevalence}",
    ),
    ("accuracy", "Accuracy at 0.5", ".3f", "share of rows on the right side of a risk of 50 %"),
)
CALIBRATION: Lines = (
    (
        "calibration_slope",
        "Slope",
        ".3f",
        "spread of the risks: 1 is ideal; below 1 they are too extreme, above 1 too close to the "
        "average",
    ),
    (
        "calibration_in_the_large",
        "Calibration in the large",
        ".3f",
        "level of the risks: 0 is ideal; below 0 they are too high on average, above 0 too low",
    ),
    (
        "brier_skill",
        "Brier skill",
        ".3f",
        "gain over giving everyone the average risk: 0 is none, 1 is perfect",
    ),
)
CALIBRATION_DETAILS: Lines = (
    (
        "calibration_intercept",
        "Intercept",
        ".3f",
        "log-odds of the event where the model says 50 %; 0 is ideal",
    ),
    ("brier", "Brier score", ".4f", "mean squared distance of risk and outcome; 0 is ideal"),
    (
        "log_loss",
        "Log loss",
        ".4f",
        "mean of -ln(risk given to what happened): high where the model was sure and wrong; 0 is "
        "ideal",
    ),
)
"""Behind a fold of the page."""

AT_THRESHOLD: Lines = (  # in percent
    ("sensitivity", "Sensitivity (%)", ".1f", "of the rows with the event, those with an alarm"),
    ("specificity", "Specificity (%)", ".1f", "of the rows without it, those without an alarm"),
    ("ppv", "PPV (%)", ".1f", "of the rows with an alarm, those with the event"),
    ("npv", "NPV (%)", ".1f", "of the rows without an alarm, those without the event"),
    ("alarms", "Alarms (%)", ".1f", "rows with a risk of at least {threshold}"),
)

COMPARED = (("auroc", "AUROC", ".3f"), ("auprc", "AUPRC", ".3f"), ("brier", "Brier", ".4f"))
"""Metrics of a model beside its baselines: key, name, format."""

WRITTEN = (
    ("reports", "Reports", "written for the rows of the test part"),
    ("parse_share", "Expected form (%)", "reports of the form of the true ones from end to end"),
    ("numbers_stated", "Numbers stated", "in all reports"),
    ("true_number_share", "True numbers (%)", "of these, as in the true report in the same place"),
    (
        "abnormal_values",
        "Abnormal values",
        "highest value of a series above its reference range, lowest value below it",
    ),
    ("abnormal_named_share", "Abnormal named (%)", "of these, stated with their time"),
    (
        "abnormal_nameable_share",
        "Abnormal nameable (%)",
        "of these, stated by the true reports, which give first and last value of a further series",
    ),
    (
        "right_trend_share",
        "Trends right (%)",
        "direction of a series with the times of its first and last value",
    ),
    ("invented", "Inventions", "numbers and statements that the row does not hold"),
    ("inventing_share", "Reports with inventions (%)", "of all reports"),
)
"""Figures of written reports: key, name, meaning."""

RECALIBRATED = {
    "calibration_slope": "Slope (1 is ideal)",
    "calibration_in_the_large": "Calibration in the large (0 is ideal)",
    "brier": "Brier score (0 is ideal)",
    "log_loss": "Log loss (0 is ideal)",
}
"""What recalibration is to mend; the order of the patients, and so the AUROC, stays."""

PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


def percent(value: float | None) -> str:
    """Write a share, of small ones two digits; a dash where it is not shown."""
    if value is None:
        return NO_VALUE
    number = f"{100 * value:.0f}" if value >= 0.1 or value == 0 else f"{100 * value:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


def figure_table(figures: CohortFigures, lines: Lines, scale: float = 1) -> pd.DataFrame:
    """Return the figures that ``lines`` name, times ``scale``, with their meanings."""
    share = figures.prevalence
    words = {
        "prevalence": NO_VALUE if share is None else f"{share:.2g}",
        "threshold": threshold_text(figures.threshold),
    }
    cells = [
        (name, figures.estimates[key].text(form, scale), meaning.format(**words))
        for key, name, form, meaning in lines
    ]
    return pd.DataFrame(cells, columns=["Figure", "Value [95 %]", "Meaning"])


def recalibration_table(figures: CohortFigures) -> pd.DataFrame | None:
    """Return the figures before and after recalibration, None without recalibration."""
    if not figures.before:
        return None
    lines = [
        (name, figures.before[key].text(), figures.estimates[key].text())
        for key, name in RECALIBRATED.items()
    ]
    return pd.DataFrame(lines, columns=["Figure", "As trained", "Recalibrated"])


def baseline_table(figures: CohortFigures) -> pd.DataFrame:
    """Return model, simple models and combined model; paired differences model less baseline.

    The verdict is that on the model beside the baseline, by the difference of AUROC.
    """
    return _compared(figures, [name for name in figures.others if name not in EARLIER_STAGES])


def stage_table(figures: CohortFigures) -> pd.DataFrame | None:
    """Return model and earlier stages, with the paired differences; None without any."""
    names = [name for name in EARLIER_STAGES if name in figures.baselines]
    return _compared(figures, names) if names else None


def _compared(figures: CohortFigures, names: Sequence[str]) -> pd.DataFrame:
    lines = []
    others = {name: figures.others[name] for name in names}
    for name, known in {"this model": figures.estimates, **others}.items():
        line: dict[str, Any] = {"Model": name} | {
            title: known[key].text(form) for key, title, form in COMPARED
        }
        if difference := figures.differences.get(name):
            line["AUROC, difference"] = difference["auroc"].text("+.3f")
            line["This model is"] = judge_baseline(figures, name)
            line["Brier, difference"] = difference["brier"].text("+.4f")
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def subgroup_table(figures: CohortFigures) -> pd.DataFrame | None:
    """Return the subgroups with enough patients for an AUROC, None if there are none."""
    lines = [
        {
            "Group": group.name,
            "Rows": f"{group.rows:,}",
            "Events": f"{group.events:,}",
            "Observed": percent(group.events / group.rows),
            "Mean risk": percent(group.risk),
            "AUROC [95 %]": group.auroc.text(),
        }
        for group in figures.subgroups
        if group.auroc is not None
    ]
    return pd.DataFrame(lines) if lines else None


def few_subgroups(figures: CohortFigures) -> str:
    """Return the subgroups with too few patients for an AUROC in one line; empty if none has."""
    few: dict[str, list[str]] = {}
    for group in figures.subgroups:
        if group.auroc is None:
            column, _, level = group.name.partition(": ")
            few.setdefault(column, []).append(f"{level} ({group.rows:,})")
    return "; ".join(f"{column}: {', '.join(levels)}" for column, levels in few.items())


def largest_errors(cohort: Cohort) -> list[tuple[str, str]]:
    """Return the ten rows whose risk is farthest from the label: id, and both in words."""
    order = np.argsort(-np.abs(cohort.labels - cohort.probability), kind="stable")[:10]
    return [
        (str(cohort.ids[k]), risk_beside_label(cohort.labels[k], cohort.probability[k]))
        for k in order.tolist()
    ]


def risk_beside_label(label: float, risk: float) -> str:
    """Write what happened and what was predicted."""
    return f"{'with' if label else 'without'} the event, predicted risk {percent(risk)}"


def shift_table(development: dict[str, float], cohort: dict[str, float]) -> pd.DataFrame:
    """Return two case mixes side by side.

    Args:
        development: ``TrajectoryDataset.case_mix`` of the rows that the model was trained on.
        cohort: the same of the rows that are judged.
    """
    lines = {
        "rows": "Rows",
        "patients": "Patients",
        "prevalence": "Prevalence of the event",
        "age": "Age in years, median (quartiles)",
        "women": "Women",
        "observations": "Observations a row, median (quartiles)",
    }
    cells = [
        (title, _case_mix_cell(development, name), _case_mix_cell(cohort, name))
        for name, title in lines.items()
    ]
    return pd.DataFrame(cells, columns=["Case mix", "Development", "These rows"])


def _case_mix_cell(mix: dict[str, float], name: str) -> str:
    if f"{name}_median" in mix:
        low, middle, high = (mix[f"{name}_{place}"] for place in ("q1", "median", "q3"))
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"
    if name not in mix:
        return "not known, or not shown"
    return f"{mix[name]:,.0f}" if name in ("rows", "patients") else percent(mix[name])


def split_table(
    labels: NDArray[np.float64],
    groups: NDArray[Any],
    split: dict[str, NDArray[np.int64]],
    fewest: int,
) -> pd.DataFrame:
    """Return rows, patients and events of each part.

    Args:
        labels: (N,) of 0 and 1.
        groups: (N,) patient of each row.
        split: positions of train, val and test.
        fewest: patients of the smallest cell that is shown.
    """
    lines = []
    hidden = has_few_events(labels, groups, split, fewest)
    for part, rows in split.items():
        events = f"{labels[rows].sum():,.0f} ({percent(labels[rows].mean())})"
        patients = count_text(count_patients(groups, rows), fewest)
        shown = NO_VALUE if hidden else events
        lines.append((PART_NAMES[part], count_text(len(rows), fewest), patients, shown))
    return pd.DataFrame(lines, columns=["Part", "Rows", "Patients", "Events"])


def flow_table(flow: pd.DataFrame | None, fewest: int) -> pd.DataFrame | None:
    """Return a data set's flow (columns rule, removed, left) in a page's words."""
    names = {"rule": "Left out", "removed": "Rows", "left": "Rows left"}
    return None if flow is None else merge_flow(flow, fewest).rename(columns=names)


def written_table(reports: Mapping[str, Any] | None) -> pd.DataFrame | None:
    """Return the figures of written reports, as in metrics.json, with their meanings.

    A dash stands for a share of nothing, and for a hidden one; abnormal values that are not judged
    are left out. None without reports.
    """
    known = {key: value for key, value in (reports or {}).items() if value is not None}
    if "abnormal_values" not in known:
        known = {key: value for key, value in known.items() if not key.startswith("abnormal")}
    lines = [
        (name, _written_figure(known[key]), meaning)
        for key, name, meaning in WRITTEN
        if key in known
    ]
    return pd.DataFrame(lines, columns=["Figure", "Value [95 %]", "Meaning"]) if lines else None


def written_sentence(reports: Mapping[str, Any] | None) -> str:
    """Return what the box at the top says of written reports; empty without any."""
    if not reports or not reports["reports"]:
        return ""
    expected, inventing = (
        Estimate(**reports[key]).text(".1f", 100) for key in ("parse_share", "inventing_share")
    )
    return (
        f"Of the {reports['reports']:,} written reports {expected} % have the expected form, and "
        f"{inventing} % state something that their row does not hold."
    )


def _written_figure(figure: dict[str, float | None] | float) -> str:
    """Write a count, or a share with its interval in percent."""
    return Estimate(**figure).text(".1f", 100) if isinstance(figure, dict) else f"{figure:,.0f}"


def example_reports(
    reports: list[dict[str, Any]], labels: NDArray[np.float64]
) -> list[tuple[str, dict[str, str], str, str]]:
    """Return the best, the median and the worst report by quality; they name patients.

    Of equal ones the first counts, and a row is shown once.

    Args:
        reports: lines of generations_test.jsonl.
        labels: (n,) of 0 and 1.

    Returns:
        Title, lines about the report, its text and the true report, of each.
    """
    quality = [line["quality"] for line in reports]
    places = range(len(reports))
    middle = sorted(places, key=quality.__getitem__)[(len(reports) - 1) // 2]
    best, worst = max(places, key=quality.__getitem__), min(places, key=quality.__getitem__)
    titles = {worst: "Worst", middle: "Median", best: "Best"}
    if quality[best] == quality[worst]:
        titles = {best: "The first of equal ones"}
    judged = any(line["abnormal"] for line in reports)
    examples = []
    for k, title in titles.items():
        line = reports[k]
        named = f"{line['named']} of {line['abnormal']}" if line["abnormal"] else "none to name"
        trends = f"{line['right_trends']} of {line['trends']}" if line["trends"] else "no trend"
        about = {
            "Row": f"{line['id']}, {risk_beside_label(labels[k], line['probability'])}",
            "Score": f"{line['quality']:.2f}",
            "Form": "as expected" if line["parses"] else "not as expected",
            **({"Abnormal values named": named} if judged else {}),
            "Trends right": trends,
            "Invented": str(line["invented"]),
        }
        examples.append((title, about, line["text"], line["target"]))
    return examples[::-1]


def counts_text(rows: int, events: int | None) -> str:
    """Return rows and events in words; ``events`` is None where they are not shown."""
    return f"{rows:,} rows, {'events not shown' if events is None else f'{events:,} events'}"


def result_sentence(figures: CohortFigures) -> str:
    """Return the result on the test part in one sentence, beside the best baseline's."""
    if figures.events is None:
        return f"Test part: {few_events_sentence(figures.n, figures.fewest)}"
    own = judge_interval(figures.auroc, figures.rarer, CHANCE)
    text = (
        f"Test AUROC {figures.auroc.text()} on {counts_text(figures.n, figures.events)}: "
        f"{own.symbol} {own.sentence(MODEL_IS, 'chance')}"
    )
    name = figures.best_baseline
    if name is None:
        return f"{text}."
    verdict = judge_baseline(figures, name)
    return (
        f"{text}; the best baseline, {name}, has {figures.baselines[name]['auroc'].text()}, paired "
        f"difference {figures.differences[name]['auroc'].text('+.3f')}: {verdict.symbol} "
        f"{verdict.sentence(MODEL_IS, name)}."
    )


def results_table(
    name: str, figures: dict[str, CohortFigures], reports: Mapping[str, Any] | None = None
) -> str:
    """Return the final table of a run: model and all beside it, ``validation`` and ``test``.

    The paired differences, the model minus each baseline, are those of the test AUROC; the last
    column holds the verdict on the model beside each baseline.
    """
    test = figures["test"]
    scores = {part: {name: each.estimates, **each.others} for part, each in figures.items()}
    lines = []
    for model, on_test in scores["test"].items():
        line = {"model": model}
        for part, known in scores.items():
            line[f"{part} AUROC [95 %]"] = known[model]["auroc"].text()
        difference = test.differences.get(model)
        line[f"{name} minus it [95 %]"] = difference["auroc"].text("+.3f") if difference else ""
        for metric, title in (("auprc", "AUPRC"), ("brier", "Brier"), ("accuracy", "accuracy")):
            line[f"test {title}"] = on_test[metric].value_text(".3f")
        line[f"{name} is"] = str(judge_baseline(test, model)) if difference else ""
        lines.append(line)
    further = [f"test part: {counts_text(test.n, test.events)}"]
    if combined := combined_finding(test):
        further.append(str(combined))
    if caution := caution_sentence(figures["validation"].auroc, test.auroc):
        further.append(caution)
    if test.fewest:
        further.append(f"{NO_VALUE}: undefined, or hidden by --min_cell {test.fewest}")
    if (recalibration := recalibration_table(test)) is not None:
        further.append(recalibration.to_string(index=False))
    if (written := written_table(reports)) is not None:
        further += [f"{name}: {value}" for name, value, _ in written.values.tolist()]
    return "\n".join([pd.DataFrame(lines).to_string(index=False), *further])
