"""The case mix of the training data beside that of a new cohort."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from medgemma_clinical.data import distributions
from medgemma_clinical.data.dka import STATIC
from medgemma_clinical.data.small_cells import MIN_CELL, count_text
from medgemma_clinical.data.trajectories import AGE, UNKNOWN
from medgemma_clinical.evaluation.suppress import splits_off_few
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, percent

CASE_MIX = {
    "patients": "Patients",
    "prevalence": "Prevalence of the event",
    "age": "Age in years, median (quartiles)",
    "women": "Women",
    "observations": "Observations, median (quartiles)",
}


def case_mix_topic(evaluated: Evaluated) -> Topic | None:
    """Return the topic; None where the rows are those of the training data."""
    content = evaluated.content
    if content.case_mix is None:
        return None
    development, here = (
        suppress_case_mix(mix, evaluated.min_cell, hide_events=evaluated.hides_events)
        for mix in content.case_mix
    )
    cells = case_mix_cells(development, here, content.noun)
    caption = (
        f"The training data beside these {content.noun}. Series and static features: median "
        "(quartiles) of the patients' medians, or the share of 1"
    )
    return Topic("Case mix", tables=[Cells(cells, caption)], numbers={"case_mix": cells})


def case_mix(
    rows: pd.DataFrame, medians: pd.DataFrame, min_patients: int = MIN_CELL
) -> dict[str, Any]:
    """Return counts, shares and quartiles of rows of ``demographics``; NaN is left out.

    Those of series and static features are the distributions of ``row_medians``.
    """
    sexes = rows["sex"]
    mix = {
        "rows": len(rows),
        "patients": rows["patient"].nunique(),
        "prevalence": rows["label"].mean(),  # of known labels
        "women": (sexes[sexes != UNKNOWN] == "woman").mean(),
    }
    for name in ("observations", "age"):
        quartiles = rows[name].quantile([0.25, 0.5, 0.75])
        mix |= zip((f"{name}_q1", f"{name}_median", f"{name}_q3"), quartiles, strict=True)
    known = {name: float(number) for name, number in mix.items() if pd.notna(number)}
    return known | distributions.describe(medians, min_patients)


def suppress_case_mix(
    mix: Mapping[str, Any], min_cell: int, *, hide_events: bool
) -> dict[str, Any]:
    """Leave out small counts of a ``case_mix``, and what tells them."""
    if min_cell == 0:
        return dict(mix)
    patients, share = mix.get("patients", 0), mix.get("prevalence", 0)
    hidden = {name for name in ("rows", "patients") if 0 < mix.get(name, 0) < min_cell}
    # A drawn part has about the prevalence of a scored part that hides its events.
    if hide_events or patients < min_cell or splits_off_few(patients, share, min_cell):
        hidden.add("prevalence")
    # Of how many patients age and sex are known is not kept: both are left out.
    quartiles = ("age", "observations") if patients < 4 * min_cell else ("age",)  # few beyond
    hidden |= {f"{name}_{end}" for name in quartiles for end in ("q1", "median", "q3")}
    return {name: x for name, x in mix.items() if name not in {"women", *hidden}}


def case_mix_cells(
    development: Mapping[str, Any], here: Mapping[str, Any], noun: str
) -> pd.DataFrame:
    """Return what is known of two results of ``case_mix`` as text; a dash: of one alone."""
    titles = ({"rows": noun.capitalize()} if noun != "patients" else {}) | CASE_MIX
    mixes = {"Training data": development, "Scored here": here}
    features = [
        (kind, name)
        for kind in ("series", "static")
        for name in {**development.get(kind, {}), **here.get(kind, {})}
        if not (name in AGE and "age_median" in development)  # it has a line already
    ]
    table = pd.DataFrame(
        {"Case mix": [*titles.values(), *(name.removeprefix(STATIC) for _, name in features)]}
    )
    for title, mix in mixes.items():
        table[title] = [
            *(_case_mix_text(mix, name) for name in titles),
            *(_entry_text(mix.get(kind, {}).get(name)) for kind, name in features),
        ]
    return table[(table.iloc[:, 1:] != NO_VALUE).any(axis=1)]


def _entry_text(entry: Mapping[str, Any] | None) -> str:
    """Return median and quartiles of patients, or the share of an indicator, and of how many."""
    if entry is None:
        return NO_VALUE
    if "share" in entry:
        text = distributions.percent(entry["share"])
    else:
        low, middle, high = (distributions.quantile(entry, x) for x in (0.25, 0.5, 0.75))
        text = f"{middle:.3g}"
        if len(entry["means"]) > 1:
            text += f" ({low:.3g} to {high:.3g})"
    if entry["measured"] == 1:
        return text
    return f"{text}, measured in {distributions.percent(entry['measured'])}"


def _case_mix_text(mix: Mapping[str, Any], name: str) -> str:
    if f"{name}_median" in mix:
        low, middle, high = (mix[f"{name}_{end}"] for end in ("q1", "median", "q3"))
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"
    if name not in mix:
        return NO_VALUE
    return count_text(mix[name]) if name in ("rows", "patients") else percent(mix[name])
