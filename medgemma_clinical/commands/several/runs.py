"""Train several runs of one command, each once, and read their figures."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.commands.logs import RUN_LOG, quiet_console
from medgemma_clinical.commands.run_folder import (
    given_stage1,
    progress_of,
    read_run,
    run_data,
    run_facts,
    stage_name,
)
from medgemma_clinical.data.texts import PromptOptions
from medgemma_clinical.data.trajectories import TrajectoryDataset
from medgemma_clinical.distributed import reset_peak_memory
from medgemma_clinical.evaluation.bootstrap import Estimate
from medgemma_clinical.evaluation.comparison import RUN_FIGURES
from medgemma_clinical.files import InputError, read_json
from medgemma_clinical.models.language_model import TINY
from medgemma_clinical.models.model_card import RANDOM_MODEL, RANDOM_MODEL_UNREAD

logger = logging.getLogger(__name__)

Train = Callable[[Namespace, TrajectoryDataset], int]
"""Trains and tests one stage on data that are read; returns an exit code."""


def stage_folder(args: Namespace) -> Path:
    """Return the folder of the stage that the arguments choose."""
    folder: Path = args.output_dir / stage_name(args)
    return folder


def random_models_notice(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a page says first where some runs have the built-in random model; else nothing.

    Args:
        runs: the arguments of each by its name; none where they are not known.
    """
    tiny = [name for name, run in runs.items() if run.get("model_name") == TINY]
    readers = [name for name, run in runs.items() if not run.get("trajectory_only")]
    random = [name for name in tiny if name in readers]
    if not readers:
        return RANDOM_MODEL_UNREAD if len(tiny) == len(runs) else ""
    if random == readers:
        return RANDOM_MODEL
    names = " and of ".join(random)
    notice = "is tiny and random: its figures say nothing about MedGemma."
    return f"The language model of {names} {notice}" if random else ""


def run_or_continue(title: str, args: Namespace, dataset: TrajectoryDataset, train: Train) -> int:
    """Train one run, continue it where it was stopped, or leave it where it is finished.

    The console gets one line; the lines of the run itself go to its log file.

    Returns:
        The run's exit code.

    Raises:
        InputError: as ``train``, with the title before the text.
    """
    folder, code = stage_folder(args), EXIT_DONE
    try:
        with quiet_console():
            done = run_progress(args, dataset)
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
        auroc = read_auroc(folder, "test").text()
        logger.info("%s: %stest AUROC %s: %s", title, how, auroc, folder)
    return code


def run_progress(args: Namespace, dataset: TrajectoryDataset) -> str:
    """Return how far an earlier run of the same command has come: ``none``, ``part`` or ``all``."""
    # The prompts are flags, which are compared by themselves.
    stage1 = given_stage1(args)
    data = run_data(args, dataset, PromptOptions(), stage1)
    return progress_of(stage_folder(args), run_facts(args, data, stage1))


def read_auroc(folder: Path, part: str) -> Estimate:
    """Return the AUROC of a finished stage, ``part`` being ``validation`` or ``test``.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / "metrics.json"
    try:
        return Estimate(**read_json(path)[part]["auroc"])
    except (ValueError, KeyError, TypeError) as error:
        problem = "damaged: delete the folder of this stage, and start again"
        raise InputError(f"{path}: {problem}") from error


def cost_of(folder: Path) -> dict[str, float | None]:
    """Return the cost of a finished stage.

    Returns:
        Median seconds of an epoch with its validation; mean tokens that a language model reads of
        a training patient; peak memory in MiB.
    """
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = float(np.median([json.loads(line)["seconds"] for line in lines]))
    run = read_run(folder)
    assert run is not None
    return {"seconds_an_epoch": seconds, **run["cost"]}


def run_figures(folder: Path) -> dict[str, float | None]:
    """Return the cost of a finished stage, and the weight of its language model beside stage 1."""
    weight: float | None = read_json(folder / "metrics.json").get("residual_weight")
    return {**cost_of(folder), "residual_weight": weight}


def mean_figures(runs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of cost and weight over runs of one model; None where some run lacks it."""
    means: dict[str, float | None] = {}
    for figure in RUN_FIGURES.keys() & runs[0].keys():
        known = [run[figure] for run in runs]
        means[figure] = None if None in known else float(np.mean(known))
    return means
