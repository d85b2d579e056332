"""MIMIC-IV read slowly: the rules again, admission by admission and value by value."""

import math
from collections import Counter
from datetime import datetime, timedelta

import pandas as pd

from medgemma_clinical.data.importers.cohort import RULES
from mimic_files import BICARBONATE, CHLORIDE, GAP, SODIUM

COMPUTED = -1
CHEMISTRY = {
    "anion gap [mEq/L]": (GAP,),
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
TITLES = {item: title for title, items in CHEMISTRY.items() for item in items}
EQUIVALENT = {"meq/l": 1, "mmol/l": 1}
FACTORS = {  # to the unit of the title; molar masses in g/mol
    "creatinine [mg/dL]": {"mg/dl": 1, "umol/l": 113.12 / 10_000},
    "glucose [mg/dL]": {"mg/dl": 1, "mmol/l": 180.16 / 10},
    "lactate [mmol/L]": {"mmol/l": 1, "mg/dl": 0.11101},
    "pH": {"units": 1, "ph": 1, "": 1},
    "urea nitrogen [mg/dL]": {"mg/dl": 1, "mmol/l": 2.801},
}
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
    "MICU": {"medical"},
    "Neuro ICU": {"neuro"},
    "": set(),
}
FAR = datetime.max


def parse(text):
    return datetime.fromisoformat(text) if text else None


def hours(number):
    return timedelta(hours=number)


def between(early, late):
    return (late - early).total_seconds() / 3600


def plain(number):
    return repr(float(number)).removesuffix(".0")


def is_ketoacidosis(code, version):
    begins = ("2501",) if version == "9" else ("E081", "E091", "E101", "E111", "E131")
    return code.upper().replace(".", "").startswith(begins)


