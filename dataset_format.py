"""MIMICtrajectoryDataset: the DKA file, its texts, and the commands that check or make one.

Usage:
    python dataset_format.py check dka_training_data.csv     # validate a file, print its summary
    python dataset_format.py from_mimic --mimic_dir DIR --out dka_training_data.csv   # make one
    python dataset_format.py from_eicu --eicu_dir DIR --out eicu.csv                  # make one
    python dataset_format.py from_meds --help          # make one of events in MEDS form
    python dataset_format.py from_long --help          # make one of a table with a value a row

The file has a column ``clinical_trajectory`` such as ``24 (0h) -> 20 (2h) -> 16 (4h)`` and a column
``label_escalation`` (0 or 1; ``--label_column`` names another). Each column
``trajectory_NAME [unit]`` is a further series of the same form with its own times, each column
``static_NAME [unit]`` a static feature; ``event_hours`` and ``event`` (0 censored, 1, 2, ...) are
times to competing events in place of the label; ``subject_id`` (or ``id``), ``clinical_context``,
``prediction_hours`` and ``split`` are used when present. A JSON file of the same name beside it may
say what the series and the outcome are (see ``Description``); without one, and without
``--series_name``, ``--unit`` and ``--outcome``, they are the anion gap in mEq/L and escalation of
care, with a warning.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.__main__ import DATA_VERBS
from medgemma_clinical.commands import config, logs
from medgemma_clinical.commands.command_line import (
    SHOW_VALUES,
    VERSION,
    Help,
    Parser,
    parse_hours,
    run_command,
)
from medgemma_clinical.data import checks, distributions, dka, table_files, texts
from medgemma_clinical.data.competing_events import OUTCOME_KINDS, CompetingEvents
from medgemma_clinical.data.dka import LABEL, Description, read_description
from medgemma_clinical.data.findings import Findings, log_warnings
from medgemma_clinical.data.importers import eicu, long_table, meds, mimic, output, preview
from medgemma_clinical.data.importers.long_request import Earlier, LongRequest, read_like
from medgemma_clinical.data.importers.questions import OpenQuestions
from medgemma_clinical.data.overlap import describe_copies
from medgemma_clinical.data.roles import sex_of_column
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.table_files import ArrowTable
from medgemma_clinical.data.texts import Clause, PromptOptions, plain
from medgemma_clinical.data.trajectories import (
    AGE,
    ScoringRows,
    TrajectoryDataset,
)
from medgemma_clinical.files import InputError, move_aside, one_line, write_text
from medgemma_clinical.flags import Flag, check_required, flags_of, names
from medgemma_clinical.training.signals import SIGNALS

__all__ = ["Description", "InputError", "MIMICtrajectoryDataset", "main", "read_description"]

logger = logging.getLogger(__name__)

MAX_LEN, MAX_LEN_SEVERAL = 20, 64  # observations kept of one series, and of the union of several

# --------------------------------------------------------------------------- data set


class DKARows(TrajectoryDataset):
    """The rows of a table in the DKA format that hold a value of a series, and their texts.

    Args:
        table: rows of a file, its header checked; unreadable rows are left out.
        about: meaning of main series and outcome.
        findings: what shows in the cells.
        ids: (rows of the table,) their names.
        series, label, max_len, site: as of ``MIMICtrajectoryDataset``.
        events: of times to competing events; None: the outcome is the label.
        parts: (rows of the table,) of the split, where the table has them.
        refuse_labels: refuse a label that is neither 0 nor 1, in place of leaving it unknown.
    """

    name = "dka"
    source_flag = "data_path"
    options = (
        *("series", "max_len", "label_column", "allow_duplicates", "site", *dka.NAMING),
        *("outcome_kind", "horizon_hours"),
    )
    row_columns = (*TrajectoryDataset.row_columns, "numbers", "full_lengths")
    time_scale = 72.0  # hours; resolution of ketoacidosis takes one to three days

    def __init__(
        self,
        table: pd.DataFrame,
        about: Description,
        findings: Findings,
        *,
        ids: NDArray[np.str_],
        series: Sequence[str] | None,
        label: str,
        max_len: int | None,
        site: str | None,
        events: CompetingEvents | None,
        parts: NDArray[np.str_] | None = None,
        refuse_labels: bool = False,
    ) -> None:
        """Read all columns, then drop the rows that are not read."""
        self.source = one_line(findings.source)
        self.ids, self.parts, self.competing_events = ids, parts, events
        if events is None:
            self.labels = dka.labels_of(table, label, findings, refuse=refuse_labels)
            self._describe(about.for_label(label))
        else:
            self.events, self.event_hours = dka.events_of(table, len(events.names), findings)
            self.labels = np.where(np.isnan(self.events), np.nan, self.events == 1)
            self._describe(replace(about, events=events.names).for_label(dka.EVENT))
        self.measures = tuple(dka.find_features(table, self.description, series, self.source))
        self.features = tuple(feature.name for feature in self.measures)
        self.units = tuple(feature.unit or "" for feature in self.measures)
        max_len = max_len or (MAX_LEN if len(self.features) == 1 else MAX_LEN_SEVERAL)
        self.read_options = {"max_len": max_len}
        if events is None:
            self.read_options["label_column"] = label
        else:
            self.read_options |= {"outcome_kind": "time", "horizon_hours": list(events.horizons)}
        self._read_columns(table, site, findings)
        self._read_series(table, findings)
        self.full_lengths = self.lengths  # (N,) observations before the cut
        self.keep_latest(max_len)
        self._drop_empty()

    def _read_columns(self, table: pd.DataFrame, site: str | None, findings: Findings) -> None:
        """Read what there is once a row: patient, context, site, static features."""
        self.numbers = table.index.to_numpy()
        self.groups = dka.patients_of(table, findings)[0].to_numpy(dtype=np.str_)
        self.has_patient_ids = not set(dka.PATIENTS).isdisjoint(table)
        self.contexts = dka.text_of(table, "clinical_context").to_numpy(dtype=object)
        self.sites = None if site is None else dka.sites_of(table, site, self.source)
        self.static_names = tuple(name for name in map(str, table) if name.startswith(dka.STATIC))
        static = [dka.numbers_of(table, name, findings) for name in self.static_names]
        self.static = np.column_stack([np.empty((len(table), 0)), *static])

    def _read_series(self, table: pd.DataFrame, findings: Findings) -> None:
        """Read the observations of rows without a problem, and the prediction time."""
        columns = [str(feature.keys[0]) for feature in self.measures]
        row, self.times, self.values = dka.parse_series(table, columns, findings)
        self.offsets = np.append(0, np.cumsum(np.bincount(row, minlength=len(table))))
        if dka.HOURS in table:
            self.prediction_hours = dka.numbers_of(table, dka.HOURS, findings, dka.MAX_HOUR)
            last = np.full(len(table), -np.inf)
            np.maximum.at(last, row, self.times)
            early = pd.Series(self.prediction_hours < last, table.index)  # later ones: not known
            problem = "before the last observation of the row"
            findings.reject(early, dka.HOURS, problem, table[dka.HOURS])
        self.keep_observations(~table.index.isin(list(findings.problems))[row])

    def _drop_empty(self) -> None:
        """Drop the rows without an observation."""
        has_value = self.lengths > 0
        self.offsets = np.append(0, self.offsets[1:][has_value])
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(self, name, None if column is None else column[has_value])

    def _describe(self, about: Description) -> None:
        """Take what a description says of the data as a whole."""
        self.description = about
        self.question, self.outcome = about.question, about.outcome
        self.assumed_time_scale = about.time_scale is None
        self.time_scale = about.time_scale or self.time_scale
        self.flow = pd.DataFrame(about.flow) if about.flow else None
        if about.made_by.startswith("dataset_format.py "):
            self.recipe = {"made_by": about.made_by, "arguments": about.arguments}

    def task_description(self) -> dict[str, str]:
        """Return what is predicted, with the description's prediction time and horizon."""
        task = super().task_description()
        task["Prediction time"] = self.description.prediction_time or task["Prediction time"]
        task["Horizon"] = self.description.horizon or task["Horizon"]
        if self.competing_events:
            names = ", ".join(self.competing_events.horizon_names)
            task["Horizon"] = f"{names} from the prediction time"
        return task

    # ------------------------------------------------------------------ texts

    def series_text(self, i: int, options: PromptOptions) -> str:
        """Return series with unit: value and hour of each observation, or of the last alone."""
        if options.series == "last":
            last = {f: f"{self.features[f]} not measured" for f in self.series_read}
            for f, times, values in self.measured(i):
                value = self.value_text(f, values[-1])
                last[f] = f"{self.features[f]} {value} ({plain(times[-1])}h)"
            return f"Last values: {', '.join(last.values())}. "
        series, sentences = {f: (t, v) for f, t, v in self.measured(i)}, []
        for f in [self.main] if options.series == "main" else self.series_read:
            unit = f" ({self.units[f]})" if self.units[f] else ""
            first = 0 if options.latest is None else -options.latest
            pairs = zip(*(column[first:] for column in series.get(f, ())), strict=True)
            text = " -> ".join(f"{plain(v)} ({plain(t)}h)" for t, v in pairs) or "not measured"
            sentences.append(f"{self.features[f]}{unit}: {text}. ")
            if options.computed and f in series:
                full = f == self.main
                sentences.append(texts.computed_text(self.units[f], *series[f], full=full))
        return "".join(sentences)

    def report_clauses(self, i: int) -> list[Clause]:
        """Return the main series in full, of the others first, last and direction."""
        series = {f: (times, values) for f, times, values in self.measured(i)}
        clauses: list[Clause] = []
        for f in self.series_read:
            clauses_of = texts.full_clauses if f == self.main else texts.short_clauses
            if f in series:
                clauses += clauses_of(self.features[f], self.units[f], *series[f])
            else:
                clauses.append(Clause(". ", self.features[f], ["not measured"]))
        return clauses


