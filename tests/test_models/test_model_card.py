"""Model card and facts: a header for the hub, a schema, no small counts, no markup of data."""

import copy
import difflib
import json
import re
import shlex
from functools import cache

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import time_rows
from chai_card import read_facts
from language_models import classifier_and_writer, data_of, llm_config, patients, stage1_for
from medgemma_clinical import __version__
from medgemma_clinical.commands.predict import FLAGS
from medgemma_clinical.evaluation.metrics_table import evaluate
from medgemma_clinical.models import checkpoints
from medgemma_clinical.models.checkpoints import describe_data
from medgemma_clinical.models.decoders import licence, terms_of
from medgemma_clinical.models.model_card import (
    built_in_notice,
    built_in_sentence,
    code,
    describe_recommended,
    model_card,
    shareable,
    weight_0_sentence,
)
from medgemma_clinical.models.model_facts import model_facts
from medgemma_clinical.models.terms import GEMMA_NOTICE, HAI_DEF_NOTICE
from shared_metrics import metric, run_metrics
from stages import parsed

HUB, FOLDER = {"base_sha256": None, "base_revision": "0" * 40}, {"base_sha256": "0" * 64}


@cache
def data():
    return data_of(patients())


HOSTILE = (
    "<script>alert(1)</script>",
    "[link](https://evil.example) ![picture](https://evil.example/p.png)",
    "--- | a | b \\| c ` `` ``` {title} {{ 7 * 7 }} {% raw %} %s $$x$$",
    "`code` **bold** _it_ # heading &lt; @jane www.evil.example",
    "two\n\n# lines",
    "``",
    "\\",
    "",
)


def stage1_config(**more):
    model = stage1_for(data().dataset, members=2)
    return {
        "stage": "trajectory",
        **checkpoints.stage1_config(model),
        **describe_data(data()),
        **more,
    }


@pytest.fixture(scope="module")
def finished():
    """What a finished stage 3 on MedGemma says."""
    config = llm_config(classifier_and_writer().writer, "generative", data())
    reports = {"reports": 40, "numbers_stated": 1200, "invented": 12}
    shares = ("right_answer", "parse", "true_number", "right_trend")
    reports |= {f"{name}_share": metric(0.5) for name in shares}
    more = {
        "base_model": "google/medgemma-4b-pt",
        "decision": {"label": {"multiplier": 1, "shift": 0, "threshold": 0.31412}},
        **HUB,
    }
    more["case_mix"] = {"rows": 640.0, "patients": 600.0, "prevalence": 0.25}
    more["best_model"] = "last value"
    series = ["Anion gap [mEq/L]=AG", "Anion gap [mEq/L]=50868", "Lactate=LAC"]
    arguments = {"window_hours": 24.0, "series": series}
    more["recipe"] = {"made_by": "dataset_format.py from_long", "arguments": arguments}
    more["metrics"] = run_metrics(reports={**reports, "inventing_share": metric(0.3)})
    return json.loads(json.dumps({**config, **more}))


def metrics_of_times():
    """What metrics.json says of risks by two horizons, with and without transplants."""
    rows = time_rows.make_times()
    targets = time_rows.weighed_targets(rows)
    part = evaluate(rows, 0, [0.3] * len(targets), targets=targets).to_json()
    parts = {"validation": part, "test": part, "targets": [x.to_json() for x in targets]}
    return run_metrics(**parts)


@pytest.fixture(scope="module")
def stages_1():
    """What a finished stage 1 says, of a label and of times."""
    rule = {"multiplier": 1.0, "shift": 0.0, "threshold": 0.3}
    rules = {target.name: rule for target in time_rows.TARGETS}
    own = {"data_sha256": "0" * 64}
    label = stage1_config(decision={"label": rule}, metrics=run_metrics(), **own)
    times = stage1_config(decision=rules, metrics=metrics_of_times(), **own)
    return label, {**times, **time_rows.OUTCOME.config}


def header(config):
    """The header as the hub's library reads it."""
    card = ModelCard(model_card(config))
    assert card.text.lstrip().startswith("# ")
    return card.data.to_dict()


def facts_of(config):
    """The facts that were checked by the schema."""
    return read_facts(model_facts(config))


# ------------------------------------------------------------------ header and terms


