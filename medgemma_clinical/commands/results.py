"""Decide by the scored validation part, and write what a finished run leaves."""

from __future__ import annotations

import itertools
import json
import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from accelerate.utils import gather_object
from numpy.typing import NDArray

from medgemma_clinical.commands import pages
from medgemma_clinical.commands.prediction_files import predictions_csv
from medgemma_clinical.commands.run_folder import METRICS
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import few_threads, peak_memory, processes
from medgemma_clinical.evaluation import baselines as baselines_of
from medgemma_clinical.evaluation import decision, verdicts
from medgemma_clinical.evaluation import rules as rules_of_models
from medgemma_clinical.evaluation.baselines import (
    STAGE_NAMES,
    Baselines,
    describe_tuning,
    fit_baselines,
)
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.metrics_table import MODEL, Metrics, evaluate
from medgemma_clinical.evaluation.rules import apply_rules
from medgemma_clinical.evaluation.tables import model_table
from medgemma_clinical.evaluation.target import Target, observed_rows
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.topic import Evaluated
from medgemma_clinical.evaluation.topics.written_reports import score_reports, written_sentence
from medgemma_clinical.evaluation.verdicts import Finding, at_threshold, value_text
from medgemma_clinical.files import InputError, write_json, write_text
from medgemma_clinical.inference import generation
from medgemma_clinical.models.checkpoints import BASELINES, FACTS, Config, weights_sha256
from medgemma_clinical.models.decoders import licence
from medgemma_clinical.models.model_card import MODEL_LIMITS, describe_recommended
from medgemma_clinical.models.model_facts import model_facts
from medgemma_clinical.models.outcome import (
    fit_outcome,
    forecasts_of_models,
    outcome_of,
    risk_columns,
    weighted,
)
from medgemma_clinical.models.trained_model import model_sha256
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import Progress, describe_epochs, describe_selection

logger = logging.getLogger(__name__)

SCORED = {"val": "validation", "test": "test"}
"""Parts of the split that are scored, and their names in ``metrics.json``."""


MIN_EVENTS = 30
"""Patients with, and without, the event in a test part below which a run names ``--folds``."""


@dataclass(frozen=True)
class Decided:
    """What was chosen on the validation part, of which the first process knows all."""

    weight: float | None  # of the language model beside stage 1; None where it adds none
    rules: Mapping[str, decision.Rules]  # of the models, the stage's first
    targets: Sequence[Target]
    settings: Any = None  # of the baselines; None where there are none
    table: pd.DataFrame | None = None  # of predictions of the validation part
    metrics: Metrics | None = None
    best_model: str | None = None

    @property
    def rule(self) -> decision.DecisionRule:
        """The rule of the stage's first risk."""
        own = next(iter(self.rules.values()))
        return own[self.targets[0].name]

    @property
    def thresholds(self) -> list[float]:
        """The thresholds of the stage, one a target."""
        return [rule.threshold for rule in next(iter(self.rules.values())).values()]

    @property
    def config(self) -> Config:
        """Keys of the checkpoint's configuration that all processes know."""
        weight: Config = {} if self.weight is None else {"residual_weight": self.weight}
        own, *_ = rules_of_models.stored(self.rules).values()
        return {**weight, "decision": own}


def log_decisions(
    decided: Decided, options: decision.DecisionOptions, observed: pd.DataFrame
) -> None:
    """Log weight and recalibration of the stage."""
    if decided.weight is not None:
        how, patients = "chosen" if decided.weight else "not shown to add", observed["patient"]
        text = "weight of the language model beside stage 1: %g, %s on %d validation patients"
        logger.info(text, decided.weight, how, patients.nunique())
    own = next(iter(decided.rules.values()))
    for target in decided.targets:
        if options.recalibration == "platt" and not own[target.name].is_moved:
            logger.warning(
                "%s: not recalibrated: on the validation part events do not become more frequent "
                "with the risk, or the risks separate them completely",
                target.title,
            )


