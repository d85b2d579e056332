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

import argparse
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

from medgemma_clinical.commands import config, logs
from medgemma_clinical.commands.command_line import (
    POSITIVE,
    SHOW_VALUES,
    VERSION,
    WHOLE,
    Help,
    Parser,
    Repeated,
    names,
    number,
    parse_hours,
    run_command,
)
from medgemma_clinical.data import (
    checks,
    distributions,
    dka,
    duck,
    eicu,
    long_table,
    meds,
    mimic,
    preview,
    texts,
)
from medgemma_clinical.data.analytes import GAP_ITEM
from medgemma_clinical.data.cohort import COHORTS, DISCHARGED, ESCALATED, GAPS, OUTCOMES
from medgemma_clinical.data.competing_events import OUTCOME_KINDS, CompetingEvents
from medgemma_clinical.data.dka import LABEL, Description, read_description
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.overlap import describe_copies
from medgemma_clinical.data.questions import OpenQuestions
from medgemma_clinical.data.roles import sex_of_column
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.texts import Clause, PromptOptions, plain
from medgemma_clinical.data.trajectories import (
    AGE,
    ScoringRows,
    TrajectoryDataset,
)
from medgemma_clinical.files import InputError, move_aside, one_line, write_text
from medgemma_clinical.training.signals import SIGNALS

__all__ = ["Description", "InputError", "MIMICtrajectoryDataset", "main", "read_description"]

logger = logging.getLogger(__name__)

MAX_LEN, MAX_LEN_SEVERAL = 20, 64  # observations kept of one series, and of the union of several

HOURS = number(float, 0, 10**6, open_low=True)


# --------------------------------------------------------------------------- data set


