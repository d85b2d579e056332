"""SRTR files: who is in, with which label, from which rows; and that the future stays out."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medgemma_trainer as trainer
import srtr_dataset
from dataset_format import InputError
from srtr_dataset import ORGANS, SRTRTrajectoryDataset
from srtr_files import (
    LISTED,
    SUFFIX,
    candidate,
    filler,
    history_row,
    is_date,
    random_tables,
    write_folder,
    write_table,
)

SYNTHETIC = Path(__file__).parent / "data" / "srtr_saf"
ORGAN_NAMES = tuple(ORGANS)
FUZZED = int(os.environ.get("SRTR_FUZZ", "100"))
"""Altered tables a run of the tests reads; the full check is SRTR_FUZZ=2000."""


def tables(organ: str) -> list[pd.DataFrame]:
    """The synthetic SAS tables with dates as SAS days."""
    result = []
    for name in ("cand", "stathist"):
        path = SYNTHETIC / f"{name}_{SUFFIX[organ]}.sas7bdat"
        table = pd.read_sas(path, encoding="latin-1")
        for column in table:
            if table[column].dtype.kind == "M":
                table[column] = (table[column] - pd.Timestamp("1960-01-01")).dt.days
        result.append(table)
    return result


def expected(organ: str) -> pd.DataFrame:
    table = pd.read_csv(SYNTHETIC / f"expected_{SUFFIX[organ]}.csv").set_index("PX_ID")
    return table.sort_index()


def inputs(dataset: SRTRTrajectoryDataset) -> dict[str, tuple[Any, ...]]:
    """All that a model is shown of each registration, exactly."""
    result = {}
    simple = pd.concat(dataset.baseline_inputs().values(), axis=1).to_numpy()
    for i, name in enumerate(dataset.ids):
        rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
        series = dataset.times[rows].tobytes(), dataset.values[rows].tobytes()
        result[name] = (*series, dataset.prompt(i), simple[i].tobytes())
    return result


# ------------------------------------------------------------------- the synthetic folder


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_every_reason_and_label_of_the_sas_files_is_the_expected_one(organ: str) -> None:
    dataset, truth = SRTRTrajectoryDataset(SYNTHETIC, organ), expected(organ)
    registrations = dataset.registrations
    assert registrations.index.tolist() == truth.index.tolist()
    assert registrations["reason"].astype(str).tolist() == truth["left_out"].fillna("").tolist()
    pd.testing.assert_series_equal(registrations["label"], truth["label"])
    kept = truth[truth["left_out"].isna()]
    assert dataset.ids.tolist() == kept.index.astype(str).tolist()
    assert dataset.groups.tolist() == kept["PERS_ID"].astype(str).tolist()
    assert dataset.labels.tolist() == kept["label"].tolist()
    assert dataset.flow["left"].iloc[-1] == len(dataset)
    counts = truth["left_out"].value_counts()
    removed = dataset.flow.set_index("rule")["removed"]
    assert removed[removed > 0].to_dict() == counts.to_dict()


FORMS = {
    "csv, MM/DD/YY and DDMONYY, labels": (".csv", "mdy2", ".csv", "ddmonyy", True),
    "csv, SAS days and MM/DD/YYYY": (".csv", "sas", ".csv", "mdy4", False),
    "csv, DDMONYYYY and ISO, labels": (".csv", "ddmonyyyy", ".CSV", "iso", True),
    "Stata dates and ISO times": (".dta", "iso", ".csv", "isotime", False),
    "SAS days in Stata, labels": (".CSV", "sas", ".DTA", "sas", True),
    "Parquet": (".parquet", "iso", ".parquet", "sas", False),
}


@pytest.mark.parametrize("organ", ORGAN_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_any_storage_gives_the_same_tensors(organ: str, form: str, tmp_path: Path) -> None:
    first, first_dates, second, second_dates, labels = FORMS[form]
    if "parquet" in first:
        pytest.importorskip("pyarrow")
    cand, history = tables(organ)
    suffix = SUFFIX[organ].upper()
    write_table(tmp_path / f"CAND_{suffix}{first}", cand, dates=first_dates, labels=labels)
    place = tmp_path / "pubsaf2506" / f"stathist_{suffix}{second}"
    write_table(place, history, dates=second_dates, labels=labels)
    if second == ".csv":  # a column's case does not matter
        header, rows = place.read_text().split("\n", 1)
        place.write_text(f"{header.lower()}\n{rows}")
    from_sas, from_other = (SRTRTrajectoryDataset(p, organ) for p in (SYNTHETIC, tmp_path))
    assert from_other.registrations.equals(from_sas.registrations)
    assert from_other.fingerprint() == from_sas.fingerprint()
    everyone = list(range(len(from_sas)))
    for name, tensor in from_sas.collate(everyone).items():
        other = from_other.collate(everyone)[name]  # type: ignore[literal-required]
        assert tensor.numpy().tobytes() == other.numpy().tobytes()  # type: ignore[attr-defined]
    assert inputs(from_other) == inputs(from_sas)


def test_a_mix_of_sas_and_csv_reads(tmp_path: Path) -> None:
    shutil.copy(SYNTHETIC / "cand_liin.sas7bdat", tmp_path / "CAND_LIIN.SAS7BDAT")
    write_table(tmp_path / "stathist_liin.csv", tables("liver")[1], dates="ddmonyyyy")
    mixed = SRTRTrajectoryDataset(tmp_path, "liver")
    assert mixed.fingerprint() == SRTRTrajectoryDataset(SYNTHETIC, "liver").fingerprint()


@pytest.mark.parametrize("size", [7, 64])
def test_chunks_of_any_size_give_the_same(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path, *random_tables(150, "kidney", 3), "kidney", dates="mdy2")
    whole = SRTRTrajectoryDataset(folder)
    monkeypatch.setattr(srtr_dataset, "CHUNK_ROWS", size)
    assert SRTRTrajectoryDataset(folder).fingerprint() == whole.fingerprint()


# ------------------------------------------------------------------- one test a rule


Read = Callable[..., SRTRTrajectoryDataset]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read hand-written registrations, each with a row on day 0 unless history is given."""

    def build(
        *cand: dict[str, Any],
        organ: str = "liver",
        history: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> SRTRTrajectoryDataset:
        more, more_rows = filler(organ)
        if history is None:
            history = [history_row(row["PX_ID"], 0, organ) for row in cand]
        write_folder(tmp_path, [*cand, *more], [*history, *more_rows], organ)
        return SRTRTrajectoryDataset(tmp_path, organ, **options)

    return build


def removed(code: float | None, day: int, **more: Any) -> dict[str, Any]:
    """Registration 1, removed so many days after listing."""
    end: dict[str, Any] = {
        "CAN_REM_CD": code,
        "CAN_REM_DT": LISTED + day,
        "CAN_ENDWLFU": LISTED + day,
    }
    return candidate(1, **{**end, **more})


def verdict(dataset: SRTRTrajectoryDataset, px: int = 1) -> str | float:
    row: Any = dataset.registrations.loc[px]
    reason, label = str(row["reason"]), float(row["label"])
    assert (reason == "") != np.isnan(label)
    return reason or label


CENSORED, ENDED = "censored within the horizon", "ended by the landmark"
ERRONEOUS = "removed: listed or removed in error"


MEANING: dict[str | float, tuple[float | None, ...]] = {
    1.0: (8, 13),
    0.0: (4, 14, 15, 18, 19, 21, 22, 23, 43, 45),
    ERRONEOUS: (10, 11, 16),
    CENSORED: (5, 6, 7, 9, 12, 17, 20, 24, 40, 77, None),
}


@pytest.mark.parametrize(
    ("code", "within"), [(code, means) for means, codes in MEANING.items() for code in codes]
)
def test_what_a_removal_within_the_horizon_means(
    code: float | None, within: str | float, read: Read
) -> None:
    assert verdict(read(removed(code, 120))) == within
    later = within if within == ERRONEOUS else 0.0
    assert verdict(read(removed(code, 181))) == later


def test_unknown_codes_are_counted_in_a_warning(
    read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    read(removed(77, 120))
    assert "1 unknown removal codes" in caplog.text


def test_a_removal_code_stored_as_label_decides_alike(read: Read) -> None:
    assert verdict(read({**removed(8, 120), "CAN_REM_CD": "8: Candidate died"})) == 1.0
    assert verdict(read({**removed(4, 120), "CAN_REM_CD": "4: Deceased donor tx"})) == 0.0


@pytest.mark.parametrize(
    ("day", "result"), [(89, ENDED), (90, ENDED), (91, 1.0), (180, 1.0), (181, 0.0)]
)
def test_the_horizon_is_open_at_the_landmark_and_closed_at_its_end(
    day: int, result: str | float, read: Read
) -> None:
    assert verdict(read(removed(8, day))) == result
    assert verdict(read(removed(13, day))) == result


@pytest.mark.parametrize(("day", "result"), [(90, ENDED), (180, CENSORED), (181, 0.0)])
def test_who_waits_must_be_followed_past_the_horizon(
    day: int, result: str | float, read: Read
) -> None:
    assert verdict(read(candidate(1, CAN_ENDWLFU=LISTED + day))) == result


@pytest.mark.parametrize("column", ["CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT"])
@pytest.mark.parametrize(("day", "result"), [(119, 1.0), (120, 1.0), (121, CENSORED)])
@pytest.mark.parametrize("code", [7, None])
def test_a_death_by_the_end_is_an_event_and_one_after_it_is_not(
    column: str, day: int, result: str | float, code: float | None, read: Read
) -> None:
    assert verdict(read(removed(code, 120, **{column: LISTED + day}))) == result


def test_a_death_on_the_day_follow_up_ends_is_an_event(read: Read) -> None:
    waits: dict[str, Any] = {"CAN_ENDWLFU": LISTED + 120}
    assert verdict(read(candidate(1, **waits, PERS_SSA_DEATH_DT=LISTED + 120))) == 1.0
    assert verdict(read(candidate(1, **waits, PERS_SSA_DEATH_DT=LISTED + 121))) == CENSORED


def test_the_event_is_on_the_day_of_death_not_of_the_removal(read: Read) -> None:
    assert verdict(read(removed(8, 120, CAN_DEATH_DT=LISTED + 80))) == ENDED
    assert verdict(read(removed(8, 200, CAN_DEATH_DT=LISTED + 170))) == 1.0


def test_a_death_years_later_changes_nothing(read: Read) -> None:
    for code, result in ((4, 0.0), (7, CENSORED), (12, CENSORED)):
        late = removed(code, 120, PERS_OPTN_DEATH_DT=LISTED + 1500)
        assert verdict(read(late)) == result
    assert verdict(read(candidate(1, PERS_SSA_DEATH_DT=LISTED + 1500))) == 0.0


@pytest.mark.parametrize("code", [21, 23, 4])
def test_a_death_on_the_day_of_the_transplant_is_a_transplant(code: int, read: Read) -> None:
    day = LISTED + 120
    assert verdict(read(removed(code, 120, REC_TX_DT=day, CAN_DEATH_DT=day))) == 0.0
    assert verdict(read(removed(code, 120, CAN_DEATH_DT=day))) == 0.0


@pytest.mark.parametrize(
    ("row", "result"),
    [
        (candidate(1, REC_TX_DT=LISTED + 120), 0.0),  # no removal recorded
        (removed(8, 150, REC_TX_DT=LISTED + 120), 0.0),  # died after it
        (removed(8, 120, REC_TX_DT=LISTED + 120), 0.0),  # died on its day
        (removed(13, 120, REC_TX_DT=LISTED + 150), 1.0),  # too sick comes first
        (removed(None, 120, REC_TX_DT=LISTED + 120), 0.0),
        (removed(8, 150, REC_TX_DT=LISTED + 80), ENDED),
    ],
)
def test_a_transplant_day_ends_the_registration(
    row: dict[str, Any], result: str | float, read: Read
) -> None:
    assert verdict(read(row)) == result


def test_transplants_within_the_horizon_can_be_left_out(read: Read) -> None:
    for code in (4, 15, 21):
        assert verdict(read(removed(code, 120), transplant="negative")) == 0.0
        out = read(removed(code, 120), transplant="exclude")
        assert verdict(out) == "transplanted within the horizon"
        assert verdict(read(removed(code, 181), transplant="exclude")) == 0.0
    assert verdict(read(removed(8, 120), transplant="exclude")) == 1.0


def test_landmark_and_horizon_follow_the_arguments(read: Read) -> None:
    row = removed(8, 120)
    assert verdict(read(removed(8, 95), landmark_days=95)) == ENDED
    assert verdict(read(row, landmark_days=30, horizon_days=100)) == 1.0
    assert verdict(read(row, landmark_days=95, horizon_days=10)) == 0.0
    for organ, days in (("liver", 90), ("kidney", 365)):
        dataset = read(organ=organ)
        assert (dataset.landmark_days, dataset.horizon_days) == (days, days)
        assert f"within {days} days of day {days}" in dataset.question


def test_a_row_by_the_landmark_is_needed(read: Read) -> None:
    none = "no history row by the landmark"
    assert verdict(read(candidate(1), history=[])) == none
    assert verdict(read(candidate(1), history=[history_row(1, 91)])) == none
    assert verdict(read(candidate(1), history=[history_row(1, 90)])) == 0.0
    unmeasured = history_row(1, 3, CANHX_STAT_CD=None, CANHX_SRTR_LAB_MELD=None)
    assert verdict(read(candidate(1), history=[unmeasured])) == none


def test_registrations_of_other_organs_ages_and_sources_are_left_out(read: Read) -> None:
    assert verdict(read(candidate(1, WL_ORG="IN"))) == "other organ"
    for organ in ("KP", "PA", "PI"):
        row = candidate(1, "kidney", WL_ORG=organ)
        assert verdict(read(row, organ="kidney")) == "other organ"
    living = candidate(1, CAN_SOURCE="L")
    assert verdict(read(living)) == "living donor recipient, never listed"
    assert verdict(read(candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=215))) == "under 18"
    assert verdict(read(candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=216))) == 0.0
    binned = candidate(1, CAN_AGE_IN_MONTHS_AT_LISTING=None, CAN_AGE_AT_LISTING="3: 35-49")
    assert verdict(read(binned)) == 0.0
    unlisted = candidate(1, CAN_LISTING_DT=None)
    assert verdict(read(unlisted)) == "no day of listing or removal"


