"""Models side by side: on one test part, and over the splits of several seeds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from medgemma_clinical.evaluation import bootstrap
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.comparison import (
    MEANINGS,
    compare_models,
    comparison_findings,
    comparison_table,
    counts_sentence,
    part_findings,
    verdict_beside,
    write_comparison,
)
from medgemma_clinical.evaluation.judgement.sentences import Finding
from medgemma_clinical.evaluation.judgement.verdict import (
    BETTER,
    FEW,
    FEWEST_PATIENTS,
    SAME,
    UNDECIDED,
    WORSE,
    judge_interval,
)
from medgemma_clinical.evaluation.metrics import METRICS, weighted_metrics
from pages import Page

pytestmark = pytest.mark.usefixtures("few_draws")


def table_of(seed: int, rows: int = 120) -> pd.DataFrame:
    """Predictions of two models on rows of which some share a patient."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 4 == 0).astype(int)
    return pd.DataFrame(
        {
            "id": [f"r{k}" for k in range(rows)],
            "patient": [f"p{k // 2}" for k in range(rows)],
            "label": labels,
            "good": expit(labels + rng.normal(size=rows) - 1),
            "bad": rng.uniform(size=rows),
        }
    )


def test_one_test_part_gives_each_models_figures_and_their_paired_differences() -> None:
    table = table_of(0)
    labels, groups = table["label"].to_numpy(float), table["patient"].to_numpy(np.str_)
    results = compare_models([table], "bad", seed=5, fewest=0)
    draws = {
        name: bootstrap.bootstrap(
            labels, groups, 5, partial(weighted_metrics, labels, table[name].to_numpy())
        )
        for name in ("good", "bad")
    }
    for name, result in results.items():
        assert (result["n"], result["events"]) == (120, 30)
        assert result["auroc"]["value"] == pytest.approx(roc_auc_score(labels, table[name]))
        for metric in METRICS:
            score, paired = result[metric], result["minus_reference"][metric]
            ends = np.quantile(draws[name][metric], [0.025, 0.975])
            assert (score["low"], score["high"]) == pytest.approx(tuple(ends))
            ends = np.quantile(draws[name][metric] - draws["bad"][metric], [0.025, 0.975])
            assert (paired["low"], paired["high"]) == pytest.approx(tuple(ends))
    assert "sd" not in results["good"]["auroc"]
    json.dumps(results, allow_nan=False)


def test_over_several_splits_the_figure_is_the_mean_and_its_spread_is_told() -> None:
    tables = [table_of(seed) for seed in range(3)]
    result = compare_models(tables, "bad", seed=0, fewest=0)["good"]
    scores = [roc_auc_score(t["label"], t["good"]) for t in tables]
    others = [roc_auc_score(t["label"], t["bad"]) for t in tables]
    assert result["auroc"]["value"] == pytest.approx(np.mean(scores))
    assert result["auroc"]["sd"] == pytest.approx(np.std(scores, ddof=1))
    gain = result["minus_reference"]["auroc"]
    assert gain["value"] == pytest.approx(np.mean(scores) - np.mean(others))
    assert gain["low"] < gain["value"] < gain["high"]
    assert (result["n"], result["events"]) == (360, 90)
    assert result["auroc"]["splits"] == pytest.approx(scores)
    (first, *_) = comparison_findings(compare_models(tables, "good", seed=0, fewest=0), "good")
    assert str(first).startswith(
        f"Over 3 splits the test AUROC of good, the reference, is {min(scores):.3f} to "
        f"{max(scores):.3f}, mean {np.mean(scores):.3f} ["
    )


def test_a_patient_of_several_splits_is_drawn_once_so_repeating_a_split_proves_nothing() -> None:
    once = compare_models([table_of(1)], "bad", seed=0, fewest=0)["good"]
    thrice = compare_models([table_of(1)] * 3, "bad", seed=0, fewest=0)["good"]
    for one, three in (
        (once["auroc"], thrice["auroc"]),
        (once["minus_reference"]["auroc"], thrice["minus_reference"]["auroc"]),
    ):
        assert three["low"] == pytest.approx(one["low"])
        assert three["high"] == pytest.approx(one["high"])


