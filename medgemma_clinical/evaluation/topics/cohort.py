"""Who the patients are: what rules removed, split, training, Table 1, case mix elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medgemma_clinical.data import distributions
from medgemma_clinical.data.dka import STATIC
from medgemma_clinical.data.small_cells import MIN_CELL, count_patients, count_text
from medgemma_clinical.data.trajectories import AGE, UNKNOWN, TrajectoryDataset
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics_table import count
from medgemma_clinical.evaluation.suppress import (
    EVENTS_OF,
    NOT_SHOWN,
    splits_off_few,
    suppress_table,
)
from medgemma_clinical.evaluation.tables import PART_NAMES
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic
from medgemma_clinical.evaluation.verdicts import NO_VALUE, percent

MAX_ERRORS = 10
"""Rows that are listed."""


def cohort(
    evaluated: Evaluated,
    data: Mapping[str, str],
    flow: pd.DataFrame | None = None,  # columns rule, removed, left
    split: pd.DataFrame | None = None,  # a ``part_table``
    history: Sequence[Mapping[str, Any]] = (),  # as in history.jsonl
) -> Topic:
    """Return the topic of the data and the training."""
    numbers, min_cell = {}, evaluated.min_cell
    if flow is not None:
        # Patients are known after each rule, or not counted; few removed ones show in differences.
        flow = flow.dropna(axis=1)
        flow = flow.drop(columns="patients", errors="ignore") if min_cell else flow
        numbers["flow"] = suppress_table(flow, min_cell)
    if split is not None:
        split = suppress_table(split, min_cell)
        numbers["split"] = split.drop(columns="minority_patients", errors="ignore")
    tested = "each row was tested once" if evaluated.folds else "the test part was scored once"
    captions = {
        "flow": "What each rule removes, in this order",
        "split": f"Split by patient; {tested}",
    }
    tables = [
        Cells(count_cells(table, evaluated.noun), captions[name]) for name, table in numbers.items()
    ]
    figures = {}
    if len(history) > 1:
        figures["learning_curve"] = plot_learning(history), "Learning curve"
    return Topic("Data", tables=tables, figures=figures, numbers=numbers, terms=data)


def plot_learning(history: Sequence[Mapping[str, Any]]) -> plots.Plot:
    """Plot losses and validation AUROC by epoch; a number of the history may be None."""
    table = pd.DataFrame(history).set_index("epoch")
    averaged, auroc = table["averaged_epochs"].iloc[-1], table["val_auroc"].astype(float)
    has_auroc = bool(auroc.notna().any())  # times to events have none
    figure, axes_of = plots.new_figure((1, 1) if has_auroc else (1,))
    upper, lower = axes_of[0], axes_of[-1]
    upper.plot(table["train_loss"].astype(float), "o--", color=plots.OTHER, label="training")
    upper.plot(table["val_loss"].astype(float), "o-", color=plots.MODEL, label="validation")
    for axes in axes_of:
        for epoch in averaged:
            axes.axvspan(epoch - 0.5, epoch + 0.5, color=plots.GRID, linewidth=0)
    # Whole axes: a change of a hundredth between epochs is noise and looks like it.
    upper.axhline(0, linewidth=0)
    upper.set(ylabel="loss", ylim=(0, None))
    if has_auroc:
        lower.plot(auroc, "o-", color=plots.MODEL)
        lowest = np.fmin(0.5, np.floor(10 * auroc.min()) / 10)
        lower.set(ylabel="val. AUROC", ylim=(lowest, 1))
    lower.set(xlabel="epoch (shaded: averaged)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    alt = f"Learning curve of {len(table)} epochs; averaged: {len(averaged)} of them."
    return plots.with_legend(figure), alt


def part_table(
    labels: NDArray[Any],
    groups: NDArray[Any],
    split: Mapping[str, NDArray[Any]],
    kinds: Mapping[str, NDArray[np.bool_]] | None = None,  # ``event_kinds``
) -> pd.DataFrame:
    """Return part, rows, patients, events and minority_patients of each part, as numbers.

    Of ``kinds`` there is a column each in place of the events.
    """
    lines = []
    for part, rows in split.items():
        counts = count(labels[rows], groups[rows])
        if kinds:
            names = {EVENTS_OF + name: of_kind[rows] for name, of_kind in kinds.items()}
            del counts["events"]
            patients = [count_patients(groups[rows], of_kind) for of_kind in names.values()]
            counts["minority_patients"] = min(filter(None, patients), default=0)
            counts |= {name: int(of_kind.sum()) for name, of_kind in names.items()}
        lines.append({"part": PART_NAMES.get(part, part), **counts})
    return pd.DataFrame(lines).rename(columns={"n": "rows"})


def count_cells(table: pd.DataFrame, noun: str) -> pd.DataFrame:
    """Return a table of counts, which may be suppressed, as text; its rows are called ``noun``."""
    names = {
        "rows": noun,
        "removed": f"{noun} removed",
        "left": f"{noun} left",
        "patients": "patients left" if "left" in table else "patients",
    }
    named = table.map(count_text).rename(columns=names).rename(columns=_capitalised)
    return named.loc[:, ~named.columns.duplicated()]


def _capitalised(name: str) -> str:
    """Return the name of a column with a capital; the rest of it is the user's."""
    name = name.removeprefix(EVENTS_OF)
    return name[:1].upper() + name[1:]