def write(
    folder: Path | None,
    stage: Stage,
    data: Data,
    decided: Decided,
    test: decision.Predictions | None,  # None leaves the test part for a later call
    progress: Progress,
    run: dict[str, Any],
    args: Namespace,
) -> tuple[Config, Baselines | None]:
    """Write and log the results of a stage; each process must call.

    The first process also gets the metrics, within the configuration, and the baselines.
    """
    config: Config = {**stage.config, **decided.config, "threshold_choice": args.threshold}
    if decided.weight is not None:
        cast(Any, stage.model).residual_weight = decided.weight
    if test is not None:
        test = weighted(test, decided.weight)
    lines: list[dict[str, Any]] = []
    reports = None
    if test is not None and isinstance(stage.model, LLMWriter):
        lines, reports = write_reports(stage, data, decided, test, args.seed)
    if decided.table is None or decided.metrics is None:
        return config, None
    metrics = {"val": decided.metrics}
    tested = None
    if test is not None:
        tested = evaluate_test(stage, data, decided, test, args)
        metrics["test"] = tested.metrics
    targets = decided.targets if tested is None else tested.targets
    baselines = None if tested is None else tested.baselines
    rules = rules_of_models.stored(decided.rules)
    del rules[STAGE_NAMES[stage.name]]
    config["metrics"] = metrics_content(stage, progress, decided, metrics, reports, args.calibrate)
    config["models"] = rules
    config["best_model"] = decided.best_model
    config["reference"] = {} if tested is None else references(decided, tested)
    if baselines is not None:
        config["baseline_inputs"] = baselines.inputs
    choice = decision.describe_threshold(args.threshold, "the validation part")
    beginning = at_threshold(decided.rule.threshold, choice)
    log_results(metrics, targets, beginning, reports, data.dataset.noun)
    logger.info("recommended (--use best): %s", describe_recommended(config))
    if folder is not None and tested is not None:
        if baselines is not None:
            config["baselines_sha256"] = baselines.sha256
        save_model(folder, stage, config, baselines)
        save_predictions(folder, stage, config, decided, tested, lines)
        write_page(folder, stage, data, decided, tested, lines, config, progress, run, args)
        logger.info("report: %s; %s", folder / "report.html", peak_memory())
    return config, baselines


