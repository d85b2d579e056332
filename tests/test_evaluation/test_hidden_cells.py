"""Attacks on a page that hides small counts: nothing that it shows gives one of them away."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from medgemma_clinical.commands.folds import folds_sentence
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics_table import SPREAD, Metrics, evaluate
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.evaluation.suppress import suppress
from medgemma_clinical.evaluation.updating import evaluate_updates
from medgemma_clinical.models.model_card import shareable
from medgemma_clinical.models.outcome import LABEL
from pages import MODEL, make_content, make_rows

LINES = {MODEL: "model", "blend": "baseline"}


class Attack:
    """What a reader finds on a page of known rows, written to a folder with its figures."""

    def __init__(self, rows, folder, figures):
        self.events, self.n = int(rows["label"].sum()), len(rows)
        self.others, self.folder, self.figures = self.n - self.events, folder, figures

    def lines(self, figure):
        lines = self.figures[figure].axes[0].lines if figure in self.figures else []
        return {str(line.get_label()): np.array(line.get_data(), float).T for line in lines}

    def table(self, name):
        return pd.read_csv(self.folder / "figures" / f"{name}.csv")

    def cells(self, model):
        """All pairs of true and false positives that figures and tables tell of a model."""
        found = {(0, 0), (self.events, self.others)}
        for x, y in self.lines("ROC curve").get(LINES[model], []):
            found |= {(self.events * y, self.others * x)}
        recalls = self.lines("Precision-recall curve").get(LINES[model], np.empty((0, 2)))
        for recall, precision in recalls[recalls[:, 0] > 0]:
            found |= {(self.events * recall, self.events * recall * (1 / precision - 1))}
        for _, line in self.table("decision_curve").dropna(subset=model).iterrows():
            found |= self.whole(line["threshold"], line[model])
        table = self.table("thresholds")
        shown = table.pivot(index="threshold", columns="metric", values="value")
        if model == MODEL:
            found |= {
                (self.events * y, self.others * x)
                for x, y in self.lines("ROC curve").get("threshold", [])
            }
            used = self.table("metrics").set_index(["model", "metric"])["value"][MODEL]
            for share in (used.dropna(), *shown.to_dict("records")):
                if "sensitivity" in share:
                    fp = self.others * (1 - share["specificity"])
                    found |= {(self.events * share["sensitivity"], fp)}
            bins = self.table("calibration").iloc[::-1]
            events = (bins["n"] * bins["observed"]).cumsum()
            found |= {*zip(events, bins["n"].cumsum() - events, strict=True)}
        elif "minus blend" in shown:
            for threshold, line in shown.iterrows():
                found |= self.whole(threshold, line["net benefit"] - line["minus blend"])
        return sorted({(round(tp), round(fp)) for tp, fp in found})

    def whole(self, threshold, benefit):
        """The pair of whole numbers that a net benefit has, if no other one has it."""
        tp, fp = np.meshgrid(range(self.events + 1), range(self.others + 1), indexing="ij")
        is_it = abs((tp - fp * threshold / (1 - threshold)) / self.n - benefit) < 1e-9
        return {*zip(tp[is_it], fp[is_it], strict=True)} if is_it.sum() == 1 else set()


@pytest.fixture
def attack(monkeypatch, tmp_path):
    drawn, draw = {}, plots.to_image

    def seen(figure, alt):
        drawn[re.split("[:.]| with", alt)[0]] = figure
        return draw(figure, alt)

    monkeypatch.setattr(plots, "to_image", seen)

    def write(rows, threshold, min_cell, **more):
        content = make_content(len(rows), threshold=threshold, **more)
        metrics = evaluate(rows, 0, threshold)
        options = {"min_cell": min_cell, "folder": tmp_path}
        write_report(tmp_path / "report.html", rows, metrics, content, LABEL.topics, **options)
        return Attack(rows, tmp_path, drawn)

    return write


def rows_of(kind):
    rows = make_rows(
        {"many": 1500, "rare": 3000}.get(kind, 400), seed=3, rows_a_patient=1 + (kind == "repeated")
    )
    if kind == "tied":
        rows[[MODEL, "blend"]] = rows[[MODEL, "blend"]].round(1)
    if kind == "rare":
        rows["label"] *= np.arange(3000) % 9 == 0
        for name in LINES:
            rows[name] = expit(logit(rows[name]) - 2)
    if kind == "none missed":
        rows["label"] *= rows[MODEL] >= 0.12
    return rows[["id", "label", "patient", *LINES]]


CASES = [("usual", 0.03), *((k, 0.3137) for k in ("usual", "many", "tied", "repeated"))]


@pytest.mark.parametrize(("kind", "threshold"), [*CASES, ("rare", 0.03), ("none missed", 0.12)])
def test_no_difference_of_points_that_are_shown_tells_a_small_count(kind, threshold, attack):
    """Neither within a curve nor between curves, tables and bins; without hiding, they do."""
    rows = rows_of(kind)
    more = {"tries_updates": True, "updates": evaluate_updates(rows, MODEL, 0)}
    page = attack(rows, threshold, 11, **more)
    counts = counts_between(page)
    assert not [count for count in counts if 0 < count < 11]
    assert (0 in counts) == (kind == "none missed"), "known from the metrics at the threshold"
    assert len(counts) > (60 if kind == "many" else 8), "curves are left"
    assert len(page.figures["Calibration curve"].axes) == 1, "no histogram"
    bins = page.table("calibration")
    for share in (bins["observed"], 1 - bins["observed"]):
        assert (bins["n"] * share).min() > 10.99
    name = "Calibration curves of the model not updated and after each update"
    for line in [*page.lines(name).values()][1:]:
        np.testing.assert_allclose(line[:, 1], 100 * bins["observed"])
    if kind == "usual":
        assert {1, 2, 3} <= {*counts_between(attack(rows, threshold, 0, **more))}


def counts_between(page):
    """The events and non-events between neighbouring points of each model."""
    points = [page.cells(model) for model in LINES]
    return [int(x) for known in points for a, b in pairwise(known) for x in np.subtract(b, a)]


@pytest.mark.parametrize(("events", "shown"), [(12, False), (60, True)])
def test_ranges_over_folds_go_where_a_fold_has_few_events(events, shown):
    rows, fold = make_rows(300, seed=1), np.arange(300) % 5
    rows["label"] = (np.arange(300) < events).astype(int)
    metrics = evaluate(rows, 0, 0.3, split=fold)
    assert metrics.counts["fold_minority_patients"] == events // 5
    known = suppress(metrics.to_json(), 11)
    every = [known, *known["models"].values()]
    numbers = [x for part in every for x in part.values() if isinstance(x, dict)]
    spreads = [x[name] for x in numbers for name in SPREAD if name in x]
    assert spreads
    assert any(x is not None for x in spreads) == shown
    assert (" to 0." in folds_sentence(Metrics.from_json(known), LABEL, 5)) == shown
    assert suppress(known, 11) == known
    config = {"metrics": {"folds": metrics.to_json()}, "case_mix": {}}
    assert shareable(config, 11)["metrics"]["folds"] == known
    earlier = {k: x for k, x in metrics.to_json().items() if k != "fold_minority_patients"}
    assert suppress(earlier, 11)["auroc"]["min"] is None
