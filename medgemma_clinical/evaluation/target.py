"""What is evaluated: of each row, whether an event came by a horizon, and whether that is known.

A label is the target that nobody left early. Letters: n rows, R draws of patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.evaluation.censoring import CensoringRegression, Watched
from medgemma_clinical.evaluation.metrics import LOGIT, Array, Known, Link
from medgemma_clinical.evaluation.time_metrics import CLOGLOG, check_horizon, known_at
from medgemma_clinical.files import InputError

NO_RISKS = ("id", "label", "event_hours", "event", "patient", "fold", "model_sha256")
UNCENSORED = "uncensored_"
"""Columns of a table of predictions that are no risks, and the beginning of those with the chance
that a row was watched until its event or horizon, where a regression tells it."""

DEPENDS = (
    "Whose follow-up ends early depends on the inputs, so these metrics may be wrong: --censoring "
    "regression weighs the rows by the inputs."
)


LINKS = {"logit": LOGIT, "cloglog": CLOGLOG}


@dataclass(frozen=True)
class Target:
    """The event that a risk is about, by a horizon.

    A table of predictions tells it: the number of the event (1 is the one that is asked about, 0
    none) stands in the column ``event``, how long each row was watched in ``event_hours``; without
    that column all were watched for long enough.
    """

    name: str  # of the risk
    title: str  # in words
    output: str  # the column of ``predict``
    horizon: float = 0.0  # hours
    ends: tuple[int, ...] = ()  # events that are taken for the end of a record
    event: str = "event"
    link: Link = CLOGLOG  # the scale on which risks are calibrated
    column_ending: str = ""  # of a model's column of risks in a table of predictions
    metric_ending: str = ""  # of the names of metrics
    watched: Watched | None = None  # Kaplan-Meier's weights where None
    note: str = ""  # what a page says of the weights
    event_name: str = "the event"
    assumption: str = ""  # by which the risk has its meaning

    def to_json(self) -> dict[str, Any]:
        """Return what ``metrics.json`` says of it."""
        names = [x.name for x in fields(self) if x.name not in ("link", "watched", "note")]
        link = next(name for name, link in LINKS.items() if link is self.link)
        own = {name: getattr(self, name) for name in names}
        return {**own, "ends": list(self.ends), "link": link}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` has written."""
        ends, link = tuple(content["ends"]), LINKS[content["link"]]
        return cls(**{**content, "ends": ends, "link": link})

    def column(self, model: str) -> str:
        """Return the column of a model's risks."""
        return f"{model}{self.column_ending}"

    def key(self, metric: str) -> str:
        """Return the name of a metric among those of all targets."""
        return f"{metric}{self.metric_ending}"

    def models(self, rows: pd.DataFrame) -> list[str]:
        """Return the models with risks in a table of predictions, in its order."""
        names = [name for name in map(str, rows) if is_risk(name)]
        end = self.column_ending
        return [name.removesuffix(end) for name in names if name.endswith(end)]

    def follow_up(self, rows: pd.DataFrame) -> tuple[Array, Array]:
        """Return how long each row was watched and what ended that, (n,) each."""
        event = rows[self.event].to_numpy(float)
        hours = rows["event_hours"].to_numpy(float) if "event_hours" in rows else 0 * event
        return hours, event

    def times(self, rows: pd.DataFrame) -> tuple[Array, Array]:
        """Return the ``follow_up`` that ends with the events which end a record, (n,) each."""
        hours, event = self.follow_up(rows)
        return hours, np.where(np.isin(event, self.ends), 0.0, event)

    def known(
        self,
        rows: pd.DataFrame,
        draws: Array | None = None,  # (R, n); each row once where None
        part: NDArray[np.generic] | slice = slice(None),
    ) -> Known:
        """Return what a table of predictions tells of a part of its rows."""
        hours, event = self.times(rows)
        draws = np.ones((1, len(rows))) if draws is None else draws
        given = None if self.watched is None else self.watched.under(draws)[..., part]
        return known_at(hours[part], event[part], self.horizon, draws[:, part], given, self.link)

    def labels(self, rows: pd.DataFrame) -> Array:
        """Return 1 where the event came by the horizon, else 0, NaN where that is unknown, (n,)."""
        known = self.known(rows)
        return np.where(known.weights[0] > 0, known.case, np.nan)

    def problem(self, rows: pd.DataFrame) -> str:
        """Return why some rows have no metrics, empty where they have."""
        if not len(rows):
            return "none left"
        labels = self.labels(rows)
        try:
            if np.isnan(labels).any():
                check_horizon(*self.times(rows), self.horizon)
        except ValueError as error:  # its horizons are hours
            return str(error)
        if len({*labels[~np.isnan(labels)]}) == 2:
            return ""
        by = f"horizon {self.horizon:g}: " if self.horizon else ""
        return f"{by}of those that are left all have, or all lack, the event"


