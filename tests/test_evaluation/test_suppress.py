"""Small counts that are hidden: neither they nor what tells them is left, and the rest stays."""

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.evaluation.suppress import (
    AT_THRESHOLD,
    suppress,
    suppress_table,
)
from medgemma_clinical.evaluation.topics.cohort import suppress_case_mix
from medgemma_clinical.evaluation.topics.written_reports import suppress_reports

FEW = "fewer than 11"


def metric(value, **more):
    return {"value": round(value, 4), "low": 0.1, "high": 0.9, **more}


def metrics_of_part(true_positives=20, events=40, false_positives=30, n=200, minority=None):
    """A part as in metrics.json, its shares those of a 2x2 table."""
    others, positives = n - events, true_positives + false_positives
    shares = {
        "sensitivity": true_positives / events,
        "specificity": 1 - false_positives / others,
        "ppv": true_positives / positives,
        "npv": 1 - (events - true_positives) / (n - positives),
        "positives": positives / n,
        "net_benefit": 0.1,
        "auroc": 0.7,
    }
    return {
        "n": n,
        "patients": n,
        "events": events,
        "minority_patients": min(events, others) if minority is None else minority,
        "model": "stage 1 (trajectory alone)",
        **{name: metric(value) for name, value in shares.items()},
        "models": {
            "blend": {
                "reference": "stage 1 (trajectory alone)",
                "auroc": metric(0.68, difference=-0.02),
            }
        },
    }


def blank(metrics):
    """Names of the metrics without any number."""
    return {
        name
        for name, each in metrics.items()
        if name != "models" and isinstance(each, dict)
        if all(x is None for x in each.values())
    }


def test_nothing_is_hidden_of_large_counts_nor_without_a_limit():
    for part, min_cell in ((metrics_of_part(), 11), (metrics_of_part(3, 5, 9, 20), 0)):
        assert suppress(part, min_cell) == part


@pytest.mark.parametrize(
    ("part", "events"),
    [
        (metrics_of_part(3, 5, 30), FEW),
        (metrics_of_part(150, 195, 2), "not shown"),  # few without the event
        (metrics_of_part(15, 30, 30, minority=4), "not shown"),  # rows of few patients
        (metrics_of_part(3, 5, 2, 9), FEW),
    ],
)
def test_a_part_with_few_events_or_others_has_no_metric(part, events):
    hidden = suppress(part, 11)
    assert hidden["events"] == events
    assert hidden["minority_patients"] == FEW
    assert hidden["n"] == (FEW if part["n"] == 9 else 200)
    assert blank(hidden) == {*AT_THRESHOLD, "auroc"}
    assert blank(hidden["models"]["blend"]) == {"auroc"}
    assert hidden["models"]["blend"]["reference"] == part["model"]
    assert suppress(hidden, 11) == hidden, "a shared copy that is shared again"


@pytest.mark.parametrize(
    "cells", [(35, 40, 30), (10, 40, 30), (20, 40, 155), (20, 40, 8), (39, 40, 30)]
)
def test_a_small_cell_at_the_threshold_hides_all_that_tell_it(cells):
    hidden = suppress(metrics_of_part(*cells), 11)
    assert blank(hidden) == {*AT_THRESHOLD}
    assert blank(hidden["models"]["blend"]) == set()
    assert hidden["events"] == 40
    assert hidden["auroc"]["value"] == 0.7


def test_rows_of_the_same_patients_count_once():
    part = metrics_of_part(40, 80, 60, 400) | {"patients": 50}
    assert blank(suppress(part, 11)) == {*AT_THRESHOLD}  # 5 patients in a cell of 40 rows
    assert blank(suppress(part | {"patients": 400}, 11)) == set()


@pytest.mark.parametrize("second", [(20, 40, 30), (3, 5, 30), (150, 195, 2), (35, 40, 30)])
@pytest.mark.parametrize("first", [(20, 40, 30), (3, 5, 30), (35, 40, 30)])
def test_each_of_two_targets_is_hidden_by_its_own_minority(first, second):
    parts = [
        metrics_of_part(*cells) | {"fold_minority_patients": 2 if cells[1] == 5 else 20}
        for cells in (first, second)
    ]
    for part in parts:
        for metric in part["models"]["blend"]["auroc"], part["auroc"]:
            metric |= {"sd": 0.1, "min": 0.6, "max": 0.8}

    def joined(one, other):
        shared = ("n", "patients", "model", "models", "reference")
        ending = {f"{name}_72h": x for name, x in other.items() if name not in shared}
        both = one | ending
        if "models" in one:
            both["models"] = {"blend": joined(*(x["models"]["blend"] for x in (one, other)))}
        return both

    hidden = [suppress(part, 11) for part in parts]
    assert suppress(joined(*parts), 11) == joined(*hidden)
    lacking = {k: x for k, x in joined(*parts).items() if k != "fold_minority_patients_72h"}
    assert suppress(lacking, 11)["auroc_72h"]["min"] is None, "of an earlier version"