def test_splits_of_other_patients_make_the_interval_narrower() -> None:
    tables = [table_of(seed) for seed in range(4)]
    for k, table in enumerate(tables):
        table["patient"] += f"_{k}"
    one, four = (
        compare_models(few, "bad", seed=0, fewest=0)["good"]["auroc"]
        for few in (tables[:1], tables)
    )
    assert four["high"] - four["low"] < 0.7 * (one["high"] - one["low"])


def test_few_events_in_a_split_leave_no_interval_without_ends(
    recwarn: pytest.WarningsRecorder,
) -> None:
    tables = [table_of(seed, rows=24) for seed in range(3)]
    for table in tables:
        table["label"] = (np.arange(24) < 2).astype(int)  # two rows of one patient
    results = compare_models(tables, "bad", seed=0, fewest=0)
    for figures in (results["good"], results["good"]["minus_reference"]):
        for metric in ("auroc", "auprc", "brier"):
            assert figures[metric]["low"] <= figures[metric]["value"] <= figures[metric]["high"]
    assert not recwarn.list


def test_the_table_has_a_line_a_model() -> None:
    results = compare_models([table_of(k) for k in range(2)], "bad", seed=0, fewest=0)
    results["good"]["seconds_an_epoch"] = 12.3
    table = comparison_table(results, "bad").set_index("Model")
    assert list(table) == [
        *("Test AUROC [95 %]", "SD of AUROC", "Minus reference [95 %]", "Verdict"),
        *("Seconds an epoch", "AUPRC", "SD of AUPRC", "Brier", "SD of Brier"),
    ]
    assert table.loc["bad", "Minus reference [95 %]"] == ""
    assert table.loc["bad", "Verdict"] == "the reference"
    assert table.loc["good", "Verdict"] == BETTER
    assert table.loc["bad", "Seconds an epoch"] == ""
    assert table.loc["good", "Seconds an epoch"] == "12.3"
    start = f"{results['good']['auroc']['value']:.3f} ["
    assert str(table.loc["good", "Test AUROC [95 %]"]).startswith(start)
    assert counts_sentence(results) == "test parts of all splits: 240 rows, 60 events"


def test_the_sentences_name_reference_best_model_and_each_verdict() -> None:
    results = compare_models([table_of(0)], "bad", seed=0, fewest=0)
    first, second, third = map(str, comparison_findings(results, "bad"))
    score = results["bad"]["auroc"]["value"]
    assert first.startswith(f"The reference is bad: test AUROC {score:.3f} [")
    assert "(test part: 120 rows, 30 events)" in first
    best = (
        f"{BETTER.symbol} The model good is better than bad. It has the highest AUROC of the 2 "
        "models, which is partly chance: "
    )
    assert second.startswith(best)
    assert third == f"The models beside bad: {BETTER}: good."
    results = compare_models([table_of(0)], "good", seed=0, fewest=0)
    first, second, third = map(str, comparison_findings(results, "good"))
    assert second == "No other model has a higher AUROC."
    assert third == f"The models beside good: {WORSE}: bad."


def test_the_cost_stands_beside_the_gain() -> None:
    results = compare_models([table_of(0)], "bad", seed=0, fewest=0)
    assert "Cost" not in str(comparison_findings(results, "bad")[1])
    results["good"] |= {"seconds_an_epoch": 12.3, "tokens": 70.0, "memory_mib": None}
    results["bad"] |= {"seconds_an_epoch": 3.0, "tokens": None, "residual_weight": None}
    assert str(comparison_findings(results, "bad")[1]).endswith(
        " Cost: 12.3 seconds an epoch (reference: 3), 70 tokens (reference: \N{EN DASH})."
    )
    table = comparison_table(results, "bad")
    place = list(table).index("Verdict")
    assert list(table)[place + 1 :] == ["Seconds an epoch", "Tokens", "AUPRC", "Brier"]
    assert not set(list(table)[1:]) - {*MEANINGS}


