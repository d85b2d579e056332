"""From the tables of a hospital to rows of the DKA format: cohorts, outcomes, the steps in SQL."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from medgemma_clinical.data import analytes
from medgemma_clinical.data.dka import EVENT, EVENT_COLUMNS, EVENT_HOURS
from medgemma_clinical.data.feature import Feature
from medgemma_clinical.data.importers import cells, duck, output, tables
from medgemma_clinical.data.texts import plain
from medgemma_clinical.files import InputError
from medgemma_clinical.flags import HOURS, POSITIVE, TAKEN, Texts, name_tuple, one_or_some, row

logger = logging.getLogger(__name__)

SQL = Path(__file__).parent / "sql"

# --------------------------------------------------------------------------- definitions
# They go into the description beside the file, letter by letter.

COHORTS = {
    "dka": (
        "adult admissions coded as diabetic ketoacidosis (ICD-9-CM 250.1x; ICD-10-CM E08.1x, "
        "E09.1x, E10.1x, E11.1x, E13.1x). Codes are given at discharge: this cohort is chosen in "
        "hindsight, and a model of it cannot be used at a bedside as it is"
    ),
    "all": "all adult admissions with enough values",
    "biochemical": (
        "adult admissions with, among the values known within the window, glucose above 250 mg/dL, "
        "bicarbonate at most 18 mEq/L, an anion gap above 12 mEq/L and, where any pH is known, one "
        "of at most 7.30 (ketones are not asked for)"
    ),
}
"""Source of biochemical: Kitabchi 2009, diagnosis, with the anion gap of moderate ketoacidosis and
without ketones."""


class OutcomeText(NamedTuple):
    """Texts of one outcome: its name in a report, the end of its question, its definition."""

    outcome: str
    question: str
    definition: str


OUTCOMES = {
    "death": OutcomeText(
        "In-hospital death",
        "die in hospital",
        "death in this hospital admission within the horizon (its time, or the time of discharge "
        "where only that is known). A discharge alive counts 0",
    ),
    "icu": OutcomeText(
        "ICU admission",
        "be admitted to an intensive care unit",
        "a stay in intensive care that begins within the horizon, in this admission; not asked "
        "of a patient who is in intensive care at the prediction time (empty)",
    ),
    "unresolved": OutcomeText(
        "Anion gap not resolved",
        "keep or regain an anion gap above 12 mEq/L",
        "of a gap above 12 mEq/L at the prediction time: no value at or below 12 within the "
        "horizon, or one and a later value above it; of a closed one: a value above 12 within the "
        "horizon. A death with a gap that is not known to be closed counts 1. A discharge alive "
        "with a gap that was open all along counts 0: a competing event. Not known (empty) where "
        "the patient is in hospital for the whole horizon and the gap is not measured in it",
    ),
}
"""The components of escalation, which is any of them."""

ESCALATED = "escalation"
ESCALATION = OutcomeText(
    "Escalation", "need escalation of care", "any of death, icu and unresolved"
)

GAP_EVENTS = ("anion gap closed", "death", "discharge")
"""What ends an open anion gap: events 1, 2, 3. Not asked in the cohort all, whose gaps are mostly
closed."""

GAP_TIMES = OutcomeText(
    "Anion gap closed",
    "Will the anion gap close, at or below 12 mEq/L, in this admission?",
    "of a gap above 12 mEq/L at the prediction time: hours from then on until it is first measured "
    "at or below 12 (1), or else until death in hospital (2) or discharge alive (3), whatever the "
    "horizon. Nobody is censored, since each admission ends. Empty where no gap is known to be "
    "open at the prediction time",
)

GAPS = {
    "always": "sodium - chloride - bicarbonate, without potassium as in guidelines, for everyone",
    "reported": (
        "as the laboratory reports it: in MIMIC-IV (item 50868) mostly with potassium and so about "
        "4 mEq/L above sodium - chloride - bicarbonate, in eICU so in some hospitals"
    ),
}
GAP_ITEMS = {"always": analytes.COMPUTED_GAP, "reported": analytes.GAP_ITEM}

DISCHARGED = {
    "not_escalated": (
        "a patient who is discharged alive within the horizon, without an event before, counts as "
        "not escalated: a competing event"
    ),
    "exclude": (
        "patients who are discharged alive within the horizon are left out, whatever happened "
        "before: the cohort is chosen by what follows the prediction time"
    ),
}

UNIT_KINDS = {
    "cardiac": "cardi|coronary|ccu|cticu|cvicu|csicu",
    "medical": "medic|micu|med-",
    "neuro": "neuro",
    "surgical": "surg|sicu",
    "trauma": "trauma|tsicu",
}
"""Words in the name of a unit; one may be of several kinds. The kinds are the same in every data
base, so that a model of one reads the other. Source: first_careunit of MIMIC-IV, unittype of
eICU."""

RULES = {
    "not_adult": "under 18 at admission, or of unknown age",
    "not_coded": "not coded as diabetic ketoacidosis",
    "no_value": "no value of the series known within a window of the admission",
    "before_admission": "prediction time before the admission",
    "dead": "died by the prediction time",
    "gone": "discharged by the prediction time",
    "too_few": "fewer than {} values known within the window",
    "no_ketoacidosis": "not in ketoacidosis by what is known within the window",
    "in_intensive_care": "in intensive care at the prediction time",
    "excluded_discharge": "discharged alive within the horizon (--discharged exclude)",
    "not_measured": (
        "outcome not known: in hospital for the whole horizon, anion gap not measured again"
    ),
}
"""Why an admission is left out, by its column in ``rules.sql``."""

# --------------------------------------------------------------------------- request and tables


SOME = one_or_some(ESCALATED, tuple(OUTCOMES))


@dataclass(frozen=True, kw_only=True)
class CohortRequest(output.TableRequest):
    """A request for rows from the tables of a hospital: cohort, series, times, outcome."""

    cohort: str = row(tuple(COHORTS), "dka", "admissions to take", TAKEN)
    series: Texts = row(name_tuple, (), "NAME,NAME or all; the first is the main series", TAKEN)
    window_hours: float = row(HOURS, 12.0, "hours from first value to prediction time", TAKEN)
    horizon_hours: float = row(HOURS, 72.0, "hours from then to the end", TAKEN)
    min_observations: int = row(POSITIVE, 2, "fewest values of the main series", TAKEN)
    outcome: Texts = row(SOME, ESCALATED, f"{ESCALATED}, or some of {','.join(OUTCOMES)}", TAKEN)
    discharged: str = row(
        tuple(DISCHARGED), "not_escalated", "alive at the end: 0, or no row", TAKEN
    )
    compute_gap: str = row(tuple(GAPS), "always", "from Na, Cl, HCO3, or as reported", TAKEN)

    @property
    def gap_item(self) -> int:
        """Item of the anion gap that is used."""
        return GAP_ITEMS[self.compute_gap]

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the events whose times are written, empty where gaps are mostly closed."""
        return () if self.cohort == "all" else GAP_EVENTS

    @property
    def components(self) -> list[str]:
        """The components of the outcome, in the order of ``OUTCOMES``."""
        return [name for name in OUTCOMES if {name, ESCALATED} & set(self.outcome)]


