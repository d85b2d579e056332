"""Table 1: the numbers of plain pandas; hidden counts cannot be computed from the others."""

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation.suppress import suppress_table
from medgemma_clinical.evaluation.topics.cohort import (
    count_cells,
    part_table,
    suppress_table_one,
    table_one,
    table_one_cells,
)
from trajectories import dataset_of

NAN, N = np.nan, 120
LABELS = np.arange(N) % 3 == 0
SERIES = [" -> ".join(f"{k + h} ({h}h)" for h in range(1 + k % 4)) for k in range(N)]
POTASSIUM = [f"{4 + k % 5} (0h)" if k % 7 else "" for k in range(N)]
COLUMNS = {
    "label_escalation": LABELS.astype(int),
    "trajectory_potassium": POTASSIUM,
    "static_age [years]": np.where(np.arange(N) % 10 == 0, NAN, 30.0 + np.arange(N)),
    "static_sex_male": [NAN, *(np.arange(1, N) % 2)],
    "static_smoker": (np.arange(N) >= 5).astype(int),
    "static_unit_a": (np.arange(N) < 50).astype(int),
    "static_unit_b": ((np.arange(N) >= 50) & (np.arange(N) < 100)).astype(int),
    "static_unit_c": (np.arange(N) >= 100).astype(int),
}
SPLIT = {"train": np.arange(60), "val": np.arange(60, 90), "test": np.arange(90, N)}
GROUPS = {"all": np.arange(N), "with the event": np.flatnonzero(LABELS)}
GROUPS |= {"without the event": np.flatnonzero(~LABELS)}
GROUPS |= {"training": SPLIT["train"], "validation": SPLIT["val"], "test": SPLIT["test"]}
LAST, OFTEN = ", last value", ", observations"


def dataset(patients=N):
    names = [f"p{k % patients}" for k in range(N)]
    return dataset_of(SERIES, subject_id=names, **COLUMNS)


def test_a_series_that_is_not_read_has_no_line():
    read = table_one(dataset().with_series(["Anion gap"]), SPLIT)
    without = table_one(dataset(), SPLIT)
    without = without[~without["variable"].str.startswith("potassium")]
    pd.testing.assert_frame_equal(read, without.reset_index(drop=True))


def test_the_numbers_are_those_of_plain_pandas():
    found = table_one(dataset(), SPLIT).set_index(["variable", "group"])
    last = {"Anion gap": [k + k % 4 for k in range(N)]}
    last["potassium"] = [float(x.split(" ")[0]) if x else NAN for x in POTASSIUM]
    often = {"Anion gap": 1 + np.arange(N) % 4, "potassium": [float(bool(x)) for x in POTASSIUM]}
    plain = {name: COLUMNS[f"static_{name}"] for name in ("age [years]", "sex_male", "unit_a")}
    units = {"Anion gap": " [mEq/L]", "potassium": ""}
    for name, unit in units.items():
        plain |= {f"{name}{LAST}{unit}": last[name], f"{name}{OFTEN}": often[name]}
    for name, values in plain.items():
        for group, rows in GROUPS.items():
            own, line = pd.Series(values, dtype=float)[rows], found.loc[(name, group)]
            assert line["missing"] == own.isna().sum()
            if name.startswith(("sex", "unit")):
                assert (line["count"], line["share"]) == (own.sum(), pytest.approx(own.mean()))
                assert np.isnan(line["median"])
            else:
                quartiles = [own.quantile(q) for q in (0.25, 0.5, 0.75)]
                assert line[["q1", "median", "q3"]].tolist() == pytest.approx(quartiles)
                assert np.isnan(line["count"])
    sizes = [len(rows) for rows in GROUPS.values()]
    assert found.loc["Patients"]["count"].tolist() == sizes
    folds = table_one(dataset(), {})
    assert folds["group"].unique().tolist() == [*GROUPS][:3]
    cells = table_one_cells(folds).set_index("Variable")
    sexes = ["60 (50.4\xa0%)", "20 (51.3\xa0%)", "40 (50.0\xa0%)", "1"]
    assert cells.loc["sex_male"].tolist() == sexes
    assert cells.loc["age [years]", "Missing"] == "12"


