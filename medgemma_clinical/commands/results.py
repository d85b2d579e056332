"""Score the best model of a stage once, and write what a finished run leaves."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate.utils import gather_object

from medgemma_clinical.data.facts import fact_groups
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import peak_memory, processes, show_progress
from medgemma_clinical.evaluation.baselines import (
    ENSEMBLE,
    STAGE_NAMES,
    best_blend,
    blend,
    fit_baselines,
)
from medgemma_clinical.evaluation.decision import (
    Predictions,
    fit_decision_rule,
    fit_residual_weight,
)
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.report import ReportContent, write_report
from medgemma_clinical.evaluation.tables import model_table, split_table, written_table
from medgemma_clinical.evaluation.verdicts import sentences, value_text
from medgemma_clinical.evaluation.written_reports import score_reports
from medgemma_clinical.files import write_json, write_text
from medgemma_clinical.models.generation import rows_at_once, write_reports
from medgemma_clinical.models.model_card import (
    LIMITS,
    describe_language_model,
    describe_stage1,
    describe_weight,
    random_model_notice,
    weight_0_sentence,
)
from medgemma_clinical.models.terms import licence
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.provenance import describe_program
from medgemma_clinical.training.evaluate import evaluate as score
from medgemma_clinical.training.loaders import LengthBatches
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import TrainState

logger = logging.getLogger(__name__)

SCORED = {"val": "validation", "test": "test"}
"""Parts of the split that are scored, and their names in ``metrics.json``."""


def write_results(
    stage: Stage,
    data: Data,
    folder: Path | None,
    state: TrainState,
    facts: dict[str, Any],
    args: Namespace,
) -> dict[str, Any]:
    """Score validation and, once, test with the best model; write and log all results.

    Each process must call; the first one writes. Without a folder nothing is written.

    Returns:
        The checkpoint's configuration with ``decision``, ``residual_weight`` and ``metrics``; the
        last one in the first process alone.
    """
    predictions, decided = score_parts(stage, data, args.calibrate)
    config = {**stage.config, **decided}
    writes = isinstance(stage.model, LLMWriter)
    texts = generate_reports(stage, predictions["test"]) if writes else None
    if not processes().is_main_process:
        return config
    rows = prediction_tables(stage, data, predictions)
    threshold: float = config["decision"]["threshold"]
    written, lines = None, list[dict[str, Any]]()
    metrics = {part: evaluate(table, args.seed, threshold) for part, table in rows.items()}
    if texts is not None:
        lines, written = score_reports(data.dataset, texts, predictions["test"], args.seed)
    config["metrics"] = {
        "stage": stage.name,
        "selected_epoch": state.progress.best_epoch,
        "threshold": threshold,
        **({"residual_weight": config["residual_weight"]} if "residual_weight" in decided else {}),
        "calibration": {"method": args.calibrate, **_recalibration(config["decision"])},
        **{SCORED[part]: each.to_json() for part, each in metrics.items()},
        **({} if written is None else {"reports": written}),
    }
    if folder:
        stage.save(folder, config)
        write_json(folder / "metrics.json", config["metrics"])
        for part, table in rows.items():
            write_text(folder / f"predictions_{part}.csv", predictions_csv(table))
        if texts is not None:
            generations = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(folder / "generations_test.jsonl", generations)
    log_results(metrics, written)
    if folder:
        write_report(
            folder / "report.html",
            rows["test"],
            metrics["test"],
            report_content(stage, data, state, config, metrics["val"], facts, predictions["test"]),
            min_cell=args.min_cell,
            list_patients=args.report_patients,
            folder=folder,
        )
        logger.info("report: %s; %s", folder / "report.html", peak_memory())
    return config


def score_parts(
    stage: Stage, data: Data, calibrate: str
) -> tuple[dict[str, Predictions], dict[str, Any]]:
    """Score validation and test; weight and decision rule come from validation alone.

    Returns:
        The predictions by part, and ``decision`` and ``residual_weight`` of the configuration; the
        model takes the weight.
    """
    raw: dict[str, Predictions] = {}
    for part, name in SCORED.items():
        batches = stage.batches[part]
        shown = show_progress(batches, f"{stage.name}: {name}", len(batches))
        raw[part] = score(stage.model, shown, stage.collate)
    decided: dict[str, Any] = {}
    model, val = stage.model, raw["val"]
    if isinstance(model, TrajectoryLLM) and model.adds_stage1:
        patients = data.dataset.groups[val.rows]
        weight = fit_residual_weight(val.labels, val.offset, val.logit, patients)
        model.residual_weight = decided["residual_weight"] = weight
        text = "weight of the language model beside stage 1: %g, chosen on %d validation patients"
        logger.info(text, weight, len(np.unique(patients)))
        raw = {
            part: replace(each, logit=each.offset + weight * (each.logit - each.offset))
            for part, each in raw.items()
        }
    rule = fit_decision_rule(raw["val"].labels, raw["val"].logit, calibrate)
    decided["decision"] = asdict(rule)
    return {part: replace(each, rule=rule) for part, each in raw.items()}, decided


def _recalibration(decision: dict[str, float]) -> dict[str, float]:
    changed = (decision["slope"], decision["intercept"]) != (1.0, 0.0)
    return {name: decision[name] for name in ("slope", "intercept")} if changed else {}


def prediction_tables(
    stage: Stage, data: Data, predictions: dict[str, Predictions]
) -> dict[str, pd.DataFrame]:
    """Return the predictions of each part: id, label, patient, then the risk of each model.

    The model comes first; stage 1 below it, the baselines and the ensemble follow.
    """
    name, baselines = STAGE_NAMES[stage.name], fit_baselines(data.dataset, data.split)
    tables = {}
    for part, each in predictions.items():
        risks = {name: each.probability}
        if stage.stage1_risks is not None:
            risks[STAGE_NAMES["trajectory"]] = stage.stage1_risks[each.rows]
        risks |= {baseline: known[part] for baseline, known in baselines.items()}
        if best := best_blend(risks):
            risks[ENSEMBLE] = blend(risks[name], risks[best])
        ids, patients = data.dataset.ids[each.rows], data.dataset.groups[each.rows]
        known = {"id": ids, "label": each.labels.astype(int), "patient": patients}
        tables[part] = pd.DataFrame(known | risks)
    return tables


def predictions_csv(table: pd.DataFrame) -> str:
    """Return a table of predictions as its file: the model's own column is ``probability``."""
    id_, label, patient, model, *others = table.columns
    ordered = table[[id_, label, model, patient, *others]]
    return ordered.rename(columns={model: "probability"}).to_csv(index=False)


