"""Folds that are drawn several times, for the stability of single risks: ``--folds --seeds``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from medgemma_clinical.commands import folds, run_folder, several
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.results import log_findings, predictions_csv
from medgemma_clinical.data.fold_split import draw_folds, foldable
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.metrics_table import compared_models, mean_of_repeats
from medgemma_clinical.evaluation.topics.instability import (
    instability,
    instability_cells,
    measure_instability,
    repeat_metrics,
)
from medgemma_clinical.evaluation.topics.topic import Evaluated
from medgemma_clinical.evaluation.verdicts import at_threshold, percent
from medgemma_clinical.files import InputError, read_json, write_json, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.models.outcome import outcome_of
from medgemma_clinical.models.trained_model import read_trained_config

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions_repeats.csv"
REPEAT = "{repeat}"
"""Stands in a flag's value for the number of the repeat."""


def run_repeats(
    args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: several.Train
) -> int:
    """Run the unfinished repeats of ``--folds`` on the same patients; compare their risks."""
    if args.seeds == 1:
        raise InputError("--folds --seeds 1: nothing to compare: give --seeds 2 or more")
    if args.ode_checkpoint and REPEAT not in str(args.ode_checkpoint):
        raise InputError(
            "--folds --seeds: each repeat has folds of its own, and so a stage 1: write {repeat} "
            f"for its number, as in --ode_checkpoint {args.output_dir}/repeat_{{repeat}}/"
            f"folds_trajectory/fold_{folds.FOLD}/{TRAJECTORY_FILE}"
        )
    # Drawn by the first seed: --max_samples takes the same patients in all repeats.
    rows = foldable(read(args), args.max_samples, args.seed)
    runs = [repeat_arguments(repeat, args) for repeat in range(args.seeds)]
    for repeat, run in enumerate(runs):
        logger.info("repeat %d of 0 to %d, seed %d", repeat, len(runs) - 1, run.seed)
        if code := folds.run_folds(run, lambda _: rows, train):
            return code
    if processes().is_main_process:
        write_repeat_results(args, rows, runs)
    processes().wait_for_everyone()
    return EXIT_DONE


def repeat_arguments(repeat: int, args: Namespace) -> Namespace:
    """Return the arguments of one repeat: its seed, its folder, ``{repeat}`` filled in.

    The first repeat also trains the model of all patients, by its own folds.
    """
    folder, final = args.output_dir / f"repeat_{repeat}", args.final and repeat == 0
    changes = {"seed": args.seed + repeat, "seeds": None, "output_dir": folder, "final": final}
    return several.filled(args, REPEAT, repeat, **changes)


def write_repeat_results(
    args: Namespace, rows: TrajectoryDataset, runs: Sequence[Namespace]
) -> None:
    """Write the risks of all repeats, how much they differ, and a page of their mean metrics."""
    contents = [read_json(run_folder.folds_folder(run) / run_folder.METRICS) for run in runs]
    folder = args.output_dir / f"repeats_{contents[0]['stage']}"
    folder.mkdir(exist_ok=True)
    first_fold = run_folder.stage_folder(folds.fold_arguments(0, runs[0]))
    outcome = outcome_of(read_trained_config(first_fold))
    joined = join_repeats(runs, outcome.tested)
    risks = joined.drop(columns=outcome.tested)
    described = joined.assign(mean=risks.mean(axis=1), sd=risks.std(axis=1))
    table = described[[*outcome.tested, "mean", "sd", *risks]]
    write_text(folder / PREDICTIONS, predictions_csv(table))  # the mean is its ``probability``
    results = []
    for run in runs:
        fold = draw_folds(rows.groups, rows.labels, run.folds, run.seed)
        results.append(folds.evaluate_folds(run, rows, fold, {*joined["id"]}, args.seed))
    metrics = compared_models(mean_of_repeats([result.drawn for result in results]), args.primary)
    seeds = [run.seed for run in runs]
    thresholds = pd.Series([content["threshold"] for content in contents])
    aurocs = [content["folds"]["auroc"]["value"] for content in contents]
    by_repeat = pd.DataFrame({"seed": seeds, "threshold": thresholds, "auroc": aurocs})
    measures = measure_instability(risks.to_numpy(float), by_repeat)
    content = {
        "stage": contents[0]["stage"],
        "n": len(joined),
        "folds": metrics.to_json(),
        "instability": measures,
        "repeats": by_repeat.to_dict("records"),
    }
    write_json(folder / run_folder.METRICS, content)
    first = (
        f"Folds and initial weights were drawn {len(seeds)} times, by seeds {seeds[0]} to "
        f"{seeds[-1]}: each metric is the mean over the repeats, whose own pages "
        "(repeat_0/, ...) have figures and subgroups. --final takes the folds of repeat 0."
    )
    ends = percent(thresholds.min()), percent(thresholds.max())
    tested = results[0].table.drop(columns="fold")
    mean, threshold = described.set_index("id")["mean"][tested["id"]], float(thresholds.mean())
    choice = f"the mean of those of the repeats ({ends[0]} to {ends[1]})"
    evaluated = Evaluated(
        tested.assign(**{metrics.models[0]: mean.to_numpy()}),
        metrics,
        args.seed,
        threshold,
        at_threshold(threshold, choice),
        rows.noun,
        args.min_cell,
        args.folds,
    )
    topics = [
        partial(repeat_metrics, table=outcome.table),
        partial(instability, table=joined, by_repeat=by_repeat),
    ]
    title = f", {len(runs)} repeats"
    folds.write_folds_page(
        folder, runs[0], rows, results[0], evaluated, topics, title=title, last=[first]
    )
    logger.info("")
    log_findings(metrics, outcome.sentences(metrics, evaluated.at_threshold, rows.noun), outcome)
    logger.info("\n%s", instability_cells(measures, rows.noun).to_string(index=False))
    logger.info("%s\nreport: %s", first, folder / "report.html")


def join_repeats(runs: Sequence[Namespace], tested: list[str]) -> pd.DataFrame:
    """Return what happened and a column of risks a repeat, of the rows that all predicted."""
    risks, text = {}, {"id": str, "patient": str}
    for k, run in enumerate(runs):
        path = run_folder.folds_folder(run) / folds.PREDICTIONS
        table = pd.read_csv(path, dtype=text, keep_default_na=False)
        risks[f"repeat_{k}"] = table.set_index(tested)["probability"]
    return pd.concat(risks, axis=1, join="inner").reset_index()
