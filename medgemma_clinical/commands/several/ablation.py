"""Train and compare models that each lack one part: ``--ablation``."""

from __future__ import annotations

import contextlib
import re
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.logs import quiet_console
from medgemma_clinical.commands.several.compare import join_predictions, read_predictions
from medgemma_clinical.commands.several.runs import (
    Train,
    random_models_notice,
    run_figures,
    run_or_continue,
    stage_folder,
)
from medgemma_clinical.data.small_cells import counting_rule
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.comparison import (
    TESTED,
    Results,
    compare_models,
    part_findings,
    write_comparison,
)
from medgemma_clinical.files import InputError, write_text
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE

STAGE_1 = "stage 1"
ON_STAGE_1 = {"ode_checkpoint": TRAJECTORY_FILE}
SOFT_PROMPT = {**ON_STAGE_1, "series_text": "none", "stage1_logit": "off"}

ARMS: dict[str, dict[str, Any]] = {
    STAGE_1: {"trajectory_only": True},
    "stage 1 without facts": {"trajectory_only": True, "facts": "off"},
    "states decay": {"trajectory_only": True, "dynamics": "decay"},
    "states held": {"trajectory_only": True, "dynamics": "none"},
    "facts as text": {"soft_prompt": "off", "series_text": "none"},
    "text": {"soft_prompt": "off"},
    "text + logit": {**ON_STAGE_1, "soft_prompt": "off"},
    "soft prompt": SOFT_PROMPT,
    "soft prompt + logit": {**ON_STAGE_1, "series_text": "none"},
    "text + soft prompt + logit": ON_STAGE_1,
    "soft prompt of another patient": {**SOFT_PROMPT, "soft_prompt": "shuffled"},
    "soft prompt + random weights": {
        **SOFT_PROMPT,
        **{"base_weights": "random", "quantization": "none"},  # packed weights cannot be drawn
    },
}
"""The compared models, each with its flags; without ``trajectory_only`` a model of stage 2. A path
lies below the output folder."""

ARM_MEANINGS = {
    STAGE_1: "reads series and facts; no language model",
    "stage 1 without facts": "reads the series alone",
    "states decay": "stage 1 whose state decays between two observations, without the ODE",
    "states held": "stage 1 whose state stays the same between two observations, without the ODE",
    "facts as text": "a language model that reads the context of a patient, and no series",
    "text": "a language model that reads context and series as text",
    "text + logit": "the arm text, whose answer is added to that of stage 1",
    "soft prompt": "a language model that reads the context, and the series as soft tokens",
    "soft prompt + logit": "the arm soft prompt, whose answer is added to that of stage 1",
    "text + soft prompt + logit": (
        "a language model that reads the series as text and as soft tokens, whose answer is added "
        "to that of stage 1"
    ),
    "soft prompt of another patient": (
        "a control: the soft tokens are those of another patient, so that only the context can help"
    ),
    "soft prompt + random weights": "a control: a language model that has learned no language",
}
"""What the arms are, for their page."""


PARTS = {
    "facts": (STAGE_1, "stage 1 without facts"),
    "the ODE, beside states that decay": (STAGE_1, "states decay"),
    "the ODE, beside states that are held": (STAGE_1, "states held"),
    "the series as text": ("text", "facts as text"),
    "text, beside stage 1": ("text + logit", STAGE_1),
    "soft prompt, beside stage 1": ("soft prompt + logit", STAGE_1),
    "text and soft prompt, beside stage 1": ("text + soft prompt + logit", STAGE_1),
    "the soft prompt of the patient, beside that of another": (
        "soft prompt",
        "soft prompt of another patient",
    ),
    "pretraining of the language model": ("soft prompt", "soft prompt + random weights"),
}
"""What is asked of each part: an arm that has it, and an arm that differs by lacking it."""