class MIMICtrajectoryDataset(DKARows):
    """Trajectories of patients in diabetic ketoacidosis, in the DKA format of one or more series.

    The observations of a row are the union of the times of its series; what was not measured at a
    time is NaN there.

    Args:
        source: path of a CSV (.csv, .csv.gz) or Parquet file, or a table of the same columns: a
            DataFrame, or one of polars or pyarrow.
        max_len: the most recent observations kept; by default 20 of one series, 64 of several.
        description: meaning of main series and label: a ``Description``, its JSON as a dict, or the
            path of the JSON or of the table beside it; by default read beside the file.
        require_labels: refuse a table without any label; False where new patients are scored.
        series: names of the series to read, the main one first; None reads all. Rows without any
            value of them are left out.
        label_column: the column of 0 and 1 to learn; None is ``label_escalation``.
        allow_duplicates: accept a split that has equal rows in two parts.
        site: column that names the hospital or unit of each row, for results by site.
        series_name, unit, outcome: main series and label 1, where no description says them.
        outcome_kind: ``label``, or ``time`` of competing events; None: a label where its column
            stands.
        horizon_hours: hours from the prediction time, rising, at which risks are wanted; of times.

    Raises:
        InputError: names file, row and column of the first unreadable cell. Rows count as a
            spreadsheet shows them: the header is row 1 (for a DataFrame or Parquet: from 0).
    """

    def __init__(
        self,
        source: str | Path | pd.DataFrame | ArrowTable,
        max_len: int | None = None,
        *,
        description: dka.Meaning | None = None,
        require_labels: bool = True,
        series: Sequence[str] | None = None,
        label_column: str | None = None,
        allow_duplicates: bool | None = None,
        site: str | None = None,
        series_name: str | None = None,
        unit: str | None = None,
        outcome: str | None = None,
        outcome_kind: str | None = None,
        horizon_hours: Sequence[float] | None = None,
    ) -> None:
        """Read, check and sort the whole source."""
        if max_len is not None and max_len < 1:
            raise InputError(f"--max_len {max_len}: must be at least 1")
        source = table_files.as_frame(source)
        findings = Findings("DataFrame" if isinstance(source, pd.DataFrame) else str(source))
        where = one_line(findings.source)
        table = pd.concat([block for block, _ in table_files.read_tables(source)])
        label = label_column or LABEL
        if outcome_kind not in (None, "label", "time"):
            raise InputError(f"--outcome_kind {outcome_kind}: must be label or time")
        has_times = label == LABEL and LABEL not in table and {*dka.EVENT_COLUMNS} <= {*table}
        is_time = outcome_kind == "time" or (outcome_kind is None and has_times)
        columns = dka.EVENT_COLUMNS if is_time else (label,)
        needs_columns = require_labels or label != LABEL or is_time
        dka.check_header(table, where, columns, labelled=needs_columns)
        flags = Description(series_name or "", unit or "", outcome=outcome or "")
        about = read_description(source, findings, description)
        about = dka.name_series(table, about, columns[-1], flags, findings)
        events = None
        if is_time:
            events = dka.competing_events(table, about, horizon_hours, findings)
        elif horizon_hours is not None:
            problem = f"the outcome is the label {label}: --outcome_kind time"
            raise InputError(f"--horizon_hours: {problem}")
        self.allow_duplicates = allow_duplicates
        parts = dka.parts_of(table, findings)
        super().__init__(
            table,
            about,
            findings,
            ids=dka.number_equal(dka.patients_of(table, findings)[1], findings),
            series=series,
            label=label,
            max_len=max_len,
            site=site,
            events=events,
            parts=parts,
            refuse_labels=True,
        )
        if not len(self):
            raise InputError(f"{self.source}: no row holds a value of {', '.join(self.features)}")
        if require_labels and np.isnan(self.labels).all():
            raise InputError(f"{where}, column {columns[-1]}: no row has a label")
        if without := len(table) - len(self):
            findings.counts["without a value are left out"] += without
            self.add_rule("without a value", without)
        max_len = self.read_options["max_len"]
        if (self.full_lengths > max_len).any():
            cut = checks.describe_cut(self.full_lengths, self.groups, max_len)
            findings.notes[cut] = None
        dka.note_columns(table, columns, self.description, findings, site)
        self.warnings = tuple(findings.warnings)
        findings.log()

    def split(self, seed: int) -> Split:
        """Divide the rows as every data set does, unless equal rows lie in two parts.

        Raises:
            InputError: equal rows lie in two parts; or as ``TrajectoryDataset.split``.
        """
        split = super().split(seed)
        copies = "" if self.allow_duplicates else describe_copies(self, split, self.numbers)
        if copies:
            raise InputError(f"{self.source}: {copies}, or accept them by --allow_duplicates")
        return split

    @classmethod
    def scoring_rows(
        cls,
        source: Path | pd.DataFrame,
        config: Mapping[str, Any],
        findings: Findings,
        max_rows: int,
        description: dka.Meaning | None = None,
    ) -> Iterator[ScoringRows]:
        """Read a file or DataFrame ``max_rows`` rows at a time, as a checkpoint's data were read.

        Main series and outcome are taken to be those of the checkpoint, where no description, by
        default that beside the file, says them.

        Raises:
            InputError: the source lacks an input of the checkpoint, gives it another meaning, or
                cannot be read.
        """
        about, inputs = read_description(source, findings, description), config["inputs"]
        baselines_read, reading = config.get("baseline_inputs", inputs), config["read_options"]
        label, site = reading.get("label_column", LABEL), reading.get("site")
        static_used = {*inputs["static"], *baselines_read["static"], *AGE, site}
        events = CompetingEvents.from_config(config["events"]) if config.get("events") else None
        for k, (table, progress) in enumerate(table_files.read_tables(source, max_rows)):
            if k == 0:
                about, missing = dka.as_trained(table, about, config, findings)
            static = {name for name in map(str, table) if name.startswith(dka.STATIC)}
            unused = {name for name in static - static_used if sex_of_column(name) is None}
            chunk = table.drop(columns=unused).assign(**dict.fromkeys(missing, ""))
            ids = dka.number_equal(dka.patients_of(table, findings)[1], findings)
            dataset = DKARows(
                chunk,
                about,
                findings,
                ids=ids,
                series=config["features"],
                label=label,
                max_len=reading["max_len"],
                site=site,
                events=events,
            )
            is_read = table.index.isin(dataset.numbers)
            problem = "no series of this row holds a value"
            column = str(dataset.measures[0].keys[0])
            findings.reject(pd.Series(~is_read, table.index), column, problem)
            max_len = dataset.read_options["max_len"]
            longer = f"are longer than {max_len} observations: the most recent are kept"
            findings.counts[longer] += int((dataset.full_lengths > max_len).sum())
            # Checked above, so that no later value is scored.
            if not inputs["prediction_time"] and not baselines_read["prediction_time"]:
                dataset.prediction_hours = None
            dataset.question, dataset.outcome = config["question"], config["outcome"]
            dataset.features = tuple(config["features"])  # spelled as the model knows them
            positions = np.flatnonzero(is_read)
            yield ScoringRows(ids, table.index.to_numpy(), dataset, positions, progress)


