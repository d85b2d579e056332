"""What a site gives away of its rows, and what several of them say together."""

import json
import math

import aggregates
import numpy as np
import pytest

from medgemma_clinical.evaluation.aggregate import NEEDED, count_problem, pool_sites
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.evaluation.sites_page import sites_page
from medgemma_clinical.evaluation.topics.subgroups import pool, site_table
from pages import MODEL, Page, make_rows
from site_files import make_site, parts


@pytest.fixture(scope="module")
def rows():
    return make_rows(1600)


@pytest.fixture(scope="module")
def sites(rows):
    return {name: make_site(part) for name, part in zip("abcd", parts(rows), strict=True)}


def test_four_sites_are_pooled_as_if_their_rows_lay_in_one_file(rows, sites):
    names = np.repeat([*"abcd"], [len(part) for part in parts(rows)])
    table = site_table(rows, MODEL, names, seed=0)
    joined = pool(table)
    estimates, pooled, notes = pool_sites(sites)
    auroc = pooled.loc[(MODEL, "auroc")]
    for name in ("value", "low", "high"):
        assert auroc[name] == pytest.approx(joined[name], abs=0.01), name
    assert auroc["sites"] == 4
    table = table.set_index("site")
    for metric in ("auroc", "oe", "slope"):
        own = estimates[(estimates["model"] == MODEL) & (estimates["metric"] == metric)]
        for end, column in (("value", ""), ("low", "_low"), ("high", "_high")):
            expected = table[metric + column].to_numpy()
            np.testing.assert_allclose(own[end], expected, rtol=0.1)
    intercept = pooled.loc[(MODEL, "intercept")]
    assert intercept["low"] < 0 < intercept["high"]
    assert not notes


def test_rows_of_one_patient_count_as_one_patient(rows):
    few = rows.iloc[:300]
    single = make_site(few)
    tripled = make_site(few.loc[few.index.repeat(3)])
    assert tripled == single


def numbers_of(content):
    """Return all numbers of an aggregate that are no count."""
    return [x for line in content["models"] for x in line.values() if not isinstance(x, str)]


@pytest.mark.parametrize(("patients", "digits"), [(203, 2), (499, 2), (500, 3), (603, 3)])
def test_an_aggregate_holds_few_digits_and_counts_to_the_nearest_five(patients, digits, rows):
    few = rows.iloc[:patients]
    content = make_site(few)
    labels = few["label"].to_numpy()
    exact = {"patients": patients, "events": labels.sum(), "non_events": (1 - labels).sum()}
    for name, count in exact.items():
        assert content[name] % 5 == 0
        assert abs(content[name] - count) <= 2
    metrics = {"auroc", "oe", "intercept", "slope"}
    assert {*content} == {"format", "version", "outcome", "models", *exact}
    for line in content["models"]:
        errors = {f"{name}_error" for name in metrics}
        assert {*line} == {"name", "sha256", "brier", *metrics, *errors}
    for number in numbers_of(content):
        assert number == round(float(f"{number:.{digits}g}"), digits)
    assert "MARKER" not in json.dumps(content)


def test_no_rounded_counts_tell_the_exact_ones():
    pairs = {}
    for events in range(20, 60):
        for others in range(80, 120):
            rounded = (5 * round(n / 5) for n in (events, others, events + others))
            pairs.setdefault((*rounded,), []).append((events, others))
    inner = {key: found for key, found in pairs.items() if 25 <= key[0] <= 50 <= 85 <= key[1]}
    assert min(len({x for x, _ in found}) for found in inner.values()) > 1


def test_a_file_of_the_smallest_size_holds_at_most_half_of_the_entropy_of_its_labels():
    patients, events, _ = NEEDED.values()
    rows = aggregates.draw_site(np.random.default_rng(0), patients, events)
    entropy = math.log2(math.comb(patients, events))
    files = [
        aggregates.possible_files(rows[name].to_numpy(), events, together=5)
        for name in aggregates.MODELS
    ]
    assert np.log2(files).sum() < entropy / 2


