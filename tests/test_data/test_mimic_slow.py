"""MIMIC-IV by another, slow reading: the demo and random hospitals; the same rows from any form."""

import hashlib
import math
from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.cohort import OUTCOMES, RULES
from mimic_files import (
    BICARBONATE,
    CHLORIDE,
    DEMO,
    GAP,
    GLUCOSE,
    PH,
    SODIUM,
    Mini,
    extracted,
    read_tables,
    shuffled,
    with_storing_times,
    write_tables,
)

CHEMISTRY = {
    "bicarbonate [mEq/L]": (50882,),
    "chloride [mEq/L]": (50902, 50806),
    "creatinine [mg/dL]": (50912,),
    "glucose [mg/dL]": (50931, 50809),
    "lactate [mmol/L]": (50813,),
    "pH": (50820,),
    "potassium [mEq/L]": (50971, 50822),
    "sodium [mEq/L]": (50983, 50824),
    "urea nitrogen [mg/dL]": (51006,),
}
PARTS_OF_GAP = (SODIUM, CHLORIDE, BICARBONATE)
UNITS = {
    "Medical Intensive Care Unit (MICU)": {"medical"},
    "Surgical Intensive Care Unit (SICU)": {"surgical"},
    "Medical/Surgical Intensive Care Unit (MICU/SICU)": {"medical", "surgical"},
    "Coronary Care Unit (CCU)": {"cardiac"},
    "Cardiac Vascular Intensive Care Unit (CVICU)": {"cardiac"},
    "Neuro Surgical Intensive Care Unit (Neuro SICU)": {"neuro", "surgical"},
    "Neuro Intermediate": {"neuro"},
    "Neuro Stepdown": {"neuro"},
    "Trauma SICU (TSICU)": {"trauma", "surgical"},
    "CCU-CTICU": {"cardiac"},
    "Med-Surg ICU": {"medical", "surgical"},
    "": set(),
}
FAR = datetime.max


def parse(text):
    return datetime.fromisoformat(text) if text else None


def hours(number):
    return timedelta(hours=number)


