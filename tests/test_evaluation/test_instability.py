"""How much risks of the same rows differ between repeats, and what the page shows of it."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from medgemma_clinical.data.fold_split import draw_folds
from medgemma_clinical.evaluation.topics.instability import (
    instability,
    measure_instability,
    repeat_metrics,
)
from pages import MODEL, Page, make_rows, write_page

TESTED = ["id", "label", "patient"]

EACH = pd.DataFrame({"threshold": [0.3, 0.25, 0.32, 0.3], "auroc": [0.71, 0.74, 0.7, 0.73]})


def make_repeats(rows, spread=0.5, repeats=4, seed=0):
    """The model's log-odds with the noise of each repeat."""
    rng = np.random.default_rng(seed)
    odds = np.log(rows[MODEL] / (1 - rows[MODEL]))
    risks = {f"repeat_{k}": expit(odds + rng.normal(0, spread, len(rows))) for k in range(repeats)}
    return rows[TESTED].assign(**risks)


def by_pandas(table, by_repeat):
    """The measures from a long table, a line a row and repeat, and one of all pairs of lines."""
    long = table.melt([*TESTED], var_name="repeat", value_name="risk")
    threshold = by_repeat["threshold"].set_axis(table.columns.drop(TESTED))
    long["own"] = long["risk"] >= long["repeat"].map(threshold)
    long["shared"] = long["risk"] >= threshold.mean()
    pairs = long.merge(long, on="id", suffixes=("", "_of_other"))
    pairs = pairs[pairs["repeat"] < pairs["repeat_of_other"]]
    sd = long.groupby("id")["risk"].std()
    sides = long.groupby("id")[["own", "shared"]].nunique()
    auroc = by_repeat["auroc"]
    return {
        "mape": (pairs["risk"] - pairs["risk_of_other"]).abs().mean(),
        "sd_mean": sd.mean(),
        "sd_median": sd.median(),
        "sd_p90": sd.quantile(0.9),
        "changes": (sides["own"] == 2).mean(),
        "changes_of_two": (pairs["own"] != pairs["own_of_other"]).mean(),
        "changes_at_mean_threshold": (sides["shared"] == 2).mean(),
        "threshold_mean": threshold.mean(),
        "threshold_min": threshold.min(),
        "threshold_max": threshold.max(),
        "auroc_mean": auroc.mean(),
        "auroc_sd": auroc.std(),
        "auroc_min": auroc.min(),
        "auroc_max": auroc.max(),
    }


@pytest.mark.parametrize("repeats", [2, 4])
def test_the_measures_are_those_of_a_table_of_all_pairs(repeats):
    table, by_repeat = make_repeats(make_rows(150), repeats=repeats), EACH[:repeats]
    risks = table.drop(columns=TESTED).to_numpy()
    assert measure_instability(risks, by_repeat) == pytest.approx(by_pandas(table, by_repeat))


def test_equal_repeats_show_no_difference_and_noise_of_known_size_its_size():
    equal = pd.DataFrame({"threshold": [0.3] * 5, "auroc": 0.7})
    found = measure_instability(np.tile(make_rows()[[MODEL]], 5), equal)
    for name in ("mape", "sd_mean", "sd_p90", "changes", "changes_of_two", "auroc_sd"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    # Two draws of a normal distribution differ by 2 / sqrt(pi) of its SD on average.
    noise = np.random.default_rng(0).normal(0.3, 0.01, (4000, 5))
    found = measure_instability(noise, equal)
    assert found["mape"] == pytest.approx(0.02 / np.sqrt(np.pi), rel=0.02)
    assert found["sd_mean"] == pytest.approx(0.94 * 0.01, rel=0.01)  # c4 of five draws
    assert found["changes_of_two"] == pytest.approx(0.5, abs=0.02)
    assert found["changes"] == pytest.approx(1 - 2 * 0.5**5, abs=0.02)


def page_of(root, repeats, rows=None, **options):
    rows = make_rows() if rows is None else rows
    table, by_repeat = repeats
    results = [repeat_metrics, partial(instability, table=table, by_repeat=by_repeat)]
    return write_page(root, rows, results=results, folds=5, noun="stays", **options)


def test_the_page_states_the_measures_and_that_they_are_a_lower_bound(tmp_path):
    table = make_repeats(make_rows())
    page, expected = Page(page_of(tmp_path, (table, EACH))), by_pandas(table, EACH)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    section = text.partition("Instability")[2]
    names = ["changes", "changes_of_two", "changes_at_mean_threshold"]
    names += ["threshold_min", "threshold_max", "threshold_mean"]
    shares = [f"{100 * expected[name]:.1f} %" for name in names]
    changes, of_two, at_mean, lowest, highest, mean = shares
    for words in (
        f"MAPE {expected['mape']:.3f} ",
        f"SD, mean {expected['sd_mean']:.3f} ",
        f"SD, median {expected['sd_median']:.3f} ",
        f"SD, 90th percentile {expected['sd_p90']:.3f} ",
        f"Change sides {changes} stays on both sides",
        f"({lowest} to {highest})",
        f"Of two repeats {of_two} ",
        f"At one threshold {at_mean} the same at {mean},",
        "AUROC 0.700 to 0.740 of the repeats, lowest to highest; mean 0.720, SD 0.018",
        "each of 400 stays has 4 risks",
        "lower bound",
        "share on average 80.0 %",
    ):
        assert words in section
    assert any(alt.startswith("Instability plot") for alt, _ in page.images())
    written = pd.read_csv(tmp_path / "figures" / "instability.csv").iloc[0].to_dict()
    assert written == pytest.approx(expected)
    assert "Means over the repeats" in text
    assert "Subgroups" not in text, "they would be those of one repeat"


def test_small_counts_and_single_rows_are_hidden(tmp_path):
    rows = make_rows()
    table = make_repeats(rows, spread=0)
    few = (rows[MODEL] > 0.3).to_numpy().nonzero()[0][:7]
    table.loc[few, "repeat_1"] = 0.001
    by_repeat = EACH.assign(auroc=[0.70123, 0.70456, 0.7, 0.7], threshold=0.3)
    count = 400 * by_pandas(table, by_repeat)["changes"]
    assert 0 < round(count) < 11
    exact = Page(page_of(tmp_path, (table, by_repeat)))
    assert "Change sides" in exact.text
    hidden = Page(page_of(tmp_path, (table, by_repeat), min_cell=11))
    assert "MAPE" in hidden.text
    assert not [x for x in ("Change sides", "Of two repeats", "At one") if x in hidden.text]
    assert not any(alt.startswith("Instability plot") for alt, _ in hidden.images())
    written = pd.read_csv(tmp_path / "figures" / "instability.csv").iloc[0]
    assert written[["changes", "changes_of_two", "changes_at_mean_threshold"]].isna().all()
    assert written["auroc_max"] == 0.705
    many = Page(page_of(tmp_path, (make_repeats(rows), by_repeat), min_cell=11))
    assert "Change sides" in many.text


@pytest.mark.parametrize("folds", [2, 5])
def test_models_of_one_patient_share_so_many_patients_as_the_page_says(folds):
    patients = np.arange(500).astype(str)
    labels = (np.arange(500) % 5 == 0).astype(float)
    first, second = (draw_folds(patients, labels, folds, seed) for seed in (0, 1))
    shared = [np.mean((second != second[i])[first != first[i]]) for i in range(len(patients))]
    assert np.mean(shared) == pytest.approx(1 - 1 / folds, abs=0.005)
