"""K-fold cross-validation, then a model of all patients: ``--folds``, ``--final``."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
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
from medgemma_clinical.evaluation import baselines, decision, metrics_table, rules, verdicts
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, Baselines
from medgemma_clinical.evaluation.demographics import demographics
from medgemma_clinical.evaluation.target import is_risk, observed_rows, targets_of_config
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

FOLD = "{fold}"
"""Stands in a flag's value for the number of the fold."""

Json = dict[str, Any]


def run_folds(
    args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: plan.Train
) -> int:
    """Train the unfinished folds; evaluate each patient by the model that did not see it."""
    args = Namespace(**{**vars(args), "site": args.leave_out or args.site})
    stage1 = stage1_of_all(args)
    rows = foldable(read(args), args.max_samples, args.seed)
    runs, fold = plan_folds(args, rows)
    if args.only_fold is not None:  # a task of a job array; the whole command joins the folds
        if args.only_fold >= len(runs):
            raise InputError(f"--only_fold {args.only_fold}: the folds are 0 to {len(runs) - 1}")
        return plan.carry_out(runs[args.only_fold :][:1], train)
    return plan.carry_out(runs, train) or join_and_finish(args, rows, fold, stage1, train)


def plan_folds(
    args: Namespace, rows: TrajectoryDataset, title: str = ""
) -> tuple[list[plan.Run], NDArray[np.int64]]:
    """Return the runs of the folds, or of the sites, and the fold of each row, (N,)."""
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
    return runs, fold


def join_and_finish(
    args: Namespace,
    rows: TrajectoryDataset,
    fold: NDArray[np.int64],
    stage1: Path | None,  # of all patients, below the stage 2 or 3 of ``--final``
    train: plan.Train,
) -> int:
    """Write what finished folds say together; with ``--final`` train on all patients."""
    if processes().is_main_process:
        write_fold_results(args, rows, fold)
    processes().wait_for_everyone()
    # Other results of the folds, known by their hash, make another run.
    final = file_hash(run_folder.folds_folder(args) / run_folder.METRICS)
    if not args.final:
        earlier = (run_folder.read_run(run_folder.stage_folder(args)) or {}).get("arguments", {})
        if earlier.get("final") not in (None, False, final):
            text = "%s holds a model of all patients by other folds: --final trains it anew"
            logger.warning(text, run_folder.stage_folder(args))
        return EXIT_DONE
    everyone = copy.copy(rows)
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
    tuned: list[bool | None]  # whether the baselines of each fold were tuned
    recalibrated: Mapping[str, decision.Recalibrated]  # by target


def evaluate_folds(
    args: Namespace,
    rows: TrajectoryDataset,
    fold: NDArray[np.int64],  # (N,)
    ids: Collection[str] | None = None,  # of these rows alone
    seed: int | None = None,  # of the bootstrap, by default that of the folds
) -> FoldResults:
    """Evaluate the joint predictions of the folds, and decide by them."""
    seed = args.seed if seed is None else seed
    runs = [fold_arguments(k, args) for k in range(fold.max() + 1)]
    folders = [run_folder.stage_folder(fold_args) for fold_args in runs]
    configs = [read_trained_config(path) for path in folders]
    stage = folders[0].name
    name = STAGE_NAMES[stage]
    tables, targets = prediction_files.read_runs(folders, name)
    table = pd.concat(tables, ignore_index=True)
    if ids is not None:
        table = table[table["id"].isin(ids)]
    # A row without a value of the series that its fold reads has no prediction.
    positions = pd.Series(np.arange(len(rows)), rows.ids)[table["id"].tolist()].to_numpy()
    table = table.iloc[np.argsort(positions)].reset_index(drop=True)
    positions = np.sort(positions)
    observed, targets = observed_rows(targets, rows, positions, args.censoring, args.seed)
    table = observed.join(table[[column for column in map(str, table) if is_risk(column)]])
    fold_of_row = fold[positions]
    of_folds = [
        {
            model: decision.read_rules(stored)
            for model, stored in {name: config["decision"], **config["models"]}.items()
        }
        for config in configs
    ]
    options = decision.DecisionOptions.chosen(args.calibrate, args.threshold, "tests")
    final, table, recalibrated = rules.decide_folds(table, of_folds, fold_of_row, targets, options)
    models = rules.stored(final)
    decided: Config = {"decision": models.pop(name), "models": models}
    decided["threshold_choice"] = options.threshold
    thresholds = [rule.threshold for rule in final[name].values()]
    drawn = metrics_table.draw_metrics(
        table,
        seed,
        thresholds,
        split=fold_of_row,
        targets=targets,
        recalibrated=recalibrated,
    )
    metrics = metrics_table.compared_models(drawn, args.primary)
    decided["best_model"] = rules.recommend(table, metrics, targets, name, [*models])
    decided["reference"] = rules.references(table, [name, *models], targets[0])
    contents = [read_json(path / run_folder.METRICS) for path in folders]
    weights = [content["residual_weight"] for content in contents if "residual_weight" in content]
    if len(weights) == len(folders):
        decided["residual_weight"] = float(np.median(weights))
    content = {
        "stage": stage,
        "targets": [target.to_json() for target in targets],
        **pooled_epochs(folders),
        "threshold": thresholds[0],
        "thresholds": thresholds,
        "calibration": {"method": args.calibrate, "moves": rules.moves_of(final[name])},
        "folds": metrics.to_json(),
        "decided": decided,
    }
    config: Config = {**configs[0], **decided, "metrics": content}
    tuned = [read_json(path / BASELINES).get("tuned") for path in folders]
    table.insert([*table].index("patient") + 1, "fold", fold_of_row)
    evaluated = Evaluated(
        table,
        metrics,
        demographics(rows).iloc[positions],
        seed,
        thresholds,
        decision.describe_threshold(
            args.threshold, "these rows, whose metrics at it are optimistic"
        ),
        rows.noun,
        args.min_cell,
        folds=len(folders),
        leaves_out=bool(args.leave_out),
        targets=targets,
    )
    return FoldResults(evaluated, drawn, config, tuned, recalibrated)


