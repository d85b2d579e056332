"""The model card, README.md of a checkpoint, and the description of a model on a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from medgemma_clinical.data.dka import comparable
from medgemma_clinical.data.importers.long_labels import name_categories, read_sexes
from medgemma_clinical.data.importers.long_values import split_title
from medgemma_clinical.data.small_cells import MIN_CELL, count_text
from medgemma_clinical.data.texts import code
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.decision import MIN_CHOOSING_EVENTS, describe_threshold
from medgemma_clinical.evaluation.monitoring import MonitorRule
from medgemma_clinical.evaluation.rules import moves_of, rules_of
from medgemma_clinical.evaluation.suppress import NOT_SHOWN, suppress
from medgemma_clinical.evaluation.tables import METRICS
from medgemma_clinical.evaluation.target import targets_of_config
from medgemma_clinical.evaluation.topics.cohort import suppress_case_mix
from medgemma_clinical.evaluation.topics.written_reports import suppress_reports
from medgemma_clinical.evaluation.verdicts import json_text
from medgemma_clinical.models.choices import DEMO
from medgemma_clinical.models.decoders import licence, terms_of
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.models.terms import NOT_A_DEVICE, built_in_sentence
from medgemma_clinical.provenance import describe_program

MODEL_LIMITS = (
    "The metrics come from one data set that was split by patient. They may not hold in another "
    "hospital or another time. If treatment shapes the label, the model predicts treatment as well "
    "as disease. Metrics of a small test part vary by chance: read the interval, not the value."
)

OTHER = "(other)"
"""Stands for the categories of few patients in a recipe; no cell is expected to hold it."""

RECOMMENDED = "Recommended (--use best)"

CARD_METRICS = "auroc", "auprc", "brier", "oe"
"""Metrics of all models that a card lists."""

TIMING = ("Prediction time", "Horizon")
"""Lines of ``task_description`` that a checkpoint keeps."""

METRICS_OF = ("validation", "test", "folds")
"""Parts of ``metrics.json``; a model of all patients has the folds' in place of the others."""


def shareable(config: Mapping[str, Any], min_cell: int) -> Any:
    """Return a checkpoint's configuration as it may leave the machine: small counts are hidden."""
    if min_cell == 0:
        return config
    metrics = config.get("metrics", {})
    parts = {k: suppress(metrics[k], min_cell) for k in METRICS_OF if k in metrics}
    hide_events = any(isinstance(part["minority_patients"], str) for part in parts.values())
    if "reports" in metrics:
        parts["reports"] = suppress_reports(metrics["reports"], min_cell)
    parts["calibration"] = _without_tables(metrics.get("calibration", {}))
    updated = {
        name: count_text(x, min_cell) if name in ("rows", "patients", "events") else x
        for name, x in config.get("updated", {}).items()
    }
    hidden = {
        "updated": updated,
        "case_mix": suppress_case_mix(config["case_mix"], min_cell, hide_events=hide_events),
        "metrics": {**_without_tables(metrics), **parts},
        "recipe": shared_recipe(config),
    }
    return {**config, **{key: x for key, x in hidden.items() if key in config}}


def shared_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe without series, static features and categories of perhaps few patients."""
    recipe = config.get("recipe", {})
    arguments = {**recipe.get("arguments", {})}
    if read_as := arguments.get("read_as"):
        words = {k: _shared_words(k, x, config) for k, x in read_as.get("static", {}).items()}
        known = {title: categories for title, categories in words.items() if categories is not None}
        arguments["read_as"] = {**read_as, "static": known}
        left_out = {name_of(title) for title in {*words} - {*known}}
        arguments["static"] = [x for x in arguments["static"] if name_of(x) not in left_out]
    if arguments.get("series"):
        read = {comparable(name) for name in config["inputs"].get("series", config["features"])}
        first, *others = arguments["series"]
        arguments["series"] = [first, *(x for x in others if "=" not in x or name_of(x) in read)]
        if medians := arguments.get("read_as", {}).get("medians"):
            kept = {name: x for name, x in medians.items() if comparable(name) in read}
            arguments["read_as"] = {**arguments["read_as"], "medians": kept}
    return {**recipe, "arguments": arguments} if recipe else {}


def _shared_words(
    title: str, words: Sequence[str], config: Mapping[str, Any]
) -> Sequence[str] | None:
    """Return the categories of a static feature that ``MIN_CELL`` training patients have or lack.

    Sex, yes and no stand in words of this program. None: new data are read by their own words.
    """
    if not words:  # numbers
        return words
    entries = config["case_mix"].get("static", {})
    sexes = read_sexes(config["recipe"]["arguments"].get("sex", ()))
    categories, columns = name_categories(split_title(title)[0], words, sexes)
    if {*categories} != {*words}:  # a word of each side makes the same column
        return [categories[0], categories[len(columns[0][1])]]
    large = [text for name, ones in columns for text in ones if "share" in entries.get(name, {})]
    if len(large) == len(columns):
        return words
    return [OTHER, *large] if len(large) > 1 else None  # two words alone would have one column


def name_of(text: str) -> str:
    """Return the comparable name in ``NAME [unit]=CODE``."""
    return comparable(split_title(text.partition("=")[0].strip())[0])


def _without_tables(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are no tables: no other table leaves the machine unseen."""
    return {key: x for key, x in content.items() if not isinstance(x, dict)}


