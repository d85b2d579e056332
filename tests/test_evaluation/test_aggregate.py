"""What a site gives away of its rows, and what several of them say together."""

import json

import numpy as np
import pytest

from medgemma_clinical.evaluation.aggregate import pool_sites
from medgemma_clinical.evaluation.sites_page import write_sites
from medgemma_clinical.evaluation.topics.subgroups import pool, site_table
from pages import MODEL, Page, make_rows
from site_files import EDGES, make_site, parts

DRAWS = 1000


@pytest.fixture(scope="module")
def rows():
    return make_rows(1600)


@pytest.fixture(scope="module")
def sites(rows):
    return {name: make_site(part) for name, part in zip("abcd", parts(rows), strict=True)}


def test_four_sites_are_pooled_as_if_their_rows_lay_in_one_file(rows, sites):
    names = np.repeat([*"abcd"], [len(part) for part in parts(rows)])
    joined = pool(site_table(rows, MODEL, names, seed=0))
    estimates, pooled = pool_sites(sites)
    auroc = pooled.loc[(MODEL, "auroc")]
    for name in ("value", "low", "high"):
        assert auroc[name] == pytest.approx(joined[name], abs=0.01), name
    assert auroc["sites"] == 4
    table = site_table(rows, MODEL, names, seed=0).set_index("site")
    for metric in ("auroc", "oe", "slope"):
        own = estimates[(estimates["model"] == MODEL) & (estimates["metric"] == metric)]
        for end, column in (("value", ""), ("low", "_low"), ("high", "_high")):
            expected = table[metric + column].to_numpy()
            np.testing.assert_allclose(own[end], expected, rtol=0.05)
    intercept = pooled.loc[(MODEL, "intercept")]
    assert intercept["low"] < 0 < intercept["high"]
    assert pooled.loc[(MODEL, "observed"), "value"] == pytest.approx(rows["label"].mean(), abs=0.02)


def test_an_aggregate_tells_no_row_and_no_small_count(rows):
    few = rows.iloc[:203]
    content = make_site(few)
    text = json.dumps(content)
    assert "MARKER" not in text
    labels, risk = few["label"].to_numpy(), few[MODEL].to_numpy()
    exact = {"patients": 203, "events": labels.sum(), "non_events": (1 - labels).sum()}
    for name, count in exact.items():
        assert content[name] % 5 == 0
        assert abs(content[name] - count) <= 2
    ends = [group["from"] for group in content["groups"]]
    assert set(ends) < {0, *EDGES[MODEL]}, "edges of the development cohort alone, some joined"
    for low, high, group in zip(ends, [*ends[1:], 1], content["groups"], strict=True):
        inside = (risk >= low) & (risk < high)
        assert min(labels[inside].sum(), (1 - labels[inside]).sum()) >= 11
        assert group["observed"] == pytest.approx(labels[inside].mean(), abs=6e-4)
        assert group["patients"] % 5 == 0

    def digits(number):
        assert float(f"{float(number):.3g}") == float(number)
        return float(number)

    json.loads(text, parse_float=digits)
    values = {f"{x:.3g}" for x in 10 * risk}
    stated = {f"{x:.3g}" for x in content["case_mix"]["series"]["lactate"]["means"]}
    assert len(stated) < 19, "means of 11 patients or more"
    assert not {"rows", "patients", "women", "age_median"} & content["case_mix"].keys()
    assert len(values) > len(stated)


@pytest.mark.parametrize(("min_cell", "events"), [(11, 15), (20, 20), (0, 12)])
def test_counts_are_rounded_but_not_below_the_smallest_one(min_cell, events, rows):
    labels = rows["label"].to_numpy() == 1
    few = rows[(labels & (labels.cumsum() <= 12)) | (~labels & ((~labels).cumsum() <= 40))]
    content = make_site(few, min_cell)
    assert (content["events"], content["non_events"]) == (events, 40)
    assert content["patients"] == (52 if min_cell == 0 else 50)
    assert len(content["case_mix"]["series"]["lactate"]["means"]) <= 4, "no value of a patient"


@pytest.mark.parametrize("hashes", [["1" * 64, "2" * 64], ["1" * 64, None], [None, None]])
def test_baselines_are_pooled_only_where_all_sites_have_the_same_ones(hashes, rows, sites):
    others = [
        make_site(part, baselines_sha256=x) for part, x in zip(parts(rows), hashes, strict=False)
    ]
    _, pooled = pool_sites({"x": others[0], "y": others[1], "c": sites["c"]})
    assert {*pooled.index.get_level_values("model")} == {MODEL}
    _, pooled = pool_sites(sites)
    assert {*pooled.index.get_level_values("model")} == {MODEL, "blend"}


def test_an_auroc_of_1_has_a_scale(rows):
    labels = rows["label"].to_numpy()
    certain = rows.assign(**{MODEL: 0.2 + 0.6 * labels + 0.01 * rows[MODEL]})
    part = {
        name: make_site(x, models=[MODEL]) for name, x in zip("abcd", parts(certain), strict=True)
    }
    estimates, pooled = pool_sites(part)
    auroc = estimates[estimates["metric"] == "auroc"]
    assert (auroc["value"] == 1).all()
    assert pooled.loc[(MODEL, "auroc"), "sites"] == 0, "without any spread nothing is pooled"


def test_the_page_says_what_is_approved(sites, tmp_path, assert_approved):
    shown = {"<i>north</i>": sites["a"], **{name: sites[name] for name in "bcd"}}
    write_sites(tmp_path / "sites.html", shown, *pool_sites(shown))
    source = (tmp_path / "sites.html").read_text()
    assert "<i>north" not in source
    assert "<b>" not in source
    assert_approved("sites", Page(source).sentences)


def test_two_sites_are_shown_and_not_pooled(sites, tmp_path):
    two = {name: sites[name] for name in "ab"}
    write_sites(tmp_path / "sites.html", two, *pool_sites(two))
    text = Page((tmp_path / "sites.html").read_text()).text
    assert "Nothing is pooled" in text
    assert "not pooled" in text
