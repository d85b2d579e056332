"""Results by site, and their pooled value."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from medgemma_clinical.evaluation.sites_page import pooled_cells
from medgemma_clinical.evaluation.topics.subgroups import (
    plot_site_calibration,
    plot_sites,
    pool,
    pooled_sentence,
    random_effects,
    site_table,
)
from pages import MODEL, Page, make_rows, write_page

DRAWS = 1000

BCG = np.array(
    [
        *([4, 119, 11, 128], [6, 300, 29, 274], [3, 228, 11, 209], [62, 13536, 248, 12619]),
        *([33, 5036, 47, 5761], [180, 1361, 372, 1079], [8, 2537, 10, 619]),
        *([505, 87886, 499, 87892], [29, 7470, 45, 7232], [17, 1699, 65, 1600]),
        *([186, 50448, 141, 27197], [5, 2493, 3, 2338], [27, 16886, 29, 17825]),
    ],
    dtype=float,
)
"""Ill and well of the vaccinated, then of the others, in 13 trials: Colditz et al. 1994.

metafor: ``rma(measure="RR", ai=tpos, bi=tneg, ci=cpos, di=cneg, data=dat.bcg, test="knha")``.
"""


def bcg():
    ill, well, other_ill, other_well = BCG.T
    share, other = ill / (ill + well), other_ill / (other_ill + other_well)
    variance = 1 / ill - 1 / (ill + well) + 1 / other_ill - 1 / (other_ill + other_well)
    return np.log(share / other), variance


def test_published_trials_are_pooled_as_metafor_pools_them():
    found = random_effects(*bcg())
    expected = {"value": -0.7145, "tau2": 0.3132, "i2": 0.9222, "low": -1.1084, "high": -0.3206}
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, abs=6e-5)
    spread = np.sqrt(0.3132 + 0.1808**2) * 2.2010  # t of 11 degrees of freedom
    assert found["prediction_low"] == pytest.approx(-0.7145 - spread, abs=1e-3)
    assert found["prediction_high"] == pytest.approx(-0.7145 + spread, abs=1e-3)


def test_few_or_equal_sites_have_the_intervals_that_they_can_have():
    for k, missing in ((0, 7), (2, 7), (3, 2), (4, 2), (5, 0)):
        found = random_effects(*(each[:k] for each in bcg()))
        assert sum(map(np.isnan, found.values())) == missing
    equal = random_effects(np.full(4, 0.8), np.array([0.1, 0.2, 0.1, 0.3]))
    assert (equal["value"], equal["tau2"], equal["i2"]) == (pytest.approx(0.8), 0, 0)


@pytest.mark.parametrize("k", [3, 5, 8])
def test_the_interval_is_never_narrower_than_that_of_a_common_effect(k):
    """Sites that agree by chance: without a bound the interval would have no width."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        variances = rng.uniform(0.02, 0.2, k)
        found = random_effects(rng.normal(size=k) * np.sqrt(variances), variances)
        common = 2 * 1.96 / np.sqrt((1 / variances).sum())
        assert found["high"] - found["low"] >= common
    alike = random_effects(np.array([1.0, 1.001, 1.002]), np.full(3, 0.03))
    assert alike["high"] - alike["low"] == pytest.approx(2 * 4.3027 * 0.1, rel=1e-4)


def delong(labels, risk):
    """Return the standard error of an AUROC by DeLong's placements, each pair in turn."""
    events, others = risk[labels == 1], risk[labels == 0]
    wins = (events[:, None] > others).astype(float)
    parts = [wins.mean(axis=axis) for axis in (0, 1)]
    return np.sqrt(sum(each.var(ddof=1) / len(each) for each in parts))


