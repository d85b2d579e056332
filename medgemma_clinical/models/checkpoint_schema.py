"""Facts of a checkpoint: every key that the program reads, its type and its bounds.

A checkpoint may come from anywhere, and what it says decides what is built: how many soft tokens,
how wide an adapter, how long a report. Keys that nothing reads are ignored. Bounds that flags of
the command line share stand here, and the flags take them from here: this module loads no torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from medgemma_clinical.data.texts import SERIES_TEXT
from medgemma_clinical.files import InputError

LARGEST_COUNT = 10**9
"""Largest count that a flag or a checkpoint may name."""

DYNAMICS = ("ode", "decay", "none")
"""What happens to a state between two observations, ``--dynamics``."""

SOFT_PROMPTS = ("on", "off", "shuffled")
"""Whose states become soft tokens, ``--soft_prompt``: the patient's, none, another row's."""

BASE_WEIGHTS = ("pretrained", "random")
"""Weights of the language model before training, ``--base_weights``."""

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
"""Kernels that compute attention, ``--attention``, by transformers' names."""

QUANTIZATIONS = ("nf4", "none")
"""Kinds of weights of the language model, ``--quantization``."""

PRECISIONS = ("bf16", "fp32")
"""Of a checkpoint's language model."""

INT8_REFUSED = (
    "int8 is known to make MedGemma write rubbish (Google-Health/medgemma issue 5), and "
    "bitsandbytes computes it in float16, in which Gemma 3 overflows: use nf4, which takes half "
    "the memory, or none"
)
"""Why ``--quantization int8`` is refused. Source: bitsandbytes 0.50, ``MatMul8bitLt``."""

MEMBERS = (1, 32)
PREFIX_TOKENS = (1, 4096)
LORA_RANK = (1, 1024)
"""Bounds of ``--members``, ``--num_prefix_tokens`` and ``--lora_rank``."""

LONGEST_CONTEXT = 131_072
"""Tokens that a Gemma 3 reads at most. Source: Gemma 3 technical report, 2025."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Projections of a language layer that an adapter changes."""

SCORED_PARTS = ("validation", "test")
"""Parts of the split whose figures a checkpoint holds, under their names in ``metrics.json``."""

RANKING_FIGURES = ("auroc", "auprc", "brier")
CALIBRATION_FIGURES = ("calibration_slope", "calibration_intercept")
"""Figures of a model that a checkpoint holds; of a baseline those of the first line alone."""

MOST_BASELINES = 32
"""Baselines whose figures a checkpoint holds at most."""

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""Name of a model of the hub; the built-in ``tiny`` has the same form."""

SHOWN = 40
"""Characters of a wrong value that an error shows."""


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        expected: in words.
        holds: whether a value is so.
        optional: whether the key may be absent.
    """

    expected: str
    holds: Callable[[Any], bool]
    optional: bool = False


Table = dict[str, Union[Rule, "Table"]]
"""Rules by key; a table within is a section."""


# ------------------------------------------------------------------ rules


def whole(low: int, high: int) -> Rule:
    """Return the rule of whole numbers from ``low`` to ``high``; a bool is none."""
    expected = f"a whole number from {low} to {high}"
    return Rule(expected, lambda value: type(value) is int and low <= value <= high)


def real(low: float, high: float = sys.float_info.max, *, above: bool = False) -> Rule:
    """Return the rule of finite numbers from ``low`` to ``high``, or above ``low``."""
    limit = "" if high == sys.float_info.max else f" to {high:g}"
    start = "" if low == -sys.float_info.max else f" {'above' if above else 'from'} {low:g}"

    def holds(value: Any) -> bool:
        known = type(value) in (int, float) and low <= value <= high  # NaN compares false
        return known and not (above and value == low)

    return Rule(f"a finite number{start}{limit}", holds)


def words(most: int, *, empty: bool = False) -> Rule:
    """Return the rule of printable texts of at most ``most`` characters."""
    return Rule(
        f"a printable text of at most {most} characters",
        lambda value: (
            isinstance(value, str) and int(not empty) <= len(value) <= most and value.isprintable()
        ),
    )