class Stay:
    """An admission, its patient, its values as (charted, known, item, value)."""

    def __init__(self, row, patient, icu):
        self.begins, ends = parse(row["admittime"]), parse(row["dischtime"])
        self.died = parse(row["deathtime"]) or (
            ends if row["hospital_expire_flag"] == "1" else None
        )
        if self.died and ends and self.died > ends and self.died.date() != ends.date():
            self.died = None
        self.ends = self.died or ends
        self.age, self.sex = None, {"M": 1, "F": 0}.get(patient["gender"])
        if patient["anchor_age"]:
            anchor, since = (
                int(patient["anchor_age"]),
                self.begins.year - int(patient["anchor_year"]),
            )
            self.age = 90 + min(since, 0) if anchor > 89 else anchor + since
        times = [(parse(each["intime"]), each["first_careunit"], each["outtime"]) for each in icu]
        self.icu = sorted((begins, unit, parse(ends) or FAR) for begins, unit, ends in times)
        self.values = []

    def holds(self, at, before=0):
        return self.ends is not None and self.begins - hours(before) <= at <= self.ends

    def gaps(self):
        """The gaps of sodium, chloride and bicarbonate drawn together, of each the first known."""
        drawn = {}
        for at, known, item, value in sorted(self.values, key=lambda v: (v[1] or FAR, v[3])):
            drawn.setdefault(at, {}).setdefault(item, (known or FAR, value))
        for at, found in drawn.items():
            if found.keys() >= set(PARTS_OF_GAP):
                known, (sodium, chloride, bicarbonate) = zip(
                    *map(found.get, PARTS_OF_GAP), strict=True
                )
                latest = max(known)
                yield at, None if latest == FAR else latest, 0, sodium - chloride - bicarbonate

    def judge(self, outcome, *, window=12.0, horizon=72.0, fewest=2, computed=False, exclude=False):
        """The column of the rule that leaves it out, or its inputs and labels."""
        gap_items = {0} if computed else {GAP}
        values = [*self.values, *self.gaps()] if computed else self.values
        series = [value for value in values if value[2] in gap_items]
        if self.age is None or self.age < 18:
            return "not_adult"
        opening = [at for at, known, *_ in series if known and known <= at + hours(window)]
        if not opening:
            return "no_value"
        first, time = min(opening), min(opening) + hours(window)
        until = time + hours(horizon)
        if time < self.begins:
            return "before_admission"
        if self.died and self.died <= time:
            return "dead"
        if self.ends <= time:
            return "gone"
        inputs = sorted(v for v in values if v[1] and first <= v[0] and v[1] <= time)
        shown = [(value, at - first) for at, _, item, value in inputs if item in gap_items]
        if len(shown) < fewest:
            return "too_few"
        death = self.died is not None and self.died <= until
        there = [unit for begins, unit, ends in self.icu if begins <= time < ends]
        icu = None if there else any(time < begins <= until for begins, *_ in self.icu)
        unresolved = self.unresolved(series, time, until, died=death)
        if there and outcome == ["icu"]:
            return "in_intensive_care"
        if exclude and not death and self.ends < until:
            return "excluded_discharge"
        if unresolved is None and "unresolved" in outcome:
            return "not_measured"
        labels = {"death": death, "icu": icu, "unresolved": unresolved}
        found = {
            "clinical_trajectory": " -> ".join(
                f"{value:g} ({round(hour.total_seconds() / 3600, 2):g}h)" for value, hour in shown
            ),
            "static_age [years]": min(self.age, 90),
            "static_sex_male": self.sex,
            "static_icu": bool(there),
            "static_hours_since_admission [h]": round((time - self.begins) / hours(0.1)) / 10,
        }
        for kind in ("cardiac", "medical", "neuro", "surgical", "trauma"):
            found[f"static_unit_{kind}"] = bool(there) and kind in UNITS[there[-1]]
        for title, items in CHEMISTRY.items():
            last = max(((*v[:2], v[3]) for v in inputs if v[2] in items), default=(None,))
            found[f"static_last_{title}"] = last[-1]
        found |= {f"label_{name}": label for name, label in labels.items()}
        event = any(labels[name] for name in outcome)
        return found | {"label_escalation": event}

    def unresolved(self, series, time, until, *, died):
        """Walk through the values as a nurse does: is the gap closed now, was it ever?"""
        lowest = {}
        for at, _, _, value in series:
            lowest[at] = min(value, lowest.get(at, value))
        ever = reopened = seen = False
        for at, value in sorted(lowest.items()):
            if time < at <= until:
                reopened |= ever and value > 12
                seen, ever = True, ever or value <= 12
            elif at <= time:
                ever = value <= 12
        stays = not died and self.ends >= until
        if stays and not seen:
            return None
        return reopened or (not ever and (died or stays))


