"""report.html: the figures beneath it, its plain sentences, its page, and what it must not tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

import medgemma_trainer as trainer
from cohorts import Drawn, coverage, drawn, ones, sigmoid
from conftest import sign_table
from dataset_format import AGE_BANDS, UNKNOWN, MIMICtrajectoryDataset, banded
from srtr_dataset import SRTRTrajectoryDataset

SRTR = Path(__file__).parent / "data" / "srtr_saf"


# --------------------------------------------------------------------------- figures


@pytest.mark.parametrize("seed", range(4))
def test_calibration_is_an_unpenalised_logistic_fit(seed: int) -> None:
    labels, risk, _ = drawn(np.random.default_rng(seed), 300, sure=0.5 + seed)
    logit = np.log(risk / (1 - risk))
    fit = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky", max_iter=1000)
    fit.fit(logit[:, None], labels)
    found = trainer.weighted_calibration(labels, risk, ones(300))
    assert found["calibration_slope"][0] == pytest.approx(fit.coef_[0, 0], abs=1e-6)
    assert found["calibration_intercept"][0] == pytest.approx(fit.intercept_[0], abs=1e-6)
    low, high = -20.0, 20.0  # the same by bisection: the risks then sum up to the events
    while high - low > 1e-10:
        middle = (low + high) / 2
        enough = sigmoid(logit + middle).sum() > labels.sum()
        low, high = (low, middle) if enough else (middle, high)
    assert found["calibration_in_the_large"][0] == pytest.approx(low, abs=1e-6)
    prevalence = np.full(300, labels.mean())
    skill = 1 - metrics.brier_score_loss(labels, risk) / metrics.brier_score_loss(
        labels, prevalence
    )
    assert found["brier_skill"][0] == pytest.approx(skill, abs=1e-9)


def test_two_risks_are_calibrated_by_hand() -> None:
    # 10 of 40 at risk 0.1 and 30 of 40 at risk 0.5 have the event: log-odds -log 3 and log 3.
    labels = np.repeat([1.0, 0, 1, 0], [10, 30, 30, 10])
    risk = np.repeat([0.1, 0.5], 40)
    found = trainer.weighted_calibration(labels, risk, ones(80))
    assert found["calibration_slope"][0] == pytest.approx(np.log(9) / np.log(9), abs=1e-9)
    assert found["calibration_intercept"][0] == pytest.approx(np.log(3), abs=1e-9)


def test_weights_count_as_repeated_rows() -> None:
    rng = np.random.default_rng(5)
    labels, risk, _ = drawn(rng, 80)
    weights = rng.integers(0, 4, (3, 80)).astype(float)
    shares = trainer.threshold_shares(labels, risk, 0.3)
    at = np.array([0.1, 0.3, 0.31])
    calibration = trainer.weighted_calibration(labels, risk, weights)
    share = trainer.weighted_shares(shares, weights)
    benefit = trainer.weighted_benefit(labels, risk, at, weights)
    for k, weight in enumerate(weights):
        rows = np.repeat(np.arange(80), weight.astype(int))
        own, told = labels[rows], risk[rows]
        again = trainer.weighted_calibration(own, told, ones(len(rows)))
        for name, value in again.items():
            assert calibration[name][k] == pytest.approx(value[0], abs=1e-6)
        alone = trainer.weighted_shares(trainer.threshold_shares(own, told, 0.3), ones(len(rows)))
        for name, value in alone.items():
            assert share[name][k] == pytest.approx(value[0])
        one = trainer.weighted_benefit(own, told, at, ones(len(rows)))
        assert benefit[k] == pytest.approx(one[0])


def test_classes_that_are_parted_have_no_slope_and_one_risk_has_none() -> None:
    labels = np.repeat([0.0, 1.0], 20)
    groups = np.arange(40).astype(str)
    for risk in (np.linspace(0.1, 0.9, 40), np.full(40, 0.3)):
        found = trainer.further_figures(labels, risk, groups, 0.5, 0)
        assert found["calibration_slope"] == {"value": None, "low": None, "high": None}
        json.dumps(found, allow_nan=False)


def test_one_event_has_a_slope_though_a_plain_newton_step_overshoots() -> None:
    low = "249 263 267 340 342 352 353 360 393 415 417 427 445 455 458 464 467 486 529 565 581"
    risk = np.array([*(int(x) / 1e4 for x in low.split()), 0.2623, 0.2809, 0.285])
    labels = (risk == 0.2623).astype(float)
    fit = LogisticRegression(C=np.inf, tol=1e-12, solver="newton-cholesky", max_iter=1000)
    fit.fit(trainer.log_odds(risk)[:, None], labels)
    found = trainer.weighted_calibration(labels, risk, ones(24))
    assert found["calibration_slope"][0] == pytest.approx(fit.coef_[0, 0], abs=1e-5)


def test_net_benefit_by_hand() -> None:
    labels, risk = np.array([1.0, 0, 1, 0, 0]), np.array([0.9, 0.8, 0.2, 0.2, 0.1])
    at = np.array([0.1, 0.2, 0.5, 0.9, 0.95])
    expected = [(2 - 3 / 9) / 5, (2 - 2 / 4) / 5, (1 - 1) / 5, 1 / 5, 0]
    assert trainer.weighted_benefit(labels, risk, at, ones(5))[0] == pytest.approx(expected)
    everyone = trainer.weighted_benefit(labels, np.ones(5), at[:3], ones(5))[0]
    assert everyone == pytest.approx([0.4 - 0.6 / 9, 0.4 - 0.6 / 4, 0.4 - 0.6])


def test_the_threshold_is_youdens_and_of_equal_ones_the_lowest() -> None:
    labels = np.array([0.0, 0, 1, 0, 1, 1])
    risk = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    # J is 2/3 from 0.5 on (2 of 3 hits, no false alarm) and from 0.3 on (3 of 3 hits, 1 of 3).
    assert trainer.choose_threshold(labels, risk) == pytest.approx(0.25)  # midway from 0.2
    assert trainer.choose_threshold(1 - labels, risk) == 0.05  # turned round: alarm for all
    rng = np.random.default_rng(3)
    for _ in range(20):
        labels, risk, _ = drawn(rng, 60)
        risk = risk.round(1)
        gains = {
            t: (risk >= t)[labels == 1].mean() - (risk >= t)[labels == 0].mean()
            for t in np.unique(risk)
        }
        best = min(t for t, gain in gains.items() if gain > max(gains.values()) - 1e-12)
        lower = max((t for t in gains if t < best), default=0.0)
        assert trainer.choose_threshold(labels, risk) == pytest.approx((best + lower) / 2)


def test_shares_of_none_and_all_get_exact_intervals_by_patients() -> None:
    labels, risk = np.repeat([1.0, 0.0], [10, 30]), np.repeat([0.9, 0.1], [10, 30])
    single = trainer.further_figures(labels, risk, np.arange(40).astype(str), 0.5, 0)
    # 0 of 10: Clopper and Pearson give 0.3085 as the upper limit.
    assert single["sensitivity"]["low"] == pytest.approx(1 - 0.3085, abs=1e-4)
    paired = trainer.further_figures(labels, risk, (np.arange(40) // 2).astype(str), 0.5, 0)
    assert paired["sensitivity"]["low"] == pytest.approx(0.025 ** (1 / 5))
    silent = trainer.further_figures(labels, risk, np.arange(40).astype(str), 0.95, 0)
    assert silent["ppv"]["value"] is None


def test_what_few_patients_tell_is_not_called_sure() -> None:
    labels = np.repeat([1.0, 0.0], [12, 30])
    groups = np.array(["one"] * 12 + [str(k) for k in range(30)])  # twelve rows, one patient
    cohort = cohort_of((labels, np.where(labels == 1, 0.9, 0.1), groups))
    found = trainer.assess(cohort, 0.5, 0)
    assert found["rarer"] == 1
    assert found["auroc"]["value"] == 1
    assert found["auroc"]["low"] == pytest.approx(0.025)  # one pair of patients tells no more
    sure, sentences = trainer.verdict(cohort, found, "Death")
    assert not sure
    assert "Only 1 of 31 patients are of the rarer outcome" in sentences[0]
    assert not [key for key in found if isinstance(key, tuple) and key[0] == "subgroup"]
    score = trainer.metrics_with_intervals(labels, cohort.probability, groups, 0)["auroc"]
    assert score["low"] == pytest.approx(0.025)


@pytest.mark.parametrize("risk", [0.01, 0.137219873, 0.3])
@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_equal_risks_have_no_slope_and_are_not_recalibrated(
    risk: float, noise: float, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(150) < 0.2).astype(float)
    told = risk + noise * rng.normal(size=150)
    found = trainer.weighted_calibration(labels, told, ones(150))
    assert np.isnan(found["calibration_slope"][0])
    assert np.isfinite(found["calibration_in_the_large"][0])
    decision = trainer.decide(labels, trainer.log_odds(told), "platt")
    assert not decision.recalibrates
    assert "all risks are equal" in caplog.text


def test_a_subgroup_has_the_interval_of_its_own_draws() -> None:
    cohort = cohort_of(drawn(np.random.default_rng(2), 600))
    found = trainer.assess(cohort, 0.3, 0)
    rows = np.flatnonzero(cohort.subgroups["size"] == "many")
    labels, risk = cohort.labels[rows], cohort.probability[rows]

    def inside(weights: Any) -> trainer.Figures:
        return trainer.weighted_metrics(labels, risk, weights[:, rows])

    draws = trainer.bootstrap(cohort.labels, cohort.groups, 0, inside)["auroc"]
    score = found["subgroup", "size", "many"]
    assert score["value"] == pytest.approx(metrics.roc_auc_score(labels, risk))
    assert [score["low"], score["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert score["high"] - score["low"] > 0.02


@pytest.mark.parametrize(("shift", "word"), [(1.5, "too high"), (-1.5, "too low")])
def test_the_sentence_says_on_which_side_the_risks_are(shift: float, word: str) -> None:
    labels, risk, groups = drawn(np.random.default_rng(3), 2000)
    moved = sigmoid(trainer.log_odds(risk) + shift)
    assert f"they are {word} on average" in said(cohort_of((labels, moved, groups)))


def test_pictures_show_what_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(
        trainer, "finish", lambda figure, name, alt: figures.setdefault(name, (figure, alt))
    )
    cohort = cohort_of(drawn(np.random.default_rng(2), 600))
    found = trainer.assess(cohort, 0.3, 0)
    trainer.draw_roc(cohort, found, 0.3)
    trainer.draw_benefit(cohort, found)
    history = [
        {"epoch": k, "train_loss": 1.0, "val_loss": 1.0, "val_auroc": 0.6, "improved": k in (1, 3)}
        for k in range(1, 6)
    ]
    trainer.draw_learning(history)
    lines = {
        (name, line.get_label()): np.array(line.get_data())
        for name, (figure, _) in figures.items()
        for axes in figure.axes
        for line in axes.lines
    }
    alarm, event = cohort.probability >= 0.3, cohort.labels == 1
    point = [100 * alarm[~event].mean(), 100 * alarm[event].mean()]
    assert lines["roc", "chosen threshold"].ravel() == pytest.approx(point)
    at, everyone = lines["benefit", "treat all"]
    expected = trainer.weighted_benefit(cohort.labels, np.ones(600), at / 100, ones(600))[0]
    assert everyone == pytest.approx(100 * expected)
    (kept,) = {float(line.get_data()[0][0]) for line in figures["learning"][0].axes[1].lines[1:]}
    assert kept == 3
    assert "epoch 3 was kept" in figures["learning"][1]


def test_draws_do_not_depend_on_where_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, _, groups = drawn(np.random.default_rng(0), 90, a_patient=3)
    whole = trainer.patient_draws(labels, groups, 4)
    monkeypatch.setattr(trainer, "CHUNK_CELLS", 90 * 7)
    pieces = list(trainer.draw_chunks(labels, groups, 4))
    assert max(map(len, pieces)) == 7
    assert np.array_equal(np.concatenate(pieces), whole)
    assert whole.shape == (trainer.BOOTSTRAP_REPLICATES, 90)
    by_patient = whole.reshape(-1, 30, 3)
    assert (by_patient == by_patient[:, :, :1]).all()
    rare = np.zeros(12)
    rare[0] = 1
    draws = trainer.patient_draws(rare, np.arange(12).astype(str), 0)
    assert (draws @ rare > 0).all()
    with pytest.raises(ValueError, match="both labels"):
        trainer.patient_draws(np.zeros(5), np.arange(5).astype(str), 0)


@pytest.mark.parametrize("a_patient", [1, 2])
def test_intervals_cover_the_truth(a_patient: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "BOOTSTRAP_REPLICATES", 300)
    shares = coverage(500, 1000, a_patient, seed=1)
    # 500 data sets tell a share of 0.95 to 0.01: of fifteen some lie two or three of that away.
    assert all(0.91 <= share <= 0.98 for share in shares.values()), shares
    assert 0.93 <= np.mean(list(shares.values())) <= 0.97, shares


def test_an_overconfident_model_has_a_slope_below_one_and_is_told_so() -> None:
    labels, risk, groups = drawn(np.random.default_rng(1), 2000, sure=2.5)
    slope = trainer.further_figures(labels, risk, groups, 0.5, 0)["calibration_slope"]
    assert slope["value"] is not None
    assert slope["high"] is not None
    assert slope["value"] == pytest.approx(0.4, abs=0.08)
    assert slope["high"] < 1
    logit = slope["value"] * trainer.log_odds(risk)
    mended = trainer.weighted_calibration(labels, sigmoid(logit), ones(2000))
    assert mended["calibration_slope"][0] == pytest.approx(1, abs=1e-6)
    assert "too extreme" in said(cohort_of((labels, risk, groups)))
    calm = cohort_of(drawn(np.random.default_rng(1), 2000))
    assert "Nothing here says that its risks are off" in said(calm)


# --------------------------------------------------------------------------- the page


def cohort_of(drawn: Drawn, **baselines: Any) -> trainer.Cohort:
    labels, risk, groups = drawn
    rows = len(labels)
    size = np.where(np.arange(rows) < 15, "few", "many")
    return trainer.Cohort(
        labels,
        risk,
        np.char.add("MARKER-patient-", groups),
        np.char.add("MARKER-row-", np.arange(rows).astype(str)),
        pd.DataFrame({"size": pd.Categorical(size, ["few", "many", "none"], ordered=True)}),
        {name.replace("_", " "): values for name, values in baselines.items()},
    )


def told_of(**more: Any) -> trainer.Told:
    outcome = "Death <b>& $x$ decay"  # whatever a user writes stays text
    history = [
        {"epoch": k, "train_loss": 1 / k, "val_loss": 1.1 / k, "val_auroc": 0.6, "improved": k < 3}
        for k in range(1, 6)
    ]
    parts: dict[str, Any] = {"asked": {"Outcome": outcome}, "data": {}, "card": {"Seed": "0"}}
    return trainer.Told("A model", outcome, **{**parts, "history": history, **more})


def written(cohort: trainer.Cohort, folder: Path, told: Any = None, **options: Any) -> str:
    path = folder / "report.html"
    options = {"threshold": 0.3, "seed": 0, **options}
    trainer.write_report(path, cohort, told or told_of(), **options)
    return path.read_text(encoding="utf-8")


def said(cohort: trainer.Cohort) -> str:
    found = trainer.assess(cohort, 0.3, 0)
    return " ".join(trainer.verdict(cohort, found, "Death")[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels, risk, groups = drawn(np.random.default_rng(0), 400, a_patient=2)
    worse = sigmoid(trainer.log_odds(risk) + np.random.default_rng(1).normal(size=400))
    cohort = cohort_of((labels, risk, groups), last_value=worse)
    mix = {"rows": 400.0, "patients": 200.0, "prevalence": 0.3}
    shift = trainer.shift_table({**mix, "age_q1": 40, "age_median": 50, "age_q3": 60}, mix)
    return written(cohort, tmp_path_factory.mktemp("page"), told_of(shift=shift))


class Page(HTMLParser):
    """Tags of a page: whether each is closed, where it points to, what its pictures say."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    read = Page(page)
    assert read.open == []
    tags = [tag for tag, _ in read.seen]
    assert not {"script", "iframe", "object", "embed"} & set(tags)
    for tag, attributes in read.seen:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name) or ""
            assert target.startswith(("#", "data:")) or not target or tag == "a", (tag, target)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(http" not in page
    assert "@import" not in page
    ids = [a["id"] for _, a in read.seen if "id" in a]
    assert len(ids) == len(set(ids))


def test_each_picture_has_a_text_in_its_place(page: str) -> None:
    pictures = [a for tag, a in Page(page).seen if tag == "svg"]
    assert len(pictures) == 5
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 60
    assert "#00000" not in page  # each colour is the page's own, light or dark
    for label in (
        "false alarms, % of rows without event",
        "sensitivity, % of events",
        "predicted risk, %",
        "observed, %",
        "threshold risk, %",
        "net benefit, true alarms per 100 rows",
        "loss, nats",
        "epoch (dotted: the one kept)",
    ):
        assert label in page


def test_what_a_user_writes_stays_text(page: str) -> None:
    assert "Death <b>" not in page
    assert escape("Death <b>& $x$ decay", quote=False) in page


def test_figures_of_the_page_are_scikit_learns(page: str) -> None:
    labels, risk, groups = drawn(np.random.default_rng(0), 400, a_patient=2)
    assert f"{metrics.roc_auc_score(labels, risk):.3f} " in page
    assert f"{metrics.average_precision_score(labels, risk):.3f} " in page
    other = sigmoid(trainer.log_odds(risk) + np.random.default_rng(1).normal(size=400))
    cohort = cohort_of((labels, risk, groups), last_value=other)
    found = trainer.assess(cohort, 0.3, 0)
    paired = trainer.paired_differences(labels, risk, other, cohort.groups, 0)
    whole = trainer.metrics_with_intervals(labels, risk, cohort.groups, 0)
    for name in ("auroc", "auprc", "brier", "accuracy", "log_loss"):
        assert found["last value", name, "difference"] == pytest.approx(paired[name], abs=1e-9)
        assert found[name] == pytest.approx(whole[name], abs=1e-9)
    assert trainer.shown(found["last value", "auroc", "difference"], "+.3f").split(" [")[1] in page


def test_small_subgroups_are_grey_and_have_no_figure(page: str) -> None:
    rows = re.findall(
        r"<tr( class=\"few\")?>\s*<th scope=\"row\">size: (\w+)</th>(.*?)</tr>", page, re.S
    )
    assert [(bool(grey), name) for grey, name, _ in rows] == [(True, "few"), (False, "many")]
    assert "too few" in rows[0][2]
    assert re.search(r"0\.\d{3}\s+<span class=\"whole\">\[0\.", rows[1][2])
    labels, risk, _ = drawn(np.random.default_rng(0), 400, a_patient=2)
    assert f"{metrics.roc_auc_score(labels[15:], risk[15:]):.3f} " in rows[1][2]


def test_the_case_mix_of_another_cohort_stands_beside_the_development(page: str) -> None:
    assert "50 [40, 60]" in re.sub(
        r"\s+<span class=\"whole\">|</span>", lambda m: " " if "span c" in m[0] else "", page
    )
    assert "not known" in page


def test_a_useless_model_is_called_so() -> None:
    rng = np.random.default_rng(0)
    labels, risk, groups = drawn(rng, 500)
    chance = rng.permutation(risk)
    text = said(cohort_of((labels, chance, groups), last_value=risk))
    assert "This model is of no use as it stands" in text
    assert "the interval includes 0.5" in text
    assert "It is worse than its best baseline, last value" in text
    assert "wrong way round" in said(cohort_of((labels, 1 - risk, groups)))


def test_a_model_that_is_not_better_than_its_best_baseline_is_told_so() -> None:
    rng = np.random.default_rng(0)
    labels, risk, groups = drawn(rng, 500)
    noisy = sigmoid(trainer.log_odds(risk) + 0.1 * rng.normal(size=500))
    text = said(cohort_of((labels, noisy, groups), number=np.full(500, 0.5), other_model=risk))
    assert "of no use" not in text
    assert "It is not better than its best baseline, other model" in text
    assert "an interval that includes zero" in text
    close = cohort_of((labels, risk, groups), other_model=noisy)  # ahead, but by chance
    gain = trainer.assess(close, 0.3, 0)["other model", "auroc", "difference"]
    assert gain["low"] < 0 < gain["value"]
    assert "It is not better than its best baseline, other model" in said(close)
    found = trainer.verdict(
        cohort := cohort_of((labels, risk, groups), number=np.full(500, 0.5)),
        trainer.assess(cohort, 0.3, 0),
        "Death",
    )
    assert found[0]
    assert "It is better than its best baseline, number" in found[1][1]
    assert "No baseline was scored" in said(cohort_of((labels, risk, groups)))


def test_a_model_is_not_praised_whose_risks_are_off_or_beside_which_nothing_stands() -> None:
    labels, risk, groups = drawn(np.random.default_rng(0), 800)
    sure = sigmoid(3 * trainer.log_odds(risk))
    for probability, baselines, praised in (
        (risk, {"number": np.full(800, 0.5)}, True),
        (sure, {"number": np.full(800, 0.5)}, False),
        (risk, {}, False),
    ):
        cohort = cohort_of((labels, probability, groups), **baselines)
        good, sentences = trainer.verdict(cohort, trainer.assess(cohort, 0.3, 0), "Death")
        assert good == praised, sentences


def test_few_events_judge_no_model() -> None:
    labels, risk = np.zeros(60), np.linspace(0.1, 0.6, 60)
    labels[-3:] = 1
    cohort = cohort_of((labels, risk, np.arange(60).astype(str)), number=np.full(60, 0.5))
    good, sentences = trainer.verdict(cohort, trainer.assess(cohort, 0.3, 0), "Death")
    assert not good
    assert sentences[0].startswith("Only 3 of 60 patients")
    assert "cannot be told" in sentences[2]


def test_patients_are_named_only_when_asked_and_then_ten(page: str, tmp_path: Path) -> None:
    assert "MARKER" not in page
    labels, risk, groups = drawn(np.random.default_rng(0), 400)
    text = written(cohort_of((labels, risk, groups)), tmp_path, patients=True)
    worst = np.argsort(-np.abs(labels - risk))[:10]
    assert re.findall(r"MARKER-row-(\d+)", text) == [str(i) for i in worst]
    assert "MARKER-patient" not in text
    assert f"{risk[worst[0]]:.3f}" in text


def test_one_class_alone_has_no_report(tmp_path: Path) -> None:
    nobody = np.zeros(30), np.full(30, 0.2), np.arange(30).astype(str)
    with pytest.raises(ValueError, match="both labels"):
        written(cohort_of(nobody), tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- the data's words


def test_subgroups_are_bands_and_words_found_in_contexts() -> None:
    contexts = [
        "68-year-old man",
        "aged 17, female",
        "Woman, 80 years old",
        "unit 4",
        "man or woman",
    ]
    series = ["1 (0h)", "1 (0h) -> 2 (1h)", "1 (0h) -> 2 (1h) -> 3 (2h) -> 4 (3h)"] + ["1 (0h)"] * 2
    table = pd.DataFrame({"clinical_trajectory": series, "label_escalation": [0, 1, 0, 1, 0]})
    groups = MIMICtrajectoryDataset(table.assign(clinical_context=contexts)).subgroups()
    assert groups["observations"].tolist() == ["1", "2", "3 to 4", "1", "1"]
    assert groups["age"].tolist() == ["60 to 74", "under 18", "75 or older", UNKNOWN, UNKNOWN]
    assert groups["sex"].tolist() == ["man", "woman", "woman", UNKNOWN, UNKNOWN]
    assert list(MIMICtrajectoryDataset(table).subgroups()) == ["observations"]
    edges = np.array([17.99, 18, 39.9, 40, 75, np.nan])
    expected = ["under 18", "18 to 39", "18 to 39", "40 to 59", "75 or older", UNKNOWN]
    assert banded(edges, AGE_BANDS).tolist() == expected


@pytest.mark.parametrize("organ", ["kidney", "liver"])
def test_srtr_tells_organ_age_and_sex_from_its_own_columns(organ: str) -> None:
    whole = SRTRTrajectoryDataset(SRTR, organ)
    chosen = np.arange(len(whole))[::-7]
    dataset = whole.subset(chosen)
    groups = dataset.subgroups()
    assert list(groups) == ["observations", "age", "sex", "organ"]
    assert set(groups["organ"]) == {organ}
    for context, sex, age in zip(dataset.contexts, dataset.sexes(), dataset.ages(), strict=True):
        words = {"man": "man", "woman": "woman", "patient": UNKNOWN}
        assert words[re.findall(r"\b(?:wo)?man\b|\bpatient\b", context.lower())[0]] == sex
        assert np.isnan(age) or context.startswith(str(int(age)))
    told = whole.asked()
    assert f"day {whole.landmark_days} after listing" in told["Prediction time"]
    assert told["Horizon"].startswith(f"{whole.horizon_days} days")


def test_case_mix_counts_known_values_only() -> None:
    table = pd.DataFrame(
        {
            "subject_id": ["a", "a", "b", "c"],
            "clinical_trajectory": [
                "1 (0h)",
                "1 (0h) -> 2 (1h)",
                "1 (0h) -> 2 (1h) -> 3 (2h)",
                "1 (0h)",
            ],
            "label_escalation": [1, 0, 0, 0],
            "clinical_context": ["50-year-old man", "60-year-old man", "70-year-old woman", ""],
        }
    )
    mix = MIMICtrajectoryDataset(table).case_mix(np.arange(3))
    assert mix == pytest.approx(
        {
            "rows": 3,
            "patients": 2,
            "observations_q1": 1.5,
            "observations_median": 2,
            "observations_q3": 2.5,
            "age_q1": 55,
            "age_median": 60,
            "age_q3": 65,
            "prevalence": 1 / 3,
            "women": 1 / 3,
        }
    )
    assert set(MIMICtrajectoryDataset(table).case_mix(np.array([3]))) == {
        *("rows", "patients", "prevalence"),
        *("observations_q1", "observations_median", "observations_q3"),
    }


# --------------------------------------------------------------------------- a run


def marked(rows: int) -> pd.DataFrame:
    """Make a table whose ids, contexts and values can be found wherever they turn up."""
    table = sign_table(rows, seed=3)
    table["clinical_trajectory"] += " -> 7.41703 (49.31h)"
    table["subject_id"] = [f"MARKERID{i}" for i in range(rows)]
    age = np.random.default_rng(0).integers(20, 90, rows)
    table["clinical_context"] = [f"{a}-year-old man, MARKERCONTEXT{i}" for i, a in enumerate(age)]
    return table


def test_a_run_reports_without_any_patient_unless_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "signs.csv"
    table = marked(300)
    far = pd.Series([" -> 987.654 (777.25h)"], index=[7])  # of all rows
    table["clinical_trajectory"] += far.reindex(table.index, fill_value="")
    table.to_csv(data, index=False)
    words = ["--trajectory_only", "--data_path", str(data), "--trajectory_epochs", "2"]
    words += ["--output_dir", str(tmp_path / "run")]
    assert trainer.main(words) == 0
    folder = tmp_path / "run" / "trajectory"
    told = capsys.readouterr().out
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "MARKERCONTEXT" not in text
        assert "7.41703" not in text
        assert "987.6" not in text.replace(",", "")
        assert "987.7" not in text
        if not path.name.startswith("predictions_"):
            assert "MARKERID" not in text, path.name
    assert "MARKER" not in told
    for extreme in ("987.6", "987.7", "777.2", "777.3"):
        assert extreme not in told, "an extreme is one patient's value"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "Will care have to be escalated?" in text
    assert "age: 60 to 74" in text
    assert "No weights of MedGemma" in text
    assert "logistic regression with context" in text
    assert str(tmp_path) not in text
    mix = json.loads((folder / "run.json").read_text())["data"]["case_mix"]
    assert mix["rows"] == 240
    assert 40 < mix["age_median"] < 70
    found = json.loads((folder / "metrics.json").read_text())
    table = pd.read_csv(folder / "predictions_test.csv")
    val = pd.read_csv(folder / "predictions_val.csv")
    assert found["threshold"] == trainer.choose_threshold(
        val["label"].to_numpy(), val["probability"].to_numpy()
    )
    alarm = (table["probability"] >= found["threshold"]).astype(int)
    test = found["test"]
    expected = {
        "sensitivity": metrics.recall_score(table["label"], alarm),
        "specificity": metrics.recall_score(table["label"], alarm, pos_label=0),
        "ppv": metrics.precision_score(table["label"], alarm),
        "npv": metrics.precision_score(table["label"], alarm, pos_label=0),
    }
    for name, value in expected.items():
        assert test[name]["value"] == pytest.approx(value, abs=1e-6)
        assert test[name]["low"] <= test[name]["value"] <= test[name]["high"]
        assert trainer.shown(test[name], ".1f", 100).split(" [")[0] in text
    assert f"at least {100 * found['threshold']:.3g} %" in text
    assert {"calibration_slope", "brier_skill"} < set(found["validation"])
    assert trainer.main([*words, "--report_patients", "--log_file", "none"]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"MARKERID\d+", text)) == 10
    assert "MARKERCONTEXT" not in text


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """<!DOCTYPE html><body><iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const pictures = [...inside.querySelectorAll("svg, img")].map(p => p.getBoundingClientRect());
  document.getElementById("found").textContent = JSON.stringify({{
    wide: root.scrollWidth, seen: root.clientWidth,
    pictures: pictures.filter(p => p.width > 200 && p.height > 150).length,
    letters: Math.min(...[...inside.querySelectorAll("svg text")].map(
      t => t.getBoundingClientRect().height)) }});
}});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: not looked at")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_of_it(page: str, width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.format(width=width, page=escape(page)), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1300,1000", outer.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    match = re.search(r'<pre id="found">(.*?)</pre>', result.stdout)
    assert match, result.stderr
    found = json.loads(match[1])
    assert found["wide"] <= found["seen"]
    assert found["seen"] >= width - 20
    assert found["pictures"] == 5
    assert found["letters"] >= 10  # pixels


def luminance(colour: str) -> float:
    """Give the relative luminance of ``#rrggbb``. Source: WCAG 2.1."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_letters_have_contrast_enough_in_light_and_dark(page: str) -> None:
    for block in re.findall(r":root \{(.*?)\}", page, re.S):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        assert {"ink", "soft", "page", "panel", "model", "other"} <= set(colours)
        for ink in ("ink", "soft", "model", "other", "good", "doubt"):
            for ground in ("page", "panel"):
                pair = sorted(luminance(colours[name]) for name in (ink, ground))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, ground)