def test_registrations_of_one_person_stay_on_one_side(read: Read) -> None:
    many = [candidate(px, PERS_ID=7) for px in range(1, 9)]
    dataset = read(*many)
    assert (dataset.groups == "7").sum() == 8
    for seed in range(20):
        sides = [
            np.isin(part, np.flatnonzero(dataset.groups == "7")).sum()
            for part in dataset.split(seed).values()
        ]
        assert sorted(sides) == [0, 0, 8]


# ------------------------------------------------------------------- inputs and text


def series(dataset: SRTRTrajectoryDataset, name: str, px: int = 1) -> list[tuple[float, float]]:
    """Days and values of one series; values are -1 where not measured."""
    i = dataset.ids.tolist().index(str(px))
    rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
    values = np.nan_to_num(dataset.values[rows, dataset.features.index(name)], nan=-1)
    return list(zip((dataset.times[rows] / 24).tolist(), values.tolist(), strict=True))


def test_the_last_row_before_listing_is_carried_to_day_0(read: Read) -> None:
    days = [(-300, 6210), (-20, 6220), (30, 6230), (91, 6240)]
    rows = [history_row(1, day, CANHX_SRTR_LAB_MELD=meld) for day, meld in days]
    assert series(read(candidate(1), history=rows), "MELD") == [(0, 20), (30, 30)]
    rows.append(history_row(1, 0, CANHX_SRTR_LAB_MELD=6225))
    assert series(read(candidate(1), history=rows), "MELD") == [(0, 25), (30, 30)]