class HospitalTables:
    """The files of a hospital, from which a subclass makes tables in the form of MIMIC-IV's."""

    command: str
    source: str  # of the data, with their terms
    columns: Mapping[str, Mapping[str, cells.Column]]  # that are read of each table
    labs: str  # table of laboratory values
    unique: Mapping[str, str]  # column of a table whose values name its rows
    cohorts = COHORTS
    usable = "charted and stored by then"

    def __init__(self, database: duck.Database, flag: str, folder: Path) -> None:
        """Find all files, so that the absence of one shows before minutes are spent."""
        self.database, self.name = database, f"{flag} {folder}"
        self.paths = {name: tables.find_file(folder, name, flag) for name in self.columns}
        self.hashes: dict[str, str] = {}

    def load(
        self, name: str, keep: Sequence[str] = (), keys: Sequence[str] = ()
    ) -> tables.TableFile:
        """Make a table of a file, named like it; ``{COLUMN}`` in ``keep`` is a typed cell."""
        columns = self.columns[name]
        file = tables.open_table(self.database, self.paths[name], columns)
        self.hashes[name] = file.sha256
        typed = {column: form.typed(file.raw(column)) for column, form in columns.items()}
        conditions = [condition.format(**typed) for condition in keep]
        table = name.rpartition("/")[2]
        tables.load_table(self.database, table, file, columns, conditions, keys=keys)
        if key := self.unique.get(name):
            rows, values = self.database.row(f"SELECT count(*), count(DISTINCT {key}) FROM {table}")
            if values < rows:
                problem = f"{rows - values:,} cells repeat an earlier one"
                raise InputError(f"{file.path}, column {key}: {problem}")
        return file

    def load_admissions(self) -> None:
        """Make patients, admissions, icustays, ketoacidosis (entered is NULL at discharge)."""
        raise NotImplementedError

    def choose_features(self, request: Any) -> list[Feature]:
        """Return the features that are asked for, the main one first."""
        return analytes.choose_features(request.series or ("anion gap",), request.gap_item)

    def load_labs(self, items: set[int]) -> None:
        """Make the table labs of these items, of patients in the table wanted."""
        raise NotImplementedError


