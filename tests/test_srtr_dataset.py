"""The SRTR data set: cohorts of whole folders, texts, scoring, no leaks, and the command."""

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest

import srtr_dataset
from medgemma_clinical.data import training_data
from medgemma_clinical.data.findings import Findings
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.files import InputError
from slow_srtr import decide_slowly
from srtr_dataset import ORGANS, SRTRTrajectoryDataset
from srtr_files import (
    DEATHS,
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
from stages import arguments, data_for, make_stage

ORGAN_NAMES = tuple(ORGANS)


@pytest.fixture(scope="module")
def synthetic():
    return {organ: SRTRTrajectoryDataset(SYNTHETIC, organ) for organ in ORGAN_NAMES}


def inputs(dataset):
    """All that a model is shown of each registration, exactly."""
    result = {}
    simple = pd.concat(dataset.baseline_inputs().values(), axis=1).to_numpy()
    for i, name in enumerate(dataset.ids):
        rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
        arrays = dataset.times[rows], dataset.values[rows], dataset.static[i], simple[i]
        shown = dataset.prompt(i), dataset.prediction_hours[i]
        result[name] = (*(array.tobytes() for array in arrays), *shown)
    return result


def check(capsys, folder, organ, *words):
    """The output of the command on a folder that can be read."""
    words = ["check", "--data_dir", str(folder), "--organ", organ, *words]
    assert srtr_dataset.main(words) == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_every_reason_and_label_of_the_sas_files_is_the_expected_one(organ, synthetic):
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
    assert dataset.flow["left"].iloc[-1] == len(dataset)
    counts = dataset.flow.set_index("rule")["removed"]
    assert counts[counts > 0].to_dict() == truth["left_out"].value_counts().to_dict()


@pytest.mark.parametrize(
    ("organ", "first", "second", "dates", "labels"),
    [
        ("liver", ".csv", ".csv", ("mdy2", "ddmonyy"), True),
        ("kidney", ".CSV", ".DTA", ("ddmonyyyy", "sas"), True),
        ("liver", ".parquet", ".csv", ("iso", "isotime"), False),
    ],
)
def test_any_storage_gives_the_same_inputs(
    organ, first, second, dates, labels, synthetic, tmp_path
):
    cand, history = synthetic_tables(organ)
    suffix = SUFFIX[organ].upper()
    write_table(tmp_path / f"CAND_{suffix}{first}", cand, dates=dates[0], labels=labels)
    path = tmp_path / "pubsaf2506" / f"stathist_{suffix}{second}"
    write_table(path, history, dates=dates[1], labels=labels)
    if second == ".csv":  # a column's case does not matter
        header, rows = path.read_text().split("\n", 1)
        path.write_text(f"{header.lower()}\n{rows}")
    from_sas, from_other = synthetic[organ], SRTRTrajectoryDataset(tmp_path, organ)
    assert from_other.registrations.equals(from_sas.registrations)
    assert from_other.fingerprint() == from_sas.fingerprint()
    assert inputs(from_other) == inputs(from_sas)


def test_a_registration_to_score_needs_a_history_row_and_no_label(tmp_path):
    write_folder(tmp_path, [removed(7, 120, px=k) for k in (1, 2)], [history_row(1, 90)])
    dataset = SRTRTrajectoryDataset(tmp_path, "liver", require_labels=False)
    assert dataset.registrations["reason"].tolist() == ["", "no history row by the landmark"]


def test_nobody_left_and_too_few_events_show_the_flow(tmp_path):
    cand, rows = filler()
    young = [{**row, "CAN_AGE_IN_MONTHS_AT_LISTING": 100} for row in cand]
    with pytest.raises(InputError, match="under 18 24"):
        SRTRTrajectoryDataset(write_folder(tmp_path, young, rows), "liver")
    few = [row for row in cand if row["PX_ID"] > 900_005]
    with pytest.raises(InputError, match="18 registrations left with 9 events"):
        SRTRTrajectoryDataset(write_folder(tmp_path, few, rows), "liver")
    assert len(SRTRTrajectoryDataset(tmp_path, "liver", require_labels=False)) == 18


def test_only_the_latest_rows_are_kept(tmp_path, caplog):
    cand, rows = filler()
    rows += [history_row(1, day, CANHX_SRTR_LAB_MELD=6210 + day) for day in range(20)]
    write_folder(tmp_path, [*cand, candidate(1)], rows)
    with caplog.at_level(logging.INFO):
        dataset = SRTRTrajectoryDataset(tmp_path, "liver", max_len=5)
    assert "1 of 25 patients" in caplog.text
    i = dataset.ids.tolist().index("1")
    rows = slice(dataset.offsets[i], dataset.offsets[i + 1])
    assert dataset.times[rows].tolist() == [24 * day for day in range(15, 20)]


KIND = {"outcome_kind": "time"}
TIMES = {**KIND, "horizon_days": (90, 365)}


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_times_are_those_of_everyone_at_the_landmark_and_agree_with_the_labels(organ, synthetic):
    labelled, dataset = synthetic[organ], SRTRTrajectoryDataset(SYNTHETIC, organ, **KIND)
    truth = decide_slowly(*synthetic_tables(organ), organ, times=True)
    truth = {str(px): end for px, end in truth.items() if isinstance(end, tuple)}
    ends = zip(dataset.events, dataset.event_hours / 24, strict=True)
    assert dict(zip(dataset.ids, ends, strict=True)) == truth
    assert {*np.unique(dataset.events)} == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(dataset.labels, dataset.events == 1)
    died = {px: event == 1 and days <= ORGANS[organ].days for px, (event, days) in truth.items()}
    assert [died[px] for px in labelled.ids] == labelled.labels.tolist()
    wanted, found = inputs(labelled), inputs(dataset)
    assert {px: found[px] for px in wanted} == wanted


def test_removals_may_be_one_event(synthetic):
    apart = SRTRTrajectoryDataset(SYNTHETIC, "kidney", **KIND)
    together = SRTRTrajectoryDataset(SYNTHETIC, "kidney", **KIND, removals="together")
    np.testing.assert_array_equal(together.events, np.minimum(apart.events, 3))
    assert together.competing_events.names == (*apart.competing_events.names[:2], "removal")
    assert together.read_options == {**apart.read_options, "removals": "together"}
    with pytest.raises(InputError, match=r"fewer than 10 patients .*--removals together"):
        training_data.check_events(apart, np.arange(5))


def test_what_is_read_of_times_is_plain_and_reads_other_folders_the_same_way(tmp_path):
    dataset = SRTRTrajectoryDataset(write_folder(tmp_path / "a", *filler()), "liver", **TIMES)
    assert dataset.outcome_kind == "time"
    assert "days" not in dataset.question
    assert dataset.task_description()["Horizon"] == "90 and 365 days from then on"
    assert dataset.competing_events.risk_names == (
        *("risk_90d", "risk_365d", "risk_without_transplant_90d"),
        "risk_without_transplant_365d",
    )
    options = json.loads(json.dumps(dataset.read_options))
    assert options == dataset.read_options
    new = [removed(7, 100, px=1), candidate(2, CAN_ENDWLFU=LISTED + 91)]
    folder = write_folder(tmp_path / "b", new, [history_row(px, 0) for px in (1, 2)])
    (scored,) = (chunk.dataset for chunk in score(dataset, folder, read_options=options))
    assert scored.competing_events == dataset.competing_events
    assert scored.targets().tolist() == [[0, 240, 4], [0, 24, 0]]
    with pytest.raises(InputError, match="2 registrations left with 0 events"):
        SRTRTrajectoryDataset(folder, "liver", **TIMES)


def test_the_labels_options_are_as_they_were(tmp_path):
    dataset = SRTRTrajectoryDataset(write_folder(tmp_path, *filler()), "liver", horizon_days=[30])
    names = ["organ", "landmark_days", "horizon_days", "transplant", "max_len", "dialysis"]
    assert [*dataset.read_options] == names
    assert (dataset.outcome_kind, dataset.read_options["horizon_days"]) == ("label", 30)
    assert (dataset.competing_events, dataset.events, dataset.event_hours) == (None, None, None)
    np.testing.assert_array_equal(dataset.targets(), dataset.labels)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"horizon_days": (90, 365)}, "--horizon_days 90,365: "),
        ({"horizon_days": (365, 90), **KIND}, "--horizon_days 365,90: "),
        ({"horizon_days": (90, 90), **KIND}, "--horizon_days 90,90: "),
        ({"horizon_days": (), **KIND}, "--horizon_days : "),
        ({"horizon_days": (0, 90), **KIND}, "--horizon_days 0: "),
        ({"transplant": "exclude", **KIND}, "--transplant exclude: "),
        ({"outcome_kind": "when"}, "--outcome_kind when: "),
        ({"removals": "together"}, "--removals together: "),
    ],
)
def test_horizons_and_choices_that_do_not_go_together_are_refused(flags, named):
    with pytest.raises(InputError, match=f"^{re.escape(named)}[^\n]*$"):
        SRTRTrajectoryDataset(SYNTHETIC, "liver", **flags)