def test_the_rows_of_a_day_are_one_and_the_later_value_wins(read: Read) -> None:
    cells = [(9, 6210, 3.0), (9, 6220, None), (30, 6230, None)]
    rows = [
        history_row(1, day, CANHX_SRTR_LAB_MELD=meld, CANHX_BILI=bili) for day, meld, bili in cells
    ]
    dataset = read(candidate(1), history=rows)
    assert series(dataset, "MELD") == [(9, 20), (30, 30)]
    assert series(dataset, "bilirubin") == [(9, 3), (30, -1)]  # measured on that day: not filled


def test_the_features_are_decoded(read: Read) -> None:
    cells: tuple[Any, ...] = (1.5, 3.1, None, "Y", 2.5, 1.2, 133, 6228, 2, 998, 6999)
    columns = [feature.column for feature in ORGANS["liver"].features]
    row = history_row(1, 5, **dict(zip(columns, cells, strict=True)))
    dataset = read(candidate(1), history=[row])
    assert dataset.features[:4] == ("creatinine", "albumin", "GFR", "dialysis")
    want = (1.5, 3.1, -1, 1, 2.5, 1.2, 133, 28, 2, -1, 0)
    assert tuple(series(dataset, name)[0][1] for name in dataset.features) == want
    assert series(dataset, "MELD")[0][0] == 5


STATUS = {
    "liver": {6010: 1, 6011: 1, 6012: 1, 6101: 1, 6299: 1, 6999: 0, 6300: -1, 7: -1},
    "kidney": {4010: 1, 4050: 1, 4060: 1, 4099: 0, 4999: 0, 4000: -1},
}


@pytest.mark.parametrize(("organ", "code"), [(o, code) for o in ORGAN_NAMES for code in STATUS[o]])
def test_status_codes(organ: str, code: int, read: Read) -> None:
    rows = [history_row(1, 0, organ, CANHX_STAT_CD=code)]
    dataset = read(candidate(1, organ), history=rows, organ=organ)
    assert series(dataset, "status") == [(0, STATUS[organ][code])]


@pytest.mark.parametrize(
    ("code", "score"), [(6206, 6), (6240, 40), (22, 22), (6011, -1), (6999, -1)]
)
def test_meld_is_the_code_less_6200(code: int, score: int, read: Read) -> None:
    rows = [history_row(1, 0, CANHX_SRTR_LAB_MELD=code)]
    assert series(read(candidate(1), history=rows), "MELD") == [(0, score)]


def test_dialysis_counts_from_its_day_and_gfr_enters_at_its_own(read: Read) -> None:
    def kidney(**columns: Any) -> SRTRTrajectoryDataset:
        rows = [history_row(1, day, "kidney") for day in (0, 100)]
        return read(candidate(1, "kidney", **columns), history=rows, organ="kidney")

    before = kidney(CAN_DIAL_DT=LISTED - 730.5, CAN_GFR=11, CAN_GFR_DT=LISTED - 10)
    assert series(before, "dialysis") == [(0, 1), (100, 1)]
    assert series(before, "GFR") == [(0, 11), (100, -1)]
    i = before.ids.tolist().index("1")
    assert before.ages_and_dialysis[i, 1] == pytest.approx((365 + 731) / 365.25)
    between = kidney(CAN_DIAL_DT=LISTED + 50, CAN_GFR=11, CAN_GFR_DT=LISTED + 70)
    assert series(between, "dialysis") == [(0, 0), (50, 1), (70, 1), (100, 1)]
    assert series(between, "GFR") == [(0, -1), (50, -1), (70, 11), (100, -1)]
    later = kidney(CAN_DIAL_DT=LISTED + 366, CAN_GFR=11, CAN_GFR_DT=LISTED + 366)
    missing = kidney(CAN_DIAL_DT=None, CAN_GFR=11, CAN_GFR_DT=None)
    assert series(later, "dialysis") == [(0, 0), (100, 0)] == series(missing, "dialysis")
    assert inputs(later) == inputs(missing)
    assert series(missing, "GFR") == [(0, -1), (100, -1)]