class MIMICtrajectoryDataset(TrajectoryDataset):
    """Trajectories of patients in diabetic ketoacidosis, in the DKA format of one or more series.

    The observations of a row are the union of the times of its series; what was not measured at a
    time is NaN there.

    Args:
        source: path of a CSV (.csv, .csv.gz) or Parquet file, or a table of the same columns: a
            DataFrame, or one of polars or pyarrow.
        max_len: the most recent observations kept; by default 20 of one series, 64 of several.
        description: meaning of main series and label; by default read beside the file.
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

    name = "dka"
    kind = "DKA format"
    source_flag = "data_path"
    options = (
        *("series", "max_len", "label_column", "allow_duplicates", "site", *dka.NAMING),
        *("outcome_kind", "horizon_hours"),
    )
    row_columns = (*TrajectoryDataset.row_columns, "numbers")
    time_scale = 72.0  # hours; resolution of ketoacidosis takes one to three days

    def __init__(
        self,
        source: str | Path | pd.DataFrame | dka.ArrowTable,
        max_len: int | None = None,
        *,
        description: Description | None = None,
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
        source = dka.as_frame(source)
        label, is_frame = label_column or LABEL, isinstance(source, pd.DataFrame)
        findings = Findings("DataFrame" if is_frame else str(source))
        table = pd.concat([block for block, _ in dka.read_tables(source)])
        if outcome_kind not in (None, "label", "time"):
            raise InputError(f"--outcome_kind {outcome_kind}: must be label or time")
        has_times = label == LABEL and LABEL not in table and {*dka.EVENT_COLUMNS} <= {*table}
        is_time = outcome_kind == "time" or (outcome_kind is None and has_times)
        columns = dka.EVENT_COLUMNS if is_time else (label,)
        labelled = require_labels or label != LABEL or is_time
        dka.check_header(table, one_line(findings.source), columns, labelled=labelled)
        flags = Description(series_name or "", unit or "", outcome=outcome or "")
        description = description or read_description(source, findings)
        description = dka.name_series(table, description, columns[-1], flags, findings)
        if is_time:
            competing = dka.competing_events(table, description, horizon_hours, findings)
            self.competing_events = competing
            labels, _ = dka.events_of(table, len(competing.names), findings)
        elif horizon_hours is not None:
            problem = f"the outcome is the label {label}: --outcome_kind time"
            raise InputError(f"--horizon_hours: {problem}")
        else:
            labels, wrong_labels = dka.labels_of(table, label)
            wrong, problem = (
                pd.Series(True, wrong_labels.index),
                "not 0 or 1: write 1 for the event",
            )
            findings.reject(wrong, label, problem, wrong_labels)
        if require_labels and np.isnan(labels).all():
            where = f"{one_line(findings.source)}, column {columns[-1]}"
            raise InputError(f"{where}: no row has a label")
        self.allow_duplicates = allow_duplicates
        self.ids = dka.number_equal(dka.patients_of(table, findings)[1], findings)
        self.parts = dka.parts_of(table, findings)
        reading = {"max_len": max_len, "label_column": label, "site": site}
        lengths = self._read(table, description, findings, series, reading)
        if not len(self):
            raise InputError(f"{self.source}: no row holds a value of {', '.join(self.features)}")
        if without := len(table) - len(self):
            findings.counts["without a value are left out"] += without
            self.add_rule("without a value", without)
        max_len = self.read_options["max_len"]
        if (lengths > max_len).any():
            findings.notes[checks.describe_cut(lengths, self.groups, max_len)] = None
        dka.note_columns(table, columns, self.description, findings, site)
        self.warnings = tuple(findings.warnings)
        findings.log()

    def _read(
        self,
        table: pd.DataFrame,
        description: Description,
        findings: Findings,
        series: Sequence[str] | None,
        reading: Mapping[str, Any],
    ) -> NDArray[np.int64]:
        """Read the rows that hold a value; return how many observations each had before the cut."""
        label, site = reading.get("label_column", LABEL), reading.get("site")
        competing = self.competing_events
        if competing:
            label, description = dka.EVENT, replace(description, events=competing.names)
        self.source = one_line(findings.source)
        self.description = about = description.for_label(label)
        self.question, self.outcome = about.question, about.outcome
        self.assumed_time_scale = about.time_scale is None
        self.time_scale = about.time_scale or self.time_scale
        self.flow = pd.DataFrame(about.flow) if about.flow else None
        self.measures = dka.find_features(table, about, series, self.source)
        self.features = tuple(feature.name for feature in self.measures)
        self.units = tuple(feature.unit or "" for feature in self.measures)
        default = MAX_LEN if len(self.features) == 1 else MAX_LEN_SEVERAL
        max_len = reading["max_len"] or default
        self.read_options = {"max_len": max_len}
        self.numbers = table.index.to_numpy()
        if competing:
            horizons, count = list(competing.horizons), len(competing.names)
            self.read_options |= {"outcome_kind": "time", "horizon_hours": horizons}
            self.events, self.event_hours = dka.events_of(table, count, findings)
            self.labels = np.where(np.isnan(self.events), np.nan, self.events == 1)
        else:
            self.read_options["label_column"] = label
            self.labels = dka.labels_of(table, label)[0]
        self.groups = dka.patients_of(table, findings)[0].to_numpy(dtype=np.str_)
        self.has_patient_ids = not set(dka.PATIENTS).isdisjoint(table)
        self.contexts = dka.text_of(table, "clinical_context").to_numpy(dtype=object)
        self.sites = None if site is None else dka.sites_of(table, site, self.source)
        self.static_names = tuple(name for name in map(str, table) if name.startswith(dka.STATIC))
        names = [x.removeprefix(dka.STATIC) for x in self.static_names] + [*self.features]
        written = [*names, *self.ids, *self.groups]
        written += [] if self.sites is None else [*self.sites]
        findings.warnings |= dict.fromkeys(texts.formula_warning(written))
        static = [dka.numbers_of(table, name, findings) for name in self.static_names]
        self.static = np.column_stack([np.empty((len(table), 0)), *static])
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
        lengths = self.lengths
        # An array's integers hold no more than its length, whatever max_len was given.
        latest = self.offsets[1:][self.owner] - min(max_len, len(row))
        self.keep_observations(np.arange(len(self.times)) >= latest)
        has_value = lengths > 0
        self.offsets = np.append(0, self.offsets[1:][has_value])
        for name in self.row_columns:
            column = getattr(self, name)
            setattr(self, name, None if column is None else column[has_value])
        return lengths[has_value]

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
    ) -> Iterator[ScoringRows]:
        """Read a file or DataFrame ``max_rows`` rows at a time, as a checkpoint's data were read.

        Main series and outcome are taken to be those of the checkpoint, where no description says
        them.

        Raises:
            InputError: the source lacks an input of the checkpoint, gives it another meaning, or
                cannot be read.
        """
        description, inputs = read_description(source, findings), config["inputs"]
        baselines_read, reading = config.get("baseline_inputs", inputs), config["read_options"]
        label, site = reading.get("label_column", LABEL), reading.get("site")
        static_used = {*inputs["static"], *baselines_read["static"], *AGE, site}
        for k, (table, progress) in enumerate(dka.read_tables(source, max_rows)):
            if k == 0:
                description, missing = dka.as_trained(table, description, config, findings)
            static = {name for name in map(str, table) if name.startswith(dka.STATIC)}
            unused = {name for name in static - static_used if sex_of_column(name) is None}
            chunk = table.drop(columns=unused).assign(**dict.fromkeys(missing, ""))
            dataset = cls.__new__(cls)
            if events := config.get("events"):
                dataset.competing_events = CompetingEvents.from_config(events)
            else:
                problem = f"have a {label} that is neither 0 nor 1: taken as unknown"
                findings.counts[problem] += len(dka.labels_of(chunk, label)[1])
            ids = dka.number_equal(dka.patients_of(table, findings)[1], findings)
            dataset.ids, dataset.allow_duplicates = ids, None
            lengths = dataset._read(chunk, description, findings, config["features"], reading)
            max_len = dataset.read_options["max_len"]
            is_read, column = table.index.isin(dataset.numbers), str(dataset.measures[0].keys[0])
            problem = "no series of this row holds a value"
            findings.reject(pd.Series(~is_read, table.index), column, problem)
            longer = f"are longer than {max_len} observations: the most recent are kept"
            findings.counts[longer] += int((lengths > max_len).sum())
            # Checked above, so that no later value is scored.
            if not inputs["prediction_time"] and not baselines_read["prediction_time"]:
                dataset.prediction_hours = None
            dataset.question, dataset.outcome = config["question"], config["outcome"]
            dataset.features = tuple(config["features"])  # spelled as the model knows them
            numbers, positions = table.index.to_numpy(), np.flatnonzero(is_read)
            yield ScoringRows(ids, numbers, dataset, positions, progress)

    def limits(self, feature: int) -> tuple[float, float] | None:
        """Return the range that the description declares for a feature, None where it does not."""
        return self.measures[feature].plausible

    def reference(self, feature: int) -> texts.Reference | None:
        """Return the reference range that the description gives, None where it gives none."""
        return self.measures[feature].reference

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


# --------------------------------------------------------------------------- commands

REQUESTS: dict[str, tuple[type[duck.TableRequest], Callable[[Any], Any]]] = {
    "from_mimic": (mimic.MimicRequest, mimic.make_mimic),
    "from_eicu": (eicu.EicuRequest, eicu.make_eicu),
    "from_meds": (meds.MedsRequest, meds.make_meds),
    "from_long": (long_table.LongRequest, long_table.make_long),
}
"""The request of each command that makes a DKA file, and what makes its rows."""


CODES = "; --list_codes shows what can be a series"
NEEDED = {
    "from_meds": dict.fromkeys(("out", "labels", "series"), CODES),
    "from_long": dict.fromkeys(("table", "labels", "out"), ""),
}
"""Flags without a default that are not typed with another way of use."""

CONFIG = "import.toml"
DESCRIBED = {"log_columns", "find_time", "copy_as_utf8", "read_sheet", "choose_series"}
DESCRIBED |= {"apply_rules"}
"""Functions that log what a preview shows in its own form."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when it is done, 2 for wrong input, 3 for a fault."""
    arguments = vars(build_parser().parse_args(argv))
    command = arguments.pop("command")
    with logs.command_logging():
        if command == "check":
            show_values = arguments.pop("show_values")
            return run_command(lambda: check(**arguments), show_values=show_values)
        if command == "from_long":
            return run_command(lambda: from_long(argv))
        return run_command(lambda: make(command, arguments))


