"""A measured variable, as a file, a table or a format names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medgemma_clinical.data.texts import Reference


@dataclass(frozen=True)
class Feature:
    """A measured variable, in any format.

    Attributes:
        name: in texts.
        unit: of its values, empty where it has none, None where the tables have to tell it.
        keys: where its values stand: a column, codes of events, item numbers.
        plausible: lowest and highest value of a living patient, None where unknown.
        reference: lowest and highest value of a healthy adult, None where unknown.
        words: for values, where the feature is a state or a grade.
    """

    name: str
    unit: str | None = ""
    keys: tuple[str | int, ...] = ()
    plausible: tuple[float, float] | None = None
    reference: Reference | None = None
    words: Mapping[int, str] | None = None

    @property
    def title(self) -> str:
        """Name and unit, as the name of a column has them: ``Lactate [mmol/L]``."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name
