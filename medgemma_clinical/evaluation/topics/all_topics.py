"""The topics of a report on risks: those of the first target, then of further ones, folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from medgemma_clinical.evaluation.metrics import Array
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.target import Target
from medgemma_clinical.evaluation.topics.calibration import calibration_topic
from medgemma_clinical.evaluation.topics.decision_curve import decision
from medgemma_clinical.evaluation.topics.discrimination import discrimination, model_comparison
from medgemma_clinical.evaluation.topics.incidence import cumulative_incidence
from medgemma_clinical.evaluation.topics.subgroups import sites, subgroups
from medgemma_clinical.evaluation.topics.topic import (
    Cells,
    Details,
    Evaluated,
    Topic,
    TopicBuilder,
)
from medgemma_clinical.evaluation.verdicts import NO_VALUE

SIDE_BY_SIDE = (
    *("auroc", "scaled_brier", "observed", "mean_risk", "oe", "slope", "ici", "ici_ideal"),
    *("net_benefit", "effective_n", "weights_cut", "largest_weight"),
)
"""Metrics of which a page of several targets has a table; the others stand with each target."""


def prediction_topics(
    targets: Sequence[Target],
    before: Mapping[str, Array] | None = None,
    recalibration: str = "",
) -> list[TopicBuilder]:
    """Return what builds the sections of a report on the risks, in their order.

    ``before`` (n,): risks before the recalibration, by target, which ``recalibration`` describes.
    """
    calibration = partial(calibration_topic, before=before, recalibration=recalibration)
    builders = discrimination, calibration, decision, model_comparison, subgroups, sites
    first, *others = targets
    return [
        overview,
        *(partial(at_target, target=first, build=build) for build in builders),
        cumulative_incidence,
        *(
            partial(at_target, target=target, build=build, summary=f"The same for {target.title}")
            for target in others
            for build in builders
        ),
    ]


def overview(evaluated: Evaluated) -> Topic | None:
    """Return the topic of metrics of all targets side by side; None where there is one."""
    if len(evaluated.targets) == 1:
        return None
    columns = {}
    for target in evaluated.targets:
        values = evaluated.at(target).metrics.of(evaluated.model)
        columns[target.title] = {
            METRICS[name].title: METRICS[name].text(values.loc[name])
            for name in SIDE_BY_SIDE
            if name in values.index
        }
    table = pd.DataFrame(columns).fillna(NO_VALUE)
    table = table[(table != NO_VALUE).any(axis=1)].rename_axis("Metric").reset_index()
    meanings = {METRICS[name].title: METRICS[name].meaning for name in SIDE_BY_SIDE}
    return Topic(
        "Risks",
        [
            f"{evaluated.noun.capitalize()} whose follow-up ends before a horizon do not count as "
            "without the event: those that are watched for longer stand for them, by weights."
        ],
        [Cells(table, "How good the risks are [95 %]", is_wide=True)],
        details=[Details("What the metrics are", terms=meanings)],
    )


def at_target(
    evaluated: Evaluated, target: Target, build: TopicBuilder, summary: str = ""
) -> Topic | None:
    """Return the topic of one target; None where it is not measured, or small counts hide it."""
    view = evaluated.at(target)
    oe = view.metrics.of(view.model)["value"].get("oe", float("nan"))
    if view.has_few or pd.isna(oe) or (topic := build(view)) is None:
        return None
    if len(evaluated.targets) == 1:
        return topic
    return replace(
        topic,
        title=f"{topic.title}: {target.title}",
        figures={target.key(name): figure for name, figure in topic.figures.items()},
        numbers={target.key(name): table for name, table in topic.numbers.items()},
        summary=summary,
    )