def one_of(*choices: str) -> Rule:
    """Return the rule of a few texts."""
    return Rule(
        f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices
    )


def digits(count: int) -> Rule:
    """Return the rule of a hash of ``count`` hexadecimal digits."""
    form = re.compile(rf"[0-9a-f]{{{count}}}")
    return Rule(
        f"{count} hexadecimal digits",
        lambda value: isinstance(value, str) and form.fullmatch(value) is not None,
    )


def or_null(rule: Rule) -> Rule:
    """Return the rule that also allows null."""
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.holds(value))


def maybe(rule: Rule) -> Rule:
    """Return the rule of a key that may be absent."""
    return Rule(rule.expected, rule.holds, optional=True)


def some(rule: Rule, most: int) -> Rule:
    """Return the rule of a list of one to ``most`` values."""
    return Rule(
        f"a list of 1 to {most} values, each {rule.expected}",
        lambda value: isinstance(value, list) and 1 <= len(value) <= most and all_of(rule, value),
    )


def all_of(rule: Rule, values: Any) -> bool:
    """Return whether a rule holds for each value."""
    return all(map(rule.holds, values))


def _is_case_mix(value: Any) -> bool:
    named = isinstance(value, dict) and len(value) <= 100
    return named and all_of(NAME, value) and all_of(FINITE, value.values())


# ------------------------------------------------------------------ tables

YES_NO = Rule("true or false", lambda value: type(value) is bool)
ABSENT = Rule("null", lambda value: value is None)
NONE = Rule("no such key", lambda value: False)
COUNT, DAYS = whole(1, LARGEST_COUNT), whole(0, LARGEST_COUNT)
FINITE, POSITIVE = real(-sys.float_info.max), real(0, above=True)
TOLERANCE = real(1e-9, 1)
NAME, SHA256 = words(100), digits(64)
PLAIN = or_null(
    Rule(
        "true, false, a finite number or a printable text",
        lambda value: any(rule.holds(value) for rule in (YES_NO, FINITE, NAME)),
    )
)
BASELINES = Rule(
    f"an object of at most {MOST_BASELINES} baselines by name",
    lambda value: (
        isinstance(value, dict) and len(value) <= MOST_BASELINES and all_of(words(100), value)
    ),
)
FACTS = Rule(
    "a list of at most 10000 names",
    lambda value: isinstance(value, list) and len(value) <= 10_000 and all_of(words(200), value),
)

DATA: Table = {
    "dataset": NAME,
    "reading": {
        "max_len": COUNT,
        "label_column": maybe(words(200)),
        "organ": maybe(NAME),
        "landmark_days": maybe(DAYS),
        "horizon_days": maybe(COUNT),
        "transplant": maybe(NAME),
        "dialysis": maybe(or_null(NAME)),
    },
    "features": some(words(200), 10_000),
    "units": some(words(100, empty=True), 10_000),
    "inputs": {"facts": FACTS, "prediction_time": YES_NO},
    "outcome": words(200),
    "question": words(2000),
    "named": YES_NO,
    "data_sha256": SHA256,
    "rows_sha256": SHA256,
    "case_mix": Rule("at most 100 finite numbers by name", _is_case_mix),
}
"""Of ``Data.description``; another data set may read further keys, of plain types."""

ENCODER: Table = {
    "name": NAME,
    "input_dim": maybe(whole(1, 10_000)),
    "hidden_dim": maybe(whole(1, 1024)),
    "time_scale": maybe(POSITIVE),
    "solver": maybe(NAME),
    "rtol": maybe(TOLERANCE),
    "atol": maybe(TOLERANCE),
    "dynamics": maybe(NAME),
}
"""Of an encoder; another encoder has further keywords, of plain types."""

DECISION: Table = {
    "slope": real(0, 1e6, above=True),
    "intercept": real(-1e6, 1e6),
    "threshold": real(-1, 2),  # Youden's may lie outside of the risks
}

