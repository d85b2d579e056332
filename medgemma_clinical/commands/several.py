"""Train several runs of one command, each once, and compare them: ``--ablation``, ``--seeds``."""

from __future__ import annotations

import contextlib
import logging
import re
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.compare import (
    cost_of,
    join_predictions,
    random_models_notice,
    read_predictions,
    write_results,
)
from medgemma_clinical.commands.logs import RUN_LOG, quiet_console
from medgemma_clinical.commands.run_folder import (
    given_stage1,
    progress_of,
    run_data,
    run_facts,
    stage_name,
)
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes, reset_peak_memory
from medgemma_clinical.evaluation.baselines import ENSEMBLE, STAGE_NAMES, best_blend
from medgemma_clinical.evaluation.metrics_table import (
    TESTED,
    Metrics,
    evaluate,
    evaluate_splits,
)
from medgemma_clinical.evaluation.verdicts import value_text
from medgemma_clinical.files import InputError, read_json, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

logger = logging.getLogger(__name__)

Train = Callable[[Namespace, TrajectoryDataset], int]
"""Trains and tests one stage on data that are read; returns an exit code."""

SEED = "{seed}"
"""Stands in a flag's value for the number of the seed."""

STAGE_1 = "stage 1"
ON_STAGE_1 = {"ode_checkpoint": TRAJECTORY_FILE}
SOFT_PROMPT = {**ON_STAGE_1, "series_text": "none", "stage1_logit": "off"}

VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    STAGE_1: ({"trajectory_only": True}, "reads series and static features; no language model"),
    "stage 1 without facts": (
        {"trajectory_only": True, "facts": "off"},
        "reads the series alone",
    ),
    "states decay": (
        {"trajectory_only": True, "dynamics": "decay"},
        "stage 1 whose state decays between two observations, without the ODE",
    ),
    "states held": (
        {"trajectory_only": True, "dynamics": "none"},
        "stage 1 whose state stays the same between two observations, without the ODE",
    ),
    "facts as text": (
        {"soft_prompt": "off", "series_text": "none"},
        "a language model that reads the context of a patient, and no series",
    ),
    "text": ({"soft_prompt": "off"}, "a language model that reads context and series as text"),
    "text + logit": (
        {**ON_STAGE_1, "soft_prompt": "off"},
        "the variant text, whose answer is added to that of stage 1",
    ),
    "soft prompt": (
        SOFT_PROMPT,
        "a language model that reads the context, and the series as soft tokens",
    ),
    "soft prompt + logit": (
        {**ON_STAGE_1, "series_text": "none"},
        "the variant soft prompt, whose answer is added to that of stage 1",
    ),
    "text + soft prompt + logit": (
        ON_STAGE_1,
        "a language model that reads the series as text and as soft tokens, whose answer is added "
        "to that of stage 1",
    ),
    "soft prompt of another patient": (
        {**SOFT_PROMPT, "soft_prompt": "shuffled"},
        "a control: the soft tokens are another patient's, so that only the context can help",
    ),
    "soft prompt + random weights": (  # packed weights cannot be drawn
        {**SOFT_PROMPT, "base_weights": "random", "quantization": "none"},
        "a control: a language model that has learned no language",
    ),
}
"""The compared models: their flags, and what they are; without ``trajectory_only`` a model of stage
2. A path lies below the output folder."""


# --------------------------------------------------------------------------- one of several


def stage_folder(args: Namespace) -> Path:
    """Return the folder of the stage that the arguments choose."""
    folder: Path = args.output_dir / stage_name(args)
    return folder


def run_or_continue(title: str, args: Namespace, dataset: TrajectoryDataset, train: Train) -> int:
    """Train one run, continue it where it was stopped, or leave it where it is finished.

    The console gets one line; the lines of the run itself go to its log file.

    Raises:
        InputError: as ``train``, with the title before the text.
    """
    folder, code = stage_folder(args), EXIT_DONE
    try:
        with quiet_console():
            stage1 = given_stage1(args)
            data = run_data(args, dataset, PromptOptions(), stage1)  # prompts are flags
            done = progress_of(folder, run_facts(args, data, stage1))
            if done != "all":
                own = Namespace(**{**vars(args), "resume": done == "part"})
                reset_peak_memory()
                code = train(own, dataset)
    except InputError as error:
        raise InputError(f"{title}: {error}", error.value) from error
    finally:
        RUN_LOG.begin()  # the lines below belong to no run
    if code == EXIT_DONE:
        how = {"all": "already there, ", "part": "continued, ", "none": ""}[done]
        logger.info("%s: %stest AUROC %s: %s", title, how, auroc_of(folder, "test"), folder)
    return code