def score(dataset, folder, **other):
    """What ``scoring_rows`` yields of a folder for a model trained on a data set."""
    config = {"read_options": dataset.read_options, "question": dataset.question}
    config |= {"features": list(dataset.features), "units": list(dataset.units), **other}
    return [*SRTRTrajectoryDataset.scoring_rows(folder, config, Findings(str(folder)), 10)]


def test_a_lone_registration_is_scored_as_in_company(tmp_path):
    """1 means no dialysis where the training data hold CAN_DIAL's codes."""
    cand, rows = filler("kidney")
    rows = [{**row, "CANHX_DIAL": 1 + row["PX_ID"] % 3} for row in rows]
    new = [candidate(1, "kidney", CAN_ENDWLFU=LISTED + 400, CAN_DIAL_DT=LISTED - 50)]
    own = [history_row(1, 0, "kidney", CANHX_DIAL=1)]
    company = SRTRTrajectoryDataset(write_folder(tmp_path / "all", cand, rows, "kidney"))
    both = write_folder(tmp_path / "both", cand + new, rows + own, "kidney")
    alone = write_folder(tmp_path / "alone", new, own, "kidney")
    values = []
    for folder in (both, alone):
        chunks = score(company, folder)
        assert sum(len(chunk.dataset) for chunk in chunks) == chunks[-1].read
        (found,) = (chunk.dataset for chunk in chunks if "1" in chunk.dataset.ids)
        values.append(found.values[found.offsets[found.ids.tolist().index("1")]])
    np.testing.assert_array_equal(values[0], values[1])
    assert values[1][company.features.index("dialysis")] == 0.0