FIGURE: Table = dict.fromkeys(("value", "low", "high"), or_null(FINITE))
"""Value and ends of the 95 % interval; null where hidden or not defined."""

BASELINE_PART: Table = {
    "n": COUNT,
    "events": or_null(whole(0, LARGEST_COUNT)),
    **dict.fromkeys(RANKING_FIGURES, FIGURE),
}
MODEL_PART: Table = {**BASELINE_PART, **dict.fromkeys(CALIBRATION_FIGURES, FIGURE)}

RECALIBRATION: Table = {
    "method": one_of("none", "platt"),
    "slope": maybe(real(0, above=True)),
    "intercept": maybe(FINITE),
}
SHARE: Table = dict.fromkeys(("value", "low", "high"), or_null(real(0, 1)))
WRITTEN: Table = {
    "reports": COUNT,
    "numbers_stated": whole(0, LARGEST_COUNT),
    "abnormal_values": or_null(whole(0, LARGEST_COUNT)),
    "invented": whole(0, LARGEST_COUNT),
    **dict.fromkeys(("parse_share", "true_number_share", "abnormal_named_share"), SHARE),
    **dict.fromkeys(("abnormal_nameable_share", "right_trend_share", "inventing_share"), SHARE),
}
"""Of stage 3's reports on the test part."""

PROMPTS: Table = {
    "series": one_of(*SERIES_TEXT),
    "context": YES_NO,
    "computed": YES_NO,
    "latest": or_null(COUNT),
}

LANGUAGE_MODEL: Table = {
    "base_model": words(1024),
    "base_sha256": or_null(SHA256),
    "base_revision": or_null(digits(40)),
    "base_class": one_of("Gemma3ForCausalLM"),
    "base_weights": one_of(*BASE_WEIGHTS),
    "quantization": one_of(*QUANTIZATIONS),
    "precision": one_of(*PRECISIONS),
    "prompts": PROMPTS,
    "max_text_tokens": or_null(COUNT),
    "shuffled": YES_NO,
    "num_prefix_tokens": whole(0, PREFIX_TOKENS[1]),
    "stage1_logit": YES_NO,
    "residual_weight": real(0, 1),
}
STAGE_1: Table = {"encoder": ENCODER, "members": whole(*MEMBERS)}
"""Of ``stage1_config``."""

TEXT_ALONE: Table = {
    "encoder": ABSENT,
    "members": whole(0, 0),
    "num_prefix_tokens": whole(0, 0),
}
MERGED: Table = {
    "merged_from": {
        "base_model": words(1024),
        "base_sha256": or_null(SHA256),
        "base_revision": or_null(digits(40)),
        "quantization": one_of("nf4", "none"),
        "precision": one_of(*PRECISIONS),
    },
    "base_sha256": SHA256,
}
"""Of a model whose adapter is merged: from what, and the hash of what came of it."""

REPORTS: Table = {"report_tokens": whole(1, LONGEST_CONTEXT)}

ADAPTER: Table = {
    "peft_type": one_of("LORA"),
    "r": whole(*LORA_RANK),
    "lora_alpha": COUNT,
    "target_modules": Rule(
        f"the projections {', '.join(sorted(LORA_TARGETS))}",
        lambda value: value == sorted(LORA_TARGETS),
    ),
}

# ------------------------------------------------------------------ checks


def check_config(place: Path, config: Any, stages: tuple[str, ...]) -> None:
    """Check the configuration of a checkpoint of one of ``stages``.

    Raises:
        InputError: a key that the program reads is missing, of another type or out of its bounds.
    """
    where = f"{place}: damaged"
    _check(where, {"stage": one_of(*stages)}, config)
    check_data(where, config)
    if config["stage"] == "trajectory":
        _check(where, STAGE_1, config)
    else:
        _check(where, LANGUAGE_MODEL, config)
        _check_further(where, "prompts", config["prompts"], PROMPTS, NONE)
        _check(where, TEXT_ALONE if config.get("encoder") is None else STAGE_1, config)
        name = config["base_model"]
        if config["base_sha256"] is None and not HUB_ID.fullmatch(name):
            raise _wrong(where, "base_model", name, "the id of a model of the hub")
    if config["stage"] == "generative":
        _check(where, REPORTS, config)
    if "merged_from" in config:
        _check(where, MERGED, config)
    if config["encoder"] is not None:
        _check_further(where, "encoder", config["encoder"], ENCODER, PLAIN)
        features = len(config["features"])
        width: Table = {"input_dim": maybe(whole(features, features))}
        _check(where, width, config["encoder"], "encoder.")
    if "decision" in config:  # it comes with the results
        _check(where, {"decision": DECISION}, config)
    if "figures" in config:
        check_figures(where, config["figures"])


