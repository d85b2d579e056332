"""MIMIC-IV: nothing after the prediction time changes a letter of what a model reads."""

import numpy as np
import pandas as pd
import pytest

from mimic_files import (
    BICARBONATE,
    DEMO,
    GAP,
    GLUCOSE,
    extracted,
    read_tables,
    shuffled,
    with_storing_times,
    write_tables,
)
from slow_mimic import COMPUTED, read_slowly


def times_and_owners(stays, owners, request):
    """When each admission of the demo is asked, and each value's admission, by the slow reading."""
    item = BICARBONATE if "item" in request else COMPUTED if "compute_gap" in request else GAP
    times = {
        str(n): stay.time({item}, request.get("window_hours", 12)) for n, stay in stays.items()
    }
    return pd.to_datetime(pd.Series(times)), pd.Series(owners).astype(str)


def later(times, rng):
    """Move times by up to four days."""
    return times + pd.to_timedelta(rng.integers(0, 96, len(times)), unit="h")


def altered(tables, times, owners, rng):
    """Change everything that is charted, stored or happens after the prediction time."""
    result = {name: table.copy() for name, table in tables.items()}
    labs = result["hosp/labevents"]
    then = owners.reindex(labs.index).map(times)
    chart, stored = (pd.to_datetime(labs[name]) for name in ("charttime", "storetime"))
    late = (chart > then) | (stored > then)
    labs.loc[late, "valuenum"] = rng.integers(1, 400, int(late.sum())).astype(str)
    labs.loc[late, "charttime"] = later(chart, rng)[late].astype(str)
    labs.loc[late, "storetime"] = later(stored, rng)[late].astype(str)
    result["hosp/labevents"] = labs[~late | (rng.random(len(labs)) < 0.7)]
    stays = result["icu/icustays"]
    then = stays["hadm_id"].map(times)
    out = pd.to_datetime(stays["outtime"]) > then
    longer = later(pd.to_datetime(stays["outtime"]), rng)
    stays.loc[out, "outtime"] = longer[out].astype(str)
    begins = pd.to_datetime(stays["intime"]) > then
    stays.loc[begins, "intime"] = longer[begins].astype(str)
    result["icu/icustays"] = stays[~begins | (rng.random(len(stays)) < 0.5)]
    admissions = result["hosp/admissions"]
    then = admissions["hadm_id"].map(times)
    open_end = pd.to_datetime(admissions["dischtime"]) > then
    open_end &= ~(pd.to_datetime(admissions["deathtime"].replace("", None)) <= then)
    begun = pd.to_datetime(admissions["admittime"])
    following = begun.sort_values().groupby(admissions["subject_id"]).shift(-1)
    end = then + pd.to_timedelta(rng.integers(1, 150, len(admissions)), unit="h")
    # A patient who comes again has left alive before.
    between = then + (following - then) * rng.random(len(admissions))
    end = end.where(following.isna(), between.dt.floor("s"))
    open_end &= following.isna() | (end > then)
    dies = (rng.random(len(admissions)) < 0.5) & following.isna().to_numpy()
    admissions.loc[open_end, "dischtime"] = end[open_end].astype(str)
    admissions.loc[open_end, "deathtime"] = np.where(dies, end.astype(str), "")[open_end]
    admissions.loc[open_end, "hospital_expire_flag"] = np.where(dies, "1", "0")[open_end]
    patients = result["hosp/patients"]
    patients["dod"] = rng.permutation(patients["dod"])
    codes = result["hosp/diagnoses_icd"]
    codes["seq_num"] = rng.permutation(codes["seq_num"])
    return {name: shuffled(table, int(rng.integers(2**31))) for name, table in result.items()}


def without_some_gaps(tables):
    """Take the reported gap from every other patient."""
    labs = tables["hosp/labevents"]
    odd = labs["subject_id"].astype(int) % 2 == 1
    return {**tables, "hosp/labevents": labs[~odd | (labs["itemid"] != str(GAP))]}


def all_in_ketoacidosis(tables):
    """Sugar for all who are measured, and the code for every other admission."""
    labs, codes = (tables[name].copy() for name in ("hosp/labevents", "hosp/diagnoses_icd"))
    labs.loc[labs["itemid"] == str(GLUCOSE), "valuenum"] = "300"
    coded = (codes["seq_num"] == "1") & (codes["hadm_id"].astype(int) % 2 == 1)
    codes.loc[coded, ["icd_code", "icd_version"]] = ["E1010", "10"]
    return {**tables, "hosp/labevents": labs, "hosp/diagnoses_icd": codes}


REQUESTS = [
    {"outcome": ["death"]},
    {},
    {"outcome": ["icu"]},
    {"outcome": ["unresolved"], "compute_gap": "always"},
    {"outcome": ["death"], "item": "bicarbonate"},
    {"outcome": ["death"], "series": ("all",), "compute_gap": "always"},
    {"outcome": ["death"], "cohort": "biochemical", "window_hours": 72.0},
    {"outcome": ["death"], "cohort": "dka"},
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """60 patients of the demo with and without some gaps: tables, folder, a slow reading."""
    whole = read_tables(DEMO)
    kept = whole["hosp/patients"]["subject_id"].iloc[:60]
    whole = {n: t[t["subject_id"].isin(kept)] if "subject_id" in t else t for n, t in whole.items()}
    whole = all_in_ketoacidosis(with_storing_times(whole, 0))
    found = {}
    for lacking, tables in ((False, whole), (True, without_some_gaps(whole))):
        folder = write_tables(tmp_path_factory.mktemp("mimic"), tables)
        stays, _, owners = read_slowly(tables)
        found[lacking] = (tables, folder, stays, owners)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_nothing_after_the_prediction_time_changes_a_letter(number, demo, tmp_path):
    """Values and their times, order of diagnoses, transfers, deaths and discharges of the demo.

    Which rows there are depends on the future alone where their outcome is unknown.
    """
    request = REQUESTS[number]
    tables, folder, *read = demo["compute_gap" in request]
    changed = altered(tables, *times_and_owners(*read, request), np.random.default_rng(number))
    before = extracted(folder, **request)
    after = extracted(write_tables(tmp_path, changed), **request)
    inputs, now = before.inputs(), after.inputs()
    both = inputs.keys() & now.keys()
    assert len(both) > 5
    assert before.rows.filter(like="static_").shape[1] >= 9, "the inputs hold these too"
    assert {hadm: now[hadm] for hadm in both} == {hadm: inputs[hadm] for hadm in both}
    assert request.get("outcome") != ["death"] or inputs.keys() == now.keys()
    assert not after.rows.equals(before.rows), "the labels did change"
    if "cohort" in request:
        known = before.rows["event_hours"].dropna()
        assert len(known) > 5
        assert not after.rows["event_hours"].reindex(known.index).equals(known)
