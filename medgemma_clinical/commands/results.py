"""Decide by the scored validation part, and write what a finished run leaves."""

from __future__ import annotations

import itertools
import json
import logging
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
from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.distributed import few_threads, peak_memory, processes
from medgemma_clinical.evaluation import baselines as baselines_of
from medgemma_clinical.evaluation import decision, text_features, verdicts
from medgemma_clinical.evaluation import rules as rules_of_models
from medgemma_clinical.evaluation.baselines import STAGE_NAMES, Baselines
from medgemma_clinical.evaluation.decision import EvaluationOptions
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.metrics_table import MODEL, Metrics, evaluate
from medgemma_clinical.evaluation.tables import model_table
from medgemma_clinical.evaluation.target import Target, observed_rows
from medgemma_clinical.evaluation.text_features import TextModel, TextSettings
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.topic import Evaluated
from medgemma_clinical.evaluation.topics.written_reports import score_reports, written_sentence
from medgemma_clinical.evaluation.verdicts import Finding, value_text
from medgemma_clinical.files import InputError, write_json, write_text
from medgemma_clinical.inference import generation
from medgemma_clinical.models import outcome as outcomes
from medgemma_clinical.models.checkpoints import BASELINES, FACTS, TEXT, Config, weights_sha256
from medgemma_clinical.models.decoders import licence
from medgemma_clinical.models.model_card import MODEL_LIMITS, describe_recommended
from medgemma_clinical.models.model_facts import model_facts
from medgemma_clinical.models.trained_model import model_sha256
from medgemma_clinical.models.trajectory_llm import LLMWriter
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import Progress, describe_epochs, describe_selection

logger = logging.getLogger(__name__)

SCORED = {"val": "validation", "test": "test"}
"""Parts of the split that are scored, and their names in ``metrics.json``."""


CHOOSING = "the validation part"
"""The rows that choose a threshold."""


@dataclass(frozen=True)
class Decided:
    """What was chosen on the validation part, of which the first process knows all."""

    weight: float | None  # of the language model beside stage 1; None where it adds none
    rules: Mapping[str, decision.Rules]  # of the models, the stage's first
    targets: Sequence[Target]
    text: TextSettings | None = None  # of what stage 1 and a baseline read; None without text
    settings: Any = None  # of the baselines; None where there are none
    table: pd.DataFrame | None = None  # of predictions of the validation part
    metrics: Metrics | None = None
    best_model: str | None = None

    @property
    def thresholds(self) -> list[float]:
        """The thresholds of the stage, one a target."""
        return [rule.threshold for rule in next(iter(self.rules.values())).values()]

    @property
    def config(self) -> Config:
        """Keys of the checkpoint's configuration that all processes know."""
        weight: Config = {} if self.weight is None else {"residual_weight": self.weight}
        stage = next(iter(self.rules))
        return {**weight, "decision": rules_of_models.stored(self.rules)[stage]}


def log_decisions(
    decided: Decided, options: decision.DecisionOptions, observed: pd.DataFrame
) -> None:
    """Log weight and recalibration of the stage."""
    if decided.weight is not None:
        how, patients = "chosen" if decided.weight else "not shown to add", observed["patient"]
        text = "weight of what text adds beside stage 1: %g, %s on %d validation patients"
        logger.info(text, decided.weight, how, patients.nunique())
    own = next(iter(decided.rules.values()))
    for target in decided.targets:
        if options.method == decision.BOTH and not own[target.name].is_moved:
            logger.warning(
                "%s: not recalibrated: on the validation part events do not become more frequent "
                "with the risk, or the risks separate them completely",
                target.title,
            )


class RunResults(NamedTuple):
    """What held-out parts show of a stage, in the first process; the others know ``config``."""

    config: Config
    decided: Decided
    tested: Evaluated | None = None  # on the test part
    baselines: Baselines | None = None
    text: TextModel | None = None  # of stage 1 or of a baseline
    lines: Sequence[dict[str, Any]] = ()  # of stage 3's reports


def tuned_text(stage: Stage, data: Data) -> TextSettings | None:
    """Return what is chosen of the text that stage 1 and a baseline read; None without text."""
    if data.text_features == "none":
        return None
    train = data.split["train"]
    fits = outcomes.outcome_of(stage.config).fits(data.dataset, train)
    with few_threads():
        return baselines_of.text_settings(data.dataset, train, data.usable_static, fits)