def test_small_counts_of_reports_and_their_shares_are_hidden():
    reports = {"reports": 100, "numbers_stated": 500, "invented": 4}
    shares = {
        "right_answer": 0.6,
        "parse": 0.95,
        "inventing": 0.04,
        "right_trend": 0.5,
        "true_number": 0.5,
    }
    reports |= {f"{name}_share": metric(share) for name, share in shares.items()}
    hidden = suppress_reports(reports, 11)
    assert (hidden["numbers_stated"], hidden["invented"]) == (500, FEW)
    assert blank(hidden) == {"parse_share", "inventing_share"}  # 5 unreadable, 4 that invent
    assert suppress_reports(hidden, 11) == hidden


MIX = {
    **{"rows": 400.0, "patients": 300.0, "prevalence": 0.1, "women": 0.4},
    **{"observations_q1": 2.0, "observations_median": 3.0, "observations_q3": 4.0},
    **{"age_q1": 40.0, "age_median": 60.0, "age_q3": 70.0},
}
OBSERVATIONS = {name for name in MIX if "observations" in name}
UNCOUNTED = {"women", "age_q1", "age_median", "age_q3"}  # of how many patients is not known


@pytest.mark.parametrize(
    ("changes", "hidden"),
    [
        ({}, set()),
        ({"prevalence": 0.03}, {"prevalence"}),
        ({"prevalence": 0.98}, {"prevalence"}),
        ({"prevalence": 0.0}, set()),
        ({"patients": 43.0, "prevalence": 0.4}, OBSERVATIONS),
        ({"patients": 9.0}, {"patients", "prevalence", *OBSERVATIONS}),
    ],
)
def test_the_case_mix_leaves_out_what_tells_a_small_count(changes, hidden):
    mix = MIX | changes
    shown = suppress_case_mix(mix, 11, hide_events=False)
    assert shown.keys() == mix.keys() - hidden - UNCOUNTED
    assert suppress_case_mix(mix, 0, hide_events=True) == mix
    assert "prevalence" not in suppress_case_mix(mix, 11, hide_events=True)


# ------------------------------------------------------------------ tables


def groups(rows):
    """Subgroups with (patients, events) each, their prevalence and AUROC."""
    patients, events = np.array(rows).T
    return pd.DataFrame(
        {
            "group": [f"g{k}" for k in range(len(rows))],
            "patients": patients,
            "events": events,
            "minority_patients": np.minimum(events, patients - events),
            "prevalence": events / patients,
            "auroc": 0.7123,  # all digits tell the events
            "auroc_low": 0.6,
        }
    )


def test_one_hidden_count_of_a_column_hides_another():
    table = suppress_table(groups([(100, 40), (80, 20), (200, 5)]), 11)
    assert table["patients"].tolist() == ["100", "80", "200"]
    assert table["events"].tolist() == ["40", "not shown", FEW]
    assert table["prevalence"].isna().tolist() == [False, True, True]
    assert table["auroc"].tolist() == pytest.approx([0.712, 0.712, np.nan], nan_ok=True)
    assert "minority_patients" not in table, "it tells the events"
    two = suppress_table(groups([(100, 40), (80, 4), (200, 5)]), 11)
    assert two["events"].tolist() == ["40", FEW, FEW]
    lacking = suppress_table(groups([(100, 40), (80, 75)]), 11)
    assert lacking["events"].tolist() == ["not shown", "not shown"]
    assert suppress_table(groups([(9, 4)]), 0)["events"].tolist() == [4]
    assert suppress_table(groups([(100, 0), (80, 20)]), 11)["events"].tolist() == ["0", "20"]


def test_counts_add_up_within_a_part_of_the_table():
    table = groups([(100, 40), (80, 5), (100, 30), (90, 15)])
    table["characteristic"] = ["sex", "sex", "age", "age"]
    hidden = suppress_table(table, 11, by="characteristic")
    assert hidden["events"].tolist() == ["not shown", FEW, "30", "15"]


@pytest.mark.parametrize(
    ("removed", "expected_left"),
    [
        ([0, 50, 100], ["1,000", "950", "850"]),
        ([0, 5, 100], ["not shown", "not shown", "895"]),
        ([0, 100, 5], ["not shown", "not shown", "895"]),
        ([0, 5, 0], ["not shown", "not shown", "995"]),  # one rule alone
        ([5, 5, 100], ["not shown", "not shown", "890"]),
    ],
)
def test_no_difference_of_two_lines_of_a_flow_tells_what_a_rule_removed(removed, expected_left):
    left = 1000 - np.cumsum(removed)
    flow = pd.DataFrame({"rule": ["a", "b", "c"], "removed": removed, "left": left})
    hidden = suppress_table(flow, 11)
    assert hidden["left"].tolist() == expected_left
    if expected_left[1] == "not shown":
        assert sum(text in (FEW, "not shown") for text in hidden["removed"]) == min(
            2, sum(count > 0 for count in removed)
        )
