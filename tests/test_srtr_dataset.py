"""The SRTR data set: cohorts of whole folders, texts, scoring, no leaks, and the command."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest

import srtr_dataset
from medgemma_clinical.data.scoring import Findings
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.files import InputError
from srtr_dataset import ORGANS, SRTRTrajectoryDataset
from srtr_files import (
    LISTED,
    SUFFIX,
    SYNTHETIC,
    candidate,
    filler,
    history_row,
    random_tables,
    removed,
    synthetic_tables,
    write_folder,
    write_table,
)

ORGAN_NAMES = tuple(ORGANS)
Change = Callable[[pd.DataFrame, pd.DataFrame], Any]


@pytest.fixture(scope="module")
def synthetic() -> dict[str, SRTRTrajectoryDataset]:
    return {organ: SRTRTrajectoryDataset(SYNTHETIC, organ) for organ in ORGAN_NAMES}


def inputs(dataset: SRTRTrajectoryDataset) -> dict[str, tuple[Any, ...]]:
    """All that a model is shown of each registration, exactly."""
    result = {}
    assert dataset.statics is not None
    assert dataset.prediction_hours is not None
    simple = pd.concat(dataset.baseline_inputs().values(), axis=1).to_numpy()
    for i, name in enumerate(dataset.ids):
        rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
        series = dataset.times[rows].tobytes(), dataset.values[rows].tobytes()
        beside = dataset.statics[i].tobytes(), dataset.prediction_hours[i]
        result[name] = (*series, dataset.prompt(i), simple[i].tobytes(), *beside)
    return result


# ------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_every_reason_and_label_of_the_sas_files_is_the_expected_one(
    organ: str, synthetic: dict[str, SRTRTrajectoryDataset]
) -> None:
    dataset = synthetic[organ]
    truth = pd.read_csv(SYNTHETIC / f"expected_{SUFFIX[organ]}.csv").set_index("PX_ID")
    truth = truth.sort_index()
    registrations = dataset.registrations
    assert registrations.index.tolist() == truth.index.tolist()
    assert registrations["reason"].astype(str).tolist() == truth["left_out"].fillna("").tolist()
    pd.testing.assert_series_equal(registrations["label"], truth["label"])
    kept = truth[truth["left_out"].isna()]
    assert dataset.ids.tolist() == kept.index.astype(str).tolist()
    assert dataset.groups.tolist() == kept["PERS_ID"].astype(str).tolist()
    assert dataset.labels.tolist() == kept["label"].tolist()
    assert dataset.flow["left"].iloc[-1] == len(dataset)
    counts = dataset.flow.set_index("rule")["removed"]
    assert counts[counts > 0].to_dict() == truth["left_out"].value_counts().to_dict()


FORMS = {
    "csv, MM/DD/YY and DDMONYY, labels": (".csv", "mdy2", ".csv", "ddmonyy", True),
    "csv, DDMONYYYY and ISO, labels": (".csv", "ddmonyyyy", ".CSV", "iso", True),
    "Stata dates and ISO times": (".dta", "iso", ".csv", "isotime", False),
    "SAS days in Stata, MM/DD/YYYY": (".CSV", "mdy4", ".DTA", "sas", True),
    "Parquet": (".parquet", "iso", ".parquet", "sas", False),
}


@pytest.mark.parametrize(
    ("organ", "form"), list(zip([*ORGAN_NAMES * 2, "liver"], FORMS, strict=True))
)
def test_any_storage_gives_the_same_tensors(
    organ: str, form: str, synthetic: dict[str, SRTRTrajectoryDataset], tmp_path: Path
) -> None:
    first, first_dates, second, second_dates, labels = FORMS[form]
    if "parquet" in first:
        pytest.importorskip("pyarrow")
    cand, history = synthetic_tables(organ)
    suffix = SUFFIX[organ].upper()
    write_table(tmp_path / f"CAND_{suffix}{first}", cand, dates=first_dates, labels=labels)
    place = tmp_path / "pubsaf2506" / f"stathist_{suffix}{second}"
    write_table(place, history, dates=second_dates, labels=labels)
    if second == ".csv":  # a column's case does not matter
        header, rows = place.read_text().split("\n", 1)
        place.write_text(f"{header.lower()}\n{rows}")
    from_sas, from_other = synthetic[organ], SRTRTrajectoryDataset(tmp_path, organ)
    assert from_other.registrations.equals(from_sas.registrations)
    assert from_other.fingerprint() == from_sas.fingerprint()
    everyone = list(range(len(from_sas)))
    tensors, others = dict(from_sas.collate(everyone)), dict(from_other.collate(everyone))
    for name, tensor in tensors.items():
        assert np.array_equal(np.asarray(tensor), np.asarray(others[name]), equal_nan=True)
    assert inputs(from_other) == inputs(from_sas)


def test_registrations_of_one_person_stay_in_one_part(tmp_path: Path) -> None:
    cand, rows = filler()
    many = [candidate(px, PERS_ID=7) for px in range(1, 9)]
    more = [history_row(px, 0) for px in range(1, 9)]
    dataset = SRTRTrajectoryDataset(write_folder(tmp_path, cand + many, rows + more), "liver")
    person = np.flatnonzero(dataset.groups == "7")
    assert len(person) == 8
    for seed in range(10):
        sides = [np.isin(part, person).sum() for part in dataset.split(seed).values()]
        assert sorted(sides) == [0, 0, 8]


def test_a_registration_needs_a_history_row_by_the_landmark(tmp_path: Path) -> None:
    cand, rows = filler()
    cand += [candidate(px) for px in (1, 2, 3)]
    write_folder(tmp_path, cand, [*rows, history_row(2, 91), history_row(3, 90)])
    reasons = SRTRTrajectoryDataset(tmp_path, "liver").registrations["reason"].astype(str)
    none = "no history row by the landmark"
    assert reasons.loc[[1, 2, 3]].tolist() == [none, none, ""]


def test_one_impossible_date_leaves_out_one_registration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And changes nothing of the others."""
    cand, history = random_tables(400, "liver", seed=5)
    before = SRTRTrajectoryDataset(write_folder(tmp_path / "a", cand, history), "liver")
    cand = cand.astype({"CAN_REM_DT": object})
    cand.loc[cand["PX_ID"] == int(before.ids[0]), "CAN_REM_DT"] = "soon"
    after = SRTRTrajectoryDataset(write_folder(tmp_path / "b", cand, history), "liver")
    rules = after.flow.set_index("rule")["removed"]
    assert rules["an impossible date"] == 1
    assert after.ids.tolist() == before.ids.tolist()[1:]
    known = inputs(before)
    assert all(known[px] == shown for px, shown in inputs(after).items())
    assert "CAN_REM_DT: 1 impossible dates" in caplog.text
    assert "soon" not in caplog.text