# --------------------------------------------------------------------------- commands


REQUESTS: dict[str, tuple[type[output.TableRequest], Callable[[Any], Any]]] = {
    "from_long": (LongRequest, long_table.make_long),
    "from_mimic": (mimic.MimicRequest, mimic.make_mimic),
    "from_eicu": (eicu.EicuRequest, eicu.make_eicu),
    "from_meds": (meds.MedsRequest, meds.make_meds),
}
"""The request of each command that makes a DKA file, and what makes its rows."""

OTHERS: dict[str, tuple[Flag, ...]] = {
    "check": (
        Flag("file", Path, help="CSV or Parquet in the DKA format", positional=True),
        Flag("series", names, help="read these series only"),
        Flag("max_len", int, help="most recent observations kept of a row"),
        Flag("label_column", str, LABEL, "column of 0 and 1 to learn"),
        Flag("outcome_kind", OUTCOME_KINDS, help="label, or time to events; label where it is"),
        Flag("horizon_hours", parse_hours, help="hours at which risks are wanted; of times"),
        Flag("allow_duplicates", bool, help="allow equal rows across the split"),
        *(Flag(name, help=text) for name, text in dka.NAMING.items()),
        SHOW_VALUES,
    ),
    "from_long": (
        Flag("preview", bool, help="show what would be read and made, write a TOML"),
        Flag("config", Path, help="flags of a TOML file, of which typed ones win"),
    ),
    "from_meds": (Flag("list_codes", bool, help="print all codes with counts, make no file"),),
}
"""Flags that are of no request."""

