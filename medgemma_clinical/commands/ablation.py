"""Train and compare what each part adds: dynamics, facts, text, soft prompt: ``--ablation``."""

from __future__ import annotations

import contextlib
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_clinical.commands.command_line import EXIT_DONE, quiet_console
from medgemma_clinical.commands.compare import join_predictions
from medgemma_clinical.commands.several_runs import Train, run_or_continue, stage_folder
from medgemma_clinical.data.small_cells import counting_rule
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.comparison import compare_models, write_comparison
from medgemma_clinical.files import write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

REFERENCE = "stage 1 alone"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {"trajectory_only": True},
    "stage 1, states decay": {"trajectory_only": True, "dynamics": "decay"},
    "stage 1, states held": {"trajectory_only": True, "dynamics": "none"},
    "stage 1, no facts": {"trajectory_only": True, "facts": "off"},
    "text alone": {"mode": "classification", "soft_prompt": "off"},
    "soft prompt alone": {"mode": "classification", "series_text": "none"},
    "text + soft prompt": {"mode": "classification"},
}
"""The models that are compared, each with the flags that make it."""


def run_ablation(
    args: Namespace, dataset: TrajectoryDataset, train: Train, seed_title: str = ""
) -> int:
    """Train and test every variant on one split and seed, and compare them.

    A variant that was made before by the same arguments and data is not made again.

    Args:
        args: of the command line.
        dataset: of all variants.
        train: trains a variant.
        seed_title: stands before the name of each variant, as one of several seeds, whose own
            table is then not printed.

    Returns:
        0, or the exit code of the variant that failed.

    Raises:
        InputError: see ``train``.
    """
    folders = {}
    for name in VARIANTS:
        own = variant_arguments(name, args)
        folders[name] = stage_folder(own)
        if code := run_or_continue(f"{seed_title}{name}", own, dataset, train):
            return code
    if processes().is_main_process:
        with quiet_console() if seed_title else contextlib.nullcontext():
            write_results(folders, dataset.outcome, args)
    return EXIT_DONE


def variant_arguments(name: str, args: Namespace) -> Namespace:
    """Return the arguments of a variant.

    Stage 1 lies in the output folder itself, each other variant in a folder below ``ablation``.
    """
    place: dict[str, Any] = {}
    if name != REFERENCE:
        place["output_dir"] = args.output_dir / "ablation" / re.sub(r"\W+", "_", name)
    if "soft prompt" in name:
        place["ode_checkpoint"] = args.output_dir / TRAJECTORY_FILE
    return Namespace(**{**vars(args), "ablation": False, **VARIANTS[name], **place})


def write_results(folders: dict[str, Path], outcome: str, args: Namespace) -> None:
    """Compare the variants with stage 1 and with the baselines; write ``ablation/``."""
    place = args.output_dir / "ablation"
    table = join_predictions(folders)
    results = compare_models([table], REFERENCE, args.seed, args.min_cell)
    for name, folder in folders.items():
        results[name]["seconds_an_epoch"] = seconds_an_epoch(folder)
    write_text(place / "predictions_test.csv", table.to_csv(index=False))
    write_comparison(
        place,
        "ablation",
        results,
        REFERENCE,
        title=f"What each part adds: {outcome}",
        sentences=[],
        card={"Seed": str(args.seed), "Small cells": counting_rule(args.min_cell)},
    )


def seconds_an_epoch(folder: Path) -> float:
    """Return the median time of an epoch with its validation."""
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return float(np.median([json.loads(line)["seconds"] for line in lines]))
