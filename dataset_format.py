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
from medgemma_clinical.data import checks, distributions, dka, texts
from medgemma_clinical.data.analytes import GAP_ITEM
from medgemma_clinical.data.competing_events import OUTCOME_KINDS, CompetingEvents
from medgemma_clinical.data.dka import LABEL, Description, read_description
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.importers import duck, eicu, long_table, meds, mimic, preview
from medgemma_clinical.data.importers.cohort import COHORTS, DISCHARGED, ESCALATED, GAPS, OUTCOMES
from medgemma_clinical.data.importers.questions import OpenQuestions
from medgemma_clinical.data.overlap import describe_copies
from medgemma_clinical.data.roles import sex_of_column
from medgemma_clinical.data.split import Split
from medgemma_clinical.data.texts import Clause, PromptOptions, plain
from medgemma_clinical.data.trajectories import (
    AGE,
    ScoringRows,
    TrajectoryDataset,
)
from medgemma_clinical.files import InputError, move_aside, one_line, write_text
from medgemma_clinical.flags import POSITIVE, WHOLE, Flag, names, number
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

    name = "dka"
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
        about = read_description(source, findings, description)
        about = dka.name_series(table, about, columns[-1], flags, findings)
        if is_time:
            competing = dka.competing_events(table, about, horizon_hours, findings)
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
        lengths = self._read(table, about, findings, series, reading)
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
        if about.made_by.startswith("dataset_format.py "):
            self.recipe = {"made_by": about.made_by, "arguments": about.arguments}
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
        for k, (table, progress) in enumerate(dka.read_tables(source, max_rows)):
            if k == 0:
                about, missing = dka.as_trained(table, about, config, findings)
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
            lengths = dataset._read(chunk, about, findings, config["features"], reading)
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


OUTPUT = (
    Flag("out", Path, None, "CSV to write; a JSON description comes beside it"),
    Flag("memory_limit", str, "400MB", "memory for tables, beyond it disk is used"),
    Flag("threads", WHOLE, 0, "threads that read (0 = all cores)"),
)
"""Flags of every command that makes a DKA file."""

LIMITS = "of '<5': 2.5, 5, or no value; of '>5': 5, or no value"
MIN_VALUES = "fewest values of the main series in the window"
COHORT = (
    Flag("cohort", tuple(COHORTS), "dka", "admissions to take"),
    Flag("series", name_tuple, (), "series NAME,NAME or all; the first is the main series"),
    Flag("window_hours", HOURS, 12.0, "hours from first value to prediction time"),
    Flag("horizon_hours", HOURS, 72.0, "hours from then to the end"),
    Flag("min_observations", POSITIVE, 2, "fewest values of the main series"),
    Flag("outcome", outcome, ESCALATED, "escalation, or some of death,icu,unresolved"),
    Flag("discharged", tuple(DISCHARGED), "not_escalated", "alive by the horizon: 0, or no row"),
    Flag("compute_gap", tuple(GAPS), "always", "anion gap: from Na, Cl, HCO3, or as reported"),
)
"""Flags that choose the cohort of a hospital."""

EVENTS = (
    Flag("series", help="'NAME [unit]=CODE'; the first is the main series", repeat=True),
    Flag("window_hours", HOURS, 24.0, "hours before the prediction time that are read"),
    Flag("hours_from", ("window", "first"), "window", "hour 0: window or first value"),
    Flag("min_observations", POSITIVE, 1, MIN_VALUES),
    Flag("outcome", str, "Event", "meaning of label 1"),
    Flag("question", str, "", "question about a patient; by default from --outcome"),
)
"""Flags that make rows of labels and events."""

NOTE_WORDS = Flag("max_note_words", POSITIVE, 256, "latest words of notes in a context")