class Stay:
    """An admission, its patient, its values as (charted, known, item, value)."""

    def __init__(self, row, patient, icu, codes):
        self.hadm = int(row["hadm_id"])
        self.name = row.get("id", self.hadm)
        self.begins, ends = parse(row["admittime"]), parse(row["dischtime"])
        expired = row["hospital_expire_flag"] == "1"
        self.died = parse(row["deathtime"]) or (ends if expired else None)
        if self.died and ends and self.died > ends and self.died.date() != ends.date():
            self.died = None
        self.ends = self.died or ends
        self.age, self.sex, self.is_least = None, {"M": 1, "F": 0}.get(patient["gender"]), False
        if patient["anchor_age"]:
            anchor = int(patient["anchor_age"])
            since = self.begins.year - int(patient["anchor_year"])
            self.is_least = anchor > 89
            self.age = 90 + min(since, 0) if self.is_least else anchor + since
        self.coded = sorted(parse(code.get("entered")) or datetime.min for code in codes)
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
                parts = map(found.get, PARTS_OF_GAP)
                known, (sodium, chloride, bicarbonate) = zip(*parts, strict=True)
                gap, latest = round(sodium - chloride - bicarbonate, 6), max(known)
                yield at, None if latest == FAR else latest, COMPUTED, gap

    def time(self, items, window):
        """When it is asked: a window after the first value known within one."""
        values = [*self.values, *self.gaps()]
        known = [v[0] for v in values if v[2] in items and v[1] and v[1] <= v[0] + hours(window)]
        return min(known) + hours(window) if known else None

    def judge(self, outcome, *, cohort, series, computed, exclude, window, horizon, fewest):
        """The column of the rule that leaves it out, or its inputs and labels."""
        gap = COMPUTED if computed else GAP
        items = {title: {gap if i == GAP else i for i in CHEMISTRY[title]} for title in CHEMISTRY}
        values = [v for v in [*self.values, *self.gaps()] if v[2] not in {GAP, COMPUTED} - {gap}]
        if self.age is None or self.age < 18:
            return "not_adult"
        time = self.time(items[series[0]], window)
        if cohort == "dka" and not (self.coded and (time is None or self.coded[0] <= time)):
            return "not_coded"
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
        shown = {title: [v for v in inputs if v[2] in items[title]] for title in CHEMISTRY}
        if len(shown[series[0]]) < fewest:
            return "too_few"
        if cohort == "biochemical" and not self.in_ketoacidosis(shown):
            return "no_ketoacidosis"
        death = self.died is not None and self.died <= until
        there = [unit for begins, unit, ends in self.icu if begins <= time < ends]
        icu = None if there else any(time < begins <= until for begins, *_ in self.icu)
        unresolved = self.unresolved([v for v in values if v[2] == gap], time, until, died=death)
        if there and outcome == ["icu"]:
            return "in_intensive_care"
        if exclude and not death and self.ends < until:
            return "excluded_discharge"
        if unresolved is None and "unresolved" in outcome:
            return "not_measured"
        labels = {"death": death, "icu": icu, "unresolved": unresolved}
        since = round(between(self.begins, time) * 10) / 10
        found = {
            "id": self.name,
            "care_unit": there[-1] if there else None,
            "prediction_hours": round(window, 2),
            "static_age [years]": min(self.age, 90),
            "static_sex_male": self.sex,
            "static_icu": bool(there),
            "static_hours_since_admission [h]": since,
        }
        for k, title in enumerate(series):
            name = title.replace("gap", "gap without potassium") if computed else title
            found[f"trajectory_{name}" if k else "clinical_trajectory"] = " -> ".join(
                f"{plain(value)} ({plain(round(between(first, at), 2))}h)"
                for at, _, _, value in shown[title]
            )
        for kind in ("cardiac", "medical", "neuro", "surgical", "trauma"):
            found[f"static_unit_{kind}"] = bool(there) and kind in UNITS[there[-1]]
        last = {}
        for title in [title for title in CHEMISTRY if title not in series]:
            name = title.replace("gap", "gap without potassium") if computed else title
            latest = max(((*v[:2], v[3]) for v in shown[title]), default=(None,))[-1]
            found[f"static_last_{name}"] = last[name] = latest
        found["clinical_context"] = self.context(there[-1] if there else None, since, last)
        found |= {f"label_{name}": label for name, label in labels.items()}
        if cohort != "all":
            found |= self.gap_event([v for v in values if v[2] == gap], time)
        event = any(labels[name] for name in outcome)
        return found | {"label_escalation": event}

    def gap_event(self, series, time):
        """What ends a gap that is open now, and when: its closing, else death or discharge."""
        lowest, is_open = {}, False
        for at, _, _, value in series:
            lowest[at] = min(value, lowest.get(at, value))
        for at, value in sorted(lowest.items()):
            if at <= time:
                is_open = value > 12
            elif is_open and value <= 12:
                return {"event": 1, "event_hours": float(f"{between(time, at):.10g}")}
        if not is_open:
            return {"event": None, "event_hours": None}
        end = (2, self.died) if self.died else (3, self.ends)
        return {"event": end[0], "event_hours": float(f"{between(time, end[1]):.10g}")}

    def in_ketoacidosis(self, shown):
        """By glucose, bicarbonate and gap, all measured, and the pH where it is."""
        glucose, acid, gap, ph = (
            [v[3] for v in shown[title]]
            for title in ("glucose [mg/dL]", "bicarbonate [mEq/L]", "anion gap [mEq/L]", "pH")
        )
        sick = max(glucose, default=0) > 250 and min(acid, default=99) <= 18
        return sick and max(gap, default=0) > 12 and min(ph, default=7) <= 7.3

    def context(self, unit, since, last):
        over = self.is_least or self.age > 89
        age = f"Over {min(self.age - self.is_least, 89)}" if over else self.age
        who = {1: "man", 0: "woman"}.get(self.sex, "patient")
        where = "not in intensive care" if unit is None else unit or "intensive care"
        words = [f"{age}-year-old {who}", where, f"{plain(since)} h since admission"]
        for title in sorted(title for title in last if last[title] is not None):
            name, _, unit = title.rstrip("]").partition(" [")
            words.append(f"{name} {plain(last[title])}" + (f" ({unit})" if unit else ""))
        return ", ".join(words)

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
    icu, codes = {}, {}
    for row in tables["icu/icustays"].to_dict("records"):
        icu.setdefault(row["hadm_id"], []).append(row)
    for row in tables["hosp/diagnoses_icd"].to_dict("records"):
        if is_ketoacidosis(row["icd_code"], row["icd_version"]):
            codes.setdefault(row["hadm_id"], []).append(row)
    stays, of_patient, counts, owners = {}, {}, Counter(), {}
    for row in tables["hosp/admissions"].to_dict("records"):
        own = [known.get(row["hadm_id"], []) for known in (icu, codes)]
        stay = stays[int(row["hadm_id"])] = Stay(row, patients[row["subject_id"]], *own)
        of_patient.setdefault(row["subject_id"], {})[row["hadm_id"]] = stay
    for row, lab in tables["hosp/labevents"].to_dict("index").items():
        title = TITLES.get(int(lab["itemid"]))
        if not title:
            continue
        at, value = parse(lab["charttime"]), float(lab["valuenum"] or "nan")
        own = of_patient.get(lab["subject_id"], {})
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
            factor = FACTORS.get(title, EQUIVALENT).get(lab["valueuom"].lower())
            if factor is None:
                counts[f"of {title.partition(' [')[0]} in no unit or an unknown one"] += 1
                continue
            value = value if factor == 1 else round(value * factor, 6)
            stay.values.append((at, max(at, stored) if stored else None, int(lab["itemid"]), value))
            owners[row] = stay.hadm
    del counts[""]
    return stays, dict(+counts), owners


TITLE_OF = {title.partition(" [")[0]: title for title in CHEMISTRY}


def known_cells(table):
    """Return a dict of each row, None where a cell is empty."""
    return table.astype(object).where(table.notna() & (table != ""), None).to_dict("index")


def compare_with(stays, result, outcome, **request):
    """Compare rows and flow of an extraction with those of a slow reading; return the rows."""
    words = {
        "cohort": request.get("cohort", "all"),
        "series": [TITLE_OF[name] for name in request.get("series", ("anion gap",))],
        "computed": request.get("compute_gap") == "always",
        "exclude": "discharged" in request,
        "window": request.get("window_hours", 12.0),
        "horizon": request.get("horizon_hours", 72.0),
        "fewest": request.get("min_observations", 2),
    }
    judged = {hadm: stay.judge(outcome, **words) for hadm, stay in stays.items()}
    removed = Counter(each for each in judged.values() if isinstance(each, str))
    removed = {RULES[rule].format(words["fewest"]): count for rule, count in removed.items()}
    assert result.removed() == removed
    kept = {hadm: each for hadm, each in judged.items() if isinstance(each, dict)}
    rows = result.rows.drop(columns=["subject_id", "hospital"], errors="ignore")
    assert known_cells(rows) == known_cells(pd.DataFrame.from_dict(kept, "index"))
    return rows
