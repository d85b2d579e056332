"""Decide by the scored validation part, and write what a finished run leaves."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate.utils import gather_object

from medgemma_clinical.data.sample_size import describe_sample_size
from medgemma_clinical.data.texts import code
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import peak_memory, processes
from medgemma_clinical.evaluation.baselines import (
    ENSEMBLE,
    STAGE_NAMES,
    Baselines,
    baseline_names,
    describe_tuning,
    fit_baselines,
    fit_rules,
    model_risks,
)
from medgemma_clinical.evaluation.case_mix import demographics, subgroups
from medgemma_clinical.evaluation.decision import (
    DecisionRule,
    Predictions,
    fit_decision_rule,
    fit_residual_weight,
    recommended_model,
)
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.report import ReportContent, write_report
from medgemma_clinical.evaluation.table_one import table_one
from medgemma_clinical.evaluation.tables import model_table, part_table, written_sentence
from medgemma_clinical.evaluation.verdicts import sentences, value_text
from medgemma_clinical.evaluation.written_reports import score_reports
from medgemma_clinical.files import InputError, write_json, write_text
from medgemma_clinical.inference.scoring import write_in_batches
from medgemma_clinical.models.checkpoints import BASELINES, Config
from medgemma_clinical.models.model_card import (
    MODEL_LIMITS,
    built_in_notice,
    describe_recommended,
    page_card,
    shareable,
    weight_0_sentence,
)
from medgemma_clinical.models.terms import licence
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import Progress, describe_selection

logger = logging.getLogger(__name__)

SCORED = {"val": "validation", "test": "test"}
"""Parts of the split that are scored, and their names in ``metrics.json``."""


MIN_EVENTS = 30
"""Events of a test part below which a run names ``--folds``."""


def write_results(
    scored: dict[str, Predictions],
    stage: Stage,
    data: Data,
    folder: Path | None,
    progress: Progress,
    run: dict[str, Any],
    args: Namespace,
) -> tuple[Config, Baselines | None]:
    """Write and log the results of validation and test part; each process must call.

    The first process also gets the metrics, within the configuration, and the baselines.
    """
    predictions, decided = apply_decisions(scored, stage, data, args.calibrate)
    config: Config = {**stage.config, **decided}
    if "test" not in predictions:  # the caller tests, as scikit-learn's tools do
        return config, None
    texts = None
    if isinstance(stage.model, LLMWriter):
        texts = generate_reports(stage, predictions["test"])
    if not processes().is_main_process:
        return config, None
    baselines = fit_baselines(data.dataset, data.split["train"], data.usable_static)
    tables, rules = prediction_tables(stage, data, predictions, baselines, args.calibrate)
    decision = config["decision"]
    threshold: float = decision["threshold"]
    metrics = {
        part: evaluate(table, args.seed, threshold, primary=args.primary)
        for part, table in tables.items()
    }
    calibration = {"method": args.calibrate}
    if (decision["slope"], decision["intercept"]) != (1.0, 0.0):
        calibration |= {"slope": decision["slope"], "intercept": decision["intercept"]}
    content: dict[str, Any] = {
        "stage": stage.name,
        "selected_epoch": progress.best_epoch,
        "threshold": threshold,
        "calibration": calibration,
        **{SCORED[part]: part_metrics.to_json() for part, part_metrics in metrics.items()},
    }
    if "residual_weight" in decided:
        content["residual_weight"] = decided["residual_weight"]
    lines: list[dict[str, Any]] = []
    example = None
    if texts is not None:
        dataset, tested = data.dataset, predictions["test"]
        lines, content["reports"] = score_reports(dataset, texts, tested, args.seed)
        if args.show_values and stage.text:
            first = int(tested.labels.argmax())  # with the event
            prompt = dataset.prompt(int(tested.rows[first]), stage.text.options)
            example = {**lines[first], "prompt": prompt}
    config["metrics"] = content
    config["models"] = {name: asdict(rule) for name, rule in rules.items()}
    config["best_model"] = recommend(tables["val"], STAGE_NAMES[stage.name], rules)
    config["baseline_inputs"] = baselines.inputs
    log_results(metrics, content.get("reports"), data.dataset.noun)
    logger.info("recommended (--use best): %s", describe_recommended(config))
    if folder:
        config["baselines_sha256"] = baselines.sha256
        write_text(folder / BASELINES, baselines.to_json())
        stage.save(folder, config)
        write_json(folder / "metrics.json", content)
        for part, table in tables.items():
            write_text(folder / f"predictions_{part}.csv", predictions_csv(table))
        if texts is not None:
            generations = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(folder / "generations_test.jsonl", generations)
        page = report_content(
            stage, data, progress, config, metrics["val"], predictions["test"], run, baselines
        )
        write_report(
            folder / "report.html",
            tables["test"],
            metrics["test"],
            replace(page, example=example),
            min_cell=args.min_cell,
            list_patients=args.report_patients,
            folder=folder,
        )
        logger.info("report: %s; %s", folder / "report.html", peak_memory())
    return config, baselines


def apply_decisions(
    scored: dict[str, Predictions], stage: Stage, data: Data, calibrate: str
) -> tuple[dict[str, Predictions], Config]:
    """Fit weight and decision rule to the validation part alone; apply both to all parts."""
    decided: Config = {}
    scored = {**scored}
    model, val = stage.model, scored["val"]
    if isinstance(model, TrajectoryLLM) and model.adds_stage1:
        patients = data.dataset.groups[val.rows]
        weight = fit_residual_weight(val.labels, val.offset, val.logit, patients)
        model.residual_weight = decided["residual_weight"] = weight
        how = "chosen" if weight else "not shown to add"
        text = "weight of the language model beside stage 1: %g, %s on %d validation patients"
        logger.info(text, weight, how, len(np.unique(patients)))
        for part, each in scored.items():
            logit = each.offset + weight * (each.logit - each.offset)
            scored[part] = replace(each, logit=logit)
    rule = fit_decision_rule(val.labels, scored["val"].logit, calibrate)
    decided["decision"] = asdict(rule)
    return {part: replace(each, rule=rule) for part, each in scored.items()}, decided


def prediction_tables(
    stage: Stage,
    data: Data,
    predictions: dict[str, Predictions],
    baselines: Baselines,
    calibrate: str,
) -> tuple[dict[str, pd.DataFrame], dict[str, DecisionRule]]:
    """Return a table for each part and the decision rules of the models beside the stages.

    Columns: id, label, patient, then the risks of the model, stage 1, baselines and ensemble.
    """
    name, dataset, val = STAGE_NAMES[stage.name], data.dataset, predictions["val"]
    baseline_risks = {
        part: baselines.risks(dataset, scored.rows) for part, scored in predictions.items()
    }
    rules = fit_rules(val.labels, name, val.probability, baseline_risks["val"], calibrate)
    tables = {}
    for part, scored in predictions.items():
        risks = model_risks(name, scored.probability, baseline_risks[part], rules)
        table = {"id": dataset.ids[scored.rows], "label": scored.labels.astype(int)}
        table |= {"patient": dataset.groups[scored.rows], name: risks.pop(name)}
        if stage.stage1_risks is not None:
            table[STAGE_NAMES["trajectory"]] = stage.stage1_risks[scored.rows]
        tables[part] = pd.DataFrame(table | risks)
    return tables, rules


def recommend(table: pd.DataFrame, stage: str, others: Iterable[str]) -> str:
    """Return the model of ``--use best``, by predictions of held-out rows."""
    names = table.columns.intersection([stage, *others])
    risks = {name: table[name].to_numpy(float) for name in names}
    labels, patients = table["label"].to_numpy(float), table["patient"].to_numpy(str)
    return recommended_model(labels, risks, patients, [ENSEMBLE, stage])


def check_primary(primary: str | None, data: Data) -> None:
    """Refuse a ``--primary`` that is none of the baselines of these data, before the training."""
    names = baseline_names(data.dataset, data.split["train"], data.usable_static)
    if primary is not None and primary not in names:
        raise InputError(f"--primary {primary}: choose from {', '.join(names)}")


def predictions_csv(table: pd.DataFrame) -> str:
    """Return a table of predictions as its file: the model's own column is ``probability``."""
    id_, label, patient, model, *others = table.columns
    ordered = table[[id_, label, model, patient, *others]]
    return ordered.rename(columns={model: "probability"}).to_csv(index=False)