def test_a_converted_kidney_history_brings_its_own_laboratory_values(read: Read) -> None:
    lab = {"CANHX_SERUM_CREAT": 8.1, "CANHX_ALBUMIN": 3.5, "CANHX_GFR": 7.0}
    rows = [
        history_row(1, 0, "kidney", **lab, CANHX_DIAL=0),
        history_row(1, 90, "kidney", **lab, CANHX_DIAL=1),
    ]
    own = candidate(1, "kidney", CAN_DIAL_DT=LISTED - 50)
    dataset = read(own, history=rows, organ="kidney")
    assert series(dataset, "creatinine") == [(0, 8.1), (90, 8.1)]
    assert series(dataset, "dialysis") == [(0, 0), (90, 1)]  # the history has a column for it
    coded = [{**row, "CANHX_DIAL": code} for row, code in zip(rows, (1, 3), strict=True)]
    assert series(read(own, history=coded, organ="kidney"), "dialysis") == [(0, 0), (90, 1)]


def test_unmeasured_series_stay_and_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset = SRTRTrajectoryDataset(SYNTHETIC)
    assert dataset.features[:2] == ("creatinine", "albumin")
    assert not dataset.collate(range(len(dataset)))["observed"][:, :, :2].any()
    said = [r.getMessage() for r in caplog.records if "never measured" in r.getMessage()]
    assert len(said) == 1
    assert "creatinine, albumin" in said[0]


def test_only_the_latest_rows_are_kept(read: Read) -> None:
    rows = [history_row(1, day, CANHX_SRTR_LAB_MELD=6210 + day) for day in range(20)]
    dataset = read(candidate(1), history=rows, max_len=5)
    assert series(dataset, "MELD") == [(d, 10 + d) for d in range(15, 20)]


def test_text_tells_what_was_known(read: Read) -> None:
    rows = [
        history_row(1, 0, CANHX_STAT_CD=6222, CANHX_SRTR_LAB_MELD=6222, CANHX_BILI=3.2),
        history_row(1, 30, CANHX_STAT_CD=6999, CANHX_SRTR_LAB_MELD=6225),
    ]
    person = {
        "CAN_AGE_IN_MONTHS_AT_LISTING": 695,
        "CAN_GENDER": "M: Male",
        "CAN_DIAB": 3,
        "CAN_PREV_TX": 1,
        "CAN_ABO": "AB",
    }
    dataset = read(removed(13, 120, **person), history=rows)
    i = dataset.ids.tolist().index("1")
    assert dataset.prompt(i) == (
        "57-year-old man, blood group AB, BMI 25.5 kg/m2, type 2 diabetes, earlier transplant, "
        "on the liver waiting list for 90 days. History: bilirubin in mg/dL: 3.2 (day 0); "
        "MELD: 22 (day 0) -> 25 (day 30); status: active (day 0) -> inactive (day 30). Will this "
        "patient die or become too sick for a liver transplant within 90 days of day 90?\n"
    )
    report = (
        "Death or too sick for transplant: yes. History: only bilirubin 3.2 at day 0, first MELD "
        "22 at day 0 and last MELD 25 at day 30 rising, last status inactive at day 30, after 2 "
        "observations."
    )
    assert dataset.report(i) == report
    score = dataset.score_report(i, report)
    assert (score.verdict, score.parses, score.stated, score.true) == (1, True, 8, 8)
    wrong = report.replace("yes", "no").replace("MELD 25", "MELD 26").replace("rising", "level")
    score = dataset.score_report(i, wrong)
    assert (score.verdict, score.parses, score.stated) == (0, True, 8)
    assert score.true < 8
    assert not dataset.score_report(i, "I cannot tell.").parses
    assert dataset.score_report(i, "I cannot tell.").verdict is None


def test_a_writer_finds_first_values_and_their_number_in_its_prompt(read: Read) -> None:
    rows = [
        history_row(1, day, CANHX_STAT_CD=6222 if day % 2 else 6999, CANHX_SRTR_LAB_MELD=6210 + day)
        for day in range(10)
    ]
    dataset = read(candidate(1), history=rows)
    i = dataset.ids.tolist().index("1")
    shown = " -> ".join(f"{10 + day} (day {day})" for day in range(2, 10))
    assert f"MELD: {shown}; " in dataset.prompt(i)
    dataset.text_computed = True
    text = dataset.prompt(i)
    assert f"MELD: first 10 (day 0), latest {shown}; " in text
    assert "status: inactive (day 2)" in text  # of a state the report tells the last alone
    assert "; 10 observations. " in text
    dataset.series_text = "last"
    assert "first" not in dataset.prompt(i)
    assert "observations" not in dataset.prompt(i)


def test_unknown_baseline_is_left_unsaid(read: Read) -> None:
    unknown: dict[str, Any] = {
        "CAN_AGE_IN_MONTHS_AT_LISTING": None,
        "CAN_GENDER": None,
        "CAN_DIAB": 998,
        "CAN_PREV_TX": None,
        "CAN_ABO": "UNK",
        "CAN_BMI": 900,
    }
    dataset = read(candidate(1, **unknown))
    i = dataset.ids.tolist().index("1")
    assert dataset.contexts[i] == "Patient, on the liver waiting list for 90 days"


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_baselines_see_what_their_name_says(organ: str) -> None:
    dataset = SRTRTrajectoryDataset(SYNTHETIC, organ)
    table = dataset.baseline_inputs()
    assert all(len(inputs) == len(dataset) for inputs in table.values())
    assert table["number of observations"]["count"].tolist() == dataset.lengths.tolist()
    chosen = np.arange(len(dataset))[::3]
    part = dataset.subset(chosen).baseline_inputs()
    for name, inputs_of in table.items():
        np.testing.assert_array_equal(part[name].to_numpy(), inputs_of.to_numpy()[chosen])
    cand = tables(organ)[0].set_index("PX_ID").loc[dataset.ids.astype(float)]
    if organ == "kidney":
        age, years = table["age and years of dialysis"].to_numpy().T
        started = cand["CAN_DIAL_DT"] - cand["CAN_LISTING_DT"]
        want = np.where(started <= 365, (365 - started) / 365.25, 0)
        np.testing.assert_allclose(years, want)
    else:
        meld, age = table["last MELD and age"].to_numpy().T
        shown = [[v for _, v in series(dataset, "MELD", int(px)) if v > 0] for px in dataset.ids]
        last = [values[-1] if values else np.nan for values in shown]
        np.testing.assert_array_equal(meld, last)
        np.testing.assert_array_equal(table["last MELD"].to_numpy()[:, 0], last)
    np.testing.assert_allclose(age, cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12)


