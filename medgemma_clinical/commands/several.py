"""Train several runs of one command, each once, and compare them: ``--ablation``, ``--seeds``."""

from __future__ import annotations

import contextlib
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.commands import compare, run_folder
from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.logs import RUN_LOG, quiet_console
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes, reset_peak_memory
from medgemma_clinical.evaluation.baselines import ENSEMBLE, MEANINGS, STAGE_NAMES, best_blend
from medgemma_clinical.evaluation.metrics_table import TESTED, Metrics, evaluate, evaluate_splits
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.files import InputError, read_json, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

logger = logging.getLogger(__name__)

Train = Callable[[Namespace, TrajectoryDataset], int]
"""Trains and tests one stage on data that are read; returns an exit code."""

SEED = "{seed}"
"""Stands in a flag's value for the number of the seed."""

ADDS = "What each part of the model adds"

STAGE_1_VARIANT = "stage 1"
ALONE = {"trajectory_only": True}
ON_STAGE_1 = {"ode_checkpoint": TRAJECTORY_FILE}
SOFT_PROMPT = {**ON_STAGE_1, "series_text": "none", "stage1_logit": "off"}
RANDOM = {"base_weights": "random", "quantization": "none"}  # packed weights cannot be drawn

VARIANTS: dict[str, dict[str, Any]] = {
    STAGE_1_VARIANT: ALONE,
    "stage 1 without facts": {**ALONE, "facts": "off"},
    "states decay": {**ALONE, "dynamics": "decay"},
    "states held": {**ALONE, "dynamics": "none"},
    "facts as text": {"soft_prompt": "off", "series_text": "none"},
    "text": {"soft_prompt": "off"},
    "text + logit": {**ON_STAGE_1, "soft_prompt": "off"},
    "soft prompt": SOFT_PROMPT,
    "soft prompt + logit": {**ON_STAGE_1, "series_text": "none"},
    "text + soft prompt + logit": ON_STAGE_1,
    "soft prompt of another patient": {**SOFT_PROMPT, "soft_prompt": "shuffled"},
    "soft prompt + random weights": {**SOFT_PROMPT, **RANDOM},
}
"""Flags of the compared models; without ``trajectory_only`` a model of stage 2. A path lies below
the output folder."""

VARIANTS_ARE = {
    STAGE_1_VARIANT: "reads series and static features; no language model",
    "stage 1 without facts": "reads the series alone",
    "states decay": "stage 1 whose state decays between two observations, without the ODE",
    "states held": "stage 1 whose state stays the same between two observations, without the ODE",
    "facts as text": "a language model that reads the context of a patient, and no series",
    "text": "a language model that reads context and series as text",
    "text + logit": "the variant text, whose answer is added to that of stage 1",
    "soft prompt": "a language model that reads the context, and the series as soft tokens",
    "soft prompt + logit": "the variant soft prompt, whose answer is added to that of stage 1",
    "text + soft prompt + logit": "a language model that reads the series as text and as soft "
    "tokens, whose answer is added to that of stage 1",
    "soft prompt of another patient": "a control: the soft tokens are another patient's, so that "
    "only the context can help",
    "soft prompt + random weights": "a control: a language model that has learned no language",
}


# --------------------------------------------------------------------------- one of several


def run_or_continue(title: str, args: Namespace, dataset: TrajectoryDataset, train: Train) -> int:
    """Train, continue or skip a run; the console gets one line, the rest goes to its log file."""
    folder, code = run_folder.stage_folder(args), EXIT_DONE
    try:
        with quiet_console():
            if (done_part := run_folder.progress_of(args, dataset)) != "all":
                reset_peak_memory()
                code = train(Namespace(**{**vars(args), "resume": done_part == "part"}), dataset)
    except InputError as error:
        raise InputError(f"{title}: {error}", error.value) from error
    finally:
        RUN_LOG.begin()  # the lines below belong to no run
    if code == EXIT_DONE:
        how = {"all": "already there, ", "part": "continued, ", "none": ""}[done_part]
        part = "folds" if args.final else "test"
        logger.info("%s: %s%s AUROC %s: %s", title, how, part, auroc_of(folder, part), folder)
    return code


