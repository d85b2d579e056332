"""MIMIC-IV read slowly: the rules again, admission by admission and value by value."""

import math
from collections import Counter
from datetime import datetime, timedelta

from mimic_files import BICARBONATE, CHLORIDE, GAP, SODIUM

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
        self.hadm = int(row["hadm_id"])
        self.begins, ends = parse(row["admittime"]), parse(row["dischtime"])
        expired = row["hospital_expire_flag"] == "1"
        self.died = parse(row["deathtime"]) or (ends if expired else None)
        if self.died and ends and self.died > ends and self.died.date() != ends.date():
            self.died = None
        self.ends = self.died or ends
        self.age, self.sex = None, {"M": 1, "F": 0}.get(patient["gender"])
        if patient["anchor_age"]:
            anchor = int(patient["anchor_age"])
            since = self.begins.year - int(patient["anchor_year"])
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

    def time(self, items, window):
        """When it is asked: a window after the first value known within one."""
        values = [*self.values, *self.gaps()]
        known = [v[0] for v in values if v[2] in items and v[1] and v[1] <= v[0] + hours(window)]
        return min(known) + hours(window) if known else None

    def judge(self, outcome, *, window=12.0, horizon=72.0, fewest=2, computed=False, exclude=False):
        """The column of the rule that leaves it out, or its inputs and labels."""
        values, gap_items = self.values, {0 if computed else GAP}
        values = [*values, *self.gaps()] if computed else values
        series = [value for value in values if value[2] in gap_items]
        if self.age is None or self.age < 18:
            return "not_adult"
        time = self.time(gap_items, window)
        if not time:
            return "no_value"
        first = time - hours(window)
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
    """Stays by hadm_id, how many values were left out or had no hadm_id, whose a value (row) is."""
    patients = tables["hosp/patients"].set_index("subject_id").to_dict("index")
    icu = tables["icu/icustays"].to_dict("records")
    stays, of_patient, counts, owners = {}, {}, Counter(), {}
    for row in tables["hosp/admissions"].to_dict("records"):
        own = [each for each in icu if each["hadm_id"] == row["hadm_id"]]
        stay = stays[int(row["hadm_id"])] = Stay(row, patients[row["subject_id"]], own)
        of_patient.setdefault(row["subject_id"], {})[row["hadm_id"]] = stay
    items = {str(GAP), *(str(item) for group in CHEMISTRY.values() for item in group)}
    for row, lab in tables["hosp/labevents"].to_dict("index").items():
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
            owners[row] = stay.hadm
    del counts[""]
    return stays, dict(+counts), owners
