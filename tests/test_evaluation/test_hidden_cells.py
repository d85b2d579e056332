"""Attacks on a page that hides small counts: nothing that it shows gives one of them away."""

import re
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from medgemma_clinical.commands.folds import folds_sentence
from medgemma_clinical.evaluation import plots
from medgemma_clinical.evaluation.metrics_table import SPREAD, Metrics, evaluate
from medgemma_clinical.evaluation.suppress import suppress
from medgemma_clinical.evaluation.target import LABEL
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.calibration import calibration_updates
from medgemma_clinical.evaluation.updating import evaluate_updates
from medgemma_clinical.models.model_card import shareable
from pages import MODEL, Page, make_rows, write_page
from time_rows import TARGETS, make_times

MODELS = MODEL, "blend"
SHARES = "sensitivity", "specificity", "ppv", "npv", "positives"
TITLES = "Sensitivity", "Specificity", "PPV", "NPV", "Positives"
COUNTED = "n", "rows", "patients", "events", "removed", "left", "count", "missing"


class Attack:
    """What a reader finds in the text, the tables and ``tripod.md`` of a page of known rows."""

    def __init__(self, rows, folder):
        self.events, self.n = int(rows["label"].sum()), len(rows)
        grid = np.indices((self.events + 1, self.n - self.events + 1))
        self.tp, self.fp = (each.ravel() for each in grid)  # all pairs of whole numbers
        self.texts = [Page((folder / "report.html").read_text()).text]
        self.texts += [(folder / "tripod.md").read_text()]
        files = (folder / "figures").glob("*.csv")
        self.tables = {path.stem: pd.read_csv(path) for path in files}

    def pairs(self, model):
        """All pairs of true and false positives that are told of a model."""
        found = {(0, 0), (self.events, self.n - self.events)}
        curve = self.tables.get("decision_curve", pd.DataFrame(columns=["threshold", *MODELS]))
        for threshold, benefit in curve[["threshold", model]].to_numpy():
            odds = threshold / (1 - threshold)
            found |= self.only((self.tp - self.fp * odds) / self.n - benefit, 1e-9)
        if model == MODEL:
            bins = self.tables["calibration"].iloc[::-1]
            events = (bins["n"] * bins["observed"]).cumsum().round().astype(int)
            found |= {*zip(events, bins["n"].cumsum() - events, strict=True)}
            for shares, digits in self.shares():
                found |= self.told(shares, digits)
        return sorted(found)

    def shares(self):
        """Shares at a threshold, with their digits, from tables and texts."""
        metrics = self.tables["metrics"].set_index(["model", "metric"])["value"][MODEL]
        yield metrics.reindex(SHARES).dropna(), 4
        if "thresholds" in self.tables:
            lines = self.tables["thresholds"].pivot(index="threshold", columns="metric")["value"]
            yield from ((line, 12) for _, line in lines[[*SHARES]].iterrows())
        for text in self.texts:
            found = [re.search(rf"{title} \(%\) ([\d.]+) \[", text) for title in TITLES]
            if all(found):
                yield pd.Series([float(x[1]) / 100 for x in found], SHARES), 3

    def told(self, shares, digits):
        """The pair of whole numbers that has these shares, if it is the only one."""
        if shares.empty:
            return set()
        tp, fp, others = self.tp, self.fp, self.n - self.events
        with np.errstate(invalid="ignore"):
            exact = tp / self.events, 1 - fp / others, tp / (tp + fp)
            exact += ((others - fp) / (self.n - tp - fp), (tp + fp) / self.n)
        off = [abs(x - share) for x, share in zip(exact, shares[[*SHARES]], strict=True)]
        return self.only(np.max(off, axis=0), 0.501 * 10**-digits)

    def only(self, off, error):
        is_it = abs(off) <= error
        return {(int(self.tp[is_it][0]), int(self.fp[is_it][0]))} if is_it.sum() == 1 else set()

    def counts(self):
        """Events and non-events between neighbouring pairs of each model, and counts in tables."""
        steps = [np.subtract(b, a) for model in MODELS for a, b in pairwise(self.pairs(model))]
        columns = [t[name] for t in self.tables.values() for name in COUNTED if name in t]
        return [*np.ravel(steps), *pd.to_numeric(pd.concat(columns), errors="coerce").dropna()]