def fitted_text(
    stage: Stage, data: Data, settings: TextSettings, rows: NDArray[np.int64]
) -> TextModel:
    """Return the regression on the texts of some rows."""
    dataset = data.dataset
    fits = outcomes.outcome_of(stage.config).fits(dataset, rows)
    beside = baselines_of.beside_text(dataset, data.usable_static)
    with few_threads():
        return text_features.fit_text(dataset, rows, fits, settings, beside)


def write(
    folder: Path | None,
    stage: Stage,
    data: Data,
    result: RunResults,
    progress: Progress,
    run: dict[str, Any],
) -> None:
    """Write the results of a stage in its folder."""
    if folder is None or result.tested is None:
        return
    if result.baselines is not None:
        result.config["baselines_sha256"] = result.baselines.sha256
    save_model(folder, stage, result.config, result.baselines, result.text)
    save_predictions(folder, stage, result)
    run_report(stage, data, result, progress, run).write(folder)
    logger.info("report: %s; %s", folder / "report.html", peak_memory())


def evaluate_run(
    stage: Stage,
    data: Data,
    decided: Decided,
    test: decision.Predictions | None,  # None leaves the test part for a later call
    progress: Progress,
    options: EvaluationOptions,
) -> RunResults:
    """Evaluate a stage on the test part, and log the results; each process must call.

    The first process also gets the metrics, within the configuration, and the baselines.
    """
    config: Config = {**stage.config, **decided.config, "threshold_choice": options.threshold}
    if decided.weight is not None:
        cast(Any, stage.model).residual_weight = decided.weight
    lines: list[dict[str, Any]] = []
    reports = text = None
    # The validation part has chosen and now teaches regressions, too.
    taught = np.sort(np.concatenate([data.split["train"], data.split["val"]]))
    if decided.text is not None:
        text = fitted_text(stage, data, decided.text, taught)
    if test is not None and text is not None and stage.name == "trajectory":
        numbers = text.numbers(data.dataset, test.rows)
        test = outcomes.with_text(outcomes.outcome_of(stage.config), test, numbers)
    if test is not None:
        test = outcomes.weighted(test, decided.weight)
        if isinstance(stage.model, LLMWriter):
            lines, reports = write_reports(stage, data, decided, test, options.seed)
    if decided.table is None or decided.metrics is None:
        return RunResults(config, decided, text=text)
    metrics = {"val": decided.metrics}
    targets = decided.targets
    tested, baselines, reference = None, None, {}
    if test is not None:
        tested, baselines = evaluate_test(stage, data, decided, test, options, text)
        metrics["test"] = tested.exact
        targets = tested.targets
        held_out = pd.concat([decided.table, tested.rows], ignore_index=True)
        first = replace(targets[0], watched=None)
        reference = rules_of_models.references(held_out, [*decided.rules], first)
    models = rules_of_models.stored(decided.rules)
    del models[STAGE_NAMES[stage.name]]
    config["metrics"] = metrics_content(
        stage, progress, decided, metrics, reports, options.calibrate
    )
    config["models"] = models
    config["best_model"] = decided.best_model
    config["reference"] = reference
    if baselines is not None:
        config["baseline_inputs"] = baselines.inputs
        text = baselines.text
    choice = decision.describe_threshold(options.threshold, CHOOSING)
    beginning = verdicts.at_threshold(decided.thresholds[0], choice)
    log_results(metrics, targets, beginning, reports, data.dataset.noun)
    logger.info("recommended (--use best): %s", describe_recommended(config))
    if text is not None:
        config["text_sha256"] = text.sha256
    return RunResults(config, decided, tested, baselines, text, lines)