def test_few_patients_decide_nothing_in_a_comparison() -> None:
    few = table_of(0)
    patients = few["patient"].unique()[: 2 * (FEWEST_PATIENTS - 1)]
    few = few[few["patient"].isin(patients)]
    events = few.groupby("patient")["label"].max().sum()
    assert 0 < events < FEWEST_PATIENTS
    few = few.assign(good=few["label"] * 0.8 + 0.1)
    results = compare_models([few], "bad", seed=0, fewest=0)
    assert results["good"]["rarer_patients"] == events
    assert results["good"]["minus_reference"]["auroc"]["low"] > 0
    table = comparison_table(results, "bad").set_index("Model")
    assert table.loc["good", "Verdict"] == FEW
    finding = f"{FEW.symbol} Too few to say whether the model good is better than bad. It has the"
    assert str(comparison_findings(results, "bad")[1]).startswith(finding)


def with_combined(seed: int) -> pd.DataFrame:
    """Predictions with a blend better than the models; the first is part of the combined."""
    table = table_of(seed)
    noise = np.random.default_rng(seed).normal(size=(2, len(table)))
    risks = expit(2 * table["label"].to_numpy() + noise)
    return table.assign(**{"blend with facts": risks[0], "combined": risks.mean(axis=0)})


def test_the_combined_model_is_compared_with_its_blend_over_all_splits() -> None:
    tables = [with_combined(seed) for seed in range(3)]
    results = compare_models(tables, "bad", seed=0, fewest=0)
    against = compare_models(tables, "blend with facts", seed=0, fewest=0)["combined"]
    assert results["combined"]["minus_blend"] == against["minus_reference"]
    assert "minus_blend" not in results["good"]
    assert "minus_blend" not in compare_models([table_of(0)], "bad", seed=0, fewest=0)["good"]
    gain = results["combined"]["minus_blend"]["auroc"]
    assert gain["value"] > 0
    _, _, _, last = comparison_findings(results, "bad")
    assert isinstance(last, Finding)
    assert last.verdict == judge_interval(Estimate(*gain.values()), 90)
    subject = "the model good joined with blend with facts is"
    assert last.heading == last.verdict.sentence(subject, "blend with facts alone")
    assert last.text == (
        "Combined (the mean of their log-odds) minus blend with facts: paired difference "
        f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]."
    )


def test_the_highest_auroc_is_that_of_the_models_with_risks_of_their_own() -> None:
    """A better combined model, and a repeated reference, are neither named nor counted."""
    table = with_combined(0).assign(repeated=lambda table: table["bad"])
    table["combined"] = (table["label"] + table["blend with facts"]) / 2
    results = compare_models([table], "bad", seed=0, fewest=0)
    assert results["combined"]["auroc"]["value"] > results["blend with facts"]["auroc"]["value"]
    highest = "The model blend with facts is better than bad. It has the highest AUROC of the 3 "
    found = str(comparison_findings(results, "bad")[1])
    assert f"{highest}models, combined apart, which is" in found
    results = compare_models([table], "combined", seed=0, fewest=0)
    assert comparison_findings(results, "combined")[1] == "No other model has a higher AUROC."


def test_a_sentence_does_not_change_the_name_of_a_model() -> None:
    table = with_combined(0).rename(columns={"good": "seed_0/run", "bad": "seed_1/run"})
    results = compare_models([table], "seed_0/run", seed=0, fewest=0)
    found = comparison_findings(results, "seed_0/run", asked=["seed_1/run"])
    text = " ".join(map(str, found))
    assert text.count("seed_1/run") == 1
    assert "Seed" not in text


def test_models_that_are_asked_about_have_a_finding_each_and_are_not_listed_again() -> None:
    table = with_combined(0)
    table = table.assign(worse=1 - table["good"])
    results = compare_models([table], "good", seed=0, fewest=0)
    found = list(map(str, comparison_findings(results, "good", asked=["bad", "worse"])))
    for model, line in zip(("bad", "worse"), found[1:3], strict=True):
        score = results[model]["auroc"]["value"]
        heading = f"{WORSE.symbol} The model {model} is worse than good."
        assert line.startswith(f"{heading} Its AUROC is {score:.3f} [")
    groups = f"{BETTER}: blend with facts, combined."
    assert found[4] == f"The other models beside good: {groups}"
    few = compare_models(
        [table[["id", "patient", "label", "good", "worse", "combined"]]], "good", 0, 0
    )
    assert "No other model has a higher AUROC, combined apart." in comparison_findings(few, "good")
    one = comparison_findings(results, "good", asked=["blend with facts"])
    assert " ".join(map(str, one)).count("The model blend with facts is better than good.") == 1