@pytest.mark.parametrize(("organ", "main"), [("kidney", "GFR"), ("liver", "MELD")])
def test_the_text_tells_as_much_of_the_history_as_was_chosen(organ: str, main: str) -> None:
    dataset = SRTRTrajectoryDataset(SYNTHETIC, organ)
    whole = [dataset.prompt(i) for i in range(len(dataset))]
    told = {}
    for choice in ("main", "last", "none"):
        dataset.series_text = choice
        told[choice] = [dataset.prompt(i) for i in range(len(dataset))]
    assert any("->" in text for text in whole)
    for i, text in enumerate(whole):
        context, question = dataset.contexts[i].rstrip(". "), dataset.question
        assert told["none"][i] == f"{context}. {question}\n"
        assert "->" not in told["last"][i]
        assert told["last"][i].count(" (day ") == sum(1 for _ in dataset.measured(i))
        own = re.search(rf"{main}(?: in mL/min)?: ([^;.]*(?:\.\d[^;.]*)*)", text)
        expected = f"History: {own[0]}. " if own else ""
        assert told["main"][i] == f"{context}. {expected}{question}\n"


# ------------------------------------------------------------------- nothing of the future


def landmark_of(organ: str) -> int:
    return ORGANS[organ].days


def both(
    tmp_path: Path, organ: str, change: Callable[[pd.DataFrame, pd.DataFrame], Any]
) -> list[SRTRTrajectoryDataset]:
    """Read random tables, and again after ``change`` (in place, or the new pair)."""
    cand, history = random_tables(1500, organ, seed=5)
    before = SRTRTrajectoryDataset(write_folder(tmp_path / "a", cand, history, organ), organ)
    cand, history = change(cand, history) or (cand, history)
    return [
        before,
        SRTRTrajectoryDataset(write_folder(tmp_path / "b", cand, history, organ), organ),
    ]


def later_rows(cand: pd.DataFrame, history: pd.DataFrame, organ: str) -> pd.Series:
    listed = history["PX_ID"].map(cand.set_index("PX_ID")["CAN_LISTING_DT"])
    return history["CANHX_BEGIN_DT"] > listed + landmark_of(organ)


@pytest.mark.parametrize("organ", ORGAN_NAMES)
@pytest.mark.parametrize("how", ["altered", "removed", "doubled", "moved"])
def test_history_after_the_landmark_changes_no_input(organ: str, how: str, tmp_path: Path) -> None:
    def change(cand: pd.DataFrame, history: pd.DataFrame) -> Any:
        late = later_rows(cand, history, organ)
        assert late.sum() > 600
        if how == "removed":
            return cand, history[~late]
        if how == "doubled":
            return cand, pd.concat([history, history[late]])
        if how == "moved":
            history.loc[late, "CANHX_BEGIN_DT"] += 7
            return cand, history
        rng = np.random.default_rng(0)
        for column in history.columns.difference(["PX_ID", "CANHX_BEGIN_DT"]):
            history[column] = history[column].where(~late, rng.permutation(history[column]))
        return cand, history

    before, after = both(tmp_path, organ, change)
    assert inputs(before) == inputs(after)
    assert before.fingerprint() == after.fingerprint()


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_ends_of_open_spans_and_later_dates_change_no_input(organ: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)

    def change(cand: pd.DataFrame, history: pd.DataFrame) -> None:
        history["CANHX_END_DT"] = np.where(
            rng.random(len(history)) < 0.5, np.nan, rng.permutation(history["CANHX_END_DT"])
        )
        if organ == "kidney":
            for column in ("CAN_DIAL_DT", "CAN_GFR_DT"):
                late = cand[column] > cand["CAN_LISTING_DT"] + landmark_of(organ)
                assert late.sum() > 20
                other = cand["CAN_LISTING_DT"] + landmark_of(organ) + rng.integers(1, 99, len(cand))
                other = other.astype(float).where(rng.random(len(cand)) < 0.5)
                cand[column] = cand[column].where(~late, other)

    before, after = both(tmp_path, organ, change)
    assert inputs(before) == inputs(after)
    assert before.fingerprint() == after.fingerprint()


LEAKING = (
    "CAN_LAST_",
    "CAN_LATEST_",
    "CAN_MOST_RECENT_",
    "CAN_ON_DIAL",
    "CAN_REM_",
    "CAN_ENDWLFU",
    "CAN_DEATH",
    "PERS_OPTN",
    "PERS_SSA",
    "REC_TX_",
    "DONOR_",
)


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_leaking_columns_permuted_change_no_input(organ: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)

    def change(cand: pd.DataFrame, history: pd.DataFrame) -> None:
        leaking = [c for c in cand.columns if c.startswith(LEAKING)]
        assert len(leaking) >= 11
        for column in leaking:
            cand[column] = rng.permutation(cand[column])
        cand["CAN_SOURCE"] = np.where(
            cand["CAN_SOURCE"] == "L", "L", rng.choice(["A", "R"], len(cand))
        )
        if "CANHX_REASON_STAT_INACT" in history:
            history["CANHX_REASON_STAT_INACT"] = rng.permutation(history["CANHX_REASON_STAT_INACT"])

    before, after = (inputs(dataset) for dataset in both(tmp_path, organ, change))
    shared = before.keys() & after.keys()  # who is asked depends on who still waits
    assert len(shared) > 50
    assert all(before[name] == after[name] for name in shared)


# ------------------------------------------------------------------- learning


@pytest.mark.parametrize(("risk", "low", "high"), [("MELD", 0.9, 1.0), ("shuffled", 0.0, 0.75)])
def test_what_meld_decides_is_learned_and_chance_is_not(
    risk: str, low: float, high: float, tmp_path: Path
) -> None:
    cand, history = random_tables(1500, "liver", seed=11, risk=risk)
    write_folder(tmp_path, cand, history, "liver")
    flags = f"--trajectory_only --dataset srtr --organ liver --data_dir {tmp_path} --log_file none"
    out = tmp_path / "out"
    assert trainer.main([*flags.split(), "--trajectory_epochs", "8", "--output_dir", str(out)]) == 0
    figures = pd.read_json(out / "trajectory" / "metrics.json", typ="series")
    assert low < figures["test"]["auroc"]["value"] <= high