def check_figures(where: str, figures: Any) -> None:
    """Check the figures that a model card shows: these and no others.

    Args:
        where: the file, as errors name it.
        figures: as from ``card_figures``.

    Raises:
        InputError: as ``check_config``.
    """
    table: Table = {
        **dict.fromkeys(SCORED_PARTS, MODEL_PART),
        "baselines": BASELINES,
        "calibration": RECALIBRATION,
    }
    written = isinstance(figures, dict) and "reports" in figures
    _check_all(where, {**table, "reports": WRITTEN} if written else table, figures, "figures.")
    parts: Table = dict.fromkeys(SCORED_PARTS, BASELINE_PART)
    for name, baseline in figures["baselines"].items():
        _check_all(where, parts, baseline, f"figures.baselines.{name}.")


def check_data(where: str, description: Any) -> None:
    """Check what a checkpoint says of its data, or what a run is about to write there.

    Args:
        where: the file, as errors name it.
        description: with the keys of ``Data.description``.

    Raises:
        InputError: as ``check_config``.
    """
    _check(where, DATA, description)
    _check_further(where, "reading", description["reading"], DATA["reading"], PLAIN)
    if len(description["units"]) != len(description["features"]):
        raise _wrong(where, "units", description["units"], "one for each of the features")


def check_adapter(place: Path, adapter: Any) -> None:
    """Check the configuration of a LoRA adapter.

    Raises:
        InputError: as ``check_config``.
    """
    _check(f"{place}: damaged", ADAPTER, adapter)


def _check_further(where: str, name: str, section: dict[str, Any], table: Any, rule: Rule) -> None:
    """Check the keys of a section that its table does not list."""
    for key in section.keys() - table.keys():
        if not NAME.holds(key):
            raise _wrong(where, f"a key of {name}", key, NAME.expected)
        if not rule.holds(section[key]):
            raise _wrong(where, f"{name}.{key}", section[key], rule.expected)


def _check(where: str, table: Table, facts: Any, within: str = "") -> None:
    if not isinstance(facts, dict):
        raise _wrong(where, within.rstrip(".") or "configuration", facts, "an object")
    for key, rule in table.items():
        name = f"{within}{key}"
        if key not in facts:
            if isinstance(rule, Rule) and rule.optional:
                continue
            raise InputError(f"{where}: {name} is missing")
        if isinstance(rule, dict):
            _check(where, rule, facts[key], f"{name}.")
        elif not rule.holds(facts[key]):
            raise _wrong(where, name, facts[key], rule.expected)


def _check_all(where: str, table: Table, facts: Any, within: str) -> None:
    """Check a section and its sections, and that they have no further keys."""
    _check(where, table, facts, within)
    for key in facts.keys() - table.keys():
        raise _wrong(where, f"a key of {within.rstrip('.')}", key, NONE.expected)
    for key, rule in table.items():
        if isinstance(rule, dict):
            _check_all(where, rule, facts[key], f"{within}{key}.")


def _wrong(where: str, name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{where}: {name} {_shown(value)}: expected {expected}")


def _shown(value: Any) -> str:
    """Return a value on one line and short, whatever it is."""
    if isinstance(value, str):
        return repr(value[:SHOWN]) + ("..." if len(value) > SHOWN else "")
    if isinstance(value, int) and abs(value) > 10**SHOWN:
        return "(an endless number)"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"(a {type(value).__name__})"
