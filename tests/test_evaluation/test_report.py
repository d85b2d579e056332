"""report.html and the page of a comparison: what they say, hide, escape, and write as files."""

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

import time_rows
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.report import PATIENTS_NOTICE, comparison_page, write_report
from medgemma_clinical.evaluation.tables import model_table
from medgemma_clinical.evaluation.target import DEPENDS, LABEL
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.cohort import case_mix_topic
from medgemma_clinical.evaluation.topics.topic import NO_CURVES
from medgemma_clinical.evaluation.verdicts import (
    BETTER,
    NO_VALUE,
    UNDECIDED,
    WORSE,
    sentences,
)
from medgemma_clinical.models.choices import DEMO
from pages import MODEL, OUTCOME, SHARES, THRESHOLD, Page, make_evaluated, make_rows, write_page

DRAWS = 200
SVG = "{http://www.w3.org/2000/svg}"
SECTIONS = ["Written reports", "Discrimination", "Calibration", "Decision curve", "Baselines"]
SECTIONS += ["Subgroups", "Case mix", "Table 1", "Data", "Methods"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    rows = time_rows.make_times()
    targets = time_rows.weighed_targets(rows)
    targets = (*targets[:-1], replace(targets[-1], note=DEPENDS))
    shown = {"targets": targets, "config": {**time_rows.OUTCOME.config, "metrics": {}}}
    return write_page(tmp_path_factory.mktemp("times"), rows, **shown)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison") / "compare.html"
    page = comparison_page(
        evaluate(make_rows(), 0),
        title=f"Models: {OUTCOME}",
        sentences=["A sentence."],
        card={"Seed": "0"},
        models={"blend": "a mean"},
        cost=pd.DataFrame({"tokens": {MODEL: 1234.0}}),
        splits=pd.DataFrame({"Split": ["seed 0"], MODEL: ["0.700"]}),
    )
    write_report(path, page)
    return path.read_text(encoding="utf-8")


def sections(source):
    return re.findall(r"<h2>(.*?)</h2>", source)


@pytest.mark.slow
def test_the_visible_text_is_approved(page, times, comparison, assert_approved):
    assert_approved("report", Page(page).sentences)
    assert_approved("times", Page(times).sentences)
    assert_approved("comparison", Page(comparison).sentences)


@pytest.mark.parametrize("name", ["page", "times", "comparison"])
def test_a_page_is_whole_loads_nothing_and_escapes_what_a_user_writes(name, request):
    source = request.getfixturevalue(name)
    page = Page(source)
    assert not page.open
    assert not {"script", "b", "iframe"} & {tag for tag, _ in page.tags}
    (policy,) = (each["content"] for _, each in page.tags if "http-equiv" in each)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for words in ("http:", "https:", "url(", "@import", "nan", "None"):
        assert words not in source.replace("http://www.w3.org", "")
    assert OUTCOME in page.text
    assert "MARKER" not in source
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1 == levels[0]
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    images = page.images()
    assert len(images) == {"page": 6, "times": 22, "comparison": 1}[name]
    assert all(20 < len(alt) < 160 for alt, _ in images)


def test_page_and_console_show_the_same_verdicts(tmp_path):
    rows = make_rows()
    noise = np.random.default_rng(1).normal(size=len(rows))
    stages = [STAGE_NAMES[stage] for stage in ("classification", "generative")]
    rows[stages[0]] = expit(logit(rows[MODEL]) + 0.1 * noise)
    rows[stages[1]] = 0.3 * rows[MODEL] + 0.7 * rows["label"]
    verdicts = (BETTER, UNDECIDED, WORSE)
    metrics, source = evaluate(rows, 0, THRESHOLD), write_page(tmp_path, rows)
    seen = set()
    for name, verdict in model_table(metrics).set_index("Model")["Verdict"].iloc[1:].items():
        (row,) = re.findall(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', source)
        found = Page(row).text.replace("\N{NO-BREAK SPACE}", " ")
        assert [str(each) for each in verdicts if str(each) in found] == [verdict] * bool(verdict)
        seen.add(verdict)
    assert seen == {"", *map(str, verdicts)}
    box = Page(source).text.replace("\N{NO-BREAK SPACE}", " ").split("Discrimination")[0]
    for finding in sentences(metrics, make_evaluated(rows).at_threshold, "patients"):
        assert str(finding).replace("\N{NO-BREAK SPACE}", " ") in box


def test_sections_stand_in_order_and_those_without_content_are_left_out(page, tmp_path):
    assert sections(page) == SECTIONS
    bare = {
        "results": prediction_topics((LABEL,)),
        "history": [],
        "flow": None,
        "config": {"metrics": {}},
    }
    alone = write_page(tmp_path, make_rows(60, baselines=False), **bare)
    assert sections(alone) == [*SECTIONS[1:6], *SECTIONS[7:]]
    assert len(Page(alone).images()) == 5


def test_topics_of_the_first_risk_are_open_and_those_of_further_ones_folded(times):
    titles = [target.title for target in time_rows.TARGETS]
    results = ["Discrimination", "Calibration", "Decision curve", "Baselines", "Subgroups"]
    of_risks = [[f"{name}: {title}" for name in results] for title in titles]
    first, *folded = re.split("<details>\n<summary>The same for .*?</summary>", times)
    assert sections(first) == ["Risks", *of_risks[0], "Over time"]
    folded[-1], last = folded[-1].rsplit("</details>", 1)
    assert [sections(part) for part in folded] == of_risks[1:]
    assert sections(last) == SECTIONS[6:]


def test_where_the_results_are_stage_1s_the_page_links_there_and_folds_them(page, tmp_path):
    for link in ("../trajectory/report.html", ""):
        source = write_page(tmp_path, is_stage1_again=True, stage1_page=link)
        folded = source[source.index("<details>") : source.rindex("</details>")]
        assert sections(folded) == ["In words", *SECTIONS[1:7]]
        assert sections(source.replace(folded, "")) == [SECTIONS[0], *SECTIONS[7:]]
        assert ("AUROC 0." in folded, "AUROC 0." in source.replace(folded, "")) == (True, False)
        assert (f'<a href="{link}">' in source) == bool(link)
    assert "report of stage 1" not in page


def test_the_words_of_a_patients_report_that_differ_are_marked_and_escaped(page, tmp_path):
    example = {"prompt": "MARKER <i>7</i>", "target": "Death: yes; last 7"}
    example["text"] = "Death: yes; last <i>9</i>"
    source = write_page(tmp_path, example=example)
    assert "MARKER <i>7</i>" in Page(source).text
    assert source.count("<mark>") == 1 == source.count("<mark>&lt;i&gt;9&lt;/i&gt;</mark>")
    assert not [x for x in ("MARKER", "<mark>", "One patient") if x in page]


@pytest.mark.parametrize("min_cell", [0, 40])
def test_no_table_holds_dashes_alone(min_cell, tmp_path):
    """Few patients, of whom no age is known: no subgroup has an AUROC, and no report a number."""
    mix = {"patients": 30.0, "prevalence": 0.25}
    reports = {"reports": 30, "numbers_stated": 0, "invented": 0}
    share = dict.fromkeys(("value", "low", "high"))
    reports |= dict.fromkeys(SHARES, share)
    results = [*prediction_topics((LABEL,)), partial(case_mix_topic, development=mix, here=mix)]
    shown = {"results": results, "config": {"metrics": {"reports": reports}}}
    source = write_page(tmp_path, make_rows(30), min_cell=min_cell, **shown)
    for table in re.findall("<table>(.*?)</table>", source, re.DOTALL):
        lines = [re.findall("<td>(.*?)</td>", line) for line in table.split("<tr>")]
        for cells in [*filter(None, lines), *zip(*filter(None, lines), strict=True)]:
            assert set(cells) != {NO_VALUE}


def test_what_is_said_first_stands_first(tmp_path):
    unused = {"base_model": DEMO, "base_sha256": None, "residual_weight": 0, "shuffled": False}
    unused |= {"base_weights": "pretrained", "base_revision": None, "stage1_logit": True}
    unused |= {"quantization": "none", "precision": "fp32"}
    source = write_page(tmp_path, make_rows(60), config=unused, list_patients=True)
    text = Page(source).text
    order = [
        "it knows no medicine",
        PATIENTS_NOTICE,
        "written reports",
        "not shown to add",
        "AUROC",
    ]
    positions = [text.index(words) for words in order]
    assert positions == sorted(positions)


def test_tables_of_folds_say_that_they_pool_the_risks_of_their_models(page, tmp_path):
    sites = np.where(np.arange(400) % 2, "north", "south")
    source = write_page(tmp_path, folds=7, sites=sites)
    captions = re.findall('<p class="caption">(.*?)</p>', source)
    assert len([caption for caption in captions if "of 7 models" in caption]) == 3
    assert "models" not in " ".join(re.findall('<p class="caption">(.*?)</p>', page))


def test_table_1_has_a_note_where_a_patient_may_count_in_both_outcomes(page, tmp_path):
    source = write_page(tmp_path, noun="stays")
    notes = [
        each.partition("<h2>Table 1</h2>")[2].count('<p class="soft">') for each in (page, source)
    ]
    assert notes[1] == notes[0] + 1


def test_the_rows_with_the_largest_errors_are_named_only_if_patients_are_listed(tmp_path):
    rows = make_rows(60)
    source = write_page(tmp_path, rows, list_patients=True)
    worst = (rows["label"] - rows[MODEL]).abs().sort_values(ascending=False)
    assert re.findall(r"MARKER-row-(\d+)", source) == [str(k) for k in worst.index[:10]]
    assert "MARKER-patient" not in source


@pytest.mark.slow
def test_small_counts_are_hidden(tmp_path):
    rows = make_rows(400)
    exact, hidden = write_page(tmp_path, rows), write_page(tmp_path, rows, min_cell=17)
    assert "--min_cell N" in exact
    assert "fewer than 17" not in exact
    assert NO_CURVES not in exact
    text = Page(hidden).text
    assert "--min_cell 17" in text
    assert text.count(NO_CURVES) == 3, "discrimination, calibration, decision curve"
    assert "no label fewer than 17" in text, "the flow"
    assert "observations: 1 \N{EN DASH} fewer than 17" in text, "a subgroup"
    assert "training 100" in text
    assert "validation 20 fewer than 17" in text, "events of a part"
    names = [name.split(" ")[:2] for name, _ in Page(hidden).images()]
    assert names == [["Calibration", "in"], ["Learning", "curve"]]


@pytest.mark.slow
def test_shares_at_the_threshold_go_where_one_of_the_four_cells_is_small(tmp_path):
    rows = make_rows(400)
    event = rows["label"] == 1
    rows.loc[event & (rows[MODEL] < THRESHOLD) & (rows.index > 200), "label"] = 0
    missed = int(((rows["label"] == 1) & (rows[MODEL] < THRESHOLD)).sum())
    shown, hidden = (Page(write_page(tmp_path, rows, min_cell=missed + k)).text for k in (0, 1))
    assert "Sensitivity (%)" in shown
    assert "Sensitivity (%)" not in hidden


def test_a_part_with_few_events_shows_no_metric_and_no_curve(tmp_path):
    rows = make_rows(300)
    rows.loc[rows.index[rows["label"] == 1][10:], "label"] = 0
    assert sections(write_page(tmp_path, rows)) == SECTIONS
    source = write_page(tmp_path, rows, min_cell=11)
    assert sections(source) == [SECTIONS[0], *SECTIONS[7:]]
    assert len(Page(source).images()) == 1, "learning curve"
    assert "AUROC 0" not in Page(source).text
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"learning_curve.pdf", "learning_curve.svg", "split.csv", "flow.csv"} | {
        "table_one.csv"
    }


@pytest.mark.slow
def test_each_figure_and_each_table_is_also_a_file(figures, tmp_path):
    old = tmp_path / "figures" / "old.svg"
    old.parent.mkdir()
    old.touch()
    rows = make_rows()
    page, folder = Page(write_page(tmp_path, rows)), tmp_path / "figures"
    assert not old.exists()
    drawn = [path for path in folder.iterdir() if path.suffix == ".svg"]
    words = [set(re.findall("<text.*?>(.*?)</text>", svg)) for _, svg in page.images()]
    assert all(ElementTree.parse(path).findtext(f".//{SVG}text") for path in drawn)
    for path in drawn:
        assert set(re.findall("<text.*?>(.*?)</text>", path.read_text())) in words
        assert "var(" not in path.read_text()
    assert {path.stem for path in drawn} == {
        *("roc", "precision_recall", "calibration", "risk_distribution", "decision_curve"),
        "learning_curve",
    }
    assert all(path.with_suffix(".pdf").read_bytes()[:4] == b"%PDF" for path in drawn)
    assert {path.stem for path in folder.glob("*.csv")} == {
        *("metrics", "models", "subgroups", "calibration", "calibration_curve", "split", "flow"),
        *("decision_curve", "thresholds", "case_mix", "table_one"),
    }
    metrics = evaluate(rows, 0, THRESHOLD)
    table = pd.read_csv(folder / "metrics.csv", index_col=["model", "metric"])
    pd.testing.assert_frame_equal(table, metrics.table)
    models = pd.read_csv(folder / "models.csv", keep_default_na=False, dtype=str)
    assert models.equals(model_table(metrics))
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "figures", "tripod.md"}