CONFIG = "import.toml"
DESCRIBED = {"log", "find_time", "find_encoding", "open_table", "read_sheet", "find_series"}
DESCRIBED |= {"copy_as_utf8"}
"""Functions that log what a preview shows in its own form."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when it is done, 2 for wrong input, 3 for a fault."""
    words = sys.argv[1:] if argv is None else argv
    parsed, given = build_parser().parse_given(words)
    arguments = vars(parsed)
    command = arguments.pop("command")
    with logs.command_logging():
        if command == "check":
            show_values = arguments.pop("show_values")
            return run_command(lambda: check(**arguments), show_values=show_values)
        if command == "from_long":
            typed = {name: x for name, x in arguments.items() if f"--{name}" in given}
            return run_command(lambda: from_long(typed))
        return run_command(lambda: make(command, arguments))


def from_long(typed: dict[str, Any]) -> int:
    """Make a DKA file from a long table, or preview it."""
    is_preview, file = typed.pop("preview", False), typed.pop("config", None)
    request = complete(typed, file)
    if is_preview:
        return show_preview(request)
    try:
        if request.like:
            return make_like(request)
        return output.make_file(request, long_table.make_long)
    except OpenQuestions as error:
        advice = "--preview asks all such questions at once"
        advice = f"remove the # of the answers in {file}, or {advice}" if file else advice
        raise InputError(f"{error}; {advice}") from error