# --------------------------------------------------------------------------- steps


def make_cohort(
    database: duck.Database, request: CohortRequest, hospital: HospitalTables
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Make rows of the DKA format, by ascending patient and admission, and their description."""
    database.set(
        cohort=request.cohort,
        window_length=timedelta(seconds=round(request.window_hours * 3600)),
        horizon_length=timedelta(seconds=round(request.horizon_hours * 3600)),
        min_observations=request.min_observations,
        outcome=request.components,
        gap_item=request.gap_item,
        computed_gap=analytes.COMPUTED_GAP,
    )
    hospital.load_admissions()
    database.run_file(SQL / "stays.sql")
    features, left_out = read_values(database, request, hospital)
    for step in ("prediction_times", "outcome", "rules"):
        database.run_file(SQL / f"{step}.sql")
    flow = select_admissions(database, request, hospital)
    rows = make_cohort_rows(database, request, features)
    (discharged,) = database.row(
        "SELECT count(*) FILTER (discharged_alive) FROM kept JOIN outcomes USING (stay)"
    )
    if request.discharged != "exclude":
        logger.info("discharged alive within the horizon, which is no event: %d rows", discharged)
    counts = {
        "rows": len(rows),
        "patients": int(rows["subject_id"].nunique()),
        "events": int(rows["label_escalation"].sum()),
        "discharged_alive": discharged,
    }
    counted_rows = {"flow": flow, "rows": counts, "values": dict(sorted(left_out.items()))}
    return rows, describe_rows(request, hospital, features, counted_rows)


def read_values(
    database: duck.Database, request: CohortRequest, hospital: HospitalTables
) -> tuple[list[Feature], dict[str, int]]:
    """Make the table converted; return the features, and counts of the values left out."""
    features = hospital.choose_features(request)
    add_items(database, request, features)
    hospital.load_labs(analytes.items_to_read(features) | set(analytes.ANALYTES))
    database.run_file(SQL / "values.sql")
    counts = database.frame("FROM value_counts").iloc[0]
    left_out = {str(reason): int(count) for reason, count in counts.items() if count}

    path = hospital.paths[hospital.labs]
    by_unit = "SELECT item, unit, count(*) AS count FROM measured GROUP BY ALL ORDER BY ALL"
    factors = analytes.find_factors(database.frame(by_unit), features, str(path))
    has_factor = factors["factor"].notna()
    database.add("factors", factors[has_factor])
    database.run_file(SQL / "gaps.sql")
    for item, count in factors[~has_factor].groupby("item")["count"].sum().items():
        name = analytes.ANALYTES[item].name if item in analytes.ANALYTES else f"item {item}"
        left_out[f"of {name} in no unit or an unknown one"] = int(count)
    for reason, count in left_out.items():
        logger.info("%s: %d values %s", path, count, reason)
    unit_of = factors[has_factor].groupby("item")["unit"].min().to_dict()
    return describe_features(database, features, unit_of), left_out


def add_items(database: duck.Database, request: CohortRequest, features: Sequence[Feature]) -> None:
    """Make the tables analytes and series_items: what the items of values are."""
    item_of = {analytes.GAP_ITEM: request.gap_item}
    names = [
        (item_of.get(item, item), analyte.name, f" ({analyte.unit})" if analyte.unit else "")
        for item, analyte in analytes.ANALYTES.items()
    ]
    database.add("analytes", pd.DataFrame(names, columns=["item", "analyte", "shown_unit"]))
    items = [(k, item) for k, feature in enumerate(features) for item in feature.keys]
    database.add("series_items", pd.DataFrame(items, columns=["position", "item"]))


def describe_features(
    database: duck.Database, features: Sequence[Feature], unit_of: Mapping[Any, str]
) -> list[Feature]:
    """Return the features with their units and the reference ranges of the laboratory."""
    ranges = {item: (low, high) for item, low, high in database.rows("FROM reference_ranges")}
    described = []
    for feature in features:
        unit = unit_of.get(feature.keys[0], "") if feature.unit is None else feature.unit
        reference = next((ranges[item] for item in feature.keys if item in ranges), None)
        described.append(replace(feature, unit=unit, reference=reference))
    return described


def select_admissions(
    database: duck.Database, request: CohortRequest, hospital: HospitalTables
) -> list[dict[str, Any]]:
    """Make the table kept, and log how the admissions became rows."""
    applies = {
        "not_coded": request.cohort == "dka",
        "no_ketoacidosis": request.cohort == "biochemical",
        "in_intensive_care": request.components == ["icu"],
        "excluded_discharge": request.discharged == "exclude",
        "not_measured": "unresolved" in request.components,
    }
    unused = [name for name, applies_here in applies.items() if not applies_here]
    titles = {name: text.format(request.min_observations) for name, text in RULES.items()}
    rules = database.frame("FROM rules ORDER BY stay").set_index("stay")
    patients = rules.pop("subject_id")
    used = rules.drop(columns=unused).rename(columns=titles)
    left, flow = output.apply_rules(used, hospital.name, patients)
    database.add("kept", left[left].index.to_frame())
    logger.info("cohort %s: %s", request.cohort, hospital.cohorts[request.cohort])
    return flow


def make_cohort_rows(
    database: duck.Database, request: CohortRequest, features: Sequence[Feature]
) -> pd.DataFrame:
    """Return the rows: identifiers, series, prediction time, context, static features, labels."""
    database.run_file(SQL / "rows.sql")
    titles = ["clinical_trajectory", *(f"trajectory_{feature.title}" for feature in features[1:])]
    series = database.frame("FROM cells").set_index(["stay", "position"])["cell"].unstack()
    series = series.reindex(columns=range(len(titles))).set_axis(titles, axis="columns")
    rows = database.frame("FROM row_columns ORDER BY stay").set_index("stay")
    if not request.events:
        rows = rows.drop(columns=[*EVENT_COLUMNS])
    outcomes = [x for x in map(str, rows) if x.startswith("label_") or x in EVENT_COLUMNS]
    static = make_static_features(database, request, features, rows)
    rows = rows.rename(columns={"unit": "care_unit"}).drop(columns="hours_since_admission")
    keys = ["subject_id", "hadm_id", "id", "care_unit"]
    middle = rows.drop(columns=[*keys, *outcomes])
    rows = pd.concat([rows[keys], series, middle, static, rows[outcomes]], axis="columns")
    flags = [name for name in (*outcomes, "static_sex_male") if name != EVENT_HOURS]
    return rows.reset_index(drop=True).astype(dict.fromkeys(flags, "Int8"))


def make_static_features(
    database: duck.Database, request: CohortRequest, features: Sequence[Feature], rows: pd.DataFrame
) -> pd.DataFrame:
    """Return what the context tells of the unit, of time and of other chemistry, as numbers."""
    unit = rows["unit"]
    static = pd.DataFrame({"static_icu": unit.notna().astype("int8")})
    for kind, pattern in UNIT_KINDS.items():
        is_kind = unit.str.contains(pattern, case=False, na=False)
        static[f"static_unit_{kind}"] = is_kind.astype("int8")
    static["static_hours_since_admission [h]"] = rows["hours_since_admission"]
    values = database.frame("FROM last_values").set_index(["stay", "analyte"])["value"].unstack()
    items = {key for feature in features for key in feature.keys}
    for analyte in analytes.CHEMISTRY:
        feature = analytes.feature_of(analyte, request.gap_item)
        if not items & set(feature.keys):
            static[f"static_last_{feature.title}"] = values.get(analyte.name)
    return static


def describe_rows(
    request: CohortRequest,
    hospital: HospitalTables,
    features: Sequence[Feature],
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Describe the rows: texts of the data set, ``counts``, definitions, origin."""
    main, *further = features
    asked = [OUTCOMES[name] for name in request.components]
    if len(asked) == len(OUTCOMES):
        asked = [ESCALATION]
    begin, rest = main.name[:1], main.name[1:]
    return {
        "series": (begin.upper() if rest == rest.lower() else begin) + rest,  # pH stays
        "unit": main.unit,
        "question": ask(" or ".join(x.question for x in asked), request),
        "outcome": " or ".join(x.outcome for x in asked),
        **describe_outcomes(request),
        "plausible": main.plausible,
        "limits": {x.name: x.plausible for x in further},
        "reference": main.reference,
        "references": {x.name: x.reference for x in further if x.reference},
        "prediction_time": (
            f"{plain(request.window_hours)} hours after the first value of each admission, for "
            f"patients who are then in hospital; only values {hospital.usable} are read"
        ),
        "horizon": f"{plain(request.horizon_hours)} hours from then on",
        **counts,
        "definitions": {
            "cohort": hospital.cohorts[request.cohort],
            "anion_gap": GAPS[request.compute_gap],
            "discharge": DISCHARGED[request.discharged],
            "label_escalation": " or ".join(x.definition for x in asked),
            **{f"label_{name}": text.definition for name, text in OUTCOMES.items()},
            **({EVENT: GAP_TIMES.definition} if request.events else {}),
        },
        "source": hospital.source,
        **output.describe_origin(request, hospital.command, hospital.hashes),
    }


def ask(what: str, request: CohortRequest) -> str:
    """Return the question about a patient."""
    return f"Will the patient {what} within {plain(request.horizon_hours)} hours?"


def describe_outcomes(request: CohortRequest) -> dict[str, Any]:
    """Return what a description says of all labels, and of times to events."""
    labels = {
        f"label_{name}": {"outcome": text.outcome, "question": ask(text.question, request)}
        for name, text in OUTCOMES.items()
    }
    if not request.events:
        return {"labels": labels}
    labels[EVENT] = {"outcome": GAP_TIMES.outcome, "question": GAP_TIMES.question}
    events = {str(k): name for k, name in enumerate(request.events, start=1)}
    return {"labels": labels, "events": events}