@pytest.fixture
def attack(monkeypatch, tmp_path):
    drawn, draw = {}, plots.to_image

    def seen(figure, alt):
        drawn[alt.split(":")[0]] = figure
        return draw(figure, alt)

    monkeypatch.setattr(plots, "to_image", seen)

    def write(rows, threshold, min_cell, *tried):
        drawn.clear()
        results = prediction_topics([LABEL])
        results += [partial(calibration_updates, tried=x) for x in tried]
        write_page(tmp_path, rows, results=results, threshold=threshold, min_cell=min_cell)
        return Attack(rows, tmp_path), drawn

    return write


def rows_of(kind):
    rows = make_rows(
        {"many": 1500, "rare": 3000}.get(kind, 400), seed=3, rows_a_patient=1 + (kind == "repeated")
    )
    if kind == "tied":
        rows[[*MODELS]] = rows[[*MODELS]].round(1)
    if kind == "rare":
        rows["label"] *= np.arange(3000) % 9 == 0
        for name in MODELS:
            rows[name] = expit(logit(rows[name]) - 2)
    if kind == "none missed":
        rows["label"] *= rows[MODEL] >= 0.12
    return rows[["id", "label", "patient", *MODELS]]


CASES = [("usual", 0.03), *((k, 0.3137) for k in ("usual", "many", "tied", "repeated"))]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "threshold"), [*CASES, ("rare", 0.03), ("none missed", 0.12)])
def test_no_text_table_or_figure_tells_a_small_count(kind, threshold, attack):
    """Nor does a difference of two of them; without hiding, they do."""
    rows = rows_of(kind)
    tried = evaluate_updates(rows, MODEL, [LABEL], 0)
    page, figures = attack(rows, threshold, 11, tried)
    assert not [count for count in page.counts() if 0 < count < 11]
    bins = page.tables["calibration"]
    for share in (bins["observed"], 1 - bins["observed"]):
        assert (bins["n"] * share).min() > 10.99
    assert len(bins) > 2
    cells = pd.crosstab(rows["label"], rows[MODEL] >= threshold).to_numpy()
    told = [page.told(*each) for each in page.shares()]
    assert (len(told) == 3) == (cells.min() >= 11)
    if kind == "usual" and cells.min() >= 11:
        assert told == [{(cells[1, 1], cells[0, 1])}] * 3, "by table, page and tripod.md"
    figures.pop(next(name for name in figures if name.startswith("Learning")))
    assert {*figures} == {
        "Calibration in bins",
        "Calibration curves of the model not updated and after each update.",
    }
    for axes in [axes for figure in figures.values() for axes in figure.axes]:
        assert not [*axes.patches, *axes.images]
        assert max(len(line.get_xdata()) for line in axes.lines) <= max(2, len(bins))
    if kind == "usual":
        assert {1, 2, 3} <= {*attack(rows, threshold, 0, tried)[0].counts()}


def test_bins_are_one_where_they_cannot_end_at_a_threshold_that_is_shown(attack):
    rows = rows_of("usual")
    rows.loc[(rows["label"] == 1) & (rows[MODEL] < 0.3137), "patient"] = "the same"
    page, _ = attack(rows, 0.3137, 11)
    assert len([*page.shares()]) == 3
    assert len(page.tables["calibration"]) == 1


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
    assert (" to 0." in folds_sentence(Metrics.from_json(known), 5)) == shown
    assert suppress(known, 11) == known
    config = {"metrics": {"folds": metrics.to_json()}, "case_mix": {}}
    assert shareable(config, 11)["metrics"]["folds"] == known
    earlier = {k: x for k, x in metrics.to_json().items() if k != "fold_minority_patients"}
    assert suppress(earlier, 11)["auroc"]["min"] is None


def test_a_target_with_few_of_a_kind_is_hidden_and_another_is_shown(tmp_path):
    """At 72 h five are known to be free of the event."""
    rows, (first, second) = make_times(600), TARGETS[:2]
    free = np.flatnonzero(second.labels(rows) == 0)
    rows = rows.drop(index=free[5:]).reset_index(drop=True)
    assert (second.labels(rows) == 0).sum() == 5
    assert np.isnan(second.labels(rows)).sum() > 11, "they do not count as free of it"
    assert 11 <= (first.labels(rows) == 1).sum() < (first.labels(rows) == 0).sum()
    source = write_page(tmp_path, rows, targets=TARGETS[:2], min_cell=11)
    table = pd.read_csv(tmp_path / "figures" / "metrics.csv").set_index("metric")
    is_second = table.index.str.endswith("_72h")
    assert table[is_second]["value"].isna().all()
    assert table["value"].drop(table.index[is_second])["auroc"].notna().all()
    assert not [*(tmp_path / "figures").glob("*_72h*")]
    assert f"Calibration: {first.title}" in source
    assert f"Calibration: {second.title}" not in source
