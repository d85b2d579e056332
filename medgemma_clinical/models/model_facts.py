"""model_facts.xml: what a run knows of its model, in the form of CHAI's applied model card.

Source: Coalition for Health AI, schema of the applied model card, version 0.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from medgemma_clinical.data.small_cells import MIN_CELL, count_text
from medgemma_clinical.evaluation.decision import describe_threshold
from medgemma_clinical.evaluation.monitoring import MonitorRule
from medgemma_clinical.evaluation.rules import rules_of
from medgemma_clinical.evaluation.target import targets_of_config
from medgemma_clinical.models.decoders import licence
from medgemma_clinical.models.model_card import (
    MODEL_LIMITS,
    card_header,
    card_metrics,
    choosing_rows,
    describe_model,
    describe_recipe,
    shareable,
)
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.models.terms import NOT_A_DEVICE

KEY_METRIC = "MetricGoal Results Interpretation TestType TestingDataDescription "
KEY_METRIC += "ValidationProcessAndJustification"
ELEMENTS = {  # in the schema's order; what no fact fills is for the owner
    "BasicInfo": "ModelName ModelDeveloper DeveloperContact",
    "ReleaseInfo": "ReleaseStage ReleaseDate ReleaseVersion GlobalAvailability",
    "ModelSummary": "Summary Keywords",
    "UsesAndDirections": "IntendedUseAndWorkflow PrimaryIntendedUsers HowToUse "
    "TargetedPatientPopulation CautionedOutOfScopeSettings",
    "Warnings": "KnownRisksAndLimitations KnownBiasesOrEthicalConsiderations ClinicalRiskLevel",
    "TrustIngredients/AISystemFacts": "OutcomesAndOutputs ModelType FoundationModels "
    "InputDataSource OutputAndInputDataTypes DevelopmentDataCharacterization "
    "BiasMitigationApproaches OngoingMaintenance",
    "TrustIngredients/TransparencyInformation": "FundingSource ThirdPartyInformation "
    "StakeholdersConsulted",
    "KeyMetrics/UsefulnessUsabilityEfficacy": KEY_METRIC,
    "KeyMetrics/FairnessEquity": KEY_METRIC,
    "KeyMetrics/SafetyReliability": KEY_METRIC,
    "Resources": "PeerReviewedPublications PatientConsentOrDisclosure",
}
OWNER = "To be completed by the owner: "
TESTS = {"test": "test part of a split by patient", "folds": "cross-validation by patient"}
NOT_XML = re.compile(r"[^\t\n\r -\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
"""Characters that no XML file may hold. Source: XML 1.0, production 2."""


def model_facts(config: Mapping[str, Any], min_cell: int = MIN_CELL) -> str:
    """Return a model's facts as XML, without small counts."""
    shared = shareable(config, min_cell)
    facts, metrics = _facts(shared), _key_metrics(shared)
    content: dict[str, Any] = {}
    for path, names in ELEMENTS.items():
        group, _, part = path.partition("/")
        for_owner = {x: OWNER + re.sub("(?<!^)([A-Z])", r" \1", x).lower() for x in names.split()}
        known = facts | metrics.get(part, {})
        texts = {name: known.get(name, text) for name, text in for_owner.items()}
        content[group] = content.get(group, {}) | ({part: texts} if part else texts)
    root = Element("AppliedModelCard", xmlns="https://mc.chai.org/v0.2/schema.xsd")
    _add(root, {**content, "Bibliography": f"{OWNER}references"})
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, encoding="unicode")}\n'


