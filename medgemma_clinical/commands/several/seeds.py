"""Run one command with several seeds and pool the tests: ``--seeds``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.several.ablation import (
    PARTS,
    arm_meanings,
    run_ablation,
    unused_sentences,
)
from medgemma_clinical.commands.several.compare import read_predictions
from medgemma_clinical.commands.several.runs import (
    Train,
    mean_figures,
    random_models_notice,
    read_auroc,
    run_figures,
    run_or_continue,
    stage_folder,
)
from medgemma_clinical.data.small_cells import counting_rule
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.baselines import COMBINED, richest_blend
from medgemma_clinical.evaluation.bootstrap import NO_VALUE
from medgemma_clinical.evaluation.comparison import (
    Results,
    compare_models,
    part_findings,
    write_comparison,
)
from medgemma_clinical.evaluation.judgement.verdict import difference_of_parts
from medgemma_clinical.evaluation.report import STAGE_NAMES, STAGE_TITLES
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

logger = logging.getLogger(__name__)

SEED = "{seed}"
"""Stands in a flag's value for the number of the seed."""

BEYOND_CHANCE = "Beyond chance"
"""Column that says whether validation and test part disagree."""


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
        InputError: one stage 1 for all seeds, or see ``train``.
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
    """Write figures by seed, their mean and its intervals; name the best run by validation.

    Args:
        folders: stage folder, or folder of the ablation, of each seed.
        outcome: the event in a few words.
        args: of the command line.
    """
    if args.ablation:
        reference, name = args.reference, "seeds_ablation"
        title = "What each part of the model adds"
        tables = [read_predictions(folder) for folder in folders.values()]
        sentences = []
    else:
        stage = next(iter(folders.values())).name
        reference, name, title = STAGE_NAMES[stage], f"seeds_{stage}", STAGE_TITLES[stage]
        tables = [read_predictions(folder, reference) for folder in folders.values()]
        sentences = [best_by_validation(folders)]
    tables = _shared_models(tables)
    results = compare_models(tables, reference, args.seed, args.min_cell)
    if args.ablation:
        add_run_figures(results, list(folders.values()))
        sentences = unused_sentences(results)
    else:
        results[reference] |= mean_figures([run_figures(each) for each in folders.values()])
    first, last = min(folders), max(folders)
    write_comparison(
        args.output_dir,
        name,
        results,
        reference,
        title=f"{title}, in {len(folders)} splits of the data: {outcome}",
        sentences=sentences,
        card={
            "Seeds": f"{first} to {last}",
            "Small cells": counting_rule(args.min_cell),
            "Not in the intervals": (
                "the change of a figure with split and training, which the standard deviation "
                "over the splits (SD) shows; the intervals treat the trained models as fixed"
            ),
        },
        models=arm_meanings(results) if args.ablation else None,
        notice=random_models_notice({"all": vars(args)}),
        parts=part_findings(tables, PARTS, args.seed, args.min_cell) if args.ablation else (),
        splits=None if args.ablation else split_table(folders),
    )
    for sentence in sentences:
        logger.info("%s", sentence)


def add_run_figures(results: Results, folders: list[Path]) -> None:
    """Add to each arm its cost and weight, the mean over the ablations in ``folders``."""
    ablations = [read_json(folder / "ablation.json") for folder in folders]
    for name in ablations[0]:
        results[name] |= mean_figures([each[name] for each in ablations])


def _shared_models(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Leave out models that are missing in some split, and log their names."""
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    blends = {richest_blend(list(map(str, table))) for table in tables}
    if len(blends) > 1:  # the combined models hold different ones
        shared = [name for name in shared if name != COMBINED]
    others = sorted({str(name) for table in tables for name in table} - set(shared))
    if others:
        logger.info("not in every split, so not pooled: %s", ", ".join(others))
    return [table[shared] for table in tables]


def split_table(folders: dict[int, Path]) -> pd.DataFrame:
    """Return the AUROC of each seed on its validation and test part, and whether they agree."""
    lines = []
    for seed, folder in folders.items():
        validation, test = (read_auroc(folder, part) for part in ("validation", "test"))
        difference = difference_of_parts(test, validation)
        beyond = "yes" if difference.above(0) or difference.below(0) else "no"
        line = {"Seed": seed, "Validation": validation.text(), "Test": test.text()}
        line["Test minus validation"] = difference.text("+.3f")
        line[BEYOND_CHANCE] = NO_VALUE if difference.low is None else beyond
        lines.append(line)
    return pd.DataFrame(lines)


def best_by_validation(folders: dict[int, Path]) -> str:
    """Return a sentence on the seed whose run has the highest validation AUROC."""
    known = {seed: read_auroc(folder, "validation") for seed, folder in folders.items()}
    aurocs = {seed: auroc.value for seed, auroc in known.items() if auroc.value is not None}
    if not aurocs:
        return "Best by validation: not shown, few patients have the event (--min_cell)."
    best = max(aurocs, key=aurocs.__getitem__)
    place = "/".join(folders[best].parts[-2:])
    return (
        f"Best by validation: seed {best}, with an AUROC of {known[best].text()} there and of "
        f"{read_auroc(folders[best], 'test').text()} on its test part ({place}). Each seed has "
        "its own validation part, so this choice is partly chance."
    )