def test_equal_rows_of_a_registration_count_once(tmp_path: Path) -> None:
    cand, rows = filler()
    once = SRTRTrajectoryDataset(write_folder(tmp_path, cand, rows), "liver").fingerprint()
    write_folder(tmp_path, cand + cand[:5], rows + rows[:7])
    assert SRTRTrajectoryDataset(tmp_path, "liver").fingerprint() == once


def test_nobody_left_and_too_few_events_show_the_flow(tmp_path: Path) -> None:
    cand, rows = filler()
    young = [{**row, "CAN_AGE_IN_MONTHS_AT_LISTING": 100} for row in cand]
    with pytest.raises(InputError, match=r"no registrations left .* under 18 24"):
        SRTRTrajectoryDataset(write_folder(tmp_path, young, rows), "liver")
    few = [row for row in cand if row["PX_ID"] > 900_005]
    with pytest.raises(InputError, match="18 registrations left with 9 events, 10 are needed"):
        SRTRTrajectoryDataset(write_folder(tmp_path, few, rows), "liver")
    assert len(SRTRTrajectoryDataset(tmp_path, "liver", require_labels=False)) == 18


def test_only_the_latest_rows_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cand, rows = filler()
    rows += [history_row(1, day, CANHX_SRTR_LAB_MELD=6210 + day) for day in range(20)]
    write_folder(tmp_path, [*cand, candidate(1)], rows)
    with caplog.at_level(logging.INFO):
        dataset = SRTRTrajectoryDataset(tmp_path, "liver", max_len=5)
        SRTRTrajectoryDataset(tmp_path, "liver", max_len=5, require_labels=False)  # to be scored
        SRTRTrajectoryDataset(tmp_path, "liver", max_len=20)
    (line,) = (each for each in caplog.messages if "lose observations" in each)
    assert "1 of 25 patients lose observations, as rows are longer than 5" in line
    i = dataset.ids.tolist().index("1")
    assert dataset.lengths[i] == 5
    assert dataset.times[dataset.offsets[i]] == 15 * 24
    with pytest.raises(InputError, match="--max_len 0"):
        SRTRTrajectoryDataset(tmp_path, "liver", max_len=0)