def auroc_of(folder: Path, part: str) -> str:
    """Return the AUROC of a finished stage's part in words."""
    path = folder / "metrics.json"
    try:
        metrics = Metrics.from_json(read_json(path)[part])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: damaged: delete the folder of this stage, and start again"
        ) from error
    return value_text(metrics.row(metrics.models[0], "auroc"))


# --------------------------------------------------------------------------- --ablation


def run_ablation(
    args: Namespace, dataset: TrajectoryDataset, train: Train, seed_title: str = ""
) -> int:
    """Train the unfinished variants on one split and compare them; return the exit code.

    ``seed_title``, of one of several seeds, begins each name and omits the table.
    """
    names, reference = args.arms, args.reference
    if unknown := sorted(set(names or ()) - set(VARIANTS)):
        raise InputError(f"--arms {', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    # Others build on stage 1, and its baselines are compared.
    wanted = {STAGE_1_VARIANT, reference, *(VARIANTS if names is None else names)}
    folders = {}
    for name in [name for name in VARIANTS if name in wanted]:
        variant_args = variant_arguments(name, args)
        folders[name] = run_folder.stage_folder(variant_args)
        if code := run_or_continue(f"{seed_title}{name}", variant_args, dataset, train):
            return code
        if name == STAGE_1_VARIANT:
            check_reference(reference, folders[name])
    if processes().is_main_process:
        compare_variants(folders, dataset.outcome, args, quiet=bool(seed_title))
    return EXIT_DONE


def check_reference(name: str, stage_1: Path) -> None:
    """Check that the reference is a variant, or a baseline of a finished stage 1."""
    processes().wait_for_everyone()  # the first one writes the predictions
    table = compare.read_predictions(stage_1, STAGE_1_VARIANT)
    choices = [*VARIANTS, *table.columns.drop([*TESTED, STAGE_1_VARIANT])]
    if name not in choices:
        raise InputError(f"--reference {name}: choose from {', '.join(choices)}")


def variant_arguments(name: str, args: Namespace) -> Namespace:
    """Return the arguments of a variant."""
    changes: dict[str, Any] = {"mode": "classification", **VARIANTS[name]}
    if name != STAGE_1_VARIANT:  # it lies in the output folder itself, where others find it
        changes["output_dir"] = args.output_dir / "ablation" / re.sub(r"\W+", "_", name)
    if "ode_checkpoint" in changes:
        changes["ode_checkpoint"] = args.output_dir / changes["ode_checkpoint"]
    return Namespace(**{**vars(args), "ablation": False, **changes})


def compare_variants(
    folders: dict[str, Path], outcome: str, args: Namespace, *, quiet: bool
) -> None:
    """Compare the variants with the reference and the baselines; write ``ablation/``."""
    folder = args.output_dir / "ablation"
    folder.mkdir(exist_ok=True)
    table = compare.join_predictions(folders)
    write_text(folder / "predictions_test.csv", table.to_csv(index=False))
    plan: dict[str, Any] = {"primary": args.primary, "compared": [*VARIANTS]}
    metrics = evaluate(table, args.seed, reference=args.reference, **plan)
    with quiet_console() if quiet else contextlib.nullcontext():
        compare.save_comparison(
            folder / "ablation",
            metrics,
            {name: compare.cost_of(folder) for name, folder in folders.items()},
            title=f"{ADDS}: {outcome}",
            card={"Seed": str(args.seed)},
            notice=compare.built_in_models_notice({"all": vars(args)}),
            meanings=MEANINGS | VARIANTS_ARE,
        )


# --------------------------------------------------------------------------- --seeds


def run_seeds(args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: Train) -> int:
    """Run the unfinished seeds from ``--seed`` on, each on its own split; pool the test parts."""
    if args.outcome_kind == "time" or args.horizon_hours:
        raise InputError("--seeds: not for times to events: leave it out")
    if args.ode_checkpoint and SEED not in str(args.ode_checkpoint):
        raise InputError(
            "--seeds: each seed has a split of its own, and so a stage 1: write {seed} for its "
            f"number, as in --ode_checkpoint {args.output_dir}/seed_{{seed}}/{TRAJECTORY_FILE}"
        )
    one_source = not any(SEED in str(path) for path in (args.data_path, args.data_dir))
    dataset: TrajectoryDataset | None = None
    folders: dict[int, Path] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        seed_args = seed_arguments(seed, args)
        dataset = dataset if dataset and one_source else read(seed_args)
        if args.ablation:
            folders[seed] = seed_args.output_dir / "ablation"
            code = run_ablation(seed_args, dataset, train, f"seed {seed}, ")
        else:
            folders[seed] = run_folder.stage_folder(seed_args)
            code = run_or_continue(f"seed {seed}", seed_args, dataset, train)
        if code:
            return code
    if processes().is_main_process and dataset:
        pool_seeds(folders, dataset.outcome, args)
    return EXIT_DONE


def seed_arguments(seed: int, args: Namespace) -> Namespace:
    """Return the arguments of one seed's run: its number, its folder, ``{seed}`` filled in."""
    folder = args.output_dir / f"seed_{seed}"
    return filled(args, SEED, seed, seed=seed, seeds=None, output_dir=folder)


def filled(args: Namespace, mark: str, number: int, **changes: Any) -> Namespace:
    """Return arguments with a number in place of a mark in texts and paths, and with changes."""
    texts = {
        name: type(value)(str(value).replace(mark, str(number)))
        for name, value in vars(args).items()
        if isinstance(value, (str, Path))
    }
    return Namespace(**{**vars(args), **texts, **changes})


def pool_seeds(folders: dict[int, Path], outcome: str, args: Namespace) -> None:
    """Write the metrics of all splits; ``folders`` are of the stage or the ablation, by seed."""
    paths = list(folders.values())
    kind = paths[0].name
    if args.ablation:
        reference, title, splits = args.reference, ADDS, None
        tables = [compare.read_predictions(path) for path in paths]
        costs = [read_json(path / "ablation.json")["cost"] for path in paths]
    else:
        reference = STAGE_NAMES[kind]
        title = reference.capitalize()
        aurocs = [
            (seed, auroc_of(path, "validation"), auroc_of(path, "test"))
            for seed, path in folders.items()
        ]
        columns = ["Seed", "Validation AUROC [95 %]", "Test AUROC [95 %]"]
        splits = pd.DataFrame(aurocs, columns=columns)
        tables = [compare.read_predictions(path, reference) for path in paths]
        costs = [{reference: compare.cost_of(path)} for path in paths]
    # An ablation has its stage 1 beside it.
    runs = [path.parent / "trajectory" if args.ablation else path for path in paths]
    trained = [read_json(run / "run.json")["split"]["train"]["n"] for run in runs]
    patients_a_row = np.mean([table["patient"].nunique() / len(table) for table in tables])
    metrics = evaluate_splits(
        shared_models(tables),
        args.seed,
        reference,
        trained=float(patients_a_row * np.mean(trained)),
        primary=args.primary,
        compared=[*VARIANTS],
    )
    auroc = metrics.row(reference, "auroc")
    compare.save_comparison(
        args.output_dir / f"seeds_{kind}",
        metrics,
        {name: mean_cost([cost[name] for cost in costs]) for name in costs[0]},
        title=f"{title}, in {len(folders)} splits of the data: {outcome}",
        sentences=[
            f"Over {len(folders)} splits the test AUROC of {reference} is {auroc['min']:.3f} to "
            f"{auroc['max']:.3f}, mean {value_text(auroc)}."
        ],
        card={"Seeds": f"{min(folders)} to {max(folders)}"},
        meanings=MEANINGS | VARIANTS_ARE,
        notice=compare.built_in_models_notice({"all": vars(args)}),
        splits=splits,
    )


def mean_cost(costs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the mean cost of the runs of one model, None where some run lacks it."""
    means = pd.DataFrame(costs).astype(float).mean(skipna=False)
    return {str(name): None if np.isnan(mean) else mean for name, mean in means.items()}


def shared_models(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Leave out models that are missing in some split, and log their names."""
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    if len({best_blend(list(map(str, table))) for table in tables}) > 1:
        shared = [name for name in shared if name != ENSEMBLE]  # they hold different blends
    left_out = sorted({str(name) for table in tables for name in table} - set(shared))
    if left_out:
        logger.info("not in every split, so not pooled: %s", ", ".join(left_out))
    return [table[shared] for table in tables]