def generate_reports(stage: Stage, predictions: Predictions) -> dict[int, str]:
    """Let stage 3's model write the reports of the predicted rows, by position in the data set.

    Each process writes its share of the reports and must call.
    """
    model, text = stage.model, stage.text
    assert isinstance(model, LLMWriter)
    assert text is not None
    verdicts = np.zeros(len(text.dataset), dtype=bool)
    verdicts[predictions.rows] = predictions.positive
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


def log_results(metrics: dict[str, Metrics], written: dict[str, Any] | None) -> None:
    """Log the result of the test part in sentences, and the table of all models."""
    test, val = metrics["test"], metrics["val"]
    logger.info("\nTest part:")
    for finding in sentences(test):
        logger.info("%s", finding)
    logger.info("Validation AUROC %s", value_text(val.row(val.models[0], "auroc")))
    logger.info("\n%s\n", model_table(test).to_string(index=False))
    if (table := written_table(written)) is not None:
        logger.info("%s\n", table.iloc[:, :2].to_string(index=False, header=False))


def metrics_for_tracker(config: dict[str, Any]) -> dict[str, float]:
    """Return the model's known metrics of both parts; none in another process than the first."""
    return {
        f"{part}_{name}": each["value"]
        for part in SCORED.values()
        for name, each in config.get("metrics", {}).get(part, {}).items()
        if isinstance(each, dict) and each.get("value") is not None
    }


def report_content(
    stage: Stage,
    data: Data,
    state: TrainState,
    config: dict[str, Any],
    validation: Metrics,
    facts: dict[str, Any],
    predictions: Predictions,
) -> ReportContent:
    """Return what the page says beside its metrics."""
    dataset = data.dataset
    groups = fact_groups(dataset.fact_names)
    statics = "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())
    return ReportContent(
        title=f"{STAGE_NAMES[stage.name].capitalize()}: {dataset.outcome}",
        question=dataset.asked(),
        data={
            "Source": Path(dataset.source).name,
            "Kind": dataset.kind,
            "Used": f"{len(dataset):,} rows of {dataset.n_patients:,} patients",
            "Missing values": "masked, never filled in",
            "Static features": statics or "none are read",
        },
        card=about_model(stage, state.progress.best_epoch, config, validation, facts),
        threshold=config["decision"]["threshold"],
        seed=facts["seed"],
        bands=dataset.subgroups().iloc[predictions.rows],
        flow=dataset.flow,
        split=split_table(dataset.labels, dataset.groups, data.split),
        history=state.progress.history or None,
        reports=config["metrics"].get("reports"),
        notice=random_model_notice(config, facts["arguments"]["model_name"]),
        first=[sentence for sentence in [weight_0_sentence(config)] if sentence],
    )


def about_model(
    stage: Stage,
    best_epoch: int,
    config: dict[str, Any],
    validation: Metrics,
    facts: dict[str, Any],
) -> dict[str, str]:
    """Return the lines of a page on the model; hashes and versions last."""
    base = config.get("base_model")
    parameters = list(stage.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    auroc = validation.row(validation.models[0], "auroc")
    return {
        "Limits": LIMITS,
        "Model": "stage 1 alone" if base is None else describe_language_model(config),
        **({} if base is None else {"Weight beside stage 1": describe_weight(config)}),
        **({"Stage 1": describe_stage1(config)} if config["encoder"] else {}),
        "Parameters": f"{learned:,} trained of {sum(p.numel() for p in parameters):,}",
        "Best epoch": f"{best_epoch}, by {stage.monitor} on the validation part",
        "Validation AUROC": value_text(auroc),
        "Seed": str(facts["seed"]),
        "Licence": licence(config),
        "SHA-256 of the data": facts["data"]["data_sha256"],
        **describe_program(),
    }
