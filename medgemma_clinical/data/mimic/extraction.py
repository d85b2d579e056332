"""From the tables of a hospital to rows of the DKA format: the steps, each a file of SQL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.data.duck import Database, apply_rules, open_database
from medgemma_clinical.data.mimic.analytes import (
    ANALYTES,
    ANION_GAP,
    ItemSeries,
    find_factors,
)
from medgemma_clinical.data.mimic.description import describe_rows
from medgemma_clinical.data.mimic.hospital import Hospital
from medgemma_clinical.data.mimic.request import (
    COMPUTED_GAP,
    EXCLUDE,
    GAP_ITEM,
    REPORTED,
    CohortRequest,
    Extraction,
)
from medgemma_clinical.data.mimic.tables import MimicTables
from medgemma_clinical.data.texts import Reference

logger = logging.getLogger(__name__)

STEPS = Path(__file__).parent


def extract(request: Extraction) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make rows of the DKA format from MIMIC-IV.

    Raises:
        InputError: the tables cannot be read, or no admission is left.
    """
    return make_cohort(request, MimicTables)


def make_cohort(
    request: Any, hospital: Callable[[Database, Any], Hospital]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make rows of the DKA format from the tables of a hospital.

    Returns:
        The rows by ascending patient and admission, and the description beside them.

    Raises:
        InputError: the tables cannot be read, or no admission is left.
    """
    with open_database(request.out, request.memory_limit, request.threads) as database:
        return _Cohort(database, request, hospital(database, request)).make()


class _Cohort:
    """The steps that make a cohort, in their order.

    Args:
        database: that holds the tables.
        request: cohort, series, times and outcome.
        hospital: whose tables are read.
    """

    def __init__(self, database: Database, request: CohortRequest, hospital: Hospital) -> None:
        """Hold what the steps need."""
        self.database, self.request, self.hospital = database, request, hospital

    def make(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Run all steps."""
        self._set_variables()
        self.hospital.load_admissions()
        self._run("stays")
        series = self.hospital.choose_series()
        left_out = self._read_values(series)
        series = self._convert(series, left_out)
        self._log_values(left_out)
        for step in ("windows", "outcome", "rules"):
            self._run(step)
        flow = self._apply_rules()
        self._run("rows")
        rows = self._rows(series)
        counts = {"rows": self._counts(rows), "values": dict(sorted(left_out.items()))}
        described = describe_rows(self.hospital, series, {"flow": flow, **counts}, self.request)
        return rows, described

    def _run(self, step: str) -> None:
        self.database.run_file(STEPS / f"{step}.sql")

    def _set_variables(self) -> None:
        request = self.request
        self.database.set(
            cohort=request.cohort,
            window_length=request.window,
            horizon_length=request.horizon,
            min_observations=request.min_observations,
            outcome=request.parts,
            compute_gap=request.compute_gap,
            reported_gap=GAP_ITEM,
            computed_gap=COMPUTED_GAP,
        )

    def _read_values(self, series: list[ItemSeries]) -> dict[str, int]:
        """Make the tables analytes, series_items and converted.

        Returns:
            Counts of values by the reason for which they were left out or resolved.
        """
        names = [(item, a.name, f" ({a.unit})" if a.unit else "") for item, a in ANALYTES.items()]
        names.append((COMPUTED_GAP, ANION_GAP.name, f" ({ANION_GAP.unit})"))
        self.database.add(
            "analytes", pd.DataFrame(names, columns=["item", "analyte", "shown_unit"])
        )
        items = [(k, item) for k, each in enumerate(series) for item in each.items]
        self.database.add("series_items", pd.DataFrame(items, columns=["position", "item"]))
        self.database.set(main_is_gap=COMPUTED_GAP in series[0].items)
        sources = {item for each in series for item in each.sources}
        self.hospital.load_labs(sources | set(ANALYTES))
        self._run("values")
        counts = self.database.frame("FROM value_counts").iloc[0]
        return {str(reason): int(count) for reason, count in counts.items() if count}

    def _convert(self, series: list[ItemSeries], left_out: dict[str, int]) -> list[ItemSeries]:
        """Make the table converted, with the computed gaps; count values without a known unit.

        Returns:
            The series, each with its unit and its reference range.
        """
        units = self.database.frame(
            "SELECT item, unit, count(*) AS count FROM measured GROUP BY ALL ORDER BY ALL"
        )
        factors = find_factors(units, series, str(self.hospital.labs_path))
        known = factors["factor"].notna()
        self.database.add("factors", factors[known])
        self._run("gaps")
        for item, count in factors[~known].groupby("item")["count"].sum().items():
            name = ANALYTES[item].name if item in ANALYTES else f"item {item}"
            left_out[f"of {name} in no unit or an unknown one"] = int(count)
        spelled = factors[known].groupby("item")["unit"].min()
        rows = self.database.run("FROM reference_ranges").fetchall()
        ranges: dict[int, Reference] = {item: (low, high) for item, low, high in rows}
        return [
            replace(
                each,
                unit=spelled.get(each.items[0], "") if each.unit is None else each.unit,
                reference=self._reference(each.items, ranges),
            )
            for each in series
        ]

    def _reference(self, items: tuple[int, ...], ranges: dict[int, Reference]) -> Reference | None:
        """Return the reference range of the first of some items that has one.

        A series that may hold computed gaps has none: they lack potassium.
        """
        if COMPUTED_GAP in items and self.request.compute_gap != REPORTED:
            return None
        return next((ranges[item] for item in items if item in ranges), None)

    def _log_values(self, left_out: dict[str, int]) -> None:
        for reason, count in left_out.items():
            logger.info("%s: %d values %s", self.hospital.labs_path, count, reason)

    def _apply_rules(self) -> list[dict[str, Any]]:
        """Make the table kept, and log how the admissions became rows."""
        request, rules = self.request, self.database.frame("FROM rules ORDER BY stay")
        words = {
            "not_adult": "under 18 at admission, or of unknown age",
            "not_coded": "not coded as diabetic ketoacidosis",
            "no_value": "no value of the series known within a window of the admission",
            "before_admission": "prediction time before the admission",
            "dead": "died by the prediction time",
            "gone": "discharged by the prediction time",
            "too_few": f"fewer than {request.min_observations} values known within the window",
            "no_ketoacidosis": "not in ketoacidosis by what is known within the window",
            "in_intensive_care": "in intensive care at the prediction time",
            "excluded_discharge": "discharged alive within the horizon (--discharged exclude)",
            "not_measured": (
                "outcome not known: in hospital for the whole horizon, anion gap not measured again"
            ),
        }
        asked = {
            "not_coded": request.cohort == "dka",
            "no_ketoacidosis": request.cohort == "biochemical",
            "in_intensive_care": request.parts == ["icu"],
            "excluded_discharge": request.discharged == EXCLUDE,
            "not_measured": "unresolved" in request.parts,
        }
        never = [name for name, applies in asked.items() if not applies]
        candidates = rules.set_index("stay").drop(columns=never).rename(columns=words)
        left, flow = apply_rules(candidates, self.hospital.name)
        self.database.add("kept", left[left].index.to_frame())
        logger.warning("cohort %s: %s", request.cohort, self.hospital.cohorts[request.cohort])
        return flow

    def _rows(self, series: list[ItemSeries]) -> pd.DataFrame:
        """Return the rows, with a column for each series."""
        columns, joins = [], []
        for k, each in enumerate(series):
            unit = f" [{each.unit}]" if each.unit else ""
            name = f"trajectory_{each.name}{unit}" if k else "clinical_trajectory"
            columns.append(f'cell_{k}.cell AS "{name}"')
            joins.append(
                f"LEFT JOIN (FROM cells WHERE position = {k}) AS cell_{k} "
                f"ON cell_{k}.stay = facts.stay"
            )
        rows = self.database.frame(
            f"SELECT subject_id, hadm_id, {', '.join(columns)}, "
            "facts.* EXCLUDE (stay, subject_id, hadm_id) "
            f"FROM facts {' '.join(joins)} ORDER BY facts.stay"
        )
        flags = [name for name in map(str, rows) if name.startswith(("label_", "static_sex"))]
        return rows.astype(dict.fromkeys(flags, "Int8"))

    def _counts(self, rows: pd.DataFrame) -> dict[str, int]:
        """Count what the description says of the rows."""
        computed, discharged = self.database.row(
            "SELECT count(*) FILTER (gap_item = getvariable('computed_gap')), "
            "count(*) FILTER (discharged_alive) "
            "FROM kept JOIN windows USING (stay) JOIN outcomes USING (stay)"
        )
        if self.request.discharged != EXCLUDE:
            message = "discharged alive within the horizon, which is no event: %d rows"
            logger.info(message, discharged)
        return {
            "rows": len(rows),
            "patients": int(rows["subject_id"].nunique()),
            "events": int(rows["label_escalation"].sum()),
            "discharged_alive": discharged,
            "computed_gaps": computed,
        }