# ------------------------------------------------------------------- altered tables


def oracle(cand: pd.DataFrame, history: pd.DataFrame, organ: str) -> dict[int, str | float]:
    """Decide again, one registration after another, straight from facts/srtr.md."""
    landmark, horizon = ORGANS[organ].days, ORGANS[organ].days
    begins: Any = history.groupby("PX_ID")["CANHX_BEGIN_DT"].min().to_dict()
    known = ("CAN_LISTING_DT", "CAN_REM_DT", "CAN_ENDWLFU")
    last = max(cand[c].max() for c in known if c in cand and cand[c].notna().any())
    result: dict[int, str | float] = {}
    for row in cand.to_dict("records"):

        def get(name: str, row: Any = row) -> Any:
            value = row.get(name)
            return None if value is None or pd.isna(value) else value

        result[int(row["PX_ID"])] = decide_one(get, begins, last, organ, landmark, horizon)
    return result


def decide_one(
    get: Callable[[str], Any],
    begins: dict[Any, float],
    last: float,
    organ: str,
    landmark: int,
    horizon: int,
) -> str | float:
    code, removal, graft = get("CAN_REM_CD"), get("CAN_REM_DT"), get("REC_TX_DT")
    age = get("CAN_AGE_IN_MONTHS_AT_LISTING")
    if get("WL_ORG") != ORGANS[organ].code:
        return "other organ"
    if get("CAN_SOURCE") == "L":
        return "living donor recipient, never listed"
    if age is not None and age < 216:
        return "under 18"
    if code in (10, 11, 16):
        return ERRONEOUS
    kind = (
        "event"
        if code in (8, 13)
        else "transplant"
        if code in (4, 14, 15, 18, 19, 21, 22, 23, 43, 45)
        else "other"
    )
    end = removal
    if graft is not None and (removal is None or graft < removal):
        end, kind = graft, "transplant"
    elif graft is not None and graft == removal:
        kind = "transplant"
    deaths = [get(c) for c in ("CAN_DEATH_DT", "PERS_OPTN_DEATH_DT", "PERS_SSA_DEATH_DT")]
    death = min((d for d in deaths if d is not None), default=None)
    if removal is None and code == 8 and death is not None and (graft is None or death < graft):
        end, kind = death, "event"
    if end is None:
        end = get("CAN_ENDWLFU")
    if end is None and code is None:
        end = last
    if death is not None and (
        end is not None and (death < end or (death == end and kind != "transplant"))
    ):
        end, kind = death, "event"
    if end is None or get("CAN_LISTING_DT") is None:
        return "no day of listing or removal"
    days = end - get("CAN_LISTING_DT")
    if days <= landmark:
        return ENDED
    if days <= landmark + horizon and kind == "other":
        return CENSORED
    if not begins.get(get("PX_ID"), np.inf) <= get("CAN_LISTING_DT") + landmark:
        return "no history row by the landmark"
    return float(days <= landmark + horizon and kind == "event")


OPTIONAL = [c for c, cost in srtr_dataset.CAND_COLUMNS.items() if cost]


def alter(
    rng: np.random.Generator, cand: pd.DataFrame, history: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, bool]:
    """Change both tables in one way; the last result says that no data set may come of it."""
    n = len(cand)
    some = rng.random(n) < 0.3
    what = rng.integers(0, 16)
    dates = [c for c in cand.columns if is_date(c)]
    fatal = False
    if what == 0:
        cand = cand.drop(columns=[c for c in OPTIONAL if c in cand and rng.random() < 0.3])
    elif what == 1:
        required = srtr_dataset.KEYS
        cand, fatal = cand.drop(columns=required[rng.integers(len(required))]), True
    elif what == 2:
        cand = pd.concat([cand, cand[some]])
    elif what == 3:
        again = cand[:3].assign(CAN_REM_CD=9.0, CAN_REM_DT=23000.0, WL_ORG="XX")
        cand, fatal = pd.concat([cand, again]), True
    elif what == 4:
        codes = [8, 13, 4, 15, 21, 10, 17, 5, 77, np.nan]
        cand.loc[some, "CAN_REM_CD"] = rng.choice(codes, some.sum())
    elif what in (5, 6):
        column, shift = dates[rng.integers(len(dates))], rng.integers(-200, 200, some.sum())
        cand.loc[some, column] += shift if what == 5 else np.nan
    elif what == 7:
        wrong = rng.choice([-30000.0, 9000.0, 45000.0, 1.7e9, 20160518.0])
        cand.loc[cand.index[int(rng.integers(n))], "CAN_LISTING_DT"] = wrong
        fatal = True
    elif what == 8:
        cand = cand.astype({"CAN_REM_DT": object})
        cand.loc[cand.index[int(rng.integers(n))], "CAN_REM_DT"] = rng.choice(
            ["soon", "2019-13-45"]
        )
        fatal = True
    elif what == 9:
        cand = cand.astype({"CAN_REM_CD": object})
        cand.loc[cand.index[int(rng.integers(n))], "CAN_REM_CD"] = "Candidate died"
        fatal = True
    elif what == 10:
        history = history[rng.random(len(history)) < 0.6]
    elif what == 11:
        history = pd.concat([history, history[rng.random(len(history)) < 0.3]])
    elif what == 12:
        column = rng.choice(["CANHX_STAT_CD", "CANHX_BEGIN_DT"])
        fatal = column == "CANHX_BEGIN_DT"
        history = history.drop(columns=column) if fatal else history.assign(CANHX_CPRA="x")
    elif what == 13:
        order = rng.permutation(n)
        cand, history = cand.iloc[order], history.iloc[rng.permutation(len(history))]
    elif what == 14:
        table = rng.integers(2)
        cand, history = (cand[:0], history) if table else (cand, history[:0])
        fatal = True
    else:
        cand.loc[some, "CAN_AGE_IN_MONTHS_AT_LISTING"] = rng.integers(100, 400, some.sum())
        cand.loc[some, "WL_ORG"] = "KP"
        cand.loc[some, "REC_TX_DT"] = cand.loc[some, "CAN_LISTING_DT"] + 400
    return cand, history, fatal