ALL, OUTCOMES = "all", ("with the event", "without the event")
QUARTILES = ["q1", "median", "q3"]


def table_one_topic(evaluated: Evaluated, exact: pd.DataFrame, split: pd.DataFrame) -> Topic:
    """Return the topic of a ``table_one`` and a ``part_table``."""
    noun, min_cell = evaluated.noun, evaluated.min_cell
    few = evaluated.has_few or bool((split["minority_patients"] < min_cell).any())
    table = suppress_table_one(exact, min_cell, hide_events=few)
    caption = (
        f"Count (share of the known) or median (quartiles) of {noun}; a series that is "
        "missing was never measured"
    )
    note = (
        f"A patient with {noun} of both kinds, with and without the event, counts in both "
        "of these columns."
    )
    if not {*OUTCOMES} <= {*exact["group"]}:
        note = f"A patient with {noun} of several outcomes counts in each of their columns."
    return Topic(
        "Table 1",
        tables=[Cells(table_one_cells(table), caption, is_wide=True)],
        numbers={"table_one": table},
        note="" if noun == "patients" else note,
    )


def table_one(dataset: TrajectoryDataset, split: Mapping[str, NDArray[np.int64]]) -> pd.DataFrame:
    """Return numbers by variable and group: ``missing`` rows, and count and share or quartiles."""
    table = _variables(dataset)
    binary = table.isin([0.0, 1.0]).where(table.notna(), True).all() & table.notna().any()
    binary.iloc[len(dataset.static_names) :] = False  # series are numbers
    by_label = {name: dataset.labels == 1 - k for k, name in enumerate(OUTCOMES)}
    outcomes = dataset.event_kinds or by_label
    groups = [(ALL, ALL, np.arange(len(dataset)))]
    groups += [("outcome", name, np.flatnonzero(of_kind)) for name, of_kind in outcomes.items()]
    groups += [("part", PART_NAMES.get(part, part), rows) for part, rows in split.items()]
    tables = []
    for side, group, rows in groups:
        members, patients = table.iloc[rows], len(np.unique(dataset.groups[rows]))
        size: dict[str, Any] = {"group": group, "rows": len(rows), "patients": patients}
        size["side"] = side
        lines = members.quantile([0.25, 0.5, 0.75]).T.set_axis(QUARTILES, axis=1)
        lines[binary] = np.nan
        present = members.notna().sum()
        count = members.sum().where(binary)
        lines = lines.assign(
            missing=len(rows) - present, count=count, share=count / present, **size
        )
        heads = {dataset.noun.capitalize(): len(rows), "Patients": patients}
        head = pd.DataFrame({"count": heads, "missing": 0}).assign(**size)
        tables.append(pd.concat([head, lines]))
    columns = ["side", "group", "rows", "patients", "missing", "count", "share", *QUARTILES]
    return pd.concat(tables)[columns].rename_axis("variable").reset_index()


def _variables(dataset: TrajectoryDataset) -> pd.DataFrame:
    """Return the described variables of each row, N rows, NaN where missing."""
    names = [name.removeprefix(STATIC) for name in dataset.static_names]
    columns: list[Any] = [dataset.static]
    summaries = pd.DataFrame(dataset.summaries(), columns=dataset.summary_names())
    for name, unit in ((dataset.features[f], dataset.units[f]) for f in dataset.series_read):
        names += [f"{name}, last value{f' [{unit}]' if unit else ''}"]
        names += [f"{name}, observations"]
        columns += [summaries[[f"{name} last"]], summaries[[f"{name} count"]].fillna(0)]
    return pd.DataFrame(np.column_stack(columns), columns=names)


