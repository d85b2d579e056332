"""Decide by the scored validation part, and write what a finished run leaves."""

from __future__ import annotations

import itertools
import json
import logging
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from accelerate.utils import gather_object
from numpy.typing import NDArray

from medgemma_clinical.commands.flags import decision_options
from medgemma_clinical.commands.report_content import training_content, training_methods
from medgemma_clinical.commands.run_folder import METRICS
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import few_threads, peak_memory, processes
from medgemma_clinical.evaluation import decision
from medgemma_clinical.evaluation.baselines import (
    STAGE_NAMES,
    Baselines,
    describe_tuning,
)
from medgemma_clinical.evaluation.metrics_table import MODEL, Metrics
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.evaluation.time_table import UNCENSORED
from medgemma_clinical.evaluation.topics.topic import ReportContent, TopicBuilder
from medgemma_clinical.evaluation.topics.written_reports import score_reports, written_sentence
from medgemma_clinical.evaluation.verdicts import Finding, at_threshold, value_text
from medgemma_clinical.files import InputError, write_json, write_text
from medgemma_clinical.inference.scoring import write_in_batches
from medgemma_clinical.models.checkpoints import BASELINES, FACTS, Config, weights_sha256
from medgemma_clinical.models.decoders import licence
from medgemma_clinical.models.model_card import MODEL_LIMITS, describe_recommended
from medgemma_clinical.models.model_facts import model_facts
from medgemma_clinical.models.outcome import Outcome, fit_outcome, outcome_of, weighted
from medgemma_clinical.models.trained_model import model_sha256
from medgemma_clinical.models.trajectory_llm import LLMWriter, TrajectoryLLM
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import Progress, describe_epochs, describe_selection

logger = logging.getLogger(__name__)

SCORED = {"val": "validation", "test": "test"}
"""Parts of the split that are scored, and their names in ``metrics.json``."""


MIN_EVENTS = 30
"""Patients with, and without, the event in a test part below which a run names ``--folds``."""


def write_results(
    scored: dict[str, decision.Predictions],
    stage: Stage,
    data: Data,
    folder: Path | None,
    progress: Progress,
    run: dict[str, Any],
    args: Namespace,
    *,
    with_baselines: bool = True,
) -> tuple[Config, Baselines | None]:
    """Write and log the results of the scored parts; each process must call.

    The first process also gets the metrics, within the configuration, and the baselines.
    """
    options, outcome = decision_options(args), outcome_of(stage.config)
    observed = {
        part: outcome.observed(data.dataset, part_scored.rows, args.censoring, args.seed)
        for part, part_scored in scored.items()
    }
    predictions, decided = apply_decisions(scored, observed["val"], stage, data, options)
    is_writer = isinstance(stage.model, LLMWriter) and "test" in predictions
    texts = generate_reports(stage, predictions["test"]) if is_writer else {}
    # The caller tests a model without test part, as scikit-learn's tools do.
    if not len(data.split["test"]) or not processes().is_main_process:
        return {**stage.config, **decided}, None
    fitted: dict[str, Baselines] = {}
    # The validation part chooses thresholds and the recommended model by risks of models that have
    # not seen it. The models that are tested and kept learn from both parts.
    both = np.sort(np.concatenate([data.split["train"], data.split["val"]]))
    taught = {"val": data.split["train"], "test": both}
    with few_threads():
        if with_baselines:
            settings = outcome.tune_baselines(data.dataset, data.split["train"], data.usable_static)
            fitted = {
                part: outcome.fit_baselines(data.dataset, taught[part], settings)
                for part in predictions
            }
        tables, rules = prediction_tables(stage, data, predictions, observed, fitted, options)
    last = [*predictions][-1]  # the test part, unless it is left for a later call
    baselines = fitted.get(last)
    metrics = {
        part: outcome.evaluate(
            table, args.seed, predictions[part].rule.threshold, primary=args.primary
        )
        for part, table in tables.items()
    }
    lines: list[dict[str, Any]] = []
    reports: dict[str, Any] | None = None
    if is_writer:
        lines, reports = score_reports(data.dataset, texts, predictions["test"], args.seed)
    name = STAGE_NAMES[stage.name]
    held_out = pd.concat(tables.values()), [name, *rules]
    config: Config = {
        **stage.config,
        **decided,
        "metrics": metrics_content(stage, progress, decided, metrics, reports, args.calibrate),
        "models": {name: asdict(rule) for name, rule in rules.items()},
        **cast(Config, outcome.recommend(tables["val"], metrics["val"], name, [*rules])),
        **cast(Config, outcome.references(*held_out)),
        **({"baseline_inputs": baselines.inputs} if baselines else {}),
    }
    choice = decision.describe_threshold(args.threshold, "the validation part")
    beginning = at_threshold(predictions[last].rule.threshold, choice)
    log_results(metrics, outcome, beginning, reports, data.dataset.noun)
    if "best_model" in config:
        logger.info("recommended (--use best): %s", describe_recommended(config))
    if folder:
        if baselines:
            config["baselines_sha256"] = baselines.sha256
        save_model(folder, stage, config, baselines)
        digest = model_sha256(config, weights_sha256(cast(Any, stage.model)))
        for part, table in tables.items():
            named = table.assign(**{MODEL: digest})
            write_text(folder / f"predictions_{part}.csv", predictions_csv(named))
        if is_writer:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(folder / "generations_test.jsonl", text)
        rows, tuned = predictions["test"].rows, baselines.tuned if baselines else None
        content = run_content(stage, data, progress, config, run, args, rows, tuned)
        if is_writer and args.show_values:
            content = replace(content, example=example_report(stage, data, rows, lines, args.seed))
        write_page(folder, tables["test"], metrics["test"], content, outcome.topics, args)
        logger.info("report: %s; %s", folder / "report.html", peak_memory())
    return config, baselines