def read_slowly(tables):
    """All stays by hadm_id, and how many values were left out or had no hadm_id, by reason."""
    patients = tables["hosp/patients"].set_index("subject_id").to_dict("index")
    icu = tables["icu/icustays"].to_dict("records")
    stays, of_patient, counts = {}, {}, Counter()
    for row in tables["hosp/admissions"].to_dict("records"):
        own = [each for each in icu if each["hadm_id"] == row["hadm_id"]]
        stay = stays[int(row["hadm_id"])] = Stay(row, patients[row["subject_id"]], own)
        of_patient.setdefault(row["subject_id"], {})[row["hadm_id"]] = stay
    items = {str(GAP), *(str(item) for group in CHEMISTRY.values() for item in group)}
    for lab in tables["hosp/labevents"].to_dict("records"):
        if lab["itemid"] not in items:
            continue
        at, value = parse(lab["charttime"]), float(lab["valuenum"] or "nan")
        own = of_patient[lab["subject_id"]]
        around = [stay for stay in own.values() if stay.holds(at)]
        stay, reason = own.get(lab["hadm_id"]), ""
        if not math.isfinite(value):
            reason = "without a number"
        elif not lab["hadm_id"]:
            reason = "without hadm_id, within none or several"
            if len(around) == 1:
                (stay,), reason = around, "without hadm_id, within one admission: taken"
        elif not stay:
            reason = "whose hadm_id is no admission of the patient"
        elif not stay.holds(at, 24):
            reason = "outside the admission that they name"
        counts[reason] += 1
        if not reason or reason.endswith("taken"):
            stored = parse(lab.get("storetime", lab["charttime"]))
            counts["without a time of storing: no input, outcome alone"] += stored is None
            known = max(at, stored) if stored else None
            stay.values.append((at, known, int(lab["itemid"]), value))
    del counts[""]
    return stays, dict(+counts)


def compare(folder, tables, outcome, computed=False, **request):
    """Compare all rows, the rules that removed others and the counts; return rows and reading."""
    stays, counts = read_slowly(tables)
    names = {"window_hours": "window", "horizon_hours": "horizon", "min_observations": "fewest"}
    words = {names[name]: value for name, value in request.items() if name in names}
    words |= {"computed": computed, "exclude": "discharged" in request}
    judged = {hadm: stay.judge(outcome, **words) for hadm, stay in stays.items()}
    request["compute_gap"] = "always" if computed else "reported"
    result = extracted(folder, outcome, **request)
    removed = Counter(each for each in judged.values() if isinstance(each, str))
    fewest = request.get("min_observations", 2)
    expected = {RULES[rule].format(fewest): count for rule, count in removed.items()}
    assert result.removed() == expected
    kept = {hadm: each for hadm, each in judged.items() if isinstance(each, dict)}
    expected = pd.DataFrame.from_dict(kept, "index")
    found = result.rows[[name for name in expected if name in result.rows]].sort_index()
    assert len(found.columns) >= 19
    numbers = [name for name in found if name != "clinical_trajectory"]
    typed = dict.fromkeys(numbers, float)
    pd.testing.assert_frame_equal(
        found.astype(typed), expected[list(found)].sort_index().astype(typed), check_names=False
    )
    return found, result, counts


@pytest.fixture(scope="module")
def demo():
    return read_tables(DEMO)


@pytest.mark.parametrize(("window", "horizon"), [(12.0, 72.0), (30.0, 24.0)])
def test_the_demo_is_read_as_a_slow_independent_reading_reads_it(window, horizon, demo):
    times = {"window_hours": window, "horizon_hours": horizon}
    rows, _, _ = compare(DEMO, demo, ["death"], **times)
    assert (rows.drop(columns="label_escalation").nunique() > 1).all()
    assert rows["label_icu"].isna().any()
    assert rows["label_unresolved"].isna().any()


def test_the_demo_has_so_many_rows_and_events(demo):
    rows, _, _ = compare(DEMO, demo, [*OUTCOMES])
    assert (len(rows), rows["label_escalation"].sum()) == (86, 64)
    assert len(compare(DEMO, demo, ["death"])[0]) == 87


# --------------------------------------------------------------------------- random hospitals


