"""A measured variable, as a file, a table or a format names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medgemma_clinical.data.texts import Reference


@dataclass(frozen=True)
class Feature:
    """A measured variable, in any format."""

    name: str
    unit: str | None = ""  # empty where it has none, None where the tables have to tell it
    keys: tuple[str | int, ...] = ()  # where its values stand: a column, event codes, items
    plausible: tuple[float, float] | None = None  # lowest and highest of a living patient
    reference: Reference | None = None  # lowest and highest of a healthy adult
    words: Mapping[int, str] | None = None  # for values, where it is a state or a grade

    @property
    def title(self) -> str:
        """Name and unit, as the name of a column has them: ``Lactate [mmol/L]``."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name