def test_altered_tables_read_right_or_end_with_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    read_right, refused = 0, 0
    for k in range(FUZZED):
        organ = ORGAN_NAMES[k % 2]
        cand, history = random_tables(90, organ, seed=k % 7)
        fatal = False
        for _ in range(rng.integers(1, 4)):
            cand, history, bad = alter(rng, cand, history) if not fatal else (cand, history, True)
            fatal |= bad
        used = cand[[c for c in srtr_dataset.CAND_COLUMNS if c in cand]].drop_duplicates()
        fatal |= bool("PX_ID" in used and used["PX_ID"].duplicated().any())
        forms = [None, *("sas", "iso", "mdy4", "mdy2", "ddmonyyyy")]
        form = forms[0] if fatal else forms[rng.integers(1, 6)]
        write_folder(
            tmp_path,
            cand,
            history,
            organ,
            dates=form or "sas",
            labels=bool(rng.integers(2)) and not fatal,
        )
        try:
            dataset = SRTRTrajectoryDataset(tmp_path, organ)
        except InputError as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 600
            if not fatal:
                truth = oracle(cand, history, organ)
                events = sum(v == 1.0 for v in truth.values())
                assert events < srtr_dataset.FEWEST_EVENTS, text
            refused += 1
            continue
        assert not fatal, k
        table = dataset.registrations
        found = {
            int(px): reason or label
            for px, reason, label in zip(
                table.index, table["reason"].astype(str), table["label"], strict=True
            )
        }
        assert found == oracle(cand, history, organ), k
        assert not np.isinf(dataset.values).any()
        read_right += 1
    assert read_right > FUZZED // 4
    assert refused > FUZZED // 10


# ------------------------------------------------------------------- reading fails well