def test_reading_is_no_loop_over_registrations(tmp_path: Path) -> None:
    seconds = []
    for n in (400, 4000):
        folder = write_folder(tmp_path / str(n), *random_tables(n, "liver", 0), "liver")
        start = time.process_time()
        SRTRTrajectoryDataset(folder, "liver")
        seconds.append(time.process_time() - start)
    assert seconds[1] < 15 * seconds[0] + 0.5


# ------------------------------------------------------------------- facts, prediction time


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_each_registration_is_asked_at_its_landmark_with_the_candidates_facts(
    organ: str, synthetic: dict[str, SRTRTrajectoryDataset]
) -> None:
    dataset, chosen = synthetic[organ], np.array([3, 0])
    assert dataset.prediction_hours is not None
    assert set(dataset.prediction_hours) == {24 * ORGANS[organ].days}
    names = dataset.choose_facts(np.arange(len(dataset)))
    assert set(names) <= set(dataset.static_names)  # no word of the contexts
    assert "BMI [kg/m2]" in names
    part = dataset.subset(chosen).with_inputs(names, prediction_time=True)
    np.testing.assert_array_equal(part.facts, dataset.fact_table(names).to_numpy()[chosen])
    waits = 24 * ORGANS[organ].days - dataset.times[dataset.offsets[chosen + 1] - 1]
    np.testing.assert_array_equal(part.summaries()[:, -1], waits)


# ------------------------------------------------------------------- scoring


def test_a_lone_registration_is_scored_as_in_company(tmp_path: Path) -> None:
    """1 means no dialysis where the training data hold CAN_DIAL's codes."""
    cand, rows = filler("kidney")
    rows = [{**row, "CANHX_DIAL": 1 + row["PX_ID"] % 3} for row in rows]
    new = [candidate(1, "kidney", CAN_ENDWLFU=LISTED + 400, CAN_DIAL_DT=LISTED - 50)]
    own = [history_row(1, 0, "kidney", CANHX_DIAL=1)]
    company = SRTRTrajectoryDataset(write_folder(tmp_path / "all", cand, rows, "kidney"))
    config = {
        "reading": company.reading,
        "features": list(company.features),
        "units": list(company.units),
        "question": company.question,
    }
    both = write_folder(tmp_path / "both", cand + new, rows + own, "kidney")
    alone = write_folder(tmp_path / "alone", new, own, "kidney")
    values = []
    for folder in (both, alone):
        findings = Findings(str(folder))
        chunks = list(SRTRTrajectoryDataset.scoring_rows(folder, config, findings, most=10))
        assert sum(len(chunk.dataset) for chunk in chunks) == chunks[-1].read
        found = [c.dataset for c in chunks if "1" in c.dataset.ids]
        i = found[0].ids.tolist().index("1")
        values.append(found[0].values[found[0].offsets[i]])
    np.testing.assert_array_equal(values[0], values[1])
    assert values[1][company.features.index("dialysis")] == 0.0


def test_scoring_refuses_another_organ_and_other_series(tmp_path: Path) -> None:
    dataset = SRTRTrajectoryDataset(write_folder(tmp_path, *filler()), "liver")
    config = {"reading": dataset.reading, "features": ["MELD"], "units": list(dataset.units)}
    rows = SRTRTrajectoryDataset.scoring_rows(tmp_path, config, Findings("x"), 10)
    with pytest.raises(InputError, match="the checkpoint has other features"):
        next(rows)
    config["reading"] = {**dataset.reading, "organ": "kidney"}
    rows = SRTRTrajectoryDataset.scoring_rows(tmp_path, config, Findings("x"), 10)
    with pytest.raises(InputError, match=r"cand_kipa.*the checkpoint was trained on kidney"):
        next(rows)


# ------------------------------------------------------------------- texts


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., tuple[SRTRTrajectoryDataset, int]]:
    """Read registration 1 with a history of its own; return the data set and its position."""

    def build(history: list[dict[str, Any]], **person: Any) -> tuple[SRTRTrajectoryDataset, int]:
        cand, rows = filler()
        write_folder(tmp_path, [*cand, removed(13, 120, **person)], rows + history)
        dataset = SRTRTrajectoryDataset(tmp_path, "liver")
        return dataset, dataset.ids.tolist().index("1")

    return build