def table_one_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return ``table_one``, which may be suppressed, as text: a column for each group."""
    groups = {str(name): lines for name, lines in table.groupby("group", sort=False)}
    cells = {"Variable": groups[ALL]["variable"].tolist()}
    for name, lines in groups.items():
        cells[_capitalised(name)] = [_cell(line) for line in lines.to_dict("records")]
    cells["Missing"] = ["" if n == 0 else count_text(n) for n in groups[ALL]["missing"]]
    return pd.DataFrame(cells)


def _cell(line: dict[Any, Any]) -> str:
    """Return a count with its share, or a median with its quartiles, as text."""
    if isinstance(line["count"], str) or not np.isnan(line["count"]):
        share = "" if np.isnan(line["share"]) else f" ({percent(line['share'])})"
        return f"{count_text(line['count'])}{share}"
    low, middle, high = (
        f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}" for x in (line[name] for name in QUARTILES)
    )
    return NO_VALUE if middle == "nan" else f"{middle} ({low} to {high})"


def suppress_table_one(table: pd.DataFrame, min_cell: int, *, hide_events: bool) -> pd.DataFrame:
    """Hide small counts of a ``table_one``, and what tells them; drop the sizes of its groups."""
    sizes, sides = table[["rows", "patients"]], table["side"]
    table = table.drop(columns=[*sizes, "side"])
    if min_cell == 0:
        return table
    known_rows, a_row = sizes["rows"] - table["missing"], sizes["patients"] / sizes["rows"]
    rest = ((1 - table["share"]) * known_rows).round(6)
    counts = [table["missing"], known_rows, table["count"], rest]
    small = pd.concat([(n > 0) & (n * a_row < min_cell) for n in counts], axis=1)
    category = table["variable"].str.split("[_ ]", regex=True).str[0]  # unit_medical, unit_surgical
    category = table["variable"].where(table["count"].isna(), category)
    # Counts of outcomes, parts and categories add up: a small one hides those beside it.
    hidden = small.any(axis=1).groupby([category, sides]).transform("any")
    hidden |= hide_events & (sides == "outcome")  # these tell the number of events
    shown = table.astype({"missing": object, "count": object})
    shown.loc[known_rows * a_row < 4 * min_cell, QUARTILES] = np.nan  # few beyond a quartile
    shown.loc[hidden, ["share"]] = np.nan
    for k, name in ((0, "missing"), (2, "count")):
        shown.loc[hidden & table[name].notna(), name] = NOT_SHOWN
        shown.loc[hidden & small.iloc[:, k], name] = count_text(1, min_cell)
    return shown


CASE_MIX = {
    "patients": "Patients",
    "prevalence": "Prevalence of the event",
    "age": "Age in years, median (quartiles)",
    "women": "Women",
    "observations": "Observations, median (quartiles)",
}


def case_mix_topic(
    evaluated: Evaluated, development: Mapping[str, Any], here: Mapping[str, Any]
) -> Topic:
    """Return the topic of the ``case_mix`` of the training data and of the rows."""
    mixes = {
        name: suppress_case_mix(mix, evaluated.min_cell, hide_events=evaluated.has_few)
        for name, mix in (("Training data", development), ("Scored here", here))
    }
    cells = case_mix_cells(mixes, evaluated.noun)
    caption = (
        f"The training data beside these {evaluated.noun}; each patient counts once. Series and "
        "static features: median (quartiles) of the patients' medians, or the share of 1"
    )
    return Topic("Case mix", tables=[Cells(cells, caption)], numbers={"case_mix": cells})


def case_mix(
    rows: pd.DataFrame, medians: pd.DataFrame, min_patients: int = MIN_CELL
) -> dict[str, Any]:
    """Return counts, shares and quartiles of rows of ``demographics``; NaN is left out.

    Each patient counts once. Those of series and static features are the distributions of
    ``row_medians``.
    """
    of_rows = rows.assign(
        women=(rows["sex"] == "woman").where(rows["sex"] != UNKNOWN).astype(float)
    )
    patients = of_rows.groupby("patient")[["label", "women", "observations", "age"]]
    means, medians_of_rows = patients.mean(), patients.median()
    mix = {
        "rows": len(rows),
        "patients": len(means),
        "prevalence": means["label"].mean(),  # of known labels
        "women": means["women"].mean(),
    }
    for name in ("observations", "age"):
        quartiles = medians_of_rows[name].quantile([0.25, 0.5, 0.75])
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


def case_mix_cells(cohorts: Mapping[str, Mapping[str, Any]], noun: str) -> pd.DataFrame:
    """Return what is known of the ``case_mix`` of cohorts as text; a dash: not known of one."""
    titles = ({"rows": noun.capitalize()} if noun != "patients" else {}) | CASE_MIX
    mixes = [*cohorts.values()]
    lines = [
        (title, *(_case_mix_text(mix, name) for mix in mixes)) for name, title in titles.items()
    ]
    for kind in ("series", "static"):
        features = [mix.get(kind, {}) for mix in mixes]
        for name in {name: None for entries in features for name in entries}:
            if name in AGE and "age_median" in mixes[0]:
                continue  # it has a line already
            texts = (_entry_text(entries.get(name)) for entries in features)
            lines.append((name.removeprefix(STATIC), *texts))
    table = pd.DataFrame(lines, columns=["Case mix", *cohorts])
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


def largest_errors(evaluated: Evaluated) -> Topic:
    """Return the topic, which names rows."""
    view = evaluated.at(evaluated.targets[0])
    rows, model, labels = view.rows, view.model, pd.Series(view.labels, view.rows.index)
    error = (labels - rows[model]).abs()
    worst = rows.loc[error.sort_values(ascending=False, kind="stable").index[:MAX_ERRORS]]
    outcome = labels[worst.index].map({1: "event", 0: "no event"})
    risk = worst[model].map(percent)
    cells = pd.DataFrame({"Id": worst["id"].astype(str), "Outcome": outcome, "Risk": risk})
    caption = "The risks that are farthest from what happened"
    return Topic("Largest errors", tables=[Cells(cells, caption)])