@pytest.mark.parametrize(
    ("changes", "named", "key", "notices"),
    [
        ({"base_model": "google/medgemma-4b-pt"}, True, "other", [HAI_DEF_NOTICE]),
        ({"base_model": "jane/MedGemma-tuned"}, True, "other", [HAI_DEF_NOTICE]),
        ({"base_model": "medgemma-4b-pt", **FOLDER}, False, "other", [HAI_DEF_NOTICE]),
        ({"base_model": "google/gemma-3-270m"}, True, "gemma", [GEMMA_NOTICE]),
        ({"base_model": "x/gemma-3", "base_weights": "random"}, False, "gemma", [GEMMA_NOTICE]),
        ({"base_model": "1e5"}, True, "other", [HAI_DEF_NOTICE, GEMMA_NOTICE]),
        ({"base_model": "null"}, True, "other", [HAI_DEF_NOTICE, GEMMA_NOTICE]),
        ({"base_model": "gemma", **FOLDER}, False, "other", [HAI_DEF_NOTICE, GEMMA_NOTICE]),
        ({"base_model": "demo", **FOLDER}, False, "other", [HAI_DEF_NOTICE, GEMMA_NOTICE]),
        ({"base_model": "demo", "base_revision": None}, False, "apache-2.0", []),
        ({"base_model": None}, False, "apache-2.0", []),
    ],
)
def test_the_terms_are_those_of_the_base_model(changes, named, key, notices, finished):
    config = {**finished, **changes}
    facts = header(config)
    assert facts.get("base_model") == (changes["base_model"] if named else None)
    assert facts["license"] == key
    for notice in (HAI_DEF_NOTICE, GEMMA_NOTICE):
        for text in (terms_of(config).notice, licence(config), model_card(config)):
            assert (notice in text) == (notice in notices)


# ------------------------------------------------------------------ the text


def test_cards_are_approved(finished, stages_1, assert_approved):
    """Of a finished stage 3, the lines that other models change, and the card of a stage 1.

    Of times to events, the lines that differ from those of a label.
    """
    finished = {**finished, "data_sha256": "0" * 64}
    alone = {"encoder": None, "members": 0, "num_prefix_tokens": 0, "stage1_logit": False}
    others = [{"base_weights": "random"}, {"shuffled": True, "stage1_logit": False}, alone]
    others += [{"residual_weight": 0.0}, {"stage": "classification"}, {"merged_from": {}}]
    text = [card := model_card(finished)]
    for changes in others:
        own = model_card({**finished, **changes}).splitlines()
        lines = difflib.ndiff(card.splitlines(), own)
        text += [f"==== {changes}", *(line for line in lines if line[0] in "+-")]
    parts = {k: x for k, x in finished["metrics"].items() if k not in ("validation", "test")}
    everyone = {**finished, "metrics": {**parts, "folds": finished["metrics"]["test"]}}
    lines = difflib.ndiff(card.splitlines(), model_card(everyone).splitlines())
    text += ["==== of all patients", *(line for line in lines if line[0] in "+-")]
    lines = difflib.ndiff(*(model_card(config).splitlines() for config in stages_1))
    text += ["==== of times to events", *(line for line in lines if line[0] in "+-")]
    text += ["==== stage 1, unfinished", model_card(stage1_config(data_sha256="0" * 64))]
    assert_approved("model_card", "\n".join(text).replace(__version__, "VERSION"))


def test_facts_are_approved(finished, stages_1, assert_approved):
    text, (label, times) = [], (dict(facts_of(config)) for config in stages_1)
    differ = [f"{key}: {x}" for key, x in times.items() if x != label[key]]
    unfinished = stage1_config(data_sha256="0" * 64)
    for config in (finished | {"data_sha256": "0" * 64}, unfinished):
        text += [f"==== {config['stage']}", *(f"{k}: {x}" for k, x in facts_of(config))]
    text += ["==== of times to events, a line a kind", *differ]
    assert_approved("model_facts", "\n".join([*text, ""]).replace(__version__, "VERSION"))


@pytest.mark.parametrize("stage", ["trajectory", "classification", "generative"])
def test_facts_of_each_stage_with_and_without_metrics_are_valid(stage, finished):
    for part in (["test", "validation"], ["folds"], []):
        metrics = dict.fromkeys(part, finished["metrics"]["test"])
        config = {**finished, "stage": stage, "metrics": {**finished["metrics"], **metrics}}
        for name in {"test", "validation"}.difference(part):
            del config["metrics"][name]
        facts = dict(facts_of(config))
        kind = facts["KeyMetrics/UsefulnessUsabilityEfficacy/TestType"]
        assert ("cross-validation" in kind) == ("folds" in part)
        assert "TrustIngredients/AISystemFacts/FoundationModels" in facts, "has a base model"
        assert facts["BasicInfo/ModelDeveloper"].startswith("To be completed by the owner")
    facts_of({key: x for key, x in finished.items() if key not in ("metrics", "decision")})
    with pytest.raises(Exception, match="ReleaseInfo"):
        read_facts(model_facts(finished).replace("ReleaseInfo>", "Release>"))


def test_weight_0_is_a_sentence_of_a_page(finished):
    assert "each risk is that of stage 1" in weight_0_sentence({**finished, "residual_weight": 0.0})
    assert weight_0_sentence(finished) == ""


def test_a_run_with_the_built_in_model_has_a_notice(finished):
    own = {**finished, "base_model": "demo"}
    assert built_in_notice(own) == built_in_sentence()
    assert built_in_notice({**own, **FOLDER}) == "", "a folder of this name"
    assert built_in_notice(finished) == ""
    assert built_in_notice({"stage": "trajectory"}) == ""