def complete(typed: Mapping[str, Any], file: Path | None) -> LongRequest:
    """Return the flags of a from_long: those typed, or else of --config, or else of --like."""
    stored = config.read_flags(file, LongRequest) if file else {}
    given = {**stored, **typed}
    earlier = read_like(given["like"]) if given.get("like") else Earlier()
    form = {name: value for name, value in earlier.form.items() if name not in given}
    earlier = replace(earlier, form=form)
    values = {**earlier.values, **given, "earlier": earlier}
    if given.get("label") and "outcome" not in given:
        values.pop("outcome", None)  # the title of the label says what it is
    for name in ("columns", "static", "event"):  # a later one of the same name counts
        parts = [part.get(name, ()) for part in (earlier.values, stored, typed)]
        texts = [text for part in parts for text in part]
        if all("=" in text for text in texts):  # else --event is a column of its words
            values[name] = tuple(texts)
    return LongRequest(**values)


def show_preview(request: LongRequest) -> int:
    """Show what from_long would make, and write its flags with the open questions to a file."""
    out = request.out
    named = request if out else replace(request, out=Path("data.csv"))
    check_required(named)
    if out:
        output.check_target(out)
    with logs.collected() as records:
        seen = preview.run(named, records.clear)
    notes = [record.getMessage() for record in records if record.funcName not in DESCRIBED]
    for line in preview.describe(seen, notes):
        logger.info(line)
    text = config.toml_text(
        replace(preview.settled(seen), out=out), seen.questions, preview.suggested(seen)
    )
    path = out.with_suffix(".toml") if out else Path(CONFIG)
    if not path.is_file() or path.read_text("utf-8") != text:
        for aside in move_aside([path]):
            logger.info("the earlier %s is now %s", path, aside)
        write_text(path, text)
    if seen.problem:
        raise InputError(f"{seen.problem}; the flags so far are in {path}")
    logger.info("%s holds these flags: review it, then run from_long --config %s", path, path)
    return 0


