"""Predictions of times to events that the tests of pages share: deaths, transplants, censored."""

import numpy as np
import pandas as pd

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.models.hazards import Hazards
from medgemma_clinical.models.outcome import TimeOutcome
from pages import MODEL

__all__ = ["EVENTS", "MODEL", "OUTCOME", "make_times"]

EVENTS = CompetingEvents(("death", "transplant"), (24.0, 72.0), (2,))
OUTCOME = TimeOutcome(Hazards(EVENTS, (24.0, 72.0), (1.0, 1.0)))


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
        rows[model] = risks[0]
        rows = rows.assign(
            **{f"{model} {k}": x for k, x in zip(EVENTS.risk_names, risks, strict=True)}
        )
    given = rng.uniform(0.4, 1, n)
    return rows.assign(**{f"uncensored {name}": given for name in EVENTS.risk_names[2:]})