def test_scoring_refuses_another_organ_and_other_features(tmp_path):
    dataset = SRTRTrajectoryDataset(write_folder(tmp_path, *filler()), "liver")
    other = {**dataset.read_options, "organ": "kidney"}
    for change, place in (({"features": ["MELD"]}, "features"), ({"read_options": other}, "kipa")):
        with pytest.raises(InputError, match=place):
            score(dataset, tmp_path, **change)


@pytest.mark.parametrize("few", [0, 10, 11])
def test_a_laboratory_value_that_few_training_candidates_have_is_blank(few, tmp_path):
    cand, history = filler("kidney", 40)
    write_folder(tmp_path, cand, history, "kidney")
    split = (dataset := SRTRTrajectoryDataset(tmp_path, "kidney")).split(0)
    known = {*dataset.ids[split["train"][:few]], *dataset.ids[split["test"]]}
    history += [history_row(int(px), 5, "kidney", CANHX_GFR=9) for px in sorted(known)]
    write_folder(tmp_path, cand, history, "kidney")
    args = arguments("--trajectory_only", "--dataset", "srtr", "--data_dir", str(tmp_path))
    data, place = data_for(args), dataset.features.index("GFR")
    read = data.dataset.values[data.dataset.rows_of(data.split["test"]), place]
    assert np.isnan(read).all() == ("GFR" in dict(data.unusable)) == (few < 11)
    prompts = [data.dataset.prompt(i) for i in data.split["test"]]
    assert {"GFR" in text for text in prompts} == {few > 10}
    stage = make_stage(args, data)
    assert stage.model.eval()(stage.collate(data.split["test"])).logit.isfinite().all()


