"""Score the best model of a stage once, and write what a finished run leaves."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate.utils import gather_object
from numpy.typing import NDArray

from medgemma_clinical.commands.several.earlier_stages import earlier_stages
from medgemma_clinical.data.facts import fact_groups
from medgemma_clinical.data.small_cells import count_text, counting_rule
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import peak_memory, processes, show_progress
from medgemma_clinical.evaluation.baselines import (
    COMBINED,
    baseline_tables,
    fit_baselines,
    richest_blend,
)
from medgemma_clinical.evaluation.cohort import Cohort, CohortFigures, cohort_figures
from medgemma_clinical.evaluation.decision import (
    DecisionRule,
    fit_decision_rule,
    fit_residual_weight,
)
from medgemma_clinical.evaluation.predictions import Predictions
from medgemma_clinical.evaluation.report import (
    CARD,
    INTERVALS,
    STAGE_TITLES,
    ReportContent,
    write_report,
)
from medgemma_clinical.evaluation.report_tables import (
    flow_table,
    result_sentence,
    results_table,
    split_table,
)
from medgemma_clinical.evaluation.written_reports import score_reports
from medgemma_clinical.files import write_json, write_text
from medgemma_clinical.models.generation import rows_at_once, write_reports
from medgemma_clinical.models.model_card import (
    LIMITS,
    card_figures,
    describe_language_model,
    describe_stage1,
    describe_weight,
    random_model_notice,
    weight_0_sentence,
)
from medgemma_clinical.models.terms import licence
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.training.evaluate import evaluate
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import TrainState

logger = logging.getLogger(__name__)

SCORED = {"val": "validation", "test": "test"}
"""Parts of the split that are scored, and their names in ``metrics.json``."""

Baselines = dict[str, dict[str, NDArray[np.float64]]]
"""Probabilities of each simple model, and of earlier stages, by part."""


def write_results(
    stage: Stage,
    data: Data,
    folder: Path | None,
    state: TrainState,
    facts: dict[str, Any],
    args: Namespace,
) -> dict[str, Any]:
    """Score validation and, once, test with the best model; write and log all results.

    The decision rule joins the stage's configuration. Each process must call; the first one writes.

    Args:
        stage: with the weights of its best epoch.
        data: of the run.
        folder: of the stage; None writes nothing.
        state: of the training.
        facts: as ``run_facts``.
        args: of the command line.

    Returns:
        The content of ``metrics.json``; empty in the other processes.
    """
    first, metrics = processes().is_main_process, dict[str, Any]()
    predictions = score_parts(stage, args.calibrate)
    rule = predictions["val"].rule
    if first:
        earlier = earlier_stages(stage, folder, facts, data.dataset, predictions)
        cohorts = make_cohorts(predictions, earlier.risks | simple_models(data), data)
        figures = judge_parts(cohorts, rule, data, args.seed)
        metrics = metrics_json(stage, state.progress.best_epoch, figures, rule, args.calibrate)
        stage.config["figures"] = card_figures(metrics)
        if folder:  # generation takes long: what is known by now is safe
            write_figures(folder, stage, cohorts, metrics)
    writes = isinstance(stage.model, LLMWriter)
    texts = generate_reports(stage, predictions["test"]) if writes else None
    if not first:
        return {}
    reports = None
    if texts is not None:
        reports, metrics["reports"] = score_reports(
            data.dataset, texts, predictions["test"], data.min_cell, args.seed
        )
        write_generations(folder, stage, reports, metrics)
    log_results(stage, data, figures, metrics)
    if folder:
        content = report_content(stage, data, state, figures["val"], facts, metrics.get("reports"))
        content = replace(content, unshown=earlier.unshown)
        path, listed = folder / "report.html", args.report_patients
        write_report(
            path, cohorts["test"], figures["test"], content, list_patients=listed, reports=reports
        )
        logger.info("report: %s; %s", path, peak_memory())
    return metrics


def score_parts(stage: Stage, calibrate: str) -> dict[str, Predictions]:
    """Score validation and test; weight and decision rule come from validation alone.

    Both join the stage's configuration.

    Args:
        stage: with the weights of its best epoch.
        calibrate: way of recalibration.
    """
    raw = {}
    for part, name in SCORED.items():
        batches = stage.batches[part]
        shown = show_progress(batches, f"{stage.name}: {name}", len(batches))
        raw[part] = evaluate(stage.model, shown, stage.collate)
    raw = weigh_language_model(stage, raw)
    rule = fit_decision_rule(raw["val"].labels, raw["val"].logit, calibrate)
    stage.config["decision"] = rule.to_config()
    return {part: each.with_rule(rule) for part, each in raw.items()}


def write_generations(
    folder: Path | None, stage: Stage, reports: list[dict[str, Any]], metrics: dict[str, Any]
) -> None:
    """Write the reports of the test part, and their figures to ``metrics.json`` and the model."""
    stage.config["figures"] = card_figures(metrics)
    if folder:
        lines = [json.dumps(line) + "\n" for line in reports]
        write_text(folder / "generations_test.jsonl", "".join(lines))
        write_json(folder / "metrics.json", metrics)
        stage.save(folder, stage.config)


def log_results(
    stage: Stage, data: Data, figures: dict[str, CohortFigures], metrics: dict[str, Any]
) -> None:
    """Log the result in a sentence, and the table of the model and all beside it."""
    named = {SCORED[part]: each for part, each in figures.items()}
    hidden = logging.WARNING if data.hides_figures else logging.INFO  # Python shows warnings
    logger.log(hidden, "\n%s\n", result_sentence(figures["test"]))
    logger.info("%s\n", results_table(stage.name, named, metrics.get("reports")))


def write_figures(
    folder: Path, stage: Stage, cohorts: dict[str, Cohort], metrics: dict[str, Any]
) -> None:
    """Write the best model with its decision rule, the predictions of each part, the figures."""
    stage.save(folder, stage.config)
    for part, cohort in cohorts.items():
        write_text(folder / f"predictions_{part}.csv", predictions_csv(cohort))
    write_json(folder / "metrics.json", metrics)


def weigh_language_model(stage: Stage, raw: dict[str, Predictions]) -> dict[str, Predictions]:
    """Choose on the validation part how much the language model adds to stage 1's logit.

    Model and configuration of the stage take the weight. Without stage 1's logit nothing changes.

    Args:
        stage: with the weights of its best epoch.
        raw: predictions of each scored part with the whole of the language model's logit.

    Returns:
        The predictions with the weight.
    """
    model, val = stage.model, raw["val"]
    if not isinstance(model, TrajectoryLLM) or not model.adds_stage1:
        return raw
    weight = fit_residual_weight(val.labels, val.offset, val.logit)
    model.residual_weight = stage.config["residual_weight"] = weight
    logger.info("weight of the language model beside stage 1: %s", describe_weight(stage.config))
    return {part: each.with_residual_weight(weight) for part, each in raw.items()}


def figures_for_tracker(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the known figures of both parts from the content of ``metrics.json``."""
    if not metrics:  # of another process than the first
        return {}
    return {
        f"{part}_{name}": each["value"]
        for part in SCORED.values()
        for name, each in metrics[part].items()
        if isinstance(each, dict) and each["value"] is not None
    }


