"""K-fold cross-validation, then a model of all patients: ``--folds``, ``--final``."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.commands import pages, plan, prediction_files, results, run_folder
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.data.fold_split import draw_folds, fold_dataset, foldable, site_folds
from medgemma_clinical.data.training_data import Data
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import few_threads, processes
from medgemma_clinical.evaluation import baselines, decision, metrics_table, rules
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, Baselines
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.target import Target, is_risk, observed_rows, targets_of_config
from medgemma_clinical.evaluation.text_features import TextModel
from medgemma_clinical.evaluation.topics.all_topics import prediction_topics
from medgemma_clinical.evaluation.topics.topic import Evaluated, TopicBuilder
from medgemma_clinical.files import InputError, file_hash, read_json, write_json, write_text
from medgemma_clinical.models.checkpoints import BASELINES, TRAJECTORY_FILE, Config, read_trajectory
from medgemma_clinical.models.model_card import MODEL_LIMITS, describe_recommended
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.models.trained_model import read_trained_config
from medgemma_clinical.training.stage import Stage
from medgemma_clinical.training.state import Progress, describe_epochs, describe_selection

logger = logging.getLogger(__name__)

OPTIMISTIC = "these rows, whose metrics at it are optimistic"
"""The rows that choose a threshold."""

FOLD = "{fold}"
"""Stands in a flag's value for the number of the fold."""

Json = dict[str, Any]


@dataclass(frozen=True)
class FoldRuns:
    """The runs of the folds of some rows, and what their joint results are made by."""

    folder: Path  # of the joint results
    stages: Sequence[Path]  # of each run
    rows: TrajectoryDataset
    fold: NDArray[np.int64]  # of each row, (N,)
    leaves_out: bool
    options: decision.EvaluationOptions

    @property
    def model(self) -> str:
        """The name of the stage among models."""
        return STAGE_NAMES[self.stages[0].name]


def run_folds(
    args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: plan.Train
) -> int:
    """Train the unfinished folds; evaluate each patient by the model that did not see it."""
    args = Namespace(**{**vars(args), "site": args.leave_out or args.site})
    stage1 = stage1_of_all(args)
    rows = foldable(read(args), args.max_samples, args.seed)
    runs, folds = plan_folds(args, rows)
    if args.only_fold is not None:  # a task of a job array; the whole command joins the folds
        if args.only_fold >= len(runs):
            raise InputError(f"--only_fold {args.only_fold}: the folds are 0 to {len(runs) - 1}")
        return plan.carry_out(runs[args.only_fold :][:1], train)
    return plan.carry_out(runs, train) or join_and_finish(args, folds, stage1, train)


def plan_folds(
    args: Namespace, rows: TrajectoryDataset, title: str = ""
) -> tuple[list[plan.Run], FoldRuns]:
    """Return the runs of the folds, or of the sites."""
    if args.leave_out:
        fold, names = site_folds(rows)
        titles = [f"fold {k}, site {name}" for k, name in enumerate(names)]
    else:
        fold = draw_folds(rows.groups, rows.labels, args.folds, args.seed, rows.source)
        titles, names = [f"{title}fold {k}" for k in range(args.folds)], [""] * args.folds
    runs = [
        plan.Run(titles[k], fold_arguments(k, args), fold_dataset(rows, fold, k, args.seed, name))
        for k, name in enumerate(names)
    ]
    for run in runs:
        run_folder.given_stage1(run.args)  # a missing one shows before hours go into the others
    folder, stages = run_folder.folds_folder(args), [run_folder.stage_folder(x.args) for x in runs]
    options = decision.EvaluationOptions.of(args)
    return runs, FoldRuns(folder, stages, rows, fold, bool(args.leave_out), options)


def join_and_finish(
    args: Namespace,
    folds: FoldRuns,
    stage1: Path | None,  # of all patients, below the stage 2 or 3 of ``--final``
    train: plan.Train,
) -> int:
    """Write what finished folds say together; with ``--final`` train on all patients."""
    if processes().is_main_process:
        write_fold_results(folds)
    processes().wait_for_everyone()
    # Other results of the folds, known by their hash, make another run.
    final = file_hash(folds.folder / run_folder.METRICS)
    if not args.final:
        earlier = (run_folder.read_run(run_folder.stage_folder(args)) or {}).get("arguments", {})
        if earlier.get("final") not in (None, False, final):
            text = "%s holds a model of all patients by other folds: --final trains it anew"
            logger.warning(text, run_folder.stage_folder(args))
        return EXIT_DONE
    everyone = copy.copy(folds.rows)
    everyone.held_out = ()
    settings = {**vars(args), "final": final, "ode_checkpoint": stage1 or args.ode_checkpoint}
    return plan.run_or_continue(plan.Run("all patients", Namespace(**settings), everyone), train)


