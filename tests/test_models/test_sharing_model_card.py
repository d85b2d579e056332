"""The model card: a header that the hub's library reads, figures, and no markup from data."""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

import medgemma_trainer as trainer
from language_models import classifier_and_writer, data_of, llm_config, patients, stage1_for
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.models.checkpoints import LLM_STAGES, check_config
from medgemma_clinical.models.sharing.model_card import (
    RANDOM_MODEL,
    RANDOM_MODEL_UNREAD,
    card_figures,
    code,
    model_card,
    random_model_notice,
)
from medgemma_clinical.models.sharing.terms import GEMMA_NOTICE, HAI_DEF_NOTICE

DATA = data_of(patients())
PLACE = Path("best")
DECISION = {"slope": 1.0, "intercept": 0.0, "threshold": 0.31412}
HUB = {"base_sha256": None, "base_revision": "0" * 40}
HOSTILE = (
    "<script>alert(1)</script>",
    "[link](https://evil.example) ![picture](https://evil.example/p.png)",
    "--- | a | b \\| c ` `` ``` {title} {0} %s $$x$$",
    "`code` **bold** _it_ # heading &lt; @jane www.evil.example",
    "``",
    "\\",
    " ` ",
)


def figure(value):
    return dict.fromkeys(("value", "low", "high"), value)


def metrics(value=0.5, events=20, **more):
    """Content of ``metrics.json``, with more in it than a card shows."""
    names = ("auroc", "auprc", "accuracy", "brier", "log_loss", "sensitivity")
    part = {"n": 60, "events": events, **{name: figure(value) for name in names}}
    slopes = {name: figure(value) for name in ("calibration_slope", "calibration_intercept")}
    return {
        "stage": "trajectory",
        "selected_epoch": 3,
        "threshold": 0.1,
        "calibration": {"method": "none"},
        "validation": {**part, **slopes},
        "test": {**part, **slopes},
        "baselines": {"last value": {"validation": part, "test": part}},
        "differences": {"last value": {"validation": part, "test": part}},
        **more,
    }


def stage1_card_config(**more):
    model = stage1_for(DATA.dataset, members=2)
    return {"stage": "trajectory", **trainer.stage1_config(model), **DATA.description(), **more}


@pytest.fixture(scope="module")
def written():
    """What a finished stage 3 on MedGemma says."""
    config = llm_config(classifier_and_writer().writer, "generative", DATA)
    reports = {
        "reports": 40,
        "numbers_stated": 1200,
        "abnormal_values": 60,
        "invented": 12,
        "parse_share": Estimate(0.975, 0.9, 0.99).to_json(),
        "true_number_share": Estimate(0.5, 0.4, 0.6).to_json(),
        "abnormal_named_share": Estimate(0.6, 0.5, 0.7).to_json(),
        "abnormal_nameable_share": Estimate(0.9, 0.8, 0.95).to_json(),
        "right_trend_share": Estimate(0.7, 0.6, 0.8).to_json(),
        "inventing_share": Estimate(0.2, 0.1, 0.3).to_json(),
    }
    more = {"base_model": "google/medgemma-4b-pt", "decision": DECISION, **HUB}
    figures = card_figures(metrics(reports=reports))
    plain = json.loads(json.dumps({**config, **more, "figures": figures}))
    return plain


# ------------------------------------------------------------------ the header


def header(config):
    """Return the header as the hub's library reads it."""
    card = ModelCard(model_card(config))
    assert card.text.lstrip().startswith("# ")
    facts = card.data.to_dict()
    return facts


def test_the_header_of_stage_1_names_no_base_model():
    assert header(stage1_card_config()) == {
        "license": "apache-2.0",
        "library_name": "pytorch",
        "pipeline_tag": "tabular-classification",
        "tags": ["clinical", "time-series", "irregular-time-series", "risk-prediction"],
    }


def test_the_header_of_a_derivative_of_medgemma_names_its_terms(written):
    facts = header(written)
    assert "pipeline_tag" not in facts
    tags = facts.pop("tags")
    assert {"medgemma", "lora", "soft-prompt", "time-series"} <= {*tags}
    terms = "https://developers.google.com/health-ai-developer-foundations/terms"
    assert facts == {
        "license": "other",
        "license_name": "health-ai-developer-foundations",
        "license_link": terms,
        "library_name": "peft",
        "base_model": "google/medgemma-4b-pt",
        "base_model_relation": "adapter",
    }
    assert (
        header({**written, "stage": "classification"})["pipeline_tag"] == "tabular-classification"
    )


