"""Run the three stages on the sample data with a tiny language model: ``--demo``."""

from __future__ import annotations

import logging
import webbrowser
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medgemma_clinical.commands.command_line import EXIT_DONE
from medgemma_clinical.distributed import processes
from medgemma_clinical.evaluation.report import STAGE_TITLES
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from medgemma_clinical.provenance import ROOT

logger = logging.getLogger(__name__)

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


def run_demo(args: Namespace, train: Callable[[Namespace], int]) -> int:
    """Run the three training commands of the README, each shown as a user would type it.

    The list of the pages to open comes last; ``--open`` opens the first.

    Args:
        args: of the command line.
        train: reads the data and trains one stage; returns an exit code.
    """
    shared = {**SETTINGS, "output_dir": args.output_dir, "seed": args.seed}
    shared["log_file"] = args.log_file
    for stage in STAGES:
        flags = {**stage, **shared}
        if "mode" in stage:
            flags["ode_checkpoint"] = args.output_dir / TRAJECTORY_FILE
        logger.info("\n$ python medgemma_trainer.py %s", shown_flags(flags))
        # The tiny model is never quantised.
        own = Namespace(**{**vars(args), "demo": False, "quantization": "none", **flags})
        if code := train(own):
            return code
    pages = {
        title: args.output_dir / stage / "report.html" for stage, title in STAGE_TITLES.items()
    }
    logger.info("\nPages to open:")
    for title, page in pages.items():
        logger.info("  %s: %s", title, page)
    if args.open and processes().is_main_process:
        open_page(next(iter(pages.values())))
    return EXIT_DONE


def open_page(page: Path) -> None:
    """Show a page in the user's browser; where there is none, say so."""
    if not webbrowser.open(page.resolve().as_uri()):
        logger.warning(
            "--open: no browser on this machine; copy %s to one that has a browser", page
        )


def shown_flags(flags: dict[str, Any]) -> str:
    """Return flags as typed on a command line."""
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items()
    )