def stage1_of_all(args: Namespace) -> Path | None:
    """Return the stage 1 of all patients beside that of the folds; refuse a missing one."""
    folder = run_folder.folds_folder(args).parent
    example = folder / f"folds_trajectory/fold_{FOLD}" / TRAJECTORY_FILE
    plan.check_stage1(args.ode_checkpoint, "--folds", FOLD, example)
    if args.ode_checkpoint is None or not args.final:
        return None
    path = args.ode_checkpoint.absolute()
    if (path.parent.name, path.name) != (f"fold_{FOLD}", TRAJECTORY_FILE):
        raise InputError(
            f"--final: no stage 1 of all patients is known beside --ode_checkpoint {path}: "
            f"give RUN/folds_trajectory/fold_{FOLD}/{TRAJECTORY_FILE}, whose own --final wrote "
            f"RUN/{TRAJECTORY_FILE}"
        )
    whole: Path = path.parents[2] / TRAJECTORY_FILE
    metrics = whole.is_file() and read_trajectory(whole).config.get("metrics", {})
    if not (metrics and "folds" in metrics):
        problem = "not of all patients" if metrics else "no stage 1 of all patients"
        raise InputError(f"{whole}: {problem}: train stage 1 by --folds K --final first")
    return whole


def fold_arguments(k: int, args: Namespace) -> Namespace:
    """Return the arguments of one fold's run: its folder, ``{fold}`` filled in."""
    folder = run_folder.folds_folder(args) / f"fold_{k}"
    alone = {"folds": None, "leave_out": None, "only_fold": None, "final": False}
    return plan.filled(args, FOLD, k, output_dir=folder, **alone)


# --------------------------------------------------------------------------- their results


class FoldResults(NamedTuple):
    """The joint predictions of the folds, and what is made of them."""

    evaluated: Evaluated
    drawn: metrics_table.Drawn
    config: Config
    recalibrated: Mapping[str, decision.Recalibrated]  # by target


def evaluate_folds(
    folds: FoldRuns,
    ids: Collection[str] | None = None,  # of these rows alone
    seed: int | None = None,  # of the bootstrap, by default that of the folds
) -> FoldResults:
    """Evaluate the joint predictions of the folds, and decide by them."""
    options = folds.options
    seed = options.seed if seed is None else seed
    configs = [read_trained_config(folder) for folder in folds.stages]
    table, positions, targets = read_joint(folds, ids)
    fold = folds.fold[positions]
    stored = [{folds.model: config["decision"], **config["models"]} for config in configs]
    of_folds = [{name: decision.read_rules(x) for name, x in own.items()} for own in stored]
    of_rule = options.decision(decision.TESTS)
    final, table, recalibrated = rules.decide_folds(table, of_folds, fold, targets, of_rule)
    own_rules = final[folds.model]
    thresholds = [rule.threshold for rule in own_rules.values()]
    drawn = metrics_table.draw_metrics(
        table, seed, thresholds, fold, targets=targets, recalibrated=recalibrated
    )
    metrics = metrics_table.compared_models(drawn, options.primary)
    decided = decide(folds, final, table, metrics, targets)
    content = {
        "stage": folds.stages[0].name,
        "targets": [target.to_json() for target in targets],
        **pooled_epochs(folds.stages),
        "threshold": thresholds[0],
        "thresholds": thresholds,
        "calibration": {"method": options.calibrate, "moves": rules.moves_of(own_rules)},
        "folds": metrics.to_json(),
        "decided": decided,
    }
    table.insert([*table].index("patient") + 1, "fold", fold)
    evaluated = Evaluated(
        table,
        metrics,
        demographics(folds.rows).iloc[positions],
        seed,
        thresholds,
        decision.describe_threshold(options.threshold, OPTIMISTIC),
        folds.rows.noun,
        options.min_cell,
        folds=len(folds.stages),
        leaves_out=folds.leaves_out,
        targets=targets,
    )
    config: Config = {**configs[0], **decided, "metrics": content}
    return FoldResults(evaluated, drawn, config, recalibrated)