LABEL = Target("label", "the event", "probability", event="label", link=LOGIT)


def is_risk(column: str) -> bool:
    """Return whether a column of a table of predictions holds risks."""
    return column not in NO_RISKS and not column.startswith(UNCENSORED)


def targets_of(events: CompetingEvents | None) -> tuple[Target, ...]:
    """Return the targets of events, the first of which is predicted; of a label where None."""
    if events is None:
        return (LABEL,)
    count, found = len(events.horizons), []
    for k, (name, title) in enumerate(events.risk_titles.items()):
        ends = events.interventions if k >= count else ()
        own = f"_{name.removeprefix('risk_')}" if k else ""
        horizon = events.horizons[k % count]
        found.append(
            Target(
                name,
                title,
                name,
                horizon,
                ends,
                column_ending=f" {name}",
                metric_ending=own,
                event_name=events.names[0],
                assumption=events.assumption if ends else "",
            )
        )
    return tuple(found)


def events_of(config: Mapping[str, Any]) -> CompetingEvents | None:
    """Return the events of a checkpoint's configuration; None of a label."""
    return CompetingEvents.from_config(config["events"]) if "events" in config else None


def targets_of_config(config: Mapping[str, Any]) -> tuple[Target, ...]:
    """Return the targets of a checkpoint's configuration."""
    return targets_of(events_of(config))


def check_horizons(dataset: TrajectoryDataset) -> None:
    """Refuse a horizon that too few rows are watched for."""
    rows = dataset.observed(np.arange(len(dataset)))
    for target in targets_of(dataset.competing_events):
        if not target.ends and target.horizon and (problem := target.problem(rows)):
            raise InputError(f"{dataset.source}: {problem}")


# --------------------------------------------------------------------------- weights


def weighing_inputs(dataset: TrajectoryDataset, rows: NDArray[np.int64]) -> Array:
    """Return what the end of follow-up of some rows may depend on, (n, p)."""
    table = dataset.baseline_inputs()["logistic regression"]
    return np.column_stack([table, dataset.static])[rows]


def observed_rows(
    targets: Sequence[Target],
    dataset: TrajectoryDataset,
    rows: NDArray[np.int64],
    censoring: str,  # km or regression
    seed: int,
) -> tuple[pd.DataFrame, tuple[Target, ...]]:
    """Return what happened to some rows of a data set, and targets with their weights."""
    observed = dataset.observed(rows)
    inputs = partial(weighing_inputs, dataset, rows)
    return observed, weighed(targets, observed, inputs, censoring, seed)


def weighed(
    targets: Sequence[Target],
    rows: pd.DataFrame,  # of predictions, or what happened alone
    inputs: Callable[[], Array],  # ``weighing_inputs``
    censoring: str,  # km or regression
    seed: int,
) -> tuple[Target, ...]:
    """Return targets with the weights of some rows, cross-fitted on them by patient."""
    groups, found = rows["patient"].to_numpy(str), []
    for target in targets:
        hours, event = target.follow_up(rows)
        reasons: list[CensoringRegression] = []
        watched, note = None, ""
        if ((event == 0) & (hours < target.horizon)).any():
            given = inputs(), target.horizon, groups, seed
            fitted = CensoringRegression(hours, event == 0, *given)
            by_inputs = censoring == "regression"
            reasons.append(fitted if by_inputs else fitted.without_inputs())
            note = "" if by_inputs or not fitted.depends else DEPENDS
            watched = Watched(reasons) if by_inputs else None
        if target.ends:
            given = inputs(), target.horizon, groups, seed
            reasons.append(CensoringRegression(hours, np.isin(event, target.ends), *given))
            watched = Watched(reasons)
        found.append(replace(target, watched=watched, note=note))
    return tuple(found)


def weight_columns(targets: Sequence[Target]) -> dict[str, Array]:
    """Return the ``UNCENSORED`` columns that let other code weigh the same rows."""
    return {
        f"{UNCENSORED}{target.name}": target.watched.probability
        for target in targets
        if target.watched is not None
    }


def read_weights(targets: Sequence[Target], rows: pd.DataFrame) -> tuple[Target, ...]:
    """Return targets with the weights that a table of predictions brings."""
    columns = {target.name: rows.get(f"{UNCENSORED}{target.name}") for target in targets}
    return tuple(
        target
        if (column := columns[target.name]) is None
        else replace(target, watched=Watched(given=column.to_numpy(float)))
        for target in targets
    )