def generate_reports(stage: Stage, predictions: Predictions) -> dict[int, str]:
    """Write stage 3's reports, by position in the data set; each process must call."""
    model, text = stage.model, stage.text
    assert isinstance(model, LLMWriter)
    assert text is not None
    rows, max_tokens = predictions.rows, stage.config["report_tokens"]
    share = processes().process_index, processes().num_processes
    written = write_in_batches(model, text, rows, predictions.positive, max_tokens, share=share)
    return dict(gather_object(list(written.items())))


def log_results(metrics: dict[str, Metrics], written: dict[str, Any] | None, noun: str) -> None:
    """Log the result of the test part in sentences, and the table of all models."""
    test, val = metrics["test"], metrics["val"]
    auroc = value_text(val.row(val.models[0], "auroc"))
    logger.info("\nTest part (validation AUROC %s):", auroc)
    for line in (*sentences(test, noun), model_table(test).to_string(index=False)):
        logger.info("%s", line)
    if sentence := written_sentence(written):
        logger.info("%s", sentence)
    if (events := test.counts["events"]) < MIN_EVENTS:
        logger.info("%d events in the test part: --folds 5 predicts every patient once", events)


def metrics_for_tracker(config: Config) -> dict[str, float]:
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
    progress: Progress,
    config: Config,
    validation: Metrics,
    predictions: Predictions,
    run: dict[str, Any],
    baselines: Baselines,
) -> ReportContent:
    """Return what the page says beside its metrics."""
    min_cell = run["arguments"]["min_cell"]
    few, config = validation.counts["minority_patients"] < min_cell, shareable(config, min_cell)
    auroc = value_text(validation.row(validation.models[0], "auroc"))
    dataset, best_epochs = data.dataset, progress.best_epochs
    parameters = list(stage.model.parameters())
    best = f"{', '.join(map(str, best_epochs))}: {describe_selection(len(best_epochs))}"
    if max(best_epochs) == 1 < len(progress.history):
        best += "; training did not improve it after the first epoch"
    stage1_page, stage1 = None, run["arguments"]["ode_checkpoint"]
    if stage1 and config.get("residual_weight") == 0:
        beside = Path(stage1).absolute().parent == Path(run["arguments"]["output_dir"]).absolute()
        stage1_page = "../trajectory/report.html" if beside else ""
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    return ReportContent(
        title=f"{STAGE_NAMES[stage.name].capitalize()}: {dataset.outcome}",
        question=dataset.task_description(),
        data=describe_source(dataset, dataset.static_inputs),
        card=page_card(
            config,
            {
                "Limits": MODEL_LIMITS,
                "Parameters": f"{learned:,} trained of {sum(p.numel() for p in parameters):,}",
                "Best epoch": best,
                "Baselines": describe_tuning([baselines.tuned]),
                **({} if few else {"Validation AUROC": auroc}),
                "Seed": str(run["seed"]),
                "Licence": licence(config),
            },
        ),
        threshold=config["decision"]["threshold"],
        seed=run["seed"],
        bands=subgroups(demographics(dataset)).iloc[predictions.rows],
        noun=dataset.noun,
        flow=dataset.flow,
        split=part_table(dataset.labels, dataset.groups, data.split),
        table_one=table_one(dataset, data.split),
        history=None if few else progress.history or None,
        reports=config["metrics"].get("reports"),
        stage1_page=stage1_page,
        sites=None if dataset.sites is None else dataset.sites[predictions.rows],
        methods=training_methods(stage, data, run),
        notice=built_in_notice(config),
        first=list(filter(None, [weight_0_sentence(config)])),
    )