def write_page(
    folder: Path,
    table: pd.DataFrame,
    metrics: Metrics,
    content: ReportContent,
    topics: Sequence[TopicBuilder],
    args: Namespace,
) -> None:
    """Write the report of trained models, on predictions of held-out rows."""
    write_report(
        folder / "report.html",
        table,
        metrics,
        content,
        topics,
        min_cell=args.min_cell,
        list_patients=args.report_patients,
        folder=folder,
    )


def save_model(folder: Path, stage: Stage, config: Config, baselines: Baselines | None) -> None:
    """Write the best weights with their final configuration, baselines and metrics."""
    if baselines:
        write_text(folder / BASELINES, baselines.to_json())
    stage.save(folder, config)
    if stage.name == "trajectory":  # stages 2 and 3 have theirs beside the card
        write_text(folder / FACTS, model_facts(config))
    write_json(folder / METRICS, config["metrics"])


def metrics_content(
    stage: Stage,
    progress: Progress,
    decided: Config,
    metrics: dict[str, Metrics],
    written: dict[str, Any] | None,
    calibrate: str,
) -> dict[str, Any]:
    """Return the content of ``metrics.json``."""
    rule = decided["decision"]
    calibration: dict[str, Any] = {"method": calibrate}
    if decision.DecisionRule.from_config(decided).is_moved:
        calibration |= {"slope": rule["slope"], "intercept": rule["intercept"]}
    weight = {name: decided[name] for name in ("residual_weight",) if name in decided}
    return {
        "stage": stage.name,
        "averaged_epochs": progress.averaged,
        "threshold": rule["threshold"],
        "calibration": calibration,
        **{SCORED[part]: part_metrics.to_json() for part, part_metrics in metrics.items()},
        **weight,
        **({} if written is None else {"reports": written}),
    }