def auroc_of(folder: Path, part: str) -> str:
    """Return the AUROC of a finished stage's part in words.

    Raises:
        InputError: the file is damaged.
    """
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
    """Train and test the chosen variants on one split and seed, and compare them.

    A variant that was made before by the same arguments and data is not made again.

    Args:
        args: of the command line.
        dataset: of all variants.
        train: trains a variant.
        seed_title: stands before each name, as one of several seeds, whose own table is then not
            printed.

    Returns:
        0, or the exit code of the variant that failed.

    Raises:
        InputError: a name is unknown, or as ``train``.
    """
    names, reference = args.arms, args.reference
    if unknown := sorted(set(names or ()) - set(VARIANTS)):
        raise InputError(f"--arms {', '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    # Others build on stage 1, and its baselines are compared.
    chosen = {STAGE_1, reference, *(VARIANTS if names is None else names)}
    folders = {}
    for name in [name for name in VARIANTS if name in chosen]:
        own = variant_arguments(name, args)
        folders[name] = stage_folder(own)
        if code := run_or_continue(f"{seed_title}{name}", own, dataset, train):
            return code
        if name == STAGE_1:
            check_reference(reference, folders[name])
    if processes().is_main_process:
        compare_variants(folders, dataset.outcome, args, quiet=bool(seed_title))
    return EXIT_DONE


def check_reference(name: str, stage_1: Path) -> None:
    """Check that the reference is a variant, or a baseline of a finished stage 1.

    Raises:
        InputError: naming all of them.
    """
    processes().wait_for_everyone()  # the first one writes the predictions
    choices = [*VARIANTS, *read_predictions(stage_1, STAGE_1).columns.drop([*TESTED, STAGE_1])]
    if name not in choices:
        raise InputError(f"--reference {name}: choose from {', '.join(choices)}")


def variant_arguments(name: str, args: Namespace) -> Namespace:
    """Return the arguments of a variant.

    Stage 1 lies in the output folder itself, each other one in a folder below ``ablation``.
    """
    own: dict[str, Any] = {"mode": "classification", **VARIANTS[name][0]}
    if name != STAGE_1:
        own["output_dir"] = args.output_dir / "ablation" / re.sub(r"\W+", "_", name)
    if "ode_checkpoint" in own:
        own["ode_checkpoint"] = args.output_dir / own["ode_checkpoint"]
    return Namespace(**{**vars(args), "ablation": False, **own})


def compare_variants(
    folders: dict[str, Path], outcome: str, args: Namespace, *, quiet: bool
) -> None:
    """Compare the variants with the reference and the baselines; write ``ablation/``."""
    place = args.output_dir / "ablation"
    place.mkdir(exist_ok=True)
    table = join_predictions(folders)
    write_text(place / "predictions_test.csv", table.to_csv(index=False))
    with quiet_console() if quiet else contextlib.nullcontext():
        write_results(
            place / "ablation",
            evaluate(table, args.seed, reference=args.reference),
            {name: cost_of(folder) for name, folder in folders.items()},
            title=f"What each part of the model adds: {outcome}",
            card={"Seed": str(args.seed)},
            notice=random_models_notice({"all": vars(args)}),
            meanings={name: meaning for name, (_, meaning) in VARIANTS.items()},
        )


# --------------------------------------------------------------------------- --seeds


def run_seeds(args: Namespace, read: Callable[[Namespace], TrajectoryDataset], train: Train) -> int:
    """Run the same command with each seed, which has a split of its own, and pool the tests.

    A run that was made before by the same arguments and data is not made again.

    Args:
        args: of the command line; seeds count from ``--seed`` on.
        read: reads the data, once unless ``{seed}`` stands in their path.
        train: trains one run.

    Returns:
        0, or the exit code of the run that failed.

    Raises:
        InputError: one stage 1 for all seeds, or as ``train``.
    """
    if args.ode_checkpoint and SEED not in str(args.ode_checkpoint):
        raise InputError(
            "--seeds: each seed has a split of its own, and so a stage 1: write {seed} for its "
            f"number, as in --ode_checkpoint {args.output_dir}/seed_{{seed}}/{TRAJECTORY_FILE}"
        )
    one_source = not any(SEED in str(path) for path in (args.data_path, args.data_dir))
    dataset: TrajectoryDataset | None = None
    folders: dict[int, Path] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        own = seed_arguments(seed, args)
        dataset = dataset if dataset and one_source else read(own)
        if args.ablation:
            folders[seed] = own.output_dir / "ablation"
            code = run_ablation(own, dataset, train, f"seed {seed}, ")
        else:
            folders[seed] = stage_folder(own)
            code = run_or_continue(f"seed {seed}", own, dataset, train)
        if code:
            return code
    if processes().is_main_process and dataset:
        pool_seeds(folders, dataset.outcome, args)
    return EXIT_DONE


def seed_arguments(seed: int, args: Namespace) -> Namespace:
    """Return the arguments of one seed's run: its number, its folder, ``{seed}`` filled in."""
    filled = {
        name: type(value)(str(value).replace(SEED, str(seed)))
        for name, value in vars(args).items()
        if isinstance(value, (str, Path))
    }
    own = {"seed": seed, "seeds": None, "output_dir": args.output_dir / f"seed_{seed}"}
    return Namespace(**{**vars(args), **filled, **own})


def pool_seeds(folders: dict[int, Path], outcome: str, args: Namespace) -> None:
    """Write the metrics of all splits: means with intervals and spread, and a line a seed.

    Args:
        folders: stage folder, or folder of the ablation, of each seed.
        outcome: the event in a few words.
        args: of the command line.
    """
    stage = next(iter(folders.values())).name
    reference = args.reference if args.ablation else STAGE_NAMES[stage]
    models = [
        read_predictions(each, "probability" if args.ablation else reference)
        for each in folders.values()
    ]
    tables = _shared_models(models)
    metrics = evaluate_splits(tables, args.seed, reference)
    if args.ablation:
        known = [read_json(folder / "ablation.json")["cost"] for folder in folders.values()]
    else:
        known = [{reference: cost_of(folder)} for folder in folders.values()]
    cost = {name: _mean([each[name] for each in known]) for name in known[0]}
    splits = None if args.ablation else split_table(folders)
    auroc = metrics.row(reference, "auroc")
    title = "What each part of the model adds" if args.ablation else reference.capitalize()
    write_results(
        args.output_dir / ("seeds_ablation" if args.ablation else f"seeds_{stage}"),
        metrics,
        cost,
        title=f"{title}, in {len(folders)} splits of the data: {outcome}",
        sentences=[
            f"Over {len(folders)} splits the test AUROC of {reference} is {auroc['min']:.3f} to "
            f"{auroc['max']:.3f}, mean {value_text(auroc)}."
        ],
        card={
            "Seeds": f"{min(folders)} to {max(folders)}",
            "Not in the intervals": (
                "the change with split and training, which the standard deviation over the splits "
                "(SD) shows; the intervals treat the trained models as fixed"
            ),
        },
        meanings={name: meaning for name, (_, meaning) in VARIANTS.items()},
        notice=random_models_notice({"all": vars(args)}),
        splits=splits,
    )


def split_table(folders: dict[int, Path]) -> pd.DataFrame:
    """Return the AUROC of each seed on its validation and its test part, in words."""
    lines = [(seed, auroc_of(f, "validation"), auroc_of(f, "test")) for seed, f in folders.items()]
    return pd.DataFrame(lines, columns=["Seed", "Validation AUROC [95 %]", "Test AUROC [95 %]"])


def _mean(costs: Collection[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the mean cost of the runs of one model, None where some run lacks it."""
    table = pd.DataFrame(list(costs)).astype(float)
    means = {str(name): float(column.mean(skipna=False)) for name, column in table.items()}
    return {name: None if np.isnan(mean) else mean for name, mean in means.items()}


def _shared_models(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Leave out models that are missing in some split, and log their names."""
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    if len({best_blend(list(map(str, table))) for table in tables}) > 1:
        shared = [name for name in shared if name != ENSEMBLE]  # they hold different blends
    others = sorted({str(name) for table in tables for name in table} - set(shared))
    if others:
        logger.info("not in every split, so not pooled: %s", ", ".join(others))
    return [table[shared] for table in tables]