def test_prompt_and_report_hold_what_was_known(told: Any) -> None:
    rows = [
        history_row(1, 0, CANHX_STAT_CD=6222, CANHX_SRTR_LAB_MELD=6222, CANHX_BILI=3.2),
        history_row(1, 30, CANHX_STAT_CD=6999, CANHX_SRTR_LAB_MELD=6225),
    ]
    dataset, i = told(rows)
    assert dataset.prompt(i) == (
        "50-year-old woman, blood group O, BMI 25.5 kg/m2, no diabetes, no earlier transplant, "
        "on the liver waiting list for 90 days. History: bilirubin in mg/dL: 3.2 (day 0); "
        "MELD: 22 (day 0) -> 25 (day 30); status: active (day 0) -> inactive (day 30). Will this "
        "patient die or become too sick for a liver transplant within 90 days of day 90?\n"
    )
    assert dataset.report(i) == (
        "Death or too sick for transplant: yes. History: only bilirubin 3.2 at day 0, first MELD "
        "22 at day 0 and last MELD 25 at day 30 rising, last status inactive at day 30, after 2 "
        "observations."
    )


def test_computed_prompts_hold_first_values_and_the_number_of_observations(told: Any) -> None:
    rows = [
        history_row(1, day, CANHX_STAT_CD=6222 if day % 2 else 6999, CANHX_SRTR_LAB_MELD=6210 + day)
        for day in range(10)
    ]
    dataset, i = told(rows)
    shown = " -> ".join(f"{10 + day} (day {day})" for day in range(2, 10))
    assert f"MELD: {shown}; " in dataset.prompt(i)
    text = dataset.prompt(i, PromptOptions(computed=True))
    assert f"MELD: first 10 (day 0), latest {shown}; " in text
    assert "status: inactive (day 2)" in text  # of a state the report needs the last alone
    assert "; 10 observations. " in text
    assert "(day 7)" not in dataset.prompt(i, PromptOptions(latest=2))
    last = dataset.prompt(i, PromptOptions(series="last", computed=True))
    assert "first" not in last
    assert "observations" not in last


@pytest.mark.parametrize(("organ", "main"), [("kidney", "GFR"), ("liver", "MELD")])
def test_the_prompt_holds_as_much_of_the_history_as_was_chosen(
    organ: str, main: str, synthetic: dict[str, SRTRTrajectoryDataset]
) -> None:
    dataset = synthetic[organ]
    everyone = range(len(dataset))
    whole = [dataset.prompt(i) for i in everyone]
    assert any("->" in text for text in whole)
    for i, text in zip(everyone, whole, strict=True):
        context, question = dataset.contexts[i].rstrip(". "), dataset.question
        none, last, alone = (
            dataset.prompt(i, PromptOptions(series=choice)) for choice in ("none", "last", "main")
        )
        assert none == f"{context}. {question}\n"
        assert "->" not in last
        assert last.count(" (day ") == sum(1 for _ in dataset.measured(i))
        own = re.search(rf"{main}(?: in mL/min)?: ([^;.]*(?:\.\d[^;.]*)*)", text)
        expected = f"History: {own[0]}. " if own else ""
        assert alone == f"{context}. {expected}{question}\n"
        assert dataset.prompt(i, PromptOptions(context=False)) == text.removeprefix(f"{context}. ")


# ------------------------------------------------------------------- for reports


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_baselines_see_what_their_name_says(
    organ: str, synthetic: dict[str, SRTRTrajectoryDataset]
) -> None:
    dataset = synthetic[organ]
    table = dataset.baseline_inputs()
    assert all(len(columns) == len(dataset) for columns in table.values())
    assert table["number of observations"]["count"].tolist() == dataset.lengths.tolist()
    chosen = np.arange(len(dataset))[::3]
    part = dataset.subset(chosen).baseline_inputs()
    for name, columns in table.items():
        np.testing.assert_array_equal(part[name].to_numpy(), columns.to_numpy()[chosen])
    cand = synthetic_tables(organ)[0].set_index("PX_ID").loc[dataset.ids.astype(float)]
    if organ == "kidney":
        age, years = table["age and years of dialysis"].to_numpy().T
        started = cand["CAN_DIAL_DT"] - cand["CAN_LISTING_DT"]
        want = np.where(started <= 365, (365 - started) / 365.25, 0)
        np.testing.assert_allclose(years, want)
    else:
        meld, age = table["last MELD and age"].to_numpy().T
        feature = dataset.features.index("MELD")
        shown = [
            {f: values[-1] for f, _, values in dataset.measured(i)}.get(feature, np.nan)
            for i in range(len(dataset))
        ]
        np.testing.assert_array_equal(meld, shown)
        np.testing.assert_array_equal(table["last MELD"].to_numpy()[:, 0], shown)
    np.testing.assert_allclose(age, cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12)
    np.testing.assert_array_equal(dataset.people()["age"], age)
    assert set(dataset.people()["organ"]) == {organ}