def apply_decisions(
    scored: dict[str, decision.Predictions],
    observed: pd.DataFrame,  # of the validation part
    stage: Stage,
    data: Data,
    options: decision.DecisionOptions,
) -> tuple[dict[str, decision.Predictions], Config]:
    """Fit weight and decision rule to the validation part alone; apply both to all parts."""
    decided: Config = {}
    model, val = stage.model, scored["val"]
    patients = observed["patient"].to_numpy(str)
    if isinstance(model, TrajectoryLLM) and model.adds_stage1:
        targets, outcome = data.dataset.targets()[val.rows], model.outcome
        functions = partial(outcome.row_losses, targets), partial(outcome.auroc, targets)
        weight = decision.fit_residual_weight(val.offset, val.outputs, patients, *functions)
        model.residual_weight = decided["residual_weight"] = weight
        how = "chosen" if weight else "not shown to add"
        text = "weight of the language model beside stage 1: %g, %s on %d validation patients"
        logger.info(text, weight, how, len(np.unique(patients)))
        scored = {part: weighted(outcome, each, weight) for part, each in scored.items()}
    rule = outcome_of(stage.config).decide(scored["val"], observed, options)
    if options.recalibration == "platt" and not rule.is_moved:
        logger.warning(
            "not recalibrated: on the validation part events do not become more frequent with the "
            "risk, or the risks separate them completely"
        )
    decided |= {"decision": asdict(rule), "threshold_choice": options.threshold}
    return {part: replace(part_scored, rule=rule) for part, part_scored in scored.items()}, decided


def prediction_tables(
    stage: Stage,
    data: Data,
    predictions: dict[str, decision.Predictions],
    observed: dict[str, pd.DataFrame],
    baselines: dict[str, Baselines],  # by part, as the two others
    options: decision.DecisionOptions,
) -> tuple[dict[str, pd.DataFrame], dict[str, decision.DecisionRule]]:
    """Return a table for each part and the decision rules of the models beside the stages.

    Columns: id, what happened, patient, then the risks of the model, stage 1, baselines, ensemble.
    """
    outcome, name, tables = outcome_of(stage.config), STAGE_NAMES[stage.name], {}
    beside = {
        part: baselines[part].risks(data.dataset, scored.rows) if baselines else {}
        for part, scored in predictions.items()
    }
    val = outcome.forecast(predictions["val"])
    rules = outcome.fit_rules(name, val, beside["val"], observed["val"], options)
    for part, scored in predictions.items():
        forecasts = outcome.models(name, outcome.forecast(scored), beside[part], rules)
        columns = outcome.risks(name, forecasts.pop(name))
        columns |= {column: risk[scored.rows] for column, risk in stage.stage1_risks.items()}
        for model, forecast in forecasts.items():
            columns |= outcome.risks(model, forecast)
        tables[part] = observed[part].join(pd.DataFrame(columns))
    return tables, rules


def check_primary(primary: str | None, data: Data) -> None:
    """Refuse a ``--primary`` that is none of the baselines of these data, before the training."""
    outcome = fit_outcome(data)
    names = outcome.baseline_names(data.dataset, data.split["train"], data.usable_static)
    if primary is not None and primary not in names:
        raise InputError(f"--primary {primary}: choose from {', '.join(names)}")


def predictions_csv(table: pd.DataFrame) -> str:
    """Return a table of predictions as its file: the model's own column is ``probability``."""
    names = [name for name in map(str, table) if not name.startswith(UNCENSORED)]
    place = names.index("patient")
    model, risks = names[place + 1], names[place + 2 :]
    ordered = table[[*names[:place], model, "patient", *risks]]
    own = {name: name.removeprefix(f"{model} ") for name in risks}
    return ordered.rename(columns=own | {model: "probability"}).to_csv(index=False)


def generate_reports(stage: Stage, predictions: decision.Predictions) -> dict[int, str]:
    """Write stage 3's reports, by position in the data set; each process must call."""
    model, text = stage.model, stage.text
    assert isinstance(model, LLMWriter)
    assert text is not None
    rows, max_tokens = predictions.rows, stage.config["report_tokens"]
    share = processes().process_index, processes().num_processes
    written = write_in_batches(model, text, rows, predictions.positive, max_tokens, share=share)
    return dict(gather_object(list(written.items())))