def test_rows_of_the_same_patients_are_called_stays():
    cells = table_one_cells(table_one(dataset(40), SPLIT)).set_index("Variable")
    assert cells["All"].iloc[:2].to_dict() == {"Stays": "120", "Patients": "40"}
    for column, own in (("With the event", LABELS), ("Without the event", ~LABELS)):
        patients = len({k % 40 for k in np.flatnonzero(own)})
        expected = {"Stays": str(own.sum()), "Patients": str(patients)}
        assert cells[column].iloc[:2].to_dict() == expected


def by_event(counts):
    """The data set with so many rows of each event, the last ones censored."""
    rows = dataset()
    rows.competing_events = CompetingEvents(("death", "ICU discharge"), (24.0,))
    rows.events = np.repeat([1.0, 2, 0], [*counts, N - sum(counts)])
    return rows


def test_times_to_events_have_a_group_for_each_event():
    rows = by_event([30, 70])
    table = table_one(rows, SPLIT)
    cells = table_one_cells(table).set_index("Variable")
    assert [*cells][:4] == ["All", "Death", "ICU discharge", "Censored"]
    assert cells.loc["Patients"].tolist()[:4] == ["120", "30", "70", "20"]
    death = pd.Series(COLUMNS["static_age [years]"])[:30]
    line = table.set_index(["variable", "group"]).loc[("age [years]", "death")]
    assert line["median"] == death.median()
    shown = suppress_table_one(table, 21, hide_events=False)
    hidden = numbers(shown, "Patients")
    assert hidden["death"] is hidden["ICU discharge"] is hidden["censored"] is None
    assert hidden["training"] == 60


def test_the_parts_count_each_event_and_hide_all_where_one_is_rare():
    rows = by_event([64, 36])
    parts = part_table(rows.labels, rows.groups, SPLIT, rows.event_kinds)
    cells = count_cells(parts.drop(columns="minority_patients"), "patients")
    assert cells.to_numpy().tolist() == [
        ["training", "60", "60", "0", "0"],
        ["validation", "30", "4", "26", "0"],
        ["test", "30", "0", "10", "20"],
    ]
    assert [*cells][2:] == ["Death", "ICU discharge", "Censored"]
    shown = count_cells(suppress_table(parts, 5), "patients")
    assert shown["Death"].tolist() == ["not shown", "fewer than 5", "not shown"]
    assert {*shown["ICU discharge"], *shown["Censored"]} == {"not shown"}, "they add up"


def numbers(shown, name, column="count"):
    """Return the numbers of a variable by group, hidden ones as None."""
    own = shown[shown["variable"] == name].set_index("group")[column]
    return {group: None if isinstance(x, str) else x for group, x in own.items()}


@pytest.mark.parametrize("min_cell", [0, 2, 11, 21, 35])
def test_no_difference_of_shown_counts_tells_a_small_one(min_cell):
    shown = suppress_table_one(table_one(dataset(), SPLIT), min_cell, hide_events=False)
    assert not {"rows", "patients"} & {*shown}, "they would tell the sizes of groups"
    exact = table_one(dataset(), SPLIT)
    outcomes, parts = [*GROUPS][1:3], [*GROUPS][3:]
    for name in ("Patients", "sex_male", "smoker", "unit_a", "unit_b", "unit_c"):
        known, whole = numbers(shown, name), numbers(exact, name)
        for sides in (outcomes, parts):
            hidden = [side for side in sides if known[side] is None]
            assert len(hidden) != 1 or known["all"] is None, "the others tell it"
            for side in {*sides} - {*hidden}:
                n = numbers(exact, "Patients")[side]
                rest = n - whole[side] if name != "Patients" else 0
                assert all(x == 0 or x >= min_cell for x in (whole[side], rest))
    for side in GROUPS:  # a row is in one of the units
        assert len({numbers(shown, f"unit_{unit}")[side] is None for unit in "abc"}) == 1
    assert (numbers(shown, "sex_male")["all"] is None) == (min_cell > 1), "one sex is missing"
    known = exact["rows"] - exact["missing"]
    quartiles = shown["median"].notna() | exact["median"].isna()
    assert (quartiles == ((known >= 4 * min_cell) | exact["median"].isna())).all()


def test_counts_by_outcome_go_where_a_part_hides_its_events():
    exact = table_one(dataset(), SPLIT)
    shown = suppress_table_one(exact, 5, hide_events=True)
    for name in ("Patients", "unit_a"):
        assert [*numbers(shown, name).values()][1:3] == [None, None]
        assert None not in [*numbers(shown, name).values()][3:]
    assert shown["median"].notna().sum() == exact["median"].notna().sum()