def random_hospital(rng):
    """Patients with admissions apart or overlapping; on the grid of hours edges are often met."""
    mini, hadm = Mini(), 0
    ages = [*rng.choice([17, 18, 50, 88, 91], 150).tolist(), None]
    for subject, age in enumerate(ages):
        for start in rng.choice(
            [-50, 0, 13, 30, 90, 10_000, 40_000], int(rng.integers(1, 4)), replace=False
        ):
            hadm += 1
            end = float(start + rng.choice([6, 12, 13, 30, 37, 49, 200]))
            death = rng.choice([None, end, end + 1, end + 30, end - 1], p=[0.6, 0.1, 0.1, 0.1, 0.1])
            about = {"gender": rng.choice(["F", "M", ""]), "age": age, "subject": subject}
            expired = int(rng.random() < 0.1)
            mini.admit(hadm, start, None if rng.random() < 0.03 else end, death=death, **about)
            mini.rows["hosp/admissions"][-1]["hospital_expire_flag"] = expired
            for _ in range(int(rng.choice([0, 1, 2]))):
                begin = float(start + rng.choice([0, 1, 12, 13, 14, 37]))
                mini.icu(hadm, begin, rng.choice([None, begin + 1, begin + 12, begin + 40]))
                mini.rows["icu/icustays"][-1]["first_careunit"] = rng.choice([*UNITS])
            for _ in range(int(rng.integers(0, 14))):
                hour = float(
                    start
                    + rng.choice([-24.02, -24, -12, -1, *[0, 1, 2, 6, 12, 13, 14, 24, 37, 38]])
                )
                others = (GLUCOSE, 50809, PH)
                parts = ((SODIUM, 140), (CHLORIDE, 100), (BICARBONATE, 20))
                stored = rng.choice([None, *hour + np.array([-1, 0, 0.5, 1, 1, 1, 11.5, 12, 12.5])])
                if rng.random() < 0.4:
                    words = {"stored": stored, "named": rng.random() < 0.7}
                    for item, value in parts[: rng.choice([2, 3, 3])]:
                        mini.lab(hadm, hour, value + int(rng.choice([-8, -2, 0, 2])), item, **words)
                item = GAP if rng.random() < 0.7 else int(rng.choice(others))
                value = rng.choice([None, "inf", 9, 12, 12.5, 20], p=[0.02, 0.02, *[0.24] * 4])
                named, other = rng.random() < 0.7, {}
                if named and rng.random() < 0.05:
                    other = {"hadm_id": int(rng.integers(1, 300))}
                mini.lab(hadm, hour, value, item, stored=stored, named=named, **other)
    return mini.tables()


REQUESTS = [
    (["death"], {}),
    (["icu"], {"min_observations": 1, "window_hours": 6.0}),
    (["unresolved"], {"horizon_hours": 24.0}),
    (["death", "icu"], {"discharged": "exclude", "min_observations": 1, "horizon_hours": 24.0}),
    ([*OUTCOMES], {"computed": True, "min_observations": 1}),
    ([*OUTCOMES], {"horizon_hours": 25.0, "discharged": "exclude"}),
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_random_hospitals_are_read_as_slowly_read(number, tmp_path):
    tables = random_hospital(np.random.default_rng(number))
    outcome, request = REQUESTS[number]
    folder = write_tables(tmp_path / "mimic", tables)
    rows, result, counts = compare(folder, tables, outcome, **request)
    assert result.description["values"] == counts
    assert len(rows) > 20


# --------------------------------------------------------------------------- same rows


def test_any_form_order_and_limit_gives_the_same_rows(demo, tmp_path):
    stored = with_storing_times(demo, 0)
    stored["hosp/labevents"]["comments"] = 'a ""high"" value,\nsaid so'
    mixed = {name: shuffled(table, 1) for name, table in stored.items()}
    request = {"series": ("all",), "compute_gap": "always", "threads": 2, "memory_limit": "2GB"}
    first = extracted(write_tables(tmp_path / "csv", stored), **request)
    assert len(first.rows) > 50
    for form in (".csv", ".csv.gz", ".parquet"):
        folder = write_tables(tmp_path / f"mixed{form}", mixed, form)
        other = extracted(folder, **request | {"threads": 1, "memory_limit": "200MB"})
        assert other.csv == first.csv
        for key in ("flow", "definitions", "values"):
            assert other.description[key] == first.description[key]
        for name, digest in other.description["tables_sha256"].items():
            content = (folder / f"{name}{form}").read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest
