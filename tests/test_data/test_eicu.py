"""eICU in the form of MIMIC-IV: clock, units, values, diagnosis; leaks; forms of files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mimic_files import write_tables
from table_requests import make_rows

DEMO = Path(__file__).parents[1] / "data" / "eicu_demo"
NAMES = ("patient", "admissionDx", "lab")
DAY = 24 * 60
KETOACIDOSIS = "admission diagnosis|All Diagnosis|Non-operative|Diagnosis|Metabolic/Endocrine|"
KETOACIDOSIS += "Diabetic ketoacidosis"


class Mini:
    """An eICU that grows by single rows; minutes are those since the hospital's admission."""

    def __init__(self):
        self.tables = {name: [] for name in NAMES}
        self.begins = {}

    def unit(self, stay, hospital, start=60, end=9 * DAY, **more):
        """Add a stay in a unit; each hospital stay has a patient of its own unless given."""
        row = {"patientunitstayid": stay, "patienthealthsystemstayid": hospital}
        row |= {"uniquepid": f"001-{hospital}", "gender": "Female", "age": "50"}
        row |= {"hospitaladmitoffset": -start, "hospitaldischargeoffset": 10 * DAY - start}
        row |= {"hospitaldischargestatus": "Alive", "unittype": "MICU", "unitstaytype": "admit"}
        row |= {"unitdischargeoffset": end - start}
        self.tables["patient"].append(row | more)
        self.begins[stay] = start
        return self

    def lab(self, stay, minute, value, name="anion gap", unit="", revised=None):
        """Add a value; revised half an hour after it is drawn unless given."""
        begin = self.begins[stay]
        row = {"labname": name, "patientunitstayid": stay, "labresultoffset": minute - begin}
        row |= {"labresultrevisedoffset": (minute + 30 if revised is None else revised) - begin}
        self.tables["lab"].append(row | {"labresult": value, "labmeasurenamesystem": unit})
        return self

    def settling(self, stay, start=60):
        """Add two open gaps within the window and a closed one after it: no event."""
        return self.lab(stay, start, 20).lab(stay, start + 180, 18).lab(stay, start + 2 * DAY, 9)

    def diagnosis(self, stay, minute, path=KETOACIDOSIS):
        """Add APACHE's admission diagnosis, entered at a minute."""
        offset = minute - self.begins[stay]
        row = {"patientunitstayid": stay, "admitdxenteredoffset": offset}
        self.tables["admissionDx"].append(row | {"admitdxpath": path})
        return self

    def write(self, folder):
        if not self.tables["admissionDx"]:
            self.diagnosis(min(self.begins), 0, "other")
        return write_tables(
            folder, {name: pd.DataFrame(rows) for name, rows in self.tables.items()}
        )


def read_demo():
    read = {"dtype": str, "keep_default_na": False}
    return {name: pd.read_csv(DEMO / f"{name}.csv.gz", **read) for name in NAMES}


def made(folder, **request):
    """Rows by hospital stay and their description, of the reported gap of all adults."""
    wanted = {"cohort": "all", "compute_gap": "reported", "out": folder / "o.csv", **request}
    rows, description = make_rows("from_eicu", eicu_dir=folder, **wanted)
    return rows.set_index("hadm_id"), description


def removed(description):
    return {rule["rule"]: rule["removed"] for rule in description["flow"] if rule["removed"]}


# --------------------------------------------------------------------------- clock and values


def two_units(first_ends=300, second_begins=300):
    return Mini().unit(1, 9, 60, first_ends).unit(2, 9, second_begins)


def revised_or_not():
    eicu = Mini().unit(1, 9).settling(1).lab(1, 300, 25, revised=13 * 60 + 1)
    eicu.lab(1, 400, 26, revised=100).lab(1, 500, 27)
    eicu.tables["lab"][-1]["labresultrevisedoffset"] = ""
    return eicu


SERIES = {
    "unit stays share the clock of their hospital stay": (
        two_units().lab(1, 60, 20).lab(2, 360, 18).lab(2, 2 * DAY, 9),
        "20 (0h) -> 18 (5h)",
    ),
    "a value of two unit stays counts once, known from the first on": (
        two_units()
        .settling(1)
        .lab(2, 60, 21)
        .lab(2, 60, 20, revised=300)
        .lab(2, 240, 18, revised=999),
        "20 (0h) -> 21 (0h) -> 18 (3h)",
    ),
    "known when revised and never before it is drawn": (
        revised_or_not(),
        "20 (0h) -> 18 (3h) -> 26 (5.67h)",
    ),
    "filed under a later unit stay, of which the value would tell": (
        two_units(600, 2000).settling(1).lab(2, 700, 30),
        "20 (0h) -> 18 (3h)",
    ),
}


@pytest.mark.parametrize("name", SERIES)
def test_which_values_make_a_series(name, tmp_path):
    eicu, series = SERIES[name]
    rows, _ = made(eicu.write(tmp_path))
    assert rows["clinical_trajectory"].to_dict() == {9: series}
    assert rows[["label_death", "label_unresolved"]].values.tolist() == [[0, 0]]


def test_an_admission_begins_with_the_first_unit_stay(tmp_path):
    """A value drawn before the first stay is known when the stay begins, for the window of 12 h."""
    eicu = Mini().unit(1, 8, 2 * DAY).lab(1, 2 * DAY - 721, 20).unit(2, 9, 2 * DAY)
    rows, description = made(eicu.settling(2, 2 * DAY - 719).write(tmp_path), min_observations=1)
    assert rows["static_hours_since_admission [h]"].to_dict() == {9: 0}
    rule = "no value of the series known within a window of the admission"
    assert removed(description) == {rule: 1}


def test_intensive_care_is_no_step_down_unit_and_ends_with_the_discharge_from_the_unit(tmp_path):
    eicu = Mini().unit(1, 1, unitstaytype="stepdown/other").settling(1).unit(2, 1, 2 * DAY)
    eicu.unit(3, 2, unittype="Neuro ICU").settling(3)
    for stay, end in enumerate((13 * 60 - 1, 13 * 60, 13 * 60 + 1), 4):
        eicu.unit(stay, stay, 60, end).settling(stay)
    rows, _ = made(eicu.write(tmp_path))
    assert rows["static_icu"].to_dict() == {1: 0, 2: 1, 4: 0, 5: 0, 6: 1}
    assert rows["static_unit_neuro"].to_dict() == {1: 0, 2: 1, 4: 0, 5: 0, 6: 0}
    assert rows["label_icu"].fillna(-1).tolist() == [1, -1, 0, 0, -1]


def test_ages_and_sexes(tmp_path):
    """Each hospital stay of a patient has its own age; only those above 89 are not known."""
    eicu = Mini()
    for stay, age in enumerate(("88", "> 89", "86", "", "> 89", "17", ""), 1):
        patient = {"uniquepid": "002-1" if stay < 5 else f"002-{stay}", "age": age}
        eicu.unit(stay, stay, gender="Male" if stay == 5 else "Female", **patient).settling(stay)
    rows, description = made(eicu.write(tmp_path))
    assert rows["subject_id"].tolist() == ["002-1"] * 3 + ["002-5"]
    assert rows["static_age [years]"].tolist() == [88, 90, 86, 90]
    assert rows["static_sex_male"].tolist() == [0, 0, 0, 1]
    shown = [text.partition("-year")[0] for text in rows["clinical_context"]]
    assert shown == ["88", "Over 89", "86", "Over 89"]
    assert removed(description) == {"under 18 at admission, or of unknown age": 1}


def test_death_is_the_discharge_of_the_dead(tmp_path):
    """Where the status is not known, nobody knows whether the patient died."""
    eicu = Mini()
    for stay, status in enumerate(("Expired", "Alive", ""), 1):
        leaves = {"hospitaldischargeoffset": 3 * DAY, "hospitaldischargestatus": status}
        eicu.unit(stay, stay, **leaves).settling(stay)
    rows, description = made(eicu.write(tmp_path))
    assert rows["label_death"].to_dict() == {1: 1, 2: 0}
    assert description["rows"]["discharged_alive"] == 1
    assert description["flow"][0]["left"] == 2


def test_names_of_the_laboratory_become_series(tmp_path):
    """Finger pricks and what the blood gas machine computes are other quantities."""
    eicu = Mini().unit(1, 9).settling(1).lab(1, 90, 30, "BUN", "mg/dL").lab(1, 120, 7.1, "pH")
    for name in ("glucose", "bedside glucose"):
        eicu.lab(1, 100, len(name), name, "mg/dL")
    for name in ("bicarbonate", "HCO3", "Total CO2"):
        eicu.lab(1, 110, len(name), name, "mmol/L")
    rows, _ = made(eicu.write(tmp_path), series=("all",))
    assert rows.filter(like="trajectory").loc[9].dropna().to_dict() == {
        "clinical_trajectory": "20 (0h) -> 18 (3h)",
        "trajectory_bicarbonate [mEq/L]": "11 (0.83h)",
        "trajectory_glucose [mg/dL]": "7 (0.67h)",
        "trajectory_pH": "7.1 (1h)",
        "trajectory_urea nitrogen [mg/dL]": "30 (0.5h)",
    }