def write_reports(
    stage: Stage, data: Data, decided: Decided, test: decision.Predictions, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write and score the reports of stage 3 on the test part; each process must call.

    Return the lines of ``generations_test.jsonl``, and the metrics of the reports.
    """
    model, text = stage.model, stage.text
    assert isinstance(model, LLMWriter)
    assert text is not None
    name, threshold = STAGE_NAMES[stage.name], decided.thresholds[0]
    table = risk_table(stage, test, data.dataset.observed(test.rows), {})
    alone = rules_of_models.apply_rules(table, {name: decided.rules[name]}, decided.targets)
    risk = alone[name].to_numpy(float)
    is_positive = risk >= threshold
    written = generation.write_reports(
        model,
        text,
        dict(zip(test.rows.tolist(), is_positive.tolist(), strict=True)),
        stage.config["report_tokens"],
        share=(processes().process_index, processes().num_processes),
    )
    texts = dict(gather_object(list(written.items())))
    return score_reports(data.dataset, texts, test.rows, risk, threshold, seed)


def evaluate_test(
    stage: Stage,
    data: Data,
    decided: Decided,
    test: decision.Predictions,
    options: EvaluationOptions,
    text: TextModel | None,  # of training and validation part
) -> tuple[Evaluated, Baselines | None]:
    """Evaluate a stage and its baselines on the test part; return also the baselines."""
    outcome, dataset = outcomes.outcome_of(stage.config), data.dataset
    observed, targets = observed_rows(
        outcome.targets, dataset, test.rows, options.censoring, options.seed
    )
    baselines = None
    forecasts: Mapping[str, Any] = {}
    if decided.settings is not None:
        rows = np.sort(np.concatenate([data.split["train"], data.split["val"]]))
        with few_threads():
            fits = outcome.fits(dataset, rows)
            baselines = baselines_of.fit_baselines(dataset, rows, decided.settings, fits, text)
            forecasts = baselines.forecasts(dataset, test.rows)
    table = risk_table(stage, test, observed, forecasts)
    table = rules_of_models.apply_rules(table, decided.rules, targets)
    metrics = evaluate(
        table, options.seed, decided.thresholds, primary=options.primary, targets=targets
    )
    evaluated = Evaluated(
        table,
        metrics,
        demographics(dataset).iloc[test.rows],
        options.seed,
        decided.thresholds,
        decision.describe_threshold(options.threshold, CHOOSING),
        dataset.noun,
        options.min_cell,
        targets=targets,
    )
    return evaluated, baselines


def save_predictions(folder: Path, stage: Stage, result: RunResults) -> None:
    """Write the predictions of both parts, and the reports of stage 3."""
    decided, tested = result.decided, cast(Evaluated, result.tested)
    digest = model_sha256(result.config, weights_sha256(cast(Any, stage.model)))
    parts = {
        "val": (cast(pd.DataFrame, decided.table), decided.targets),
        "test": (tested.rows, tested.targets),
    }
    for part, (table, targets) in parts.items():
        table = table.assign(**{MODEL: digest})
        text = predictions_csv(table, STAGE_NAMES[stage.name], targets)
        write_text(folder / f"predictions_{part}.csv", text)
    if result.lines:
        text = "".join(json.dumps(line) + "\n" for line in result.lines)
        write_text(folder / "generations_test.jsonl", text)


def run_report(
    stage: Stage, data: Data, result: RunResults, progress: Progress, run: dict[str, Any]
) -> pages.TrainingReport:
    """Return the report of a run."""
    tested, validation = cast(Evaluated, result.tested), cast(Metrics, result.decided.metrics)
    arguments = run["arguments"]
    methods = pages.training_methods(stage, data, run)
    recalibration = methods["recalibration"] if arguments["calibrate"] == "platt" else ""
    is_stage1_again, stage1_page = False, ""
    if arguments["ode_checkpoint"] and result.decided.weight == 0:
        own = Path(arguments["ode_checkpoint"]).absolute().parent
        is_beside = own == Path(arguments["output_dir"]).absolute()
        is_stage1_again = True
        stage1_page = "../trajectory/report.html" if is_beside else ""
    card = describe_training(stage, progress)
    if result.baselines:
        card["Baselines"] = baselines_of.describe_tuning([result.baselines.tuned])
    is_shown = validation.counts["minority_patients"] >= tested.min_cell
    if is_shown:
        card["Validation AUROC"] = value_text(validation.row(validation.models[0], "auroc"))
    card |= {"Seed": str(tested.seed), "Licence": licence(result.config)}
    example = None
    if result.lines and arguments["show_values"]:
        example = example_report(stage, data, result.lines, tested.seed)
    return pages.TrainingReport(
        title=STAGE_NAMES[stage.name].capitalize(),
        evaluated=tested,
        dataset=data.dataset,
        config=result.config,
        results=prediction_topics(tested.targets, recalibration=recalibration),
        split=data.split,
        card=card,
        methods=methods,
        history=progress.history if is_shown else [],
        example=example,
        is_stage1_again=is_stage1_again,
        stage1_page=stage1_page,
        list_patients=arguments["report_patients"],
    )


def save_model(
    folder: Path,
    stage: Stage,
    config: Config,
    baselines: Baselines | None,
    text: TextModel | None,
) -> None:
    """Write the best weights with their final configuration, baselines and metrics."""
    if baselines:
        write_text(folder / BASELINES, baselines.to_json())
    if text:
        write_text(folder / TEXT, text.to_json())
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
    rules = decided.rules[STAGE_NAMES[stage.name]]
    content = {
        "stage": stage.name,
        "averaged_epochs": progress.averaged,
        "targets": [target.to_json() for target in decided.targets],
        "threshold": decided.thresholds[0],
        "thresholds": decided.thresholds,  # of the targets
        "calibration": {"method": calibrate, "moves": rules_of_models.moves_of(rules)},
    }
    for part, part_metrics in metrics.items():
        content[SCORED[part]] = part_metrics.to_json()
    if decided.weight is not None:
        content["residual_weight"] = decided.weight
    if written is not None:
        content["reports"] = written
    return content


def risk_table(
    stage: Stage,
    scored: decision.Predictions,
    observed: pd.DataFrame,
    beside: Mapping[str, Any],  # forecasts of the baselines
) -> pd.DataFrame:
    """Return what happened in a part, then the risks of model, stage 1, baselines, ensemble.

    Those of stage 1 are as it delivers them, the others as models give them.
    """
    outcome, name = outcomes.outcome_of(stage.config), STAGE_NAMES[stage.name]
    forecasts = outcomes.forecasts_of_models(
        outcome, name, outcome.forecast(scored.outputs), beside, scored.share
    )
    columns = outcomes.risk_columns(outcome, {name: forecasts.pop(name)})
    columns |= {column: risk[scored.rows] for column, risk in stage.stage1_risks.items()}
    return observed.join(pd.DataFrame(columns | outcomes.risk_columns(outcome, forecasts)))


def baseline_names(data: Data) -> list[str]:
    """Return the names of the baselines of some data."""
    train = data.split["train"]
    fits = outcomes.fit_outcome(data).fits(data.dataset, train)
    return baselines_of.baseline_names(
        data.dataset,
        train,
        data.usable_static,
        fits,
        with_text=data.text_features != "none",
    )


def check_primary(primary: str | None, data: Data) -> None:
    """Refuse a ``--primary`` that is none of the baselines of these data, before the training."""
    names = baseline_names(data)
    if data.text_features != "none" and baselines_of.WITH_TEXT not in names:
        raise InputError(
            f"--text_features {data.text_features}: the texts of the training part share no word "
            f"that {MIN_CELL} patients have, or too few patients have the event: leave it out"
        )
    if primary is not None and primary not in names:
        raise InputError(f"--primary {primary}: choose from {', '.join(names)}")


def example_report(
    stage: Stage, data: Data, lines: Sequence[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Return a drawn line of ``generations_test.jsonl`` with its prompt."""
    assert stage.text is not None
    line = lines[int(np.random.default_rng(seed).integers(len(lines)))]
    row = int(np.argmax(data.dataset.ids.astype(str) == line["id"]))
    return {**line, "prompt": data.dataset.prompt(row, stage.text.options)}


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
    words = beginning, noun, pages.few_events_advice(tested)
    log_findings(tested, verdicts.sentences(tested, *words, targets=targets), targets)
    if sentence := written_sentence(written):
        logger.info("%s", sentence)


def log_findings(metrics: Metrics, findings: Iterable[Finding], targets: Sequence[Target]) -> None:
    """Log a result in sentences, and the table of all models."""
    for line in (*findings, model_table(metrics, targets=targets).to_string(index=False)):
        logger.info("%s", line)


def metrics_for_tracker(config: Config) -> dict[str, float]:
    """Return the model's known metrics of both parts; none in another process than the first."""
    return {
        f"{part}_{name}": metric["value"]
        for part in SCORED.values()
        for name, metric in config.get("metrics", {}).get(part, {}).items()
        if isinstance(metric, dict) and metric.get("value") is not None
    }


def describe_training(stage: Stage, progress: Progress) -> dict[str, str]:
    """Return what the page of a run says of the training first."""
    parameters = list(stage.model.parameters())
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    averaged = progress.averaged
    epochs = "; ".join(map(describe_epochs, averaged))
    epochs = f"{epochs}: {describe_selection(len(averaged))}"
    if {*itertools.chain(*averaged)} == {1} and len(progress.history) > 1:
        epochs += "; training did not improve it after the first epoch"
    return {
        "Limits": MODEL_LIMITS,
        "Parameters": f"{learned:,} trained of {sum(p.numel() for p in parameters):,}",
        "Epochs": epochs,
    }
