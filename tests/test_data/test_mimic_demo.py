"""The demo of MIMIC-IV: counted by another, slow reading; the same rows from any form of file."""

import hashlib
import math

import pandas as pd
import pytest

from medgemma_clinical.data.cohort import OUTCOMES
from mimic_files import (
    DEMO,
    GAP,
    extracted,
    read_tables,
    shuffled,
    with_storing_times,
    write_tables,
)

POTASSIUM = 50971
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
KINDS = {"cardiac": ("cardiac", "coronary"), "surgical": ("surgical", "sicu")}


@pytest.fixture(scope="module")
def demo():
    return read_tables(DEMO)


class Slow:
    """The rules again, admission by admission and value by value, on tables of text."""

    def __init__(self, demo):
        self.admissions = demo["hosp/admissions"].to_dict("records")
        self.patients = demo["hosp/patients"].set_index("subject_id").to_dict("index")
        self.icu = demo["icu/icustays"].to_dict("records")
        self.labs = demo["hosp/labevents"].to_dict("records")

    @staticmethod
    def span(admission):
        end = admission["deathtime"] or admission["dischtime"]
        if admission["dischtime"] and end[:10] > admission["dischtime"][:10]:
            end = admission["dischtime"]
        return pd.Timestamp(admission["admittime"]), pd.Timestamp(end)

    def values(self, admission, items=(GAP,)):
        """Time and value of all values of some items, by time and value."""
        start, end = self.span(admission)
        subject = admission["subject_id"]
        others = [a for a in self.admissions if a["subject_id"] == subject]
        found = []
        numbers = [str(item) for item in items]
        own = (each for each in self.labs if each["subject_id"] == subject)
        for lab in (each for each in own if each["itemid"] in numbers):
            at = pd.Timestamp(lab["charttime"])
            if lab["hadm_id"] == "":
                holding = [a for a in others if self.span(a)[0] <= at <= self.span(a)[1]]
                mine = holding == [admission]
            else:
                mine = lab["hadm_id"] == admission["hadm_id"]
                mine = mine and start - pd.Timedelta("24h") <= at <= end
            if mine:
                found.append((at, float(lab["valuenum"])))
        return sorted(found)

    def static(self, admission, window):
        """Return the static features at the prediction time."""
        start, _ = self.span(admission)
        patient = self.patients[admission["subject_id"]]
        first = self.values(admission)[0][0]
        time = first + pd.Timedelta(window, "h")
        stays = [s for s in self.icu if s["hadm_id"] == admission["hadm_id"]]
        there = [s for s in stays if pd.Timestamp(s["intime"]) <= time < pd.Timestamp(s["outtime"])]
        found = {
            "static_age [years]": min(self.age(admission, patient), 90),
            "static_sex_male": int(patient["gender"] == "M"),
            "static_icu": int(bool(there)),
            "static_hours_since_admission [h]": round((time - start).total_seconds() / 360) / 10,
        }
        unit = max(there, key=lambda s: s["intime"])["first_careunit"] if there else ""
        for kind in ("cardiac", "medical", "neuro", "surgical", "trauma"):
            words = KINDS.get(kind, (kind,))
            found[f"static_unit_{kind}"] = int(any(word in unit.lower() for word in words))
        for title, items in CHEMISTRY.items():
            values = [v for at, v in self.values(admission, items) if first <= at <= time]
            found[f"static_last_{title}"] = values[-1] if values else math.nan
        return found

    @staticmethod
    def age(admission, patient):
        year = int(admission["admittime"][:4])
        return int(patient["anchor_age"]) + year - int(patient["anchor_year"])

    def judge(self, admission, window, horizon):
        """Return why it is left out, or death, icu, unresolved."""
        _, end = self.span(admission)
        patient = self.patients[admission["subject_id"]]
        if self.age(admission, patient) < 18:
            return "under 18"
        values = self.values(admission)
        if not values:
            return "no value"
        time = values[0][0] + pd.Timedelta(window, "h")
        until = time + pd.Timedelta(horizon, "h")
        if end <= time:
            return "died" if admission["deathtime"] else "discharged by"
        if sum(at <= time for at, _ in values) < 2:
            return "fewer"
        died = admission["deathtime"] != "" and end <= until
        stays = [s for s in self.icu if s["hadm_id"] == admission["hadm_id"]]
        begun = [pd.Timestamp(s["intime"]) for s in stays]
        left = [pd.Timestamp(s["outtime"]) for s in stays]
        there = any(a <= time < b for a, b in zip(begun, left, strict=True))
        icu = None if there else int(any(time < a <= until for a in begun))
        return int(died), icu, self.unresolved(values, time, until, end, died=died)

    @staticmethod
    def unresolved(values, time, until, end, *, died):
        """Walk through the values as a nurse does: is the gap closed now, was it ever?"""
        lowest = {}
        for at, value in values:
            lowest[at] = min(value, lowest.get(at, value))
        ever = reopened = seen = False
        for at, value in sorted(lowest.items()):
            if at > until:
                break
            if at > time:
                reopened |= ever and value > 12
                seen = True
                ever |= value <= 12
            else:
                ever = value <= 12
        stays = not died and end >= until
        if reopened:
            return 1
        if stays and not seen:
            return None
        return int(not ever and (died or stays))