def test_other_labels_that_share_few_events_give_the_same_file():
    patients, events, _ = NEEDED.values()
    rows = aggregates.draw_site(np.random.default_rng(1), patients, events)
    labels, content = rows["label"].to_numpy(), aggregates.site_file(rows)
    other = aggregates.solve_labels(rows, content, labels, within=0.95)
    assert (other * labels).sum() <= events / 4
    assert aggregates.site_file(rows.assign(label=other)) == content


def test_errors_tell_nothing_beside_risks_events_and_rounded_metrics():
    rows = aggregates.draw_site(np.random.default_rng(0), 100, 20)
    rng, seen = np.random.default_rng(0), {}
    for _ in range(60):
        content = aggregates.site_file(rows.assign(label=rng.permutation(rows["label"])))
        for line in content["models"]:
            for name in ("auroc", "oe", "intercept", "slope"):
                seen.setdefault((line["name"], name, line[name]), set()).add(line[f"{name}_error"])
    assert max(map(len, seen.values())) == 1
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("counts", "is_sound"),
    [
        ((100, 20, 80), True),
        ((100, 80, 20), True),
        ((99, 20, 79), False),
        ((100, 19, 81), False),
        ((100, 81, 19), False),
        ((100, 105, 20), False),
        ((200, 20, 80), False),
        ((105, 20, 80), True),  # of 103, 22 and 81
        ((120, 100, 60), True),  # patients with rows of both kinds
    ],
)
def test_counts_of_an_aggregate_are_large_and_agree(counts, is_sound):
    assert bool(count_problem(dict(zip(NEEDED, counts, strict=True)))) != is_sound


@pytest.mark.parametrize("missing", [False, True])
def test_a_comparison_is_pooled_only_where_all_sites_have_the_same_one(missing, rows, sites):
    part = parts(rows)[2]
    other = make_site(part, models=[MODEL]) if missing else make_site(part, blend="2" * 64)
    _, pooled, notes = pool_sites({**sites, "c": other})
    assert {*pooled.index.get_level_values("model")} == {MODEL}
    assert len(notes) == 1
    assert notes[0].endswith(": c.")
    _, pooled, notes = pool_sites(sites)
    assert {*pooled.index.get_level_values("model")} == {MODEL, "blend"}
    assert not notes


def test_perfect_ranks_have_a_scale_and_their_site_is_told_why_it_has_no_slope(rows, sites):
    part = parts(rows)[3]
    certain = part.assign(**{MODEL: 0.2 + 0.6 * part["label"] + 0.01 * part[MODEL]})
    estimates, pooled, notes = pool_sites({**sites, "perfect": make_site(certain)})
    auroc = estimates[(estimates["metric"] == "auroc") & (estimates["site"] == "perfect")]
    assert auroc["value"].iloc[0] == 1
    assert pooled.loc[(MODEL, "auroc"), "sites"] == 5
    assert pooled.loc[(MODEL, "slope"), "sites"] == 4
    assert len(notes) == 1
    assert "perfect" in notes[0]


def test_the_page_says_what_is_approved(rows, sites, tmp_path, assert_approved):
    other = make_site(parts(rows)[3], blend="2" * 64)
    shown = {"<i>north</i>": sites["a"], "b": sites["b"], "c": sites["c"], "d": other}
    write_report(tmp_path / "sites.html", sites_page(shown, *pool_sites(shown)))
    source = (tmp_path / "sites.html").read_text()
    assert "<i>north" not in source
    assert "<b>" not in source
    assert_approved("sites", Page(source).sentences)


def test_two_sites_are_shown_and_not_pooled(sites, tmp_path):
    two = {name: sites[name] for name in "ab"}
    write_report(tmp_path / "sites.html", sites_page(two, *pool_sites(two)))
    text = Page((tmp_path / "sites.html").read_text()).text
    assert text.count("Nothing is pooled") == 1
    assert "not pooled" not in text