def write_reports(
    stage: Stage, data: Data, decided: Decided, test: decision.Predictions, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write and score the reports of stage 3 on the test part; each process must call.

    Return the lines of ``generations_test.jsonl``, and the metrics of the reports.
    """
    name, threshold = STAGE_NAMES[stage.name], decided.rule.threshold
    table = risk_table(stage, test, data.dataset.observed(test.rows), {})
    alone = apply_rules(table, {name: decided.rules[name]}, decided.targets)
    risk = alone[name].to_numpy(float)
    texts = generate_reports(stage, test.rows, risk >= threshold)
    return score_reports(data.dataset, texts, test.rows, risk, threshold, seed)


class Tested(NamedTuple):
    """What the test part shows of a stage."""

    rows: NDArray[np.int64]  # positions in the data set
    table: pd.DataFrame  # of predictions
    metrics: Metrics
    targets: Sequence[Target]  # with the weights of these rows
    baselines: Baselines | None


def evaluate_test(
    stage: Stage,
    data: Data,
    decided: Decided,
    test: decision.Predictions,
    args: Namespace,
) -> Tested:
    """Evaluate a stage and its baselines on the test part."""
    outcome, dataset = outcome_of(stage.config), data.dataset
    observed, targets = observed_rows(
        outcome.targets, dataset, test.rows, args.censoring, args.seed
    )
    baselines = None
    forecasts: Mapping[str, Any] = {}
    if decided.settings is not None:
        # The validation part has chosen and now teaches, too.
        rows = np.sort(np.concatenate([data.split["train"], data.split["val"]]))
        with few_threads():
            fits = outcome.fits(dataset, rows)
            baselines = fit_baselines(dataset, rows, decided.settings, fits)
            forecasts = baselines.forecasts(dataset, test.rows)
    table = apply_rules(risk_table(stage, test, observed, forecasts), decided.rules, targets)
    metrics = evaluate(table, args.seed, decided.thresholds, primary=args.primary, targets=targets)
    return Tested(test.rows, table, metrics, targets, baselines)


def references(decided: Decided, tested: Tested) -> dict[str, Any]:
    """Return the calibration of each model on both held-out parts, which ``monitor`` reads."""
    held_out = pd.concat([decided.table, tested.table], ignore_index=True)
    first = replace(tested.targets[0], watched=None)
    return rules_of_models.references(held_out, [*decided.rules], first)


def save_predictions(
    folder: Path,
    stage: Stage,
    config: Config,
    decided: Decided,
    tested: Tested,
    lines: list[dict[str, Any]],  # of stage 3's reports
) -> None:
    """Write the predictions of both parts, and the reports of stage 3."""
    name = STAGE_NAMES[stage.name]
    digest = model_sha256(config, weights_sha256(cast(Any, stage.model)))
    parts = {
        "val": (cast(pd.DataFrame, decided.table), decided.targets),
        "test": (tested.table, tested.targets),
    }
    for part, (table, targets) in parts.items():
        text = predictions_csv(table.assign(**{MODEL: digest}), name, targets)
        write_text(folder / f"predictions_{part}.csv", text)
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(folder / "generations_test.jsonl", text)


def write_page(
    folder: Path,
    stage: Stage,
    data: Data,
    decided: Decided,
    tested: Tested,
    lines: list[dict[str, Any]],  # of stage 3's reports
    config: Config,
    progress: Progress,
    run: dict[str, Any],
    args: Namespace,
) -> None:
    """Write ``report.html`` of a run, with its figures and ``tripod.md``."""
    dataset, validation = data.dataset, cast(Metrics, decided.metrics)
    evaluated = Evaluated(
        tested.table,
        tested.metrics,
        demographics(dataset).iloc[tested.rows],
        args.seed,
        decided.rule.threshold,
        decision.describe_threshold(args.threshold, "the validation part"),
        dataset.noun,
        args.min_cell,
        targets=tested.targets,
        thresholds=decided.thresholds,
    )
    methods = pages.training_methods(stage, data, run)
    recalibration = methods["recalibration"] if args.calibrate == "platt" else ""
    is_shown = validation.counts["minority_patients"] >= args.min_cell
    example = None
    if lines and args.show_values:
        example = example_report(stage, data, tested.rows, lines, args.seed)
    stage1_page = None
    if args.ode_checkpoint and config.get("residual_weight") == 0:
        is_beside = Path(args.ode_checkpoint).absolute().parent == args.output_dir.absolute()
        stage1_page = "../trajectory/report.html" if is_beside else ""
    card = run_card(
        stage,
        progress,
        config,
        seed=args.seed,
        tuned=tested.baselines.tuned if tested.baselines else None,
        validation=validation if is_shown else None,
    )
    pages.write_training_page(
        folder,
        STAGE_NAMES[stage.name].capitalize(),
        evaluated,
        dataset,
        config,
        prediction_topics(tested.targets, recalibration=recalibration),
        split=data.split,
        card=card,
        methods=methods,
        history=progress.history if is_shown else [],
        example=example,
        stage1_page=stage1_page,
        advice=few_events_advice(tested.metrics),
        list_patients=args.report_patients,
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
    decided: Decided,
    metrics: dict[str, Metrics],
    written: dict[str, Any] | None,
    calibrate: str,
) -> dict[str, Any]:
    """Return the content of ``metrics.json``."""
    own = next(iter(decided.rules.values()))
    calibration = {"method": calibrate, "moves": rules_of_models.moves_of(own)}
    weight = {} if decided.weight is None else {"residual_weight": decided.weight}
    return {
        "stage": stage.name,
        "averaged_epochs": progress.averaged,
        "targets": [target.to_json() for target in decided.targets],
        "threshold": decided.rule.threshold,
        "thresholds": decided.thresholds,  # of the targets
        "calibration": calibration,
        **{SCORED[part]: part_metrics.to_json() for part, part_metrics in metrics.items()},
        **weight,
        **({} if written is None else {"reports": written}),
    }


def risk_table(
    stage: Stage,
    scored: decision.Predictions,
    observed: pd.DataFrame,
    beside: Mapping[str, Any],  # forecasts of the baselines
) -> pd.DataFrame:
    """Return what happened in a part, then the risks of model, stage 1, baselines, ensemble.

    Those of stage 1 are as it delivers them, the others as models give them.
    """
    outcome, name = outcome_of(stage.config), STAGE_NAMES[stage.name]
    forecasts = forecasts_of_models(outcome, name, outcome.forecast(scored.outputs), beside)
    columns = risk_columns(outcome, {name: forecasts.pop(name)})
    columns |= {column: risk[scored.rows] for column, risk in stage.stage1_risks.items()}
    return observed.join(pd.DataFrame(columns | risk_columns(outcome, forecasts)))


def baseline_names(data: Data) -> list[str]:
    """Return the names of the baselines of some data."""
    train = data.split["train"]
    fits = fit_outcome(data).fits(data.dataset, train)
    return baselines_of.baseline_names(data.dataset, train, data.usable_static, fits)


def check_primary(primary: str | None, data: Data) -> None:
    """Refuse a ``--primary`` that is none of the baselines of these data, before the training."""
    names = baseline_names(data)
    if primary is not None and primary not in names:
        raise InputError(f"--primary {primary}: choose from {', '.join(names)}")


def generate_reports(
    stage: Stage, rows: NDArray[np.int64], positive: NDArray[np.bool_]
) -> dict[int, str]:
    """Write stage 3's reports, by position in the data set; each process must call."""
    model, text = stage.model, stage.text
    assert isinstance(model, LLMWriter)
    assert text is not None
    max_tokens = stage.config["report_tokens"]
    share = processes().process_index, processes().num_processes
    verdicts = dict(zip(rows.tolist(), positive.tolist(), strict=True))
    written = generation.write_reports(model, text, verdicts, max_tokens, share=share)
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
    targets: Sequence[Target],
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
    log_findings(tested, verdicts.sentences(tested, *words, targets=targets), targets)
    if sentence := written_sentence(written):
        logger.info("%s", sentence)


def log_findings(metrics: Metrics, findings: Iterable[Finding], targets: Sequence[Target]) -> None:
    """Log a result in sentences, and the table of all models."""
    for line in (*findings, model_table(metrics, targets=targets).to_string(index=False)):
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


def run_card(
    stage: Stage,
    progress: Progress,
    config: Config,
    *,
    seed: int,
    tuned: bool | None,  # None without baselines
    validation: Metrics | None,  # None where they are hidden
) -> dict[str, str]:
    """Return what the page of a run says of the model first."""
    parameters = list(stage.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    averaged = progress.averaged
    epochs = "; ".join(map(describe_epochs, averaged))
    epochs = f"{epochs}: {describe_selection(len(averaged))}"
    if {*itertools.chain(*averaged)} == {1} and len(progress.history) > 1:
        epochs += "; training did not improve it after the first epoch"
    card = {
        "Limits": MODEL_LIMITS,
        "Parameters": f"{learned:,} trained of {sum(p.numel() for p in parameters):,}",
        "Epochs": epochs,
    }
    if tuned is not None:
        card["Baselines"] = describe_tuning([tuned])
    if validation is not None:
        card["Validation AUROC"] = value_text(validation.row(validation.models[0], "auroc"))
    return card | {"Seed": str(seed), "Licence": licence(config)}
