"""Folds that are drawn several times, for the stability of single risks: ``--folds --seeds``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from medgemma_clinical.commands import folds, plan, prediction_files, run_folder
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.data.fold_split import foldable
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.metrics_table import MODEL, compared_models, mean_of_repeats
from medgemma_clinical.evaluation.target import LABEL, NO_RISKS
from medgemma_clinical.evaluation.topics import instability
from medgemma_clinical.evaluation.topics.topic import Evaluated, TopicBuilder
from medgemma_clinical.evaluation.verdicts import percent
from medgemma_clinical.files import InputError, read_json, write_json, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE, Config

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
    of_repeats = [of_repeat for _, of_repeat in planned]
    for repeat, of_repeat, stage1 in zip(repeats, of_repeats, stages1, strict=True):
        if code := folds.join_and_finish(repeat, of_repeat, stage1, train):
            return code
    if processes().is_main_process:
        stage = run_folder.stage_folder(args).name
        write_repeat_results(args.output_dir / f"repeats_{stage}", of_repeats)
    processes().wait_for_everyone()
    return EXIT_DONE


def repeat_arguments(repeat: int, args: Namespace) -> Namespace:
    """Return the arguments of one repeat: its seed, its folder, ``{repeat}`` filled in.

    The first repeat also trains the model of all patients, by its own folds.
    """
    folder, final = args.output_dir / f"repeat_{repeat}", args.final and repeat == 0
    changes = {"seed": args.seed + repeat, "seeds": None, "output_dir": folder, "final": final}
    return plan.filled(args, REPEAT, repeat, **changes)


def write_repeat_results(folder: Path, repeats: Sequence[folds.FoldRuns]) -> None:
    """Write the risks of all repeats, how much they differ, and a page of their mean metrics."""
    folder.mkdir(exist_ok=True)
    joined = join_repeats([repeat.folder for repeat in repeats])
    risks = joined.filter(regex="^repeat_")
    described = joined.drop(columns=[*risks]).assign(mean=risks.mean(axis=1), sd=risks.std(axis=1))
    text = prediction_files.predictions_csv(described.join(risks), "mean", [LABEL])
    write_text(folder / prediction_files.REPEATS, text)
    by_repeat = describe_repeats(repeats)
    measures = instability.measure_instability(risks.to_numpy(float), by_repeat)
    mean_risk = described.set_index("id")["mean"]
    first, evaluated = evaluate_repeats(repeats, mean_risk, by_repeat["threshold"])
    content = {
        "stage": first["stage"],
        "n": len(joined),
        "targets": [target.to_json() for target in evaluated.targets],
        "folds": evaluated.exact.to_json(),
        "instability": measures,
        "repeats": by_repeat.to_dict("records"),
    }
    write_json(folder / run_folder.METRICS, content)
    topics: list[TopicBuilder] = [
        instability.repeat_metrics,
        partial(instability.instability, table=joined, by_repeat=by_repeat),
    ]
    seeds = by_repeat["seed"]
    summary = (
        f"Folds and initial weights were drawn {len(repeats)} times, by seeds {seeds.iloc[0]} to "
        f"{seeds.iloc[-1]}: each metric is the mean over the repeats, whose own pages "
        "(repeat_0/, ...) have figures and subgroups. --final takes the folds of repeat 0."
    )
    title = f", {len(repeats)} repeats"
    folds.folds_report(repeats[0], first, evaluated, topics, summary, title).write(folder)
    folds.log_evaluated(evaluated)
    noun = repeats[0].rows.noun
    logger.info("\n%s", instability.instability_cells(measures, noun).to_string(index=False))
    logger.info("%s\nreport: %s", summary, folder / "report.html")


def describe_repeats(repeats: Sequence[folds.FoldRuns]) -> pd.DataFrame:
    """Return seed, threshold and AUROC of each repeat."""
    contents = [read_json(repeat.folder / run_folder.METRICS) for repeat in repeats]
    return pd.DataFrame(
        {
            "seed": [repeat.options.seed for repeat in repeats],
            "threshold": [content["threshold"] for content in contents],
            "auroc": [content["folds"]["auroc"]["value"] for content in contents],
        }
    )


def evaluate_repeats(
    repeats: Sequence[folds.FoldRuns],
    mean_risk: pd.Series[Any],  # by id, of the rows that all repeats predict
    thresholds: pd.Series[Any],  # by repeat
) -> tuple[Config, Evaluated]:
    """Return the configuration of the first repeat, and the mean over all of them."""
    options = repeats[0].options
    ids = {*mean_risk.index}
    of_repeats = [folds.evaluate_folds(repeat, ids, options.seed) for repeat in repeats]
    mean = mean_of_repeats([joint.drawn for joint in of_repeats])
    first = of_repeats[0].evaluated
    column = first.target.column(first.model)
    low, high = percent(thresholds.min()), percent(thresholds.max())
    evaluated = replace(
        first,
        rows=first.rows.assign(**{column: mean_risk[first.rows["id"]].to_numpy()}),
        exact=compared_models(mean, options.primary),
        thresholds=[float(thresholds.mean())] * len(first.targets),
        threshold_choice=f"the mean of those of the repeats ({low} to {high})",
    )
    return of_repeats[0].config, evaluated


def join_repeats(folders: Sequence[Path]) -> pd.DataFrame:
    """Return what happened and a column of risks a repeat, of the rows that all predicted."""
    risks = {}
    for k, folder in enumerate(folders):
        table = prediction_files.read_rows(folder / prediction_files.FOLDS)
        tested = [x for x in table if x in NO_RISKS and x not in ("fold", MODEL)]
        risks[f"repeat_{k}"] = table.set_index(tested)["probability"]
    return pd.concat(risks, axis=1, join="inner").reset_index()
