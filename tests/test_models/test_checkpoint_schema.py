"""Facts of a checkpoint: each key has a type and bounds, and a wrong value is one short line."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import medgemma_trainer as trainer
from language_models import classifier_and_writer, data_of, llm_config, patients
from medgemma_clinical.files import InputError
from medgemma_clinical.models.checkpoint_schema import (
    LANGUAGE_MODEL,
    LORA_TARGETS,
    Rule,
    check_adapter,
    check_config,
    check_data,
)
from medgemma_clinical.models.checkpoints import LLM_STAGES
from medgemma_clinical.models.language_model import DTYPES

PLACE = Path("best")
ENDLESS = 10**5000
"""Python refuses to write a number of so many digits."""


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """What a checkpoint of stage 3 says."""
    model = classifier_and_writer().writer
    config = llm_config(model, "generative", data_of(patients()))
    rule = {"slope": 1.5, "intercept": -0.2, "threshold": 0.3}
    plain: dict[str, Any] = json.loads(json.dumps({**config, "decision": rule}))
    return plain


def changed(facts: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy with one entry changed; ``a.b`` is an entry of a section."""
    facts = copy.deepcopy(facts)
    section, _, name = key.rpartition(".")
    (facts[section] if section else facts)[name] = value
    return facts


def refusal(config: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_config(PLACE, config, LLM_STAGES)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    assert text.startswith("best: damaged: ")
    return text


def accepts(config: Any, stages: tuple[str, ...] = LLM_STAGES) -> bool:
    try:
        check_config(PLACE, config, stages)
    except InputError:
        return False
    return True


def test_what_the_program_writes_is_accepted(written: dict[str, Any]) -> None:
    assert accepts(written)
    assert accepts({**written, "stage": "trajectory"}, ("trajectory",))
    assert accepts({**written, "further": ENDLESS}), "nothing reads that key"
    alone = {"encoder": None, "members": 0, "num_prefix_tokens": 0}
    assert accepts({**written, **alone})
    own = {"name": "own", "width": 3, "kind": "wide", "fast": True}
    assert accepts({**written, "encoder": own})
    assert not accepts({**written, "encoder": {**own, "fast": [True]}})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("stage", "trajectory", "'trajectory': expected one of classification, generative"),
        ("num_prefix_tokens", 10**9, "1000000000: expected a whole number from 0 to 4096"),
        ("num_prefix_tokens", ENDLESS, "(an endless number): expected a whole number from 0 to"),
        ("num_prefix_tokens", True, "True: expected a whole number from 0 to 4096"),
        ("num_prefix_tokens", 8.0, "8.0: expected a whole number"),
        ("num_prefix_tokens", -1, "-1: expected a whole number from 0 to 4096"),
        ("residual_weight", 1.1, "1.1: expected a finite number from 0 to 1"),
        ("stage1_logit", 1, "1: expected true or false"),
        ("shuffled", "on", "'on': expected true or false"),
        ("base_weights", "own", "'own': expected one of pretrained, random"),
        ("report_tokens", 10**9, "expected a whole number from 1 to 131072"),
        ("max_text_tokens", 0, "0: expected a whole number from 1 to 1000000000, or null"),
        ("members", 101, "101: expected a whole number from 1 to 32"),
        ("members", True, "True: expected a whole number from 1 to 32"),
        ("inputs.facts", "bmi", "'bmi': expected a list of at most 10000 names"),
        ("inputs.facts", ["a\nb"], "(a list): expected a list of at most 10000 names"),
        ("inputs.prediction_time", 1, "1: expected true or false"),
        ("named", "yes", "'yes': expected true or false"),
        ("quantization", "int8", "expected one of nf4, none"),
        ("precision", ["fp32"], "(a list): expected one of bf16, fp32"),
        ("base_model", "../evil", "'../evil': expected the id of a model of the hub"),
        ("base_model", "/evil", "'/evil': expected the id of a model of the hub"),
        ("base_revision", "main", "'main': expected 40 hexadecimal digits, or null"),
        ("base_sha256", "0" * 63, "expected 64 hexadecimal digits, or null"),
        ("data_sha256", "Z" * 64, "...: expected 64 hexadecimal digits"),
        ("rows_sha256", 3, "3: expected 64 hexadecimal digits"),
        ("outcome", "\x1b]0;owned\x07", r"'\x1b]0;owned\x07': expected a printable text"),
        ("question", "a" * 10**6, "...: expected a printable text of at most 2000 characters"),
        ("features", [], "(a list): expected a list of 1 to 10000 values"),
        ("features", "Anion gap", "'Anion gap': expected a list"),
        ("units", ["mEq/L", "mEq/L"], "expected one for each of the features"),
        ("case_mix", {"age_median": math.nan}, "(a dict): expected at most 100 finite numbers"),
        ("case_mix", {"rows": ENDLESS}, "(a dict): expected at most 100 finite numbers"),
        ("reading", [], "(a list): expected an object"),
        ("reading.max_len", -1, "-1: expected a whole number from 1 to 1000000000"),
        ("reading.label_column", 3, "3: expected a printable text of at most 200 characters"),
        ("reading.more", [1], "(a list): expected true, false, a finite number or a printable"),
        ("prompts.latest", 1.5, "1.5: expected a whole number"),
        ("prompts.series", "every", "'every': expected one of all, main, last, none"),
        ("prompts.more", 1, "1: expected no such key"),
        ("encoder", 7, "7: expected an object"),
        ("encoder.name", None, "None: expected a printable text"),
        ("encoder.hidden_dim", 10**6, "expected a whole number from 1 to 1024"),
        ("encoder.input_dim", 2, "2: expected a whole number from 1 to 1"),
        ("encoder.time_scale", math.inf, "inf: expected a finite number above 0"),
        ("encoder.time_scale", 10**400, "(an endless number): expected a finite number above 0"),
        ("encoder.dynamics", 1, "1: expected a printable text"),
        ("encoder.rtol", 1e-30, "1e-30: expected a finite number from 1e-09 to 1"),
        ("encoder.more", {}, "(a dict): expected true, false, a finite number or a printable"),
        ("decision", None, "None: expected an object"),
        ("decision.slope", -1.0, "-1.0: expected a finite number above 0"),
        ("decision.slope", ENDLESS, "(an endless number): expected a finite number above 0"),
        ("decision.intercept", math.nan, "nan: expected a finite number"),
        ("decision.threshold", "0.5", "'0.5': expected a finite number"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_a_fact_of_another_type_or_out_of_bounds_is_one_line(
    written: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    text = refusal(changed(written, key, value))
    assert f"damaged: {key} " in text
    assert expected in text


@pytest.mark.parametrize(
    "key", ["num_prefix_tokens", "encoder", "members", "inputs", "reading", "prompts", "question"]
)
def test_a_missing_fact_is_named(written: dict[str, Any], key: str) -> None:
    text = refusal({name: value for name, value in written.items() if name != key})
    missing = {"encoder": "encoder is missing"}
    assert text.endswith(missing.get(key, f"{key} is missing"))


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_a_configuration_that_is_no_object_is_refused(config: Any) -> None:
    assert "configuration " in refusal(config)


def test_text_alone_has_no_encoder_and_no_soft_token(written: dict[str, Any]) -> None:
    assert "num_prefix_tokens 4: expected a whole number from 0 to 0" in refusal(
        {**written, "encoder": None, "members": 0}
    )
    assert "members 1: expected a whole number from 0 to 0" in refusal({**written, "encoder": None})


def test_a_merged_model_says_from_what_and_has_a_hash_of_its_own(written: dict[str, Any]) -> None:
    keys = ("base_model", "base_sha256", "base_revision", "quantization", "precision")
    merged = {**written, "base_sha256": "0" * 64, "base_model": "language_model"}
    merged["merged_from"] = {key: written[key] for key in keys}
    assert accepts(merged)
    assert refusal({**merged, "merged_from": True}).endswith("merged_from True: expected an object")
    wrong = changed(merged, "merged_from.quantization", "int8")
    assert "merged_from.quantization 'int8': expected one of nf4, none" in refusal(wrong)
    assert "base_sha256 None: expected 64 hex" in refusal({**merged, "base_sha256": None})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("r", 10**9, "1000000000: expected a whole number from 1 to 1024"),
        ("lora_alpha", 10**400, "(an endless number): expected a whole number"),
        ("lora_alpha", math.inf, "inf: expected a whole number from 1 to 1000000000"),
        ("peft_type", "PREFIX_TUNING", "expected one of LORA"),
        ("target_modules", ["lm_head"], "(a list): expected the projections down_proj, gate"),
    ],
)
def test_an_adapter_is_the_one_that_the_program_writes(key: str, value: Any, expected: str) -> None:
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "further": ENDLESS}
    adapter["target_modules"] = sorted(LORA_TARGETS)
    check_adapter(PLACE, adapter)
    with pytest.raises(InputError, match=re.escape(expected)):
        check_adapter(PLACE, {**adapter, key: value})


def test_data_that_no_checkpoint_may_describe_are_named_by_their_file() -> None:
    description = data_of(patients()).description()
    check_data("data.csv", description)
    with pytest.raises(InputError, match=r"^data\.csv: question 'a\\nb': expected a printable"):
        check_data("data.csv", {**description, "question": "a\nb"})


def test_bounds_are_those_of_the_flags() -> None:
    parser = trainer.build_parser()
    for flag, most in (
        ("--num_prefix_tokens", 4096),
        ("--lora_rank", 1024),
        ("--members", 32),
        ("--max_len", 10**9),
    ):
        parser.parse_args([flag, str(most)])
        with pytest.raises(SystemExit):
            parser.parse_args([flag, str(most + 1)])
    precision = LANGUAGE_MODEL["precision"]
    assert isinstance(precision, Rule)
    assert all(map(precision.holds, DTYPES))