def report_content(
    stage: Stage,
    data: Data,
    state: TrainState,
    validation: CohortFigures,
    facts: dict[str, Any],
    reports: dict[str, Any] | None,
) -> ReportContent:
    """Return what a page says beside its figures; arguments as in ``write_results``."""
    dataset, fewest = data.dataset, data.min_cell
    groups = fact_groups(dataset.fact_names)
    facts_read = [f"{group}: {', '.join(names)}" for group, names in groups.items()]
    return ReportContent(
        title=f"{STAGE_TITLES[stage.name]}: {dataset.outcome}",
        outcome=dataset.outcome,
        question=dataset.asked(),
        data={
            "Source": Path(dataset.source).name,
            "Kind": dataset.kind,
            "Used": f"{len(dataset):,} rows of {count_text(dataset.n_patients, fewest)} patients",
            "Missing values": "masked, never filled in",
            "Facts": "; ".join(facts_read) or "none are read",
        },
        card=model_card(stage, state.progress.best_epoch, validation, facts),
        flow=flow_table(dataset.flow, fewest),
        split=split_table(dataset.labels, dataset.groups, data.split, fewest),
        history=None if data.hides_events else state.progress.history or None,
        reports=reports,
        validation=validation.auroc,
        notice=random_model_notice(stage.config, facts["arguments"]["model_name"]),
        first=weight_0_sentence(stage.config),
    )


def simple_models(data: Data) -> Baselines:
    """Fit the simple models."""
    tables = baseline_tables(data.dataset, data.split["train"], data.min_cell)
    return fit_baselines(tables, data.dataset.labels, data.dataset.groups, data.split)


def make_cohorts(
    predictions: dict[str, Predictions], baselines: Baselines, data: Data
) -> dict[str, Cohort]:
    """Return the cohort of each scored part."""
    return {
        part: Cohort.from_predictions(
            data.dataset, each, {name: risks[part] for name, risks in baselines.items()}
        )
        for part, each in predictions.items()
    }


