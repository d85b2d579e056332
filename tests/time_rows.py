"""Predictions of times to events that the tests of pages share: deaths, transplants, censored."""

import numpy as np
import pandas as pd

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation.target import UNCENSORED, read_weights, targets_of
from medgemma_clinical.models.hazards import Hazards
from pages import MODEL

__all__ = ["EVENTS", "MODEL", "OUTCOME", "TARGETS", "make_times", "weighed_targets"]

EVENTS = CompetingEvents(("death", "transplant"), (24.0, 72.0), (2,))
OUTCOME = Hazards(EVENTS, (24.0, 72.0), (1.0, 1.0))
TARGETS = targets_of(EVENTS)


def make_times(n=400, seed=0):
    """Draw rows and their true risks, beside those of a worse baseline."""
    rng = np.random.default_rng(seed)
    sick = rng.normal(size=n)
    rates = np.exp([-5.1 + 0.9 * sick, -4.9 + 0.5 * sick, np.full(n, -5.3)])
    ends = rng.exponential(1 / rates)
    rows = pd.DataFrame({"id": np.arange(n).astype(str), "patient": np.arange(n).astype(str)})
    rows["event_hours"] = ends.min(axis=0).round(1)
    rows["event"] = np.array([1.0, 2, 0])[ends.argmin(axis=0)]
    for model, noise in ((MODEL, 0), ("blend", 1)):
        first, second, _ = rates * np.exp(noise * rng.normal(size=n))
        risks = [first / (first + second) * -np.expm1(-(first + second) * x) for x in (24, 72)]
        risks += [-np.expm1(-first * x) for x in (24, 72)]
        columns = [target.column(model) for target in TARGETS]
        rows = rows.assign(**dict(zip(columns, risks, strict=True)))
    given = rng.uniform(0.4, 1, n)
    return rows.assign(**{f"{UNCENSORED}{name}": given for name in EVENTS.risk_names[2:]})


def weighed_targets(rows):
    """Return the targets with the weights that the rows bring."""
    return read_weights(TARGETS, rows)