def example_report(
    stage: Stage, data: Data, rows: NDArray[np.int64], lines: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Return a drawn line of ``generations_test.jsonl``, of these rows, with its prompt."""
    assert stage.text is not None
    drawn = int(np.random.default_rng(seed).integers(len(lines)))
    prompt = data.dataset.prompt(int(rows[drawn]), stage.text.options)
    return {**lines[drawn], "prompt": prompt}


def log_results(
    metrics: dict[str, Metrics],
    outcome: Outcome,
    beginning: str,
    written: dict[str, Any] | None,
    noun: str,
) -> None:
    """Log the result of the last part in sentences, and the table of all models."""
    *_, (part, tested) = metrics.items()
    val = metrics["val"]
    auroc = value_text(val.row(val.models[0], "auroc"))
    logger.info("\n%s part (validation AUROC %s):", SCORED[part].capitalize(), auroc)
    words = beginning, noun, few_events_advice(tested)
    log_findings(tested, outcome.sentences(tested, *words), outcome)
    if sentence := written_sentence(written):
        logger.info("%s", sentence)


def log_findings(metrics: Metrics, findings: Iterable[Finding], outcome: Outcome) -> None:
    """Log a result in sentences, and the table of all models."""
    for line in (*findings, outcome.table(metrics).to_string(index=False)):
        logger.info("%s", line)


def few_events_advice(test: Metrics) -> str:
    """Return the way out where the test part has few events, in words."""
    if test.counts["minority_patients"] >= MIN_EVENTS:
        return ""
    return "These are few events: --folds 5 tests every patient once."


def metrics_for_tracker(config: Config) -> dict[str, float]:
    """Return the model's known metrics of both parts; none in another process than the first."""
    return {
        f"{part}_{name}": metric["value"]
        for part in SCORED.values()
        for name, metric in config.get("metrics", {}).get(part, {}).items()
        if isinstance(metric, dict) and metric.get("value") is not None
    }


def run_content(
    stage: Stage,
    data: Data,
    progress: Progress,
    config: Config,
    run: dict[str, Any],
    args: Namespace,
    rows: NDArray[np.int64],  # positions of the test part
    tuned: bool | None,
) -> ReportContent:
    """Return what the page of a run says beside its metrics."""
    validation = Metrics.from_json(config["metrics"]["validation"])
    hides_metrics = validation.counts["minority_patients"] < args.min_cell
    auroc = value_text(validation.row(validation.models[0], "auroc"))
    parameters = list(stage.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    averaged = progress.averaged
    epochs = "; ".join(map(describe_epochs, averaged))
    epochs = f"{epochs}: {describe_selection(len(averaged))}"
    if {*itertools.chain(*averaged)} == {1} and len(progress.history) > 1:
        epochs += "; training did not improve it after the first epoch"
    methods = training_methods(stage, data, run)
    stage1_page = None
    if args.ode_checkpoint and config.get("residual_weight") == 0:
        beside = Path(args.ode_checkpoint).absolute().parent == args.output_dir.absolute()
        stage1_page = "../trajectory/report.html" if beside else ""
    return training_content(
        STAGE_NAMES[stage.name].capitalize(),
        data.dataset,
        config,
        rows,
        data.split,
        args,
        card={
            "Limits": MODEL_LIMITS,
            "Parameters": f"{learned:,} trained of {sum(p.numel() for p in parameters):,}",
            "Epochs": epochs,
            **({} if tuned is None else {"Baselines": describe_tuning([tuned])}),
            **({} if hides_metrics else {"Validation AUROC": auroc}),
            "Seed": str(args.seed),
            "Licence": licence(config),
        },
        threshold=config["decision"]["threshold"],
        threshold_choice=decision.describe_threshold(args.threshold, "the validation part"),
        recalibration=methods["recalibration"] if args.calibrate == "platt" else "",
        history=None if hides_metrics else progress.history or None,
        reports=config["metrics"].get("reports"),
        stage1_page=stage1_page,
        advice=few_events_advice(Metrics.from_json(config["metrics"]["test"])),
        methods=methods,
    )