def run_ablation(
    args: Namespace, dataset: TrajectoryDataset, train: Train, seed_title: str = ""
) -> int:
    """Train and test the chosen arms on one split and seed, and compare them.

    An arm that was made before by the same arguments and data is not made again.

    Args:
        args: of the command line.
        dataset: of all arms.
        train: trains an arm.
        seed_title: stands before the name of each arm, as one of several seeds, whose own table is
            then not printed.

    Returns:
        0, or the exit code of the arm that failed.

    Raises:
        InputError: see ``chosen_arms``, ``check_reference`` and ``train``.
    """
    folders = {}
    for name in chosen_arms(args.arms, args.reference):
        own = arm_arguments(name, args)
        folders[name] = stage_folder(own)
        if code := run_or_continue(f"{seed_title}{name}", own, dataset, train):
            return code
        if name == STAGE_1:
            check_reference(args.reference, folders[name])
    if processes().is_main_process:
        with quiet_console() if seed_title else contextlib.nullcontext():
            write_results(folders, dataset.outcome, args)
    return EXIT_DONE


def chosen_arms(names: Collection[str] | None, reference: str) -> list[str]:
    """Return the arms to make, in the order of ``ARMS``.

    Stage 1 is always one of them, since others build on it and its baselines are compared, and so
    is the reference, if it is an arm.

    Args:
        names: of the command line; None for all.
        reference: an arm, or a baseline.

    Raises:
        InputError: naming an arm that does not exist.
    """
    if unknown := sorted(set(names or ()) - set(ARMS)):
        raise InputError(f"--arms {', '.join(unknown)}: choose from {', '.join(ARMS)}")
    chosen = {STAGE_1, reference, *(ARMS if names is None else names)}
    return [name for name in ARMS if name in chosen]


def check_reference(name: str, stage_1: Path) -> None:
    """Check that the reference is an arm, or a baseline of a finished stage 1.

    Raises:
        InputError: naming all arms and baselines.
    """
    processes().wait_for_everyone()  # the first one writes the predictions
    choices = [*ARMS, *read_predictions(stage_1, STAGE_1).columns.drop([*TESTED, STAGE_1])]
    if name not in choices:
        raise InputError(f"--reference {name}: choose from {', '.join(choices)}")


def arm_arguments(name: str, args: Namespace) -> Namespace:
    """Return the arguments of an arm.

    Stage 1 lies in the output folder itself, each other arm in a folder below ``ablation``.
    """
    own: dict[str, Any] = {"mode": "classification", **ARMS[name]}
    if name != STAGE_1:
        own["output_dir"] = args.output_dir / "ablation" / re.sub(r"\W+", "_", name)
    if "ode_checkpoint" in own:
        own["ode_checkpoint"] = args.output_dir / own["ode_checkpoint"]
    return Namespace(**{**vars(args), "ablation": False, **own})


def write_results(folders: dict[str, Path], outcome: str, args: Namespace) -> None:
    """Compare the arms with the reference and with the baselines; write ``ablation/``."""
    place = args.output_dir / "ablation"
    table = join_predictions(folders)
    results = compare_models([table], args.reference, args.seed, args.min_cell)
    for name, folder in folders.items():
        results[name] |= run_figures(folder)
    place.mkdir(exist_ok=True)
    write_text(place / "predictions_test.csv", table.to_csv(index=False))
    write_comparison(
        place,
        "ablation",
        results,
        args.reference,
        title=f"What each part of the model adds: {outcome}",
        sentences=unused_sentences(results),
        card={"Seed": str(args.seed), "Small cells": counting_rule(args.min_cell)},
        models=arm_meanings(results),
        parts=part_findings([table], PARTS, args.seed, args.min_cell),
        notice=random_models_notice({"all": vars(args)}),
    )


def arm_meanings(results: Results) -> dict[str, str]:
    """Return what the arms among the compared models are."""
    return {name: meaning for name, meaning in ARM_MEANINGS.items() if name in results}


def unused_sentences(results: Results) -> list[str]:
    """Return a sentence on the arms whose language model has no weight, if there are any."""
    unused = [name for name, each in results.items() if each.get("residual_weight") == 0]
    if not unused:
        return []
    models = ", ".join(unused)
    return [f"The language model has weight 0, and so adds nothing to stage 1, in: {models}."]