def test_a_site_has_its_own_auroc_and_few_patients_have_none():
    rows, sites = make_rows(1200), np.repeat(["a", "b", "c", "few"], [500, 400, 285, 15])
    table = site_table(rows, MODEL, sites, 0).set_index("site")
    for name, line in table.iterrows():
        own = rows[sites == name]
        assert (line["n"], line["events"]) == (len(own), own["label"].sum())
        if name == "few":
            assert np.isnan(line.loc["auroc":].astype(float)).all()
            continue
        assert line["oe"] == pytest.approx(own["label"].sum() / own[MODEL].sum())
        assert line["slope_low"] < line["slope"] < line["slope_high"]
        auroc = roc_auc_score(own["label"], own[MODEL])
        assert (line["auroc"], expit(line["logit"])) == (pytest.approx(auroc),) * 2
        error = delong(own["label"].to_numpy(), own[MODEL].to_numpy()) / (auroc * (1 - auroc))
        assert line["se"] == pytest.approx(error, rel=0.12)
    found = pool(table.reset_index())
    assert found["sites"] == 3
    assert found["low"] < roc_auc_score(rows["label"], rows[MODEL]) < found["high"]
    assert np.isnan(found["prediction_low"])


@pytest.mark.slow
@pytest.mark.parametrize("min_cell", [0, 40])
def test_the_page_shows_each_site_and_hides_small_counts(min_cell, tmp_path):
    rows = make_rows(700)
    sites = np.repeat(["north", "<i>south</i>", "west", "hamlet"], [300, 295, 90, 15])
    source = write_page(tmp_path, rows, sites=sites, min_cell=min_cell)
    cells = dict(
        re.findall(r'<th scope="row">([^<]+)</th>\s*<td>.*?</td>\s*<td>([^<]*)</td>', source)
    )
    assert cells["north"] == "300"
    assert cells["hamlet"] == ("fewer than 40" if min_cell else "15")
    known = 2 if min_cell else 3  # the west has fewer than 40 events
    text = Page(source).text
    assert ("Pooled over 3 of 4 sites: AUROC 0." in text) == (known == 3)
    assert "Forest plot: AUROC of each site" in source
    assert "<i>south" not in source
    written = pd.read_csv(tmp_path / "figures" / "sites.csv").set_index("site")
    for name in ("auroc", "risk", "oe", "slope"):
        assert written[name].notna().sum() == known + (name == "risk" and not min_cell), name
    hidden = written["n"].astype(str).str.contains("[a-z]")
    assert written.loc[hidden, ["prevalence", "risk", "auroc", "oe"]].isna().all(axis=None)
    assert (tmp_path / "figures" / "sites.svg").exists()


def test_sites_of_one_patient_each_are_not_pooled(tmp_path):
    alone = np.arange(60).astype(str)
    source = write_page(tmp_path, make_rows(60), sites=alone)
    assert "Nothing is pooled" in Page(source).text


@pytest.mark.parametrize("count", [4, 5])
def test_pages_say_where_further_sites_lie_from_five_sites_on(count):
    rows, sites = make_rows(1200), np.repeat([*"abcde"[:count]], 1200 // count)
    table = site_table(rows, MODEL, sites, 0)
    pooled = pool(table)
    auroc, calibration = plot_sites(table, pooled)[0], plot_site_calibration(table)[0]
    for figure, name in ((auroc, "auroc"), (calibration, "oe")):
        drawn = [line.get_xdata() for line in figure.axes[0].lines if line.get_marker() == "s"]
        assert np.concatenate(drawn) == pytest.approx(table[name])
    ends = [pooled["prediction_low"], pooled["prediction_high"]]
    further = [line.get_xdata() for line in auroc.axes[0].lines if line.get_marker() == "|"]
    assert [list(x) for x in further] == ([ends] if count == 5 else [])
    sentence = pooled_sentence(pooled, count)
    assert ("about 90 % of further sites: " in sentence) == (count == 5)
    assert ("too few sites" in sentence) == (count == 4)
    metrics = pd.DataFrame(dict.fromkeys(("auroc", "oe", "slope"), pooled)).T
    cells = pooled_cells(metrics)["About 90 % of further sites"]
    assert (cells == "too few sites").all() == (count == 4)


def test_a_site_without_an_interval_is_not_called_one_of_few_patients():
    pooled = pool(pd.DataFrame({"logit": [1.0, 1.1, 9.0], "se": [0.1, 0.1, np.nan]}))
    sentence = pooled_sentence(pooled, 3)
    assert "Nothing is pooled" in sentence
    assert "10 patients" not in sentence