def make_like(request: LongRequest) -> int:
    """Make a DKA file, and warn of what does not fit the earlier one that it is read like."""
    earlier = Path(str(request.like))
    is_table = earlier.is_file() and dka.description_path(earlier) != earlier
    training = distributions.describe(medians_of(earlier)[0]) if is_table else None
    code = output.make_file(request, long_table.make_long)
    if training is None:
        logger.info("%s: no data file: the values are not compared with it", earlier)
    else:
        warnings = distributions.compare(training, *medians_of(request.out))
        log_warnings(warnings, str(request.out))
    return code


def medians_of(path: Path) -> tuple[pd.DataFrame, pd.Series[str] | None]:
    """Return medians of rows as ``distributions.row_medians`` does, and months where known."""
    findings, tables = Findings(str(path), strict=False), list[pd.DataFrame]()
    months = list[Any]()
    about = read_description(path)
    for table, _ in table_files.read_tables(path):
        features = dka.find_features(table, about, None, str(path))
        columns = [str(feature.keys[0]) for feature in features]
        owner, _, values = dka.parse_series(table, columns, findings)
        static = [name for name in map(str, table) if name.startswith(dka.STATIC)]
        numbers = {name: dka.numbers_of(table, name, findings) for name in static}
        tables.append(
            distributions.by_kind(
                pd.DataFrame(values, columns=[feature.name for feature in features]),
                owner,
                pd.DataFrame(numbers, index=range(len(table))),
                dka.patients_of(table, findings)[0].to_numpy(str),
            )
        )
        if "prediction_time" in table:
            months.append(table["prediction_time"].astype(str).str[:7])
    return pd.concat(tables), pd.concat(months) if months else None


def make(command: str, arguments: dict[str, Any]) -> int:
    """Make a DKA file from tables, or list the codes of events."""
    if arguments.pop("list_codes", False):
        limits = {name: arguments[name] for name in ("meds_dir", "memory_limit", "threads")}
        return meds.list_codes(**limits)
    request, make_rows = REQUESTS[command]
    return output.make_file(request(**arguments), make_rows)


def rows_of(command: str) -> list[Flag]:
    """Return the flags of a command; those of a request may stand in a file in place of a line."""
    rows = [*OTHERS.get(command, ())]
    if command in REQUESTS:
        flags = flags_of(REQUESTS[command][0]).values()
        rows += [replace(flag, required=False) for flag in flags]
    return rows


def build_parser() -> Parser:
    """Build the parser of all commands."""
    about = "Check a DKA trajectory file, or make one from clinical tables."
    parser = Parser("dataset_format.py", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{check,from_long,...}")
    for name in ("check", *REQUESTS):
        about = DATA_VERBS[name]
        command = commands.add_parser(name, help=about, allow_abbrev=False, formatter_class=Help)
        for flag in rows_of(name):
            flag.add_to(command)
    return parser


def check(file: Path, **reading: Any) -> int:
    """Log what a file holds, what looks wrong, and whether it is ready, or refuse it."""
    return checks.check(lambda: MIMICtrajectoryDataset(file, **reading, require_labels=False))


def end_on_signals() -> None:
    """Let a scheduler, or a closed terminal, end the command so that half-written files go."""

    def end(number: int, _: Any) -> None:
        SIGNALS.received = number
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):  # Windows lacks the latter
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, end)


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
