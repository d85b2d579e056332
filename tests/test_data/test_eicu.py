"""eICU in the form of MIMIC-IV, read as a slow reading reads it; leaks."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.importers.cohort import ESCALATED, OUTCOMES
from mimic_files import GAP, Extracted, write_tables
from slow_mimic import CHEMISTRY, COMPUTED, compare_with, read_slowly
from table_requests import make_rows

DEMO = Path(__file__).parents[1] / "data" / "eicu_demo"
NAMES = ("patient", "admissionDx", "lab")
DAY = 24 * 60
KETOACIDOSIS = "admission diagnosis|All Diagnosis|Non-operative|Diagnosis|Metabolic/Endocrine|"
KETOACIDOSIS += "Diabetic ketoacidosis"


def read_demo():
    read = {"dtype": str, "keep_default_na": False}
    return {name: pd.read_csv(DEMO / f"{name}.csv.gz", **read) for name in NAMES}


def made(folder, outcome=(ESCALATED,), **request):
    """An extraction by hospital stay, of the reported gap of all adults unless requested."""
    wanted = {"cohort": "all", "compute_gap": "reported", "out": folder / "o.csv", **request}
    rows, description = make_rows("from_eicu", eicu_dir=folder, outcome=tuple(outcome), **wanted)
    return Extracted(rows.set_index("hadm_id"), description)


# --------------------------------------------------------------------------- a slow reading

ITEMS = {title.partition(" [")[0]: items[0] for title, items in CHEMISTRY.items()}
ITEMS["BUN"] = ITEMS.pop("urea nitrogen")
BASE = datetime(2000, 7, 1)


def minutes(number):
    return timedelta(minutes=int(number))


def as_mimic(tables):
    """Write eICU's tables in the form of MIMIC-IV's, row by row."""
    units = {}
    for row in tables["patient"].to_dict("records"):
        age = "90" if row["age"].startswith(">") else row["age"]
        if row["hospitaldischargestatus"] and age:
            units[row["patientunitstayid"]] = row | {"age": int(age)}
    result = {name: [] for name in ("patients", "admissions", "diagnoses", "icu", "labs")}
    youngest = {}
    for row in units.values():
        for key in (row["uniquepid"], row["patienthealthsystemstayid"]):
            youngest[key] = min(row["age"], youngest.get(key, 99))
    stays = {}
    for row in units.values():
        person, hospital = row["uniquepid"], row["patienthealthsystemstayid"]
        years = youngest[hospital] - youngest[person]
        row["begins"] = BASE.replace(year=2000 + years) - minutes(row["hospitaladmitoffset"])
        leaves = row["begins"] + minutes(row["unitdischargeoffset"])
        stays.setdefault((person, hospital), []).append(row)
        if not row["unitstaytype"].startswith("stepdown"):
            icu = {"hadm_id": hospital, "intime": f"{row['begins']}", "outtime": f"{leaves}"}
            result["icu"].append(icu | {"first_careunit": row["unittype"]})
    for (person, hospital), own in stays.items():
        about = {"subject_id": person, "gender": own[0]["gender"][:1], "anchor_year": "2000"}
        result["patients"].append(about | {"anchor_age": f"{youngest[person]}"})
        ends = min(row["begins"] + minutes(row["hospitaldischargeoffset"]) for row in own)
        row = {"subject_id": person, "hadm_id": hospital, "dischtime": f"{ends}", "deathtime": ""}
        died = any(row["hospitaldischargestatus"] == "Expired" for row in own)
        row["id"] = min((each["begins"], int(each["patientunitstayid"])) for each in own)[1]
        row |= {"hospital_expire_flag": "01"[died], "admittime": f"{min(r['begins'] for r in own)}"}
        result["admissions"].append(row)
    for row in tables["admissionDx"].to_dict("records"):
        unit = units.get(row["patientunitstayid"])
        if unit and row["admitdxpath"].endswith("|Diabetic ketoacidosis"):
            entered = unit["begins"] + minutes(row["admitdxenteredoffset"])
            code = {"icd_code": "E1010", "icd_version": "10", "entered": f"{entered}"}
            result["diagnoses"].append({"hadm_id": unit["patienthealthsystemstayid"], **code})
    found = {}
    for row in tables["lab"].to_dict("records"):
        unit, item = units.get(row["patientunitstayid"]), ITEMS.get(row["labname"])
        if unit and item:
            chart = unit["begins"] + minutes(row["labresultoffset"])
            revised = row["labresultrevisedoffset"]
            known = unit["begins"] + minutes(max(int(revised), 0)) if revised else datetime.max
            drawn_in = "mEq/L" if item == GAP else row["labmeasurenamesystem"]
            person, hospital = unit["uniquepid"], unit["patienthealthsystemstayid"]
            key = (person, hospital, str(item), f"{chart}", row["labresult"], drawn_in)
            found[key] = min(known, found.get(key, datetime.max))
    names = ("subject_id", "hadm_id", "itemid", "charttime", "valuenum", "valueuom", "storetime")
    for key, known in found.items():
        stored = "" if known == datetime.max else f"{known}"
        result["labs"].append(dict(zip(names, (*key, stored), strict=True)))
    keys = ("hosp/patients", "hosp/admissions", "hosp/diagnoses_icd", "icu/icustays")
    frames = [pd.DataFrame(rows).drop_duplicates() for rows in result.values()]
    return dict(zip((*keys, "hosp/labevents"), frames, strict=True))


LABS = {"anion gap": ((9, 12, 12.5, 20), ""), "pH": ((7.1,), "")}
LABS |= dict.fromkeys(("glucose", "bedside glucose", "BUN"), ((251, 300), "mg/dL"))
LABS |= dict.fromkeys(("bicarbonate", "HCO3", "Total CO2"), ((18, 20), "mmol/L"))
LABS |= {"sodium": ((140, 131), "mmol/L"), "chloride": ((100,), "mmol/L")}
PANELS = [["anion gap"], ["anion gap"], ["sodium", "chloride", "bicarbonate"], [*LABS][1:]]
DRAWN = (-721, -60, 0, 0, 0, 60, 60, 180, 180, 719, 720, 721, 2 * DAY)
AGES = ("17", "50", "50", "88", "89", "> 89", "")


def random_eicu(rng):
    """Hospital stays of one to three unit stays; on the grid of hours edges are often met."""
    tables, people = {name: [] for name in NAMES}, rng.integers(0, 100, 160)
    for hospital, person in enumerate(people, 1000):
        about = {"patienthealthsystemstayid": hospital, "uniquepid": f"001-{person}"}
        about |= {
            "hospitalid": 400 + hospital % 3,
            "age": rng.choice(AGES),
            "gender": ("Male", "Female")[person % 2],
        }
        about["hospitaldischargestatus"] = rng.choice(["Alive", "Alive", "Alive", "Expired", ""])
        begin = first = int(rng.choice([0, 60, 2 * DAY]))
        leaves, begins = begin + int(rng.choice([700, 3 * DAY, 9 * DAY])), {}
        for _ in range(rng.integers(1, 4)):
            stay, ends = len(tables["patient"]), begin + int(rng.choice([240, 719, 720, 721, 5000]))
            begins[stay] = begin
            unit = {"unittype": rng.choice(["MICU", "Neuro ICU", "Med-Surg ICU"])}
            unit["unitstaytype"] = rng.choice(["admit", "transfer", "admit", "stepdown/other"])
            unit |= {"hospitaladmitoffset": -begin, "hospitaldischargeoffset": leaves - begin}
            unit |= {"unitdischargeoffset": ends - begin, "patientunitstayid": stay}
            tables["patient"].append({**about, **unit})
            begin = ends + int(rng.choice([0, 600]))
        path, entered = KETOACIDOSIS + rng.choice(["", "", "|not"]), rng.choice(DRAWN[2:])
        row = {"patientunitstayid": stay, "admitdxenteredoffset": first + entered - begins[stay]}
        tables["admissionDx"].append({**row, "admitdxpath": path})
        for _ in range(rng.integers(1, 14)):
            drawn, delay = first + rng.choice(DRAWN), rng.choice([None, -90, 30, 30, 30, 720, 999])
            for name in PANELS[rng.integers(len(PANELS))]:
                row = {"labname": name, "labresult": rng.choice(LABS[name][0])}
                row["labmeasurenamesystem"] = LABS[name][1]
                for stay in rng.choice([*begins], rng.integers(1, len(begins) + 1), replace=False):
                    offset = drawn - begins[stay]
                    row |= {"patientunitstayid": stay, "labresultoffset": offset}
                    revised = "" if delay is None else offset + delay
                    tables["lab"].append({**row, "labresultrevisedoffset": revised})
                    delay = rng.choice([delay, 200])
    return {name: pd.DataFrame(rows).astype(str) for name, rows in tables.items()}


@pytest.mark.parametrize(
    ("outcome", "request_"),
    [
        (["death"], {"series": ("anion gap", "glucose")}),
        (["death", "icu"], {"min_observations": 1, "cohort": "dka"}),
        ([*OUTCOMES], {"min_observations": 1}),
        (["unresolved"], {"min_observations": 1, "compute_gap": "always"}),
    ],
)
def test_random_tables_are_read_as_slowly_read(outcome, request_, tmp_path):
    tables = random_eicu(np.random.default_rng(len(request_)))
    stays, _, _ = read_slowly(as_mimic(tables))
    result = made(write_tables(tmp_path, tables), outcome, **request_)
    rows = compare_with(stays, result, outcome, **request_)
    assert len(rows) > 5
    assert "cohort" not in request_ or rows["event"].nunique() > 1
    hospitals = [400 + int(hadm) % 3 for hadm in result.rows.index]
    assert result.rows["hospital"].tolist() == hospitals


@pytest.mark.parametrize(
    ("request_", "counts"),
    [({}, (35, 28, 7)), ({"compute_gap": "always", "series": ("all",)}, (42, 32, 3))],
)
def test_the_demo_has_so_many_rows_patients_and_events(request_, counts, tmp_path):
    result = made(DEMO, out=tmp_path / "o.csv", **request_)
    assert tuple(result.description["rows"][k] for k in ("rows", "patients", "events")) == counts
    assert result.rows["subject_id"].is_monotonic_increasing


# --------------------------------------------------------------------------- leaks


def altered(tables, times, rng):
    """Change all that is drawn, revised, entered or happens after the prediction time.

    Some of the stays that begin after it are deleted, with the values that are filed under them.
    """
    patient, diagnoses, labs = (tables[name].copy() for name in NAMES)
    stays = patient.set_index("patientunitstayid")
    begin = -stays["hospitaladmitoffset"].astype(int)
    then = stays["patienthealthsystemstayid"].map(times) - begin  # minutes from the unit on

    def later(offsets):
        return (offsets.astype(int) + rng.integers(0, 4 * DAY, len(offsets))).astype(str)

    limit = labs["patientunitstayid"].map(then)
    drawn, revised = (labs[f"labresult{word}"].astype(int) for word in ("offset", "revisedoffset"))
    late = (drawn > limit) | (revised > limit) | (limit < 0)
    labs.loc[late, "labresult"] = rng.integers(1, 400, int(late.sum())).astype(str)
    labs.loc[late, "labresultoffset"] = later(drawn)[late]
    labs.loc[late, "labresultrevisedoffset"] = later(revised)[late]
    labs = labs[~late | (rng.random(len(labs)) < 0.7)]

    limit = diagnoses["patientunitstayid"].map(then)
    late = diagnoses["admitdxenteredoffset"].astype(int) > limit
    diagnoses.loc[late, "admitdxpath"] = rng.choice([KETOACIDOSIS, "other"], int(late.sum()))
    diagnoses.loc[late, "admitdxenteredoffset"] = later(diagnoses["admitdxenteredoffset"])[late]

    limit = patient["patientunitstayid"].map(then)
    leaves = patient["unitdischargeoffset"].astype(int) > limit
    patient.loc[leaves, "unitdischargeoffset"] = later(patient["unitdischargeoffset"])[leaves]
    hospital = patient["patienthealthsystemstayid"]
    ends = patient["hospitaldischargeoffset"].astype(int) > limit
    ends &= patient["hospitaldischargestatus"] != ""
    end = times + rng.integers(1, 150 * 60, len(times))
    dies = pd.Series(rng.random(len(times)) < 0.5, times.index)
    moved = hospital.map(end) + patient["hospitaladmitoffset"].astype(int)
    patient.loc[ends, "hospitaldischargeoffset"] = moved[ends].astype(int).astype(str)
    status = np.where(hospital.map(dies).fillna(False), "Expired", "Alive")
    patient.loc[ends, "hospitaldischargestatus"] = status[ends]
    # A further stay in a unit begins later: its offsets, and those of its values, count from it.
    asked_within = (then >= 0).groupby(stays["patienthealthsystemstayid"]).transform("any")
    shift = pd.Series(rng.integers(1, 3 * DAY, len(stays)), stays.index)
    shift = shift.where((then < 0) & asked_within, 0)
    for table, columns in (
        (patient, ("hospitaladmitoffset", "hospitaldischargeoffset")),
        (labs, ("labresultoffset", "labresultrevisedoffset")),
        (diagnoses, ("admitdxenteredoffset",)),
    ):
        for column in columns:
            moved = table[column].astype(int) - table["patientunitstayid"].map(shift)
            table[column] = moved.astype(int).astype(str)
    result = {"patient": patient, "admissionDx": diagnoses, "lab": labs}
    gone = then.index[(then < 0) & asked_within & (rng.random(len(then)) < 0.5)]
    result = {name: table[~table["patientunitstayid"].isin(gone)] for name, table in result.items()}
    return {name: table.sample(frac=1, random_state=rng) for name, table in result.items()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Half of the demo with more ketoacidosis, its folder, and when the slow reading asks."""
    tables, rng = read_demo(), np.random.default_rng(0)
    kept = tables["patient"]["patientunitstayid"].iloc[:90]
    tables = {n: table[table["patientunitstayid"].isin(kept)] for n, table in tables.items()}
    diagnoses = tables["admissionDx"] = tables["admissionDx"].copy()
    chosen = rng.random(len(diagnoses)) < 0.5
    diagnoses.loc[chosen, "admitdxpath"] = KETOACIDOSIS
    offsets = rng.integers(0, 2 * DAY, len(diagnoses)).astype(str)
    diagnoses.loc[chosen, "admitdxenteredoffset"] = offsets[chosen]
    stays, times = read_slowly(as_mimic(tables))[0], {}
    for item in (GAP, COMPUTED):
        found = {str(hadm): stay.time({item}, 12) for hadm, stay in stays.items()}
        since = {h: t - BASE.replace(year=t.year) for h, t in found.items() if t}
        times[item] = pd.Series(since) / minutes(1)
    return tables, write_tables(tmp_path_factory.mktemp("eicu"), tables), times


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        {"outcome": ("death",)},
        {"outcome": ("death",), "cohort": "dka", "min_observations": 1},
        {},
        {"outcome": ("death",), "compute_gap": "always", "series": ("all",)},
        {"outcome": ("icu",), "compute_gap": "always", "min_observations": 1},
    ],
)
def test_nothing_after_the_prediction_time_changes_a_letter(request_, demo, tmp_path):
    tables, folder, times = demo
    rng = np.random.default_rng(len(request_))
    changed = altered(tables, times[COMPUTED if "compute_gap" in request_ else GAP], rng)
    before = made(folder, out=tmp_path / "o.csv", **request_)
    after = made(write_tables(tmp_path / "after", changed), **request_)
    inputs, now = before.inputs(), after.inputs()
    both = inputs.keys() & now.keys()
    assert len(both) > 5
    assert {hadm: now[hadm] for hadm in both} == {hadm: inputs[hadm] for hadm in both}
    assert request_.get("outcome") != ("death",) or inputs.keys() == now.keys()
    assert not after.rows.equals(before.rows), "the labels did change"