def test_a_diagnosis_counts_from_its_entry_on(tmp_path):
    eicu = Mini()
    for stay, entered in enumerate((13 * 60, 13 * 60 + 1), 1):
        eicu.unit(stay, stay).settling(stay).diagnosis(stay, entered)
    eicu.unit(3, 3).settling(3).diagnosis(3, 61, f"{KETOACIDOSIS}|not")
    rows, description = made(eicu.write(tmp_path), cohort="dka")
    assert rows.index.tolist() == [1]
    assert removed(description) == {"not coded as diabetic ketoacidosis": 2}


@pytest.mark.parametrize(
    ("request_", "counts"),
    [({}, (35, 28, 7)), ({"compute_gap": "always", "series": ("all",)}, (42, 32, 3))],
)
def test_the_demo_has_so_many_rows_patients_and_events(request_, counts, tmp_path):
    rows, description = made(DEMO, out=tmp_path / "o.csv", **request_)
    assert tuple(description["rows"][k] for k in ("rows", "patients", "events")) == counts
    assert rows["subject_id"].is_monotonic_increasing


# --------------------------------------------------------------------------- leaks


def times_of(tables, *names):
    """When each hospital stay is asked, found without the code under test; minutes on its clock."""
    stays = tables["patient"].set_index("patientunitstayid")
    begin = -stays["hospitaladmitoffset"].astype(int)
    hospital = stays["patienthealthsystemstayid"]
    table = tables["lab"][tables["lab"]["labname"].isin(names)]
    unit = table["patientunitstayid"]
    known = (
        table[["labresultoffset", "labresultrevisedoffset"]].astype(int).max(axis=1).clip(lower=0)
    )
    table = table.assign(
        hospital=unit.map(hospital),
        chart=table["labresultoffset"].astype(int) + unit.map(begin),
        known=known + unit.map(begin),
    )
    first_unit = begin.groupby(hospital).min()
    table = table[table["chart"] >= table["hospital"].map(first_unit) - DAY]
    drawn = table.groupby(["hospital", "chart", "labname"])["known"].min().unstack().dropna()
    known = drawn.max(axis=1).reset_index(name="known")
    timely = known[known["known"] <= known["chart"] + 720]
    return timely.groupby("hospital")["chart"].min() + 720


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


def with_ketoacidosis(tables, rng):
    """Let every other diagnosis be ketoacidosis, entered within the first two days."""
    diagnoses = tables["admissionDx"].copy()
    chosen = rng.random(len(diagnoses)) < 0.5
    diagnoses.loc[chosen, "admitdxpath"] = KETOACIDOSIS
    offsets = rng.integers(0, 2 * DAY, len(diagnoses)).astype(str)
    diagnoses.loc[chosen, "admitdxenteredoffset"] = offsets[chosen]
    return {**tables, "admissionDx": diagnoses}


PARTS_OF_GAP = ("sodium", "chloride", "bicarbonate")


@pytest.mark.parametrize(
    ("names", "request_"),
    [
        (("anion gap",), {"outcome": ("death",)}),
        (("anion gap",), {"outcome": ("death",), "cohort": "dka", "min_observations": 1}),
        (("anion gap",), {}),
        (PARTS_OF_GAP, {"outcome": ("death",), "compute_gap": "always", "series": ("all",)}),
        (PARTS_OF_GAP, {"outcome": ("icu",), "compute_gap": "always", "min_observations": 1}),
    ],
)
def test_nothing_after_the_prediction_time_changes_a_letter(names, request_, tmp_path):
    rng = np.random.default_rng(len(request_))
    tables = with_ketoacidosis(read_demo(), rng)
    changed = altered(tables, times_of(tables, *names), rng)
    before, _ = made(write_tables(tmp_path / "before", tables), **request_)
    after, _ = made(write_tables(tmp_path / "after", changed), **request_)
    inputs = [column for column in before if not str(column).startswith("label_")]
    both = before.index.intersection(after.index)
    assert len(both) > 10
    assert after.loc[both, inputs].to_csv() == before.loc[both, inputs].to_csv()
    assert request_.get("outcome") != ("death",) or before.index.equals(after.index)
    assert after.to_csv() != before.to_csv(), "the labels did change"