COMMANDS: dict[str, tuple[Flag, ...]] = {
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
    "from_mimic": (
        Flag("mimic_dir", Path, help="folder of MIMIC-IV with hosp/ and icu/", required=True),
        *OUTPUT,
        *COHORT,
        Flag("item", str, str(GAP_ITEM), "itemid of the series, or its name in d_labitems"),
        Flag("notes_dir", Path, help="folder note/ of MIMIC-IV-Note, for the context"),
        NOTE_WORDS,
    ),
    "from_eicu": (
        Flag("eicu_dir", Path, help="folder with patient, admissionDx and lab", required=True),
        *OUTPUT,
        *COHORT,
    ),
    "from_meds": (
        Flag("meds_dir", Path, help="folder of MEDS with data/ and metadata/", required=True),
        Flag("labels", Path, help="labels as ACES writes them: Parquet file or folder"),
        *OUTPUT,
        *EVENTS,
        Flag("context", help="static 'NAME [unit]=CODE', repeatable", repeat=True),
        Flag("event", help="'NAME=CODE' whose time is written; first the one asked", repeat=True),
        Flag("notes", help="code of notes for the context, repeatable", repeat=True),
        NOTE_WORDS,
        Flag("no_splits", bool, help="ignore metadata/subject_splits.parquet"),
        Flag("list_codes", bool, help="print all codes with counts, make no file"),
    ),
    "from_long": (
        Flag("preview", bool, help="show what would be read and made, write a TOML"),
        Flag("config", Path, help="flags of a TOML file, of which typed ones win"),
        Flag("table", Path, help="CSV, Excel or Parquet, one value a row"),
        Flag("labels", Path, help="table with patient, prediction time and label"),
        *OUTPUT,
        Flag("like", Path, help="read as for this earlier output: its flags are the defaults"),
        *EVENTS,
        Flag("columns", help="other names, as time=Drawn item=Analyte", repeat=True, several=True),
        Flag("prediction_time", str, "", "'COLUMN + 48 h' of --labels"),
        Flag("static", help="'age [years]=COLUMN' of --labels, repeatable", repeat=True),
        Flag("sex", help="words of a sex, as 1=male 2=female", repeat=True, several=True),
        Flag("outcome_column", help="a label, repeatable; the first is the main", repeat=True),
        Flag("end_time", str, "", "column of --labels: when the stay ended"),
        Flag("event_time", str, "", "column: time of the event, or of the end of the record"),
        Flag("event", str, "", "column of --labels: 0 (censored), 1, 2, ..., or words"),
        Flag("event_names", help="of 1, 2, ...: the words of --event", repeat=True, several=True),
        Flag("interventions", help="events by a treatment decision", repeat=True, several=True),
        Flag("context_column", str, "", "column of --labels with a text for the context"),
        Flag("notes", Path, help="table with patient, time and text, for the context"),
        NOTE_WORDS,
        Flag("keep", help="columns of --labels to carry along", repeat=True, several=True),
        Flag("no_labels", bool, help="outcome not known: new patients"),
        Flag("positive", help="word of label 1, all others being 0 (Yes)", repeat=True),
        Flag("time_format", help="strptime format of times; by default found", repeat=True),
        Flag("time_unit", tuple(duck.MICROSECONDS), "", "unit of times that are numbers"),
        Flag(
            "below_limit",
            ("half", "value", "drop"),
            "",
            LIMITS,
        ),
        Flag("bad_values", ("drop",), "", "leave out values that are no numbers"),
        Flag("result_flags", help="letters behind numbers, as L", repeat=True, several=True),
        Flag("encoding", str, "", "of CSV tables that are not UTF-8 (default: cp1252)"),
        Flag("sheet", help="of an Excel file (default: first); again: the next", repeat=True),
        Flag("decimal", ("comma", "point"), "", "decimal sign; the other one groups thousands"),
        Flag("equal_times", ("keep", "last", "mean"), "", "different values of one time"),
        Flag("factor", help="'ITEM:UNIT=NUMBER', repeatable: convert a unit", repeat=True),
    ),
}


REQUESTS: dict[str, tuple[type[duck.TableRequest], Callable[[Any], Any]]] = {
    "from_mimic": (mimic.MimicRequest, mimic.make_mimic),
    "from_eicu": (eicu.EicuRequest, eicu.make_eicu),
    "from_meds": (meds.MedsRequest, meds.make_meds),
    "from_long": (long_table.LongRequest, long_table.make_long),
}
"""The request of each command that makes a DKA file, and what makes its rows."""


CODES = "; --list_codes shows what can be a series"
NEEDED = {
    "from_mimic": {"out": ""},
    "from_eicu": {"out": ""},
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
    path = out.with_suffix(".toml") if out else Path(CONFIG)
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
    is_table = earlier.is_file() and dka.description_path(earlier) != earlier
    training = distributions.describe(medians_of(earlier)[0]) if is_table else None
    code = make("from_long", arguments)
    if training is None:
        logger.info("%s: no data file: the values are not compared with it", earlier)
    else:
        checks.log_warnings(distributions.compare(training, *medians_of(out)), str(out))
    return code


def medians_of(path: Path) -> tuple[pd.DataFrame, pd.Series[str] | None]:
    """Return medians of rows as ``distributions.row_medians`` does, and months where known."""
    findings, tables = Findings(str(path), strict=False), list[pd.DataFrame]()
    months = list[Any]()
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
        if "prediction_time" in table:
            months.append(table["prediction_time"].astype(str).str[:7])
    return pd.concat(tables), pd.concat(months) if months else None


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
    for name, rows in COMMANDS.items():
        about = DATA_VERBS[name]
        command = commands.add_parser(name, help=about, allow_abbrev=False, formatter_class=Help)
        for flag in rows:
            flag.add_to(command)
    commands.choices["from_long"].set_defaults(**{"read_as": {}, **(stored or {})})
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