def model_card(
    config: Mapping[str, Any], repo_id: str | None = None, min_cell: int = MIN_CELL
) -> str:
    """Return a checkpoint's card without small counts; a run that lasts has no ``metrics``."""
    shared = shareable(config, min_cell)
    rows = choosing_rows(config)
    rules, targets = rules_of(config), targets_of_config(config)
    is_moved = bool(moves_of(rules))
    words: dict[str, Any] = {
        "threshold_choice": describe_threshold(config.get("threshold_choice"), rows),
        "recalibration": f"by Platt's method on {rows}" if is_moved else "none",
        "config": shared,
        "threshold": rules[targets[0].name].threshold,
        "about": outcome_of(config).about,
        "targets": targets,
        "event": code(targets[0].title) if targets[0].horizon else targets[0].title,
        "columns": {METRICS[name].title: name for name in CARD_METRICS},
        "monitor_rule": describe_monitor_rule(config),
        "model": describe_model(shared),
        "recipe": describe_recipe(shared),
        "repo_id": repo_id,
        "source": json.dumps(repo_id or "FOLDER"),
        "series": series_with_units(config, "{} ({})"),
        "texts": {"limits": MODEL_LIMITS, "not_a_device": NOT_A_DEVICE, "licence": licence(config)},
        **{"code": code, "names": names, "number": count_text, "interval": json_text},
    }
    path = str(Path(__file__).with_suffix(".md.j2"))
    return f"{ModelCard.from_template(ModelCardData(**card_header(config)), path, **words)}\n"


def card_metrics(config: Mapping[str, Any]) -> dict[str, str]:
    """Return titles and names of ``CARD_METRICS`` of all targets."""
    targets = targets_of_config(config)
    return {
        f"{METRICS[name].title}{f' ({target.title})' if len(targets) > 1 else ''}": target.key(name)
        for target in targets
        for name in CARD_METRICS
    }


def choosing_rows(config: Mapping[str, Any]) -> str:
    """Return the rows that chose a model's threshold and recalibration, in words."""
    is_of_folds = "folds" in config.get("metrics", {})
    return "the out-of-fold rows of its folds" if is_of_folds else "its own validation part"