@pytest.mark.parametrize(("window", "horizon"), [(12.0, 72.0), (30.0, 24.0)])
def test_the_demo_is_counted_as_a_slow_independent_reading_counts_it(window, horizon, demo):
    slow = Slow(demo)
    truth = {int(row["hadm_id"]): slow.judge(row, window, horizon) for row in slow.admissions}
    result = extracted(DEMO, ["death"], window_hours=window, horizon_hours=horizon)
    kept = {hadm: parts for hadm, parts in truth.items() if isinstance(parts, tuple)}
    assert {hadm: tuple(result.labels(hadm)) for hadm in result.rows.index} == kept
    reasons = pd.Series([r for r in truth.values() if isinstance(r, str)]).value_counts()
    assert sorted(result.removed().values()) == sorted(reasons)
    for rule, removed in result.removed().items():
        assert removed == next(n for reason, n in reasons.items() if str(reason) in rule)
    numbers = result.rows.filter(like="static_").astype(float)
    admissions = {int(row["hadm_id"]): row for row in slow.admissions}
    static = {hadm: slow.static(admissions[hadm], window) for hadm in numbers.index}
    expected = pd.DataFrame.from_dict(static, "index")[list(numbers)].astype(float)
    pd.testing.assert_frame_equal(numbers, expected, check_names=False)
    assert (numbers.nunique() > 1).all()
    assert {parts[1] for parts in kept.values()} == {None, 0, 1}
    assert {parts[2] for parts in kept.values()} == {None, 0, 1}


def test_the_demos_rows_of_escalation_are_those_whose_gap_is_known():
    """Whatever the other parts say: a row kept for its event alone would be chosen by it."""
    result, every = extracted(DEMO), extracted(DEMO, ["death"])
    parts = every.rows[[f"label_{name}" for name in OUTCOMES]]
    event = (parts == 1).any(axis=1)
    known = parts["label_unresolved"].notna()
    assert result.rows.index.tolist() == every.rows.index[known].tolist()
    assert result.rows["label_escalation"].tolist() == event[known].tolist()
    events = result.rows["label_escalation"].sum()
    assert (len(every.rows), len(result.rows), events) == (87, 86, 64)


def test_the_demos_coded_admissions(demo):
    """Four are coded: too few to train on, but the rows are there."""
    code = demo["hosp/diagnoses_icd"]["icd_code"]
    coded = demo["hosp/diagnoses_icd"][code.str.match("2501|E(08|09|10|11|13)1")]["hadm_id"]
    result = extracted(DEMO, ["death"], cohort="dka")
    flow = result.description["flow"]
    assert set(result.rows.index) <= set(coded.astype(int))
    assert flow[1]["left"] == coded.nunique() == 4
    assert len(result.rows) == 4 - sum(rule["removed"] for rule in flow[2:])


# --------------------------------------------------------------------------- same rows


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