def test_each_part_has_a_finding_on_the_models_with_it_and_without_it(tmp_path: Path) -> None:
    tables = [table_of(seed).assign(again=lambda table: table["good"]) for seed in range(2)]
    parts = {"text": ("good", "bad"), "ODE": ("again", "good"), "other": ("good", "missing")}
    better, same = part_findings(tables, parts, seed=0, fewest=0)
    result = compare_models(tables, "bad", seed=0, fewest=0)["good"]
    assert better.verdict == verdict_beside(result) == BETTER
    gain = result["minus_reference"]["auroc"]
    assert str(better) == (
        f"{BETTER.symbol} Text: better. The AUROC of good minus that of bad is "
        f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]."
    )
    assert str(same) == "= ODE: the same. The risks of again are those of good, row by row."
    assert part_findings(tables, parts, seed=0, fewest=999) == []
    for number, style in enumerate((BETTER.style, UNDECIDED.style)):
        results = compare_models([table_of(0)], "bad", seed=0, fewest=0)
        shown = [better, same][: number + 1]
        write_comparison(
            tmp_path, "c", results, "bad", title="t", sentences=[], card={}, parts=shown
        )
        box = (tmp_path / "c.html").read_text().split("Gain and cost")[0]
        assert f'<section class="verdict {style}"' in box, "the least favourable"
        assert box.count("Text: better.") == 1


@pytest.mark.parametrize(("rows", "fewest"), [(120, 0), (12, 0), (120, 999)])
def test_a_model_whose_risks_are_the_references_row_by_row_is_the_same(
    rows: int, fewest: int, tmp_path: Path
) -> None:
    """However few the patients; another model of the same order is not, nor one of one split."""
    tables = [table_of(seed, rows) for seed in range(2)]
    tables = [each.assign(good=each["good"].round(2).clip(0.01, 0.99)) for each in tables]
    tables = [
        each.assign(
            repeated=each["good"] + 1e-9 * each["label"],  # which breaks ties
            moved=expit(logit(each["good"]) + 1e-4),
            partly=each["good"] if k == 0 else each["bad"],
        )
        for k, each in enumerate(tables)
    ]
    results = compare_models(tables, "good", seed=0, fewest=fewest)
    names = [name for name, result in results.items() if result["same"]]
    assert names == ["good", "repeated"]
    verdicts = comparison_table(results, "good").set_index("Model")["Verdict"]
    assert verdicts[["good", "repeated"]].tolist() == ["the reference", SAME]
    assert not set(verdicts[["bad", "moved", "partly"]]) & {SAME, BETTER}
    if fewest:
        return
    found = list(map(str, comparison_findings(results, "good", asked=["repeated"])))
    first = "= The model repeated is the same as good. Both give each row the same risk: AUROC "
    assert found[1].startswith(first)
    if rows == 120:
        assert results["repeated"]["auroc"]["value"] > results["good"]["auroc"]["value"]
        assert "No other model has a higher AUROC." in found
    (line,) = [
        line for line in map(str, comparison_findings(results, "good")) if "beside good" in line
    ]
    assert "= the same: repeated." in line
    write_comparison(tmp_path, "c", results, "good", title="t", sentences=[], card={})
    alt, picture = Page((tmp_path / "c.html").read_text()).images()[0]
    assert "= the same: repeated." in alt
    assert "the same" in picture


def write(folder: Path, seed: int) -> None:
    results = compare_models([table_of(seed)], "bad", seed=0, fewest=0)
    write_comparison(
        folder,
        "ablation",
        results,
        "bad",
        title="What text adds: Death <b>",
        sentences=["One more sentence."],
        card={"Seed": "0"},
    )