def test_the_prompt_holds_as_much_of_the_history_as_was_chosen(synthetic):
    dataset = synthetic["liver"]
    for i in range(len(dataset)):
        context, question = dataset.contexts[i].rstrip(". "), dataset.question
        whole, none, last, alone = (
            dataset.prompt(i, PromptOptions(series=choice))
            for choice in ("all", "none", "last", "main")
        )
        assert none == f"{context}. {question}\n"
        assert "->" not in last
        assert last.count(" (day ") == sum(1 for _ in dataset.measured(i))
        own = re.search(r"MELD: ([^;.]*(?:\.\d[^;.]*)*)", whole)
        expected = f"History: {own[0]}. " if own else ""
        assert alone == f"{context}. {expected}{question}\n"


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_baselines_and_subgroups_see_the_candidates_own_columns(organ, synthetic):
    dataset = synthetic[organ]
    assert set(dataset.prediction_hours) == {24 * ORGANS[organ].days}
    assert all(name.startswith("static_") for name in dataset.static_names)
    table = dataset.baseline_inputs()
    assert table["number of observations"]["count"].tolist() == dataset.lengths.tolist()
    everyone = np.arange(len(dataset))
    chosen = everyone[::3]
    part = dataset.subset(chosen).baseline_inputs()
    for name, columns in table.items():
        np.testing.assert_array_equal(part[name].to_numpy(), columns.to_numpy()[chosen])
    cand = synthetic_tables(organ)[0].set_index("PX_ID").loc[dataset.ids.astype(float)]
    if organ == "kidney":
        age, years = table["age and years of dialysis"].to_numpy().T
        started = cand["CAN_DIAL_DT"] - cand["CAN_LISTING_DT"]
        np.testing.assert_allclose(years, np.where(started <= 365, (365 - started) / 365.25, 0))
    else:
        meld, age = table["last MELD and age"].to_numpy().T
        measured = ({f: values[-1] for f, _, values in dataset.measured(i)} for i in everyone)
        shown = [values.get(dataset.features.index("MELD"), np.nan) for values in measured]
        np.testing.assert_array_equal(meld, shown)
        np.testing.assert_array_equal(table["last MELD"].to_numpy()[:, 0], shown)
    np.testing.assert_allclose(age, cand["CAN_AGE_IN_MONTHS_AT_LISTING"] / 12)
    people = demographics(dataset)
    np.testing.assert_array_equal(people["age"], age)
    sexes = cand["CAN_GENDER"].map({"M": "man", "F": "woman"}).fillna("not known")
    assert people["sex"].tolist() == sexes.tolist()


# ------------------------------------------------------------------- nothing of the future

LEAKING = (
    *("CAN_LAST_", "CAN_LATEST_", "CAN_MOST_RECENT_", "CAN_ON_DIAL", "CAN_REM_", "REC_TX_"),
    *("CAN_ENDWLFU", "CAN_DEATH", "PERS_OPTN", "PERS_SSA", "DONOR_", "CANHX_REASON"),
)


def alter(what, cand, history, late, landmark):
    """Change what may not be known at the landmark; ``late`` marks the rows after it."""
    rng = np.random.default_rng(1)
    if what == "later rows altered":
        for name in history.columns.difference(["PX_ID", "CANHX_BEGIN_DT"]):
            history[name] = history[name].where(~late, rng.permutation(history[name]))
    if what == "later rows moved":
        history["CANHX_BEGIN_DT"] += 7 * late
    if what == "ends of spans":
        history["CANHX_END_DT"] = history["CANHX_END_DT"].sample(frac=0.5, random_state=0)
    if what == "later dates":
        for name in {"CAN_DIAL_DT", "CAN_GFR_DT"} & set(cand):
            other = landmark + rng.integers(1, 99, len(cand))
            assert (cand[name] > landmark).sum() > 5
            other = other.where(rng.random(len(cand)) < 0.5)
            cand[name] = cand[name].where(cand[name] <= landmark, other)
    if what == "columns of the end":
        cand["CAN_SOURCE"] = cand["CAN_SOURCE"].replace({"A": "R", "R": "A"})
        for table in (cand, history):
            for name in (column for column in table if column.startswith(LEAKING)):
                table[name] = rng.permutation(table[name])
    history = history[~late] if what == "later rows removed" else history
    return cand, pd.concat([history, history[late]]) if what == "later rows doubled" else history


CHANGES = [f"later rows {change}" for change in ("altered", "moved", "removed", "doubled")]
CHANGES += ["ends of spans", "later dates", "columns of the end"]


