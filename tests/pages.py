"""What the tests of pages share: predictions, the content of a report, and a page's tags."""

import html
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from scipy.special import expit

from medgemma_clinical.evaluation import report
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, blend
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.topics.cohort import (
    case_mix_topic,
    cohort,
    largest_errors,
    part_table,
    table_one,
    table_one_topic,
)
from medgemma_clinical.evaluation.topics.topic import Evaluated, Topic
from medgemma_clinical.evaluation.topics.written_reports import (
    example_topic,
    suppress_reports,
    written_reports,
    written_sentence,
)
from medgemma_clinical.evaluation.verdicts import Finding, at_threshold
from medgemma_clinical.models.outcome import LABEL
from trajectories import dataset_of

OUTCOME = "Death <b>& $x$ decay"
"""What a user writes stays text."""

MODEL, THRESHOLD = STAGE_NAMES["trajectory"], 0.3


def make_rows(n=400, *, baselines=True, seed=0, slope=1.0, rows_a_patient=1):
    """Draw predictions whose log-odds are ``slope`` times the true ones, beside worse baselines."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1, 1.2, n)
    rows = pd.DataFrame({"id": np.arange(n), "label": (rng.random(n) < expit(odds)).astype(int)})
    rows["id"] = "MARKER-row-" + rows["id"].astype(str)
    rows["patient"] = np.char.add("MARKER-patient-", (np.arange(n) // rows_a_patient).astype(str))
    rows[MODEL] = expit(slope * odds)
    if baselines:
        for name in ("last value", "blend"):
            rows[name] = expit(odds + rng.normal(size=n))
        rows[ENSEMBLE] = blend(rows[MODEL].to_numpy(), rows["blend"].to_numpy())
    return rows


def make_bands(n):
    """The first 15 rows are a small subgroup."""
    size = np.where(np.arange(n) < 15, "few", "many")
    return pd.DataFrame({"size": pd.Categorical(size, ["few", "many", "none"], ordered=True)})


def described(split):
    """Table 1 of 200 patients, of whom the last has no age."""
    columns = {"static_age [years]": [*range(20, 219), np.nan], "static_sex_male": [0, 1] * 100}
    series = ["20 (0h)", "21 (0h) -> 25 (6h)"] * 100
    return table_one(dataset_of(series, label_escalation=[0, 0, 0, 1] * 50, **columns), split)


HISTORY = [
    {
        "epoch": k,
        "train_loss": 1 / k,
        "val_loss": 1.1 / k,
        "val_auroc": 0.6,
        "averaged_epochs": [min(k, 2)],
    }
    for k in range(1, 6)
]
SHARE = {"value": 0.9, "low": 0.8, "high": 0.95}
SHARES = ("right_answer_share", "parse_share", "true_number_share", "right_trend_share")
SHARES += ("inventing_share",)
WRITTEN = {"reports": 80, "numbers_stated": 400, "invented": 2} | dict.fromkeys(SHARES, SHARE)
METHODS = {"split": "By patient.", "sample_size": "5 patients", "training": "10 epochs."}


def make_mixes():
    """The case mix of the training data and of the rows."""
    mix = {"rows": 200.0, "patients": 200.0, "prevalence": 0.25, "women": 0.5}
    mix |= {"age_q1": 40.0, "age_median": 50.0, "age_q3": 60.0}
    lactate = {"measured": 0.87, "levels": [0.05, 0.25, 0.5, 0.75, 0.95]}
    lactate |= {"means": [0.6, 1.1, 1.7, 2.5, 6.2]}
    few, sex = {"measured": 0.06, "levels": [0.5], "means": [3.2]}, {"measured": 1.0, "share": 0.5}
    return (
        {**mix, "series": {"lactate": lactate, "rare": few}, "static": {"static_sex": sex}},
        {**mix, "rows": 80.0, "patients": 80.0, "series": {"lactate": lactate}},
    )


def make_evaluated(rows, metrics=None, *, min_cell=0, threshold=THRESHOLD, **more):
    """Predictions with their metrics."""
    metrics = evaluate(rows, 0, threshold) if metrics is None else metrics
    words = at_threshold(threshold, "chosen by a rule on some rows")
    return Evaluated(rows, metrics, 0, threshold, words, min_cell=min_cell, **more)


FLOW = pd.DataFrame({"rule": ["no label"], "removed": [3], "left": [200]})


def make_page(
    evaluated,
    results=None,
    *,
    outcome=LABEL,
    question=None,
    flow=FLOW,
    described_rows=True,
    reports=WRITTEN,
    mixes=True,
    example=None,
    stage1_page=None,
    list_patients=False,
    first=(),
    notices=(),
    card=None,
    data=None,
    **parts,
):
    """A report with every section, on predictions."""
    labels, groups = np.tile([0.0, 0, 0, 1], 50), np.arange(200)
    split = {"train": groups[:100], "val": groups[100:120], "test": groups[120:]}
    parts = {"bands": make_bands(len(evaluated.rows)), "site_names": None} | parts
    results = outcome.topics(**parts) if results is None else results
    table = part_table(labels, groups, split)
    mixes = make_mixes() if mixes is True else mixes
    words = evaluated.at_threshold, evaluated.noun
    findings = [] if evaluated.has_few else outcome.sentences(evaluated.metrics, *words)
    topics = report.build_topics(evaluated, [] if evaluated.has_few else results)
    if stage1_page is not None:
        topics = report.folded(findings, topics, "The results of stage 1, again")
        findings = [Finding(None, "See the report of stage 1.", stage1_page)]
    builders = []
    if mixes:
        builders.append(partial(case_mix_topic, development=mixes[0], here=mixes[1]))
    builders += [largest_errors] if list_patients else []
    if described_rows:
        builders.append(partial(table_one_topic, exact=described(split), split=table))
    about = {"split": table, "flow": flow, "history": HISTORY} if described_rows else {}
    builders.append(partial(cohort, data=data or {"Source": "file.csv"}, **about))
    written = [partial(written_reports, reports=reports)]
    sentence = written_sentence(suppress_reports(reports or {}, evaluated.min_cell))
    return report.Page(
        "A model",
        [*(Finding(None, x) for x in filter(None, [sentence, *first])), *findings],
        [
            Topic("", terms=question or {"Outcome": OUTCOME}),
            *report.build_topics(evaluated, written),
            *([example_topic(example)] if example else []),
            *topics,
            *report.build_topics(evaluated, builders),
        ],
        report.report_card(
            evaluated, card or {"Model": "ODE-RNN", "SHA-256 of the data": "c0ffee"}
        ),
        [*notices, *([report.PATIENTS_NOTICE] if list_patients else [])],
    )


def write_page(root, rows=None, *, folder=None, methods=METHODS, evaluated=None, **more):
    """Write a report of some rows and return its source; ``more``: of both functions above."""
    rows = make_rows() if rows is None else rows
    own = {
        name: more.pop(name) for name in ("min_cell", "threshold", "noun", "folds") if name in more
    }
    evaluated = make_evaluated(rows, **own) if evaluated is None else evaluated
    page, path = make_page(evaluated, **more), root / "report.html"
    about = {"question": more.get("question") or {"Outcome": OUTCOME}, "methods": methods}
    about |= {"data": {"Source": "file.csv"}, "has_sites": more.get("site_names") is not None}
    tripod = report.fill_tripod(page, evaluated, **about) if folder else None
    report.write_report(path, page, folder=folder, tripod=tripod)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page: tags that are still open, all tags with their attributes, and visible text."""

    VOID = ("meta", "link", "br", "img", "hr", "source")

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.tags, self.words = text, [], [], []
        self.feed(text)
        self.close()

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def sentences(self):
        """The visible text, a sentence a line."""
        return self.text.replace(". ", ".\n") + "\n"

    def images(self):
        """Return the alternative text and the SVG source of each figure."""
        image = re.compile(r'(<svg role="img" aria-label="(.*?)"(?:/>|.*?</svg>))', re.DOTALL)
        return [(html.unescape(alt), svg) for svg, alt in image.findall(self.source)]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "svg"} & {*self.open}:
            self.words.append(data)
