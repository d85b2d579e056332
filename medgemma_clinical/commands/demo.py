"""Run the three stages on the sample data with a tiny language model: ``--demo``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.files import InputError
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.provenance import ROOT

logger = logging.getLogger(__name__)

FREE_FLAGS = frozenset({"--demo", "--output_dir", "--seed", "--log_file"})
"""Flags that the demo leaves to the user."""

SAMPLE_DATA = ROOT / "tests" / "data" / "physionet2012_bicarbonate.csv"
SETTINGS: dict[str, Any] = {
    "data_path": SAMPLE_DATA,
    "model_name": "tiny",
    "max_samples": 1000,
    "trajectory_epochs": 10,
    "epochs": 4,
    "adapter_lr": 1e-2,
}
"""Values of flags that all three stages share."""

STAGES: tuple[dict[str, Any], ...] = (
    {"trajectory_only": True},
    {"mode": "classification"},
    {"mode": "generative"},
)


def run_demo(args: Namespace, given: set[str], train_command: Callable[[Namespace], int]) -> int:
    """Run the three training commands of the README, each shown as a user would type it.

    Args:
        args: of the command line.
        given: flags that the user typed.
        train_command: reads the data and trains one stage; returns an exit code.

    Raises:
        InputError: a flag that the demo sets itself.
    """
    if taken := sorted(given - FREE_FLAGS):
        raise InputError(f"--demo and {taken[0]} do not go together")
    for changes in stage_changes(args):
        logger.info("\n$ python medgemma_trainer.py %s", shown_flags(changes))
        # The tiny model is never quantised.
        own = {**vars(args), "demo": False, "quantization": "none", **changes}
        if code := train_command(Namespace(**own)):
            return code
    return EXIT_DONE


def stage_changes(args: Namespace) -> list[dict[str, Any]]:
    """Return the flags of each stage's command; the later ones read the encoder of the first."""
    shared = {**SETTINGS, "output_dir": args.output_dir, "seed": args.seed}
    shared["log_file"] = args.log_file
    encoder = {"ode_checkpoint": args.output_dir / TRAJECTORY_FILE}
    return [
        {**stage, **({} if "trajectory_only" in stage else encoder), **shared} for stage in STAGES
    ]


def shown_flags(changes: dict[str, Any]) -> str:
    """Return flags as typed on a command line."""
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items()
    )
