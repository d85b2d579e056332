"""What the cohort needs of a data base: its tables in the form that MIMIC-IV gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from medgemma_clinical.data.mimic.analytes import ItemSeries


class Hospital(Protocol):
    """The tables of a hospital, in the form that MIMIC-IV gives them."""

    name: str
    """Of the folder, for messages."""
    source: str
    """Of the data, with their terms."""
    command: str
    """That reads them."""
    hashes: dict[str, str]
    """SHA-256 of each file that was read."""
    labs_path: Path
    """Of the laboratory values, for messages."""
    has_storing_times: bool
    """Whether values have times of storing."""
    cohorts: dict[str, str]
    """Definition of each cohort."""

    def load_admissions(self) -> None:
        """Make the tables patients, admissions, icustays and ketoacidosis.

        The last holds hadm_id of each code, and when it was entered, NULL for codes of discharge.
        """

    def choose_series(self) -> list[ItemSeries]:
        """Return the series that are asked for, the main one first."""

    def load_labs(self, items: set[int]) -> None:
        """Make the table labs of these items, of patients in the table wanted."""
