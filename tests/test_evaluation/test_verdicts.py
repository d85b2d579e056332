"""Verdicts and sentences: only an interval that excludes a limit decides; what is left out."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from medgemma_clinical.data.competing_events import CompetingEvents
from medgemma_clinical.evaluation import verdicts
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES
from medgemma_clinical.evaluation.metrics_table import EXPECTED, MINORITY_PATIENTS, Metrics
from medgemma_clinical.evaluation.target import targets_of
from medgemma_clinical.evaluation.verdicts import BETTER, TOO_FEW, UNDECIDED, WORSE, sentences

EDGES = [
    ((0.001, 0.2), BETTER),
    ((0.0, 0.2), UNDECIDED),
    ((-0.2, 0.2), UNDECIDED),
    ((-0.2, 0.0), UNDECIDED),
    ((-0.2, -0.001), WORSE),
    ((0.0, 0.0), UNDECIDED),
    ((np.nan, np.nan), TOO_FEW),
]
MODEL = STAGE_NAMES["trajectory"]
AT = verdicts.at_threshold(0.115, "set by the user")
CALIBRATION = {"slope": 0.873, "intercept": -0.117, "oe": 0.95, "ici": 0.029, "ici_ideal": 0.02}


def around(value, **more):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, **more}


def result(auroc, others=None, minority=50):
    """Make the metrics of a model and of ``others``: AUROC and ends of the difference by name."""
    own = {"auroc": {"value": 0.7, "low": auroc[0], "high": auroc[1]}}
    own |= {name: around(value) for name, value in CALIBRATION.items()}
    models = {}
    for name, (value, (low, high)) in (others or {}).items():
        ends = {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}
        reference = "blend" if name == ENSEMBLE else MODEL
        models[name] = {"reference": reference, "auroc": around(value, **ends)}
    counts = {"n": 1234, "patients": 567, "events": 89, "minority_patients": minority}
    plan = {"primary": "blend", "planned": [x for x in ("blend", ENSEMBLE) if x in models]}
    plan["widening"] = 1.0
    return Metrics.from_json({**counts, "model": MODEL, **plan, **own, "models": models})


@pytest.mark.parametrize(("ends", "level"), EDGES)
def test_only_an_interval_that_excludes_the_limit_decides(ends, level):
    assert verdicts.verdict(*ends, 0, 50) == level
    assert verdicts.verdict(*ends, 0, MINORITY_PATIENTS) == level
    assert verdicts.verdict(*ends, 0, MINORITY_PATIENTS - 1) == TOO_FEW
    others = {"blend": (0.71, ends), ENSEMBLE: (0.75, ends)}
    found = sentences(result((0.5 + ends[0], 0.5 + ends[1]), others), AT)
    opposite = {BETTER: WORSE, WORSE: BETTER}.get(level, level)
    assert [finding.verdict for finding in found] == [level, opposite, level, None, None]
    found = sentences(result((0.8, 0.9), others, minority=9), AT)
    assert [finding.verdict for finding in found] == [TOO_FEW, TOO_FEW, TOO_FEW, None, None]


def test_a_difference_is_named_with_its_sign():
    others = {"blend": (0.6, (-0.2, -0.1)), ENSEMBLE: (0.8, (0.1, 0.3))}
    simple, both = (finding.text for finding in verdicts.comparison(result((0.6, 0.8), others)))
    assert "the simple one minus this one -0.150 [-0.200," in simple
    assert "ensemble minus blend +0.200 [+0.100," in both


@pytest.mark.parametrize(
    ("slope", "large", "literal"),
    [
        ((0.9, 1.1), (-0.1, 0.1), "may be"),
        ((0.5, 0.9), (-0.1, 0.1), "may not be"),
        ((1.1, 1.4), (-0.1, 0.1), "may not be"),
        ((0.9, 1.1), (0.1, 0.3), "may not be"),
        ((0.9, 1.1), (-0.3, -0.1), "may not be"),
        ((0.6, 1.4), (-0.1, 0.1), "Too few"),
        ((np.nan, np.nan), (np.nan, np.nan), "Too few"),
    ],
)
@pytest.mark.parametrize("start", ["", EXPECTED])
def test_risks_may_be_taken_literally_where_narrow_intervals_hold_the_ideal(
    slope, large, literal, start
):
    """Of a recalibrated model these are the ones that are expected."""
    metrics = result((0.7, 0.9))
    if start:
        metrics.table.loc[(MODEL, f"{start}ici"), "value"] = 0.01
    for name, ends in (("slope", slope), ("intercept", large)):
        metrics.table.loc[(MODEL, f"{start}{name}"), ["low", "high"]] = ends
    text = sentences(metrics, AT)[1].text
    assert literal in text
    assert ("recalibrated" in text) == bool(start)


def test_each_of_several_targets_has_its_calibration_unless_it_is_not_measured():
    first, second = targets_of(CompetingEvents(("death",), (24.0, 72.0)))
    metrics = result((0.7, 0.9))
    names = {name: second.key(name) for name in CALIBRATION}
    more = metrics.table.loc[pd.IndexSlice[:, [*CALIBRATION]], :].rename(names, level="metric")
    metrics = replace(metrics, table=pd.concat([metrics.table, more]))
    metrics.table.loc[(MODEL, "slope"), "high"] = 1.1
    metrics.table.loc[(MODEL, "intercept"), "high"] = 0.1
    texts = [x.text for x in sentences(metrics, AT, targets=[first, second])]
    assert [first.title in text for text in texts] == [True, True, False, True]
    assert [second.title in text for text in texts] == [False, False, True, False]
    assert "may not be" in texts[2]
    assert "may not be" not in texts[1]
    metrics.table.loc[(MODEL, "oe_72h"), "value"] = np.nan
    texts = [x.text for x in sentences(metrics, AT, targets=[first, second])]
    assert texts[2].startswith("Not measured")


def test_the_decision_stands_in_counts_where_some_row_is_predicted_positive():
    metrics = result((0.7, 0.9))
    shares = {"positives": 0.256, "ppv": 0.412, "sensitivity": 0.803}
    more = pd.DataFrame({"value": shares}).rename_axis("metric")
    table = pd.concat([metrics.table, pd.concat({MODEL: more}, names=["model"])])
    text = sentences(replace(metrics, table=table), AT, "stays")[1].text.replace("\xa0", " ")
    numbers = "11.5 %", "25.6 of 100 stays", "41.2 %", "80.3 %"
    assert [text.index(x) for x in numbers] == sorted(text.index(x) for x in numbers)
    table.loc[(MODEL, "positives"), "value"] = 0
    assert len(sentences(replace(metrics, table=table), AT)) == len(sentences(metrics, AT))


def test_a_sentence_is_left_out_where_its_rows_are_missing():
    names = [name for name in STAGE_NAMES.values() if name != MODEL]
    stages = dict.fromkeys(names, (0.9, (0.1, 0.2)))
    assert len(sentences(result((0.6, 0.8)), AT)) == 3
    assert len(sentences(result((0.6, 0.8), stages), AT)) == 3
    assert (
        len(sentences(result((0.6, 0.8), {**stages, "last value": (0.6, (-0.2, -0.1))}), AT)) == 3
    )
    assert len(sentences(result((0.6, 0.8), {**stages, "blend": (0.6, (-0.2, -0.1))}), AT)) == 4


@pytest.mark.parametrize("used", [ENSEMBLE, "last value"])
def test_a_model_that_is_not_in_the_ensemble_has_no_sentence_on_it(used):
    others = {} if used == ENSEMBLE else {ENSEMBLE: (0.75, (0.1, 0.2))}
    metrics = result((0.6, 0.8), others)
    assert len(sentences(metrics, AT)) == 3 + len(others)
    metrics = replace(metrics, table=metrics.table.rename({MODEL: used}))  # by --use
    assert len(sentences(metrics, AT)) == 3


def test_the_sentence_and_the_verdict_are_of_the_planned_baseline_alone():
    """The best of several equal baselines would seem better than the model too often."""
    best, ends = "gradient boosting", (0.1, 0.2)
    others = {"blend": (0.6, (-0.1, 0.1)), best: (0.9, ends), ENSEMBLE: (0.9, ends)}
    metrics = result((0.6, 0.8), others)
    assert verdicts.primary_baseline(metrics) == "blend"
    assert best not in " ".join(map(str, sentences(metrics, AT)))
    assert verdicts.multiplicity_sentence(metrics)
    assert not verdicts.multiplicity_sentence(result((0.6, 0.8), {"blend": (0.6, ends)}))
    alone = replace(metrics, primary=metrics.models[0])  # --use blend
    assert verdicts.primary_baseline(alone) is None


@pytest.mark.parametrize(
    ("low", "minority", "primary", "expected"),
    [
        (0.501, MINORITY_PATIENTS, "blend", "blend"),
        (0.5, MINORITY_PATIENTS, "blend", None),
        (0.501, MINORITY_PATIENTS - 1, "blend", None),
        (np.nan, MINORITY_PATIENTS, "blend", None),
        (0.501, MINORITY_PATIENTS, None, None),
    ],
)
def test_the_planned_comparison_is_above_chance_as_its_interval_is(
    low, minority, primary, expected
):
    others = {"blend": (0.7, (-0.1, 0.1)), "last value": (0.9, (0.1, 0.2))}
    metrics = replace(result((0.6, 0.8), others, minority), primary=primary)
    metrics.table.loc[("blend", "auroc"), "low"] = low
    assert verdicts.planned_above_chance(metrics) == expected


def test_numbers_are_written_with_their_interval_or_a_dash():
    assert verdicts.interval_text(0.7042, 0.6317, 0.77).split() == ["0.704", "[0.632,", "0.770]"]
    assert verdicts.interval_text(0.7, 0.6, 0.8, "+.1f", 100).split()[1:] == ["[+60.0,", "+80.0]"]
    assert verdicts.interval_text(0.7, np.nan, np.nan) == "0.700"
    assert verdicts.interval_text(np.nan, 0.1, 0.2) == verdicts.NO_VALUE


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.07083, "7.1"), (0.2, "20.0"), (0.00456, "0.46"), (0.01, "1.0"), (0, "0.0"), (1, "100.0")],
)
def test_a_percentage_has_one_decimal_and_two_digits_at_least(share, text):
    assert verdicts.percent(share).split() == [text, "%"]
    assert verdicts.percent(np.nan) == verdicts.NO_VALUE
