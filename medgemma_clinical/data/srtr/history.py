"""The history of a registration up to the landmark: which rows count, and their values."""

from __future__ import annotations

import logging

import pandas as pd

from medgemma_clinical.data.srtr.codes import DIALYSIS, LARGEST_VALUE, YES_NO, Feature
from medgemma_clinical.data.srtr.cohort import CohortDefinition
from medgemma_clinical.data.srtr.decode import read_saf
from medgemma_clinical.data.srtr.files import SafFile
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

MEANINGS = {FLAGS: "0 and 1", CODES: "codes as in CAN_DIAL"}

CODES_ONLY = {2, 3, 4, 5, 998, 999}
"""Cells that only codes hold; 998 and 999 are unknown."""


def read_history(
    file: SafFile,
    definition: CohortDefinition,
    listed: pd.Series,
    *,
    dated: bool,
    dialysis_source: str | None = None,
) -> tuple[pd.DataFrame, str]:
    """Read the rows that began by the landmark, of the registrations in ``listed``.

    All of them began before the end, since a registration that ends by the landmark is not in the
    cohort. The last row before listing stands at day 0 where no row begins on that day.

    Args:
        file: STATHIST of the organ.
        definition: organ and landmark.
        listed: day of listing by PX_ID.
        dated: whether CAND has CAN_DIAL_DT.
        dialysis_source: ``FLAGS`` or another of these, as the training data were read; None decides
            by the whole table, so that no registration's value depends on the others kept.

    Returns:
        ``PX_ID``, ``day`` since listing (0 at least), and a column for each feature, NaN where not
        measured; and the source of dialysis.

    Raises:
        InputError: as ``read_saf``, or the table contradicts ``dialysis_source``.
    """
    features = definition.organ.features
    dialysis = next(f for f in features if f.name == DIALYSIS.name)
    costs = {f.column: f"the history holds no {f.name}" for f in features}
    keys = {"PX_ID": "", "CANHX_BEGIN_DT": "", "CANHX_BEGIN_TM": "the file orders rows of a day"}
    kept = []
    dialysis_cells: set[float] = set()
    for chunk in read_saf(file, {**keys, **costs}):
        dialysis_cells.update(chunk[dialysis.column].dropna().unique())
        # NaN, and so left out, outside the cohort and for an impossible date.
        day = chunk["CANHX_BEGIN_DT"] - chunk["PX_ID"].map(listed)
        kept.append(chunk.assign(day=day)[day <= definition.landmark])
    rows = pd.concat(kept, ignore_index=True).sort_values("CANHX_BEGIN_TM", kind="stable")
    start = rows["day"].where(rows["day"] <= 0).groupby(rows["PX_ID"]).transform("max")
    rows = rows[~(rows["day"] < start)]
    source = _dialysis_source(file, dialysis, dialysis_cells, dialysis_source, dated=dated)
    values = {f.name: f.decode(rows[f.column]) for f in features}
    values[dialysis.name] = rows[dialysis.column].map(DIALYSIS_VALUES.get(source, {})).astype(float)
    for feature in features:
        unread = int((rows[feature.column].notna() & values[feature.name].isna()).sum())
        if unread:
            message = "%s, column %s: %d cells hold no known code or value: not measured"
            logger.warning(message, file.path, feature.column, unread)
    table = pd.DataFrame({"PX_ID": rows["PX_ID"], "day": rows["day"].clip(lower=0), **values})
    return table, source


def _dialysis_source(
    file: SafFile, dialysis: Feature, cells: set[float], given: str | None, *, dated: bool
) -> str:
    """Decide where dialysis is read, by all cells of the history's column."""
    where = f"{file.path}, column {dialysis.column}"
    may_be_coded = dialysis.column == DIALYSIS.column  # the liver's column is Y or N
    coding = FLAGS if cells & ({0} if may_be_coded else {0, 1}) else None
    if may_be_coded and cells & CODES_ONLY:
        coding = CODES
    if given is not None:
        if given in (FLAGS, CODES) and coding not in (given, None):
            raise InputError(
                f"{where}: holds {MEANINGS[str(coding)]}, in the training data {MEANINGS[given]}: "
                "convert the column"
            )
        return given
    if coding and any(cell in DIALYSIS_VALUES[coding] for cell in cells):
        return coding
    if cells == {1}:
        logger.warning("%s: holds 1 alone, yes or CAN_DIAL's no: not used", where)
    return DATES if dated else NOWHERE


def one_row_a_day(
    rows: pd.DataFrame, cohort: pd.DataFrame, definition: CohortDefinition, *, dialysis_source: str
) -> pd.DataFrame:
    """Join the rows of a day, the later value counting, with what CAND itself dates.

    A date behind the landmark reads exactly as a missing one: both mean "not by then".

    Args:
        rows: from ``read_history``.
        cohort: of CAND, by PX_ID.
        definition: gives the landmark.
        dialysis_source: from ``read_history``.
    """
    cohort = cohort[cohort.index.isin(rows["PX_ID"])]  # a registration needs a history row
    features = list(rows.columns[2:])
    gfr = cohort["CAN_GFR"].where(cohort["CAN_GFR"].abs() <= LARGEST_VALUE)
    dated = {"GFR": (cohort["CAN_GFR_DT"], gfr)}
    if dialysis_source == DATES:
        dated[DIALYSIS.name] = (cohort["CAN_DIAL_DT"], pd.Series(1.0, index=cohort.index))
    for name, (date, value) in dated.items():
        day = (date - cohort["CAN_LISTING_DT"]).clip(lower=0)
        new = pd.DataFrame({"day": day, name: value})[day <= definition.landmark].dropna()
        rows = pd.concat([new.reset_index(), rows])  # the history's own value comes later
    rows = rows.groupby(["PX_ID", "day"], as_index=False)[features].last()
    if dialysis_source == DATES:
        rows[DIALYSIS.name] = rows.groupby("PX_ID")[DIALYSIS.name].ffill().fillna(0.0)
    return rows.dropna(subset=features, how="all")
