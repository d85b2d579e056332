"""Folds that are drawn several times, for the stability of single risks: ``--folds --seeds``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from medgemma_clinical.commands import folds, plan, prediction_files, run_folder
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.data.fold_split import foldable
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.metrics_table import (
    MODEL,
    Metrics,
    compared_models,
    mean_of_repeats,
)
from medgemma_clinical.evaluation.target import LABEL, NO_RISKS
from medgemma_clinical.evaluation.topics.instability import (
    instability,
    instability_cells,
    measure_instability,
    repeat_metrics,
)
from medgemma_clinical.evaluation.topics.topic import Evaluated, TopicBuilder
from medgemma_clinical.evaluation.verdicts import percent
from medgemma_clinical.files import InputError, read_json, write_json, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

logger = logging.getLogger(__name__)

REPEAT = "{repeat}"
"""Stands in a flag's value for the number of the repeat."""


def run_repeats(
    args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: plan.Train
) -> int:
    """Run the unfinished repeats of ``--folds`` on the same patients; compare their risks."""
    if args.seeds == 1:
        raise InputError("--folds --seeds 1: nothing to compare: give --seeds 2 or more")
    example = args.output_dir / f"repeat_{REPEAT}/folds_trajectory/fold_{folds.FOLD}"
    plan.check_stage1(args.ode_checkpoint, "--folds --seeds", REPEAT, example / TRAJECTORY_FILE)
    repeats = [repeat_arguments(repeat, args) for repeat in range(args.seeds)]
    stages1 = [folds.stage1_of_all(repeat) for repeat in repeats]
    # Drawn by the first seed: --max_samples takes the same patients in all repeats.
    rows = foldable(read(args), args.max_samples, args.seed)
    planned = [
        folds.plan_folds(repeat, rows, f"repeat {k}, seed {repeat.seed}, ")
        for k, repeat in enumerate(repeats)
    ]
    if code := plan.carry_out([run for runs, _ in planned for run in runs], train):
        return code
    fold_of_rows = [fold for _, fold in planned]
    for repeat, stage1, fold in zip(repeats, stages1, fold_of_rows, strict=True):
        if code := folds.join_and_finish(repeat, rows, fold, stage1, train):
            return code
    if processes().is_main_process:
        write_repeat_results(args, rows, repeats, fold_of_rows)
    processes().wait_for_everyone()
    return EXIT_DONE


def repeat_arguments(repeat: int, args: Namespace) -> Namespace:
    """Return the arguments of one repeat: its seed, its folder, ``{repeat}`` filled in.

    The first repeat also trains the model of all patients, by its own folds.
    """
    folder, final = args.output_dir / f"repeat_{repeat}", args.final and repeat == 0
    changes = {"seed": args.seed + repeat, "seeds": None, "output_dir": folder, "final": final}
    return plan.filled(args, REPEAT, repeat, **changes)


def write_repeat_results(
    args: Namespace,
    rows: TrajectoryDataset,
    runs: Sequence[Namespace],
    fold_of_rows: Sequence[NDArray[np.int64]],  # of each repeat (N,)
) -> None:
    """Write the risks of all repeats, how much they differ, and a page of their mean metrics."""
    contents = [read_json(run_folder.folds_folder(run) / run_folder.METRICS) for run in runs]
    stage = contents[0]["stage"]
    folder = args.output_dir / f"repeats_{stage}"
    folder.mkdir(exist_ok=True)
    joined = join_repeats(runs)
    risks = joined.filter(regex="^repeat_")
    described = joined.drop(columns=[*risks])
    described["mean"] = risks.mean(axis=1)
    described["sd"] = risks.std(axis=1)
    text = prediction_files.predictions_csv(described.join(risks), "mean", [LABEL])
    write_text(folder / prediction_files.REPEATS, text)
    ids = {*joined["id"]}
    of_repeats = [
        folds.evaluate_folds(run, rows, fold, ids, args.seed)
        for run, fold in zip(runs, fold_of_rows, strict=True)
    ]
    mean = mean_of_repeats([joint.drawn for joint in of_repeats])
    by_repeat = pd.DataFrame(
        {
            "seed": [run.seed for run in runs],
            "threshold": [content["threshold"] for content in contents],
            "auroc": [content["folds"]["auroc"]["value"] for content in contents],
        }
    )
    measures = measure_instability(risks.to_numpy(float), by_repeat)
    evaluated = mean_evaluated(
        of_repeats[0].evaluated,
        compared_models(mean, args.primary),
        described.set_index("id")["mean"],
        by_repeat["threshold"],
    )
    content = {
        "stage": stage,
        "n": len(joined),
        "targets": [target.to_json() for target in evaluated.targets],
        "folds": evaluated.exact.to_json(),
        "instability": measures,
        "repeats": by_repeat.to_dict("records"),
    }
    write_json(folder / run_folder.METRICS, content)
    topics: list[TopicBuilder] = [
        repeat_metrics,
        partial(instability, table=joined, by_repeat=by_repeat),
    ]
    summary = (
        f"Folds and initial weights were drawn {len(runs)} times, by seeds {runs[0].seed} to "
        f"{runs[-1].seed}: each metric is the mean over the repeats, whose own pages "
        "(repeat_0/, ...) have figures and subgroups. --final takes the folds of repeat 0."
    )
    title = f", {len(runs)} repeats"
    folds.write_folds_page(
        folder, runs[0], rows, of_repeats[0], evaluated, topics, title=title, last=summary
    )
    folds.log_evaluated(evaluated)
    logger.info("\n%s", instability_cells(measures, rows.noun).to_string(index=False))
    logger.info("%s\nreport: %s", summary, folder / "report.html")


def mean_evaluated(
    first: Evaluated,  # the first repeat
    metrics: Metrics,
    mean_risk: pd.Series[Any],  # by id
    thresholds: pd.Series[Any],  # by repeat
) -> Evaluated:
    """Return the mean risks of the repeats as they are evaluated on a page."""
    column = first.target.column(first.model)
    low, high = percent(thresholds.min()), percent(thresholds.max())
    return replace(
        first,
        rows=first.rows.assign(**{column: mean_risk[first.rows["id"]].to_numpy()}),
        exact=metrics,
        thresholds=[float(thresholds.mean())] * len(first.targets),
        threshold_choice=f"the mean of those of the repeats ({low} to {high})",
    )


def join_repeats(runs: Sequence[Namespace]) -> pd.DataFrame:
    """Return what happened and a column of risks a repeat, of the rows that all predicted."""
    risks = {}
    for k, run in enumerate(runs):
        table = prediction_files.read_rows(run_folder.folds_folder(run) / prediction_files.FOLDS)
        tested = [x for x in table if x in NO_RISKS and x not in ("fold", MODEL)]
        risks[f"repeat_{k}"] = table.set_index(tested)["probability"]
    return pd.concat(risks, axis=1, join="inner").reset_index()
