"""Train a model for each fold, judge every patient once, train on all: ``--folds``, ``--final``."""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from medgemma_clinical.commands.command_line import EXIT_DONE, EXIT_INTERRUPTED
from medgemma_clinical.commands.compare import read_predictions
from medgemma_clinical.commands.flags import set_environment
from medgemma_clinical.commands.logs import command_logging
from medgemma_clinical.commands.results import predictions_csv
from medgemma_clinical.commands.run_folder import stage_folder
from medgemma_clinical.commands.several import Train, filled, run_or_continue, shared_models
from medgemma_clinical.data.folds import draw_folds, fold_dataset, foldable
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import exact_kernels, processes
from medgemma_clinical.evaluation.baselines import STAGE_NAMES
from medgemma_clinical.evaluation.case_mix import demographics, subgroups
from medgemma_clinical.evaluation.decision import youden_threshold
from medgemma_clinical.evaluation.metrics_table import Metrics, evaluate
from medgemma_clinical.evaluation.report import ReportContent, write_report
from medgemma_clinical.evaluation.table_one import table_one
from medgemma_clinical.evaluation.tables import model_table, split_table
from medgemma_clinical.evaluation.verdicts import sentences
from medgemma_clinical.files import (
    InputError,
    RunFault,
    owner_only,
    read_json,
    write_json,
    write_text,
)
from medgemma_clinical.inference.trajectory_model import TrajectoryModel
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.model_card import LIMITS, built_in_notice, page_card
from medgemma_clinical.models.trained_model import read_trained_config
from medgemma_clinical.training.signals import begin_process

logger = logging.getLogger(__name__)

FOLD = "{fold}"
"""Stands in a flag's value for the number of the fold."""

Task = tuple[str, Namespace, TrajectoryDataset]
"""A fold's name, arguments and data."""


def folds_folder(args: Namespace) -> Path:
    """Return the folder of the folds' runs and of their common results."""
    return args.output_dir / f"folds_{stage_folder(args).name}"


def run_folds(args: Namespace, dataset: TrajectoryDataset, train: Train) -> int:
    """Train the stage once a fold, and judge each patient by the model that did not see it.

    A fold that was made before by the same arguments and data is not made again.
    """
    if args.ode_checkpoint and FOLD not in str(args.ode_checkpoint):
        raise InputError(
            "--folds: each fold has a stage 1 of its own: write {fold} for its number, as in "
            f"--ode_checkpoint {args.output_dir}/folds_trajectory/fold_{{fold}}/{TRAJECTORY_FILE}"
        )
    rows = foldable(dataset, args.max_samples, args.seed)
    fold = draw_folds(rows.groups, rows.labels, args.folds, args.seed, rows.source)
    runs = [fold_arguments(k, args) for k in range(args.folds)]
    tasks = [
        (f"fold {k}", own, fold_dataset(rows, fold, k, args.seed)) for k, own in enumerate(runs)
    ]
    if code := train_folds(tasks, train):
        return code
    if processes().is_main_process:
        write_results(args, rows, fold, [stage_folder(own) for own in runs])
    return EXIT_DONE


def fold_arguments(k: int, args: Namespace) -> Namespace:
    """Return the arguments of one fold's run: its folder, ``{fold}`` filled in."""
    own = {"folds": None, "output_dir": folds_folder(args) / f"fold_{k}"}
    return Namespace(**{**vars(args), **filled(args, FOLD, k), **own})


# --------------------------------------------------------------------------- the folds' runs


def train_folds(tasks: Sequence[Task], train: Train) -> int:
    """Train the folds one after the other; those of stage 1 on a CPU side by side, by the cores.

    Stage 1 has one thread everywhere, so that no result depends on the number of processes.
    """
    jobs = min(len(tasks), joblib.cpu_count())
    if not tasks[0][1].trajectory_only:
        return first_code(run_or_continue(*task, train) for task in tasks)
    if jobs == 1 or torch.cuda.is_available() or processes().num_processes > 1:
        with one_thread():
            return first_code(run_or_continue(*task, train) for task in tasks)
    begin = partial(begin_process, TrajectoryModel.__module__)
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=1, initializer=begin):
            # No array goes through a file: they hold patients.
            parallel = joblib.Parallel(jobs, batch_size=1, max_nbytes=None)
            return first_code(parallel(joblib.delayed(run_apart)(*each) for each in tasks))
    except BrokenProcessPool as error:
        raise RunFault(
            "the process of a fold was ended, perhaps for want of memory: the same command goes "
            "on; LOKY_MAX_CPU_COUNT=1 in the environment trains one fold at a time"
        ) from error
    except KeyboardInterrupt as stop:
        logger.error("interrupted: the same command goes on in %s", tasks[0][1].output_dir.parent)
        return getattr(stop, "code", EXIT_INTERRUPTED)