@pytest.mark.parametrize(
    ("changes", "base", "terms"),
    [
        ({"base_model": "google/gemma-3-270m"}, "google/gemma-3-270m", "gemma"),
        ({"base_model": "1e5"}, "1e5", "other"),
        ({"base_model": "null"}, "null", "other"),
        ({"base_model": "gemma", "base_sha256": "0" * 64}, None, "other"),
        ({"base_model": "x: [y", "base_sha256": "0" * 64}, None, "other"),
        ({"base_model": "tiny", "base_revision": None}, None, "apache-2.0"),
        ({"base_model": "google/gemma-3-4b-it", "base_weights": "random"}, None, "gemma"),
    ],
)
def test_a_base_model_is_named_where_it_lies_on_the_hub(changes, base, terms, written):
    facts = header({**written, **changes})
    assert (facts.get("base_model"), facts["license"]) == (base, terms)
    assert "medgemma" not in facts["tags"]


# ------------------------------------------------------------------ the text


def test_a_card_says_what_a_reader_must_know(written):
    card = model_card(written)
    for text in (
        DATA.dataset.question,
        "`Anion gap (mEq/L)`",
        "`static_bmi [kg/m2]`, `static_admissions`",
        "Base model: `google/medgemma-4b-pt`",
        "0" * 40,
        "Not a medical device, not for clinical use.",
        "- Training part: 8 rows of 8 patients, 50.0 % with the event",
        "- Test part: 60 rows, 20 with the event",
        "| This model | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] |",
        "| `last value` | 0.500 [0.500, 0.500] |",
        "Calibration on the test part: slope 0.500 [0.500, 0.500], intercept 0.500",
        "Recalibration: none",
        "Probability from which on the event is predicted: 0.3141, chosen on the validation part",
        "beside stage 1: 1, chosen on the validation part",
        "40 of the test part, 97.5 [90.0, 99.0] % of the expected form; of the 1,200 numbers",
        "that they state 50.0 [40.0, 60.0] % are the patient's; 20.0 [10.0, 30.0] % of the reports",
        "state something that the row does not hold; 60.0 [50.0, 70.0] % of the abnormal values",
        "are named; 70.0 [60.0, 80.0] % of the trends are right",
        HAI_DEF_NOTICE,
    ):
        assert text in card, text
    assert GEMMA_NOTICE in model_card({**written, "base_model": "google/gemma-3-270m"})


def test_a_card_tells_controls_and_the_weight_of_the_language_model(written):
    assert "control" not in model_card(written)
    other = {"base_weights": "random", "shuffled": True, "stage1_logit": False}
    control = model_card({**written, **other})
    assert "with random weights in place of its own, a control" in control
    assert "with soft tokens of other patients, a control" in control
    assert "beside stage 1: stage 1's logit is not added" in control
    none = model_card({**written, "residual_weight": 0.0})
    assert "beside stage 1: 0: the language model adds nothing here" in none


def test_a_run_with_the_random_model_has_a_notice(written):
    random = {**written, "base_model": "tiny", "base_sha256": None}
    assert random_model_notice(random) == RANDOM_MODEL
    assert random_model_notice({**random, "base_sha256": "c0ffee"}) == "", "a folder of this name"
    assert random_model_notice(written, "tiny") == ""
    assert random_model_notice({"stage": "trajectory"}, "tiny") == RANDOM_MODEL_UNREAD
    assert random_model_notice({"stage": "trajectory"}) == ""


def test_a_model_of_text_alone_has_no_soft_tokens(written):
    alone = {"encoder": None, "members": 0, "num_prefix_tokens": 0, "stage1_logit": False}
    card = model_card({**written, **alone})
    assert "a language model reads a text about a patient" in card
    assert "Stage 1:" not in card
    assert "soft-prompt" not in card


def test_a_run_that_is_not_finished_has_no_figures(written):
    config = {key: value for key, value in written.items() if key not in ("figures", "decision")}
    card = model_card(config)
    assert "The run is not finished" in card
    assert "AUROC" not in card
    assert "Test part" not in card
    assert "not finished" not in model_card(written)


def test_figures_that_are_hidden_stay_hidden(written):
    figures = card_figures(metrics(None, None))
    mix = {k: v for k, v in written["case_mix"].items() if k not in ("prevalence", "patients")}
    card = model_card({**written, "figures": figures, "case_mix": mix})
    assert "| This model | \N{EN DASH} | \N{EN DASH} | \N{EN DASH} |" in card
    assert "- Test part: 60 rows, number of events not shown" in card
    assert "- Training part: 8 rows\n" in card