@pytest.mark.parametrize(
    ("best", "events", "primary", "expected"),
    [
        ("blend", 99, "blend", ["blend, the planned comparison", "no model", "fewer than 100"]),
        ("ensemble", 99, "blend", ["ensemble; no model", "fewer than 100"]),
        ("blend", "fewer than 11", "blend", ["blend, the planned comparison", "fewer than 100"]),
        (None, 99, "blend", ["none", "no model", "fewer than 100", "comparison (blend) is not"]),
        (None, "not shown", "blend", ["none", "no model", "fewer than 100"]),
        (None, 99, None, ["none", "no model", "fewer than 100", "no planned comparison"]),
        ("ensemble", 100, "blend", ["ensemble, by the log loss"]),
        ("ensemble", "not shown", "blend", ["ensemble"]),
    ],
)
@pytest.mark.parametrize("part", ["validation", "folds"])
def test_a_model_of_few_events_is_not_recommended_for_its_results(
    part, best, events, primary, expected
):
    metrics = {part: {"events": events, "primary": primary}}
    text = describe_recommended({"best_model": best, "metrics": metrics})
    assert all(words in text for words in expected)
    assert ("no model is recommended for its results" in text) == ("fewer than 100" in expected)


@pytest.mark.parametrize("repo_id", [None, "jane/anion-gap"])
def test_the_commands_of_a_card_are_the_programs(repo_id, finished):
    card = model_card(finished, repo_id)
    place = re.search(r"from_pretrained\((.+)\)", card)
    assert json.loads(place[1]) == (repo_id or "FOLDER")
    found = re.search(r"medgemma-clinical predict (.*\\\n.*)\n```", card)
    parsed(*shlex.split(found[1].replace("\\\n", " ")), table=FLAGS)
    assert ("hf download jane/anion-gap --local-dir FOLDER" in card) == (repo_id is not None)


# ------------------------------------------------------------------ small counts


def test_small_counts_leave_neither_on_the_card_nor_in_the_configuration(finished):
    few = {**finished, "metrics": run_metrics(events=7, subgroups={"women": 7})}
    moves = {"label": [1.5, 0.2]}
    few["metrics"]["calibration"] = {"method": "platt", "moves": moves, "before": metric(0.7)}
    card = model_card(few)
    assert "with the event: fewer than 11" in card
    assert "| This model |" + 4 * " \N{EN DASH} |" + "\n" in card
    assert "25.0 %" not in card, "a drawn part has the same share"
    shared = shareable(few, 11)
    assert not re.search(r"\b(7|0\.7|0\.4|0\.9|597)\b", json.dumps(shared["metrics"]))
    assert shared["metrics"]["threshold"] == few["metrics"]["threshold"]
    assert shared["metrics"]["calibration"] == {"method": "platt"}
    assert shareable(shared, 11) == shared
    assert model_card(shared) == card
    assert shareable(few, 0) == few
    assert "with the event: 7" in model_card(few, min_cell=0)
    facts = model_facts(few)
    assert "with the event: fewer than 11" in facts
    assert not re.search(r"\b(7|0\.7|0\.4|0\.9|25\.0)\b", " ".join(x for _, x in read_facts(facts)))
    assert model_facts(shared) == facts
    assert "with the event: 7<" in model_facts(few, min_cell=0)


def test_few_events_by_one_horizon_hide_its_metrics_alone(stages_1):
    _, times = stages_1
    events = {name: times["metrics"]["test"][name] for name in ("events", "events_72h")}
    card = model_card(times, min_cell=events["events"] + 1)
    shown = {
        target.title: f"| This model | `{target.title}` | 0." in card
        for target in time_rows.TARGETS[:2]
    }
    assert shown == {"death by 24h": False, "death by 72h": True}
    assert "with `death by 24h`: fewer than 54" in card


# ------------------------------------------------------------------ markup from data


@pytest.mark.slow
@given(st.text())
def test_a_text_as_code_is_one_span_on_one_line(text):
    shown = code(text)
    assert shown[0] == shown[-1] == "`"
    assert shown[1:-1]
    assert not re.search("[`|\n\r]", shown[1:-1])


@pytest.mark.parametrize("text", HOSTILE)
def test_words_of_data_break_neither_header_nor_text(text, finished):
    same = {**finished, **FOLDER, "base_model": "x"}
    config = copy.deepcopy(same) | {"question": text, "outcome": text, "dataset": text}
    config |= {"features": [text], "units": [text], "base_model": text, "precision": text}
    config |= {"inputs": {"static": [text, text], "prediction_time": False}}
    config["encoder"] = {**config["encoder"], "dynamics": text}
    models = config["metrics"]["test"]["models"]
    models[text] = models.pop("last value")
    assert header(config) == header(same)
    plain, expected = (re.sub("`[^`\n]+`", "CODE", model_card(each)) for each in (config, same))
    assert plain == expected
    assert len(facts_of(config)) == len(facts_of(same))


def test_facts_hold_no_character_that_xml_forbids(finished):
    name = "a\0\x0b\ud800\uffff<b>&amp;"
    facts = dict(facts_of({**finished, "outcome": name}))
    assert facts["BasicInfo/ModelName"].startswith("a????<b>&amp;,".replace("?", "\ufffd"))
