"""Times to events that compete: their metrics at each horizon."""

from __future__ import annotations

import pandas as pd

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation.time_table import TIME_METRICS, metric_name
from medgemma_clinical.evaluation.topics.topic import Cells, Evaluated, Topic, TopicBuilder
from medgemma_clinical.evaluation.verdicts import NO_VALUE, value_text


def times_topic(events: CompetingEvents) -> TopicBuilder:
    """Return what builds the topic of these events."""

    def times(evaluated: Evaluated) -> Topic:
        values, lines = evaluated.metrics.of(evaluated.model), []
        for metric, (title, form, meaning) in TIME_METRICS.items():
            keys = {name: metric_name(metric, name, events) for name in events.risk_names}
            texts = {
                name: value_text(values.loc[key], form) if key in values.index else NO_VALUE
                for name, key in keys.items()
            }
            lines.append({"Metric": title, **texts, "Meaning": meaning})
        table = pd.DataFrame(lines)
        table = table[(table[[*events.risk_names]] != NO_VALUE).any(axis=1)]
        text = (
            f"The risk of {events.names[0]} by each horizon, while {', '.join(events.names[1:])} "
            "may come first. Who is not watched for as long counts by weights, not as without it."
        )
        return Topic(
            "Risks",
            [text, *filter(None, [events.assumption])],
            [Cells(table, "How good the risks are at each horizon [95 %]", is_wide=True)],
            numbers={"metrics": evaluated.metrics.table.reset_index()},
        )

    return times
