"""What the tests of pages share: predictions, the content of a report, and a page's tags."""

import html
import re
from functools import partial
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import pandas as pd
from scipy.special import expit

from conftest import whole_reports
from medgemma_clinical.commands.pages import TrainingReport
from medgemma_clinical.data.trajectories import UNKNOWN
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, blend
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.cohort import case_mix_topic
from medgemma_clinical.evaluation.topics.topic import Evaluated
from medgemma_clinical.models import model_card
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


def make_patients(n, sites=None):
    """Who rows are of: the first 15 have one observation, all others twelve."""
    observations = np.where(np.arange(n) < 15, 1, 12)
    patients = pd.DataFrame({"observations": observations, "age": np.nan, "site": sites})
    return patients.assign(sex=pd.Categorical([UNKNOWN] * n))


def make_dataset(**more):
    """The data of a run: 200 patients, of whom the last has no age."""
    columns = {"static_age [years]": [*range(20, 219), np.nan], "static_sex_male": [0, 1] * 100}
    series = ["20 (0h)", "21 (0h) -> 25 (6h)"] * 100
    return dataset_of(series, label_escalation=[0, 0, 0, 1] * 50, **columns, **more)


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
FLOW = pd.DataFrame({"rule": ["no label"], "removed": [3], "left": [200]})
ROWS = np.arange(200)
SPLIT = {"train": ROWS[:100], "val": ROWS[100:120], "test": ROWS[120:]}


def make_evaluated(
    rows, metrics=None, *, threshold=THRESHOLD, sites=None, targets=(LABEL,), **more
):
    """Predictions with their metrics."""
    thresholds = [threshold] * len(targets)
    if metrics is None:
        metrics = evaluate(rows, 0, thresholds, targets=targets)
    patients, choice = make_patients(len(rows), sites), "chosen by a rule on some rows"
    return Evaluated(rows, metrics, patients, 0, thresholds, choice, targets=targets, **more)


def case_mixes():
    """The case mix of the training data and of the rows, as a topic."""
    mix = {"rows": 200.0, "patients": 200.0, "prevalence": 0.25, "women": 0.5}
    mix |= {"age_q1": 40.0, "age_median": 50.0, "age_q3": 60.0}
    lactate = {"measured": 0.87, "levels": [0.05, 0.25, 0.5, 0.75, 0.95]}
    lactate |= {"means": [0.6, 1.1, 1.7, 2.5, 6.2]}
    few, sex = {"measured": 0.06, "levels": [0.5], "means": [3.2]}, {"measured": 1.0, "share": 0.5}
    training = {**mix, "series": {"lactate": lactate, "rare": few}, "static": {"static_sex": sex}}
    here = {**mix, "rows": 80.0, "patients": 80.0, "series": {"lactate": lactate}}
    return partial(case_mix_topic, development=training, here=here)


def write_page(root, rows=None, evaluated=None, results=None, *, config=None, flow=FLOW, **more):
    """Write the report of a run with every section and return its source.

    ``more``: of ``Evaluated`` and ``TrainingReport``.
    """
    rows = make_rows() if rows is None else rows
    own = ("min_cell", "threshold", "noun", "folds", "sites", "targets")
    about = {name: more.pop(name) for name in own if name in more}
    evaluated = evaluated or make_evaluated(rows, **about)
    dataset = make_dataset()
    dataset.outcome, dataset.flow = OUTCOME, flow
    if not evaluated.patients["site"].isna().all():
        dataset.sites = np.resize(evaluated.patients["site"], len(dataset))
    shown = {"stage": "trajectory", "encoder": None, "data_sha256": "c0ffee", "case_mix": {}}
    shown |= {"inputs": {"static": []}, "metrics": {"reports": WRITTEN}, **(config or {})}
    targets = evaluated.targets
    results = [*prediction_topics(targets), case_mixes()] if results is None else results
    parts = {"split": SPLIT, "card": {"Seed": "0"}, "methods": METHODS, "history": HISTORY} | more
    program = mock.patch.object(model_card, "describe_program", dict)  # the same in each version
    with whole_reports(), program:
        TrainingReport("A model", evaluated, dataset, shown, results, **parts).write(root)
    return (root / "report.html").read_text(encoding="utf-8")


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