def test_a_comparison_is_written_as_numbers_picture_and_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        write(tmp_path, 0)
    results = json.loads((tmp_path / "ablation.json").read_text())
    assert results == compare_models([table_of(0)], "bad", seed=0, fewest=0)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "ablation.html").read_text()
    read = Page(page)
    assert read.open == []
    assert len(read.images()) == 1
    assert "What text adds: Death <b>" in read.text
    assert "One more sentence." in read.text
    assert f"{results['good']['auroc']['value']:.3f} [" in read.text
    assert read.text.index("SHA-256 of the code") > read.text.index("Gain and cost")
    assert '<section class="verdict verdict-better"' in page
    assert f'<span class="mark {BETTER.style}">' in page.split("<tbody>")[1]
    (row,) = [line for line in caplog.text.splitlines() if line.strip().startswith("good ")]
    assert f" {BETTER} " in row
    assert "Brier mean squared distance of risk and outcome" in read.text
    assert f"results: {tmp_path}" in caplog.text
    assert "test part: 120 rows" in caplog.text


def test_another_result_is_moved_aside_and_the_same_one_is_not(tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = (tmp_path / "ablation.json").read_bytes()
    write(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 3
    write(tmp_path, 1)
    assert (tmp_path / "ablation.1.json").read_bytes() == before
    assert (tmp_path / "ablation.1.html").exists()
    assert (tmp_path / "ablation.1.png").exists()
    assert (tmp_path / "ablation.json").read_bytes() != before


def test_few_events_of_any_split_show_no_figure_of_a_comparison(tmp_path: Path) -> None:
    table = table_of(0)
    patients = table.loc[table["label"] == 1, "patient"].nunique()
    assert compare_models([table], "bad", seed=0, fewest=patients)["good"]["events"] == 30
    hidden = compare_models([table], "bad", seed=0, fewest=patients + 1)
    unknown = {"value": None, "low": None, "high": None}
    for result in hidden.values():
        assert result["events"] is None
        assert all(result[m] == result["minus_reference"][m] == unknown for m in METRICS)
    sentence = "test part: 120 rows, events not shown"
    assert counts_sentence(hidden) == sentence
    assert list(map(str, comparison_findings(hidden, "bad"))) == [
        f"{FEW.symbol} Too few to say. No figure is shown by --min_cell ({sentence})."
    ]
    write_comparison(tmp_path, "c", hidden, "bad", title="t", sentences=[], card={})
    assert "not shown" in (tmp_path / "c.html").read_text()
    small = table_of(1, rows=40)
    both = compare_models([table, small], "bad", seed=0, fewest=patients)
    assert both["good"]["events"] is None, "with the others' the mean tells the split's"


def test_an_accuracy_of_few_alarms_is_hidden_also_from_the_difference_to_it() -> None:
    table = table_of(0)
    few_wrong = table.assign(good=abs(table["label"] - 1.0 * (table.index < 3)))
    results = compare_models([few_wrong], "good", seed=0, fewest=11)
    assert results["good"]["events"] == 30
    assert results["good"]["accuracy"]["value"] is None
    assert results["bad"]["accuracy"]["value"] is not None
    assert results["bad"]["minus_reference"]["accuracy"]["value"] is None
    auroc = results["bad"]["auroc"]["value"]
    assert auroc == round(auroc, 4)


def test_an_accuracy_hidden_in_one_split_is_hidden_in_the_mean_of_several() -> None:
    first, second = table_of(0), table_of(1)
    first = first.assign(good=abs(first["label"] - 1.0 * (first.index < 3)))
    results = compare_models([first, second], "bad", seed=0, fewest=11)
    assert results["good"]["accuracy"]["value"] is None
    hidden = compare_models([first, second.head(40)], "bad", seed=0, fewest=11)
    assert hidden["good"]["auroc"]["sd"] is None
    assert counts_sentence(hidden).startswith("test parts of all splits")
    assert "SD of AUROC" in comparison_table(hidden, "bad")
