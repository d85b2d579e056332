"""The history of a registration up to the landmark: which rows count, and their values."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from medgemma_clinical.data.srtr.codes import DIALYSIS, HISTORY_CODES, YES_NO
from medgemma_clinical.data.srtr.cohort import CohortDefinition
from medgemma_clinical.data.srtr.saf import read_saf
from medgemma_clinical.files import InputError

logger = logging.getLogger(__name__)

FLAGS, CODES, DATES, NOWHERE = "history flags", "history codes", "dialysis date", "nowhere"
"""Where dialysis is read: from a column of the history that holds 0 and 1, or codes as CAN_DIAL
has them; from CAN_DIAL_DT; from nowhere."""

DIALYSIS_VALUES: dict[str, dict[int, int]] = {
    FLAGS: {value: value for value in YES_NO},
    CODES: {1: 0, 2: 1, 3: 1, 4: 1, 5: 1},
}
"""Value of each cell, by coding. In CAN_DIAL 1 means none. Source: SRTR SAF, CAN_DIAL."""

CODES_ONLY = {2, 3, 4, 5, 998, 999}  # cells that only codes hold; 998 and 999 are unknown

MAX_VALUE = 1e6
"""No laboratory value is larger; beyond it a cell counts as not measured."""


def read_history(
    path: Path,
    definition: CohortDefinition,
    cohort: pd.DataFrame,
    dialysis: str | None = None,  # where the training data had it; None: by all rows of the table
) -> tuple[pd.DataFrame, str]:
    """Read a cohort's history up to the landmark, one row a day, and where dialysis is read."""
    features = definition.organ.features
    column_of = {feature.name: str(feature.keys[0]) for feature in features}
    costs = {column: f"the history holds no {name}" for name, column in column_of.items()}
    keys = {"PX_ID": "", "CANHX_BEGIN_DT": "", "CANHX_BEGIN_TM": "the file orders rows of a day"}
    listing_days, chunks, dialysis_cells = cohort["CAN_LISTING_DT"], [], set[float]()
    for chunk in read_saf(path, {**keys, **costs}):
        table = chunk.reindex(columns=[*keys, *costs])
        dialysis_cells.update(table[column_of[DIALYSIS.name]].dropna().unique())
        # NaN, and so left out, outside the cohort and for an impossible date.
        day = table["CANHX_BEGIN_DT"] - table["PX_ID"].map(listing_days)
        chunks.append(table.assign(day=day)[day <= definition.landmark])
    rows = pd.concat(chunks, ignore_index=True).sort_values("CANHX_BEGIN_TM", kind="stable")
    # The last row before listing stands at day 0 where no row begins on that day.
    start = rows["day"].where(rows["day"] <= 0).groupby(rows["PX_ID"]).transform("max")
    rows = rows[~(rows["day"] < start)]
    where = f"{path}, column {column_of[DIALYSIS.name]}"
    may_be_coded = column_of[DIALYSIS.name] == DIALYSIS.keys[0]  # the liver's column is Y or N
    source = _dialysis_source(
        where, dialysis_cells, dialysis, may_be_coded, "CAN_DIAL_DT" in cohort
    )
    table = pd.DataFrame({"PX_ID": rows["PX_ID"], "day": rows["day"].clip(lower=0)})
    for feature in features:
        cells = rows[column_of[feature.name]]
        codes = HISTORY_CODES.get(column_of[feature.name])
        if feature.name == DIALYSIS.name:
            codes = DIALYSIS_VALUES.get(source, {})
        is_valid = cells.isin(feature.words) if feature.words else cells.abs() <= MAX_VALUE
        values = cells.where(is_valid) if codes is None else cells.map(codes).astype(float)
        if unread_cells := int((cells.notna() & values.isna()).sum()):
            message = "%s, column %s: %d cells hold no known code or value: not measured"
            logger.warning(message, path, cells.name, unread_cells)
        table[feature.name] = values
    return _one_row_a_day(table, cohort, definition, source), source


def _dialysis_source(
    where: str, cells: set[float], trained: str | None, may_be_coded: bool, has_dates: bool
) -> str:
    """Decide where dialysis is read by all cells, so that no value depends on who is kept."""
    coding = FLAGS if cells & ({0} if may_be_coded else {0, 1}) else None
    if may_be_coded and cells & CODES_ONLY:
        coding = CODES
    if trained is not None:
        if trained in (FLAGS, CODES) and coding not in (trained, None):
            raise InputError(f"{where}: not coded as in the training data ({trained}): convert it")
        return trained
    if coding and any(cell in DIALYSIS_VALUES[coding] for cell in cells):
        return coding
    if cells == {1}:
        logger.warning("%s: holds 1 alone, yes or CAN_DIAL's no: not used", where)
    return DATES if has_dates else NOWHERE


def _one_row_a_day(
    rows: pd.DataFrame, cohort: pd.DataFrame, definition: CohortDefinition, dialysis: str
) -> pd.DataFrame:
    cohort = cohort[cohort.index.isin(rows["PX_ID"])]  # a registration needs a history row
    features = list(rows.columns[2:])
    dated_columns = {
        "GFR": (cohort["CAN_GFR_DT"], cohort["CAN_GFR"].where(cohort["CAN_GFR"].abs() <= MAX_VALUE))
    }
    if dialysis == DATES and "CAN_DIAL_DT" in cohort:
        dated_columns[DIALYSIS.name] = (cohort["CAN_DIAL_DT"], pd.Series(1.0, index=cohort.index))
    for name, (date, value) in dated_columns.items():
        day = (date - cohort["CAN_LISTING_DT"]).clip(lower=0)
        # A date behind the landmark reads as a missing one: both mean "not by then".
        further = pd.DataFrame({"day": day, name: value})[day <= definition.landmark].dropna()
        rows = pd.concat([further.reset_index(), rows])  # the history's own value comes later
    rows = rows.groupby(["PX_ID", "day"], as_index=False)[features].last()
    if dialysis == DATES:
        rows[DIALYSIS.name] = rows.groupby("PX_ID")[DIALYSIS.name].ffill().fillna(0.0)
    return rows.dropna(subset=features, how="all")