@pytest.fixture(scope="module", params=ORGAN_NAMES)
def random_cohort(request, tmp_path_factory):
    """An organ, its random tables and the inputs made of them."""
    organ = request.param
    tables = random_tables(150, organ, seed=5)
    folder = write_folder(tmp_path_factory.mktemp(organ), *tables, organ)
    return organ, *tables, inputs(SRTRTrajectoryDataset(folder, organ))


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_after_the_landmark_changes_an_input(what, random_cohort, tmp_path):
    organ, cand, history, known = random_cohort
    landmark = cand["CAN_LISTING_DT"] + ORGANS[organ].days
    late = history["CANHX_BEGIN_DT"] > history["PX_ID"].map(landmark.set_axis(cand["PX_ID"]))
    assert late.sum() > 50
    tables = alter(what, cand.copy(), history.copy(), late, landmark)
    folder = write_folder(tmp_path, *tables, organ)
    now = inputs(SRTRTrajectoryDataset(folder, organ, require_labels=False))
    shared = known.keys() & now.keys()  # who is asked depends on who still waits
    assert len(shared) == len(known) or (what == "columns of the end" and len(shared) > 12)
    assert all(known[px] == now[px] for px in shared)


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_another_end_with_later_rows_changes_no_input_of_times(organ, tmp_path):
    """Everybody dies, is transplanted or removed on another day, or still waits."""
    cand, history = random_tables(150, organ, seed=6)
    cand, history = cand[cand["CAN_SOURCE"] != "L"], history.copy()
    before = SRTRTrajectoryDataset(
        write_folder(tmp_path / "a", cand, history, organ), organ, **TIMES
    )
    rng, landmark = np.random.default_rng(2), cand["CAN_LISTING_DT"] + ORGANS[organ].days
    waits = cand["PX_ID"].astype(str).isin(before.ids)
    moved = cand[waits].assign(CAN_REM_CD=rng.choice([8, 13, 4, 12, 7, np.nan], waits.sum()))
    days = (landmark[waits] + rng.integers(1, 900, waits.sum())).to_numpy()
    moved[["CAN_REM_DT", "CAN_ENDWLFU"]] = np.column_stack([days, days])
    moved["REC_TX_DT"] = np.where(moved["CAN_REM_CD"] == 4, days, np.nan)
    for name in DEATHS:
        moved[name] = np.where(moved["CAN_REM_CD"] == 8, days, days + rng.integers(1, 99))
    late = history["CANHX_BEGIN_DT"] > history["PX_ID"].map(landmark.set_axis(cand["PX_ID"]))
    kept = history[~late | (rng.random(len(late)) < 0.5)]
    after = SRTRTrajectoryDataset(write_folder(tmp_path / "b", moved, kept, organ), organ, **TIMES)
    assert inputs(after) == inputs(before)
    assert (after.event_hours != before.event_hours).mean() > 0.9
    assert (after.events != before.events).mean() > 0.5


# ------------------------------------------------------------------- the command


@pytest.mark.parametrize("organ", ORGAN_NAMES)
def test_check_prints_what_a_user_must_know(organ, synthetic, capsys):
    dataset = synthetic[organ]
    text = check(capsys, SYNTHETIC, organ)
    for rule, count, left, _ in dataset.flow.to_numpy().tolist():
        assert (f"{count:>15} out, {left:>9} left: {rule}" in text) == (count > 0)
    tables = (f"{name}_{SUFFIX[organ]}.sas7bdat: " for name in ("cand", "stathist"))
    for shown in (*tables, f"{int(dataset.labels.sum())} events", "no CANHX_GFR: "):
        assert shown in text
    assert text.endswith("\nready, with warnings\n")


def test_a_folder_without_events_is_read_once_and_fit_to_predict_on(tmp_path, capsys):
    waiting = [candidate(px, CAN_ENDWLFU=LISTED + 100) for px in range(5)]
    write_folder(tmp_path, waiting, [history_row(px, 0) for px in range(5)])
    text = check(capsys, tmp_path, "liver")
    assert text.count(" columns, used: ") == 2
    assert "rows 5, patients 5" in text
    assert "\nready to predict on, with warnings, not to train on: " in text
