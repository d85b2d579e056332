"""model_facts.xml: what a run knows of its model, in the form of CHAI's applied model card.

Source: Coalition for Health AI, schema of the applied model card, version 0.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from medgemma_clinical.data.small_cells import MIN_CELL, count_text
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.rules import rules_of
from medgemma_clinical.evaluation.target import targets_of_config
from medgemma_clinical.models import model_card
from medgemma_clinical.models.decoders import licence
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.models.terms import NOT_A_DEVICE

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TESTS = {"test": "test part of a split by patient", "folds": "cross-validation by patient"}
NOT_XML = re.compile(r"[^\t\n\r -\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
"""Characters that no XML file may hold. Source: XML 1.0, production 2."""


def model_facts(config: Mapping[str, Any], min_cell: int = MIN_CELL) -> str:
    """Return a model's facts as XML, without small counts."""
    shared = model_card.shareable(config, min_cell)
    text = TEMPLATES.get_template("model_facts.xml.j2").render(
        config=shared,
        model=model_card.describe_model(shared),
        recipe=model_card.describe_recipe(shared),
        tags=model_card.card_header(shared)["tags"],
        series=model_card.series_with_units(shared, "{} [{}]"),
        outputs=_outputs(shared),
        training_counts=_training_counts(shared["case_mix"]),
        monitor_rule=model_card.describe_monitor_rule(shared),
        licence=licence(shared),
        limits=model_card.MODEL_LIMITS,
        not_a_device=NOT_A_DEVICE,
        **_key_metrics(shared),
    )
    unquoted = text.replace("&#34;", '"').replace("&#39;", "'")  # no attribute is a value
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", unquoted) + "\n"


def _outputs(config: Mapping[str, Any]) -> list[str]:
    """Return what the model gives, from where on it predicts the event, and what is left out."""
    outputs = [f"Probability of: {config['outcome']}"]
    if "decision" in config:
        rows = model_card.choosing_rows(config)
        choice = decision.describe_threshold(config.get("threshold_choice"), rows)
        threshold = rules_of(config)[targets_of_config(config)[0].name].threshold
        outputs.append(f"predicted from {threshold:.4g} on, {choice}")
    return [*outputs, *outcome_of(config).about]


def _training_counts(mix: Mapping[str, Any]) -> list[str]:
    counts = [f"{key}: {count_text(mix[key])}" for key in ("rows", "patients") if key in mix]
    if "prevalence" in mix:
        counts.append(f"with the event: {100 * mix['prevalence']:.1f} %")
    return counts


def _key_metrics(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template says of the metrics of the test part or of folds."""
    metrics, titles = config.get("metrics", {}), model_card.card_metrics(config)
    part = next((name for name in TESTS if name in metrics), None)
    tested = metrics[part] if part else {}
    models = {"this model": tested, **tested.get("models", {})}
    first = {
        f"{title}, {name}": _numbers(model.get(key))
        for name, model in models.items()
        for title, key in titles.items()
    }
    others = {
        name: _numbers(metric)
        for name, metric in tested.items()
        if name not in ("models", *titles.values()) and isinstance(metric, dict)
    }
    event = targets_of_config(config)[0].title
    names = {"n": "rows", "patients": "patients", "events": f"with {event}"}
    return {
        "test_type": f"Internal: {TESTS[part]}" if part else "Not tested",
        "tested_counts": [f"{x}: {count_text(tested[k])}" for k, x in names.items() if k in tested],
        "first": first,
        "subgroups": {"Metrics by subgroup, from the table of the report": _numbers(None)},
        "others": others or {"None": _numbers(None)},
    }


def _numbers(metric: Mapping[str, float | None] | None) -> str:
    """Return a metric and its interval as JSON, to four decimals; null where not known."""
    numbers = {}
    for name in ("value", "low", "high"):
        number = (metric or {}).get(name)
        numbers[name] = None if number is None else round(number, 4)
    return json.dumps(numbers)