def first_code(codes: Iterable[int]) -> int:
    """Return the first exit code that is not that of a finished run; later runs are not begun."""
    return next((code for code in codes if code != EXIT_DONE), EXIT_DONE)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def run_apart(title: str, args: Namespace, dataset: TrajectoryDataset) -> int:
    """Train a fold in a process of its own; see ``run_or_continue``."""
    set_environment()
    kernels = exact_kernels(deterministic=args.deterministic)
    with one_thread(), owner_only(), kernels, command_logging():
        return run_or_continue(title, args, dataset, TrajectoryModel.program.train)


# --------------------------------------------------------------------------- their results


def write_results(
    args: Namespace, rows: TrajectoryDataset, fold: NDArray[np.int64], folders: list[Path]
) -> None:
    """Join the folds' test predictions, one a row, and write table, metrics and page.

    ``fold`` (N,) is that of each row of the data.
    """
    folder, name = folds_folder(args), STAGE_NAMES[stage_folder(args).name]
    known = [read_json(each / "metrics.json") for each in folders]
    tables = shared_models([read_predictions(each, name) for each in folders])
    order = np.argsort(np.concatenate([np.flatnonzero(fold == k) for k in range(len(folders))]))
    table = pd.concat(tables, ignore_index=True).iloc[order].reset_index(drop=True)
    table["label"] = table["label"].astype(int)
    positions = np.flatnonzero(fold >= 0)
    own = fold[positions]
    thresholds = np.array([each["threshold"] for each in known])
    metrics = evaluate(table, args.seed, thresholds[own], split=own)
    content = {
        "stage": stage_folder(args).name,
        "selected_epoch": round(np.median([each["selected_epoch"] for each in known])),
        "threshold": youden_threshold(table["label"].to_numpy(), table[name].to_numpy()),
        "folds": metrics.to_json(),
    }
    with_folds = table.copy()
    with_folds.insert(4, "fold", own)  # behind the model's own column
    write_text(folder / "predictions_folds.csv", predictions_csv(with_folds))
    write_json(folder / "metrics.json", content)
    first = folds_sentence(metrics, len(folders))
    write_report(
        folder / "report.html",
        table,
        metrics,
        report_content(args, rows, positions, folders[0], first),
        min_cell=args.min_cell,
        list_patients=args.report_patients,
        folder=folder,
    )
    logger.info("")
    for line in (*sentences(metrics, rows.noun), model_table(metrics).to_string(index=False)):
        logger.info("%s", line)
    logger.info("%s\nreport: %s", first, folder / "report.html")


def folds_sentence(metrics: Metrics, folds: int) -> str:
    """Return how the metrics of the folds were made, in a sentence, and how the folds differ."""
    auroc = metrics.row(metrics.models[0], "auroc")
    return (
        f"Each of these patients was judged once, by the one of {folds} models that did not learn "
        "from them: AUROC, AUPRC, accuracy, Brier score and log loss are means over the "
        f"{folds} folds (AUROC {auroc['min']:.3f} to {auroc['max']:.3f}), all else is of all rows."
    )


def report_content(
    args: Namespace,
    rows: TrajectoryDataset,
    positions: NDArray[np.int64],
    folder: Path,
    first: str,
) -> ReportContent:
    """Return what the page says beside its metrics; ``folder`` is that of a fold's stage."""
    config = {**read_trained_config(folder), "data_sha256": rows.fingerprint()}
    config.pop("residual_weight", None)  # each fold has its own
    return ReportContent(
        title=f"{STAGE_NAMES[config['stage']].capitalize()}, every patient judged: {rows.outcome}",
        question=rows.task_description(),
        data={
            "Source": Path(rows.source).name,
            "Kind": rows.kind,
            "Used": f"{len(rows):,} {rows.noun}",
            "Static features": ", ".join(config["inputs"]["static"]) or "none are read",
        },
        card=page_card(config, {"Limits": LIMITS, "Seed": str(args.seed)}),
        threshold=None,
        seed=args.seed,
        bands=subgroups(demographics(rows)).iloc[positions],
        noun=rows.noun,
        flow=rows.flow,
        split=split_table(rows.labels, rows.groups, {"tested once": positions}),
        table_one=table_one(rows, {}),
        methods={"split": first},
        notice=built_in_notice(config),
        first=[first],
    )