def judge_parts(
    cohorts: dict[str, Cohort], rule: DecisionRule, data: Data, seed: int
) -> dict[str, CohortFigures]:
    """Return the figures of each scored part; the seed is the bootstrap's."""
    return {
        part: cohort_figures(cohort, rule.threshold, seed, data.min_cell, hide=data.hides_figures)
        for part, cohort in cohorts.items()
    }


def metrics_json(
    stage: Stage,
    best_epoch: int,
    figures: dict[str, CohortFigures],
    rule: DecisionRule,
    calibrate: str,
) -> dict[str, Any]:
    """Return the content of ``metrics.json``, written reports apart."""
    adds_stage1 = stage.config.get("stage1_logit", False)
    calibration: dict[str, Any] = {"method": calibrate}
    if rule.recalibrates and figures["val"].events is not None:
        calibration |= {"slope": rule.slope, "intercept": rule.intercept}
        calibration |= {
            f"{SCORED[part]} before": f.to_json(f.before) for part, f in figures.items()
        }
    return {
        "stage": stage.name,
        "selected_epoch": best_epoch,
        "threshold": rule.threshold,
        **({"residual_weight": stage.config["residual_weight"]} if adds_stage1 else {}),
        "calibration": calibration,
        **{SCORED[part]: each.to_json(each.estimates) for part, each in figures.items()},
        "baselines": {
            name: {SCORED[part]: f.to_json(f.baselines[name]) for part, f in figures.items()}
            for name in figures["test"].baselines
        },
        "differences": {
            name: {SCORED[part]: f.to_json(f.differences[name]) for part, f in figures.items()}
            for name in figures["test"].differences
        },
        COMBINED: {
            "blend": richest_blend(figures["test"].baselines),
            **{SCORED[part]: f.to_json(f.combined) for part, f in figures.items()},
        },
        "combined_minus_blend": {
            SCORED[part]: f.to_json(f.combined_minus_blend) for part, f in figures.items()
        },
    }


def predictions_csv(cohort: Cohort) -> str:
    """Return a part's predictions: id, label, probability, patient, each baseline, combined."""
    table = pd.DataFrame(
        {
            "id": cohort.ids,
            "label": cohort.labels.astype(int),
            "probability": cohort.probability,
            "patient": cohort.groups,
            **cohort.baselines,
            COMBINED: cohort.combined,
        }
    )
    return table.to_csv(index=False)


def generate_reports(stage: Stage, predictions: Predictions) -> dict[int, str]:
    """Let stage 3's model write the reports of the predicted rows, by position in the data set.

    Each process writes its share of the reports and must call.
    """
    model, text = stage.model, stage.text
    assert isinstance(model, LLMWriter)
    assert text is not None
    verdicts = np.zeros(len(text.dataset), dtype=bool)
    verdicts[predictions.rows] = predictions.alarms
    max_tokens = stage.config["report_tokens"]
    batches = LengthBatches(
        predictions.rows,
        rows_at_once(model, text, max_tokens),
        text.lengths(),
        shuffle=False,
        share=(processes().process_index, processes().num_processes),
    )
    shown = show_progress(batches, "writing reports", len(batches))
    written = write_reports(model, text, shown, verdicts, max_tokens)
    return dict(gather_object(list(written.items())))


def model_card(
    stage: Stage, best_epoch: int, validation: CohortFigures, facts: dict[str, Any]
) -> dict[str, str]:
    """Return the lines of a page on the model; hashes and versions last."""
    base = stage.config.get("base_model")
    parameters = list(stage.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    return {
        **CARD,
        "Limits": LIMITS,
        "Model": "stage 1 alone" if base is None else describe_language_model(stage.config),
        **({} if base is None else {"Weight beside stage 1": describe_weight(stage.config)}),
        **({"Stage 1": describe_stage1(stage.config)} if stage.config["encoder"] else {}),
        "Parameters": f"{learned:,} trained of {sum(p.numel() for p in parameters):,}",
        "Best epoch": f"{best_epoch}, by {stage.monitor} on the validation part",
        "Validation AUROC": validation.auroc.text(),
        "Intervals": INTERVALS,
        "Small cells": counting_rule(validation.fewest),
        "Seed": str(facts["seed"]),
        "Licence": licence(stage.config),
        "Versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "Commit": facts["git_commit"] or "not known",
        "SHA-256 of the data": facts["data"]["data_sha256"],
        "SHA-256 of the code": facts["code_sha256"],
    }