def test_recalibration_is_told(written):
    platt = {"method": "platt", "slope": 1.25, "intercept": -0.5, "test before": {}}
    told = model_card({**written, "figures": card_figures(metrics(calibration=platt))})
    assert "by Platt's method on the validation part, slope 1.250, intercept -0.500" in told


def test_many_names_are_cut(written):
    facts = [f"word {k}" for k in range(1234)]
    card = model_card({**written, "inputs": {"facts": facts, "prediction_time": False}})
    assert "`word 49` and 1,184 more" in card
    assert "word 50`" not in card


@pytest.mark.parametrize("repo_id", [None, "jane/anion-gap"])
def test_the_commands_of_a_card_are_the_programs(repo_id, written):
    card = model_card(written, repo_id)
    place = re.search(r"from_pretrained\((.+)\)", card)
    assert place is not None
    assert json.loads(place[1]) == (repo_id or "FOLDER")
    found = re.search(r"python medgemma_trainer.py (.*\\\n.*)\n```", card)
    assert found is not None
    trainer.build_parser().parse_args(shlex.split(found[1].replace("\\\n", " ")))
    assert ("hf download jane/anion-gap --local-dir FOLDER" in card) == (repo_id is not None)


# ------------------------------------------------------------------ markup from data


def outside_of_code(text):
    """Split Markdown into what may be markup, and the texts of its code, as CommonMark does."""
    plain, spans, at = [], [], 0
    runs = list(re.finditer("`+", text))
    while runs:
        start = runs.pop(0)
        ends = [k for k, run in enumerate(runs) if len(run[0]) == len(start[0])]
        if ends:
            end = runs[ends[0]]
            del runs[: ends[0] + 1]
            plain.append(text[at : start.start()])
            inside = text[start.end() : end.start()]
            padded = inside[:1] == inside[-1:] == " " and inside.strip()
            spans.append(inside[1:-1] if padded else inside)
            at = end.end()
    return "".join([*plain, text[at:]]), spans


@given(st.text(min_size=1).filter(str.isprintable))
def test_a_text_as_code_is_the_text(text):
    plain, spans = outside_of_code(f"a {code(text)} b `c`")
    assert plain == "a  b "
    stripped = text[:1] == text[-1:] == " " and text.strip()
    assert spans == [text[1:-1] if stripped else text, "c"]


@pytest.mark.parametrize("text", HOSTILE)
def test_words_of_data_break_neither_header_nor_text(text, written):
    config = copy.deepcopy(written)
    config |= {"question": text, "outcome": text, "features": [text], "units": [text]}
    config |= {"dataset": text, "inputs": {"facts": [text, text], "prediction_time": False}}
    config |= {"base_model": text, "base_sha256": "0" * 64}
    config["encoder"] = {**config["encoder"], "dynamics": text}
    config["figures"]["baselines"] = {text: config["figures"]["baselines"]["last value"]}
    check_config(PLACE, config, LLM_STAGES)
    same = {**written, "base_model": "x", "base_sha256": "0" * 64}
    assert header(config) == header(same)
    (plain, spans), (expected, _) = (
        outside_of_code(ModelCard(model_card(each)).text) for each in (config, same)
    )
    assert plain == expected
    assert sum(text.strip() in span for span in spans) >= 8
    rows = [line for line in model_card(config).splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


# ------------------------------------------------------------------ figures in a checkpoint


def test_figures_are_picked(written):
    figures = written["figures"]
    assert figures.keys() == {"validation", "test", "baselines", "calibration", "reports"}
    assert figures["test"].keys() == {
        *("n", "events", "auroc", "auprc", "brier"),
        *("calibration_slope", "calibration_intercept"),
    }
    baseline = figures["baselines"]["last value"]["test"]
    assert baseline.keys() == {"n", "events", "auroc", "auprc", "brier"}


def test_a_card_is_silent_on_abnormal_values_that_nobody_judged(written):
    config = copy.deepcopy(written)
    reports = config["figures"]["reports"]
    for name in ("true_number_share", "abnormal_named_share", "right_trend_share"):
        reports[name] = Estimate(None).to_json()
    reports |= {"abnormal_values": None, "numbers_stated": 0}
    card = model_card(config)
    assert "20.0 [10.0, 30.0] % of the reports state something that the row does not hold\n" in card
    assert "numbers that they state" not in card
    assert "abnormal" not in card