def card_header(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the card's header, by which the hub finds and shows a model."""
    tags = ["clinical", "time-series", "irregular-time-series", "risk-prediction"]
    keys = {"library_name": "pytorch", **terms_of(config).header}
    if config["stage"] != "generative":  # the hub has no name for the task of stage 3
        keys["pipeline_tag"] = "tabular-classification"
    if (base := config.get("base_model")) is not None:
        merged = "merged_from" in config
        # Of adapter/ or language_model/; the other parts are this program's.
        keys["library_name"] = "transformers" if merged else "peft"
        tags += ["lora", "soft-prompt"] if config["num_prefix_tokens"] else ["lora"]
        tags += ["medgemma"] if "license_name" in keys else []
        on_the_hub = config["base_sha256"] is None and base != DEMO
        if on_the_hub and config["base_weights"] == "pretrained":
            relation = "finetune" if merged else "adapter"
            keys |= {"base_model": base, "base_model_relation": relation}
    return {**keys, "tags": tags}


# ------------------------------------------------------------------ a model in words


TEXT_READ = {"words": "words and pairs of words", "frozen": "states of a language encoder"}
"""What stage 1 reads of a text, by ``--text_features``."""


def describe_model(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the description of a model's parts for a card or a page."""
    lines = {"Model": STAGE_NAMES[config["stage"]]}
    if (base := config.get("base_model")) is not None:
        words = [base]
        if config["base_weights"] == "random":
            words.append("with random weights, a control")
        if config["shuffled"]:
            words.append("with soft tokens of other patients, a control")
        words.append(f"quantization {config['quantization']}, precision {config['precision']}")
        lines["Language model"] = ", ".join(words)
        revision = config["base_revision"] or config["base_sha256"] or "none"
        lines["Its revision, or the SHA-256 of its files"] = revision
        lines["Weight beside stage 1"] = describe_weight(config)
    if config["encoder"]:
        dynamics = config["encoder"].get("dynamics")
        dynamics = f", dynamics {dynamics}" if dynamics else ""
        name = config.get("encoder_class") or "ClinicalODERNN"
        lines["Stage 1"] = f"encoder {name}{dynamics}, members {config['members']}"
    if (text := config.get("text_features", "none")) != "none" and base is None:
        lines["Text"] = f"{TEXT_READ[text]}; weight beside stage 1: {describe_weight(config)}"
    if "best_model" in config:
        lines[RECOMMENDED] = describe_recommended(config)
    if updated := config.get("updated"):
        counts = f"{count_text(updated['patients'])} patients, {count_text(updated['events'])} with"
        update = f"{updated['model']}, by its {updated['method']}, on {counts} the event"
        lines["Updated after its test"] = update
    if version := config.get("version"):
        lines["Trained with"] = f"medgemma-clinical {version}"
    return lines


def series_with_units(config: Mapping[str, Any], form: str) -> list[str]:
    """Return the series that are read; those with a unit in a form of both."""
    units = dict(zip(config["features"], config["units"], strict=True))
    series = config["inputs"].get("series", config["features"])
    return [form.format(name, units[name]) if units[name] else name for name in series]


def describe_monitor_rule(config: Mapping[str, Any]) -> str:
    """Return the rule of ``monitor`` in sentences; empty where an earlier version kept none."""
    rule = config.get("monitor_rule")
    return MonitorRule.checked(rule).words if rule else ""


def describe_recipe(config: Mapping[str, Any]) -> dict[str, str]:
    """Return when the question is asked, and from which items, of a model whose data say so."""
    arguments = config.get("recipe", {}).get("arguments", {})
    timing = config.get("timing", {})
    lines = {name: str(timing[name]) for name in TIMING if name in timing}
    if "window_hours" in arguments:
        hours = str(arguments["window_hours"]).removesuffix(".0")
        lines["Window"] = f"{hours} hours up to the prediction time"
    items: dict[str, list[str]] = {}
    for text in arguments.get("series", ()):
        title, _, item = map(str.strip, text.partition("="))
        items.setdefault(title, []).append(item or title)
    if items:
        lines["Items"] = "; ".join(f"{title}: {', '.join(x)}" for title, x in items.items())
    return lines


def describe_recommended(config: Mapping[str, Any]) -> str:
    """Return the model that ``--use best`` means, which rows chose it, and how, or why none is."""
    metrics, name = config.get("metrics", {}), config["best_model"]
    part = "folds" if "folds" in metrics else "validation"
    rows = {"folds": "out-of-fold rows", "validation": "validation rows"}[part]
    tested = metrics.get(part, {})
    events, planned = tested.get("events"), tested.get("primary")
    few = (
        "no model is recommended for its results: fewer than "
        f"{MIN_CHOOSING_EVENTS} events in the {rows} cannot choose between models"
    )
    if name is None:
        problem = "there is no planned comparison"
        if planned is not None:
            problem = f"the planned comparison ({planned}) is not shown to rank better than chance"
        return f"none; {few}, and {problem}"
    if events in (None, NOT_SHOWN):
        return str(name)
    if isinstance(events, int) and events >= MIN_CHOOSING_EVENTS:
        return f"{name}, by the log loss on {rows} with {count_text(events)} events"
    kind = ", the planned comparison" if name == planned else ""  # earlier versions took others
    return f"{name}{kind}; {few}"


def page_card(config: Mapping[str, Any], lines: Mapping[str, str]) -> dict[str, str]:
    """Return the description of a model for a page: ``lines`` first, versions last."""
    sha256, program = {"SHA-256 of the training data": config["data_sha256"]}, describe_program()
    return {**lines, **describe_model(config), **describe_recipe(config), **sha256, **program}


def describe_weight(config: Mapping[str, Any]) -> str:
    """Return the weight of text, or of a language model, beside stage 1's logit, in words."""
    if config["stage"] != "trajectory" and not config["stage1_logit"]:
        return "stage 1's logit is not added"
    if "folds" in (metrics := config.get("metrics", {})):
        return f"{config['residual_weight']:g}, the folds' median"
    if config["residual_weight"] > 0:
        return f"{config['residual_weight']:g}, chosen on the validation part"
    patients = metrics.get("validation", {}).get("patients")
    count = "" if patients is None else f"{count_text(patients)} "
    return f"0, not shown to add on {count}validation patients"


def weight_0_sentence(config: Mapping[str, Any]) -> str:
    """Return the sentence of a page about a language model of weight 0; else nothing."""
    if config.get("residual_weight") != 0:
        return ""
    part = "text" if config["stage"] == "trajectory" else "language model"
    return f"The {part} was not shown to add to stage 1, so each risk is that of stage 1."


def built_in_notice(config: Mapping[str, Any]) -> str:
    """Return the notice of a page about the built-in language model; nothing for another."""
    built_in = config.get("base_model") == DEMO and config["base_sha256"] is None
    return built_in_sentence() if built_in else ""


# ------------------------------------------------------------------ Markdown


def names(words: list[str]) -> str:
    """Return names as Markdown code, in a row."""
    return ", ".join(map(code, words)) or "none"