def refusal(folder: Path, organ: str = "liver", **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        SRTRTrajectoryDataset(folder, organ, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


UNREADABLE = "not readable to its end"
"""Words of an error; those of a test's own name would stand in its path."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "saf", *filler())


def test_missing_folder_and_tables(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "cand_kipa" in refusal(folder, "kidney")
    (folder / "stathist_liin.csv").rename(folder / "stathist_liin.zip")
    text = refusal(folder)
    assert "stathist_liin (" in text
    assert "unpacked: found none among 2 files" in text


def test_a_table_found_twice(folder: Path) -> None:
    (folder / "old").mkdir()
    shutil.copy(folder / "cand_liin.csv", folder / "old" / "CAND_LIIN.csv")
    assert "once, decrypted and unpacked: found cand_liin.csv, old/CAND_LIIN.csv" in refusal(folder)


@pytest.mark.parametrize("size", [0, 100, 5000, 65536, 100_000, 131_072])
@pytest.mark.parametrize("name", ["cand_liin", "stathist_liin"])
def test_truncated_sas_files(size: int, name: str, tmp_path: Path) -> None:
    for file in SYNTHETIC.glob("*_liin.sas7bdat"):
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:size] if file.stem == name else content)
    assert UNREADABLE in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore::pandas.errors.ParserWarning")
def test_encrypted_files(folder: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    for ending in (".sas7bdat", ".dta"):
        place = tmp_path / ending.strip(".")
        shutil.copytree(folder, place)
        (place / "cand_liin.csv").rename(place / f"cand_liin{ending}")
        (place / f"cand_liin{ending}").write_bytes(noise)
        assert UNREADABLE in refusal(place)
    (folder / "cand_liin.csv").write_bytes(noise)
    assert "cand_liin.csv" in refusal(folder)


def test_truncated_text_files(folder: Path, tmp_path: Path) -> None:
    path = folder / "stathist_liin.csv"
    content = path.read_text()
    path.write_text(content[: content.rindex(",") - 8])
    assert UNREADABLE in refusal(folder)
    stata = write_folder(tmp_path / "stata", *filler(), ending=".dta")
    file = stata / "cand_liin.dta"
    file.write_bytes(file.read_bytes()[:-900])
    assert UNREADABLE in refusal(stata)


def test_rows_with_more_fields_than_the_header(folder: Path) -> None:
    path = folder / "cand_liin.csv"
    whole = SRTRTrajectoryDataset(folder, "liver")
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line},\n" for line in lines))  # a comma behind each row
    assert SRTRTrajectoryDataset(folder, "liver").fingerprint() == whole.fingerprint()
    lines[4] = lines[4].replace(",LI,", ",LI: Liver, whole,")  # a label that shifts its row
    path.write_text("\n".join(lines) + "\n")
    assert "data row 4: is no date" in refusal(folder)


def test_a_file_without_last_line_feed_is_whole(folder: Path) -> None:
    path = folder / "stathist_liin.csv"
    path.write_text(path.read_text().rstrip("\n"))
    assert len(SRTRTrajectoryDataset(folder, "liver")) == 24


@pytest.mark.parametrize("column", srtr_dataset.KEYS)
def test_missing_keys(column: str, folder: Path) -> None:
    write_folder(folder, pd.DataFrame(filler()[0]).drop(columns=column), filler()[1])
    text = refusal(folder)
    assert f"no column {column}" in text
    assert "CAND_LIIN" in text


def test_wrong_contents(folder: Path) -> None:
    cand, rows = filler()

    def text_of(change: dict[str, Any], where: int = 0) -> str:
        changed = [{**row, **change} if k == where else row for k, row in enumerate(cand)]
        return refusal(write_folder(folder, changed, rows))

    twice = [*cand, {**cand[0], "CAN_REM_DT": LISTED + 5}]
    assert "1 registrations stand there again" in refusal(write_folder(folder, twice, rows))
    for day in (-5000, 9000, 40000, 1.8e9):
        text = text_of({"CAN_LISTING_DT": day}, where=3)
        assert "column CAN_LISTING_DT, data row 4" in text
        assert "not from 1987 (dialysis: 1960) to now" in text
        assert f"{day:g}" not in text
    assert "no date of a known form" in text_of({"CAN_REM_DT": "last spring"})
    assert "spring" not in text_of({"CAN_REM_DT": "last spring"})
    assert "code" in text_of({"CAN_REM_CD": "Candidate died"})


def test_equal_rows_of_a_registration_count_once(folder: Path) -> None:
    cand, rows = filler()
    once = SRTRTrajectoryDataset(folder, "liver")
    write_folder(folder, cand + cand[:5], rows + rows[:7])
    assert SRTRTrajectoryDataset(folder, "liver").fingerprint() == once.fingerprint()


def test_nobody_left_and_too_few_events_show_the_flow(folder: Path) -> None:
    cand, rows = filler()
    young = [{**row, "CAN_AGE_IN_MONTHS_AT_LISTING": 100} for row in cand]
    text = refusal(write_folder(folder, young, rows))
    assert "no registrations left" in text
    assert "under 18 24" in text
    few = [row for row in cand if row["PX_ID"] > 900_005]
    text = refusal(write_folder(folder, few, rows))
    assert "18 registrations left with 9 events" in text
    assert "10 are needed" in text


@pytest.mark.parametrize(
    "options",
    [
        {"organ": "heart"},
        {"transplant": "maybe"},
        {"landmark_days": -1},
        {"landmark_days": 10**9},
        {"horizon_days": 0},
        {"horizon_days": 10**9},
        {"max_len": 0},
    ],
)
def test_impossible_arguments(options: dict[str, Any], folder: Path) -> None:
    message = refusal(folder, **{"organ": "liver", **options})
    assert str(next(iter(options.values()))) in message or "must be at least 0, 1 and 1" in message


def test_parquet_without_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (folder / "cand_liin.csv").rename(folder / "cand_liin.parquet")
    assert "pip install pyarrow" in refusal(folder)


def test_two_digit_years_lie_in_the_past() -> None:
    cells = pd.Series(["01/02/26", "12/31/87", "01/02/99", None])
    days, _ = srtr_dataset.decode(cells.rename("CAN_LISTING_DT"))
    dates = pd.Timestamp("1960-01-01") + pd.to_timedelta(days[:3], unit="D")
    assert dates.strftime("%Y-%m-%d").tolist() == ["2026-01-02", "1987-12-31", "1999-01-02"]
    assert np.isnan(days[3])
    began = srtr_dataset.decode(pd.Series(["05/01/65"], name="CAN_DIAL_DT"))[0][0]
    assert pd.Timestamp("1960-01-01") + pd.Timedelta(days=began) == pd.Timestamp(1965, 5, 1)


# ------------------------------------------------------------------- the command


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_check_prints_what_a_user_must_know(organ: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = srtr_dataset.main(["check", "--data_dir", str(SYNTHETIC), "--organ", organ])
    text = capsys.readouterr().out
    assert code == 0
    dataset = SRTRTrajectoryDataset(SYNTHETIC, organ)
    assert f"{int(dataset.labels.sum())} events" in text
    for name in ("cand", "stathist"):
        assert f"{name}_{SUFFIX[organ]}.sas7bdat" in text
    for rule, removed_here, left in dataset.flow.to_numpy().tolist():
        assert f"{removed_here:6d} out, {left:7d} left: {rule}" in text
    assert "no CANHX_GFR: the history holds no GFR" in text
    assert "observations a row" in text


def test_check_warns_of_implausible_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cand, rows = filler()
    rows[0]["CANHX_ALBUMIN"] = 35  # g/L
    write_folder(tmp_path, cand, rows)
    assert srtr_dataset.main(["check", "--data_dir", str(tmp_path), "--organ", "liver"]) == 0
    assert "values lie outside 0.5 to 7 g/dL" in capsys.readouterr().out


def test_check_ends_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert srtr_dataset.main(["check", "--data_dir", str(tmp_path), "--organ", "liver"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_trainer_asks_for_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(["--trajectory_only", "--dataset", "srtr", "--log_file", "none"]) == 2
    assert "--data_dir" in capsys.readouterr().err


def test_reading_is_no_loop_over_registrations(tmp_path: Path) -> None:
    seconds = []
    for n in (500, 8000):
        folder = write_folder(tmp_path / str(n), *random_tables(n, "liver", 0), "liver")
        start = time.perf_counter()
        SRTRTrajectoryDataset(folder, "liver")
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 12 * seconds[0] + 1


def test_a_death_without_a_day_of_removal_ends_on_its_own_day(read: Read) -> None:
    unfollowed: dict[str, Any] = {"CAN_REM_CD": 8, "CAN_REM_DT": None, "CAN_ENDWLFU": None}
    assert verdict(read(candidate(1, CAN_DEATH_DT=LISTED + 120, **unfollowed))) == 1.0
    assert verdict(read(candidate(1, CAN_DEATH_DT=LISTED + 80, **unfollowed))) == ENDED


@pytest.mark.parametrize(
    ("cell", "others", "expected"),
    [
        ("1", "1", 0.0),
        ("1", "998", 0.0),  # unknown has a code, so 1 is CAN_DIAL's no
        ("998", "998", 0.0),
        ("2", "1", 1.0),
        ("1", "2", 0.0),
        ("N", "N", 0.0),
        ("Y", "N", 1.0),
    ],
)
def test_a_kidney_history_of_dialysis_codes_is_not_inverted(
    cell: str, others: str, expected: float, read: Read
) -> None:
    """1 alone may be yes or CAN_DIAL's "no dialysis": CAN_DIAL_DT, here without a date, decides."""
    rows = [history_row(1, 0, "kidney", CANHX_DIAL=cell)]
    rows += [history_row(px, 0, "kidney", CANHX_DIAL=others) for px in range(900_000, 900_024)]
    dataset = read(candidate(1, "kidney", CAN_DIAL_DT=None), history=rows, organ="kidney")
    i = dataset.ids.tolist().index("1")
    assert dataset.values[dataset.offsets[i], 3] == expected


def test_without_the_column_years_of_dialysis_are_unknown(read: Read) -> None:
    plain_candidate = candidate(1, "kidney")
    plain_candidate.pop("CAN_DIAL_DT", None)
    dataset = read(plain_candidate, organ="kidney")
    assert np.isnan(dataset.ages_and_dialysis[:, 1]).all()


def test_two_rows_of_a_day_stand_in_the_order_of_their_time(read: Read) -> None:
    status = [(4099, 100), (4010, 200)]
    for order in (status, status[::-1]):
        rows = [
            history_row(1, 10, "kidney", CANHX_STAT_CD=code, CANHX_BEGIN_TM=second)
            for code, second in order
        ]
        assert series(read(candidate(1, "kidney"), history=rows, organ="kidney"), "status") == [
            (10, 1)
        ]


def test_codes_that_nothing_knows_are_said(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        read(candidate(1), history=[history_row(1, 0, CANHX_SRTR_LAB_MELD=9999)])
    assert "CANHX_SRTR_LAB_MELD: 1 cells hold no known code" in caplog.text


@pytest.mark.parametrize("words", ["--organ heart", "--landmark_days x", "--no_such_flag"])
def test_wrong_usage_of_check_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        srtr_dataset.main(["check", "--data_dir", "x", *words.split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