def test_a_table_without_dates_of_dialysis_leaves_its_years_unknown(tmp_path: Path) -> None:
    cand, rows = filler("kidney")
    dataset = SRTRTrajectoryDataset(write_folder(tmp_path, cand, rows, "kidney"))
    assert dataset.fact_table(["dialysis [years]"]).isna().all(axis=None)


def test_the_question_follows_landmark_horizon_and_transplants(tmp_path: Path) -> None:
    write_folder(tmp_path, *filler())
    dataset = SRTRTrajectoryDataset(
        tmp_path, "liver", landmark_days=30, horizon_days=120, transplant="exclude"
    )
    assert "within 120 days of day 30" in dataset.question
    asked = dataset.asked()
    assert asked["Prediction time"].startswith("day 30 after listing for a liver")
    assert asked["Horizon"] == "120 days from then on"
    assert asked["A transplant within the horizon"] == "leaves the cohort"


# ------------------------------------------------------------------- nothing of the future


@pytest.fixture(scope="module")
def random_cohort(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[pd.DataFrame, pd.DataFrame, SRTRTrajectoryDataset]]:
    """Random tables of each organ and their data set."""
    found = {}
    for organ in ORGAN_NAMES:
        cand, history = random_tables(300, organ, seed=5)
        folder = write_folder(tmp_path_factory.mktemp(organ), cand, history, organ)
        found[organ] = cand, history, SRTRTrajectoryDataset(folder, organ)
    return found


def later_rows(cand: pd.DataFrame, history: pd.DataFrame, organ: str) -> pd.Series:
    listed = history["PX_ID"].map(cand.set_index("PX_ID")["CAN_LISTING_DT"])
    return history["CANHX_BEGIN_DT"] > listed + ORGANS[organ].days


def permute_later(cand: pd.DataFrame, history: pd.DataFrame, late: pd.Series) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    changed = history.copy()
    for column in history.columns.difference(["PX_ID", "CANHX_BEGIN_DT"]):
        changed[column] = history[column].where(~late, rng.permutation(history[column]))
    return changed


LATER: dict[str, Callable[..., pd.DataFrame]] = {
    "altered": permute_later,
    "removed": lambda cand, history, late: history[~late],
    "doubled": lambda cand, history, late: pd.concat([history, history[late]]),
    "moved": lambda cand, history, late: history.assign(
        CANHX_BEGIN_DT=history["CANHX_BEGIN_DT"] + 7 * late
    ),
}