def describe_source(dataset: TrajectoryDataset, static: Iterable[str]) -> dict[str, str]:
    """Return what a page says of its data; ``static`` features are those that the model reads."""
    return {
        "Source": Path(dataset.source).name,
        "Kind": dataset.kind,
        "Used": f"{len(dataset):,} {dataset.noun}",
        "Missing values": "masked, never filled in",
        "Static features": ", ".join(static) or "none are read",
    }


def describe_recalibration(calibrate: str, rows: str) -> str:
    """Return how a model was recalibrated, on which rows."""
    platt = f"Platt's method on the {rows}; all results are those after it."
    return platt if calibrate == "platt" else "None."


def training_methods(stage: Stage, data: Data, run: dict[str, Any]) -> dict[str, str]:
    """Return what ``tripod.md`` says of data and training, in sentences."""
    dataset, arguments = data.dataset, run["arguments"]
    rates = [f"{stage.learning_rates[part]:g} ({part})" for part in stage.learning_parts]
    origin = dataset.describe_origin(arguments["seed"])
    size = describe_sample_size(dataset, data.usable_static, data.split["train"])
    named = ["members", "dynamics", "solver", "dropout"]
    named += [] if stage.text is None else ["lora_rank", "lora_alpha", "num_prefix_tokens"]
    encoder = stage.config["encoder"] or {}  # of a stage 1 that was trained before, too
    known = {**arguments, "members": stage.config["members"], **encoder}
    own = [f"{name} {known[name]}" for name in named]
    return {
        "split": f"Each patient is in one of three parts ({origin}): the training part fits the "
        "weights, the validation part chooses epoch and threshold, the test part was scored once.",
        "preparation": f"Rows keep their latest {dataset.read_options['max_len']} observations.",
        "unusable": "; ".join(f"{code(k)} ({why})" for k, why in data.unusable),
        "training": f"At most {stage.epochs} epochs, stopped after {stage.patience} without a "
        f"lower validation loss; steps of {run['rows_a_step'] * run['processes']} rows; AdamW with "
        f"learning rates {', '.join(rates)}; {', '.join(own)}. "
        "The program tunes none of these; run.json has every setting.",
        "recalibration": describe_recalibration(arguments["calibrate"], "validation part"),
        # It tells the number of events.
        **({} if arguments["min_cell"] else {"sample_size": size}),
    }
