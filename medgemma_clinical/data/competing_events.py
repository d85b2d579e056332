"""Times to events that compete: their names, and the horizons at which risks are asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

OUTCOME_KINDS = ("label", "time")
"""What is learned of a row: a label, or the time of the first of some events."""

HOURS_OF_UNIT = {"h": 1.0, "d": 24.0}
"""Hours of a unit in which horizons are given."""


@dataclass(frozen=True)
class CompetingEvents:
    """What ``event`` and ``event_hours`` of a data set mean, and until when risks are asked for."""

    names: tuple[str, ...]  # of the events 1, 2, ...; the first is the one that is asked about
    horizons: tuple[float, ...]  # hours from the prediction time, rising
    interventions: tuple[int, ...] = ()  # those of the events that a treatment decision brings
    unit: str = "h"  # of horizons in the names of columns, of ``HOURS_OF_UNIT``

    @classmethod
    def from_config(cls, stored: Mapping[str, Any]) -> Self:
        """Read what a checkpoint's config stores, ``asdict`` of this class."""
        lists = {name: tuple(stored[name]) for name in ("names", "horizons", "interventions")}
        return cls(**lists, unit=str(stored["unit"]))

    @property
    def horizon_names(self) -> tuple[str, ...]:
        """The horizons as columns and metrics name them: 24h, 365d."""
        hours = HOURS_OF_UNIT[self.unit]
        return tuple(f"{horizon / hours:g}{self.unit}" for horizon in self.horizons)

    @property
    def horizon_risks(self) -> tuple[str, ...]:
        """The names of the risks while all events compete, one a horizon."""
        return self.risk_names[: len(self.horizons)]

    @property
    def words(self) -> str:
        """The events, their horizons and the interventions in words."""
        words = f"times to {', '.join(self.names)} by {', '.join(self.horizon_names)}"
        return words + (f", without {self.interventions_text}" if self.interventions else "")

    @property
    def interventions_text(self) -> str:
        """The interventions in words, empty without any."""
        return " or ".join(self.names[event - 1] for event in self.interventions)

    @property
    def assumption(self) -> str:
        """What a risk without interventions means, a sentence; empty where there is none."""
        if not self.interventions:
            return ""
        return (
            f"A risk without {self.interventions_text} is what would happen if nobody had it, and "
            "assumes that nothing but what the model reads decides both who has it and the outcome."
        )

    @property
    def risk_names(self) -> tuple[str, ...]:
        """The names of the risks: at each horizon, then as if there were no intervention."""
        names = [f"risk_{name}" for name in self.horizon_names]
        if self.interventions:
            word = re.sub(r"\W+", "_", self.interventions_text).strip("_")
            names += [f"risk_without_{word}_{name}" for name in self.horizon_names]
        return tuple(names)

    @property
    def risk_titles(self) -> dict[str, str]:
        """The risks in words, by their names."""
        titles = [f"{self.names[0]} by {name}" for name in self.horizon_names]
        without = [f"{title} without {self.interventions_text}" for title in titles]
        return dict(zip(self.risk_names, [*titles, *without], strict=False))


def words_of(events: CompetingEvents | None) -> str:
    """Return what is learned, in words."""
    return "a label" if events is None else events.words