def _add(parent: Element, content: Mapping[str, Any]) -> None:
    """Add an element for each name: a text, further elements, or a list of either."""
    for name, x in content.items():
        for part in x if isinstance(x, list) else [x]:
            element = SubElement(parent, name)
            if isinstance(part, str):
                element.text = NOT_XML.sub("\N{REPLACEMENT CHARACTER}", part)
            else:
                _add(element, part)


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return texts by element, except those of metrics; an empty list leaves an element out."""
    model, mix = describe_model(config), config["case_mix"]
    question, outcome = config["question"], outcome_of(config)
    units = dict(zip(config["features"], config["units"], strict=True))
    series = config["inputs"].get("series", config["features"])
    series = [f"{x} [{units[x]}]" if units[x] else x for x in series]
    counts = [f"{key}: {count_text(mix[key])}" for key in ("rows", "patients") if key in mix]
    if "prevalence" in mix:
        counts.append(f"with the event: {100 * mix['prevalence']:.1f} %")
    risk = f"Probability of: {config['outcome']}"
    if "decision" in config:
        choice = describe_threshold(config.get("threshold_choice"), choosing_rows(config))
        threshold = rules_of(config)[targets_of_config(config)[0].name].threshold
        risk += f"; predicted from {threshold:.4g} on, {choice}"
    rule = config.get("monitor_rule")
    care = {} if rule is None else {"OngoingMaintenance": MonitorRule.checked(rule).words}
    recipe = [f"{name}: {text}" for name, text in describe_recipe(config).items()]
    source = f"--dataset {config['dataset']}, SHA-256 {config['data_sha256']}"
    base = ("Language model", "Its revision, or the SHA-256 of its files")
    return {
        "ModelName": f"{config['outcome']}, {model['Model']}",
        "ReleaseStage": NOT_A_DEVICE,
        "ReleaseVersion": f"{model.get('Trained with', '')}. {OWNER}release version",
        "Summary": f"{question} A probability, read from irregular series of a patient.",
        "Keywords": {"Keyword": card_header(config)["tags"]},
        "IntendedUseAndWorkflow": f"Research on: {question} {OWNER}workflow",
        "HowToUse": 'TrajectoryModel.from_pretrained("FOLDER").predict_proba(rows)',
        "TargetedPatientPopulation": f"Those of the training data. {OWNER}rules of inclusion",
        "CautionedOutOfScopeSettings": f"{NOT_A_DEVICE} {OWNER}further settings",
        "KnownRisksAndLimitations": MODEL_LIMITS,
        "OutcomesAndOutputs": "; ".join([risk, *outcome.about]),
        "ModelType": "; ".join(model[x] for x in ("Model", "Stage 1") if x in model),
        "FoundationModels": ["; ".join(model[x] for x in base)] if base[0] in model else [],
        "InputDataSource": f"{'. '.join([*recipe, source])}. {OWNER}source",
        "OutputAndInputDataTypes": f"In: series {', '.join(series)}; static features "
        f"{', '.join(config['inputs']['static']) or 'none'}. Out: a probability from 0 to 1.",
        "DevelopmentDataCharacterization": f"Training part: {', '.join(counts) or 'not shown'}",
        "ThirdPartyInformation": licence(config),
        **care,
    }


def _key_metrics(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts of each group of metrics, of the test part or of folds."""
    metrics, titles = config.get("metrics", {}), card_metrics(config)
    part = next((name for name in TESTS if name in metrics), None)
    tested = metrics[part] if part else {}
    models = {"this model": tested, **tested.get("models", {})}
    first = {f"{title}, {x}": models[x].get(k) for x in models for title, k in titles.items()}
    own = {k: x for k, x in tested.items() if k not in ("models", *titles.values())}
    groups = {
        "UsefulnessUsabilityEfficacy": first,
        "FairnessEquity": {"Metrics by subgroup, from the table of the report": None},
        "SafetyReliability": {k: x for k, x in own.items() if isinstance(x, dict)},
    }
    event = targets_of_config(config)[0].title
    names = {"n": "rows", "patients": "patients", "events": f"with {event}"}
    counts = [f"{x}: {count_text(tested[k])}" for k, x in names.items() if k in tested]
    known = {
        "TestType": f"Internal: {TESTS[part]}" if part else "Not tested",
        "TestingDataDescription": ", ".join(counts) or "None",
        "ValidationProcessAndJustification": "95 % intervals by bootstrap over patients. null: "
        "not known, not defined, or hidden because of a small count",
    }
    return {name: {**known, "Results": _results(group)} for name, group in groups.items()}


def _results(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics as elements, at least one; values have four digits."""
    lines = []
    for label, metric in (group or {"None": None}).items():
        numbers = {key: (metric or {}).get(key) for key in ("value", "low", "high")}
        numbers = {key: None if x is None else round(x, 4) for key, x in numbers.items()}
        lines.append({"Label": label, "ValueJson": json.dumps(numbers)})
    return {"MetricResult": lines}