def write_fold_results(args: Namespace, rows: TrajectoryDataset, fold: NDArray[np.int64]) -> None:
    """Join the test predictions of the folds; write the result files."""
    joint = evaluate_folds(args, rows, fold)
    evaluated, config = joint.evaluated, joint.config
    folder = run_folder.folds_folder(args)
    text = prediction_files.predictions_csv(
        evaluated.rows, STAGE_NAMES[config["stage"]], evaluated.targets
    )
    write_text(folder / prediction_files.FOLDS, text)
    write_json(folder / run_folder.METRICS, config["metrics"])
    before = {target: risks.before for target, risks in joint.recalibrated.items()}
    recalibration = recalibration_words(config, args.calibrate)
    topics = prediction_topics(evaluated.targets, before, recalibration)
    last = folds_sentence(evaluated.metrics, evaluated.folds)
    write_folds_page(folder, args, rows, joint, evaluated, topics, last=last)
    log_evaluated(evaluated)
    logger.info("recommended (--use best): %s", describe_recommended(config))
    summary = folds_sentence(evaluated.exact, evaluated.folds)
    logger.info("%s\nreport: %s", summary, folder / "report.html")


def log_evaluated(evaluated: Evaluated) -> None:
    """Log the metrics of folds or repeats in sentences and a table."""
    logger.info("")
    words = evaluated.at_threshold, evaluated.noun
    findings = verdicts.sentences(evaluated.metrics, *words, targets=evaluated.targets)
    results.log_findings(evaluated.metrics, findings, evaluated.targets)


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


def write_folds_page(
    folder: Path,
    args: Namespace,
    rows: TrajectoryDataset,
    joint: FoldResults,
    evaluated: Evaluated,
    topics: Sequence[TopicBuilder],
    *,
    title: str = "",  # ends the title
    last: str,  # the sentence behind the findings
) -> None:
    """Write the page of folds or of their repeats."""
    config: Config = {**joint.config, "data_sha256": rows.fingerprint()}
    kind = "each site held out" if args.leave_out else "each patient held out"
    epochs = describe_epochs(config["metrics"]["averaged_epochs"])
    selection = describe_selection(config["members"] if config["stage"] == "trajectory" else 1)
    is_predicted = np.isin(rows.ids, evaluated.rows["id"].to_numpy())
    if not is_predicted.all():
        rule = "without a value of a series that their fold reads"
        rule = f"of sites that only train, or {rule}" if args.leave_out else rule
        rows = rows.keep_rows(is_predicted, rule)
    pages.write_training_page(
        folder,
        f"{STAGE_NAMES[config['stage']].capitalize()}, {kind}{title}",
        evaluated,
        rows,
        config,
        topics,
        split={"all folds": np.arange(len(rows))},
        card={
            "Limits": MODEL_LIMITS,
            "Epochs": f"each fold has {selection}; --final averages {epochs}, by the folds' pooled "
            "validation loss",
            "Baselines": f"in each fold {baselines.describe_tuning(joint.tuned)}; those of "
            "--final are tuned by the same rule, and fitted, on all patients",
            "Seed": str(args.seed),
        },
        methods={
            "split": folds_sentence(evaluated.metrics, evaluated.folds),
            "recalibration": recalibration_words(config, args.calibrate),
        },
        last=last,
        list_patients=args.report_patients,
    )


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


def with_final_epochs(stage: Stage, args: Namespace) -> Stage:
    """Let a ``--final`` average the epochs of the folds; the schedule stays that of a fold."""
    if not args.final:
        return stage
    content = read_json(run_folder.folds_folder(args) / run_folder.METRICS)
    return replace(stage, final_epochs=content["averaged_epochs"])


def write_final(
    stage: Stage, data: Data, folder: Path, args: Namespace
) -> tuple[Config, Baselines | None]:
    """Write the model of all patients; return the same as ``results.write``."""
    content = read_json(run_folder.folds_folder(args) / run_folder.METRICS)
    decided = content.pop("decided")
    config: Config = {**stage.config, **decided, "metrics": content}
    if "residual_weight" in decided:
        stage.model.residual_weight = decided["residual_weight"]
    if not processes().is_main_process:
        return config, None
    rows = data.split["train"]
    fits = outcome_of(stage.config).fits(data.dataset, rows)
    with few_threads():
        settings = baselines.tune_baselines(data.dataset, rows, data.usable_static, fits)
        fitted = baselines.fit_baselines(data.dataset, rows, settings, fits)
    models = {name: model for name, model in fitted.models.items() if name in config["models"]}
    words = fitted.words if baselines.WORDS in config["models"] else None
    fitted = replace(fitted, models=models, words=words)  # those of all folds
    config["models"] = {name: decided["models"][name] for name in [*fitted.names, ENSEMBLE]}
    config |= {"baseline_inputs": fitted.inputs, "baselines_sha256": fitted.sha256}
    results.save_model(folder, stage, config, fitted)
    return config, fitted