def read_joint(
    folds: FoldRuns, ids: Collection[str] | None
) -> tuple[pd.DataFrame, NDArray[np.int64], tuple[Target, ...]]:
    """Return the test predictions of all folds, which of the rows they are, and their targets."""
    tables, targets = prediction_files.read_runs(folds.stages, folds.model)
    table = pd.concat(tables, ignore_index=True)
    if ids is not None:
        table = table[table["id"].isin(ids)]
    # A row without a value of the series that its fold reads has no prediction.
    positions = pd.Series(np.arange(len(folds.rows)), folds.rows.ids)[table["id"]].to_numpy()
    table = table.iloc[np.argsort(positions)].reset_index(drop=True)
    positions = np.sort(positions)
    options = folds.options
    observed, targets = observed_rows(
        targets, folds.rows, positions, options.censoring, options.seed
    )
    risks = [column for column in map(str, table) if is_risk(column)]
    return observed.join(table[risks]), positions, targets


def decide(
    folds: FoldRuns,
    final: rules.RulesOfModels,
    table: pd.DataFrame,
    metrics: metrics_table.Metrics,
    targets: Sequence[Target],
) -> Config:
    """Return what the configuration of a model of all patients has from the folds."""
    models = rules.stored(final)
    decided: Config = {"decision": models.pop(folds.model), "models": models}
    decided["threshold_choice"] = folds.options.threshold
    decided["best_model"] = rules.recommend(table, metrics, targets, folds.model, [*models])
    decided["reference"] = rules.references(table, [*final], targets[0])
    contents = [read_json(folder / run_folder.METRICS) for folder in folds.stages]
    weights = [content["residual_weight"] for content in contents if "residual_weight" in content]
    if len(weights) == len(contents):
        decided["residual_weight"] = float(np.median(weights))
    return decided


def write_fold_results(folds: FoldRuns) -> None:
    """Join the test predictions of the folds; write the result files."""
    joint = evaluate_folds(folds)
    evaluated, config = joint.evaluated, joint.config
    text = prediction_files.predictions_csv(evaluated.rows, folds.model, evaluated.targets)
    write_text(folds.folder / prediction_files.FOLDS, text)
    write_json(folds.folder / run_folder.METRICS, config["metrics"])
    before = {target: risks.before for target, risks in joint.recalibrated.items()}
    recalibration = recalibration_words(config, folds.options.calibrate)
    topics = prediction_topics(evaluated.targets, before, recalibration)
    last = folds_sentence(evaluated.metrics, evaluated.folds)
    folds_report(folds, config, evaluated, topics, last).write(folds.folder)
    log_evaluated(evaluated)
    logger.info("recommended (--use best): %s", describe_recommended(config))
    summary = folds_sentence(evaluated.exact, evaluated.folds)
    logger.info("%s\nreport: %s", summary, folds.folder / "report.html")


def log_evaluated(evaluated: Evaluated) -> None:
    """Log the metrics of folds or repeats in sentences and a table."""
    logger.info("")
    results.log_findings(evaluated.metrics, pages.sentences(evaluated), evaluated.targets)


def folds_sentence(metrics: metrics_table.Metrics, folds: int) -> str:
    """Return how the metrics of the folds were made, in a sentence, and how the folds differ."""
    auroc = metrics.row(metrics.models[0], "auroc")
    hidden = np.isnan(auroc["min"])
    spread = "" if hidden else f" (AUROC {auroc['min']:.3f} to {auroc['max']:.3f})"
    return (
        f"Each of these patients was predicted once, by the one of {folds} models that did not "
        "learn from them: AUROC, AUPRC, Brier score, scaled Brier score and log loss are means "
        f"over the {folds} folds{spread}, all else is of all rows."
    )


def recalibration_words(config: Config, calibrate: str) -> str:
    """Return whether the risks of ``--final`` are recalibrated, and which are shown."""
    if moves := rules.describe_moves(rules.rules_of(config), targets_of_config(config)):
        return (
            "Tests on these rows chose to recalibrate: the risks of --final are "
            f"{moves}, fitted on all rows. "
            "Slope, level and ICI are those before; all other metrics are of risks that are moved, "
            "each fold's by what the other folds show."
        )
    if calibrate == "auto":
        return (
            "The risks are not recalibrated: tests show no fault, which does not prove that there "
            "is none."
        )
    return "Risks are not recalibrated."