@pytest.mark.parametrize(("organ", "how"), list(zip(ORGAN_NAMES * 2, LATER, strict=True)))
def test_history_after_the_landmark_changes_no_input(
    organ: str, how: str, random_cohort: Any, tmp_path: Path
) -> None:
    cand, history, before = random_cohort[organ]
    late = later_rows(cand, history, organ)
    assert late.sum() > 100
    changed = LATER[how](cand, history, late)
    after = SRTRTrajectoryDataset(write_folder(tmp_path, cand, changed, organ), organ)
    assert before.fingerprint() == after.fingerprint()
    assert inputs(before) == inputs(after)


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_ends_of_open_spans_and_later_dates_change_no_input(
    organ: str, random_cohort: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    cand, history, before = random_cohort[organ]
    cand, history = cand.copy(), history.copy()
    ends = rng.permutation(history["CANHX_END_DT"])
    history["CANHX_END_DT"] = np.where(rng.random(len(history)) < 0.5, np.nan, ends)
    landmark = cand["CAN_LISTING_DT"] + ORGANS[organ].days
    for column in ("CAN_DIAL_DT", "CAN_GFR_DT") if organ == "kidney" else ():
        late = cand[column] > landmark
        assert late.sum() > 10
        other = (landmark + rng.integers(1, 99, len(cand))).astype(float)
        cand[column] = cand[column].where(~late, other.where(rng.random(len(cand)) < 0.5))
    after = SRTRTrajectoryDataset(write_folder(tmp_path, cand, history, organ), organ)
    assert before.fingerprint() == after.fingerprint()
    assert inputs(before) == inputs(after)


LEAKING = (
    *("CAN_LAST_", "CAN_LATEST_", "CAN_MOST_RECENT_", "CAN_ON_DIAL", "CAN_REM_", "REC_TX_"),
    *("CAN_ENDWLFU", "CAN_DEATH", "PERS_OPTN", "PERS_SSA", "DONOR_"),
)


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_leaking_columns_permuted_change_no_input(
    organ: str, random_cohort: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    cand, history, before = random_cohort[organ]
    cand, history = cand.copy(), history.copy()
    leaking = [c for c in cand.columns if c.startswith(LEAKING)]
    assert len(leaking) >= 11
    for column in leaking:
        cand[column] = rng.permutation(cand[column])
    active = rng.choice(["A", "R"], len(cand))
    cand["CAN_SOURCE"] = np.where(cand["CAN_SOURCE"] == "L", "L", active)
    if "CANHX_REASON_STAT_INACT" in history:
        reasons = rng.permutation(history["CANHX_REASON_STAT_INACT"])
        history["CANHX_REASON_STAT_INACT"] = reasons
    folder = write_folder(tmp_path, cand, history, organ)
    after = SRTRTrajectoryDataset(folder, organ, require_labels=False)
    known, now = inputs(before), inputs(after)
    shared = known.keys() & now.keys()  # who is asked depends on who still waits
    assert len(shared) > 25
    assert all(known[px] == now[px] for px in shared)


# ------------------------------------------------------------------- the command


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_check_prints_what_a_user_must_know(
    organ: str,
    synthetic: dict[str, SRTRTrajectoryDataset],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["check", "--data_dir", str(SYNTHETIC), "--organ", organ]
    code = srtr_dataset.main(words)
    text = capsys.readouterr().out
    assert code == 0
    dataset = synthetic[organ]
    assert f"{int(dataset.labels.sum())} events" in text
    for name in ("cand", "stathist"):
        assert f"{name}_{SUFFIX[organ]}.sas7bdat" in text
    for rule, count, left in dataset.flow.to_numpy().tolist():
        assert (f"{count:>15} out, {left:>9} left: {rule}" in text) == (count > 0)
    assert "no CANHX_GFR: the history holds no GFR" in text
    assert "observations a row" in text
    assert "split drawn by --seed 0: train " in text
    assert "fewer than 10 patients of the test part have, or lack, the event" in text
    assert text.endswith("\nready, with warnings\n")


def test_check_warns_of_implausible_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cand, rows = filler()
    rows[0]["CANHX_ALBUMIN"] = 35  # g/L
    write_folder(tmp_path, cand, rows)
    words = ["check", "--data_dir", str(tmp_path), "--organ", "liver"]
    assert srtr_dataset.main(words) == 0
    assert "values lie outside 0.5 to 7 g/dL" in capsys.readouterr().out


def test_check_says_that_a_folder_without_events_is_fit_to_predict_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = [candidate(px, CAN_ENDWLFU=LISTED + 100) for px in range(5)]
    write_folder(tmp_path, waiting, [history_row(px, 0) for px in range(5)])
    words = ["check", "--data_dir", str(tmp_path), "--organ", "liver"]
    assert srtr_dataset.main(words) == 0
    out = capsys.readouterr().out
    assert "rows 5, patients 5" in out
    assert "\nready to predict on, with warnings, not to train on: " in out


@pytest.mark.parametrize(
    "words", ["", "--organ heart", "--landmark_days x", "--landmark_days -1", "--no_such_flag"]
)
def test_wrong_usage_of_check_ends_with_2_and_one_line(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = srtr_dataset.main(["check", "--data_dir", str(tmp_path), *words.split()])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)


def test_random_command_lines_end_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "srtr", *filler("kidney"), "kidney")
    monkeypatch.chdir(tmp_path)
    rng = Random(0)
    flags = ["--organ", "--landmark_days", "--horizon_days", "--transplant", "--max_len"]
    values = ["kidney", "liver", "negative", "exclude", "30", "400", "0", "-1", "nan", "1e9"]
    values += ["9" * 30, "", " ", "two\nlines", "\x1b[31m", "x" * 300, "--", "\uff11"]
    codes = set()
    for _ in range(30):
        words = ["check", "--data_dir", rng.choice(["srtr", "srtr", "srtr", *values])]
        for _ in range(rng.choice([0, 1, 1, 2])):
            words += [rng.choice(flags), rng.choice(values)]
        try:
            code = srtr_dataset.main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        codes.add(code)
        assert code in (0, 2)
        assert "Traceback" not in captured.out + captured.err
        assert captured.err.count("\n") == (code == 2), words
    assert codes == {0, 2}
