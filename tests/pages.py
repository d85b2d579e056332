"""What the tests of pages share: predictions, the content of a report, and a page's tags."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from scipy.special import expit

from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, blend
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.evaluation.topics.cohort import part_table, table_one
from medgemma_clinical.evaluation.topics.topic import ReportContent
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


def make_content(n=400, **more):
    """The content of a report on n rows with every section."""
    history = [
        {
            "epoch": k,
            "train_loss": 1 / k,
            "val_loss": 1.1 / k,
            "val_auroc": 0.6,
            "averaged_epochs": [min(k, 2)],
        }
        for k in range(1, 6)
    ]
    labels, groups = np.tile([0.0, 0, 0, 1], 50), np.arange(200)
    split = {"train": groups[:100], "val": groups[100:120], "test": groups[120:]}
    share = {"value": 0.9, "low": 0.8, "high": 0.95}
    shares = ("right_answer_share", "parse_share", "true_number_share")
    shares += ("right_trend_share", "inventing_share")
    mix = {"rows": 200.0, "patients": 200.0, "prevalence": 0.25, "women": 0.5}
    mix |= {"age_q1": 40.0, "age_median": 50.0, "age_q3": 60.0}
    lactate = {"measured": 0.87, "levels": [0.05, 0.25, 0.5, 0.75, 0.95]}
    lactate |= {"means": [0.6, 1.1, 1.7, 2.5, 6.2]}
    few, sex = {"measured": 0.06, "levels": [0.5], "means": [3.2]}, {"measured": 1.0, "share": 0.5}
    parts = {
        "question": {"Outcome": OUTCOME},
        "data": {"Source": "file.csv"},
        "card": {"Model": "ODE-RNN", "SHA-256 of the data": "c0ffee"},
        "threshold": THRESHOLD,
        "threshold_choice": "chosen by a rule on some rows",
        "seed": 0,
        "bands": make_bands(n),
        "flow": pd.DataFrame({"rule": ["no label"], "removed": [3], "left": [200]}),
        "split": part_table(labels, groups, split),
        "table_one": described(split),
        "history": history,
        "reports": {"reports": 80, "numbers_stated": 400, "invented": 2}
        | dict.fromkeys(shares, share),
        "methods": {"split": "By patient.", "sample_size": "5 patients", "training": "10 epochs."},
        "case_mix": (
            {**mix, "series": {"lactate": lactate, "rare": few}, "static": {"static_sex": sex}},
            {**mix, "rows": 80.0, "patients": 80.0, "series": {"lactate": lactate}},
        ),
    }
    return ReportContent("A model", **{**parts, **more})


def write_page(root, rows=None, content=None, topics=LABEL.topics, **options):
    """Write a report of some rows and return its source."""
    rows = make_rows() if rows is None else rows
    path = root / "report.html"
    metrics = evaluate(rows, 0, THRESHOLD)
    content = content or make_content(len(rows))
    write_report(path, rows, metrics, content, topics, **options)
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