def folds_report(
    folds: FoldRuns,
    config: Config,
    evaluated: Evaluated,  # the folds, or their repeats
    topics: Sequence[TopicBuilder],
    last: str,  # the sentence behind the findings
    title: str = "",  # ends the title
) -> pages.TrainingReport:
    """Return the report of folds or of their repeats."""
    kind = "each site held out" if folds.leaves_out else "each patient held out"
    epochs = describe_epochs(config["metrics"]["averaged_epochs"])
    selection = describe_selection(config["members"] if config["stage"] == "trajectory" else 1)
    tuned = [read_json(folder / BASELINES).get("tuned") for folder in folds.stages]
    rows = predicted_rows(folds, evaluated)
    return pages.TrainingReport(
        title=f"{folds.model.capitalize()}, {kind}{title}",
        evaluated=evaluated,
        dataset=rows,
        config={**config, "data_sha256": folds.rows.fingerprint()},
        results=topics,
        split={"all folds": np.arange(len(rows))},
        card={
            "Limits": MODEL_LIMITS,
            "Epochs": f"each fold has {selection}; --final averages {epochs}, by the folds' pooled "
            "validation loss",
            "Baselines": f"in each fold {baselines.describe_tuning(tuned)}; those of "
            "--final are tuned by the same rule, and fitted, on all patients",
            "Seed": str(folds.options.seed),
        },
        methods={
            "split": folds_sentence(evaluated.metrics, evaluated.folds),
            "recalibration": recalibration_words(config, folds.options.calibrate),
        },
        last=last,
        list_patients=folds.options.report_patients,
    )


def predicted_rows(folds: FoldRuns, evaluated: Evaluated) -> TrajectoryDataset:
    """Return the rows that have a prediction."""
    is_predicted = np.isin(folds.rows.ids, evaluated.rows["id"].to_numpy())
    if is_predicted.all():
        return folds.rows
    rule = "without a value of a series that their fold reads"
    if folds.leaves_out:
        rule = f"of sites that only train, or {rule}"
    return folds.rows.keep_rows(is_predicted, rule)


# --------------------------------------------------------------------------- all patients


def pooled_epochs(folders: Sequence[Path]) -> Json:
    """Return the validation loss by epoch, a mean over the folds, and the epochs near its lowest.

    A fold that stopped earlier keeps its last loss.
    """
    histories = [pd.read_json(folder / run_folder.HISTORY, lines=True) for folder in folders]
    losses = pd.concat([h.set_index("epoch")["val_loss"] for h in histories], axis=1)
    pooled = losses.ffill().mean(axis=1).tolist()
    (good,) = Progress(losses=[[loss] for loss in pooled]).good_epochs()
    return {"averaged_epochs": good, "validation_losses": pooled}


def with_final_epochs(stage: Stage, joint: Path) -> Stage:
    """Let a ``--final`` average the epochs of the folds; the schedule stays that of a fold.

    ``joint``: the folder of their joint results.
    """
    content = read_json(joint / run_folder.METRICS)
    return replace(stage, final_epochs=content["averaged_epochs"])


def write_final(
    stage: Stage, data: Data, folder: Path, joint: Path
) -> tuple[Config, Baselines | None, TextModel | None]:
    """Write the model of all patients by the joint results of the folds.

    Return its configuration, baselines, and regression on texts.
    """
    content = read_json(joint / run_folder.METRICS)
    decided = content.pop("decided")
    config: Config = {**stage.config, **decided, "metrics": content}
    if "residual_weight" in decided:
        stage.model.residual_weight = decided["residual_weight"]
    if not processes().is_main_process:
        return config, None, None
    rows = data.split["train"]
    fits = outcome_of(stage.config).fits(data.dataset, rows)
    with few_threads():
        text = results.tuned_text(stage, data)
        settings = baselines.tune_baselines(data.dataset, rows, data.usable_static, fits, text=text)
        fitted = baselines.fit_baselines(data.dataset, rows, settings, fits)
    models = {name: model for name, model in fitted.models.items() if name in config["models"]}
    regression = (
        fitted.text if {*baselines.text_names(fitted.text)} <= {*config["models"]} else None
    )
    fitted = replace(fitted, models=models, text=regression)  # those of all folds
    config["models"] = {name: decided["models"][name] for name in [*fitted.names, ENSEMBLE]}
    config |= {"baseline_inputs": fitted.inputs, "baselines_sha256": fitted.sha256}
    if regression is not None:
        config["text_sha256"] = regression.sha256
    results.save_model(folder, stage, config, fitted, regression)
    return config, fitted, regression