def from_long(argv: Sequence[str] | None) -> int:
    """Make a DKA file from a long table, or preview it."""
    arguments = complete(argv)
    is_preview, earlier = arguments.pop("preview"), arguments["like"]
    file = arguments.pop("config")
    del arguments["command"]
    if is_preview:
        return show_preview(arguments)
    try:
        return make_like(earlier, arguments) if earlier else make("from_long", arguments)
    except OpenQuestions as error:
        advice = "--preview asks all such questions at once"
        advice = f"remove the # of the answers in {file}, or {advice}" if file else advice
        raise InputError(f"{error}; {advice}") from error


def complete(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the flags of a from_long: those typed, or else of --config, or else of --like."""
    typed, defaults = vars(build_parser().parse_args(argv)), long_defaults()
    stored, columns = dict[str, Any](), list[str]()
    if path := typed["config"]:
        words = config.read_words(path, defaults)
        parsed = parse([word for of_flag in words.values() for word in of_flag], f"--config {path}")
        stored = {name: parsed[name] for name in words}
    if earlier := typed["like"] or stored.get("like"):
        flags, read_as = long_table.read_like(earlier)
        words = {
            name: [f"--{name}={x}" for x in (value if isinstance(value, list) else [value])]
            for name, value in flags.items()
        }
        parsed = parse(
            [word for of_flag in words.values() for word in of_flag], f"--like {earlier}"
        )
        columns += parsed["columns"]
        stored = {**{name: parsed[name] for name in flags}, "read_as": read_as, **stored}
    columns += [*stored.get("columns", ()), *typed["columns"]]  # a later one counts
    return {**vars(build_parser(stored).parse_args(argv)), "columns": tuple(columns)}


def long_defaults() -> dict[str, Any]:
    """Return the default of each flag of from_long that a file may hold."""
    defaults = vars(build_parser().parse_args(["from_long"]))
    return {
        k: x for k, x in defaults.items() if k not in ("command", "config", "preview", "read_as")
    }


def parse(words: Sequence[str], where: str) -> dict[str, Any]:
    """Return the flags of a from_long that a file holds, checked like typed ones."""
    try:
        return vars(build_parser().parse_known_args(["from_long", *words])[0])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def show_preview(arguments: dict[str, Any]) -> int:
    """Show what from_long would make, and write its flags with the open questions to a file."""
    out: Path | None = arguments["out"]
    check_needed("from_long", {**arguments, "out": True})
    if out:
        duck.check_target(out)
    with logs.collected() as records:
        request = long_table.LongRequest(**{**arguments, "out": out or Path("data.csv")})
        seen = preview.run(request, records.clear)
    notes = [record.getMessage() for record in records if record.funcName not in DESCRIBED]
    for line in preview.describe(seen, notes):
        logger.info(line)
    flags = {**preview.settled_flags(seen), "out": out}
    suggested = preview.suggested_flags(seen)
    shown = {"window_hours": "hours before the prediction time, of which values are read"}
    text = config.toml_text(flags, long_defaults(), seen.questions, suggested, shown)
    path = (out.parent if out else Path()) / CONFIG
    if not path.is_file() or path.read_text("utf-8") != text:
        for aside in move_aside([path]):
            logger.info("the earlier %s is now %s", path, aside)
        write_text(path, text)
    if seen.problem:
        raise InputError(f"{seen.problem}; the flags so far are in {path}")
    logger.info("%s holds these flags: review it, then run from_long --config %s", path, path)
    return 0


def make_like(earlier: Path, arguments: dict[str, Any]) -> int:
    """Make a DKA file, and warn of what does not fit the earlier one that it is read like."""
    out: Path = arguments["out"]
    training = distributions.describe(medians_of(earlier)) if earlier.is_file() else None
    code = make("from_long", arguments)
    if training is None:
        logger.info("%s: no such file: the values are not compared with it", earlier)
    else:
        checks.log_warnings(distributions.compare(training, medians_of(out)), str(out))
    return code


def medians_of(path: Path) -> pd.DataFrame:
    """Return the medians of the rows of a DKA file, as ``distributions.row_medians`` does."""
    findings, tables = Findings(str(path), strict=False), list[pd.DataFrame]()
    about = read_description(path)
    for table, _ in dka.read_tables(path):
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
    return pd.concat(tables)


def make(command: str, arguments: dict[str, Any]) -> int:
    """Make a DKA file from tables, or list the codes of events."""
    if arguments.pop("list_codes", False):
        limits = {name: arguments[name] for name in ("meds_dir", "memory_limit", "threads")}
        return meds.list_codes(**limits)
    check_needed(command, arguments)
    request, make_rows = REQUESTS[command]
    return duck.make_file(request(**arguments), make_rows)


def check_needed(command: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a command without a flag that it needs and that need not be typed."""
    for name in NEEDED.get(command, ()):
        if not arguments[name]:
            raise InputError(f"--{name}: is needed{NEEDED[command][name]}")


def build_parser(stored: Mapping[str, Any] | None = None) -> Parser:
    """Build the parser of all commands; ``stored`` are other defaults of from_long."""
    about = "Check a DKA trajectory file, or make one from clinical tables."
    parser = Parser("dataset_format.py", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{check,from_long,...}")

    def command(name: str, about: str) -> Callable[..., Any]:
        subparser = commands.add_parser(name, help=about, allow_abbrev=False, formatter_class=Help)
        return subparser.add_argument

    add = command("check", "validate a file and print its summary")
    add("file", type=Path, help="CSV (.csv, .csv.gz) or Parquet in the DKA format")
    add("--series", type=names, metavar="NAME,NAME", help="read these series only")
    add("--max_len", type=int, help="most recent observations kept of a row")
    add("--label_column", default=LABEL, metavar="NAME", help="column of 0 and 1 to learn")
    kinds = "a label or times to events (default: a label where its column stands)"
    add("--outcome_kind", choices=OUTCOME_KINDS, help=kinds)
    wanted = "hours at which risks are wanted; of times"
    add("--horizon_hours", type=parse_hours, metavar="HOURS,HOURS", help=wanted)
    add("--allow_duplicates", action="store_true", help="allow equal rows across the split")
    for name, text in dka.NAMING.items():
        add(f"--{name}", help=text)
    add("--show_values", action="store_true", help=SHOW_VALUES)

    add = command("from_mimic", "make a file from MIMIC-IV tables")
    add("--mimic_dir", type=Path, required=True, help="folder of MIMIC-IV with hosp/ and icu/")
    add_output_flags(add)
    add_cohort_flags(add)
    add("--item", default=str(GAP_ITEM), help="itemid of the series, or its name in d_labitems")
    notes_dir = "folder note/ of MIMIC-IV-Note, for the context"
    add("--notes_dir", type=Path, help=notes_dir)
    add_note_flags(add)

    add = command("from_eicu", "make a file from eICU tables")
    add("--eicu_dir", type=Path, required=True, help="folder with patient, admissionDx and lab")
    add_output_flags(add)
    add_cohort_flags(add)

    add = command("from_meds", "make a file from events in MEDS form")
    add("--meds_dir", type=Path, required=True, help="folder of MEDS with data/ and metadata/")
    add("--labels", type=Path, help="labels as ACES writes them: Parquet file or folder")
    add_output_flags(add, required=False)
    add_event_flags(add)
    add("--context", action=Repeated, default=(), help="static 'NAME [unit]=CODE', repeatable")
    ends = "'NAME=CODE' whose time is written, repeatable; first the event asked about"
    add("--event", action=Repeated, default=(), help=ends)
    notes = "code of notes for the context, repeatable"
    add("--notes", action=Repeated, default=(), metavar="CODE", help=notes)
    add_note_flags(add)
    add("--no_splits", action="store_true", help="ignore metadata/subject_splits.parquet")
    add("--list_codes", action="store_true", help="print all codes with counts, make no file")

    add = command("from_long", "make a file from a table with one value a row")
    shown = "show what would be read and made, write import.toml"
    add("--preview", action="store_true", help=shown)
    file = "flags of a TOML file, of which typed ones win"
    add("--config", type=Path, metavar="import.toml", help=file)
    add("--table", type=Path, help="CSV, Excel or Parquet, one value a row")
    labels = "table with patient, prediction time and label"
    add("--labels", type=Path, help=labels)
    add_output_flags(add, required=False)
    like = "read as for this earlier output: its flags are the defaults"
    add("--like", type=Path, metavar="EARLIER.csv", help=like)
    add_event_flags(add)
    pairs = "columns of other names, as time=Drawn item=Analyte"
    add("--columns", action=Repeated, nargs="+", default=(), metavar="ROLE=COLUMN", help=pairs)
    time = "'COLUMN + 48 h' of --labels"
    add("--prediction_time", default="", metavar="TIME", help=time)
    static = "static feature 'age [years]=COLUMN' of --labels, repeatable"
    add("--static", action=Repeated, default=(), help=static)
    outcomes = "column of a label, repeatable; the first is the main label"
    add("--outcome_column", action=Repeated, default=(), metavar="COLUMN", help=outcomes)
    end = "column of --labels: time of the event, or of the end of the record"
    add("--event_time", default="", metavar="COLUMN", help=end)
    event = "column of --labels: 0 (censored), 1, 2, ..., or words"
    add("--event", default="", metavar="COLUMN", help=event)
    words = "names of the events 1, 2, ...: the words of --event"
    add("--event_names", action=Repeated, nargs="+", default=(), metavar="NAME", help=words)
    decided = "events that a treatment decision brings, numbers or names"
    add("--interventions", action=Repeated, nargs="+", default=(), metavar="EVENT", help=decided)
    context = "column of --labels with a text for the context"
    add("--context_column", default="", metavar="COLUMN", help=context)
    notes = "table with patient, time and text, for the context"
    add("--notes", type=Path, metavar="FILE", help=notes)
    add_note_flags(add)
    keep = "columns of --labels to carry along under their names"
    add("--keep", action=Repeated, nargs="+", default=(), metavar="COLUMN", help=keep)
    add("--no_labels", action="store_true", help="outcome not known: new patients")
    word = "word of label 1, all others being 0 (default: Yes), repeatable"
    add("--positive", action=Repeated, default=(), metavar="WORD", help=word)
    form = "strptime format of times, repeatable; by default found"
    add("--time_format", action=Repeated, default=(), metavar="FORMAT", help=form)
    units = tuple(duck.MICROSECONDS)
    add("--time_unit", choices=units, default="", help="unit of times that are numbers")
    limit = "of '<5': 2.5, 5, or no value; of '>5': 5, or no value"
    add("--below_limit", choices=("half", "value", "drop"), default="", help=limit)
    bad = "leave out values that are no numbers"
    add("--bad_values", choices=("drop",), default="", help=bad)
    encoding = "of CSV tables that are not UTF-8 (default: cp1252)"
    add("--encoding", default="", metavar="NAME", help=encoding)
    sheet = "of an Excel file (default: first); again: of the next"
    add("--sheet", action=Repeated, default=(), metavar="NAME", help=sheet)
    sign = "decimal sign; the other one groups thousands"
    add("--decimal", choices=("comma", "point"), default="", help=sign)
    equal = "values of a series at one time: all, the last stored, or mean"
    add("--equal_times", choices=("keep", "last", "mean"), default="keep", help=equal)
    factor = "'ITEM:UNIT=NUMBER', repeatable: convert a unit"
    add("--factor", action=Repeated, default=(), help=factor)
    commands.choices["from_long"].set_defaults(**{"read_as": {}, **(stored or {})})
    return parser


def outcome(text: str) -> tuple[str, ...]:
    """Return escalation, or some of its components."""
    components = name_tuple(text)
    if components != (ESCALATED,) and not (components and {*components} <= OUTCOMES.keys()):
        allowed = f"{ESCALATED}, or some of {', '.join(OUTCOMES)}"
        raise argparse.ArgumentTypeError(f"{text!r} must be {allowed}")
    return components


def name_tuple(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of names."""
    return tuple(names(text))


def add_output_flags(add: Callable[..., Any], *, required: bool = True) -> None:
    """Add what every command has that makes a DKA file."""
    out = "CSV to write; a JSON description comes beside it"
    add("--out", type=Path, required=required, help=out)
    add("--memory_limit", default="400MB", help="memory for tables, beyond it disk is used")
    add("--threads", type=WHOLE, default=0, help="threads that read (0 = all cores)")


def add_cohort_flags(add: Callable[..., Any]) -> None:
    """Add what chooses the cohort of a hospital."""
    add("--cohort", choices=tuple(COHORTS), default="dka", help="admissions to take")
    series = "series NAME,NAME or all; the first is the main series"
    add("--series", type=name_tuple, default=(), help=series)
    window = "hours from first value to prediction time"
    add("--window_hours", type=HOURS, default=12.0, help=window)
    add("--horizon_hours", type=HOURS, default=72.0, help="hours from then to the end")
    add("--min_observations", type=POSITIVE, default=2, help="fewest values of the main series")
    outcomes = "escalation, or some of death,icu,unresolved"
    add("--outcome", type=outcome, default=ESCALATED, help=outcomes)
    discharged = "discharge alive within the horizon: label 0, or row left out"
    add("--discharged", choices=tuple(DISCHARGED), default="not_escalated", help=discharged)
    gap = "anion gap: computed from Na, Cl, HCO3, or as reported"
    add("--compute_gap", choices=tuple(GAPS), default="always", help=gap)


def add_event_flags(add: Callable[..., Any]) -> None:
    """Add what makes rows of labels and events."""
    series = "'NAME [unit]=CODE', repeatable; the first is the main series"
    add("--series", action=Repeated, default=(), help=series)
    window = "hours before the prediction time that are read"
    add("--window_hours", type=HOURS, default=24.0, help=window)
    zero = "hour 0: start of the window, or first observation"
    add("--hours_from", choices=("window", "first"), default="window", help=zero)
    fewest = "fewest values of the main series in the window"
    add("--min_observations", type=POSITIVE, default=1, help=fewest)
    add("--outcome", default="Event", help="meaning of label 1")
    question = "question about a patient; by default from --outcome"
    add("--question", default="", help=question)


def add_note_flags(add: Callable[..., Any]) -> None:
    """Add what limits the notes of a context."""
    words = "latest words of notes in a context"
    add("--max_note_words", type=POSITIVE, default=256, metavar="NUMBER", help=words)


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
