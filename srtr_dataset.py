"""SRTRTrajectoryDataset: the waiting list of one organ in SRTR's Standard Analysis Files (SAF).

Usage:
    python srtr_dataset.py check --data_dir DIR --organ liver    # read a folder, print its summary

DIR holds CAND_KIPA and STATHIST_KIPA (kidney) or CAND_LIIN and STATHIST_LIIN (liver) as SRTR
delivers them (.sas7bdat), or as CSV, Stata or Parquet, there or one folder down.

At a landmark L days after listing, the question about each registration that still waits is: death,
or removal because too sick, within the next H days? Or, with ``--outcome_kind time``: what ends the
wait, and when? Inputs are the history rows that began by day L. A data set's times are hours since
listing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.commands.command_line import (
    SHOW_VALUES,
    VERSION,
    Parser,
    parse_days,
    run_command,
)
from medgemma_clinical.commands.logs import command_logging
from medgemma_clinical.data import checks, texts
from medgemma_clinical.data.competing_events import OUTCOME_KINDS, CompetingEvents
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.srtr import cohort as waiting_list
from medgemma_clinical.data.srtr.codes import ORGANS
from medgemma_clinical.data.srtr.history import read_history
from medgemma_clinical.data.srtr.saf import find_table
from medgemma_clinical.data.texts import Clause, PromptOptions, plain
from medgemma_clinical.data.trajectories import ScoringRows, TrajectoryDataset
from medgemma_clinical.files import InputError, one_line
from medgemma_clinical.flags import Flag

__all__ = ["ORGANS", "InputError", "SRTRTrajectoryDataset", "main"]

logger = logging.getLogger(__name__)

HOURS_A_DAY = 24.0
MIN_EVENTS = 10

MAX_LEN = 50  # observations kept of a registration

LATEST_IN_TEXT = 8
"""Latest values of a feature in a prompt: a liver history can hold fifty rows."""


class SRTRTrajectoryDataset(TrajectoryDataset):
    """Registrations on the waiting list of one organ that still wait at the landmark.

    Args:
        data_dir: folder with the SAF tables.
        organ: ``kidney`` or ``liver``.
        landmark_days: days after listing at which the question is asked; 365 kidney, 90 liver.
        horizon_days: days that it looks ahead; 365 kidney, 90 liver. Of times several, rising.
        max_len: only the most recent so many observations of a registration are kept.
        transplant: meaning of a transplant within the horizon: ``negative`` (label 0, a competing
            event) or ``exclude`` (left out).
        outcome_kind: ``label``; or ``time``: what ends each registration, one of ``END_NAMES`` with
            the transplant as an intervention, and when; the end of follow-up is censored.
        removals: of times, whether removal as improved is an event ``apart`` from other removals.
        dialysis: where dialysis is read, ``history.FLAGS`` or another of these; None decides by the
            whole history table. A checkpoint keeps the training data's in ``read_options``.
        require_labels: leave out registrations whose label is unknown, and refuse folders with too
            few events; False where new patients are scored; None does the former alone, if there
            are enough events.

    Attributes:
        flow: how many registrations each rule removed, and left: columns ``FLOW_COLUMNS``.
        registrations: all in the organ's file, by PX_ID: ``reason`` ("" where kept), ``label``, of
            times ``event`` and ``event_days`` from the landmark.

    Raises:
        InputError: files that cannot be read, no registration left, or fewer than ten events.
    """

    name = "srtr"
    kind = "SRTR Standard Analysis Files"
    source_flag = "data_dir"
    options = (
        *("organ", "landmark_days", "horizon_days", "transplant", "max_len", "outcome_kind"),
        "removals",
    )
    merging = "--removals together"
    outcome = "Death or too sick for transplant"
    report_hours = HOURS_A_DAY
    row_noun = "registrations"

    parts = None
    flow: pd.DataFrame

    def __init__(
        self,
        data_dir: str | Path,
        organ: str = "kidney",
        *,
        landmark_days: int | None = None,
        horizon_days: int | Sequence[int] | None = None,
        max_len: int | None = None,
        transplant: str = "negative",
        outcome_kind: str = "label",
        removals: str = "apart",
        dialysis: str | None = None,
        require_labels: bool | None = True,
    ) -> None:
        """Read both tables, decide who is in the cohort, and fill the arrays."""
        days = ORGANS[organ].days if organ in ORGANS else 0
        landmark = days if landmark_days is None else landmark_days
        horizon = days if horizon_days is None else horizon_days
        self.definition = waiting_list.CohortDefinition(
            organ, landmark, horizon, transplant, outcome_kind, removals
        )
        horizons = self.definition.horizons
        max_len = MAX_LEN if max_len is None else max_len
        if max_len < 1:
            raise InputError(f"--max_len {max_len}: must be at least 1")
        self.source = one_line(str(data_dir))
        self.measures = self.definition.organ.features
        self.features = tuple(feature.name for feature in self.measures)
        self.units = tuple(str(feature.unit) for feature in self.measures)
        self.main = self.features.index(self.definition.organ.main)
        self.time_scale = days * HOURS_A_DAY
        until = f"within {horizons[0]} days of" if len(horizons) == 1 else "after"
        self.question = (
            f"Will this patient die or become too sick for a {organ} transplant {until} "
            f"day {landmark}?"
        )
        if self.definition.of_times:
            hours = tuple(days * HOURS_A_DAY for days in horizons)
            interventions = (waiting_list.TRANSPLANT_END,)
            self.competing_events = CompetingEvents(
                self.definition.end_names, hours, interventions, unit="d"
            )
        dialysis = self._read(Path(data_dir), max_len, dialysis, require_labels)
        self.read_options = {
            "organ": organ,
            "landmark_days": landmark,
            "horizon_days": horizons[0],
            "transplant": transplant,
            "max_len": max_len,
            "dialysis": dialysis,
        }
        if self.definition.of_times:
            self.read_options |= {"horizon_days": [*horizons], "outcome_kind": outcome_kind}
            self.read_options["removals"] = removals

    # ------------------------------------------------------------------ reading

    def _read(
        self, folder: Path, max_len: int, dialysis: str | None, require_labels: bool | None
    ) -> str:
        """Read both tables and fill the arrays; return where dialysis is read."""
        definition, suffix = self.definition, self.definition.organ.suffix
        cand = waiting_list.read_candidates(find_table(folder, f"cand_{suffix}"))
        table = waiting_list.apply_criteria(cand, definition)
        is_unknown = table["reason"].isin([waiting_list.TRANSPLANTED, waiting_list.CENSORED])
        may_stay = (table["reason"] == "") | (is_unknown & (require_labels is not True))
        history = find_table(folder, f"stathist_{suffix}")
        rows, dialysis = read_history(history, definition, cand[may_stay], dialysis)
        has_row = table.index.isin(rows["PX_ID"])
        if require_labels is None:
            require_labels = table.loc[has_row, "label"].sum() >= MIN_EVENTS
        if not require_labels:
            table.loc[is_unknown, "reason"] = ""
        table.loc[(table["reason"] == "") & ~has_row, "reason"] = waiting_list.NO_ROW
        in_cohort = table["reason"] == ""
        table["label"] = table["label"].where(in_cohort)
        self.registrations = table
        self._take_outcomes(table[in_cohort])
        self._set_flow(MIN_EVENTS if require_labels else 0, cand["PERS_ID"])
        self._take_candidates(cand[in_cohort])
        lengths = self._take_history(rows[rows["PX_ID"].map(in_cohort)], max_len)
        if require_labels and (lengths > max_len).any():
            logger.info("%s: %s", self.source, checks.describe_cut(lengths, self.groups, max_len))
        return dialysis

    def _take_outcomes(self, ends: pd.DataFrame) -> None:
        self.labels = ends["label"].to_numpy(np.float64)
        if self.definition.of_times:
            self.events = ends["event"].to_numpy(np.float64)
            self.event_hours = ends["event_days"].to_numpy(np.float64) * HOURS_A_DAY

    def _take_candidates(self, cohort: pd.DataFrame) -> None:
        self.ids = cohort.index.to_numpy().astype(np.str_)
        self.groups = cohort["PERS_ID"].to_numpy().astype(np.str_)
        self.contexts = waiting_list.contexts(cohort, self.definition)
        static = waiting_list.static_features(cohort, self.definition)
        self.static_names = tuple(map(str, static))
        self.static = static.to_numpy()
        self.prediction_hours = np.full(len(self), self.definition.landmark * HOURS_A_DAY)

    def _take_history(self, rows: pd.DataFrame, max_len: int) -> NDArray[np.int64]:
        """Fill the observations; return how many each registration had before the cut."""
        self.times = rows["day"].to_numpy(np.float64) * HOURS_A_DAY
        self.values = rows[list(self.features)].to_numpy(np.float64)
        self.offsets = np.append(0, rows.groupby("PX_ID").size().cumsum())
        lengths = self.lengths
        self.keep_latest(max_len)
        return lengths

    def _set_flow(self, min_events: int, people: pd.Series) -> None:
        """Count what each rule removed; refuse a cohort of nobody or of too few events."""
        removed = self.registrations["reason"].value_counts(sort=False).drop("")
        flow = removed.rename_axis("rule").reset_index(name="removed")
        left = len(self.registrations) - flow["removed"].cumsum()
        reason, rules = self.registrations["reason"], flow["rule"].tolist()
        patients = [people[~reason.isin(rules[: k + 1])].nunique() for k in range(len(rules))]
        self.flow = flow.assign(left=left, patients=patients)
        events = int(np.nansum(self.labels))
        if not len(self) or events < min_events:
            counts = "; ".join(f"{rule} {count}" for rule, count in removed.items() if count)
            raise InputError(
                f"{self.source}: {len(self) or 'no'} registrations left with {events} events, "
                f"{min_events} are needed; of {len(self.registrations)} the rules took: {counts}"
            )

    @classmethod
    def scoring_rows(
        cls,
        source: Any,
        config: Mapping[str, Any],
        findings: Findings,
        max_rows: int,
        description: Any = None,
    ) -> Iterator[ScoringRows]:
        """Read a folder as the checkpoint's was, also registrations without a known outcome.

        A table is read whole or refused: nothing is noted in ``findings``.

        Raises:
            InputError: the folder lacks the checkpoint's organ, or cannot be read.
        """
        organ = config["read_options"]["organ"]
        if description is not None:
            raise InputError(f"{findings.source}: SRTR's files need no description: leave it out")
        try:
            dataset = cls(source, **config["read_options"], require_labels=False)
        except InputError as error:
            raise InputError(f"{error} (the checkpoint was trained on {organ})") from error
        if (config["features"], config["units"]) != (list(dataset.features), list(dataset.units)):
            raise InputError("the checkpoint's features differ from this program's: train again")
        dataset.question = config["question"]
        for start in range(0, len(dataset), max_rows):
            numbers = np.arange(start, min(start + max_rows, len(dataset)))
            chunk = dataset.subset(numbers)
            positions = np.arange(len(chunk))
            yield ScoringRows(chunk.ids, numbers, chunk, positions, start + len(chunk))

    # ------------------------------------------------------------------ meaning

    def task_description(self) -> dict[str, str]:
        """Return what is predicted, when, and the meaning of a transplant."""
        definition, days = self.definition, " and ".join(map(str, self.definition.horizons))
        transplant = "counts as no event (label 0), since it is a competing one"
        if definition.of_times:
            transplant = "is an event of its own, as is removal as improved or for another reason"
        elif definition.transplant == "exclude":
            transplant = "leaves the cohort"
        return {
            **super().task_description(),
            "Prediction time": (
                f"day {definition.landmark} after listing for a {definition.organ_name}, of each "
                "registration that still waits then; only what was recorded by that day is read"
            ),
            "Horizon": f"{days} days from then on",
            "A transplant within the horizon": transplant,
        }

    def baseline_inputs(self) -> dict[str, pd.DataFrame]:
        """Return what each simple model may see, N rows each, with the waiting list's usual ones.

        Source: MELD, Kamath 2001; age and years of dialysis, as in Hart 2016.
        """
        inputs = super().baseline_inputs()
        if self.definition.organ_name == "kidney":
            table = self.static_table([waiting_list.AGE, waiting_list.DIALYSIS_YEARS])
            return {**inputs, "age and years of dialysis": table}
        meld = inputs["logistic regression"][["MELD last"]]
        with_age = meld.join(self.static_table([waiting_list.AGE]))
        return {**inputs, "last MELD": meld, "last MELD and age": with_age}

    # ------------------------------------------------------------------ texts

    def value_text(self, feature: int, value: float) -> str:
        """Return a value with its unit, or the word of a state."""
        measure = self.measures[feature]
        return _text(measure, value) if measure.words else super().value_text(feature, value)

    def series_text(self, i: int, options: PromptOptions) -> str:
        """Return the latest values of each series with their days; of a state only its changes."""
        last_alone = options.series == "last"
        latest = 1 if last_alone else min(options.latest or LATEST_IN_TEXT, LATEST_IN_TEXT)
        computed = options.computed and not last_alone
        lines = []
        for f, times, values in self.measured(i):
            if options.series == "main" and f != self.main:
                continue
            feature, days = self.measures[f], times / HOURS_A_DAY
            if feature.words:
                changes = np.diff(values, prepend=np.nan) != 0
                days, values = days[changes], values[changes]
            pairs = zip(days[-latest:], values[-latest:], strict=True)
            text = " -> ".join(f"{_text(feature, v)} (day {plain(d)})" for d, v in pairs)
            if computed and len(values) > latest and not feature.words:
                text = f"first {plain(values[0])} (day {plain(days[0])}), latest {text}"
            unit = f" in {feature.unit}" if "/" in self.units[f] else ""  # a score has none to show
            lines.append(f"{feature.name}{unit}: {text}")
        if computed:
            lines.append(f"{self.lengths[i]} observations")
        return f"History: {'; '.join(lines)}. " if lines else ""

    def report_clauses(self, i: int) -> list[Clause]:
        """Return first and last value of each measured series, and the number of observations."""
        statements: list[list[texts.Part]] = []
        for f, times, values in self.measured(i):
            feature, days = self.measures[f], times / HOURS_A_DAY
            name, at = feature.name, " at day "
            first, last = (texts.observation(values[k], at, days[k]) for k in (0, -1))
            if feature.words:
                state = texts.Choice(_text(feature, values[-1]), tuple(feature.words.values()))
                statements.append([f"last {name} ", state, at, last[-1]])
            elif len(values) == 1:
                statements.append([f"only {name} ", *last])
            else:
                word = texts.direction(days, values)
                statements.append(
                    [f"first {name} ", *first, f" and last {name} ", *last, " ", word]
                )
        statements.append(["after ", texts.Number(str(self.lengths[i])), " observations"])
        opening, *rest = statements
        return [Clause(". ", "History", opening), *(Clause(", ", "", parts) for parts in rest)]


def _text(feature: Feature, value: float) -> str:
    return feature.words[int(value)] if feature.words else plain(value)


# --------------------------------------------------------------------------- the command


KINDS = "death or too sick by the horizon, or when each wait ends and why"
REMOVALS = "of times: improved and other removals are two events, or one"
FLAGS = (
    Flag("data_dir", Path, help="folder with the SRTR files", required=True),
    Flag("organ", tuple(ORGANS), "kidney"),
    Flag("landmark_days", int, help="days after listing; 365 kidney, 90 liver"),
    Flag("horizon_days", parse_days, help="days ahead; 365 kidney, 90 liver; of times several"),
    Flag("transplant", waiting_list.TRANSPLANT_CHOICES, "negative"),
    Flag("outcome_kind", OUTCOME_KINDS, "label", KINDS),
    Flag("removals", waiting_list.REMOVALS, "apart", REMOVALS),
    SHOW_VALUES,
)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser("srtr_dataset.py", description="Check a folder of SRTR files.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check")
    about = "read a folder and print its summary"
    check = commands.add_parser("check", help=about, allow_abbrev=False)
    for flag in FLAGS:
        flag.add_to(check)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when the folder can be used, 2 when not."""
    arguments = vars(build_parser().parse_args(argv))
    del arguments["command"]
    show_values = arguments.pop("show_values")
    with command_logging():
        return run_command(lambda: check(**arguments), show_values=show_values)


def check(data_dir: Path, **reading: Any) -> int:
    """Log what a folder holds, what looks wrong, and what it can be used for, or refuse it."""
    return checks.check(
        lambda: SRTRTrajectoryDataset(data_dir, **reading, require_labels=None), MIN_EVENTS
    )


if __name__ == "__main__":
    sys.exit(main())
